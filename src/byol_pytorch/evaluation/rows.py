"""Rows of features as they come, in memory or in files, and those of all processes together."""

import io
import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from byol_pytorch.parallel import process

_BLOCK = 2**26  # bytes that one process sends at once


def agree(count: int) -> list[int]:
    """The rows of each process. Raises ValueError where they are not every world-th row."""
    world = process()[1]
    counts = [count]
    if world > 1:
        counts = [0] * world
        dist.all_gather_object(counts, count)
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


class Rows(Protocol):
    """Takes the rows of this process, and gives those of all: row i of process r is i world + r."""

    def add(self, rows: Tensor) -> None: ...

    def finish(self, counts: list[int]) -> Tensor: ...


class Memory:
    """Rows on the CPU."""

    def __init__(self, parts: list[Tensor] | None = None) -> None:
        self.parts = parts or []

    def add(self, rows: Tensor) -> None:
        self.parts.append(rows.cpu())

    def finish(self, counts: list[int]) -> Tensor:
        mine, start = self.parts[0].new_empty(counts[process()[0]], *self.parts[0].shape[1:]), 0
        while self.parts:  # torch.cat would need the memory twice
            part = self.parts.pop(0)
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


class Files:
    """Rows in a .npy file, to which all processes write, so that it has to be on a shared disk.

    It is NAME.npy.part until every row is there: what a killed run leaves does not look whole.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, path.with_name(path.name + ".part")
        self.rank, self.world = process()
        self.written = 0
        self.file: Any = None
        if self.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # another run's
            self.part.unlink(missing_ok=True)
            self.part.touch()
        if self.world > 1:
            dist.barrier()

    def add(self, rows: Tensor) -> None:
        array = rows.cpu().numpy()
        if self.file is None:
            self.shape, self.dtype = array.shape[1:], array.dtype
            self.start = len(self._header(0))
            self.bytes = array[0].nbytes
            self.file = self.part.open("r+b")
        blocks = [array] if self.world == 1 else array
        for block in blocks:
            row = self.written * self.world + self.rank
            self.file.seek(self.start + row * self.bytes)
            self.file.write(block.tobytes())
            self.written += len(array) if self.world == 1 else 1

    def finish(self, counts: list[int]) -> Tensor:
        self.file.close()
        if self.world > 1:
            dist.barrier()
        if self.rank == 0:
            with self.part.open("r+b") as file:
                file.write(self._header(sum(counts)))
            self.part.replace(self.path)
        if self.world > 1:
            dist.barrier()
        # Copied where it is written to, so that the file stays as it is.
        return torch.from_numpy(np.load(self.path, mmap_mode="c"))

    def _header(self, count: int) -> bytes:
        # numpy leaves room for the number of rows, so that this is of one length.
        file = io.BytesIO()
        facts = {"descr": self.dtype.str, "fortran_order": False, "shape": (count, *self.shape)}
        np.lib.format.write_array_header_1_0(file, facts)
        return file.getvalue()
