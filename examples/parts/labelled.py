"""Labelled images: data sets that come with lists, parts of the labels, how an evaluation sees an
image, and the order in which a classifier is trained on them.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from parts.backbone import Facts
from parts.decoding import CENTRE
from parts.journal import Journal
from parts.machine import Machine
from parts.order import Order, seed_of
from parts.processes import fail, tell, world_size
from parts.sources import Files, Source, open_data, picture
from parts.voc import first_words

# Folders that hold lists of "path label": the two lists, and where their paths begin. The first as
# places.csail.mit.edu packs it; then torchvision.datasets.Places365, small and large; then the
# lists of MMSelfSup for ImageNet (train, val) and iNaturalist 2018 (train_val2018).
LISTS = (
    ("trainvalsplit_places205/train_places205.csv", "trainvalsplit_places205/val_places205.csv",
     ("data/vision/torralba/deeplearning/images256",) * 2),
    ("places365_train_standard.txt", "places365_val.txt", ("data_256_standard", "val_256")),
    ("places365_train_standard.txt", "places365_val.txt", ("data_large_standard", "val_large")),
    ("meta/train.txt", "meta/val.txt", ("train", "val")),
    ("meta/train.txt", "meta/val.txt", ("train_val2018", "train_val2018")),
)  # fmt: skip
HELD_OUT = 5  # of every so many images of a class one is tested on, where there is no test set
Chosen = tuple[Source, np.ndarray]  # a source and the numbers of its images


def open_images(folder: Path, max_value: float | None = None) -> tuple[Chosen, Chosen]:
    """Training and test images with labels: what open_labelled reads, and Places205, Places365,
    iNaturalist 2018 to 2021 and lists of "path label" in the layouts of LISTS."""
    for train, test, roots in LISTS:
        if (folder / train).is_file() and all((folder / root).is_dir() for root in roots):
            lists = zip((train, test), roots, strict=True)
            return with_classes(
                folder, [read_list(folder / f, folder / r) for f, r in lists], max_value
            )
    for train, test in (("train2018.json", "val2018.json"), ("train2019.json", "val2019.json")):
        if (folder / train).is_file():
            return with_classes(
                folder, [read_json(folder / f, folder) for f in (train, test)], max_value
            )
    years = folder / "2021_train", folder / "2021_valid"  # torchvision.datasets.INaturalist
    if all(year.is_dir() for year in years):
        return with_classes(folder, [read_folders(year) for year in years], max_value)
    return with_classes(folder, list(open_labelled(folder, max_value)), max_value)


def open_tests(folder: Path, max_value: float | None = None) -> Chosen:
    """The images to test on; those to train on may be missing."""
    for _, test, (_, root) in LISTS:
        if (folder / test).is_file() and (folder / root).is_dir():
            return read_list(folder / test, folder / root)
    if (folder / "val2018.json").is_file():
        return read_json(folder / "val2018.json", folder)
    if (folder / "val").is_dir() and not (folder / "train").is_dir():
        return read_folders(folder / "val")
    return open_images(folder, max_value)[1]


def with_classes(
    folder: Path, parts: list[Chosen], max_value: float | None
) -> tuple[Chosen, Chosen]:
    """Both parts, where one can train on the first and test on the second."""
    for source, _ in parts:
        source.max_value = max_value
    train, test = (set(source.labels[numbers].tolist()) for source, numbers in parts)
    if len(train) < 2:
        fail(f"--data {folder} has {len(train)} class to train on; expected two or more.")
    if test - train:
        fail(f"--data {folder}: classes {sorted(test - train)[:5]} are in the test images and not "
             "in the training images.")  # fmt: skip
    return parts[0], parts[1]


def read_list(path: Path, root: Path) -> Chosen:
    """Lines of "path label"; the label may be apart by a space, a comma or a tab."""
    lines = [line.replace(",", " ").rsplit(maxsplit=1) for line in path.read_text().splitlines()]
    lines = [line for line in lines if line]
    if not lines or any(len(line) != 2 or not line[1].isdigit() for line in lines):
        fail(f'{path}: expected lines of "path label", with labels from 0 on.')
    return numbered([name for name, _ in lines], [int(label) for _, label in lines], root, path)


def read_json(path: Path, root: Path) -> Chosen:
    """iNaturalist's annotations."""
    try:
        content = json.loads(path.read_text())
        label = {item["image_id"]: item["category_id"] for item in content["annotations"]}
        images = [(item["file_name"], label[item["id"]]) for item in content["images"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        fail(f"{path} is not iNaturalist's JSON: images (id, file_name) and annotations (image_id, "
             f"category_id): {error!r}")  # fmt: skip
    return numbered([name for name, _ in images], [number for _, number in images], root, path)


def read_folders(root: Path) -> Chosen:
    classes = sorted(path.name for path in root.iterdir() if path.is_dir())
    found = [(f"{c}/{f}", i) for i, c in enumerate(classes) for f in sorted(os.listdir(root / c))]
    return numbered([name for name, _ in found], [label for _, label in found], root, root)


def numbered(names: list[str], labels: list[int], root: Path, path: Path) -> Chosen:
    """Images below `root` or, as MMSelfSup's convert_inaturalist.py leaves its lists, below the
    folder that `root` is in. A hundred of them are looked for."""
    names = [name.lstrip("/") for name in names]
    root = next((r for r in (root, root.parent) if (r / names[0]).is_file()), root)
    some = names[:: max(1, len(names) // 100)]
    missing = [name for name in some if not (root / name).is_file()]
    if missing:
        fail(f"{path} names images that are not in {root}: {len(missing)} of {len(some)} that were "
             f"looked for, such as {missing[0]}.")  # fmt: skip
    encoded = np.array([os.fsencode(name) for name in names])
    return Files(np.array(labels, np.int64), root, encoded), np.arange(len(names))


def open_labelled(folder: Path, max_value: float | None) -> tuple[Chosen, Chosen]:
    """Training and test images: each a source and the numbers of its images.

    What open_data reads, with labels. Without a test set every fifth image of a class is tested
    on, and left out of training.
    """
    train, test = open_data(folder, max_value)
    some = test is not None and (train.labels >= 0).any()  # as STL-10: training leaves others out
    for source in [source for source in (None if some else train, test) if source]:
        without = np.flatnonzero(source.labels < 0)
        if len(without):
            fail(f"--data {folder}: {len(without)} of {len(source)} images have no label, the "
                 f"first is {source.name(int(without[0]))}. Expected one folder for each class, "
                 "or a labelled data set.")  # fmt: skip
    known = np.flatnonzero(train.labels >= 0)
    if test is not None:
        return (train, known), (test, np.arange(len(test)))
    held_out = np.zeros(len(train), dtype=bool)
    for label in np.unique(train.labels[known]):
        held_out[np.flatnonzero(train.labels == label)[HELD_OUT - 1 :: HELD_OUT]] = True
    tell(f"no test set in {folder}: every {HELD_OUT}th image of a class is tested on")
    if not held_out.any():
        fail(f"--data {folder} has no class of {HELD_OUT} images to test on. Give train/ and val/.")
    return (train, np.flatnonzero(~held_out)), (train, np.flatnonzero(held_out))


def balanced(labels: np.ndarray, percent: float, seed: int) -> np.ndarray:
    """Which of the images to keep: of each class `percent`, rounded, and at least one.

    Sorted numbers, drawn by the seed and the class alone: 10 % holds all of 1 %.
    """
    kept = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = np.random.default_rng((seed, int(label))).permutation(members)
        kept.append(order[: max(1, round(len(members) * percent / 100))])
    return np.sort(np.concatenate(kept))


def listed(part: Chosen, path: Path) -> np.ndarray:
    """The numbers of the images that a list names: the first word of each line is a path within
    the data, a file's name, or where images have no names a number, counted from 0."""
    source, numbers = part
    try:
        words = first_words(path)
    except OSError as error:
        fail(f"--label-list {path} cannot be read: {error.strerror}.")
    places = {}
    for number in numbers.tolist():
        name = source.name(number)
        places |= {name: number, os.path.basename(name): number, str(number): number}
    missing = [word for word in words if word not in places]
    if missing or not words:
        fail(
            f"--label-list {path}: {len(missing)} of {len(words)} lines name no training image, "
            f"such as {(missing or ['none'])[0]!r}; one is called {source.name(numbers[0])!r}."
        )
    return np.array(sorted({places[word] for word in words}))


Transform = Callable[[Any], Tensor]
INTERPOLATION = (v2.InterpolationMode.BICUBIC, v2.InterpolationMode.BILINEAR)  # by `bilinear`


@dataclass
class Labelled(Dataset[tuple[Tensor, int]]):
    """Images as `transform` makes them of a PIL image, with their labels."""

    source: Source
    transform: Transform
    indices: np.ndarray | None = None  # which images, all if None

    def __post_init__(self) -> None:
        if self.indices is None:
            self.indices = np.arange(len(self.source))

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64."""
        return self.source.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        index = int(self.indices[number])
        try:
            image = picture(self.source, index)
        except (OSError, ValueError) as error:
            raise RuntimeError(f"{self.source.name(index)} cannot be read: {error}") from error
        return self.transform(image), int(self.source.labels[index])


def evaluation_transform(facts: Facts, whole: bool, bilinear: bool = False) -> Transform:
    """The central square, at 224 px of a short edge of 256; or all of the short edge.

    Bicubic as the paper's, or `bilinear` as MMSelfSup 0.x (configs/benchmarks/classification/
    knn_imagenet.py and _base_/datasets/imagenet.py, which leave torchvision's default).
    """
    edge = round(facts.image_size / (1.0 if whole else CENTRE))
    return v2.Compose([
        v2.Resize(edge, interpolation=INTERPOLATION[bilinear]),
        v2.CenterCrop(facts.image_size),
        *as_tensor(facts),
    ])  # fmt: skip


def training_transform(facts: Facts, bilinear: bool = False) -> Transform:
    """Random resized crop and flip."""
    crop = v2.RandomResizedCrop(facts.image_size, interpolation=INTERPOLATION[bilinear])
    return v2.Compose([crop, v2.RandomHorizontalFlip(), *as_tensor(facts)])


def as_tensor(facts: Facts) -> list[Transform]:
    """A PIL image to (3, H, W) float32, normalised as the backbone expects."""
    to_float = v2.ToDtype(torch.float32, scale=True)
    return [v2.ToImage(), to_float, v2.Normalize(facts.mean, facts.std)]


def evaluation_images(part: Chosen, facts: Facts, bilinear: bool = False) -> Labelled:
    """For features: images of one size, such as CIFAR's, are seen whole."""
    source, indices = part
    look = evaluation_transform(facts, source.size is not None, bilinear)
    return Labelled(source, look, indices)


@dataclass
class Drawn(Dataset[tuple[Tensor, int]]):
    """Images by (epoch, number), each with random numbers of its own: a crop depends neither on
    the workers, nor on the processes, nor on where the run was stopped."""

    images: Labelled
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        with torch.random.fork_rng(devices=()):
            epoch, number = map(int, key)
            torch.manual_seed(seed_of(self.seed, epoch, number))
            return self.images[number]


def training_loader(images: Labelled, size: int, seed: int, machine: Machine) -> DataLoader[Any]:
    """Batches of `size` images over all processes; loader.batch_sampler.only(epoch) chooses."""
    if len(images) < world_size():
        fail(f"{len(images)} training images for {world_size()} processes.")
    order = Order(len(images), size, seed, stop=0, rest="spread")
    order.only(epoch=0)
    return machine.loader(
        Drawn(images, seed), batch_sampler=order, persistent_workers=machine.workers > 0
    )


@dataclass
class Watched:
    """A loader whose batches the journal's bar counts."""

    loader: DataLoader[Any]
    journal: Journal

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield batch
            self.journal.advance()
