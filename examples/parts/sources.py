"""Images by number, whatever they are stored in: arrays, files, tar shards, known data sets.

Nothing here decodes or draws.
"""

import io
import math
import os
import tarfile
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets

from parts.decoding import central_square, open_image
from parts.processes import fail, once, tell

TEST_FOLDERS = ("val", "valid", "validation", "test")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif")
CHECKED = 256  # images at most that are read before the work begins


@dataclass
class Source:
    """Images by number: `read` gives a file's bytes, or (3, H, W) uint8 where they are decoded."""

    labels: np.ndarray  # (N,) int64, -1 where an image has none
    size: ClassVar[tuple[int, int] | None] = None  # (height, width), where all have the same
    shard: ClassVar[np.ndarray | None] = None  # (N,): which of them lie together
    classes: ClassVar[list[str]] = []  # the labels' names, where folders have some
    max_value: ClassVar[float | None] = None  # white, in files of more than 8 bits a channel

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes | Tensor:
        raise NotImplementedError

    def image(self, index: int) -> Image.Image | Tensor:
        """A PIL image, or (3, H, W) uint8; raises of every kind where it cannot be read."""
        data = self.read(index)
        return data if isinstance(data, Tensor) else open_image(data, self.max_value)

    def name(self, index: int) -> str:
        """The image's path within the data's folder, or what else tells it apart."""
        return f"image {index}"

    def fingerprint(self) -> int:
        """A number that changes where images came, went or were renamed, as their order does."""
        names = "\n".join(self.name(i) for i in range(0, len(self), max(1, len(self) // 1000)))
        return zlib.crc32(self.labels.tobytes(), zlib.crc32(names.encode()))


@dataclass
class Arrays(Source):
    """Decoded images of one size, (N, 3, H, W) uint8, in memory."""

    pixels: np.ndarray

    def __post_init__(self) -> None:
        self.size = self.pixels.shape[2:]

    def read(self, index: int) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.pixels[index]))


@dataclass
class Packed(Source):
    """Encoded files end to end in one array, as in a .npz of `jpeg`, `offsets` and `labels`."""

    data: np.ndarray
    offsets: np.ndarray

    def __post_init__(self) -> None:
        sizes = set()
        for i in range(min(64, len(self))):
            with suppress(OSError):  # unreadable ones are counted in training
                sizes.add(header_size(self, i))
        self.size = sizes.pop() if len(sizes) == 1 else None

    def read(self, index: int) -> bytes:
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()


@dataclass
class Files(Source):
    """Image files; `names` is an array of bytes, which forked workers share."""

    folder: Path
    names: np.ndarray

    def name(self, index: int) -> str:
        return os.fsdecode(self.names[index])

    def read(self, index: int) -> bytes:
        return (self.folder / self.name(index)).read_bytes()


@dataclass
class Shards(Source):
    """Images in uncompressed tar files of the WebDataset layout, read at their offsets.

    An index of our own, because it gives one exact global order, which a run can take up again in
    mid-epoch and with another number of processes; the webdataset package's streams cannot.
    """

    tars: list[Path]
    places: np.ndarray  # (N, 3): number of the tar file, byte offset, length

    def __post_init__(self) -> None:
        self.shard = self.places[:, 0]

    def name(self, index: int) -> str:
        tar, offset, _ = self.places[index]
        return f"{self.tars[tar].name} at byte {offset}"

    def read(self, index: int) -> bytes:
        tar, offset, length = self.places[index].tolist()
        with open(self.tars[tar], "rb", buffering=0) as file:
            return os.pread(file.fileno(), length, offset)


@dataclass
class Part(Source):
    """Some images of another source."""

    whole: Source
    numbers: np.ndarray

    def __post_init__(self) -> None:
        self.size, self.classes = self.whole.size, self.whole.classes
        self.max_value = self.whole.max_value
        self.shard = None if self.whole.shard is None else self.whole.shard[self.numbers]

    def read(self, index: int) -> bytes | Tensor:
        return self.whole.read(int(self.numbers[index]))

    def name(self, index: int) -> str:
        return self.whole.name(int(self.numbers[index]))


def hold_out(source: Source, count: int) -> tuple[Source, Source]:
    """`source` without `count` of its images, and these: the same ones with every seed."""
    if not 0 < count < len(source):
        fail(f"--held-out {count} must be above 0 and below the {len(source)} images there are.")
    order = np.random.default_rng(0).permutation(len(source))
    kept, left = (np.sort(part) for part in (order[count:], order[:count]))
    return Part(source.labels[kept], source, kept), Part(source.labels[left], source, left)


def open_data(
    folder: Path, max_value: float | None = None, max_bad: float | None = None
) -> tuple[Source, Source | None]:
    """The images to train on, and labelled ones to test on where the data set has such.

    By what the folder holds: train.npz; CIFAR-10, CIFAR-100, STL-10 or Imagenette as torchvision
    unpacks them; *.tar; else image files. Where there are train/ and one of val/, valid/,
    validation/ and test/, only train/ is trained on. `max_value` is open_image's,
    `max_bad` the part of them that may be unreadable, by default all but one.
    """
    if not folder.is_dir():
        fail(f"--data {folder} is not a folder.")
    train, test = open_folder(folder)
    for source in (train, test):
        if source is not None and max_value is not None:
            source.max_value = max_value
    check_readable(train, folder, max_bad)
    return train, test


def open_folder(folder: Path) -> tuple[Source, Source | None]:
    if (folder / "train.npz").is_file():
        test = folder / "test.npz"
        return open_npz(folder / "train.npz"), open_npz(test) if test.is_file() else None
    try:
        packaged = open_torchvision(folder)
    except RuntimeError as error:  # files that are missing or damaged
        fail(f"--data {folder}: {error}")
    if packaged:
        return packaged
    folder = next(iter(sorted(folder.glob("imagenette2*/"))), folder)
    test_folder = next((folder / n for n in TEST_FOLDERS if (folder / n).is_dir()), None)
    split = test_folder is not None and (folder / "train").is_dir()
    first = folder / "train" if split else folder
    opener = open_shards if any(first.glob("*.tar")) else open_files
    train, classes = opener(first)
    return train, opener(test_folder, classes)[0] if split else None


def check_readable(source: Source, folder: Path, max_bad: float | None) -> None:
    """End the run where more than the part `max_bad` of the images cannot be read; None: where none
    can be. Of many a sample is read, whose part may be larger by chance.
    """
    numbers = range(0, len(source), max(1, len(source) // CHECKED))

    def check() -> list[str]:
        with ThreadPoolExecutor(16) as pool:
            return [r for r in pool.map(partial(why_unreadable, source), numbers) if r]

    bad, count = once(check), len(numbers)
    allowed = count - 1.0 if max_bad is None else max_bad * count
    if max_bad is not None and count < len(source):
        allowed += 3 * math.sqrt(allowed)
    if len(bad) > allowed:
        what = f"{len(bad)} of {count} images" if len(bad) < count else "no image"
        can = "cannot" if len(bad) < count else "can"
        more = "" if max_bad is None else f" (--max-bad is {max_bad:g})"
        fail(f"{what} of --data {folder} {can} be read{more}, such as {bad[0]}")


def why_unreadable(source: Source, index: int) -> str:
    """The image's name and what was wrong with it, empty where nothing was."""
    try:
        central_square(source.image(index), 1.0, 8)
    except Exception as error:  # of every kind, as in training
        return f"{source.name(index)}: {error}"
    return ""


def open_torchvision(folder: Path) -> tuple[Arrays, Arrays] | None:
    cifar = {"cifar-10-batches-py": datasets.CIFAR10, "cifar-100-python": datasets.CIFAR100}
    for name, kind in cifar.items():
        if (folder / name).is_dir():
            both = [kind(folder, train=train) for train in (True, False)]
            train, test = (Arrays(np.array(d.targets), d.data.transpose(0, 3, 1, 2)) for d in both)
            return train, test
    if (folder / "stl10_binary").is_dir():
        both = [datasets.STL10(folder, split=split) for split in ("train+unlabeled", "test")]
        train, test = (Arrays(d.labels.astype(np.int64), d.data) for d in both)
        return train, test
    return None


def open_npz(path: Path) -> Packed:
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        fail(f"{path} cannot be read as a .npz file: {error}")
    if not {"jpeg", "offsets"} <= arrays.keys():
        fail(f"{path} holds {', '.join(arrays)}; expected jpeg, offsets and labels.")
    data, offsets = arrays["jpeg"], arrays["offsets"].astype(np.int64)
    labels = arrays.get("labels", np.full(len(offsets) - 1, -1)).astype(np.int64)
    if len(labels) != len(offsets) - 1 or offsets[-1] != len(data):
        fail(
            f"{path} has {len(data)} bytes, {len(labels)} labels and {len(offsets)} offsets, the "
            f"last of them {offsets[-1]}; expected one offset more than labels, the last of them "
            "the number of bytes."
        )
    return Packed(labels, data, offsets)


def open_files(folder: Path, classes: list[str] | None = None) -> tuple[Files, list[str]]:
    """The image files below `folder`; its subfolders are the classes, where there are several."""
    names = once(lambda: list_files(folder))
    if not len(names):
        fail(f"--data {folder} holds no image files (such as .jpg or .png), nor do its subfolders.")
    above = [os.fsdecode(n).rpartition(os.sep)[0].split(os.sep)[0] for n in names]
    classes = sorted(set(above) - {""}) if classes is None else classes
    number = {name: i for i, name in enumerate(classes)} if len(classes) > 1 else {}
    files = Files(np.array([number.get(name, -1) for name in above]), folder, names)
    files.classes = classes if number else []
    return files, classes


def list_files(folder: Path) -> np.ndarray:
    found, left_out = [], Counter[str]()
    for place, folders, names in os.walk(folder, followlinks=True):
        # Hidden ones are no images: macOS' ._1.jpg, thumbnails, notebooks' checkpoints.
        folders[:] = (name for name in folders if not name.startswith("."))
        for name in names:
            if name.startswith("."):
                continue
            if name.lower().endswith(ENDINGS):
                path = os.path.relpath(os.path.join(place, name), folder)
                found.append(os.fsencode(path))
            else:
                left_out[os.path.splitext(name)[1].lower() or "without a suffix"] += 1
    if left_out:
        kinds = ", ".join(f"{n} {ending}" for ending, n in left_out.most_common(5))
        tell(f"{folder}: files that are no images by their names are left out: {kinds}")
    return np.array(sorted(found))


def open_shards(folder: Path, _: list[str] | None = None) -> tuple[Shards, list[str]]:
    """The images of all *.tar, one a sample; the number in its .cls, if any, is its label."""
    tars = sorted(folder.glob("*.tar"))

    def index() -> tuple[np.ndarray, np.ndarray]:
        with ThreadPoolExecutor(16) as pool:
            parts = list(pool.map(index_shard, tars))
        shard = np.repeat(np.arange(len(tars)), [len(part) for part in parts])
        rows = np.concatenate(parts)
        return np.column_stack((shard, rows[:, :2])), rows[:, 2]

    places, labels = once(index)
    if not len(places):
        fail(f"The {len(tars)} tar files in --data {folder} hold no images such as 1.jpg or 1.png.")
    return Shards(labels, tars, places), []


def index_shard(path: Path) -> np.ndarray:
    """(N, 3): byte offset, length and label of the first image of each sample of a tar file.

    A sample is named by what comes before the first dot, and 1.mask.png is no image of its own.
    """
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                base, _, ending = os.path.basename(member.name).partition(".")
                key = os.path.join(os.path.dirname(member.name), base)
                if ending == "cls":
                    text = tar.extractfile(member).read()  # type: ignore[union-attr]
                    labels[key] = int(text) if text.strip().isdigit() else -1
                elif base and f".{ending.lower()}" in ENDINGS:
                    images.setdefault(key, (member.offset_data, member.size))
    except (tarfile.TarError, OSError) as error:
        fail(f"{path} cannot be read as an uncompressed tar file: {error}")
    rows = [(*place, labels.get(key, -1)) for key, place in images.items()]
    return np.array(rows, np.int64).reshape(-1, 3)


def header_size(source: Source, index: int) -> tuple[int, int]:
    """(height, width) without decoding."""
    if source.size:
        return source.size
    width, height = Image.open(io.BytesIO(source.read(index))).size
    return height, width


def picture(source: Source, index: int) -> Image.Image:
    """RGB; raises OSError or ValueError where the image cannot be read."""
    image = source.image(index)
    if isinstance(image, Tensor):
        return Image.fromarray(image.permute(1, 2, 0).numpy())
    return image.convert("RGB")
