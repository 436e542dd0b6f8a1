"""What lets a run be stopped at any moment: one run a folder, its state in last.pt, and the refusal
of a state that is of another run.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from byol_pytorch import BYOL, checkpoint
from parts.processes import fail, gathered, rank

# Flags that may differ when a run goes on: where, how fast and how closely watched.
FREE = ("data", "output", "json", "workers", "device", "eval_every", "save_every", "log_every")


@contextmanager
def the_only_run(folder: Path) -> Iterator[None]:
    """Make the folder and hold it: two runs in one would mix their checkpoints."""
    if rank():
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


def read_state(path: Path, identity: dict[str, Any], hint: str = "") -> dict[str, Any] | None:
    """The state to go on from, if there is one; that of a run that differs from this one ends it.

    `identity` is what both must have in common, `hint` says what else can be done.
    """
    try:
        state = checkpoint.load(path) if path.exists() else None
    except (ValueError, OSError) as error:
        fail(f"{error} Or start anew with another --output.")
    # Nothing of it but how far the run is differs between two states of one run.
    names = ("progress", "step", "epoch", "history")
    if len(set(gathered(state and repr([state.get(name) for name in names])))) > 1:
        fail(f"the ranks see different files {path}: --output must be on a shared disk.")
    if state is None:
        return None
    before = state.get("identity")
    if not isinstance(before, dict):
        fail(f"{path} is no state of this script. Give another --output to start anew.")
    changed = [
        f"\n  {name.replace('_', '-')}: {before.get(name)} there, {identity.get(name)} now"
        for name in {**before, **identity}
        # Evaluations keep text: a flag that is newer than the state is no "None" there.
        if before.get(name) != identity.get(name)
        and str(before.get(name)) != str(identity.get(name))
    ]
    if changed:
        fail(
            f"{path} is of another run, so it cannot go on:{''.join(changed)}\n"
            f"Give the same flags, or another --output{hint}."
        )
    return state


# Evaluations ------------------------------------------------------------------------------------


@dataclass
class LastState:
    """OUTPUT/last.pt: the states of `parts`, such as a module or an optimizer, and some notes."""

    path: Path
    identity: dict[str, str]
    parts: dict[str, Any]

    def restore(self) -> dict[str, Any] | None:
        """Set the parts as an earlier run left them; its notes, None where there was none."""
        state = read_state(self.path, self.identity)
        for name, part in self.parts.items() if state else ():
            part.load_state_dict(state[name])
        return state

    def save(self, **notes: Any) -> None:
        """Write the file on rank 0, whole or not at all."""
        if rank():
            return
        states = {name: dict(part.state_dict()) for name, part in self.parts.items()}
        try:
            checkpoint.save({"identity": self.identity, **notes, **states}, self.path)
        except OSError as error:
            fail(f"{self.path} cannot be written: {error}.")


def identity(flags: dict[str, Any], images: int) -> dict[str, str]:
    """What an evaluation that goes on must have in common with the one before."""
    kept = {name: str(value) for name, value in flags.items() if name not in FREE}
    return kept | {"training images": str(images)}


# Pre-training, whose state may be sharded -------------------------------------------------------


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
class Run:
    """A pre-training run: what is trained, and how far it is. Every rank calls the methods."""

    learner: BYOL
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress = field(default_factory=Progress)

    def restore(self, state: dict[str, Any]) -> None:
        own = self.learner.state_dict()
        learner = {k: sharded_like(own[k], v) for k, v in state["learner"].items()}
        self.learner.load_state_dict(learner)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        for number, values in state["optimizer"]["state"].items():
            values |= {k: sharded_like(trained[number], v) for k, v in values.items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])

    def save(self, path: Path, identity: dict[str, Any], setup: dict[str, Any]) -> OSError | None:
        """What the disk said where it cannot be written: then the file before is still there."""
        parts = self.optimizer.state_dict()
        state = {
            "identity": identity,
            "layout": setup,
            "progress": asdict(self.progress),
            "learner": dict(whole(self.learner.state_dict())),
            "optimizer": {**parts, "state": whole(parts["state"])},
            "scaler": self.scaler.state_dict(),
            "normalisation": self.learner.normalisation,
        }
        try:
            if rank() == 0:
                checkpoint.save(state, path)
        except OSError as error:
            return error
        return None


def sharded_like(own: Any, value: Any) -> Any:
    if not isinstance(own, DTensor) or own.shape != getattr(value, "shape", None):
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)


def whole(value: Any) -> Any:
    """Sharded tensors gathered; every rank has to call it."""
    if isinstance(value, dict):
        return {k: whole(v) for k, v in value.items()}
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def what_changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """A sentence on how a resumed run differs from the one before in what may differ."""
    changes = [f"{k} {now[k]} instead of {before[k]}" for k in now if now[k] != before.get(k)]
    if not changes:
        return "goes on from last.pt"
    return (
        f"goes on from last.pt with {', '.join(changes)}: the same images in the same order, equal "
        "up to rounding and to how many images share a batch norm"
    )
