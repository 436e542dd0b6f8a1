"""Images with masks for segmentation: PASCAL VOC's, Cityscapes', and one's own."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import Cityscapes
from torchvision.transforms.v2 import functional as TF

from parts import voc
from parts.processes import fail, once
from parts.published import VOC12AUG
from parts.sources import ENDINGS

IGNORED = 255  # in masks as they are trained on


@dataclass
class Masked:
    """Images with masks, as pairs of files, and what the masks' values mean."""

    pairs: list[tuple[Path, Path]]
    classes: list[str]
    meaning: np.ndarray  # (256,) uint8: value in a file to class, or IGNORED

    def read(self, number: int) -> tuple[Tensor, Tensor]:
        """(3, H, W) float32 in [0, 1] and (H, W) uint8."""
        image, mask = self.pairs[number]
        with Image.open(image) as file:
            pixels = TF.to_dtype(TF.pil_to_tensor(file.convert("RGB")), scale=True)
        return pixels, torch.from_numpy(self.meaning[values(mask)])


def open_masks(
    folder: Path, classes: list[str] | None, ignore_index: int, with_sbd: bool = True
) -> tuple[Masked, Masked]:
    """The images to train and to test on of what `folder` holds.

    VOC2012 (also below VOCdevkit): SegmentationClass of train.txt, and `with_sbd` also
    SegmentationClassAug of aug.txt, as convert_sbd.py leaves it; tested on val.txt. Cityscapes:
    leftImg8bit and gtFine, as torchvision reads them. Else train/images, train/masks and the same
    in val or test: files of equal stems, the masks with the numbers of the classes.
    """
    year = voc.find_year(folder, "VOC2012", "Segmentation")
    if year or (folder / "leftImg8bit").is_dir():
        if classes or ignore_index != IGNORED:
            fail("--classes and --ignore-index are for folders of masks: VOC and Cityscapes have "
                 "their own.")  # fmt: skip
        return open_voc(year, with_sbd) if year else open_cityscapes(folder)
    test = next((name for name in ("val", "test") if (folder / name / "masks").is_dir()), None)
    if test is None or not (folder / "train" / "masks").is_dir():
        fail(f"--data {folder} is none of VOC2012 (ImageSets/Segmentation), Cityscapes "
             "(leftImg8bit, gtFine) and a folder of train/images, train/masks, val/images and "
             "val/masks. Segmentation needs a mask for each image.")  # fmt: skip
    return open_folder(folder, test, classes, ignore_index)


def open_voc(folder: Path, with_sbd: bool) -> tuple[Masked, Masked]:
    """VOC2012: 10,582 images to train on with SBD's masks, 1,464 without."""
    train = voc_pairs(folder, "train", "SegmentationClass")
    aug = folder / "ImageSets" / "Segmentation" / "aug.txt"
    if with_sbd and not aug.is_file():
        fail(f"{aug} is missing: without SBD's masks there are {len(train)} images to train on; "
             f"the published figures have {VOC12AUG.train}. Make it by examples/convert_sbd.py, or "
             "train without it by --without-sbd.")  # fmt: skip
    if with_sbd:
        train += voc_pairs(folder, "aug", "SegmentationClassAug")
    test = voc_pairs(folder, "val", "SegmentationClass")
    classes = ["background", *voc.CLASSES]
    meaning = meanings(len(classes))
    return Masked(train, classes, meaning), Masked(test, classes, meaning)


def voc_pairs(folder: Path, name: str, masks: str) -> list[tuple[Path, Path]]:
    path = folder / "ImageSets" / "Segmentation" / f"{name}.txt"
    stems = voc.read_list(path, "missing; expected VOC2012's list of images.")
    pairs = [(folder / "JPEGImages" / f"{stem}.jpg", folder / masks / f"{stem}.png")
             for stem in stems]  # fmt: skip
    missing = [str(file) for pair in pairs for file in pair if not file.is_file()]
    if missing or not pairs:
        fail(f"{path} names {len(pairs)} images, and {len(missing)} files of theirs are missing, "
             f"such as {next(iter(missing), 'all')}.")  # fmt: skip
    return pairs


def open_cityscapes(folder: Path) -> tuple[Masked, Masked]:
    meaning = np.full(256, IGNORED, np.uint8)
    named: dict[int, str] = {}
    for kind in Cityscapes.classes:
        if 0 <= kind.train_id < IGNORED:
            meaning[kind.id], named[kind.train_id] = kind.train_id, kind.name
    parts = []
    for split in ("train", "val"):
        try:
            found = Cityscapes(folder, split, mode="fine", target_type="semantic")
        except RuntimeError as error:
            fail(f"--data {folder}: {error}")
        masks = [target[0] for target in found.targets]
        pairs = [(Path(i), Path(m)) for i, m in zip(found.images, masks, strict=True)]
        parts.append(Masked(pairs, [named[i] for i in sorted(named)], meaning))
    return parts[0], parts[1]


def open_folder(
    folder: Path, test: str, classes: list[str] | None, ignore_index: int
) -> tuple[Masked, Masked]:
    """Images and masks of `folder`/train and `folder`/`test`; all masks are looked at."""
    both = [once(partial(folder_pairs, folder / split)) for split in ("train", test)]
    highest = once(lambda: [highest_class(pairs, ignore_index) for pairs in both])
    names = classes or [f"class {i}" for i in range(highest[0][0] + 1)]
    for number, mask in highest:
        if number >= len(names):
            meant = "--classes names" if classes else "the training masks hold"
            fail(f"{mask} holds the class {number}, and {meant} {len(names)}, from 0. Is it a "
                 "number for pixels without a class (--ignore-index)?")  # fmt: skip
    meaning = meanings(len(names))
    meaning[ignore_index] = IGNORED
    return Masked(both[0], names, meaning), Masked(both[1], names, meaning)


def folder_pairs(folder: Path) -> list[tuple[Path, Path]]:
    images, masks = (
        {f.stem: f for f in sorted((folder / name).glob("*")) if f.name.lower().endswith(ENDINGS)}
        for name in ("images", "masks")
    )
    alone = [stem for stem in images if stem not in masks]
    if alone or not images:
        fail(f"{folder}: {len(alone)} of {len(images)} images have no mask of the same stem in "
             f"{folder / 'masks'}, such as {next(iter(alone), 'all')}.")  # fmt: skip
    return [(image, masks[stem]) for stem, image in images.items()]


def highest_class(pairs: list[tuple[Path, Path]], ignore_index: int) -> tuple[int, Path]:
    """The highest class of all masks and a mask that holds it; their sizes are checked too."""

    def highest(pair: tuple[Path, Path]) -> tuple[int, Path]:
        found = values(pair[1])
        with Image.open(pair[0]) as image:
            if image.size != found.shape[::-1]:
                fail(f"{pair[1]} is {found.shape[1]} x {found.shape[0]} pixels, its image "
                     f"{image.size[0]} x {image.size[1]}.")  # fmt: skip
        return int(found[found != ignore_index].max(initial=0)), pair[1]

    with ThreadPoolExecutor(8) as pool:
        return max(pool.map(highest, pairs), key=lambda found: found[0])


def values(mask: Path) -> np.ndarray:
    """(H, W) uint8."""
    try:
        with Image.open(mask) as file:
            pixels = np.array(file)
    except OSError as error:
        fail(f"{mask} cannot be read: {error}")
    if pixels.ndim != 2 or pixels.dtype != np.uint8:
        fail(f"{mask} has pixels of {pixels.dtype} in {file.mode} mode; expected one channel of 8 "
             "bits with the numbers of the classes, not their colours.")  # fmt: skip
    return pixels


def meanings(classes: int) -> np.ndarray:
    meaning = np.full(256, IGNORED, np.uint8)
    meaning[:classes] = np.arange(classes)
    return meaning
