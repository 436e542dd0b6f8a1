"""examples/evaluate_linear.py on small pictures: tables, going on, processes, data, refusals."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torchvision
from checkpoint_helpers import write_mmengine
from PIL import Image
from torch import Tensor
from torchvision import transforms as v1

EXAMPLES = str(Path(__file__).parents[1] / "examples")
sys.path.insert(0, EXAMPLES)

import evaluate_linear  # noqa: E402
from parts import labelled, resume  # noqa: E402
from parts.backbone import Facts  # noqa: E402
from parts.linear_views import Lighting  # noqa: E402
from parts.order import Order  # noqa: E402
from parts.published import DataSet  # noqa: E402

TINY = (
    *("--model", "resnet10t", "--model-args", '{"channels": [8, 8, 16, 16]}', "--image-size", 32),
    *("--workers", 0, "--device", "cpu", "--total-batch", 8, "--epochs", 3, "--eval-every", 1),
)  # fmt: skip
VIT = (
    *TINY, "--model", "vit_tiny_patch16_224", "--model-args",
    '{"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 8}',
)  # fmt: skip


def write_image(path: Path, label: int, number: int) -> None:
    """A class is a colour."""
    rng = np.random.default_rng((label, number))
    pixels = rng.integers(0, 60, (36, 40, 3))
    pixels[..., label % 3] += 150
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def write_folder(folder: Path, train: int = 6, test: int = 2, classes: int = 3) -> Path:
    for part, count, first in (("train", train, 0), ("val", test, train)):
        for label in range(classes):
            for i in range(count):
                write_image(folder / part / f"class{label}" / f"{first + i}.png", label, first + i)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("linear"))


def run(data: Path, output: Path, *arguments: object) -> dict[str, Any]:
    given = [*map(str, arguments), "--data", str(data), "--output", str(output)]
    evaluate_linear.main(given)
    return json.loads((output / "results.json").read_text())


def heads(output: Path) -> dict[str, Tensor]:
    return torch.load(output / "last.pt", weights_only=True)["heads"]


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor], **tolerance: float) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, **(tolerance or {"rtol": 0, "atol": 0}))


# What comes out ---------------------------------------------------------------------------------


def test_multi_head_gives_the_published_table(data: Path, tmp_path: Path) -> None:
    found = run(data, tmp_path, *TINY, "--protocol", "multi-head", "--base-lrs", 0.1)
    stages = [f"feature{i}" for i in range(1, 6)]
    assert found["columns"] == ["", *stages]
    assert np.shape(found["top1"]) == (5, 1)
    first, five = found["rows"]  # and none that was published for other data
    assert first[1:] == [100 * row[0] for row in found["top1"]]
    assert five[1:] == [100.0] * 5  # of three classes
    table = (tmp_path / "results.md").read_text()
    assert "| feature1 | feature2 |" in table and "random weights: top-1" in table
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    logged = set().union(*lines)
    assert {"loss/feature1/lr 0.003125", "top1/feature5/lr 0.003125"} <= logged
    assert list(tmp_path.glob("events.out.tfevents.*"))


def own_data(monkeypatch: pytest.MonkeyPatch, protocol: str, data: Path) -> None:
    """Let `data` count as those of the published figures."""
    parts = labelled.open_images(data)
    counts = [len(numbers) for _, numbers in parts]
    classes = len(np.unique(parts[0][0].labels[parts[0][1]]))
    evaluation = evaluate_linear.EVALUATIONS[protocol]
    changed = replace(evaluation, data=DataSet(*counts, classes))
    monkeypatch.setitem(evaluate_linear.EVALUATIONS, protocol, changed)


# MMSelfSup 0.x, configs/selfsup/byol/README.md, and for the 71.8 main, configs/selfsup/byol/
# metafile.yml; arXiv 2006.07733, table 1.
PUBLISHED = {
    "multi-head": [[15.41, 35.15, 47.77, 62.59, 71.85], [15.16, 35.26, 47.77, 63.10, 71.21]],
    "places205": [[21.25, 36.55, 43.66, 50.74, 53.82], [21.18, 36.68, 43.42, 51.04, 54.06]],
    "mmselfsup": [[71.8, None], [71.88, None], [71.72, None], [72.93, None]],
    "paper": [[74.3, 91.6]],
    "inaturalist": [],
}


@pytest.mark.parametrize("protocol", evaluate_linear.EVALUATIONS)
def test_published_rows_stand_beside_their_own_data_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    how = ("--protocol", protocol, "--cached", "--epochs", 1)
    own = run(data, tmp_path / "other", *TINY, *how)["rows"]
    own_data(monkeypatch, protocol, data)
    rows = run(data, tmp_path / "own", *TINY, *how)["rows"]
    assert rows[: len(own)] == own
    assert [row[1:] for row in rows[len(own) :]] == PUBLISHED[protocol]


def test_the_published_data_have_their_published_sizes() -> None:
    sizes = {name: tuple(e.data) for name, e in evaluate_linear.EVALUATIONS.items()}
    assert sizes["paper"] == sizes["mmselfsup"] == sizes["multi-head"] == (1281167, 50000, 1000)
    assert sizes["places205"] == (2448873, 20500, 205)
    assert sizes["inaturalist"] == (437513, 24426, 8142)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("crop", "BICUBIC"), ("bilinear", "BILINEAR"), ("colour", "BILINEAR"), ("places", "BILINEAR")],
)
def test_images_are_made_smaller_as_the_source_does(kind: str, mode: str) -> None:
    """MMSelfSup 0.x, configs/benchmarks/classification/{_base_/datasets/{imagenet,places205,
    inaturalist2018},imagenet/resnet50_mhead_linear-8xb32-steplr-90e_in1k}.py: torchvision's
    RandomResizedCrop and Resize with their default. DeepMind's byol/utils/dataset.py: bicubic."""
    facts = Facts("", "", mean=(0.0,) * 3, std=(1.0,) * 3, image_size=32)
    for view in evaluate_linear.views(kind, facts, whole=False):
        found = [t.interpolation for t in view.transforms if hasattr(t, "interpolation")]
        assert found and {one.name for one in found} == {mode}


def test_layers_by_name_have_heads_in_any_network(data: Path, tmp_path: Path) -> None:
    found = run(data, tmp_path, *TINY, "--protocol", "multi-head", "--model", "convnext_atto",
                "--model-args", '{"dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}', "--cached",
                "--stages", "stages.1", "stages.3")  # fmt: skip
    assert found["columns"] == ["", "stages.1", "stages.3"]
    assert len(found["rows"]) == 2


@pytest.mark.parametrize("cached", [False, True])
def test_one_head_learns_colours_on_any_backbone(data: Path, tmp_path: Path, cached: bool) -> None:
    how = ["--cached"] if cached else []
    found = run(data, tmp_path, *VIT, "--protocol", "paper", "--epochs", 30, "--eval-every", 99,
                "--base-lrs", 30, *how)  # fmt: skip
    assert found["columns"] == ["", "top-1", "top-5"]
    assert found["rows"][0][1] == 100.0


def test_several_rates_are_all_shown_and_held_out_images_choose(data: Path, tmp_path: Path) -> None:
    rates = ("--base-lrs", 1e-6, 3)
    every = run(data, tmp_path / "a", *TINY, "--protocol", "mmselfsup", *rates)
    assert every["chosen"] is None
    assert [row[0].split(", ")[-1] for row in every["rows"][:2]] == ["lr 3.125e-08", "lr 0.09375"]
    chosen = run(data, tmp_path / "b", *TINY, *rates, "--held-out", 0.34)
    assert chosen["chosen"] == {"pooled": int(np.argmax(chosen["held_out"][0]))}
    assert len(chosen["rows"]) == 1  # the chosen one
    cached = run(data, tmp_path / "c", *TINY, *rates, "--held-out", 0.34, "--cached")
    assert cached["chosen"] is not None


def test_held_out_images_are_not_trained_on_and_seen_as_in_tests(data: Path) -> None:
    train, _ = labelled.open_images(data)
    view, look = evaluate_linear.views("crop", Facts("", "", image_size=32), whole=False)
    training = labelled.Labelled(train[0], view, train[1])
    kept, left = evaluate_linear.apart(training, look, share=0.34, seed=0)
    assert sorted([*kept.indices, *left.indices]) == train[1].tolist()
    assert np.bincount(left.labels).tolist() == [2, 2, 2]
    assert (kept.transform, left.transform) == (view, look)


def test_an_epoch_shows_every_image_once_in_a_new_order() -> None:
    sampler = Order(images=20, size=8, seed=0, stop=0, rest="spread")
    epochs = []
    for wanted in range(2):
        sampler.only(wanted)
        batches = list(sampler)
        assert len(batches) == len(sampler) == 3
        assert [len(batch) for batch in batches] == [7, 7, 6]
        assert {epoch for batch in batches for epoch, _ in batch} == {wanted}
        epochs.append([number for batch in batches for _, number in batch])
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]


# Going on, and several processes -----------------------------------------------------------------


def test_every_epoch_draws_every_image_anew(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, draw = [], labelled.Drawn.__getitem__

    def watched(self: Any, key: np.ndarray) -> Any:
        seen.append(tuple(key.tolist()))
        return draw(self, key)

    monkeypatch.setattr(labelled.Drawn, "__getitem__", watched)
    run(data, tmp_path, *TINY)
    assert sorted(seen) == [(epoch, number) for epoch in range(3) for number in range(18)]


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_exactly(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (*TINY, "--protocol", "multi-head", "--base-lrs", 0.1, 1)
    whole = run(data, tmp_path / "whole", *flags)
    save, count = resume.checkpoint.save, []

    def saves_twice(*arguments: Any) -> None:
        if len(count) == 2:
            raise Killed
        count.append(save(*arguments))

    monkeypatch.setattr(resume.checkpoint, "save", saves_twice)
    with pytest.raises(Killed):
        run(data, tmp_path / "cut", *flags)
    monkeypatch.undo()
    cut = run(data, tmp_path / "cut", *flags)
    assert_same(heads(tmp_path / "whole"), heads(tmp_path / "cut"))
    assert cut["top1"] == whole["top1"]


def test_another_run_in_the_folder_is_refused(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path, *TINY, "--epochs", 1)
    with pytest.raises(SystemExit, match="total-batch: 8 there, 6 now"):
        run(data, tmp_path, *TINY, "--epochs", 1, "--total-batch", 6)


def work(rank: int, data: str, output: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    evaluate_linear.main(["--data", data, "--output", output, *map(str, FLAGS)])


FLAGS = (*TINY, "--protocol", "multi-head", "--base-lrs", 0.1, 1)


@pytest.mark.slow
def test_two_processes_end_as_one_does(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = run(data, tmp_path / "one", *FLAGS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([EXAMPLES, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("MASTER_PORT", free_port())
    mp.get_context("forkserver").set_forkserver_preload(["evaluate_linear"])
    mp.start_processes(
        work, (str(data), str(tmp_path / "two")), nprocs=2, start_method="forkserver"
    )
    both = json.loads((tmp_path / "two" / "results.json").read_text())
    assert both["top1"] == alone["top1"]
    assert_same(heads(tmp_path / "one"), heads(tmp_path / "two"), rtol=1e-3, atol=1e-5)


def free_port() -> str:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


# Views ------------------------------------------------------------------------------------------


def test_lighting_is_alexnets() -> None:
    """Colours spread as 0.1 times the eigenvalues along the eigenvectors."""
    grey, noise = torch.full((3, 2, 2), 0.5), Lighting()
    drawn = torch.stack([noise(grey) for _ in range(4000)]) - 0.5
    assert torch.equal(drawn[..., 0, 0], drawn[..., 1, 1])  # one colour an image
    vectors = torch.tensor(
        [[-0.5675, -0.5808, -0.5836], [0.7192, -0.0045, -0.6948], [0.4009, -0.8140, 0.4203]]
    )
    along = drawn[..., 0, 0] @ vectors.T
    expected = 0.1 * torch.tensor([0.2175, 0.0188, 0.0045])
    torch.testing.assert_close(along.std(0), expected, rtol=0.05, atol=2e-5)
    assert drawn.mean().abs() < 1e-3


@pytest.mark.parametrize("kind", evaluate_linear.VIEWS)
@pytest.mark.parametrize("whole", [False, True])
def test_views_are_random_in_training_and_fixed_in_tests(kind: str, whole: bool) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 60, 3), np.uint8))
    train, test = evaluate_linear.views(kind, Facts("", "", image_size=48), whole)
    assert train(image).shape == test(image).shape == (3, 48, 48)
    assert not torch.equal(train(image), train(image))
    assert torch.equal(test(image), test(image))


def test_an_image_of_one_size_is_tested_on_as_a_whole() -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[0] = 255
    facts = Facts("", "", mean=(0.0,) * 3, std=(1.0,) * 3, image_size=32)
    for whole in (True, False):
        _, test = evaluate_linear.views("crop", facts, whole)
        assert bool(test(Image.fromarray(pixels))[:, 0].min() == 1) == whole


def test_a_crop_depends_on_epoch_and_image_alone(data: Path) -> None:
    train, _ = labelled.open_images(data)
    view, _ = evaluate_linear.views("colour", Facts("", "", image_size=32), whole=False)
    drawn = labelled.Drawn(labelled.Labelled(train[0], view, train[1]), seed=1)
    torch.manual_seed(0)
    first = drawn[2, 5][0]
    state = torch.random.get_rng_state()
    assert torch.equal(drawn[2, 5][0], first)
    assert not torch.equal(drawn[3, 5][0], first)
    assert torch.equal(torch.random.get_rng_state(), state)


# Test only --------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["mmselfsup", "multi-head"])
def test_heads_of_an_earlier_run_score_the_same(data: Path, tmp_path: Path, protocol: str) -> None:
    how = (*TINY, "--protocol", protocol, "--epochs", 2)
    trained = run(data, tmp_path / "run", *how)
    last = tmp_path / "run" / "last.pt"
    again = run(data, tmp_path / "again", *how, "--test-only", last)
    assert again["rows"] == trained["rows"] and "test only" in again["title"]
    assert not (tmp_path / "again" / "last.pt").exists()


# MMSelfSup 0.x, mmselfsup/models/heads/cls_head.py: fc_cls; MMPretrain, mmpretrain/models/heads/
# linear_head.py: fc. Both projects' classifiers are "backbone" and "head"
# (mmselfsup/models/algorithms/classification.py; mmpretrain/models/classifiers/image.py), and their
# ResNet names its weights as torchvision does.


def write_linear_checkpoint(path: Path, head: str, classes: int = 3) -> Any:
    """A released linear checkpoint of a torchvision ResNet-18, and the network itself."""
    torch.manual_seed(1)
    net = torchvision.models.resnet18(num_classes=classes)
    state = {}
    for name, value in net.state_dict().items():
        own = name.replace("fc.", f"head.{head}.") if "fc." in name else f"backbone.{name}"
        state[own] = value
    write_mmengine(state, path)
    return net.eval()


@pytest.mark.parametrize("head", ["fc", "fc_cls"])
@pytest.mark.parametrize("layout", ["train and val", "val alone", "list"])
def test_a_released_linear_checkpoint_scores_as_its_network_does(
    data: Path, tmp_path: Path, head: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = write_linear_checkpoint(tmp_path / "linear.pth", head)
    folder = data
    if layout != "train and val":
        folder = tmp_path / "data"
        shutil.copytree(data / "val", folder / "val")
    files = sorted((data / "val").glob("*/*.png"))
    if layout == "list":  # one folder of images, as ImageNet's archive unpacks
        (folder / "meta").mkdir()
        lines = [f"{path.parent.name}/{path.name} {path.parent.name[-1]}" for path in files]
        (folder / "meta" / "val.txt").write_text("\n".join(lines))
    look = v1.Compose([v1.Resize(round(32 * 256 / 224)), v1.CenterCrop(32), v1.ToTensor(),
                       v1.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])  # fmt: skip
    with torch.no_grad():
        found = net(torch.stack([look(Image.open(path).convert("RGB")) for path in files])).argmax(
            1
        )
    truth = torch.tensor([int(path.parent.name[-1]) for path in files])
    own_data(monkeypatch, "mmselfsup", data)
    tested = run(folder, tmp_path / "run", *TINY, "--model", "torchvision/resnet18", "--model-args",
                 '{"num_classes": 3}', "--protocol", "mmselfsup", "--test-only",
                 tmp_path / "linear.pth")  # fmt: skip
    expected = 100 * (found == truth).double().mean().item()
    assert tested["rows"][0][1] == pytest.approx(expected)
    assert [row[1] for row in tested["rows"][1:]] == [71.8, 71.88, 71.72, 72.93]


def test_what_cannot_be_scored_is_refused(data: Path, tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(SystemExit) as ended:
            run(data, tmp_path / "run", *TINY, "--model", "torchvision/resnet18", "--model-args",
                '{"num_classes": 3}', "--protocol", "mmselfsup", "--test-only", path)  # fmt: skip
        return str(ended.value)

    assert "cannot be read" in refused(tmp_path / "nowhere.pth")
    torch.save({"state_dict": {"backbone.x": torch.zeros(1)}}, tmp_path / "other.pth")
    assert "neither OUTPUT/last.pt" in refused(tmp_path / "other.pth")
    write_linear_checkpoint(tmp_path / "two.pth", "fc", classes=2)
    assert "tells 2 classes apart, and the test images have 3" in refused(tmp_path / "two.pth")
    head = {"head.fc.weight": torch.zeros(3, 5), "head.fc.bias": torch.zeros(3)}
    torch.save({"state_dict": head}, tmp_path / "narrow.pth")
    assert "narrow.pth" in refused(tmp_path / "narrow.pth")


# Data sets with lists ---------------------------------------------------------------------------


def write_places205(folder: Path) -> None:
    root = folder / "data/vision/torralba/deeplearning/images256"
    for part, first in (("train", 0), ("val", 3)):
        lines = []
        for label in range(2):
            name = f"a/abbey{label}/{first}.jpg"
            write_image(root / name, label, first)
            lines.append(f"{name} {label}")
        path = folder / "trainvalsplit_places205" / f"{part}_places205.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")


def write_places365(folder: Path) -> None:
    for file, root, names in (
        (
            "places365_train_standard.txt",
            "data_256_standard",
            ("/a/airfield/1.jpg", "/b/bog/1.jpg"),
        ),
        ("places365_val.txt", "val_256", ("v0.jpg", "v1.jpg")),
    ):
        for label, name in enumerate(names):
            write_image(folder / root / name.lstrip("/"), label, 0)
        (folder / file).write_text("".join(f"{name} {i}\n" for i, name in enumerate(names)))


def write_meta(folder: Path) -> None:
    (folder / "meta").mkdir()
    for part in ("train", "val"):
        for label in range(2):
            write_image(folder / "train_val2018" / f"{part}{label}.jpg", label, 0)
        (folder / "meta" / f"{part}.txt").write_text(f"{part}0.jpg 0\n{part}1.jpg 1\n")


def write_inaturalist_lists(folder: Path) -> None:
    """MMSelfSup's tools/data_converters/convert_inaturalist.py writes each image's file_name,
    which begins with train_val2018, and its configurations' data_prefix ends with it."""
    (folder / "meta").mkdir(parents=True)
    for part in ("train", "val"):
        names = [f"train_val2018/Plantae/{label}/{part}.jpg" for label in range(2)]
        for label, name in enumerate(names):
            write_image(folder / name, label, 0)
        text = "".join(f"{name} {label}\n" for label, name in enumerate(names))
        (folder / "meta" / f"{part}.txt").write_text(text)


def write_inaturalist_2018(folder: Path) -> None:
    for part in ("train", "val"):
        images, annotations = [], []
        for label in range(2):
            name = f"train_val2018/Plantae/{label}/{part}.jpg"
            write_image(folder / name, label, 0)
            images.append({"id": 70 + label, "file_name": name})
            annotations.insert(0, {"image_id": 70 + label, "category_id": label})
        content = {"images": images, "annotations": annotations}
        (folder / f"{part}2018.json").write_text(json.dumps(content))


def write_inaturalist_2021(folder: Path) -> None:
    for part in ("2021_train", "2021_valid"):
        for label in range(2):
            write_image(folder / part / f"0000{label}_Animalia" / "x.jpg", label, 0)


@pytest.mark.parametrize(
    "write",
    [
        write_places205,
        write_places365,
        write_meta,
        write_inaturalist_lists,
        write_inaturalist_2018,
        write_inaturalist_2021,
    ],
)
def test_data_sets_with_lists_are_read(write: Any, tmp_path: Path) -> None:
    write(tmp_path)
    for source, numbers in labelled.open_images(tmp_path):
        assert source.labels[numbers].tolist() == [0, 1]
        for number in numbers:
            image = Image.open(tmp_path / source.folder / source.name(number))
            colour = np.asarray(image.convert("RGB")).mean((0, 1))
            assert colour.argmax() == source.labels[number]


# Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((*VIT, "--protocol", "multi-head"), "a head for each stage of a ResNet"),
        ((*TINY, "--protocol", "multi-head", "--stages", "feature6"), "--stages feature6"),
        (
            (*VIT, "--protocol", "multi-head", "--stages", "blocks.0"),
            r"expected a map \(B, C, H, W",
        ),
        ((*TINY, "--epochs", 0), "expected 1 or more epochs"),
        ((*TINY, "--base-lrs"), "expected 1 or more epochs"),
        ((*TINY, "--held-out", 1.2), "--held-out 1.2"),
        ((*TINY, "--model", "resnet0815"), "resnet0815"),
    ],
)
def test_flags_that_cannot_work_are_refused(
    data: Path, tmp_path: Path, flags: tuple, sentence: str
) -> None:
    with pytest.raises(SystemExit, match=sentence):
        run(data, tmp_path, *flags)


def test_data_that_cannot_be_learned_is_refused(tmp_path: Path) -> None:
    single = write_folder(tmp_path / "single", classes=1)
    unlabelled = tmp_path / "unlabelled"
    for i in range(4):
        write_image(unlabelled / f"{i}.png", 0, i)
    for folder in (single, unlabelled):
        with pytest.raises(SystemExit, match="have no label"):
            run(folder, tmp_path / "out", *TINY)


@pytest.mark.parametrize(
    ("part", "text", "sentence"),
    [
        ("val", "a/abbey0/3.jpg 0\na/abbey1/3.jpg 5\n", r"classes \[5\] are in the test images"),
        ("train", "a/abbey0/0.jpg 0\na/abbey1/0.jpg 0\n", "has 1 class to train on"),
        ("val", "a/abbey0/3.jpg\n", 'expected lines of "path label"'),
    ],
)
def test_a_list_that_cannot_be_learned_is_refused(
    tmp_path: Path, part: str, text: str, sentence: str
) -> None:
    write_places205(tmp_path)
    (tmp_path / f"trainvalsplit_places205/{part}_places205.csv").write_text(text)
    with pytest.raises(SystemExit, match=sentence):
        labelled.open_images(tmp_path)


def test_images_that_a_list_names_are_looked_for_before_any_work(tmp_path: Path) -> None:
    write_inaturalist_lists(tmp_path / "lists")
    write_inaturalist_2018(tmp_path / "json")
    for folder, file in (("lists", "meta/val.txt"), ("json", "val2018.json")):
        (tmp_path / folder / "train_val2018/Plantae/1/val.jpg").unlink()
        with pytest.raises(SystemExit, match=f"{file} names images.*1 of 2 .*Plantae/1/val.jpg"):
            labelled.open_images(tmp_path / folder)
    (tmp_path / "json" / "val2018.json").write_text('{"images": []}')
    with pytest.raises(SystemExit, match=r"val2018\.json is not iNaturalist's JSON"):
        labelled.open_images(tmp_path / "json")


@pytest.mark.parametrize("write", [write_inaturalist_lists, write_inaturalist_2018])
def test_the_inaturalist_protocol_runs(tmp_path: Path, write: Any) -> None:
    write(tmp_path / "data")
    found = run(tmp_path / "data", tmp_path / "run", *TINY, "--protocol", "inaturalist",
                "--cached", "--epochs", 1)  # fmt: skip
    assert found["columns"] == ["", *(f"feature{i}" for i in range(1, 6))]


def test_help_says_where_defaults_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate_linear.main(["--help"])
    text = "".join(capsys.readouterr().out.split())
    for part in (
        *("2006.07733", "resnet50_mhead_linear-8xb32-steplr-90e_in1k"),
        *("80ofpaper", "0.2ofpaper", "4096ofmmselfsup", "3060ofmulti-head", "71421ofplaces205"),
    ):
        assert part in text, part
