"""What every program does about processes: join torchrun's, end with one sentence, share what one
of them has read, and leave a scheduler's signals to the process that saves.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


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


def parallel(net: nn.Module, args: argparse.Namespace) -> nn.Module:
    if world_size() == 1:
        return net
    ids = [torch.device(args.device).index] if args.device.startswith("cuda") else None
    # Synchronised batch norms have the same statistics everywhere.
    return DistributedDataParallel(net, device_ids=ids, broadcast_buffers=False)


def once(make: Callable[[], Any]) -> Any:
    """What `make` gives on rank 0, on every rank: one of them reads the folders, not all."""
    if not (dist.is_available() and dist.is_initialized()):
        return make()
    box = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def leave_signals_to_the_trainer(_: int) -> None:
    # A scheduler signals every process of a job: the trainer must find its workers alive to save.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def fail(sentence: str) -> NoReturn:
    """End this process with one sentence, which one process of each machine prints."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    raise SystemExit(f"{Path(sys.argv[0]).stem}: {sentence}" if first else 1)


def tell(text: str) -> None:
    """Print on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def asked_to_stop() -> list[int]:
    """The signals that came, of those by which schedulers announce the end."""
    came: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: came.append(number))
    return came
