"""Wrappers around networks and learners, and the processes that train together.

What torch.compile, DDP, FSDP2 and torch.distributed look like is known here alone.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn

REPLICATED = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def unwrapped(module: Any) -> Any:
    """The module inside all wrappers of DDP, DataParallel and torch.compile."""
    inner = uncompiled(unreplicated(module))
    return module if inner is module else unwrapped(inner)


def unreplicated(module: Any) -> Any:
    """The module inside DDP's or DataParallel's wrapper, or what was given."""
    return module.module if isinstance(module, REPLICATED) else module


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper, or the module itself."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.Module) else module


def is_learner(model: Any) -> bool:
    """Whether this is a BYOL learner, compiled or not: by its public face, not by its class."""
    return hasattr(model, "representation") and hasattr(model, "ddp_ignored")


def is_sharded(x: Any) -> bool:
    """Whether FSDP2 shards this module, or this tensor is one of its shards."""
    return hasattr(x, "unshard") or hasattr(x, "full_tensor")


def local(x: Any) -> Tensor:
    """This process's shard of a DTensor, any other tensor as it is."""
    if type(x) in (nn.Parameter, Tensor):  # most are, and asking them for to_local is slow
        return x
    to_local = getattr(x, "to_local", None)
    return x if to_local is None else to_local()


def process() -> tuple[int, int]:
    """Rank and number of the processes that train together; 0 and 1 without torch.distributed."""
    return dist.get_rank() if _together() else 0, world_size()


def world_size() -> int:
    """The number of processes that train together, 1 without torch.distributed."""
    return dist.get_world_size() if _together() else 1


def summed(x: Tensor) -> Tensor:
    """The sum of `x` over all processes; a graph of torch.compile can hold it."""
    return funcol.wait_tensor(funcol.all_reduce(x, "sum", _everyone()))


def gathered(x: Tensor) -> Tensor:
    """(world, N): the `x` (N,) of all processes; a graph of torch.compile can hold it."""
    gather = torch.ops._c10d_functional.all_gather_into_tensor
    return funcol.wait_tensor(gather(x[None], world_size(), _everyone().group_name))


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def _everyone() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group
