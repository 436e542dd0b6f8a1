"""What lets imagenet_ddp.py be stopped at any moment: the order of its images, its state, signals,
and steps taken back.

`plan` and `args` are imagenet_ddp.py's own.
"""

import argparse
import fcntl
import signal
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pretrain_data import Request, Source, fail
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import Sampler

from byol_pytorch import BYOL, checkpoint

SHARD_WINDOW = 2**16  # images of neighbouring shards that are shuffled together


@dataclass
class Progress:
    """How far the run is; the checkpoint holds it."""

    step: int = 0
    skipped: int = 0  # steps whose gradients were not finite,
    streak: int = 0  # and how many of the last ones
    highest_std: float = 0.0
    alarmed: bool = False
    bad: dict[int, str] = field(default_factory=dict)  # images that could not be read


@dataclass
class Order(Sampler[Request]):
    """What this rank reads from step `start` on.

    The global batch of a step is a function of the seed and the step; the ranks share it out in
    equal consecutive parts, and each goes through its part in `accumulate` passes. Images beyond
    the last whole batch of an epoch are left out of that epoch.
    """

    source: Source
    seed: int
    batch_size: int
    accumulate: int
    rank: int
    world: int
    start: int
    stop: int

    def __iter__(self) -> Iterator[Request]:
        steps, current = len(self.source) // self.batch_size, -1
        share = self.batch_size // self.world
        for step in range(self.start, self.stop):
            epoch, batch = divmod(step, steps)
            if epoch != current:
                current, order = epoch, epoch_order(self.source, self.seed, epoch)
            first = batch * self.batch_size + self.rank * share
            for images in order[first : first + share].reshape(self.accumulate, -1):
                yield Request(epoch, images)


def epoch_order(source: Source, seed: int, epoch: int) -> np.ndarray:
    """A random order of all images; of shards a random order of them, mixed over a window."""
    rng = np.random.default_rng((seed, epoch))
    if source.shard is None:
        return rng.permutation(len(source))
    place = rng.permutation(source.shard.max() + 1)
    order = np.argsort(place[source.shard], kind="stable")
    for first in range(0, len(order), SHARD_WINDOW):
        rng.shuffle(order[first : first + SHARD_WINDOW])
    return order


def seed_of(*numbers: int) -> int:
    """A seed of its own for these numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


# Stopping and going on ---------------------------------------------------------------------------


def asked_to_stop() -> list[int]:
    """The signals that came, of those by which schedulers announce the end."""
    came: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: came.append(number))
    return came


@contextmanager
def the_only_run(folder: Path, rank: int) -> Iterator[None]:
    """Make the folder and hold it: two runs in one would mix their checkpoints."""
    if rank:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        fail(f"--output {folder} cannot be written to: {error.strerror}.")
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            fail(f"another run is writing to --output {folder}.")
        except OSError:
            pass  # a disk without locks
        for left in folder.glob(".last.pt.*.tmp"):  # of a save that was killed
            left.unlink()
        yield


def read_checkpoint(path: Path, plan: Any) -> dict[str, Any] | None:
    """The state to go on from, if there is one; a run that differs from this one is refused."""
    try:
        state = checkpoint.load(path) if path.exists() else None
    except (ValueError, OSError) as error:
        fail(f"{error} Or start anew with another --output.")
    if plan.world > 1:
        steps: list[Any] = [None] * plan.world
        dist.all_gather_object(steps, state and state["progress"]["step"])
        if len(set(steps)) > 1:
            fail(f"the ranks see different files {path}: --output must be on a shared disk.")
    if state is None:
        return None
    before, now = state["identity"], plan.identity
    lines = [
        f"\n  {name.replace('_', '-')}: {before.get(name)} there, {now.get(name)} now"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if lines:
        fail(
            f"{path} is of another run, so it cannot go on:{''.join(lines)}\n"
            "Give the same flags, or another --output (from these weights: --init-from)."
        )
    return state


def restore(state: dict[str, Any], learner: BYOL, optimizer: Any, scaler: Any) -> Progress:
    own = learner.state_dict()
    learner.load_state_dict({k: sharded_like(own[k], v) for k, v in state["learner"].items()})
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in state["optimizer"]["state"].items():
        values |= {k: sharded_like(trained[number], v) for k, v in values.items()}
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    return Progress(**state["progress"])


def sharded_like(own: Any, value: Any) -> Any:
    if not isinstance(own, DTensor) or own.shape != getattr(value, "shape", None):
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)


def whole(value: Any) -> Any:
    """Sharded tensors gathered; every rank has to call it."""
    if isinstance(value, dict):
        return {k: whole(v) for k, v in value.items()}
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def save(
    progress: Progress, learner: BYOL, optimizer: Any, scaler: Any, plan: Any, args: Any
) -> OSError | None:
    """Write last.pt; every rank has to call it. What the disk said where it could not be written:
    then the one before is still there."""
    parts = optimizer.state_dict()
    state = {
        "identity": plan.identity,
        "layout": layout(plan, args),
        "progress": asdict(progress),
        "learner": dict(whole(learner.state_dict())),
        "optimizer": {**parts, "state": whole(parts["state"])},
        "scaler": scaler.state_dict(),
        "normalisation": learner.normalisation,
    }
    try:
        if plan.rank == 0:
            checkpoint.save(state, args.output / "last.pt")
    except OSError as error:
        return error
    return None


def layout(plan: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What may change from one start to the next."""
    passes = plan.identity["batch_size"] // (plan.world * plan.images)
    flags = ("compile", "fsdp", "channels_last", "sync_bn")
    known = {"processes": plan.world, "passes a step": passes, "device": plan.device.type}
    return known | {name: getattr(args, name) for name in flags}


def what_changed(state: dict[str, Any], plan: Any, args: argparse.Namespace) -> str:
    """A sentence on how a resumed run differs from the one before, where it does."""
    before, now = state["layout"], layout(plan, args)
    changes = [f"{k} {now[k]} instead of {before[k]}" for k in now if now[k] != before.get(k)]
    if not changes:
        return "goes on from last.pt"
    return (
        f"goes on from last.pt with {', '.join(changes)}: the same images in the same order, equal "
        "up to rounding and to how many images share a batch norm"
    )


# Steps with gradients that are not finite ------------------------------------------------------


class Verdicts:
    """What the ranks have to agree on after every step: were the gradients finite, is one of them
    asked to stop. The device has the answer at once; the host reads it when it is there anyway, on
    CUDA two steps later, and so never waits.
    """

    def __init__(self, device: torch.device, world: int) -> None:
        self.device, self.world = device, world
        self.lag = 2 if device.type == "cuda" else 0
        self.pending: deque[tuple[Tensor, Any]] = deque()

    def agree(self, norm: Tensor, stop: bool) -> Tensor:
        """1 on the device, where all ranks' gradients are finite, else 0."""
        bad = (~torch.isfinite(norm)).float()
        both = torch.stack([bad, torch.full_like(bad, float(stop))])
        if self.world > 1:
            dist.all_reduce(both, dist.ReduceOp.MAX)
        if self.device.type == "cuda":
            host = torch.empty(2, pin_memory=True).copy_(both, non_blocking=True)
            event = torch.cuda.current_stream().record_event()
            self.pending.append((host, event))
        else:
            self.pending.append((both, None))
        return 1 - both[0]

    def count(self, progress: Progress, all_of_them: bool) -> bool:
        """Count the skipped steps, of those far enough behind or of all: is one asked to stop?"""
        asked = False
        while len(self.pending) > (0 if all_of_them else self.lag):
            host, event = self.pending.popleft()
            if event is not None:
                event.synchronize()
            skipped, stop = host.tolist()
            progress.skipped += int(skipped)
            progress.streak = progress.streak + 1 if skipped else 0
            asked |= bool(stop)
        return asked


class Undo:
    """Takes an optimizer step back where its gradients were not finite, without asking the device
    whether they were. Costs one more copy of weights, optimizer state and BN statistics.
    """

    def __init__(self, learner: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.learner, self.optimizer = learner, optimizer
        self.saved: list[Tensor] = []

    @torch.no_grad()
    def remember(self) -> None:
        """Before the first forward pass, which moves BN statistics."""
        now = self._tensors()
        if len(self.saved) != len(now):
            self.saved = [torch.empty_like(t) for t in now]
        torch._foreach_copy_(self.saved, now)

    @torch.no_grad()
    def unless(self, keep: Tensor) -> None:
        """Leave everything as it is where `keep` is 1, else as it was remembered."""
        now = self._tensors()
        # State that the optimizer has just made was zero.
        saved = self.saved + [torch.zeros_like(t) for t in now[len(self.saved) :]]
        by_dtype = defaultdict(list)
        for live, old in zip(now, saved, strict=True):
            # As integers old + keep (live - old) is exact, and 0 x nan is no nan.
            pair = (bits(live), bits(old))
            by_dtype[pair[0].dtype].append(pair)
        for dtype, pairs in by_dtype.items():
            lives, olds = map(list, zip(*pairs, strict=True))
            torch._foreach_sub_(lives, olds)
            torch._foreach_mul_(lives, keep.to(dtype))
            torch._foreach_add_(lives, olds)

    def _tensors(self) -> list[Tensor]:
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = [
            value
            for p in trained
            for value in self.optimizer.state.get(p, {}).values()
            if isinstance(value, Tensor) and value.device == p.device
        ]
        every = [*trained, *self.learner.buffers(), *state]
        return [local(t.detach()) for t in every]


def bits(x: Tensor) -> Tensor:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.view(integers[x.element_size()]) if x.is_floating_point() else x


def local(x: Any) -> Tensor:
    """This rank's shard of a DTensor."""
    return x.to_local() if hasattr(x, "to_local") else x
