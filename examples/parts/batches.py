"""What imagenet_ddp.py's device gets of the images: in which order, as which tensors.

Crop boxes, and what replaces an unreadable image, are functions of (seed, epoch, image) alone:
there is no state here that a resumed run would need.
"""

import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from parts.decoding import CENTRE, Crop, central_square, pixels, random_crops
from parts.processes import leave_signals_to_the_trainer
from parts.sources import Arrays, Source

RESIDENT = 4 * 2**30  # bytes of decoded images that the device keeps, where all are of one size
ATTEMPTS = 100  # unreadable images in a row after which the data must be gone
Bad = tuple[int, str]  # number of an image and why it could not be read


@dataclass
class TrainingImages(Dataset[tuple[list[Tensor], list[Bad]]]):
    """Images by (n, 2), epoch and number of each, as uint8 tensors; and those that cannot be read.

    A tensor (B, 3, size, size) for each of `crops`, all drawn in the original's coordinates from
    one decoding; one tensor (B, 3, H, W) where the crops are left to the device: images of one
    size, and with `decode_size` the central square at that size.
    """

    source: Source
    crops: Sequence[tuple[int, Crop]]  # size and distribution of each view's
    seed: int
    decode_size: int | None = None

    @property
    def shape(self) -> tuple[int, int] | None:
        """(height, width) of the images whose crops are left to the device, if they are."""
        square = (self.decode_size, self.decode_size) if self.decode_size else None
        return square or self.source.size

    def __getitem__(self, wanted: np.ndarray) -> tuple[list[Tensor], list[Bad]]:
        bad: list[Bad] = []
        images = [self.load(image, epoch, bad) for epoch, image in wanted.tolist()]
        return [torch.stack(views) for views in zip(*images, strict=True)], bad

    def load(self, index: int, epoch: int, bad: list[Bad]) -> list[Tensor]:
        rng = np.random.default_rng((self.seed, epoch, index))
        for _ in range(ATTEMPTS):
            try:
                return self.decode(self.source.image(index), rng)
            except Exception as error:  # PIL's readers raise of every kind on a broken file
                bad.append((index, f"{type(error).__name__}: {error}"))
                index = int(rng.integers(len(self.source)))
        raise RuntimeError(
            f"{ATTEMPTS} images in a row cannot be read, the last one {self.source.name(index)}: "
            f"{bad[-1][1]}. Is the data still there?"
        )

    def decode(self, image: Image.Image | Tensor, rng: np.random.Generator) -> list[Tensor]:
        if self.decode_size:
            return [central_square(image, 1.0, self.decode_size)]
        if self.source.size is None:
            assert not isinstance(image, Tensor)
            return random_crops(image, self.crops, rng)
        image = image if isinstance(image, Tensor) else pixels(image)
        if image.shape[1:] != self.source.size:
            raise ValueError(f"the size is {tuple(image.shape[1:])}, not {self.source.size}")
        return [image]


@dataclass
class EvaluationImages(Dataset[tuple[Tensor, Tensor]]):
    """Numbers (B,) to images (B, 3, size, size) uint8 and 1 (B,), or 0 where one cannot be read."""

    source: Source
    size: int

    def __getitem__(self, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        images = torch.zeros(len(numbers), 3, self.size, self.size, dtype=torch.uint8)
        good = torch.ones(len(numbers), dtype=torch.long)
        part = CENTRE if self.source.size is None else 1.0
        for i, number in enumerate(numbers):
            try:
                images[i] = central_square(self.source.image(int(number)), part, self.size)
            except Exception:  # as in training, where it is counted
                good[i] = 0
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
