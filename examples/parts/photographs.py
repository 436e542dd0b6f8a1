"""What quickstart.py trains on: windows cut from shipped photographs, or a folder of images.

Everything ends as uint8 tensors in memory, split into training and test images.
"""

import importlib.resources
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from parts.decoding import central_square
from parts.processes import fail
from parts.sources import Source, open_data

# Of the pictures in scikit-image's wheel, those that are photographs, and scikit-learn's two.
# fmt: off
SKIMAGE_PHOTOGRAPHS = (
    "astronaut", "brick", "camera", "cell", "chelsea", "coffee", "coins", "grass", "gravel",
    "hubble_deep_field", "ihc", "moon", "motorcycle_left", "page", "retina", "rocket", "text",
    "color",
)
# fmt: on
SKLEARN_PHOTOGRAPHS = ("china", "flower")
WINDOW = 48  # pixels of a photograph that become one image
TRAIN_WINDOWS, TEST_WINDOWS = 200, 50  # a photograph

HELD_OUT, HELD_OUT_LIMIT = 0.2, 2000  # of a folder's images: the part, and at most so many
MEMORY_LIMIT = 4 * 2**30  # bytes of decoded images


@dataclass
class Pictures:
    """uint8 images (N, 3, H, W); labels (N,) int64, -1 where an image has none."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: list[str]  # empty: nothing has a label
    unreadable: list[str] = field(default_factory=list)


def photograph_windows(image_size: int, batch_size: int) -> Pictures:
    """From which photograph was a window cut? Training windows come from the left two thirds, test
    windows from the right third: no pixel is in both."""
    rng = np.random.default_rng(0)
    names, train, test = [*SKIMAGE_PHOTOGRAPHS, *SKLEARN_PHOTOGRAPHS], [], []
    for name in names:
        photograph = open_photograph(name)
        cut = 2 * photograph.width // 3
        train += cut_windows(photograph, (0, cut), TRAIN_WINDOWS, image_size, rng)
        test += cut_windows(photograph, (cut, photograph.width), TEST_WINDOWS, image_size, rng)
    check_enough(len(train), batch_size, "training windows")
    number = torch.arange(len(names))
    return Pictures(
        as_batch(train),
        number.repeat_interleave(TRAIN_WINDOWS),
        as_batch(test),
        number.repeat_interleave(TEST_WINDOWS),
        names,
    )


def open_photograph(name: str) -> Image.Image:
    skimage = name in SKIMAGE_PHOTOGRAPHS
    package, folder = ("skimage", "data") if skimage else ("sklearn.datasets", "images")
    files = importlib.resources.files(package) / folder
    for ending in ("png", "jpg"):
        if (files / f"{name}.{ending}").is_file():
            with (files / f"{name}.{ending}").open("rb") as file:
                return Image.open(file).convert("RGB")
    fail(f"{package} has no picture {name!r}: pip install 'scikit-image>=0.26' scikit-learn")


def cut_windows(
    photograph: Image.Image,
    columns: tuple[int, int],
    count: int,
    image_size: int,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    left = rng.integers(columns[0], columns[1] - WINDOW, count, endpoint=True)
    top = rng.integers(0, photograph.height - WINDOW, count, endpoint=True)
    windows = (
        photograph.crop((x, y, x + WINDOW, y + WINDOW)) for x, y in zip(left, top, strict=True)
    )
    size = (image_size, image_size)
    return [np.asarray(window.resize(size, Image.Resampling.BICUBIC)) for window in windows]


def read_folder(
    folder: Path, image_size: int, batch_size: int, max_value: float | None
) -> Pictures:
    """The images as squares a little larger than the views: those of val/ or the like to test on,
    else a part of all, which is held out."""
    source, test = open_data(folder, max_value)
    sources = [source] if test is None or not (test.labels >= 0).any() else [source, test]
    check_enough(len(source), batch_size, f"images in {folder}")
    side = round(image_size * 256 / 224)  # the usual ratio of resize to evaluation crop
    needed = sum(map(len, sources)) * side * side * 3
    if needed > MEMORY_LIMIT:
        fail(
            f"{sum(map(len, sources))} images of {side} px take {needed / 2**30:.1f} GiB, and the "
            f"limit is {MEMORY_LIMIT / 2**30:.0f}: give a smaller --image-size or fewer images."
        )
    warn_of_classes(source)
    read = [read_squares(one, side) for one in sources]
    unreadable = [error for *_, errors in read for error in errors]
    if unreadable:
        print(f"{len(unreadable)} images cannot be read: named at the end")
    (pixels, labels, _) = read[0]
    check_enough(len(labels), batch_size, f"readable images in {folder}")
    if len(read) == 2:
        tests, truth = read[1][:2]
        order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(0))
        some = order[:HELD_OUT_LIMIT].sort().values
        tests, truth = tests[some], truth[some]
    else:
        held = hold_out(labels)
        if not held.any():
            fail("no class subfolder holds two readable images, and one of them is for testing.")
        tests, truth, pixels, labels = pixels[held], labels[held], pixels[~held], labels[~held]
        check_enough(len(labels), batch_size, "images that are not held out for the test")
    names = source.classes or [str(i) for i in range(int(source.labels.max()) + 1)]
    return Pictures(pixels, labels, tests, truth, names, unreadable)


def warn_of_classes(source: Source) -> None:
    """Say where subfolders do not look like classes."""
    if not source.classes:
        return
    counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.classes))
    for what, which in (("holds one image", counts == 1), ("holds none", counts == 0)):
        names = [source.classes[i] for i in np.flatnonzero(which)]
        if names:
            print(f"{len(names)} of {len(counts)} class folders {what}, such as {names[0]}")
    outside = int((source.labels < 0).sum())
    if outside:
        print(f"{outside} images lie outside of the class folders and count as unlabelled")


def read_squares(source: Source, side: int) -> tuple[Tensor, Tensor, list[str]]:
    """The images (N, 3, side, side) uint8 that can be read, their labels, and what is wrong with
    the others."""
    images = torch.empty(len(source), 3, side, side, dtype=torch.uint8)

    def read(index: int) -> str:
        try:
            images[index] = central_square(source.image(index), 1.0, side)
        except Exception as error:  # PIL's readers raise of every kind on a broken file
            return f"{source.name(index)}: {error}"
        return ""

    with ThreadPoolExecutor() as pool:
        numbers = range(len(source))
        errors = list(tqdm(pool.map(read, numbers), "reading", len(source), unit=" images"))
    good = torch.tensor([not error for error in errors])
    labels = torch.from_numpy(source.labels)
    return images[good], labels[good], [error for error in errors if error]


def check_enough(count: int, batch_size: int, what: str) -> None:
    if count < batch_size:
        hint = f"--batch-size {count} or " if count >= 2 else ""
        fail(f"{count} {what} do not fill a batch of {batch_size}: give {hint}more images.")


def hold_out(labels: Tensor) -> Tensor:
    """Which images are for testing only: the same part of every class, and where there are classes,
    none of the images outside them."""
    part = min(HELD_OUT, HELD_OUT_LIMIT / len(labels))
    generator = torch.Generator().manual_seed(0)
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        if len(members) < 2 or (label < 0 and (labels >= 0).any()):
            continue
        count = max(1, round(part * len(members)))
        test[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return test


def as_batch(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
