"""What quickstart.py trains on: windows cut from shipped photographs, or a folder of images.

Everything ends as uint8 tensors in memory, split into training and test images.
"""

import importlib.resources
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from parts.processes import fail

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
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}


@dataclass
class Pictures:
    """uint8 images (N, 3, H, W); labels (N,) int64, -1 where an image has none."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: list[str]  # empty: nothing has a label
    unreadable: list[str] = field(default_factory=list)


@dataclass
class Listing:
    """The image files of a folder, the class of each (-1: none), and the side to bring them to."""

    folder: Path
    paths: list[Path]
    labels: list[int]
    classes: list[str]
    side: int


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


def find_images(folder: Path, image_size: int, batch_size: int) -> Listing:
    """The image files, and the class of each: its first subfolder that is not a split's name."""
    if not folder.is_dir():
        fail(f"--data {folder} is not a folder.")
    endings = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in endings and p.is_file())
    if not paths:
        fail(f"--data {folder} holds no image files (such as .jpg or .png), nor do its subfolders.")
    check_enough(len(paths), batch_size, f"image files in {folder}")
    side = round(image_size * 256 / 224)  # the usual ratio of resize to evaluation crop
    needed = len(paths) * side * side * 3
    if needed > MEMORY_LIMIT:
        fail(
            f"{len(paths)} images of {side} px take {needed / 2**30:.1f} GiB, and the limit is "
            f"{MEMORY_LIMIT / 2**30:.0f}: give a smaller --image-size or fewer images."
        )
    names = []
    for path in paths:
        subfolders = path.relative_to(folder).parts[:-1]
        names.append(next((s for s in subfolders if s.lower() not in SPLIT_NAMES), None))
    classes = sorted({name for name in names if name is not None})
    if len(classes) < 2:
        return Listing(folder, paths, [-1] * len(paths), [], side)
    number = {name: i for i, name in enumerate(classes)} | {None: -1}
    return Listing(folder, paths, [number[name] for name in names], classes, side)


def read_images(listing: Listing, batch_size: int) -> Pictures:
    """All of them as squares a little larger than the views, a part of them held out."""
    folder, paths = listing.folder, listing.paths
    images = np.empty((len(paths), listing.side, listing.side, 3), np.uint8)
    with ThreadPoolExecutor() as pool:
        decoded = pool.map(decode_into, images, paths)
        errors = list(tqdm(decoded, "reading", len(paths), unit=" images"))
    unreadable = [
        f"{path.relative_to(folder)}: {error}"
        for path, error in zip(paths, errors, strict=True)
        if error
    ]
    if unreadable:
        print(f"{len(unreadable)} of {len(paths)} image files cannot be read: named at the end")
    good = torch.tensor([error is None for error in errors])
    check_enough(int(good.sum()), batch_size, f"readable images in {folder}")
    labels = torch.tensor(listing.labels)
    test = hold_out(labels, good)
    if not test.any():
        fail("no class subfolder holds two readable images, and one of them is for testing.")
    train = good & ~test
    check_enough(int(train.sum()), batch_size, "images that are not held out for the test")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    classes = listing.classes
    return Pictures(pixels[train], labels[train], pixels[test], labels[test], classes, unreadable)


def check_enough(count: int, batch_size: int, what: str) -> None:
    if count < batch_size:
        hint = f"--batch-size {count} or " if count >= 2 else ""
        fail(f"{count} {what} do not fill a batch of {batch_size}: give {hint}more images.")


def decode_into(image: np.ndarray, path: Path) -> str | None:
    """Fill the (side, side, 3) uint8 image, or say why the file cannot be read."""
    try:
        with Image.open(path) as file:
            file.draft("RGB", image.shape[:2])
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith(("I", "F")):  # convert("RGB") would clip these at 255
                values = np.asarray(picture, np.float32)
                values = (values - values.min()) / max(np.ptp(values), 1e-12) * 255
                picture = Image.fromarray(values.astype(np.uint8))
            image[:] = ImageOps.fit(picture.convert("RGB"), image.shape[:2])
    except Exception as error:  # PIL's readers raise of every kind on a broken file
        return f"{type(error).__name__}: {error}"
    return None


def hold_out(labels: Tensor, good: Tensor) -> Tensor:
    """Which good images are for testing only: the same part of every class, and where there are
    classes, none of the images outside them."""
    part = min(HELD_OUT, HELD_OUT_LIMIT / len(labels))
    generator = torch.Generator().manual_seed(0)
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = ((labels == label) & good).nonzero().flatten()
        if len(members) < 2 or (label < 0 and (labels >= 0).any()):
            continue
        count = max(1, round(part * len(members)))
        test[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return test


def as_batch(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
