"""The projector and predictor MLPs, with batch norms that may span all processes.

The heads have those by themselves; a backbone's are the user's choice: sync_batchnorm(net).
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from byol_pytorch.inputs import tensors
from byol_pytorch.norms import KINDS, Synchronised
from byol_pytorch.parallel import world_size

Net = TypeVar("Net", bound=nn.Module)

# Where heads are born, whatever torch.set_default_dtype or `with torch.device(...)` say: the draws
# of a seed are then the same, and no weight is rounded to bfloat16 first. Callers move them.
_BORN: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}


def mlp(dim: int, out: int, hidden: int, sync: bool | None) -> nn.Sequential:
    """Linear with bias, BN, ReLU, Linear without bias: (B, dim) to (B, out).

    Source: paper, section 3.3; the biases as in DeepMind's code and MMSelfSup's NonLinearNeck.
    """
    return nn.Sequential(
        nn.Linear(dim, hidden, **_BORN),
        BatchNorm(hidden, sync=sync),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, out, bias=False, **_BORN),
    )


def simsiam_mlp(dim: int, out: int, hidden: int, sync: bool | None) -> nn.Sequential:
    """SimSiam's projector, three layers with a last BN without affine (arXiv 2011.10566, 3)."""
    return nn.Sequential(
        nn.Linear(dim, hidden, bias=False, **_BORN),
        BatchNorm(hidden, sync=sync),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, hidden, bias=False, **_BORN),
        BatchNorm(hidden, sync=sync),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, out, bias=False, **_BORN),
        BatchNorm(out, sync=sync, affine=False),
    )


def simplicial_embedding(
    dim: int, simplices: int, simplex_dim: int, temperature: float, sync: bool | None
) -> nn.Sequential:
    """Linear, BN and a softmax over each of `simplices` groups (arXiv 2204.00616)."""
    width = simplices * simplex_dim
    return nn.Sequential(
        nn.Linear(dim, width, **_BORN),
        BatchNorm(width, sync=sync),
        GroupSoftmax(simplices, temperature),
    )


class GroupSoftmax(nn.Module):
    """Softmax at a temperature over each of `groups` equal slices of the last axis."""

    def __init__(self, groups: int, temperature: float) -> None:
        super().__init__()
        self.groups, self.temperature = groups, temperature

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.unflatten(-1, (self.groups, -1)) / self.temperature
        return grouped.softmax(dim=-1).flatten(-2)


class BatchNorm(Synchronised, nn.BatchNorm1d):
    """The heads' batch norm, of any (B, C, ...), which may span all processes on CPU and CUDA.

    `sync`: None synchronises whenever several processes train, decided at each training forward;
    True does the same; False never does. nn.SyncBatchNorm refuses the CPU, waits for the device,
    and cannot be captured by torch.compile(fullgraph=True).
    """

    def __init__(self, dim: int, *, sync: bool | None, affine: bool = True) -> None:
        super().__init__(dim, affine=affine, **_BORN)
        self.sync = sync

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch norm of {tuple(input.shape)}; expected (B, C, ...).")


def check_batch(view: Any, heads: tuple[nn.Module, ...]) -> None:
    """Raise ValueError where training heads would normalise over a single image."""
    if tensors(view)[0].shape[0] > 1:
        return
    norms = [m for h in heads for m in h.modules() if isinstance(m, nn.BatchNorm1d) and m.training]
    if any(not (isinstance(m, Synchronised) and m.synchronises()) for m in norms):
        raise ValueError(
            "The batch holds 1 image, and the heads' batch normalisation needs at least 2 in "
            "training (over all processes where it is synchronised; "
            f"{world_size()} process(es) now). Give larger batches (DataLoader(drop_last=True)), "
            "or call learner.eval() for embeddings."
        )


def sync_batchnorm(net: Net) -> Net:
    """`net`, whose batch norms now take their training statistics over all processes; in place.

    For a backbone, before BYOL(net, ...), and before it is compiled or sharded. Weights, names,
    hooks, modes and memory formats stay, and a norm is still an instance of what it was, such as
    nn.BatchNorm2d. In evaluation mode, and in one process, it does what it did before.

    Serves nn.BatchNorm1d, 2d and 3d and timm's BatchNormAct2d with its activation. Raises TypeError
    for other subclasses, whose forward it does not know; nn.SyncBatchNorm stays as it is.
    """
    kinds = dict(KINDS)
    norms = [(name, m) for name, m in net.named_modules() if isinstance(m, _BatchNorm)]
    norms = [(name, m) for name, m in norms if not isinstance(m, Synchronised | nn.SyncBatchNorm)]
    if any(type(m) not in kinds for _, m in norms):  # timm takes a while to import
        from byol_pytorch.timm_norm import TIMM

        kinds |= TIMM
    for name, m in norms:
        if type(m) not in kinds:
            raise TypeError(
                f"{name or 'net'} is a {type(m).__name__}; expected nn.BatchNorm1d, 2d or 3d, or "
                "timm's BatchNormAct2d. Replace it by one of these (a lazy one becomes one in its "
                "first forward), or leave sync_batchnorm out."
            )
    for _, m in norms:
        m.__class__ = kinds[type(m)]
    return net
