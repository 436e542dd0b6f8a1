"""examples/finetune_detection.py: its measures against references, its data, its detectors, and
whole runs on tiny images."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

pytest.importorskip("pycocotools")

import finetune_detection  # noqa: E402
from parts import boxes as detection  # noqa: E402
from parts import detector as networks  # noqa: E402
from parts import resume, voc  # noqa: E402
from parts.machine import Machine  # noqa: E402
from parts.order import Order, in_pairs  # noqa: E402
from pycocotools import mask as run_lengths  # noqa: E402

from byol_pytorch import checkpoint  # noqa: E402

CPU = Machine(torch.device("cpu"), torch.float32, batch_size=4, workers=0)

pytestmark = [
    pytest.mark.xdist_group("finetune_detection"),
    pytest.mark.usefixtures("signals_as_before"),
]

TINY = (
    *("--model", "resnet10t", "--model-args", '{"channels": [8, 8, 16, 16]}', "--device", "cpu"),
    *("--iterations", "4", "--batch-size", "2", "--warmup", "1", "--workers", "0"),
    *("--train-sizes", "48", "64", "--image-size", "64", "--anchors", "8", "16", "32", "64", "128"),
    *("--regions", "8", "--proposals", "10", "--detections", "5", "--log-every", "1"),
)


# Tiny data --------------------------------------------------------------------------------------

# One square and one wide box an image, in edges from 0.
SQUARE, WIDE = (8, 8, 24, 24), (30, 20, 58, 32)


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 60, (48, 64, 3), np.uint8)
    image = Image.fromarray(pixels)
    for box, colour in ((SQUARE, "white"), (WIDE, "red")):
        left, top, right, bottom = box
        ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), fill=colour)
    image.save(path)


def xml(things: list[tuple[str, tuple[int, ...], int]]) -> str:
    objects = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{left + 1}"
        f"</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
        for name, (left, top, right, bottom), difficult in things
    )
    return f"<annotation>{objects}</annotation>"


def make_voc(folder: Path, lists: dict[str, int], names: tuple[str, str] = ("cat", "dog")) -> Path:
    things = [(names[0], SQUARE, 0), (names[1], WIDE, 0)]
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "Annotations").mkdir()
    for name, count in lists.items():
        stems = [f"{name}{i}" for i in range(count)]
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(stems) + "\n")
        for i, stem in enumerate(stems):
            draw(folder / "JPEGImages" / f"{stem}.jpg", i)
            (folder / "Annotations" / f"{stem}.xml").write_text(xml(things))
    return folder


def coco_content(count: int, masks: bool = True) -> dict[str, Any]:
    """Categories with gaps, as COCO's."""
    images = [{"id": 10 + i, "file_name": f"{i}.png", "width": 64, "height": 48}
              for i in range(count)]  # fmt: skip
    annotations = []
    for image in images:
        for category, (left, top, right, bottom) in ((3, SQUARE), (7, WIDE)):
            corners = [left, top, right, top, right, bottom, left, bottom]
            own = {"id": len(annotations) + 1, "image_id": image["id"], "category_id": category,
                   "bbox": [left, top, right - left, bottom - top], "iscrowd": 0,
                   "area": (right - left) * (bottom - top)}  # fmt: skip
            annotations.append(own | ({"segmentation": [corners]} if masks else {}))
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def make_coco(
    folder: Path, train: str = "train2017", test: str = "val2017",
    annotations: str = "annotations/instances_{}.json", masks: bool = True, **change: Any,
) -> Path:  # fmt: skip
    for name, count in ((train, 3), (test, 2)):
        path = folder / annotations.format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(coco_content(count, masks) | change))
        for i in range(count):
            draw(folder / name / f"{i}.png", i)
    return folder


def truth_of(annotations: list[dict[str, Any]], images: int = 4, categories: int = 2) -> Any:
    return detection.indexed({
        "images": [{"id": i, "width": 100, "height": 100} for i in range(images)],
        "annotations": [{"id": i, **a} for i, a in enumerate(annotations, 1)],
        "categories": [{"id": c, "name": str(c)} for c in range(1, categories + 1)],
    })  # fmt: skip


def box(image: int, bbox: list[float], category: int = 1, **more: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": bbox, **more}


# VOC's measure ----------------------------------------------------------------------------------


def test_eleven_points_of_a_hand_made_case() -> None:
    truth = truth_of([box(0, [0, 0, 10, 10]), box(1, [0, 0, 10, 10])])
    results = [
        box(0, [0, 0, 10, 10], score=0.9),  # right: recall 1/2, precision 1
        box(0, [50, 50, 10, 10], score=0.8),  # wrong
        box(1, [0, 0, 10, 8], score=0.7),  # overlap 0.8, right: recall 1, precision 2/3
    ]
    figures = detection.voc_ap(truth, results)
    assert figures["AP50"] == pytest.approx(100 * (6 * 1 + 5 * 2 / 3) / 11)
    assert figures["AP75"] == pytest.approx(figures["AP50"])
    # At 0.85, 0.9 and 0.95 the second box is missed: six of eleven recalls at precision 1.
    six = 100 * 6 / 11
    assert figures["AP"] == pytest.approx((7 * figures["AP50"] + 3 * six) / 10)


def test_recalls_of_tenths_count_at_their_own_point() -> None:
    truth = truth_of([box(i, [0, 0, 10, 10]) for i in range(10)], images=10)
    results = [box(i, [0, 0, 10, 10], score=1 - i / 10) for i in range(3)]
    assert detection.voc_ap(truth, results)["AP50"] == pytest.approx(100 * 4 / 11)


def test_a_difficult_box_is_neither_to_be_found_nor_wrong() -> None:
    truth = truth_of([box(0, [0, 0, 10, 10]), box(0, [50, 50, 10, 10], iscrowd=1)])
    results = [box(0, [50, 50, 10, 10], score=0.9), box(0, [0, 0, 10, 10], score=0.8)]
    assert detection.voc_ap(truth, results)["AP50"] == pytest.approx(100)
    assert detection.voc_ap(truth, results[:1])["AP50"] == 0


def test_a_second_detection_of_a_box_is_wrong() -> None:
    truth = truth_of([box(0, [0, 0, 10, 10]), box(1, [0, 0, 10, 10])])
    twice = [box(0, [0, 0, 10, 10], score=s) for s in (0.9, 0.8)]
    last = [box(1, [0, 0, 10, 10], score=0.7)]
    expected = 100 * (6 * 1 + 5 * 2 / 3) / 11
    assert detection.voc_ap(truth, twice + last)["AP50"] == pytest.approx(expected)


def test_a_class_that_is_not_found_counts_and_one_without_boxes_does_not() -> None:
    truth = truth_of([box(0, [0, 0, 10, 10]), box(0, [0, 0, 10, 10], category=2)], categories=3)
    results = [box(0, [0, 0, 10, 10], score=0.9), box(0, [0, 0, 9, 9], category=3, score=0.9)]
    assert detection.voc_ap(truth, results)["AP50"] == pytest.approx(50)
    assert detection.voc_ap(truth, [])["AP50"] == 0


def vocevaldet(boxes: list[dict[str, Any]], found: list[dict[str, Any]], threshold: float) -> float:
    """VOCevaldet.m and VOCap.m of the VOC 2007 devkit, line by line."""
    count = sum(not b["iscrowd"] for b in boxes)
    taken = [False] * len(boxes)
    right, wrong = [], []
    for result in sorted(found, key=lambda r: -r["score"]):
        best, which = -np.inf, -1
        for i, b in enumerate(boxes):
            if b["image_id"] != result["image_id"]:
                continue
            (x, y, w, h), (u, v, s, t) = result["bbox"], b["bbox"]
            wide = min(x + w, u + s) - max(x, u)
            high = min(y + h, v + t) - max(y, v)
            if wide > 0 and high > 0:
                overlap = wide * high / (w * h + s * t - wide * high)
                if overlap > best:
                    best, which = overlap, i
        hit = best >= threshold
        ignored = hit and boxes[which]["iscrowd"]
        first = hit and not ignored and not taken[which]
        if first:
            taken[which] = True
        right.append(float(first))
        wrong.append(float(not first and not ignored))
    true, false = np.cumsum(right), np.cumsum(wrong)
    total = 0.0
    for k in range(11):
        precisions = [t / (t + f) for t, f in zip(true, false, strict=True)
                      if t + f > 0 and t * 10 >= k * count]  # fmt: skip
        total += max(precisions, default=0.0) / 11
    return total


@pytest.mark.parametrize("seed", range(5))
def test_voc_ap_equals_the_devkits_algorithm(seed: int) -> None:
    boxes, found = random_case(seed, crowd="difficult")
    truth = truth_of(boxes)
    each = []
    for threshold in np.linspace(0.5, 0.95, 10):
        classes = [
            vocevaldet(*([x for x in some if x["category_id"] == c] for some in (boxes, found)),
                       threshold)
            for c in (1, 2)
        ]  # fmt: skip
        each.append(100 * np.mean(classes))
    figures = detection.voc_ap(truth, found)
    assert figures["AP50"] == pytest.approx(each[0])
    assert figures["AP75"] == pytest.approx(each[5])
    assert figures["AP"] == pytest.approx(np.mean(each))
    assert 5 < figures["AP50"] < 95


def random_case(seed: int, crowd: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Boxes of 4 images and 2 classes, and detections near and far from them."""
    rng = np.random.default_rng(seed)
    boxes = []
    for _ in range(30):
        side = rng.integers(8, 40, 2)
        place = [*rng.integers(0, 60, 2).tolist(), *side.tolist()]
        boxes.append(box(int(rng.integers(4)), place, int(rng.integers(1, 3)),
                         iscrowd=int(rng.random() < 0.15)))  # fmt: skip
    if crowd == "none":
        boxes = [b | {"iscrowd": 0} for b in boxes]
    found = []
    for b in boxes * 2:
        moved = np.maximum(np.array(b["bbox"]) + rng.normal(0, 1.5, 4), [0, 0, 2, 2])
        found.append(box(b["image_id"], moved.tolist(), b["category_id"], score=rng.random()))
    for _ in range(20):
        place = [*rng.uniform(0, 60, 2).tolist(), *rng.uniform(5, 40, 2).tolist()]
        found.append(box(int(rng.integers(4)), place, int(rng.integers(1, 3)), score=rng.random()))
    return boxes, found


# COCO's measure ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("moved", "expected"), [(0, 100.0), (2, 40.0), (9, 0.0)])
def test_coco_ap_of_one_box_counts_the_thresholds_below_its_overlap(
    moved: int, expected: float
) -> None:
    """A box of 10 x 10 moved by 2: overlap 8 / 12 = 0.667, above 4 of the 10 thresholds."""
    truth = truth_of([box(0, [10, 10, 10, 10])], categories=1)
    results = [box(0, [10 + moved, 10, 10, 10], score=0.5)]
    assert detection.coco_ap(truth, results, "bbox")["AP"] == pytest.approx(expected)


def test_coco_ap_without_detections_is_zero() -> None:
    truth = truth_of([box(0, [10, 10, 10, 10])])
    assert detection.coco_ap(truth, [], "bbox") == {"AP": 0, "AP50": 0, "AP75": 0}


def as_mask(bbox: list[float]) -> np.ndarray:
    """The ellipse in a box: its size is not the box's."""
    x, y, w, h = bbox
    rows, columns = np.mgrid[:100, :100] + 0.5
    inside = ((columns - x - w / 2) / (w / 2)) ** 2 + ((rows - y - h / 2) / (h / 2)) ** 2 <= 1
    return inside.astype(np.uint8)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(2))
def test_coco_ap_equals_torchmetrics(kind: str, seed: int) -> None:
    torchmetrics = pytest.importorskip("torchmetrics.detection")
    boxes, found = random_case(seed, crowd="some")
    for thing in (*boxes, *found):
        mask = as_mask(thing["bbox"])
        thing["segmentation"] = run_lengths.encode(np.asfortranarray(mask))
        thing["area"] = float(mask.sum() if kind == "segm" else np.prod(thing["bbox"][2:]))
    metric = torchmetrics.MeanAveragePrecision("xywh", kind, backend="pycocotools")
    for image in range(4):
        sides = []
        for some in (found, boxes):
            mine = [t for t in some if t["image_id"] == image]
            masks = np.stack([as_mask(t["bbox"]) for t in mine])
            sides.append({
                "boxes": torch.tensor([t["bbox"] for t in mine], dtype=torch.float64),
                "labels": torch.tensor([t["category_id"] for t in mine]),
                "masks": torch.from_numpy(masks).bool(),
            } | ({"scores": torch.tensor([t["score"] for t in mine], dtype=torch.float64)}
                 if some is found else
                 {"iscrowd": torch.tensor([t["iscrowd"] for t in mine]),
                  "area": torch.tensor([t["area"] for t in mine])}))  # fmt: skip
        metric.update([sides[0]], [sides[1]])
    expected = metric.compute()
    truth = truth_of(boxes)
    found = [{k: v for k, v in f.items() if k != "area"} for f in found]
    figures = detection.coco_ap(truth, found, kind)
    for ours, theirs in (("AP", "map"), ("AP50", "map_50"), ("AP75", "map_75")):
        assert figures[ours] == pytest.approx(100 * expected[theirs].item(), abs=1e-4)
    assert 5 < figures["AP"] < 95


def test_detections_become_results_with_the_files_own_categories() -> None:
    mask = torch.zeros(2, 1, 30, 40)
    mask[0, 0, 5:9, 10:20] = 0.9
    mask[1, 0, 0, 0] = 0.4
    output = {"boxes": torch.tensor([[10.0, 5, 20, 9], [1, 2, 4, 8]]), "masks": mask,
              "labels": torch.tensor([2, 1]), "scores": torch.tensor([0.5, 0.25])}  # fmt: skip
    first, second = detection.as_results(output, 77, [3, 7])
    assert (first["image_id"], first["category_id"], first["score"]) == (77, 7, 0.5)
    assert first["bbox"] == [10, 5, 10, 4]
    assert (second["category_id"], second["bbox"]) == (3, [1, 2, 3, 6])
    assert run_lengths.decode(first["segmentation"]).sum() == 40
    assert run_lengths.area(second["segmentation"]) == 0


# Layouts ----------------------------------------------------------------------------------------


def test_one_voc_folder_with_classes_of_its_own(tmp_path: Path) -> None:
    make_voc(tmp_path, {"trainval": 3, "train": 2, "val": 1, "test": 2})
    train, test = detection.open_detection(tmp_path, None, masks=False)
    assert (len(train.images), len(test.images)) == (3, 2)
    assert train.classes == test.classes == ["cat", "dog"]
    found = train.boxes(train.images[0])
    assert [a["bbox"] for a in found] == [[8, 8, 16, 16], [30, 20, 28, 12]]
    picture = train.picture(train.images[0])
    assert picture.shape == (3, 48, 64)
    assert picture[:, 9:23, 9:23].min() > 200


def test_a_voc_folder_without_a_test_list_is_tested_on_val(tmp_path: Path) -> None:
    make_voc(tmp_path, {"trainval": 3, "train": 2, "val": 1})
    train, test = detection.open_detection(tmp_path, None, masks=False)
    assert (len(train.images), len(test.images)) == (2, 1)


def test_voc07_and_12_train_on_both_trainvals_and_test_on_07(tmp_path: Path) -> None:
    make_voc(tmp_path / "VOCdevkit" / "VOC2007", {"trainval": 2, "test": 1})
    make_voc(tmp_path / "VOCdevkit" / "VOC2012", {"trainval": 3})
    train, test = detection.open_detection(tmp_path, None, masks=False)
    assert (len(train.images), len(test.images)) == (5, 1)
    assert train.classes == list(voc.CLASSES) and len(train.classes) == 20
    cat = train.boxes(train.images[0])[0]["category_id"]
    assert train.classes[cat - 1] == "cat"
    assert all(train.picture(image).shape == (3, 48, 64) for image in train.images)


def test_difficult_objects_are_not_trained_on(tmp_path: Path) -> None:
    make_voc(tmp_path, {"train": 1, "val": 1})
    things = [("cat", SQUARE, 0), ("dog", WIDE, 1)]
    (tmp_path / "Annotations" / "train0.xml").write_text(xml(things))
    train, _ = detection.open_detection(tmp_path, None, masks=False)
    assert [a["bbox"] for a in train.boxes(train.images[0])] == [[8, 8, 16, 16]]


@pytest.mark.parametrize(
    "names",
    [
        ("train2017", "val2017", "annotations/instances_{}.json"),
        ("train", "val", "{}.json"),
        ("train", "test", "{}/_annotations.coco.json"),
        ("train", "valid", "{}/_annotations.coco.json"),
    ],
)
def test_cocos_layouts(tmp_path: Path, names: tuple[str, str, str]) -> None:
    make_coco(tmp_path, *names)
    train, test = detection.open_detection(tmp_path, None, masks=True)
    assert (len(train.images), len(test.images)) == (3, 2)
    assert train.classes == ["cat", "dog"] and train.categories == [3, 7]
    assert train.picture(train.images[0]).shape == (3, 48, 64)


def test_mirroring_takes_boxes_and_masks_along(tmp_path: Path) -> None:
    train, _ = detection.open_detection(make_coco(tmp_path), None, masks=True)
    images = detection.BoxedImages(train, masks=True, seed=0)
    lefts = set()
    for epoch in range(12):
        picture, target = images[epoch, 1]
        left, top, right, bottom = target["boxes"][0].int().tolist()
        assert (top, right - left, bottom) == (8, 16, 24)
        assert picture[:, top:bottom, left:right].min() == 1
        assert picture[:, top:bottom, right : right + 2].max() < 0.3
        assert target["masks"][0].sum() == 256
        assert target["masks"][0][top:bottom, left:right].all()
        assert target["labels"].tolist() == [1, 2]
        lefts.add(left)
        again, _ = images[epoch, 1]
        assert torch.equal(picture, again)
    assert lefts == {8, 64 - 24}


def test_images_without_boxes_are_not_trained_on_and_are_tested_on(tmp_path: Path) -> None:
    content = coco_content(3)
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 11]
    make_coco(tmp_path, annotations=(name := "{}.json"))
    for part in ("train2017", "val2017"):
        (tmp_path / name.format(part)).write_text(json.dumps(content))
    draw(tmp_path / "val2017" / "2.png", 0)
    train, test = detection.open_detection(tmp_path, None, masks=True)
    assert len(detection.BoxedImages(train, masks=True, seed=0)) == 2
    assert len(detection.PlainImages(test)) == 3


def no_boxes(folder: Path) -> None:
    make_coco(folder, annotations="{}.json")
    for name in ("train2017", "val2017"):
        (folder / f"{name}.json").write_text(json.dumps(coco_content(2) | {"annotations": []}))


def bad_category(folder: Path) -> None:
    make_coco(folder)
    content = coco_content(3)
    content["annotations"][2]["category_id"] = 99
    (folder / "annotations" / "instances_train2017.json").write_text(json.dumps(content))


def not_coco(folder: Path) -> None:
    make_coco(folder)
    (folder / "annotations" / "instances_train2017.json").write_text("[1, 2]")


def image_gone(folder: Path) -> None:
    make_coco(folder)
    (folder / "val2017" / "1.png").unlink()


def unknown_class(folder: Path) -> None:
    make_voc(folder / "VOC2007", {"trainval": 1, "test": 1}, ("cat", "unicorn"))
    make_voc(folder / "VOC2012", {"trainval": 1})


def no_bndbox(folder: Path) -> None:
    make_voc(folder, {"train": 1, "val": 1})
    broken = "<annotation><object><name>cat</name></object></annotation>"
    (folder / "Annotations" / "val0.xml").write_text(broken)


def torn_xml(folder: Path) -> None:
    make_voc(folder, {"train": 1, "val": 1})
    (folder / "Annotations" / "val0.xml").write_text("<annotation><obj")


@pytest.mark.parametrize(
    ("make", "flags", "sentence"),
    [
        (lambda f: draw(f / "a.png", 0), (), "neither VOC's layout"),
        (no_boxes, (), "none of the 2 images to train on has a box"),
        (bad_category, (), "category_id 99, which is not among its categories"),
        (not_coco, (), "is not COCO's JSON"),
        (image_gone, (), "1.png, which is not in"),
        (unknown_class, (), "the class 'unicorn', which is none of aeroplane"),
        (no_bndbox, (), "whose bndbox is not xmin"),
        (torn_xml, (), "cannot be read as an annotation"),
        (lambda f: make_voc(f, {"train": 1}), (), "val.txt is missing"),
        (lambda f: make_voc(f, {"train": 1, "val": 1}), ("--classes", "cat"), "none of cat"),
        (make_coco, ("--classes", "dog,cat"), "the annotations have cat,dog"),
        (lambda f: make_coco(f, masks=False), ("--protocol", "coco-mask-fpn"), "needs masks"),
        (make_coco, ("--detector", "yolo"), "none of c4, fpn, mask-fpn"),
        (make_coco, ("--detector", "mask-fpn"), "--measure voc is of boxes alone"),
        (make_coco, ("--detector", "fpn", "--anchors", "8"), "expected 5, one a level"),
        (make_coco, ("--iterations", "0"), "--iterations 0; expected at least 1"),
        (make_coco, ("--proposals", "0"), "--proposals 0; expected at least 1"),
        (make_coco, ("--model", "vit_tiny_patch16_224", "--model-args", '{"depth": 1}'),
         "has no layer1"),
        (make_coco, ("--checkpoint", "nothing.pt"), "nothing.pt"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_in_one_sentence(
    tmp_path: Path, make: Any, flags: tuple[str, ...], sentence: str
) -> None:
    make(tmp_path / "data")
    with pytest.raises(SystemExit) as refused:
        run(tmp_path / "data", tmp_path / "run", *flags)
    assert sentence in str(refused.value)
    assert not (tmp_path / "run" / "last.pt").exists()


# The detector -----------------------------------------------------------------------------------


def flags_for(tmp_path: Path, *more: str) -> Any:
    own = ("--data", str(tmp_path), "--output", str(tmp_path / "run"))
    return finetune_detection.parse_arguments([*TINY, *own, *more])


def detector_for(tmp_path: Path, *more: str) -> Any:
    args, protocol = flags_for(tmp_path, *more)
    net, facts = finetune_detection.open_backbone(args)
    return networks.build_detector(net, facts, 2, protocol)


def one_batch(masks: bool = False) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    target = {"boxes": torch.tensor([[8.0, 8, 40, 40], [2, 30, 60, 60]]),
              "labels": torch.tensor([1, 2])}  # fmt: skip
    if masks:
        target["masks"] = torch.ones(2, 64, 64, dtype=torch.uint8)
    return [torch.rand(3, 64, 64), torch.rand(3, 64, 64)], [target, target]


@pytest.mark.parametrize("kind", ["c4", "fpn", "mask-fpn"])
@pytest.mark.parametrize("model", ["resnet10t", "torchvision/resnet18"])
def test_nothing_is_frozen_and_everything_learns(tmp_path: Path, kind: str, model: str) -> None:
    own = ("--model", model, "--model-args", "{}", "--detector", kind, "--measure", "coco")
    detector = detector_for(tmp_path, *own).train()
    losses = detector(*one_batch(masks=kind == "mask-fpn"))
    assert ("loss_mask" in losses) == (kind == "mask-fpn")
    sum(losses.values()).backward()
    without = [name for name, p in detector.named_parameters() if p.grad is None]
    assert not without
    norms = [m for m in detector.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(norm.training and norm.track_running_stats for norm in norms)


def test_c4_takes_stage_3_as_features_and_stage_4_with_an_extra_norm_as_box_head(
    tmp_path: Path,
) -> None:
    own = ("--model", "torchvision/resnet18", "--model-args", "{}")
    detector = detector_for(tmp_path, *own).eval()
    features = detector.backbone(torch.rand(1, 3, 64, 96))
    assert features["0"].shape == (1, 256, 4, 6)
    head = detector.roi_heads.box_head
    assert [name for name, _ in head.named_children()][:2] == ["layer4", "norm"]
    assert isinstance(head.norm, torch.nn.BatchNorm2d)
    seen: list[torch.Size] = []
    head.layer4.register_forward_hook(lambda _, x, y: seen.extend([x[0].shape, y.shape]))
    with torch.no_grad():
        detector([torch.rand(3, 64, 96)])
    assert [tuple(shape[1:]) for shape in seen] == [(256, 14, 14), (512, 7, 7)]


def test_sizes_are_drawn_in_training_and_fixed_in_testing(tmp_path: Path) -> None:
    make_voc(tmp_path / "data", {"train": 1, "val": 2})
    args, protocol = flags_for(tmp_path, "--train-sizes", "32", "96", "--image-size", "64")
    train, test = detection.open_detection(tmp_path / "data", None, masks=False)
    net, facts = finetune_detection.open_backbone(args)
    detector = networks.build_detector(net, facts, 2, protocol)
    sizes: set[int] = set()
    detector.backbone.register_forward_hook(lambda m, x, y: sizes.add(min(x[0].shape[2:])))
    with torch.inference_mode():
        finetune_detection.evaluate(detector.eval(), test, protocol, CPU, tmp_path)
    assert sizes == {64}
    sizes.clear()
    image, target = detection.BoxedImages(train, masks=False, seed=0)[0, 0]
    detector.train()
    for _ in range(12):
        detector([image], [target])
    assert sizes == {32, 96}


def test_the_published_flags_are_the_defaults(tmp_path: Path) -> None:
    own = ["--data", str(tmp_path), "--output", str(tmp_path / "run"), "--device", "cpu"]
    _, voc = finetune_detection.parse_arguments(own)
    assert (voc.detector, voc.iterations, voc.lr_steps) == ("c4", 24000, (18000, 22000))
    assert (voc.batch_size, voc.base_lr, voc.warmup, voc.weight_decay) == (16, 0.02, 100, 1e-4)
    assert voc.train_sizes == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    _, coco = finetune_detection.parse_arguments([*own, "--protocol", "coco-mask-fpn"])
    assert coco.train_sizes == (640, 672, 704, 736, 768, 800)
    # MMSelfSup 0.x, configs/benchmarks/mmdetection/_base_/schedules/schedule_1x.py
    assert (coco.detector, coco.lr_steps, coco.warmup) == ("mask-fpn", (58640, 80630), 1000)
    _, short = finetune_detection.parse_arguments([*own, "--iterations", "240"])
    assert short.lr_steps == (180, 220)
    _, given = finetune_detection.parse_arguments([*own, "--iterations", "240", "--lr-steps", "9"])
    assert given.lr_steps == (9,)


def test_the_learning_rate_warms_up_scales_with_the_batch_and_falls_twice(tmp_path: Path) -> None:
    own = ["--data", str(tmp_path), "--output", str(tmp_path / "run"), "--device", "cpu"]
    _, half = finetune_detection.parse_arguments([*own, "--batch-size", "8"])
    at = {step: finetune_detection.learning_rate(step, half)
          for step in (0, 50, 100, 17_999, 18_000, 21_999, 22_000, 23_999)}  # fmt: skip
    assert at[0] == pytest.approx(1e-5)
    assert at[50] == pytest.approx(0.01 * (0.001 + 0.999 / 2))
    assert at[100] == at[17_999] == pytest.approx(0.01)
    assert at[18_000] == at[21_999] == pytest.approx(0.001)
    assert at[22_000] == at[23_999] == pytest.approx(0.0001)


@pytest.mark.parametrize("stride", [4, 8, 16, 32])
def test_regions_are_pooled_where_they_are(stride: int) -> None:
    """On maps whose values are their places in the image, a cell's value is its centre."""
    maps = {}
    for i, s in enumerate((4, 8, 16, 32)):
        middles = (torch.arange(512 // s) + 0.5) * s
        maps[str(i)] = torch.stack(torch.meshgrid(middles, middles, indexing="ij"))[None]
    pooler = networks.Regions(list(maps), 7, [4, 8, 16, 32])
    side = 14 * stride  # the level of this stride: 56, 112, 224 and 448
    boxes = torch.tensor([[33.0, 17, 33 + side, 17 + side]])
    pooled = pooler(maps, [boxes], [(512, 512)])
    assert pooled.shape == (1, 2, 7, 7)
    middles = (torch.arange(7) + 0.5) * side / 7
    torch.testing.assert_close(pooled[0, 0, :, 3], 17 + middles)
    torch.testing.assert_close(pooled[0, 1, 3], 33 + middles)
    if stride < 32:  # on every other level the answer would be the same: is it this one's?
        maps = {name: torch.full_like(m, float(name)) for name, m in maps.items()}
        assert pooler(maps, [boxes], [(512, 512)]).unique().item() == [4, 8, 16, 32].index(stride)


# MMSelfSup 0.x, configs/benchmarks/mmdetection/_base_/models/faster_rcnn_r50_c4.py and
# mask_rcnn_r50_fpn.py: rpn_head and bbox_head have loss_bbox=dict(type='L1Loss', loss_weight=1.0).


@pytest.mark.parametrize("kind", ["c4", "mask-fpn"])
def test_boxes_are_trained_by_the_l1_loss(tmp_path: Path, kind: str) -> None:
    detector = detector_for(tmp_path, "--detector", kind, "--measure", "coco").train()
    heads, rpn = detector.roi_heads, detector.rpn
    # Errors of some hundredths too, where a smooth loss would be far below.
    torch.nn.init.normal_(heads.box_predictor.bbox_pred.weight, std=0.1)
    seen: dict[str, Any] = {}

    def keep(owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def kept(*args: Any) -> Any:
            seen[name] = (args, method(*args))
            return seen[name][1]

        setattr(owner, name, kept)

    keep(rpn, "compute_loss")
    keep(rpn, "fg_bg_sampler")
    keep(heads, "select_training_samples")
    heads.box_predictor.register_forward_hook(lambda m, x, y: seen.update(predicted=y))
    losses = detector(*one_batch(masks=kind == "mask-fpn"))

    (_, deltas, _, wanted), _ = seen["compute_loss"]
    positive, negative = (torch.cat(part).bool() for part in seen["fg_bg_sampler"][1])
    errors = (deltas - torch.cat(wanted))[positive].detach().abs().sum()
    assert losses["loss_rpn_box_reg"].item() == pytest.approx(
        (errors / (positive.sum() + negative.sum())).item(), rel=1e-5
    )
    _, (_, _, labels, wanted) = seen["select_training_samples"]
    total = 0.0
    for row, label, target in zip(
        seen["predicted"][1], torch.cat(labels), torch.cat(wanted), strict=True
    ):
        if label:
            total += (row[4 * label : 4 * label + 4] - target).abs().sum().item()
    assert total > 0
    assert losses["loss_box_reg"].item() == pytest.approx(total / len(torch.cat(labels)), rel=1e-5)
    truth = torch.nn.functional.cross_entropy(seen["predicted"][0], torch.cat(labels))
    assert losses["loss_classifier"].item() == pytest.approx(truth.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["c4", "mask-fpn"])
def test_boxes_are_float32_under_autocast(tmp_path: Path, kind: str) -> None:
    detector = detector_for(tmp_path, "--detector", kind, "--measure", "coco")
    seen: list[torch.dtype] = []
    decode = detector.rpn.box_coder.decode_single
    for owner in (detector.rpn, detector.roi_heads):
        owner.box_coder.decode_single = lambda a, b: (
            seen.extend([a.dtype, b.dtype]),
            decode(a, b),
        )[1]
    with torch.autocast("cpu", torch.bfloat16):
        found = detector.eval()([torch.rand(3, 48, 64)])
    assert len(seen) == 4 and set(seen) == {torch.float32}
    assert found[0]["boxes"].dtype == torch.float32


def test_c4_ignores_anchors_that_leave_the_image_and_fpn_does_not(tmp_path: Path) -> None:
    """MMSelfSup 0.x, configs/benchmarks/mmdetection/_base_/models/faster_rcnn_r50_c4.py:
    allowed_border=0; mask_rcnn_r50_fpn.py: -1. MMDetection 2, mmdet/core/anchor/utils.py: the
    last column and row of the image are outside."""
    anchors = torch.tensor([
        [0.0, 0, 20, 20], [-1, 0, 20, 20], [0, -1, 20, 20], [44, 0, 63, 20], [44, 0, 64, 20],
        [0, 30, 20, 47], [0, 30, 20, 48], [200, 200, 220, 220],
    ])  # fmt: skip
    boxes = torch.tensor([[-1.0, 0, 20, 20]])
    targets = [{"boxes": boxes, "size": (48, 64)}]
    c4 = detector_for(tmp_path).rpn
    labels, matched = c4.assign_targets_to_anchors([anchors], targets)
    # The second is the box itself, but leaves the image: the first is the best of the rest.
    assert labels[0].tolist() == [1, -1, -1, 0, -1, 0, -1, -1]
    assert matched[0][0].tolist() == boxes[0].tolist()
    fpn = detector_for(tmp_path / "fpn", "--detector", "fpn", "--measure", "coco").rpn
    labels, _ = fpn.assign_targets_to_anchors([anchors], targets)
    assert labels[0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    labels, _ = c4.assign_targets_to_anchors([anchors[-1:]], targets)
    assert labels[0].tolist() == [-1]


@pytest.mark.parametrize("kind", ["c4", "fpn"])
def test_a_box_has_an_anchor_only_from_an_overlap_of_three_tenths(
    tmp_path: Path, kind: str
) -> None:
    """MMSelfSup 0.x, configs/benchmarks/mmdetection/_base_/models/{faster_rcnn_r50_c4,
    mask_rcnn_r50_fpn}.py: min_pos_iou=0.3; torchvision's matcher has no such bound."""
    rpn = detector_for(tmp_path, "--detector", kind, "--measure", "coco").rpn
    anchors = torch.tensor([[0.0, 0, 40, 40], [50, 50, 90, 90]])
    target = {"boxes": torch.tensor([[0.0, 0, 25, 25], [50, 50, 70, 70]]), "size": (100, 100)}
    labels, _ = rpn.assign_targets_to_anchors([anchors], [target])  # overlaps 0.39 and 0.25
    assert labels[0].tolist() == [1, 0]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_neighbours_in_a_batch_are_all_wide_or_all_high(world: int) -> None:
    """MMDetection 2, mmdet/datasets/samplers/group_sampler.py, with samples_per_gpu=2 (MMSelfSup
    0.x, configs/benchmarks/mmdetection/_base_/datasets/coco_instance.py): the odd one of a group
    is met by one that comes twice."""
    kinds = np.random.default_rng(0).random(41) < 0.3
    odd = int(kinds.sum() % 2) + int((~kinds).sum() % 2)
    orders = [Order(41, 8, seed=3, stop=21, rest="join", rank=r, world=world, kinds=kinds)
              for r in range(world)]  # fmt: skip
    steps = [np.concatenate(parts) for parts in zip(*orders, strict=True)]
    one = Order(41, 8, seed=3, stop=21, rest="join", rank=0, world=1, kinds=kinds)
    np.testing.assert_array_equal(np.stack(steps), np.stack(list(one)))
    rows = np.concatenate(steps)
    images = rows[rows[:, 0] == 0, 1]
    assert len(images) == 41 + odd and set(images) == set(range(41))
    pairs = kinds[rows[:, 1]].reshape(-1, 2)
    assert (pairs[:, 0] == pairs[:, 1]).all() and len({*pairs[:, 0]}) == 2
    later = Order(41, 8, seed=3, start=9, stop=21, rest="join", rank=0, world=1, kinds=kinds)
    np.testing.assert_array_equal(np.stack(list(later)), np.stack(steps[9:]))


def test_pairs_come_in_an_order_of_chance() -> None:
    kinds = np.arange(40) % 2 == 0
    first = in_pairs(np.random.default_rng(0).permutation(40), kinds)
    second = in_pairs(np.random.default_rng(1).permutation(40), kinds)
    for order in (first, second):
        assert sorted(order) == list(range(40)) and len(set(kinds[order][:20])) == 2
    assert first.tolist() != second.tolist()


def test_a_runs_batches_are_grouped_by_shape(tmp_path: Path, monkeypatch: Any) -> None:
    data = make_voc(tmp_path / "data", {"train": 7, "val": 1})
    for i in (0, 3, 5):  # an annotation with a size, and without one the image's own
        Image.new("RGB", (48, 64)).save(data / "JPEGImages" / f"train{i}.jpg")
    size = "<annotation><size><width>48</width><height>64</height></size>"
    path = data / "Annotations" / "train3.xml"
    path.write_text(path.read_text().replace("<annotation>", size))
    shapes: list[list[bool]] = []

    def collate(samples: list[Any]) -> Any:
        shapes.append([image.shape[2] > image.shape[1] for image, _ in samples])
        return list(map(list, zip(*samples, strict=True)))

    monkeypatch.setattr(finetune_detection, "list_of_each", collate)
    run(data, tmp_path / "run", "--iterations", "8")
    assert len(shapes) == 8 and all(a == b for a, b in shapes)
    assert {a for a, _ in shapes} == {True, False}


# Whole runs -------------------------------------------------------------------------------------


def run(data: Path, output: Path, *more: str) -> dict[str, Any]:
    finetune_detection.main([*TINY, "--data", str(data), "--output", str(output), *more])
    result: dict[str, Any] = json.loads((output / "results.json").read_text())
    return result


def test_a_voc_run_leaves_its_table_picture_log_and_state(tmp_path: Path, capsys: Any) -> None:
    data = make_voc(tmp_path / "data", {"trainval": 3, "test": 3})
    result = run(data, tmp_path / "run", "--eval-every", "2")
    assert result["columns"] == ["backbone", "detector", "steps", "AP50", "AP", "AP75"]
    assert result["rows"][0][:3] == ["resnet10t, random weights", "c4", 4]
    assert len(result["rows"]) == 1  # the published figures are not of these data
    assert [h["step"] for h in result["history"]] == [2, 4]
    assert all(0 <= value <= 100 for value in result["rows"][0][3:])
    assert "resnet10t, random weights" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"results.md", "predictions.png", "log.jsonl", "last.pt"} <= names
    assert any(name.startswith("events.") for name in names)
    with Image.open(tmp_path / "run" / "predictions.png") as picture:
        assert picture.width > 2 * 64 and picture.height > 3 * 48


@pytest.mark.parametrize("measure", ["voc", "coco"])
def test_a_published_row_stands_beside_its_own_data(
    tmp_path: Path, monkeypatch: Any, measure: str
) -> None:
    """MMSelfSup 0.x, configs/selfsup/byol/README.md, "Detection"."""
    figures = {"voc": [80.35, None, None], "coco": [40.9, 61.0, 44.6]}
    sizes = {"voc": (16_551, 4952, 20), "coco": (118_287, 5000, 80)}
    data = make_voc(tmp_path / "data", {"trainval": 3, "test": 2})
    size, row = finetune_detection.PUBLISHED[measure]
    assert size == sizes[measure]
    monkeypatch.setitem(finetune_detection.PUBLISHED, measure, ((3, 2, 2), row))
    result = run(data, tmp_path / "run", "--measure", measure, "--iterations", "1")
    assert result["rows"][1][3:] == figures[measure]


def test_a_mask_run_reports_boxes_and_masks(tmp_path: Path) -> None:
    data = make_coco(tmp_path / "data")
    result = run(data, tmp_path / "run", "--protocol", "coco-mask-fpn", "--iterations", "2")
    assert len(result["rows"][0]) == 9
    _, row = finetune_detection.PUBLISHED["coco"]
    assert row[3:] == [40.9, 61.0, 44.6, 36.8, 58.1, 39.5]
    assert result["classes"] == ["cat", "dog"]


def stopped_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = resume.checkpoint.save

    def save_and_die(state: dict[str, Any], path: Path) -> None:
        whole(state, path)
        if state["step"] == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(resume.checkpoint, "save", save_and_die)


def test_a_stopped_run_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_coco(tmp_path / "data")
    own = ("--save-every", "2", "--eval-every", "1")
    whole = run(data, tmp_path / "whole", *own)
    with monkeypatch.context() as patch:
        stopped_at(2, patch)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "parts", *own)
    parts = run(data, tmp_path / "parts", *own)
    one, two = (checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert one["step"] == two["step"] == 4
    assert whole["history"] == parts["history"] and len(parts["history"]) == 4
    for name, value in one["model"].items():
        assert torch.equal(value, two["model"][name]), name
    assert one["optimizer"]["state"].keys() == two["optimizer"]["state"].keys()
    again = run(data, tmp_path / "parts", *own)
    assert again["rows"] == parts["rows"]
    with pytest.raises(SystemExit, match=r"is of another run, so it cannot go on:\s+base-lr"):
        run(data, tmp_path / "parts", *own, "--base-lr", "0.5")


def test_a_trained_detector_is_scored_without_training(tmp_path: Path) -> None:
    data = make_voc(tmp_path / "data", {"trainval": 3, "test": 2})
    trained = run(data, tmp_path / "run")
    last = tmp_path / "run" / "last.pt"
    tested = run(data, tmp_path / "again", "--test-only", str(last))
    assert tested["rows"] == trained["rows"] and tested["history"] == trained["history"][-1:]
    with pytest.raises(SystemExit, match=r"--test-only .*is not last.pt of a run with these flags"):
        run(data, tmp_path / "other", "--test-only", str(last), "--detector", "fpn")


def test_a_run_in_bfloat16(tmp_path: Path) -> None:
    data = make_voc(tmp_path / "data", {"train": 2, "val": 1})
    run(data, tmp_path / "run", "--dtype", "bf16", "--iterations", "2")
    lines = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    data = make_voc(tmp_path / "data", {"train": 2, "val": 1})
    with pytest.raises(SystemExit, match="lower the learning rate"):
        run(data, tmp_path / "run", "--base-lr", "1e30")


@pytest.mark.slow
def test_boxes_are_learned(tmp_path: Path) -> None:
    data = make_voc(tmp_path / "data", {"train": 8, "val": 3})
    own = ("--detector", "fpn", "--iterations", "40", "--base-lr", "0.08", "--eval-every", "40")
    result = run(data, tmp_path / "run", *own, "--batch-size", "4", "--model-args", "{}",
                 "--proposals", "50", "--regions", "32")  # fmt: skip
    assert result["rows"][0][3] > 50


@pytest.mark.slow
def test_two_processes_test_every_image_once(tmp_path: Path) -> None:
    data = make_voc(tmp_path / "data", {"train": 4, "val": 5})
    own = [*TINY, "--data", str(data), "--output", str(tmp_path / "run"), "--detector", "fpn",
           "--detections", "20"]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node=2", str(EXAMPLES / "finetune_detection.py"), *own]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    args, protocol = finetune_detection.parse_arguments(own)
    _, test = detection.open_detection(data, None, masks=False)
    net, facts = finetune_detection.open_backbone(args)
    detector = networks.build_detector(net, facts, 2, protocol)
    detector.load_state_dict(checkpoint.load(tmp_path / "run" / "last.pt")["model"])
    with torch.inference_mode():
        figures = finetune_detection.evaluate(detector.eval(), test, protocol, CPU, tmp_path)
    assert result["history"][-1] == pytest.approx({"step": 4, **figures})
