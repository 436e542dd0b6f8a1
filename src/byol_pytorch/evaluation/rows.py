"""Rows of features as they come, in memory or in a file, and those of all processes together."""

import io
import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from byol_pytorch.parallel import process, world_size

_BLOCK = 2**26  # bytes that one process sends at once


class Rows:
    """The rows (N, D) of one feature: row i of process r is row i x world + r of the data set."""

    def __init__(self, name: str, folder: str | Path | None) -> None:
        self.name, self.count = name, 0
        self.waiting: list[Tensor] = []  # on the device, until they are flushed
        self.wrong = ""  # what is said of the first row that is not finite
        self.kept: list[Tensor] | _File = []
        if folder is not None:
            self.kept = _File(Path(folder) / f"{name}.npy")

    def flush(self) -> None:
        """Move what waits to the CPU or the file. Raises ValueError for NaN; of several processes
        `agree` does, on all of them: one that ended alone would leave the others waiting."""
        if not self.waiting:
            return
        rows = torch.cat(self.waiting)
        self.waiting.clear()
        bad = ~rows.isfinite().all(1)
        if not self.wrong and bool(bad.any()):
            rank, world = process()
            number = (self.count + int(bad.int().argmax())) * world + rank
            self.wrong = (
                f"The {self.name} features hold NaN or infinite values, first in sample {number} "
                "of the loader's order. Look at that image; with float16 take bfloat16 or float32."
            )
            if world == 1:
                raise ValueError(self.wrong)
        self.count += len(rows)
        self.kept.append(rows.cpu())

    def finish(self, counts: list[int]) -> Tensor:
        """The rows of all processes, of which each has so many of `counts`."""
        return (
            joined(self.kept, counts) if isinstance(self.kept, list) else self.kept.finish(counts)
        )


def agree(count: int, wrong: str = "") -> list[int]:
    """The rows of each process. Raises ValueError on all of them where they are not every world-th
    row, or where one says what is `wrong` with its own."""
    world = world_size()
    both = [(count, wrong)]
    if world > 1:
        both *= world
        dist.all_gather_object(both, (count, wrong))
    counts = [rows for rows, _ in both]
    if found := next((sentence for _, sentence in both if sentence), None):
        raise ValueError(found)
    if not min(counts):
        whose = "The loader" if world == 1 else f"The loader of process {counts.index(0)}"
        raise ValueError(
            f"{whose} gave no images; expected at least one. Look for an "
            "empty folder or split, or drop_last=True with less than a batch."
        )
    if counts != [math.ceil((sum(counts) - rank) / world) for rank in range(world)]:
        raise ValueError(
            f"The processes have {counts} images; expected one in {world} of the data set each. "
            "Give DataLoader(shard(dataset), ...), of byol_pytorch.evaluation.features."
        )
    return counts


def joined(parts: list[Tensor], counts: list[int]) -> Tensor:
    """The rows of all processes, of this one's `parts`, which it empties."""
    mine, start = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:]), 0
    while parts:  # torch.cat would need the memory twice
        part = parts.pop(0)
        mine[start : start + len(part)] = part
        start += len(part)
    return mine if len(counts) == 1 else _gathered(mine, counts)


def _gathered(mine: Tensor, counts: list[int]) -> Tensor:
    world = len(counts)
    # NCCL alone takes no tensors of the CPU.
    gpu = "cpu:" not in str(dist.get_backend_config())
    where = torch.device("cuda", torch.cuda.current_device()) if gpu else mine.device
    whole = mine.new_empty(sum(counts), *mine.shape[1:])
    size = max(1, _BLOCK // max(1, mine[0].nbytes))
    for start in range(0, counts[0], size):
        block = mine[start : start + size].to(where)
        sent = block.new_zeros(min(size, counts[0] - start), *mine.shape[1:])
        sent[: len(block)] = block
        parts = [torch.empty_like(sent) for _ in counts]
        dist.all_gather(parts, sent)
        for rank, part in enumerate(parts):
            rows = whole[start * world + rank :: world][:size]
            rows.copy_(part[: len(rows)])
    return whole


class _File:
    """Rows (N, D) float32 in a .npy file that all processes write, on a disk that they share.

    It is NAME.npy.part until every row is there: what a killed run leaves does not look whole.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, path.with_name(path.name + ".part")
        self.count = self.width = 0
        self.rank, self.world = process()
        if self.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # another run's
            self.part.write_bytes(b"")
        self._wait()

    def append(self, rows: Tensor) -> None:
        array, self.width = rows.numpy(), rows.shape[1]
        together = len(array) if self.world == 1 else 1  # of several processes the rows alternate
        start, size = len(self._header(0)), array[0].nbytes
        with self.part.open("r+b") as file:
            for at in range(0, len(array), together):
                file.seek(start + size * ((self.count + at) * self.world + self.rank))
                file.write(array[at : at + together].data)
        self.count += len(array)

    def finish(self, counts: list[int]) -> Tensor:
        self._wait()
        if self.rank == 0:
            with self.part.open("r+b") as file:
                file.write(self._header(sum(counts)))
            self.part.replace(self.path)
        self._wait()
        # Copied where it is written to, so that the file stays as it is.
        return torch.from_numpy(np.load(self.path, mmap_mode="c"))

    def _header(self, count: int) -> bytes:
        # numpy leaves room for the number of rows, so that this is of one length.
        file = io.BytesIO()
        facts = {"descr": "<f4", "fortran_order": False, "shape": (count, self.width)}
        np.lib.format.write_array_header_1_0(file, facts)
        return file.getvalue()

    def _wait(self) -> None:
        if self.world > 1:
            dist.barrier()
