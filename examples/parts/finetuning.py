"""The training loop of detection and segmentation, under DDP and AMP: it goes on exactly where it
was stopped. The networks, their data and measures are the programs' own.
"""

import argparse
import math
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.utils import make_grid, save_image

from byol_pytorch import checkpoint
from byol_pytorch.evaluation.features import shard
from byol_pytorch.heads import sync_batchnorm
from parts.journal import Journal
from parts.machine import Machine
from parts.order import Order, seed_of
from parts.processes import (
    asked_to_stop,
    fail,
    leave_after,
    leave_signals_to_the_trainer,
    parallel,
    rank,
    summed,
    world_size,
)
from parts.resume import LastState, identity, the_only_run

Figures = dict[str, float]


def fine_tune(
    net: nn.Module,
    images: Dataset[Any],
    collate: Callable[[list[Any]], Any],
    rate: Callable[[int], float],
    evaluate: Callable[[], Figures],
    protocol: Any,
    machine: Machine,
    args: argparse.Namespace,
    kinds: np.ndarray | None = None,
) -> list[Figures]:
    """Train `net` by SGD for the steps of the protocol; the figures of each evaluation, on rank 0.

    `net(*batch)` gives a dictionary of losses in training mode, `images[epoch, number]` a sample,
    `collate` a batch of several, `rate` the learning rate of a step. `evaluate` is called on all
    ranks, with `net` in evaluation mode, and gives its figures on rank 0. Of the flags it takes
    --seed, --output and how often is evaluated, saved and logged; OUTPUT/last.pt holds the state.
    With `kinds`, one integer or bool an image, every two neighbours in a batch are of one kind.
    """
    assert isinstance(images, Sized)
    device = machine.device
    if world_size() > 1:
        sync_batchnorm(net)
    net.to(device)
    if args.test_only:
        return [{"step": load(net, args.test_only), **tested(net, evaluate)}]
    trained = [p for p in net.parameters() if p.requires_grad]
    # The norms decay too, as in MMDetection and MMSegmentation.
    optimizer = torch.optim.SGD(trained, 1.0, protocol.momentum, weight_decay=protocol.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=machine.dtype is torch.float16)
    parts = {"model": net, "optimizer": optimizer, "scaler": scaler}
    now = identity(vars(args), len(images))
    last_state, stop = LastState(args.output / "last.pt", now, parts), asked_to_stop()
    with the_only_run(args.output):
        state = last_state.restore() or {"step": 0, "history": []}
        step, history = state["step"], state["history"]
        journal = Journal(args.output, rank() == 0, step, protocol.iterations, protocol.batch_size)
        if step:
            journal.note(step, f"goes on from {last_state.path}")
        model = parallel(net.train(), device)
        order = Order(
            len(images),
            protocol.batch_size,
            args.seed,
            protocol.iterations,
            step,
            "join",
            kinds=kinds,
        )
        loader = DataLoader(
            images, batch_sampler=order, collate_fn=collate, num_workers=machine.workers,
            pin_memory=device.type == "cuda", worker_init_fn=leave_signals_to_the_trainer,
        )  # fmt: skip
        losses: list[dict[str, Tensor]] = []
        for step, batch in enumerate(loader, step + 1):  # noqa: B020
            for group in optimizer.param_groups:
                group["lr"] = rate(step - 1)
            # Sampled regions, sizes and dropout: drawn anew, so that a resumed run draws the same.
            torch.manual_seed(seed_of(args.seed, rank(), step))
            with machine.autocast():
                by_name = model(*moved(batch, device))
                loss = torch.stack(list(by_name.values())).sum()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            journal.advance()
            losses.append({"loss": loss.detach()} | {k: v.detach() for k, v in by_name.items()})

            last = step == protocol.iterations
            if step % args.log_every == 0 or last:
                journal.figures(step, mean_of(losses) | {"lr": rate(step - 1)})
                losses.clear()
            if step % args.eval_every == 0 or last:
                figures = tested(net, evaluate)
                journal.figures(step, figures)
                history.append({"step": step, **figures})
            # Several processes ask each other where the log is written.
            halt = bool(stop)
            if world_size() > 1:
                asked = step % args.log_every == 0
                halt = asked and bool(summed(torch.tensor(float(halt), device=device)))
            if step % args.save_every == 0 or last or halt:
                last_state.save(step=step, history=history)
            if halt and not last:
                journal.note(step, "stopped as asked; the same command goes on from here")
                journal.close()
                leave_after(stop)
                raise SystemExit(0)
        journal.close()
    return history


def load(net: nn.Module, path: Path) -> int:
    """Give `net` the weights of an earlier run's last.pt; after how many steps they were saved."""
    try:
        state = checkpoint.load(path)
        net.load_state_dict(state["model"])
        return int(state["step"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        fail(f"--test-only {path} is not last.pt of a run with these flags and data: {error}")


def tested(net: nn.Module, evaluate: Callable[[], Figures]) -> Figures:
    with torch.inference_mode():
        net.eval()
        figures = evaluate()
        net.train()
    return figures


def moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: moved(value, device) for name, value in batch.items()}
    return [moved(value, device) for value in batch]


def mean_of(losses: list[dict[str, Tensor]]) -> Figures:
    """Over the steps and the ranks; ends the run where a loss is not finite."""
    names = list(losses[0])
    means = torch.stack([torch.stack([one[n].float() for one in losses]).mean() for n in names])
    figures = dict(zip(names, (summed(means) / world_size()).tolist(), strict=True))
    if not math.isfinite(figures["loss"]):
        fail(f"the loss is {figures['loss']}: lower the learning rate, or give --dtype fp32.")
    return figures


def check_shares(batch_size: int) -> None:
    if batch_size % world_size():
        fail(f"--batch-size {batch_size} does not divide by {world_size()} processes.")


def one_by_one(images: Dataset[Any], machine: Machine) -> Any:
    """This process's share of the images, one at a time, none of them twice."""
    return machine.loader(shard(images), collate_fn=only_one)


def only_one(samples: list[Any]) -> Any:
    return samples[0]


def save_rows(rows: list[Tensor], path: Path) -> None:
    """A picture of rows (3, H, W) of any size, one below the other."""
    height, width = (max(row.shape[side] for row in rows) for side in (1, 2))
    padded = [F.pad(row, [0, width - row.shape[2], 0, height - row.shape[1]]) for row in rows]
    save_image(make_grid(padded, nrow=1), path)
