"""What lets a run be stopped at any moment: one run a folder, its state on disk, and the refusal of
a state that is of another run.
"""

import argparse
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from byol_pytorch import BYOL, checkpoint
from parts.processes import fail, rank

# Flags that may differ when a run goes on: where, how fast and how closely watched.
FREE = ("data", "output", "json", "workers", "device", "eval_every", "save_every", "log_every")


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


@dataclass
class Progress:
    """How far the run is; the checkpoint holds it."""

    step: int = 0
    skipped: int = 0  # steps whose gradients were not finite,
    streak: int = 0  # and how many of the last ones
    highest_std: float = 0.0
    alarmed: bool = False
    bad: dict[int, str] = field(default_factory=dict)  # images that could not be read


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


def identity(images: int, args: argparse.Namespace) -> dict[str, str]:
    """What a run that goes on must have in common with the one before."""
    flags = {name: str(value) for name, value in vars(args).items() if name not in FREE}
    return flags | {"training images": str(images)}


def keep(state: dict[str, Any], path: Path) -> None:
    """Write the state of a run on rank 0, whole or not at all."""
    if rank():
        return
    try:
        checkpoint.save(state, path)
    except OSError as error:
        fail(f"{path} cannot be written: {error}.")


def saved(path: Path, now: dict[str, str]) -> dict[str, Any] | None:
    """The state to go on from, where there is one; a run that differs from this one is refused."""
    if not path.exists():
        return None
    try:
        state = checkpoint.load(path)
        before = state["identity"]
    except (ValueError, OSError, KeyError) as error:
        fail(f"{path} is no state of this script: {error} Give another --output to start anew.")
    changed = [
        f"{name.replace('_', '-')} {before.get(name)} there and {now.get(name)} now"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if changed:
        fail(f"{path} is of another run: {'; '.join(changed)}. Give the same flags, or another "
             "--output.")  # fmt: skip
    return state
