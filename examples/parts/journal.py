"""A run's log: the terminal, log.jsonl, TensorBoard, and where the time of a step goes."""

import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

SHOWN_IMAGES, SHOWN_SIDE = 8, 128  # in views.png: images, and about the least side of one
SHOWN_FIGURES = ("loss", "lr", "data_ms", "views_ms", "step_ms")


class Journal:
    """Rank 0's terminal, `log.jsonl` and TensorBoard (where installed); silent on other ranks.

    A disk that is full costs lines of the log, never the run.
    """

    def __init__(self, folder: Path, active: bool, step: int, steps: int, batch: int) -> None:
        self.path, self.active, self.step, self.batch = folder / "log.jsonl", active, step, batch
        self.board: Any = None
        self.complained = False
        if not active:
            return
        self._forget_after(step)
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder), purge_step=step + 1)
        except ImportError:
            pass
        except OSError as error:
            self._complain(error)
        interval = 0.5 if sys.stderr.isatty() else 60
        self.bar = tqdm(
            total=steps * batch, initial=step * batch, unit=" images", unit_scale=True,
            mininterval=interval, dynamic_ncols=True, file=sys.stderr,
        )  # fmt: skip

    def advance(self) -> None:
        self.step += 1
        if self.active:
            self.bar.update(self.batch)

    def figures(self, step: int, values: dict[str, float]) -> None:
        """One line of the log and one point of each curve."""
        if not self.active:
            return
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._write({"step": step, **finite})
        shown = {k: f"{values[k]:.3g}" for k in SHOWN_FIGURES if k in values}
        if shown:
            self.bar.set_postfix(shown, refresh=False)
        for name, value in values.items():
            self._on_board("add_scalar", name, value, step)

    def note(self, step: int, sentence: str, **more: Any) -> None:
        """Something that a person should read."""
        if self.active:
            self._write({"step": step, "note": sentence, **more})
            self.tell(f"step {step}: {sentence}")

    def tell(self, sentence: str) -> None:
        if self.active:
            tqdm.write(sentence, file=sys.stderr)

    def views(self, one: Tensor, two: Tensor, normalisation: Any) -> None:
        """A picture of the first images' two views, one above the other."""
        if not self.active:
            return
        mean, std = (torch.tensor(v, device=one.device).view(3, 1, 1) for v in normalisation)
        some = torch.cat([one[:SHOWN_IMAGES], two[:SHOWN_IMAGES]]).float() * std + mean
        times = max(1, SHOWN_SIDE // some.shape[-1])  # small ones can be seen so
        some = some.repeat_interleave(times, 2).repeat_interleave(times, 3)
        picture = make_grid(some.clamp(0, 1).cpu(), nrow=min(SHOWN_IMAGES, len(one)))
        self._on_board("add_image", "views", picture, 0)
        try:
            save_image(picture, self.path.with_name("views.png"))
        except OSError as error:
            self._complain(error)

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self._on_board("close")

    def _write(self, line: dict[str, Any]) -> None:
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            self._complain(error)

    def _on_board(self, method: str, *arguments: Any) -> None:
        if self.board is None:
            return
        try:
            getattr(self.board, method)(*arguments)
        except Exception as error:  # of its writing thread, of whatever kind
            self.board = None
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        if not self.complained:
            tqdm.write(f"the log cannot be written, the run goes on: {error}", file=sys.stderr)
        self.complained = True

    def _forget_after(self, step: int) -> None:
        # A killed run was ahead of its last checkpoint, and may have left half a line.
        try:
            lines = self.path.read_text().splitlines() if self.path.exists() else []
        except OSError:
            return
        kept = [line for line in lines if step and 0 <= json_step(line) <= step]
        temporary = self.path.with_name(".log.jsonl")
        try:
            temporary.write_text("".join(f"{line}\n" for line in kept))
            os.replace(temporary, self.path)
        except OSError as error:
            self._complain(error)


def json_step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


class Clock:
    """Seconds by part of a step; on CUDA of the device's own time, except for the data wait."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float)
        self.events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if self.cuda and part != "data":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self.events.append((part, first, last))
        else:
            begun = time.perf_counter()
            yield
            self.seconds[part] += time.perf_counter() - begun

    def read(self, steps: int) -> dict[str, float]:
        """Milliseconds a step of every part, and steps a second, since the last reading."""
        if self.events:
            torch.cuda.synchronize()
        for part, first, last in self.events:
            self.seconds[part] += first.elapsed_time(last) / 1000
        elapsed, self.start = time.perf_counter() - self.start, time.perf_counter()
        result = {f"{part}_ms": 1000 * s / steps for part, s in self.seconds.items()}
        self.seconds.clear()
        self.events.clear()
        return result | {"steps_per_second": steps / elapsed}
