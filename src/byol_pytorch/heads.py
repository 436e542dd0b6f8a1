"""The projector and predictor MLPs, and the batch normalisation that they share across processes.

The backbone's own normalisation is the user's and is never touched here.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn

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


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d on (B, D) whose training statistics may span all processes, on CPU and GPU.

    `sync`: None synchronises whenever several processes train, decided at each training forward;
    True does the same; False never does. Ranks may hold different numbers of rows.
    nn.SyncBatchNorm refuses the CPU and cannot be captured by torch.compile(fullgraph=True).
    """

    def __init__(self, dim: int, *, sync: bool | None, affine: bool = True) -> None:
        super().__init__(dim, affine=affine, **_BORN)
        self.sync = sync

    def synchronises(self) -> bool:
        """Whether the next forward takes its statistics over all processes."""
        return self.training and self.sync is not False and world_size() > 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.synchronises():
            return super().forward(x)
        rows = x.float()
        # Two small reductions rather than one of (sum, sum of squares): no cancellation.
        total = all_reduce(torch.cat((rows.sum(0), rows.new_full((1,), rows.shape[0]))))
        count = total[-1]
        mean = total[:-1] / count
        centred = rows - mean
        variance = all_reduce(centred.square().sum(0)) / count
        self._track(mean.detach(), variance.detach() * count.detach() / (count.detach() - 1))
        normalised = centred * (variance + self.eps).rsqrt()
        if self.affine:
            normalised = normalised * self.weight.float() + self.bias.float()
        return normalised.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
        self.running_var.lerp_(unbiased_variance.to(self.running_var), self.momentum)


def world_size() -> int:
    """The number of training processes, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce(x: Tensor) -> Tensor:
    """The differentiable sum of `x` over all processes."""
    return _AllReduce.apply(x)


class _AllReduce(torch.autograd.Function):
    # Each process' loss depends on the sum, so the gradient of a summand is the sum of gradients.
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return _sum(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return _sum(gradient)


def _sum(x: Tensor) -> Tensor:
    group = dist.group.WORLD
    assert group is not None
    return funcol.wait_tensor(funcol.all_reduce(x.contiguous(), "sum", group))
