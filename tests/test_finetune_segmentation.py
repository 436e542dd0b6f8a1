"""examples/finetune_segmentation.py: its measure against torchmetrics, its layouts, crops and
network, and whole runs on tiny images."""

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
import torch.nn.functional as F
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

pytest.importorskip("pycocotools")  # which parts.boxes imports

import convert_sbd  # noqa: E402
import finetune_segmentation as script  # noqa: E402
from parts import resume  # noqa: E402
from parts.backbone import Facts  # noqa: E402
from parts.machine import Machine  # noqa: E402
from parts.order import Order  # noqa: E402

from byol_pytorch import checkpoint  # noqa: E402

pytestmark = [
    pytest.mark.xdist_group("finetune_segmentation"),
    pytest.mark.usefixtures("signals_as_before"),
]

TINY = (
    *("--model", "resnet10t", "--model-args", '{"channels": [8, 8, 16, 16]}', "--device", "cpu"),
    *("--iterations", "4", "--batch-size", "2", "--image-size", "48", "--short-edge", "48"),
    *("--workers", "0", "--log-every", "1"),
)
PLAIN = Facts("none", "none", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
COLOURS = np.array([[20, 20, 20], [220, 40, 40], [40, 220, 40]], np.uint8)


# Tiny data --------------------------------------------------------------------------------------


def draw_mask(seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    """The classes 0, 1 and 2, with a strip of 11."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    top, left = rng.integers(4, 16, 2)
    mask[top : top + 24, left : left + 20] = 1
    mask[top : top + 16, left + 24 : left + 40] = 2
    mask[-3:] = 11
    return mask


def write(folder: Path, stem: str, seed: int, mask: np.ndarray | None = None) -> None:
    mask = draw_mask(seed) if mask is None else mask
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    Image.fromarray(COLOURS[np.minimum(mask, 2)]).save(folder / "images" / f"{stem}.png")
    Image.fromarray(mask).save(folder / "masks" / f"{stem}.png")


def make_folder(folder: Path, test: str = "val") -> Path:
    for split, count in (("train", 4), (test, 3)):
        for i in range(count):
            write(folder / split, f"{i}", i)
    return folder


def make_voc(folder: Path, aug: bool = True) -> Path:
    lists = {"train": 2, "val": 2} | ({"aug": 3} if aug else {})
    for name in ("JPEGImages", "SegmentationClass", "SegmentationClassAug"):
        (folder / name).mkdir(parents=True)
    (folder / "ImageSets" / "Segmentation").mkdir(parents=True)
    for name, count in lists.items():
        stems = [f"{name}{i}" for i in range(count)]
        text = "\n".join(stems)
        (folder / "ImageSets" / "Segmentation" / f"{name}.txt").write_text(text)
        for i, stem in enumerate(stems):
            mask = draw_mask(i)
            mask[mask == 11] = 255
            Image.fromarray(COLOURS[np.minimum(mask, 2)]).save(folder / f"JPEGImages/{stem}.jpg")
            place = "SegmentationClassAug" if name == "aug" else "SegmentationClass"
            picture = Image.fromarray(mask, mode="L").convert("P")
            picture.putdata(mask.flatten().tolist())
            picture.save(folder / place / f"{stem}.png")
    return folder


def make_cityscapes(folder: Path) -> Path:
    for split, count in (("train", 2), ("val", 1)):
        for i in range(count):
            name = f"ulm_{i:06d}_000019"
            pictures, masks = (folder / kind / split / "ulm" for kind in ("leftImg8bit", "gtFine"))
            pictures.mkdir(parents=True, exist_ok=True)
            masks.mkdir(parents=True, exist_ok=True)
            ids = np.zeros((48, 96), np.uint8)  # unlabelled
            ids[:16], ids[16:32], ids[32:40] = 7, 26, 23  # road, car, sky
            Image.fromarray(COLOURS[ids % 3]).save(pictures / f"{name}_leftImg8bit.png")
            for kind in ("labelIds", "instanceIds", "color"):
                Image.fromarray(ids).save(masks / f"{name}_gtFine_{kind}.png")
            (masks / f"{name}_gtFine_polygons.json").write_text("{}")
    return folder


# The measure ------------------------------------------------------------------------------------


def test_miou_of_a_hand_made_case() -> None:
    """Class 0: 3 right of 4 true and 4 found; class 1: 1 of 2 and 2; class 2 nowhere; 1 ignored."""
    truth = torch.tensor([[0, 0, 0, 0], [1, 1, 255, 255]])
    found = torch.tensor([[0, 0, 0, 1], [1, 0, 0, 2]])
    counts = script.confusion(found, truth, 3)
    assert counts.tolist() == [[3, 1, 0], [1, 1, 0], [0, 0, 0]]
    figures = script.scores(counts, ["a", "b", "c"])
    assert figures["IoU of a"] == pytest.approx(100 * 3 / 5)
    assert figures["IoU of b"] == pytest.approx(100 * 1 / 3)
    assert "IoU of c" not in figures
    assert figures["mIoU"] == pytest.approx(100 * (3 / 5 + 1 / 3) / 2)
    assert figures["mAcc"] == pytest.approx(100 * (3 / 4 + 1 / 2) / 2)
    assert figures["aAcc"] == pytest.approx(100 * 4 / 6)


@pytest.mark.parametrize("seed", range(3))
def test_miou_equals_torchmetrics(seed: int) -> None:
    torchmetrics = pytest.importorskip("torchmetrics.classification")
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(6, 6, dtype=torch.long)
    own = {"num_classes": 6, "ignore_index": 255}
    jaccard = torchmetrics.MulticlassJaccardIndex(average="macro", **own)
    accuracy = torchmetrics.MulticlassAccuracy(average="macro", **own)
    whole = torchmetrics.MulticlassAccuracy(average="micro", **own)
    for size in (20, 31, 47):
        truth = torch.randint(6, (size, 30), generator=generator)
        noise = torch.randint(6, truth.shape, generator=generator)
        found = torch.where(torch.rand(truth.shape, generator=generator) < 0.6, truth, noise)
        truth[torch.rand(truth.shape, generator=generator) < 0.1] = 255
        counts += script.confusion(found, truth, 6)
        for metric in (jaccard, accuracy, whole):
            metric.update(found[None], truth[None])
    figures = script.scores(counts, list("abcdef"))
    expected = [100 * metric.compute().item() for metric in (jaccard, accuracy, whole)]
    assert [figures[n] for n in ("mIoU", "mAcc", "aAcc")] == pytest.approx(expected, abs=1e-3)


# Layouts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("test", ["val", "test"])
def test_a_folder_of_masks(tmp_path: Path, test: str) -> None:
    train, tested = script.open_masks(make_folder(tmp_path, test), None, 11)
    assert (len(train.pairs), len(tested.pairs)) == (4, 3)
    assert train.classes == ["class 0", "class 1", "class 2"]
    image, mask = train.read(1)
    assert image.shape == (3, 48, 64) and image.dtype == torch.float32 and image.max() <= 1
    assert sorted(mask.unique().tolist()) == [0, 1, 2, 255]
    assert torch.equal(mask == 255, torch.from_numpy(draw_mask(1) == 11))


def test_a_number_below_the_classes_may_mean_no_class(tmp_path: Path) -> None:
    for split in ("train", "val"):
        mask = np.array([[0, 1], [2, 1]], np.uint8).repeat(24, 0).repeat(32, 1)
        write(tmp_path / split, "0", 0, mask)
    train, _ = script.open_masks(tmp_path, None, 0)
    _, mask = train.read(0)
    assert sorted(mask.unique().tolist()) == [1, 2, 255] and (mask[:24, :32] == 255).all()


def test_voc_with_sbd_takes_its_masks_from_both_folders(tmp_path: Path) -> None:
    make_voc(tmp_path / "VOCdevkit" / "VOC2012")
    train, test = script.open_masks(tmp_path, None, 255)
    assert (len(train.pairs), len(test.pairs)) == (5, 2)
    assert {mask.parent.name for _, mask in train.pairs} == {
        "SegmentationClass", "SegmentationClassAug",
    }  # fmt: skip
    assert len(train.classes) == 21 and train.classes[:2] == ["background", "aeroplane"]
    _, mask = train.read(0)
    assert sorted(mask.unique().tolist()) == [0, 1, 2, 255]


def test_voc_without_sbd_is_refused_unless_it_is_meant(tmp_path: Path) -> None:
    data = make_voc(tmp_path, aug=False)
    with pytest.raises(SystemExit, match=r"aug.txt is missing.* 2 images .*10582.*convert_sbd.py"):
        script.open_masks(data, None, 255)
    train, _ = script.open_masks(data, None, 255, with_sbd=False)
    assert len(train.pairs) == 2


def make_sbd(folder: Path, lists: dict[str, list[str]]) -> Path:
    """As benchmark_RELEASE/dataset: masks in structures of MATLAB's."""
    (folder / "cls").mkdir(parents=True)
    for name, stems in lists.items():
        (folder / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))
        for i, stem in enumerate(stems):
            truth = {"Segmentation": draw_mask(i) % 3, "Boundaries": 0, "CategoriesPresent": [1, 2]}
            scipy.io.savemat(str(folder / "cls" / f"{stem}.mat"), {"GTcls": truth})
    return folder


def test_sbds_masks_become_vocs(tmp_path: Path, capsys: Any) -> None:
    """MMSegmentation 0.x, tools/convert_datasets/voc_aug.py: aug.txt is SBD's train.txt and
    val.txt without VOC's own train.txt and val.txt; a mask is GTcls.Segmentation."""
    voc = make_voc(tmp_path / "VOCdevkit" / "VOC2012", aug=False)
    for name in ("2008_000002", "2008_000007"):
        Image.new("RGB", (64, 48)).save(voc / "JPEGImages" / f"{name}.jpg")
    sbd = make_sbd(tmp_path / "sbd", {"train": ["2008_000007", "val1"],
                                      "val": ["train0", "2008_000002"]})  # fmt: skip
    given = ["--sbd", str(sbd), "--data", str(tmp_path)]
    convert_sbd.main(given)
    text = (voc / "ImageSets" / "Segmentation" / "aug.txt").read_text()
    assert text == "2008_000002\n2008_000007\n"
    assert "2 images, with train.txt 4" in capsys.readouterr().out
    train, _ = script.open_masks(voc, None, 255)
    assert [image.stem for image, _ in train.pairs[2:]] == text.split()
    np.testing.assert_array_equal(train.read(3)[1].numpy(), draw_mask(0) % 3)
    (sbd / "cls" / "2008_000007.mat").unlink()
    with pytest.raises(SystemExit, match=r"1 of their masks .*2008_000007.mat"):
        convert_sbd.main(given)


def test_a_published_row_stands_beside_voc12aug_alone(tmp_path: Path, monkeypatch: Any) -> None:
    """MMSelfSup 0.x, configs/selfsup/byol/README.md, "Pascal VOC 2012 + Aug"."""
    assert script.VOC12AUG_DATA == (10_582, 1449, 21)
    data = make_voc(tmp_path / "VOC2012")
    assert len(run(data, tmp_path / "other", "--iterations", "1")["rows"]) == 1
    monkeypatch.setattr(script, "VOC12AUG_DATA", (5, 2, 21))
    rows = run(data, tmp_path / "own", "--iterations", "1")["rows"]
    assert rows[1][2] == 67.16 and "VOC12aug" in rows[1][0]
    alone = ("--iterations", "1", "--without-sbd")
    assert len(run(data, tmp_path / "alone", *alone)["rows"]) == 1


def test_cityscapes_numbers_are_those_of_training(tmp_path: Path) -> None:
    train, test = script.open_masks(make_cityscapes(tmp_path), None, 255)
    assert (len(train.pairs), len(test.pairs)) == (2, 1)
    assert len(train.classes) == 19
    _, mask = train.read(0)
    rows = [train.classes[int(mask[row, 0])] for row in (0, 20, 35)]
    assert rows == ["road", "car", "sky"]
    assert (mask[40:] == 255).all()


def without_masks(folder: Path) -> None:
    make_folder(folder)
    for path in (folder / "train" / "masks").iterdir():
        path.unlink()


def one_mask_missing(folder: Path) -> None:
    make_folder(folder)
    (folder / "val" / "masks" / "1.png").unlink()


def colours(folder: Path) -> None:
    make_folder(folder)
    Image.fromarray(COLOURS[np.minimum(draw_mask(0), 2)]).save(folder / "train" / "masks" / "2.png")


def other_size(folder: Path) -> None:
    make_folder(folder)
    Image.fromarray(draw_mask(0)[:40]).save(folder / "val" / "masks" / "2.png")


def new_class_in_val(folder: Path) -> None:
    make_folder(folder)
    write(folder / "val", "2", 0, np.full((48, 64), 5, np.uint8))


def voc_image_gone(folder: Path) -> None:
    make_voc(folder)
    (folder / "JPEGImages" / "aug1.jpg").unlink()


@pytest.mark.parametrize(
    ("make", "flags", "sentence"),
    [
        (lambda f: write(f / "pictures", "0", 0), (), "needs a mask for each image"),
        (without_masks, ("--ignore-index", "11"), "4 of 4 images have no mask"),
        (one_mask_missing, ("--ignore-index", "11"), "1 of 3 images have no mask"),
        (colours, ("--ignore-index", "11"), "numbers of the classes, not their colours"),
        (other_size, ("--ignore-index", "11"), "is 64 x 40 pixels, its image 64 x 48"),
        (new_class_in_val, ("--ignore-index", "11"), "holds the class 5, and the training masks"),
        (make_folder, ("--classes", "a,b,c"), "holds the class 11, and --classes names 3"),
        (make_voc, ("--classes", "a,b"), "are for folders of masks"),
        (voc_image_gone, (), "1 files of theirs are missing"),
        (make_folder, ("--max-scale", "0.1"), "is below --min-scale"),
        (make_folder, ("--window", "32", "--stride", "40"), "--stride 40; expected 1 to --window"),
        (make_folder, ("--batch-size", "1"), "batch norm needs 2 images"),
        (make_folder, ("--ignore-index", "11", "--model", "vgg11"), "vgg11"),
        (make_folder, ("--ignore-index", "11", "--checkpoint", "no.pt"), "no.pt"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(
    tmp_path: Path, make: Callable[[Path], Any], flags: tuple[str, ...], sentence: str
) -> None:
    make(tmp_path / "data")
    with pytest.raises(SystemExit) as refused:
        run(tmp_path / "data", tmp_path / "run", *flags)
    assert sentence in str(refused.value)
    assert not (tmp_path / "run" / "last.pt").exists()


# Crops ------------------------------------------------------------------------------------------


def flags(tmp_path: Path, *more: str) -> tuple[argparse.Namespace, Any]:
    own = ("--data", str(tmp_path), "--output", str(tmp_path / "run"))
    return script.parse_arguments([*TINY, *own, *more])


def test_a_crop_and_its_mask_stay_together(tmp_path: Path) -> None:
    """Every class has a colour of its own: each pixel of a crop tells its class."""
    train, _ = script.open_masks(make_folder(tmp_path), None, 11)
    _, protocol = flags(tmp_path, "--no-distort", "--image-size", "64")
    crops = script.Crops(train, PLAIN, protocol, seed=0)
    colour = torch.from_numpy(COLOURS).float() / 255
    scales = set()
    for epoch in range(12):
        image, mask = crops[epoch, 2]
        assert image.shape == (3, 64, 64) and mask.shape == (64, 64) and mask.dtype == torch.long
        distance = (image[None] - colour[:, :, None, None]).abs().amax(dim=1)
        nearest, known = distance.argmin(dim=0), mask != 255
        assert (nearest == mask)[known].float().mean() > 0.9  # edges are mixed
        scales.add(round(known.float().mean().item(), 2))
        again = crops[epoch, 2]
        assert torch.equal(image, again[0]) and torch.equal(mask, again[1])
    assert len(scales) > 6


def test_crops_of_mostly_one_class_are_drawn_again() -> None:
    mask = torch.zeros(100, 100, dtype=torch.uint8)
    mask[:, 70:] = 1
    mask[:50] = 255  # does not count

    def uneven(max_share: float) -> float:
        """How often one class has more than 3/4 of the pixels that count."""
        shares = []
        for seed in range(200):
            place = script.choose_crop(mask, 30, max_share, np.random.default_rng(seed))
            counts = torch.bincount(mask[place].flatten(), minlength=256)[:2]
            shares.append((counts.max() / counts.sum().clamp(min=1)).item())
        return float(np.mean(np.array(shares) > 0.75))

    assert uneven(2.0) > 0.3
    assert uneven(0.75) < 0.2


def test_a_small_image_is_padded_with_ignored_pixels(tmp_path: Path) -> None:
    train, _ = script.open_masks(make_folder(tmp_path), None, 11)
    _, protocol = flags(tmp_path, "--image-size", "128", "--max-scale", "0.5")
    image, mask = script.Crops(train, PLAIN, protocol, seed=0)[0, 0]
    assert image.shape == (3, 128, 128)
    assert (mask[24:] == 255).all() and (mask[:, 32:] == 255).all()
    assert (image[:, 24:] == 0).all() and (mask[:20, :32] != 255).all()


def test_colours_are_distorted_within_their_ranges() -> None:
    image = torch.full((3, 4, 4), 0.4)
    values = [script.distorted(image, np.random.default_rng(i)) for i in range(300)]
    means = np.array([v.mean().item() for v in values])
    assert (means == 0.4 * np.ones(300)).mean() < 0.6
    low, high = 0.5 * (0.4 - 32 / 255), 1.5 * (0.4 + 32 / 255)
    assert low <= means.min() < 0.25 and 0.6 < means.max() <= high
    assert all(v.min() >= 0 and v.max() <= 1 for v in values)


@pytest.mark.parametrize(
    ("shape", "edges", "expected"),
    [
        ((375, 500), (512, 2048), (512, 683)),
        ((1024, 2048), (1025, 2049), (1025, 2049)),
        ((100, 1000), (512, 2048), (205, 2048)),
    ],
)
def test_an_image_is_fitted_within_both_edges(
    shape: tuple[int, int], edges: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert script.fitted(shape, *edges) == expected


# The network ------------------------------------------------------------------------------------


def network(tmp_path: Path, model: str, *more: str) -> script.Segmenter:
    args, protocol = flags(tmp_path, "--model", model, "--model-args", "{}", *more)
    options = {"replace_stride_with_dilation": [False, True, True]}
    if not model.startswith("torchvision/"):
        options = {"output_stride": 8}
    net, _ = script.open_backbone(args, **options)
    return script.Segmenter(net, 5, model, protocol)


@pytest.mark.parametrize("model", ["resnet18", "torchvision/resnet50"])
def test_the_network_has_stride_8_and_everything_learns(tmp_path: Path, model: str) -> None:
    net = network(tmp_path, model)
    width = 2048 if "50" in model else 512
    with torch.no_grad():
        maps = net.eval().body(torch.zeros(1, 3, 64, 96))
    assert maps["out"].shape == (1, width, 8, 12)
    assert maps["aux"].shape == (1, width // 2, 8, 12)
    losses = net.train()(torch.rand(2, 3, 64, 64), torch.randint(5, (2, 64, 64)))
    sum(losses.values()).backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None]
    assert net.eval()(torch.rand(1, 3, 40, 56)).shape == (1, 5, 40, 56)


def test_the_first_block_of_a_dilated_stage_keeps_the_dilation_before(tmp_path: Path) -> None:
    """MMSegmentation's contract_dilation, in both libraries' ResNets."""
    for model in ("resnet50", "torchvision/resnet50"):
        body = network(tmp_path, model).body
        for stage, expected in (("layer3", [1, 2]), ("layer4", [2, 4])):
            assert [body[stage][i].conv2.dilation[0] for i in (0, 1)] == expected


def test_heads_are_mmsegmentations(tmp_path: Path) -> None:
    net = network(tmp_path, "torchvision/resnet50")
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()
              if p.dim() == 4 and not name.startswith("body")}  # fmt: skip
    assert list(shapes.values()) == [
        (512, 2048, 3, 3), (512, 512, 3, 3), (512, 2048 + 512, 3, 3), (5, 512, 1, 1),
        (256, 1024, 3, 3), (5, 256, 1, 1),
    ]  # fmt: skip


def test_losses_are_means_over_all_pixels_ignored_ones_included(tmp_path: Path) -> None:
    net = network(tmp_path, "resnet10t", "--dropout", "0").train()
    images = torch.rand(2, 3, 64, 64)
    masks = torch.randint(5, (2, 64, 64))
    masks[:, :32] = 255
    seen: dict[str, torch.Tensor] = {}
    net.head.register_forward_hook(lambda m, x, y: seen.update(head=y))
    net.aux.register_forward_hook(lambda m, x, y: seen.update(aux=y))
    losses = net(images, masks)
    for name, key, weight in (("loss_segmentation", "head", 1.0), ("loss_aux", "aux", 0.4)):
        logits = F.interpolate(seen[key], (64, 64), mode="bilinear", align_corners=False)
        chosen = logits.log_softmax(1).gather(1, masks.clamp(max=4)[:, None])[:, 0]
        expected = -weight * chosen[masks != 255].sum() / masks.numel()
        torch.testing.assert_close(losses[name], expected)
    masks[:] = 255
    assert all(loss == 0 for loss in net(images, masks).values())


def test_the_learning_rate_is_the_polynomial(tmp_path: Path) -> None:
    own = ["--data", str(tmp_path), "--output", str(tmp_path / "run"), "--device", "cpu"]
    _, protocol = script.parse_arguments(own)
    assert script.learning_rate(0, protocol) == pytest.approx(0.01)
    expected = (0.01 - 1e-4) * 0.25**0.9 + 1e-4
    assert script.learning_rate(15_000, protocol) == pytest.approx(expected)
    assert script.learning_rate(20_000, protocol) == pytest.approx(1e-4)


def test_the_published_flags_are_the_defaults(tmp_path: Path) -> None:
    own = ["--data", str(tmp_path), "--output", str(tmp_path / "run"), "--device", "cpu"]
    _, voc = script.parse_arguments(own)
    assert (voc.iterations, voc.batch_size, voc.image_size) == (20_000, 16, 512)
    assert (voc.lr, voc.weight_decay, voc.aux_weight, voc.window) == (0.01, 5e-4, 0.4, 0)
    _, city = script.parse_arguments([*own, "--protocol", "cityscapes"])
    assert (city.iterations, city.batch_size, city.image_size) == (40_000, 8, 769)
    assert (city.window, city.stride, city.align_corners) == (769, 513, True)


class Blur(torch.nn.Module):
    """Local and shift-invariant away from edges."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(images, 3, 1, 1)


def test_a_sliding_window_sees_every_pixel_and_averages_where_windows_overlap() -> None:
    image = torch.rand(1, 3, 50, 70)

    class Count(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert images.shape[2:] == (32, 32)
            return images

    torch.testing.assert_close(script.predict(Count(), image, 32, 20), image)
    whole = script.predict(Blur(), image, 0, 0)
    assert torch.equal(whole, Blur()(image))
    assert script.window_starts(50, 32, 20) == [0, 18]
    assert script.window_starts(1025, 769, 513) == [0, 256]
    assert script.window_starts(2049, 769, 513) == [0, 513, 1026, 1280]


# Whole runs -------------------------------------------------------------------------------------


def run(data: Path, output: Path, *more: str) -> dict[str, Any]:
    script.main([*TINY, "--data", str(data), "--output", str(output), *more])
    result: dict[str, Any] = json.loads((output / "results.json").read_text())
    return result


def test_a_run_leaves_its_table_picture_log_and_state(tmp_path: Path, capsys: Any) -> None:
    data = make_folder(tmp_path / "data")
    own = ("--ignore-index", "11", "--eval-every", "2", "--classes", "ground,red,green")
    result = run(data, tmp_path / "run", *own)
    assert result["columns"] == ["backbone", "steps", "mIoU", "mAcc", "aAcc"]
    assert len(result["rows"]) == 1
    assert [h["step"] for h in result["history"]] == [2, 4]
    assert "IoU of red" in result["history"][0]
    assert "resnet10t" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"results.md", "predictions.png", "log.jsonl", "last.pt"} <= names
    assert any(name.startswith("events.") for name in names)
    with Image.open(tmp_path / "run" / "predictions.png") as picture:
        assert picture.width > 3 * 64 and picture.height > 3 * 48


def test_a_trained_network_is_scored_without_training(tmp_path: Path) -> None:
    data = make_cityscapes(tmp_path / "data")
    own = ("--protocol", "cityscapes", "--window", "48", "--stride", "32", "--iterations", "1")
    trained = run(data, tmp_path / "run", *own)
    last = str(tmp_path / "run" / "last.pt")
    assert run(data, tmp_path / "again", *own, "--test-only", last)["rows"] == trained["rows"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_cityscapes_protocol_runs_with_windows(tmp_path: Path, dtype: str) -> None:
    data = make_cityscapes(tmp_path / "data")
    own = ("--protocol", "cityscapes", "--window", "48", "--stride", "32", "--dtype", dtype)
    result = run(data, tmp_path / "run", *own, "--iterations", "2")
    assert len(result["rows"]) == 1 and 0 <= result["rows"][0][2] <= 100


def test_a_stopped_run_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_folder(tmp_path / "data")
    own = ("--ignore-index", "11", "--save-every", "2", "--eval-every", "1")
    whole = run(data, tmp_path / "whole", *own)
    save = resume.checkpoint.save

    def save_and_die(state: dict[str, Any], path: Path) -> None:
        save(state, path)
        if state["step"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resume.checkpoint, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "parts", *own)
    parts = run(data, tmp_path / "parts", *own)
    one, two = (checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert whole["history"] == parts["history"] and len(parts["history"]) == 4
    for name, value in one["model"].items():
        assert torch.equal(value, two["model"][name]), name
    with pytest.raises(
        SystemExit, match=r"is of another run, so it cannot go on:\s+lr: 0\.01 there, 0\.5 now"
    ):
        run(data, tmp_path / "parts", *own, "--lr", "0.5")


def test_a_signal_saves_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_folder(tmp_path / "data")
    own = ("--ignore-index", "11", "--save-every", "100")
    rate = script.learning_rate

    def signalled(step: int, protocol: Any) -> float:
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        return rate(step, protocol)

    with monkeypatch.context() as patch:
        patch.setattr(script, "learning_rate", signalled)
        with pytest.raises(SystemExit) as left:
            run(data, tmp_path / "run", *own)
    assert left.value.code == 0
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] == 2
    assert not (tmp_path / "run" / "results.json").exists()
    assert run(data, tmp_path / "run", *own)["history"][-1]["step"] == 4


@pytest.mark.parametrize("world", [1, 2])
def test_the_order_is_one_permutation_an_epoch_whatever_the_processes(
    world: int,
) -> None:
    order = partial(Order, images=7, size=4, seed=3, stop=7, rest="join")
    steps: list[list[list[int]]] = [[] for _ in range(7)]
    for rank in range(world):
        mine = [keys.tolist() for keys in order(rank=rank, world=world)]
        assert [keys.tolist() for keys in order(rank=rank, world=world, start=4)] == mine[4:]
        for step, keys in enumerate(mine):
            steps[step] += keys
    seen = [pair for step in steps for pair in step]
    assert len(seen) == 28
    for epoch in range(4):
        assert sorted(image for e, image in seen if e == epoch) == list(range(7))
    orders = [tuple(image for e, image in seen if e == epoch) for epoch in range(4)]
    assert len(set(orders)) > 1
    assert steps == [keys.tolist() for keys in order(rank=0, world=1)]


@pytest.mark.slow
def test_classes_are_learned(tmp_path: Path) -> None:
    data = make_folder(tmp_path / "data")
    own = ("--ignore-index", "11", "--iterations", "60", "--lr", "0.05", "--no-distort")
    assert run(data, tmp_path / "run", *own, "--model-args", "{}")["rows"][0][2] > 60


@pytest.mark.slow
def test_two_processes_test_every_image_once(tmp_path: Path) -> None:
    data = make_folder(tmp_path / "data")
    own = [*TINY, "--data", str(data), "--output", str(tmp_path / "run"), "--ignore-index", "11"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node=2", str(EXAMPLES / "finetune_segmentation.py"), *own]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    args, protocol = script.parse_arguments(own)
    train, test = script.open_masks(data, None, 11)
    net, facts = script.open_backbone(args, output_stride=8)
    segmenter = script.Segmenter(net, len(train.classes), args.model, protocol)
    cpu = Machine(torch.device("cpu"), torch.float32, batch_size=1, workers=0)
    segmenter.load_state_dict(checkpoint.load(tmp_path / "run" / "last.pt")["model"])
    with torch.inference_mode():
        figures = script.evaluate(segmenter.eval(), test, facts, protocol, cpu, tmp_path)
    assert result["history"][-1] == pytest.approx({"step": 4, **figures})
