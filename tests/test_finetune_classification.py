"""examples/finetune_classification.py on small pictures: few labels, learning, going on."""

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torchvision
from PIL import Image
from torch import Tensor

EXAMPLES = str(Path(__file__).parents[1] / "examples")
sys.path.insert(0, EXAMPLES)

import finetune_classification as script  # noqa: E402
from parts import labelled, resume  # noqa: E402
from parts.labelled import balanced, listed, open_images  # noqa: E402
from parts.machine import Machine  # noqa: E402

# Layer norm, so that only the sums see how a batch is split.
TINY = (
    "--model", "vit_tiny_patch16_224", "--model-args",
    '{"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 8}', "--image-size", 32,
    "--workers", 0, "--device", "cpu", "--total-batch", 8, "--epochs", 3, "--base-lr", 3,
)  # fmt: skip


def write_image(path: Path, label: int, number: int) -> None:
    """A class is a colour."""
    rng = np.random.default_rng((label, number))
    pixels = rng.integers(0, 60, (36, 40, 3))
    pixels[..., label] += 150
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    for part, first, count in (("train", 0, 8), ("val", 8, 2)):
        for label in range(3):
            for i in range(first, first + count):
                write_image(folder / part / f"class{label}" / f"{label}_{i}.png", label, i)
    return folder


def run(data: Path, output: Path, *arguments: object) -> dict[str, Any]:
    script.main([*map(str, arguments), "--data", str(data), "--output", str(output)])
    return json.loads((output / "results.json").read_text())


def model(output: Path) -> dict[str, Tensor]:
    return torch.load(output / "last.pt", weights_only=True)["model"]


def assert_same(one: Path, two: Path, **tolerance: float) -> None:
    first, second = model(one), model(two)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, **(tolerance or {"rtol": 0, "atol": 0}))


# Parts of the labels ----------------------------------------------------------------------------


def test_a_part_of_the_labels_is_balanced_and_nested() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 200))
    few, more = (balanced(labels, percent, seed=1) for percent in (1, 10))
    assert np.bincount(labels[few]).tolist() == [2] * 5
    assert np.bincount(labels[more]).tolist() == [20] * 5
    assert set(few) <= set(more)
    assert np.array_equal(few, balanced(labels, 1, seed=1))
    assert not np.array_equal(few, balanced(labels, 1, seed=2))
    assert np.array_equal(balanced(labels, 100, seed=1), np.arange(1000))


def test_no_class_is_left_without_a_label() -> None:
    labels = np.array([0] * 500 + [1] * 3)
    assert np.bincount(labels[balanced(labels, 1, seed=0)]).tolist() == [5, 1]


def test_a_list_names_images_by_path_or_file(data: Path, tmp_path: Path) -> None:
    part, _ = open_images(data)
    names = ["class0/0_3.png 0", "1_7.png", "class2/2_0.png 2", ""]
    (tmp_path / "list.txt").write_text("\n".join(names))
    found = listed(part, tmp_path / "list.txt")
    assert [part[0].name(i) for i in found] == [
        "class0/0_3.png",
        "class1/1_7.png",
        "class2/2_0.png",
    ]
    (tmp_path / "list.txt").write_text("1_7.png\n3_7.png\n")
    with pytest.raises(SystemExit, match=r"1 of 2 lines name no training image, such as '3_7.png'"):
        listed(part, tmp_path / "list.txt")


def test_images_without_names_are_listed_by_number(tmp_path: Path) -> None:
    class Source:
        labels = np.zeros(5, int)

        def name(self, index: int) -> str:
            return f"image {index}"

    (tmp_path / "list.txt").write_text("4\n0\n")
    assert listed((Source(), np.arange(5)), tmp_path / "list.txt").tolist() == [0, 4]


def test_the_list_is_what_is_trained_on(data: Path, tmp_path: Path) -> None:
    names = [f"{label}_{i}.png" for label in range(3) for i in (1, 2)]
    (tmp_path / "list.txt").write_text("\n".join(names))
    found = run(data, tmp_path, *TINY, "--epochs", 1, "--label-list", tmp_path / "list.txt")
    assert found["images"] == 6
    assert found["rows"][0][1] == "6 labelled images of list.txt"
    assert len(found["rows"]) == 1  # nothing was published for this list


# Training ---------------------------------------------------------------------------------------


def test_colours_are_learned_and_figures_kept(data: Path, tmp_path: Path) -> None:
    found = run(data, tmp_path, *TINY, "--recipe", "paper", "--labels", 50, "--epochs", 12)
    history = found["history"]
    assert [line["epoch"] for line in history] == list(range(1, 13))
    assert history[-1]["top1"] == 1.0
    assert history[-1]["loss"] < history[0]["loss"]
    assert found["images"] == 12
    assert found["rows"][0][1:] == ["12 labelled images, 50 %", 100.0, 100.0]
    assert "| 100.00 | 100.00 |" in (tmp_path / "results.md").read_text()
    assert list(tmp_path.glob("events.out.tfevents.*"))


GRID = ("--recipe", "paper", "--grid", "--epochs", 1)


def test_a_grid_trains_every_setting_and_held_out_images_choose(data: Path, tmp_path: Path) -> None:
    flags = TINY[:-2]  # without a rate
    every = run(data, tmp_path / "every", *flags, *GRID, "--labels", 50)
    rates = (0.005, 0.01, 0.02, 0.05, 0.1)
    assert [f"lr {rate:g}, head x1, 1 epochs" in row[0] for rate, row in
            zip(rates, every["rows"], strict=True)] == [True] * 5  # fmt: skip
    assert len({row[0] for row in every["rows"]}) == 5
    one = run(data, tmp_path / "one", *flags, *GRID[:2], "--epochs", 1, "--labels", 50,
              "--base-lr", 0.02)  # fmt: skip
    assert one["rows"][0][2:] == every["rows"][2][2:]  # every setting begins anew
    chosen = run(data, tmp_path / "chosen", *flags, *GRID, "--labels", 50, "--held-out", 0.25)
    best = max(chosen["settings"], key=lambda s: s["held_out"])
    assert len(chosen["rows"]) == 1 and best["name"] in chosen["rows"][0][0]
    assert chosen["history"] == best["history"]


@pytest.mark.parametrize("part", [1, 10, 100])
def test_the_papers_row_stands_beside_its_own_protocol_and_part_of_imagenet(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    """arXiv 2006.07733, tables 2 and 8; the images of SimCLR's lists, imagenet_subsets/."""
    figures = {1: (53.2, 78.4), 10: (68.8, 89.0), 100: (77.7, 93.9)}
    sizes = {1: 12_811, 10: 128_116, 100: 1_281_167}
    assert script.PUBLISHED[sizes[part], 50_000, 1000] == figures[part]
    flags = (*TINY, *GRID, "--labels", 50)
    own = script.PUBLISHED[sizes[part], 50_000, 1000]
    (train, _), (_, test) = open_images(data)
    some = len(balanced(train.labels, 50, 0))
    monkeypatch.setitem(script.PUBLISHED, (some, len(test), 3), own)
    found = run(data, tmp_path / "own", *flags, "--held-out", 0.25)
    assert found["rows"][1][2:] == list(figures[part])
    for name, less in (
        ("choice", flags), ("data", (*flags, "--held-out", 0.25, "--labels", 25)),
        ("recipe", (*flags, "--held-out", 0.25, "--recipe", "mmselfsup-1", "--base-lr", 1,
                    "--head-multiplier", 1)),
    ):  # fmt: skip
        rows = run(data, tmp_path / name, *less)["rows"]
        assert not any("the paper" in row[0] for row in rows)


def test_held_out_images_are_those_without_a_label_where_there_are_any() -> None:
    labels = np.repeat(np.arange(4), 100)
    every = np.arange(400)
    few = every[balanced(labels, 10, 0)]
    left, chooses = script.apart(labels, every, few, 0.05, seed=0)
    assert left.tolist() == few.tolist() and not set(chooses) & set(few)
    assert np.bincount(labels[chooses]).tolist() == [5] * 4
    left, chooses = script.apart(labels, every, every, 0.05, seed=0)
    assert np.bincount(labels[chooses]).tolist() == [5] * 4
    assert sorted([*left, *chooses]) == every.tolist()
    assert script.apart(labels, every, few, 0.0, seed=0)[1].tolist() == []


def test_the_head_has_a_rate_of_its_own(data: Path, tmp_path: Path) -> None:
    flags = (*TINY, "--epochs", 1, "--weight-decay", 0)
    start = run_start(data, tmp_path, flags)
    run(data, tmp_path / "still", *flags, "--head-multiplier", 0)
    still = model(tmp_path / "still")
    assert torch.equal(still["head.weight"], start["head.weight"])
    assert not torch.equal(still["backbone.cls_token"], start["backbone.cls_token"])
    moved = {}
    for multiplier in (1, 100):  # one step of all images, small enough to be linear
        output = tmp_path / str(multiplier)
        run(data, output, *flags, "--total-batch", 24, "--base-lr", 1e-4,
            "--head-multiplier", multiplier)  # fmt: skip
        moved[multiplier] = model(output)["head.weight"] - start["head.weight"]
    torch.testing.assert_close(moved[100], 100 * moved[1], rtol=0.02, atol=1e-6)


def run_start(data: Path, folder: Path, flags: tuple) -> dict[str, Tensor]:
    run(data, folder / "start", *flags, "--base-lr", 0)
    return model(folder / "start")


def test_small_passes_add_up_to_the_batch(data: Path, tmp_path: Path) -> None:
    whole = run(data, tmp_path / "whole", *TINY, "--base-lr", 0.5)
    parts = run(data, tmp_path / "parts", *TINY, "--base-lr", 0.5, "--batch-size", 3)
    assert_same(tmp_path / "whole", tmp_path / "parts", rtol=1e-3, atol=1e-4)
    losses = [[line["loss"] for line in found["history"]] for found in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    ("recipe", "epoch", "factor"),
    [
        ("paper", 0, 1.0),
        ("paper", 15, 0.5),
        ("mmselfsup-1", 11.9, 1.0),
        ("mmselfsup-1", 12, 0.2),
        ("mmselfsup-10", 16, 0.04),
    ],
)
def test_the_rate_follows_the_recipe(recipe: str, epoch: float, factor: float) -> None:
    found = script.rate(script.RECIPES[recipe], round(10 * epoch), 10)
    assert found == pytest.approx(factor)


def test_recipes_have_the_published_settings() -> None:
    """MMSelfSup 0.x, configs/benchmarks/classification/imagenet/imagenet_{1,10}percent/
    resnet50_head{1,10,100}_4xb64-steplr{1e-1,1e-2,1e-3}-20e_in1k-{1,10}pct.py and _base_/datasets/
    imagenet.py; arXiv 2006.07733, appendix C.1."""
    one, ten = script.RECIPES["mmselfsup-1"], script.RECIPES["mmselfsup-10"]
    assert (ten.milestones, ten.gamma, ten.bilinear) == ((12, 16), 0.2, True)
    grid = {"base_lr": (0.1, 0.01, 0.001), "head_multiplier": (1.0, 10.0, 100.0)}
    assert script.GRIDS["mmselfsup-1"] == script.GRIDS["mmselfsup-10"] == grid
    assert script.GRIDS["paper"] == {"base_lr": (0.005, 0.01, 0.02, 0.05, 0.1), "epochs": (30, 50)}
    assert (one.epochs, one.total_batch, one.weight_decay, one.nesterov) == (20, 256, 5e-4, False)
    assert ten.weight_decay == 1e-4
    paper = script.RECIPES["paper"]
    assert (paper.total_batch, paper.nesterov, paper.weight_decay) == (1024, True, 0.0)


def test_evaluation_is_in_evaluation_mode_and_counts_every_image() -> None:
    norm = torch.nn.BatchNorm1d(7, affine=False)
    scores = 4 * torch.eye(7) - torch.arange(7) / 10
    batches = [(scores[:5], torch.arange(5)), (scores[5:], torch.tensor([0, 4]))]
    machine = Machine(torch.device("cpu"), torch.float32, batch_size=5, workers=0)
    top1, top5 = script.evaluate(norm.train(), batches, machine)
    assert (top1, top5) == pytest.approx((5 / 7, 6 / 7))
    assert norm.num_batches_tracked == 0


@pytest.mark.parametrize("name", ["resnet18", "VisionTransformer", "mobilenet_v3_small"])
def test_torchvisions_classifier_is_replaced(name: str) -> None:
    net = (
        torchvision.models.VisionTransformer(32, 16, 1, 2, 16, 32)
        if name == "VisionTransformer"
        else torchvision.models.get_model(name)
    )
    classifier = script.Classifier(net, 7, 32)
    assert classifier(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    weights = [m for m in classifier.modules() if isinstance(m, torch.nn.Linear)]
    assert sum(m.out_features == 7 for m in weights) == 1
    assert all(m.out_features != 1000 for m in weights)


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
    assert sorted(seen) == [(epoch, number) for epoch in range(3) for number in range(24)]


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_exactly(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (*TINY, "--model", "resnet10t", "--base-lr", 0.1, "--model-args",
             '{"channels": [8, 8, 16, 16], "drop_rate": 0.5, "drop_path_rate": 0.5}')  # fmt: skip
    whole = run(data, tmp_path / "whole", *flags)
    save, count = resume.checkpoint.save, []

    def saves_once(*arguments: Any) -> None:
        if count:
            raise Killed
        count.append(save(*arguments))

    monkeypatch.setattr(resume.checkpoint, "save", saves_once)
    with pytest.raises(Killed):
        run(data, tmp_path / "cut", *flags)
    monkeypatch.undo()
    cut = run(data, tmp_path / "cut", *flags)
    assert_same(tmp_path / "whole", tmp_path / "cut")
    assert cut["history"] == whole["history"]


def test_another_run_in_the_folder_is_refused(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path, *TINY, "--epochs", 1)
    with pytest.raises(SystemExit, match=r"labels: 100.0 there, 50.0 now"):
        run(data, tmp_path, *TINY, "--epochs", 1, "--labels", 50)


SPLIT = (*TINY, "--base-lr", 0.5)


def work(rank: int, data: str, output: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    script.main(["--data", data, "--output", output, *map(str, SPLIT)])


@pytest.mark.slow
def test_two_processes_end_as_one_does(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = run(data, tmp_path / "one", *SPLIT)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(s.getsockname()[1]))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([EXAMPLES, os.environ.get("PYTHONPATH", "")]))
    mp.get_context("forkserver").set_forkserver_preload(["finetune_classification"])
    mp.start_processes(
        work, (str(data), str(tmp_path / "two")), nprocs=2, start_method="forkserver"
    )
    both = json.loads((tmp_path / "two" / "results.json").read_text())
    assert_same(tmp_path / "one", tmp_path / "two", rtol=1e-3, atol=1e-4)
    assert [line["top1"] for line in both["history"]] == [x["top1"] for x in alone["history"]]
    losses = [[line["loss"] for line in found["history"]] for found in (alone, both)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--labels", 0), "--labels 0; expected a percentage"),
        (("--labels", 101), "--labels 101; expected a percentage"),
        (("--epochs", 0), "--epochs 0; expected 1 or more"),
        (("--base-lr", -1), "--base-lr -1.0; expected 0 or more"),
        (("--recipe", "paper", "--momentum", 0), "--momentum 0.0; expected it in"),
        (("--held-out", 1), "--held-out 1.0; expected a share"),
        (("--label-list", "nowhere.txt"), "nowhere.txt cannot be read"),
        (("--base-lr", 1e30), "the loss is nan in epoch 1: lower --base-lr"),
    ],
)
def test_flags_that_cannot_work_are_refused(
    data: Path, tmp_path: Path, flags: tuple, sentence: str
) -> None:
    with pytest.raises(SystemExit, match=sentence):
        run(data, tmp_path, *TINY, *flags)
