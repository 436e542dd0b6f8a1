"""Where imagenet_ddp.py's images come from, and as what they reach the device.

Crop boxes, and what replaces an unreadable image, are functions of (seed, epoch, image) alone:
there is no state here that a resumed run would need. The order is in pretrain_state.py.
"""

import io
import itertools
import math
import os
import signal
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets

CENTRE = 224 / 256  # the part of the short edge that an evaluation sees
RESIDENT = 4 * 2**30  # bytes of decoded images that the device keeps, where all are of one size
ATTEMPTS = 100  # unreadable images in a row after which the data must be gone
TEST_FOLDERS = ("val", "valid", "validation", "test")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif")

Bad = tuple[int, str]  # number of an image and why it could not be read


@dataclass
class Source:
    """Images by number: `read` gives a file's bytes, or (3, H, W) uint8 where they are decoded."""

    labels: np.ndarray  # (N,) int64, -1 where an image has none
    size: ClassVar[tuple[int, int] | None] = None  # (height, width), where all have the same
    shard: ClassVar[np.ndarray | None] = None  # (N,): which of them lie together

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes | Tensor:
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Within the data's folder."""
        return f"image {index}"

    def fingerprint(self) -> int:
        """Another one where images came, went or were renamed: then the order is another."""
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
        self.size = self.whole.size
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


def open_data(folder: Path) -> tuple[Source, Source | None]:
    """The images to train on, and labelled ones to test on where the data set has such.

    By what the folder holds: train.npz; CIFAR-10, CIFAR-100, STL-10 or Imagenette as torchvision
    unpacks them; *.tar; else image files. Where there are train/ and one of val/, valid/,
    validation/ and test/, only train/ is trained on.
    """
    if not folder.is_dir():
        fail(f"--data {folder} is not a folder.")
    train, test = open_folder(folder)
    check_readable(train, folder)
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


def check_readable(source: Source, folder: Path) -> None:
    """End the run where nothing can be read: then something is wrong with all of it."""
    reason: Exception | None = None
    for index in range(0, len(source), max(1, len(source) // 64)):
        try:
            central_square(source.read(index), 1.0, 8)
            return
        except Exception as error:  # of every kind, as in training
            reason = reason or error
    fail(f"no image of --data {folder} can be read, such as {source.name(0)}: {reason}")


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
    return Files(np.array([number.get(name, -1) for name in above]), folder, names), classes


def list_files(folder: Path) -> np.ndarray:
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        # Hidden ones are no images: macOS' ._1.jpg, thumbnails, notebooks' checkpoints.
        folders[:] = (name for name in folders if not name.startswith("."))
        found += [
            os.fsencode(os.path.relpath(os.path.join(place, name), folder))
            for name in names
            if name.lower().endswith(ENDINGS) and not name.startswith(".")
        ]
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


def once(make: Callable[[], Any]) -> Any:
    """What `make` gives on rank 0, on every rank: one of them reads the folders, not all."""
    if not (dist.is_available() and dist.is_initialized()):
        return make()
    box = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


# Reading ----------------------------------------------------------------------------------------


class Request(NamedTuple):
    """The images of one forward pass of one device."""

    epoch: int
    images: np.ndarray


@dataclass(frozen=True)
class Crop:
    """Of random resized crops: the part of the area, width over height (paper, appendix B)."""

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)


@dataclass
class TrainingImages(Dataset[tuple[list[Tensor], list[Bad]]]):
    """A request's images as uint8 tensors, with those that could not be read.

    Two tensors (B, 3, size, size), the crops of both views, drawn in the original's coordinates
    from one decoding; one tensor (B, 3, H, W) where the crops are left to the device: images of
    one size, and with `decode_size` the central square at that size.
    """

    source: Source
    size: int
    seed: int
    decode_size: int | None = None
    crop: Crop = Crop()  # of those drawn here

    @property
    def shape(self) -> tuple[int, int] | None:
        """Of the images whose crops are left to the device."""
        square = (self.decode_size, self.decode_size) if self.decode_size else None
        return square or self.source.size

    def __getitem__(self, request: Request) -> tuple[list[Tensor], list[Bad]]:
        bad: list[Bad] = []
        images = [self.load(int(i), request.epoch, bad) for i in request.images]
        return [torch.stack(views) for views in zip(*images, strict=True)], bad

    def load(self, index: int, epoch: int, bad: list[Bad]) -> list[Tensor]:
        rng = np.random.default_rng((self.seed, epoch, index))
        for _ in range(ATTEMPTS):
            try:
                return self.decode(self.source.read(index), rng)
            except Exception as error:  # PIL's readers raise of every kind on a broken file
                bad.append((index, f"{type(error).__name__}: {error}"))
                index = int(rng.integers(len(self.source)))
        raise RuntimeError(
            f"{ATTEMPTS} images in a row cannot be read, the last one {self.source.name(index)}: "
            f"{bad[-1][1]}. Is the data still there?"
        )

    def decode(self, data: bytes | Tensor, rng: np.random.Generator) -> list[Tensor]:
        if self.decode_size:
            return [central_square(data, 1.0, self.decode_size)]
        if self.source.size is None:
            assert isinstance(data, bytes)
            return two_crops(data, self.size, rng, self.crop)
        image = data if isinstance(data, Tensor) else pixels(open_image(data))
        if image.shape[1:] != self.source.size:
            raise ValueError(f"the size is {tuple(image.shape[1:])}, not {self.source.size}")
        return [image]


@dataclass
class EvaluationImages(Dataset[tuple[Tensor, Tensor]]):
    """Numbers (B,) to images (B, 3, size, size) uint8 and whether each could be read (B,)."""

    source: Source
    size: int

    def __getitem__(self, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        images = torch.zeros(len(numbers), 3, self.size, self.size, dtype=torch.uint8)
        good = torch.ones(len(numbers), dtype=torch.bool)
        part = CENTRE if self.source.size is None else 1.0
        for i, number in enumerate(numbers):
            try:
                images[i] = central_square(self.source.read(int(number)), part, self.size)
            except Exception:  # as in training, where it is counted
                good[i] = False
        return images, good


def make_loader(
    dataset: Dataset[Any], order: Any, workers: int, device: torch.device
) -> DataLoader[Any]:
    """One batch, as the data set makes it, for each element of `order`."""
    return DataLoader(
        dataset,
        sampler=order,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        # Shares the source's memory, and has no server that a scheduler's signal would end.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_the_trainer,
    )


def leave_signals_to_the_trainer(_: int) -> None:
    # A scheduler signals every process of a job: the trainer must find its workers alive to save.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def on_device(loader: DataLoader[Any], device: torch.device) -> Iterator[tuple[Any, list[Bad]]]:
    """Batches on the device; on CUDA the next one is copied while the device computes."""
    if device.type != "cuda":
        yield from (([x.to(device) for x in images], bad) for images, bad in loader)
        return
    side, waiting = torch.cuda.Stream(device), None
    for images, bad in itertools.chain(loader, [([], [])]):
        with torch.cuda.stream(side):
            copies = [x.to(device, non_blocking=True) for x in images]
        arrived = side.record_event()
        if waiting is not None:
            ready, its_bad, event = waiting
            torch.cuda.current_stream().wait_event(event)
            for x in ready:
                x.record_stream(torch.cuda.current_stream())
            yield ready, its_bad
        waiting = copies, bad, arrived


def resident(data: TrainingImages, device: torch.device) -> Tensor | None:
    """All images (N, 3, H, W) uint8 on the device; None where they differ in size, are to be made
    smaller, are more than RESIDENT, or one cannot be read, which takes another's place each epoch.
    """
    size, count = data.source.size, len(data.source)
    bad: list[Bad] = []
    if size is None or data.decode_size or count * 3 * math.prod(size) > RESIDENT:
        return None
    if isinstance(data.source, Arrays):
        return torch.from_numpy(np.ascontiguousarray(data.source.pixels)).to(device)
    images = torch.empty(count, 3, *size, dtype=torch.uint8)

    def fill(index: int) -> None:
        (images[index],) = data.load(index, 0, bad)

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, range(count)))
    return None if bad else images.to(device)


# Pictures and boxes -----------------------------------------------------------------------------


def open_image(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"mode {image.mode}: expected 8 bits a channel, scale such images first")
    return image


def pixels(image: Image.Image) -> Tensor:
    """(3, H, W) uint8; EXIF's orientation is ignored, as by torchvision's ImageFolder."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def two_crops(
    data: bytes, size: int, rng: np.random.Generator, crop: Crop = Crop()
) -> list[Tensor]:
    """Two random resized crops (3, size, size) of one decoding."""
    image = open_image(data)
    width, height = image.size
    boxes = [draw_box(rng, height, width, crop) for _ in range(2)]
    # A JPEG can be decoded smaller where both crops keep twice the pixels of their views a side:
    # the decoder's filter is another one, and then it leaves no trace.
    reduced(image, min(min(h, w) for _, _, h, w in boxes) // (2 * size))
    down, along = image.height / height, image.width / width
    crops = []
    for top, left, h, w in boxes:
        x, y = round(left * along), round(top * down)
        right = min(image.width, x + max(1, round(w * along)))
        bottom = min(image.height, y + max(1, round(h * down)))
        crops.append(resize(pixels(image.crop((x, y, right, bottom))), size))
    return crops


def central_square(data: bytes | Tensor, part: float, size: int) -> Tensor:
    """(3, size, size): the central square over `part` of the short edge."""
    if isinstance(data, bytes):
        image = open_image(data)
        reduced(image, int(part * min(image.size)) // (2 * size))
        data = pixels(image)
    height, width = data.shape[1:]
    side = max(1, round(part * min(height, width)))
    top, left = (height - side) // 2, (width - side) // 2
    return resize(data[:, top : top + side, left : left + side], size)


def reduced(image: Image.Image, factor: int) -> None:
    """Let the decoder divide both sides by the largest power of two up to `factor`, if it can."""
    scale = next(s for s in (8, 4, 2, 1) if s <= max(1, factor))
    if scale > 1:
        image.draft(image.mode, (image.width // scale, image.height // scale))


def resize(image: Tensor, size: int) -> Tensor:
    # torch's uint8 kernel: torchvision's and PIL's antialiased bicubic to a rounding.
    return F.interpolate(image[None], (size, size), mode="bicubic", antialias=True)[0].contiguous()


def draw_box(
    rng: np.random.Generator, height: int, width: int, crop: Crop = Crop()
) -> tuple[int, int, int, int]:
    """Top, left, height, width as torchvision's RandomResizedCrop draws them."""
    low, high = map(math.log, crop.ratio)
    for _ in range(10):
        area = height * width * rng.uniform(*crop.scale)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            return int(top), int(left), h, w
    w = min(width, max(1, round(height * crop.ratio[1])))
    h = min(height, max(1, round(width / crop.ratio[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def upsampled_share(
    source: Source, size: int, decode_size: int | None, crop: Crop = Crop()
) -> float:
    """The part of all crops with fewer pixels than their view, from up to 500 images."""
    rng, small, drawn = np.random.default_rng(0), 0, 0
    for index in range(0, len(source), max(1, len(source) // 500)):
        try:
            shape = (decode_size, decode_size) if decode_size else header_size(source, index)
        except Exception:  # an unreadable file; training counts it
            continue
        boxes = [draw_box(rng, *shape, crop) for _ in range(20)]
        small += sum(h * w < size * size for _, _, h, w in boxes)
        drawn += len(boxes)
    return small / max(1, drawn)


def header_size(source: Source, index: int) -> tuple[int, int]:
    """(height, width) without decoding."""
    if source.size:
        return source.size
    width, height = Image.open(io.BytesIO(source.read(index))).size
    return height, width


def flag(text: str, **default: Any) -> Any:
    """A field of a recipe or protocol, and what --help says of it and its default's source."""
    return field(metadata={"help": text}, **default)


def fail(sentence: str) -> NoReturn:
    """End this process with one sentence, which one process of each machine prints."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    raise SystemExit(f"{Path(sys.argv[0]).stem}: {sentence}" if first else 1)
