"""The training loop of detection and segmentation, under DDP and AMP: it goes on exactly where it
was stopped. The networks, their data and measures are the programs' own.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from byol_pytorch.heads import sync_batchnorm
from parts.batches import seed_of
from parts.flags import DTYPES
from parts.journal import Journal
from parts.processes import (
    asked_to_stop,
    fail,
    leave_signals_to_the_trainer,
    parallel,
    rank,
    world_size,
)
from parts.resume import identity, keep, saved, the_only_run

Rate = Callable[[int], float]  # the learning rate of a step
Figures = dict[str, float]


def autocast(args: argparse.Namespace) -> AbstractContextManager[Any]:
    kind, dtype = torch.device(args.device).type, DTYPES[args.dtype]
    return torch.autocast(kind, dtype, enabled=dtype is not torch.float32)


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
