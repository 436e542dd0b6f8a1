"""What the programs do about processes: join torchrun's, add up over them, share what one of them
has read, end with one sentence, and leave a scheduler's signals to the process that saves.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from byol_pytorch.parallel import process, world_size

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
INTERRUPTED = 130  # a shell's exit status after Ctrl-C
PASSED_ON = 1.0  # seconds in which torchrun passes on the Ctrl-C that the terminal sends to all


def join_processes(device: str) -> torch.device:
    """The device of this process; under torchrun, whose environment says which one this is, it
    joins the others."""
    try:
        own = torch.device(device)
    except RuntimeError:
        fail(f"--device {device} is no device of torch, such as cuda, cuda:1 or cpu.")
    if own.type == "cuda":
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", own.index or 0)))
        if own.index >= torch.cuda.device_count():
            fail(f"--device {device}: torch sees no CUDA device number {own.index}.")
        torch.cuda.set_device(own)
    if "RANK" in os.environ and not dist.is_initialized():
        # Long enough for rank 0 to list the files of a slow disk.
        backend = "nccl" if own.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return own


def leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return process()[0]


def summed(value: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def once(make: Callable[[], Any]) -> Any:
    """What `make` gives on rank 0, on every rank: one of them reads the folders, not all."""
    if world_size() == 1:
        return make()
    box = [make() if rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """The values of all processes, on each of them."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def parallel(net: nn.Module, device: torch.device, broadcast_buffers: bool = False) -> nn.Module:
    """`net` under DDP where there are several processes, whose synchronised batch norms have the
    same statistics without a broadcast."""
    if world_size() == 1:
        return net
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(
        net, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=broadcast_buffers
    )


def synchronised(model: Any, last: bool) -> AbstractContextManager[Any]:
    """Gradients are averaged over the processes in the last pass of a step alone."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(last)
    ddp = isinstance(model, DistributedDataParallel)
    return model.no_sync() if ddp and not last else nullcontext()


# Signals and sentences --------------------------------------------------------------------------


def asked_to_stop() -> list[int]:
    """The signals that came, of Ctrl-C and those by which schedulers announce the end; a second
    Ctrl-C ends the process at once."""
    came: list[int] = []
    first = math.inf

    def take(number: int, _: Any) -> None:
        nonlocal first
        now = time.monotonic()
        came.append(number)
        if number != signal.SIGINT:
            return
        if now - first > PASSED_ON:
            os._exit(INTERRUPTED)
        if first == math.inf and os.environ.get("LOCAL_RANK", "0") == "0":
            # Not by print, which may be at work already.
            os.write(2, b"\nstopping after this step; Ctrl-C again ends at once, without saving\n")
        first = min(first, now)

    for number in STOPPING:
        signal.signal(number, take)
    return came


@contextmanager
def until_asked_to_stop() -> Iterator[list[int]]:
    """The signals that come within; afterwards they do what they did before."""
    before = [signal.getsignal(number) for number in STOPPING]
    try:
        yield asked_to_stop()
    finally:
        for number, handler in zip(STOPPING, before, strict=True):
            signal.signal(number, handler)


def leave_after(came: list[int]) -> None:
    """End with a shell's exit status where Ctrl-C was among the signals."""
    if signal.SIGINT in came:
        raise SystemExit(INTERRUPTED)


def launch(main: Callable[[], None]) -> None:
    """Call a program; Ctrl-C where it does not save by itself ends it with one sentence."""
    try:
        main()
    except KeyboardInterrupt:
        tell(f"\n{Path(sys.argv[0]).stem}: stopped. What it has written so far is whole.")
        raise SystemExit(INTERRUPTED) from None


def leave_signals_to_the_trainer(_: int) -> None:
    # A terminal or scheduler signals every process of a job: the trainer must find its workers
    # alive to save.
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def tell(text: str) -> None:
    """Print on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def fail(sentence: str) -> NoReturn:
    """End this process with one sentence, which one process of each machine prints."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    raise SystemExit(f"{Path(sys.argv[0]).stem}: {sentence}" if first else 1)
