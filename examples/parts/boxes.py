"""Boxes and masks for finetune_detection.py: PASCAL VOC's and COCO's layouts, and their measures.

Whatever the layout, annotations are held as COCO's, and detections as COCO's results: dictionaries
of image_id, category_id, score, bbox (x, y, width, height; pixels) and segmentation (run lengths).
"""

import contextlib
import io
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from parts import voc
from parts.processes import fail

SIDES = ("xmin", "ymin", "xmax", "ymax")
RECALLS = np.arange(11) / 10  # of VOC 2007's measure
THRESHOLDS = np.linspace(0.5, 0.95, 10)  # overlaps that COCO's AP is the mean over
Result = dict[str, Any]


@dataclass
class Annotated:
    """Images in `folder`, and what is on them. A crowd, or a difficult object of VOC's, is neither
    trained on nor counted: `iscrowd`."""

    folder: Path
    truth: COCO

    def __post_init__(self) -> None:
        self.images = sorted(self.truth.imgs)
        self.categories = sorted(self.truth.cats)
        self.classes = [str(self.truth.cats[c]["name"]) for c in self.categories]

    def boxes(self, image: int) -> list[dict[str, Any]]:
        """The annotations that count and have an area."""
        found = self.truth.imgToAnns[image]
        return [a for a in found if not a.get("iscrowd") and min(a["bbox"][2:]) > 0]

    def wide(self, image: int) -> bool:
        """Whether it is wider than high."""
        known = self.truth.imgs[image]
        if "width" not in known:
            with Image.open(self.folder / known["file_name"]) as file:
                known["width"], known["height"] = file.size
        return bool(known["width"] > known["height"])

    def picture(self, image: int) -> Tensor:
        """(3, H, W) uint8."""
        path = self.folder / self.truth.imgs[image]["file_name"]
        try:
            return F.pil_to_tensor(Image.open(path).convert("RGB"))
        except OSError as error:
            raise RuntimeError(f"{path} cannot be read: {error}") from error


# Layouts ----------------------------------------------------------------------------------------


def open_detection(folder: Path, classes: list[str] | None, masks: bool) -> list[Annotated]:
    """Training and test images of what `folder` holds.

    VOC2007 and VOC2012, also below VOCdevkit: trainval of both, and test of 2007. One VOC folder
    (JPEGImages, Annotations, ImageSets/Main): trainval or train, and test or val. Else COCO's:
    annotations/instances_NAME.json, NAME.json or NAME/_annotations.coco.json for NAME in train2017
    or train, and val2017, val, valid or test, with the images in NAME/ or images/.
    """
    if not folder.is_dir():
        fail(f"--data {folder} is not a folder.")
    devkit = folder / "VOCdevkit" if (folder / "VOCdevkit").is_dir() else folder
    if (devkit / "VOC2007").is_dir() and (devkit / "VOC2012").is_dir():
        lists = [[("VOC2007", "trainval"), ("VOC2012", "trainval")], [("VOC2007", "test")]]
        parts = [read_voc(devkit, names, classes or list(voc.CLASSES)) for names in lists]
    elif (folder / "Annotations").is_dir():
        names = {path.stem for path in (folder / "ImageSets" / "Main").glob("*.txt")}
        train = "trainval" if {"trainval", "test"} <= names else "train"
        test = "test" if "test" in names else "val"
        files = (folder / "Annotations").glob("*.xml")
        found = (voc.objects_of(voc.read_annotation(file)) for file in files)
        classes = classes or sorted({name for objects in found for name, *_ in objects})
        parts = [read_voc(folder, [("", name)], classes) for name in (train, test)]
    else:
        parts = [read_coco(folder, *find_coco(folder, names)) for names in
                 (("train2017", "train"), ("val2017", "val", "valid", "test"))]  # fmt: skip
        for part in parts:
            if classes and part.classes != classes:
                fail(f"--classes {','.join(classes)}: the annotations have "
                     f"{','.join(part.classes)}, in this order. Leave the flag out.")  # fmt: skip
    return [checked(part, parts[0], masks) for part in parts]


def checked(part: Annotated, train: Annotated, masks: bool) -> Annotated:
    """`part`, or the end of the script where it cannot be trained or tested on."""
    if part.classes != train.classes:
        fail(f"the classes to test on, {','.join(part.classes)}, are not those to train on, "
             f"{','.join(train.classes)}.")  # fmt: skip
    part_of = "train" if part is train else "test"
    if not any(part.boxes(image) for image in part.images):
        fail(f"none of the {len(part.images)} images to {part_of} on has a box: detection needs "
             "labelled images.")  # fmt: skip
    if masks and not all("segmentation" in a for a in part.truth.anns.values()):
        fail("--detector mask-fpn needs masks, and there are boxes alone: give --detector fpn.")
    some = part.images[:: max(1, len(part.images) // 100)]
    for name in (part.truth.imgs[image]["file_name"] for image in some):
        if not (part.folder / name).is_file():
            fail(f"the annotations name {name}, which is not in {part.folder}.")
    return part


def read_voc(folder: Path, lists: list[tuple[str, str]], classes: list[str]) -> Annotated:
    """The images that `lists`, of (subfolder, name of a list), name."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    number = {name: i for i, name in enumerate(classes, 1)}
    for place, name in lists:
        path = folder / place / "ImageSets" / "Main" / f"{name}.txt"
        missing = (f"missing; expected VOC's layout: ImageSets/Main/{name}.txt with the names of "
                   "the images, JPEGImages/NAME.jpg and Annotations/NAME.xml.")  # fmt: skip
        for stem in voc.read_list(path, missing):
            file = Path(place) / "JPEGImages" / f"{stem}.jpg"
            root = voc.read_annotation(folder / place / "Annotations" / f"{stem}.xml")
            images.append({"id": len(images) + 1, "file_name": str(file), **voc.size_of(root)})
            for label, difficult, thing in voc.objects_of(root):
                if label not in number:
                    fail(f"{stem}.xml has an object of the class {label!r}, which is none of "
                         f"{','.join(classes)}. Give all names by --classes.")  # fmt: skip
                try:
                    left, top, right, bottom = (float(thing.findtext(f"bndbox/{side}", ""))
                                                for side in SIDES)  # fmt: skip
                except ValueError:
                    fail(f"{stem}.xml has an object whose bndbox is not {', '.join(SIDES)}.")
                # VOC counts pixels from 1 and includes the last; these are edges, from 0.
                left, top = max(left - 1, 0), max(top - 1, 0)
                annotations.append({
                    "id": len(annotations) + 1, "image_id": len(images),
                    "category_id": number[label], "bbox": [left, top, right - left, bottom - top],
                    # Left out of training, as MMDetection does, and of the measure, as VOC does.
                    "iscrowd": int(difficult),
                })  # fmt: skip
    categories = [{"id": i, "name": name} for name, i in number.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return Annotated(folder, indexed(content))


def find_coco(folder: Path, names: tuple[str, ...]) -> tuple[Path, Path]:
    """The annotations and the folder of the images of the first of `names` that is there."""
    for name in names:
        places = (f"annotations/instances_{name}.json", f"{name}.json",
                  f"{name}/_annotations.coco.json")  # fmt: skip
        for place in places:
            if (folder / place).is_file():
                own = folder / name
                return folder / place, own if own.is_dir() else folder / "images"
    fail(f"--data {folder} is neither VOC's layout (Annotations, ImageSets/Main, JPEGImages; or "
         f"VOC2007 and VOC2012) nor COCO's: no annotations/instances_NAME.json, NAME.json or "
         f"NAME/_annotations.coco.json with NAME one of {', '.join(names)}.")  # fmt: skip


def read_coco(folder: Path, path: Path, images: Path) -> Annotated:
    try:
        content = json.loads(path.read_text())
        known = {c["id"] for c in content["categories"]}
        assert all({"id", "file_name", "width", "height"} <= set(i) for i in content["images"])
        assert all({"id", "image_id", "bbox"} <= set(a) for a in content["annotations"])
    except (OSError, ValueError, AssertionError, TypeError, KeyError):
        fail(f"{path} is not COCO's JSON: images (id, file_name, width, height), annotations (id, "
             "image_id, category_id, bbox) and categories (id, name).")  # fmt: skip
    for a in content["annotations"]:
        if (category := a.get("category_id")) not in known:
            fail(f"{path}: annotation {a['id']} has category_id {category}, which is not among its "
                 "categories.")  # fmt: skip
    return Annotated(images, indexed(content))


def indexed(content: dict[str, Any]) -> COCO:
    truth = COCO()
    for a in content["annotations"]:
        a.setdefault("iscrowd", 0)
        a.setdefault("area", a["bbox"][2] * a["bbox"][3])
    truth.dataset = content
    with quiet():
        truth.createIndex()
    return truth


def quiet() -> contextlib.AbstractContextManager[Any]:
    """pycocotools prints its progress."""
    return contextlib.redirect_stdout(io.StringIO())


# Images -----------------------------------------------------------------------------------------


class BoxedImages(Dataset[Any]):
    """Images with boxes, half of them mirrored: (3, H, W) float32 in [0, 1], and torchvision's
    target of boxes (N, 4) in pixels, labels (N,) from 1 and, if asked for, masks (N, H, W) uint8.
    """

    def __init__(self, part: Annotated, masks: bool, seed: int) -> None:
        self.part, self.masks, self.seed = part, masks, seed
        # Images without boxes are left out, as in MMDetection and detectron2.
        self.images = [image for image in part.images if part.boxes(image)]
        self.label = {category: i for i, category in enumerate(part.categories, 1)}
        self.wide = np.array([part.wide(image) for image in self.images])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, request: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        epoch, number = request
        things = self.part.boxes(self.images[number])
        picture = F.to_dtype(self.part.picture(self.images[number]), torch.float32, scale=True)
        boxes = torch.tensor([a["bbox"] for a in things], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([self.label[a["category_id"]] for a in things])
        target = {"boxes": boxes, "labels": labels}
        if self.masks:
            drawn = [self.part.truth.annToMask(a) for a in things]
            target["masks"] = torch.from_numpy(np.stack(drawn))
        if np.random.default_rng((self.seed, epoch, number)).random() < 0.5:
            picture = picture.flip(-1)
            target["boxes"] = boxes[:, [2, 1, 0, 3]]
            target["boxes"][:, ::2] = picture.shape[-1] - target["boxes"][:, ::2]
            if self.masks:
                target["masks"] = target["masks"].flip(-1)
        return picture, target


@dataclass
class PlainImages(Dataset[Any]):
    """(3, H, W) float32 in [0, 1], and the image's id."""

    part: Annotated

    def __len__(self) -> int:
        return len(self.part.images)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        image = self.part.images[number]
        return F.to_dtype(self.part.picture(image), torch.float32, scale=True), image


# Measures ---------------------------------------------------------------------------------------


def as_results(output: dict[str, Tensor], image: int, categories: list[int]) -> list[Result]:
    """torchvision's detections on one image as COCO's results."""
    corners = output["boxes"].double().cpu().numpy()
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    scores, labels = output["scores"].tolist(), output["labels"].tolist()
    results = [
        {"image_id": image, "category_id": categories[label - 1], "score": score, "bbox": box}
        for box, score, label in zip(boxes.tolist(), scores, labels, strict=True)
    ]
    if "masks" in output:
        drawn = (output["masks"][:, 0] > 0.5).byte().permute(1, 2, 0).cpu().numpy()
        for result, mask in zip(results, run_lengths.encode(np.asfortranarray(drawn)), strict=True):
            result["segmentation"] = mask
    return results


def coco_ap(truth: COCO, results: list[Result], kind: str) -> dict[str, float]:
    """COCO's AP, AP50 and AP75 in percent, of "bbox" or "segm", by pycocotools."""
    if not results:
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    with quiet():
        found = truth.loadRes([dict(result) for result in results])  # which it adds to
        measure = COCOeval(truth, found, kind)
        measure.evaluate()
        measure.accumulate()
        measure.summarize()
    return dict(zip(("AP", "AP50", "AP75"), (100 * measure.stats[:3]).tolist(), strict=True))


def voc_ap(truth: COCO, results: list[Result]) -> dict[str, float]:
    """VOC 2007's 11-point mAP in percent: AP50 at an overlap of 0.5, AP75, AP as COCO's mean.

    detectron2's pascal_voc_evaluation.py reports the same three; a class without a box does not
    count.
    """
    curves = [
        [eleven_points(*hits(*pairs, threshold)) for threshold in THRESHOLDS]
        for category in truth.cats
        if (pairs := overlaps(truth, results, category))[0] > 0
    ]
    means = 100 * np.mean(curves, axis=0)
    return {"AP": float(means.mean()), "AP50": float(means[0]), "AP75": float(means[5])}


def overlaps(
    truth: COCO, results: list[Result], category: int
) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """How many boxes of a class there are to find; and of each detection, best first, the highest
    overlap (intersection over union) with a box, that box's number, and whether it is difficult."""
    boxes, found = defaultdict(list), defaultdict(list)
    for a in truth.loadAnns(truth.getAnnIds(catIds=[category])):
        boxes[a["image_id"]].append(a)
    mine = sorted((r for r in results if r["category_id"] == category), key=lambda r: -r["score"])
    for place, result in enumerate(mine):
        found[result["image_id"]].append(place)
    overlap, number = np.zeros(len(mine)), np.full(len(mine), -1)
    difficult = np.zeros(len(mine), bool)
    for image, places in found.items():
        if image not in boxes:
            continue
        table = run_lengths.iou(
            [mine[place]["bbox"] for place in places],
            [a["bbox"] for a in boxes[image]],
            [0] * len(boxes[image]),
        )
        best = table.argmax(axis=1)
        overlap[places] = table.max(axis=1)
        number[places] = [boxes[image][b]["id"] for b in best]
        difficult[places] = [boxes[image][b]["iscrowd"] for b in best]
    count = sum(not a["iscrowd"] for some in boxes.values() for a in some)
    return count, overlap, number, difficult


def hits(
    count: int, overlap: np.ndarray, number: np.ndarray, difficult: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision after each detection that counts.

    The first to overlap a box is right, others of the same box are wrong; those of a difficult one
    are neither (VOCdevkit, VOCevaldet.m).
    """
    near = overlap >= threshold
    counted = ~(near & difficult)
    near, number = near[counted], number[counted]
    right = np.zeros(len(near), bool)
    _, first = np.unique(number[near], return_index=True)
    right[np.flatnonzero(near)[first]] = True
    true = right.cumsum()
    return true / count, true / np.arange(1, len(true) + 1)


def eleven_points(recall: np.ndarray, precision: np.ndarray) -> float:
    """The mean over 11 recalls of the highest precision at that recall or a higher one."""
    return float(np.mean([precision[recall >= r].max(initial=0.0) for r in RECALLS]))
