"""What the fine-tuning scripts share: torchrun's processes, flags of a published protocol, and a
training loop under DDP and AMP that goes on exactly where it was stopped.

The networks, their data and measures are the scripts' own.
"""

import argparse
import math
import os
import types
from collections.abc import Callable, Iterator, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
from evaluation_parts import DTYPES, check_common, common_flags, fail
from pretrain_data import leave_signals_to_the_trainer
from pretrain_state import asked_to_stop, seed_of, the_only_run
from pretrain_watch import Journal
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Sampler

from byol_pytorch import checkpoint
from byol_pytorch.heads import sync_batchnorm

# Flags that may differ when a run goes on: where, how fast and how closely watched.
FREE = ("data", "output", "json", "workers", "device", "eval_every", "save_every", "log_every")

Rate = Callable[[int], float]  # the learning rate of a step
Figures = dict[str, float]


# Flags ------------------------------------------------------------------------------------------


def protocol_parser(description: str, protocols: dict[str, Any]) -> argparse.ArgumentParser:
    """A parser with the common flags and one for every field of the protocols' dataclass."""
    parser = argparse.ArgumentParser(
        description=f"{description} The same command goes on where an earlier one was stopped.",
        conflict_handler="resolve",  # a protocol's flag goes before a common one
    )
    common_flags(parser)
    parser.set_defaults(workers=min(4, os.cpu_count() or 1))
    add = parser.add_argument
    add("--dtype", choices=DTYPES, default="fp32", help="of autocast; fp16 scales the loss")
    add("--classes", type=lambda names: names.split(","), help="their names, with commas between")
    add("--eval-every", type=int, default=2000, help="steps; the last one is always evaluated")
    add("--save-every", type=int, default=500, help="steps")
    add("--log-every", type=int, default=20, help="steps")
    add("--protocol", choices=protocols, default=next(iter(protocols)),
        help="what the flags below default to (default: %(default)s)")  # fmt: skip
    group = parser.add_argument_group("protocol", "published defaults, with their sources")
    add_flags(group, protocols)
    return parser


def add_flags(group: Any, protocols: dict[str, Any]) -> None:
    """One for every field of the protocols' dataclass; None where it is not given."""
    kind = type(next(iter(protocols.values())))
    hints = get_type_hints(kind)
    for f in fields(kind):
        values = {name: getattr(protocol, f.name) for name, protocol in protocols.items()}
        listed = ", ".join(f"{name} {shown(value)}" for name, value in values.items())
        text = f"{f.metadata['help']} (default: {listed})".replace("%", "%%")
        hint = hints[f.name]
        how: dict[str, Any] = {"type": hint}
        if hint is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif isinstance(hint, types.GenericAlias):  # tuple[int, ...]
            how = {"type": get_args(hint)[0], "nargs": "*" if () in values.values() else "+"}
        group.add_argument("--" + f.name.replace("_", "-"), default=None, help=text, **how)


def shown(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def parse(
    parser: argparse.ArgumentParser, protocols: dict[str, Any], argv: list[str] | None
) -> tuple[argparse.Namespace, set[str]]:
    """The flags, those of the protocol filled in, and the names of the protocol's that were given.

    Joins torchrun's processes; args.device is then this process' own.
    """
    args = parser.parse_args(argv)
    protocol, given = protocols[args.protocol], set()
    for f in fields(protocol):
        value = getattr(args, f.name)
        if value is None:
            setattr(args, f.name, getattr(protocol, f.name))
        else:
            given.add(f.name)
            setattr(args, f.name, tuple(value) if isinstance(value, list) else value)
    for name in ("iterations", "eval_every", "save_every", "log_every"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}; expected at least 1.")
    join_processes(args)
    check_common(args)
    if args.batch_size % world_size():
        fail(f"--batch-size {args.batch_size} does not divide by {world_size()} processes.")
    return args, given


# Processes --------------------------------------------------------------------------------------


def join_processes(args: argparse.Namespace) -> None:
    """One process each device under torchrun, whose environment says which this is."""
    local = os.environ.get("LOCAL_RANK")
    if local is not None and torch.device(args.device).type == "cuda":
        args.device = f"cuda:{local}"
        torch.cuda.set_device(args.device)
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "nccl" if args.device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def autocast(args: argparse.Namespace) -> AbstractContextManager[Any]:
    kind, dtype = torch.device(args.device).type, DTYPES[args.dtype]
    return torch.autocast(kind, dtype, enabled=dtype is not torch.float32)


# Batches ----------------------------------------------------------------------------------------


@dataclass
class Order(Sampler[list[tuple[int, int]]]):
    """For each step from `start` on, the (epoch, image) pairs of this rank's part of the batch.

    The images of an epoch are a permutation by (seed, epoch), and a batch may reach over its end:
    what a step sees depends neither on the number of ranks nor on where the run was stopped.
    """

    images: int
    args: argparse.Namespace
    start: int

    def __len__(self) -> int:
        return self.args.iterations - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share, current, order = self.args.batch_size // world_size(), -1, np.empty(0, int)
        for step in range(self.start, self.args.iterations):
            batch = []
            first = step * self.args.batch_size + rank() * share
            for position in range(first, first + share):
                epoch, place = divmod(position, self.images)
                if epoch != current:
                    rng = np.random.default_rng((self.args.seed, epoch))
                    current, order = epoch, rng.permutation(self.images)
                batch.append((epoch, int(order[place])))
            yield batch


def evaluation_loader(images: Dataset[Any], args: argparse.Namespace) -> DataLoader[Any]:
    """One image at a time, of this rank's share: every world_size()-th, none twice."""
    assert isinstance(images, Sized)
    mine = range(rank(), len(images), world_size())
    return DataLoader(images, 1, sampler=mine, num_workers=args.workers, collate_fn=lambda x: x[0])


def on_device(batch: Any, device: str) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: on_device(value, device) for name, value in batch.items()}
    return [on_device(value, device) for value in batch]


# The loop ---------------------------------------------------------------------------------------


def fine_tune(
    net: nn.Module,
    images: Dataset[Any],
    collate: Callable[[list[Any]], Any],
    rate: Rate,
    evaluate: Callable[[], Figures],
    args: argparse.Namespace,
) -> list[Figures]:
    """Train `net` for args.iterations steps of SGD; the figures of each evaluation, on rank 0.

    `net(*batch)` gives a dictionary of losses in training mode, `images[epoch, number]` a sample,
    `collate` a batch of several. `evaluate` is called on all ranks, with `net` in evaluation mode,
    and gives its figures on rank 0. OUTPUT/last.pt holds the state of the run.
    """
    assert isinstance(images, Sized)
    if world_size() > 1:
        sync_batchnorm(net)
    net.to(args.device)
    trained = [p for p in net.parameters() if p.requires_grad]
    # The norms decay too, as in MMDetection and MMSegmentation.
    optimizer = torch.optim.SGD(trained, 1.0, args.momentum, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=args.dtype == "fp16")
    stop, path = asked_to_stop(), args.output / "last.pt"
    with the_only_run(args.output, rank()):
        step, history = read(net, optimizer, scaler, len(images), args)
        journal = Journal(args.output, rank() == 0, step, args.iterations, args.batch_size)
        if step:
            journal.note(step, f"goes on from {path}")
        model = parallel(net.train(), args)
        loader = DataLoader(
            images, batch_sampler=Order(len(images), args, step), collate_fn=collate,
            num_workers=args.workers, pin_memory=args.device.startswith("cuda"),
            worker_init_fn=leave_signals_to_the_trainer,
        )  # fmt: skip
        losses: list[dict[str, Tensor]] = []
        for step, batch in enumerate(loader, step + 1):  # noqa: B020
            for group in optimizer.param_groups:
                group["lr"] = rate(step - 1)
            # Sampled regions, sizes and dropout: drawn anew, so that a resumed run draws the same.
            torch.manual_seed(seed_of(args.seed, rank(), step))
            with autocast(args):
                parts = model(*on_device(batch, args.device))
                loss = torch.stack(list(parts.values())).sum()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            journal.advance()
            losses.append({"loss": loss.detach()} | {k: v.detach() for k, v in parts.items()})

            last = step == args.iterations
            if step % args.log_every == 0 or last:
                journal.figures(step, mean_of(losses) | {"lr": rate(step - 1)})
                losses.clear()
            if step % args.eval_every == 0 or last:
                figures = evaluate_now(net, evaluate)
                journal.figures(step, figures)
                history.append({"step": step, **figures})
            halt = agreed(bool(stop), step, args)
            if step % args.save_every == 0 or last or halt:
                save(step, net, optimizer, scaler, history, len(images), args)
            if halt and not last:
                journal.note(step, "stopped as asked; the same command goes on from here")
                journal.close()
                raise SystemExit(0)
        journal.close()
    return history


def parallel(net: nn.Module, args: argparse.Namespace) -> nn.Module:
    if world_size() == 1:
        return net
    ids = [torch.device(args.device).index] if args.device.startswith("cuda") else None
    # Synchronised batch norms have the same statistics everywhere.
    return DistributedDataParallel(net, device_ids=ids, broadcast_buffers=False)


def mean_of(losses: list[dict[str, Tensor]]) -> Figures:
    """Over the steps and the ranks; ends the run where a loss is not finite."""
    names = list(losses[0])
    means = torch.stack([torch.stack([one[n].float() for one in losses]).mean() for n in names])
    if world_size() > 1:
        dist.all_reduce(means)
        means /= world_size()
    figures = dict(zip(names, means.tolist(), strict=True))
    if not math.isfinite(figures["loss"]):
        fail(f"the loss is {figures['loss']}: lower the learning rate, or give --dtype fp32.")
    return figures


@torch.inference_mode()
def evaluate_now(net: nn.Module, evaluate: Callable[[], Figures]) -> Figures:
    net.eval()
    figures = evaluate()
    net.train()
    return figures


def agreed(stop: bool, step: int, args: argparse.Namespace) -> bool:
    """Whether a rank was asked to stop; several ask each other where the log is written."""
    if world_size() == 1:
        return stop
    if step % args.log_every:
        return False
    asked = torch.tensor(float(stop), device=args.device)
    dist.all_reduce(asked)
    return bool(asked)


# Going on ---------------------------------------------------------------------------------------


def identity(images: int, args: argparse.Namespace) -> dict[str, str]:
    """What a run that goes on must have in common with the one before."""
    flags = {name: str(value) for name, value in vars(args).items() if name not in FREE}
    return flags | {"training images": str(images)}


def save(
    step: int, net: nn.Module, optimizer: Any, scaler: Any, history: list[Figures], images: int,
    args: argparse.Namespace,
) -> None:  # fmt: skip
    state = {
        "identity": identity(images, args),
        "step": step,
        "history": history,
        "model": dict(net.state_dict()),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }
    keep(state, args.output / "last.pt")


def read(
    net: nn.Module, optimizer: Any, scaler: Any, images: int, args: argparse.Namespace
) -> tuple[int, list[Figures]]:
    """The step to go on from and the evaluations before it; 0 and none without a last.pt."""
    state = saved(args.output / "last.pt", identity(images, args))
    if state is None:
        return 0, []
    net.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    return state["step"], state["history"]


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
