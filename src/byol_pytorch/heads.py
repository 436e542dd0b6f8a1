"""The projector and predictor MLPs, and the batch normalisation that spans processes.

The heads have it by themselves; a backbone's is the user's choice: sync_batchnorm(net).
"""

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from byol_pytorch.inputs import tensors
from byol_pytorch.parallel import gathered, summed, world_size

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


class Synchronised(_BatchNorm):
    """Batch norm of (B, C, ...) whose training statistics may span all processes.

    `sync`: None synchronises whenever several processes train, decided at each training forward;
    True does the same; False never does. Ranks may hold different numbers of images, also none.
    """

    sync: bool | None = None

    def synchronises(self) -> bool:
        """Whether the next forward takes its statistics over all processes."""
        return self.training and self.sync is not False and world_size() > 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.synchronises():
            return super().forward(x)
        self._check_input_dim(x)
        y, mean, variance, count = _SyncNorm.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats and self.running_mean is not None:
            self._track(mean, variance * (count / (count - 1)))
        return y

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        # Without a momentum the mean over all batches, whose number stays on the device.
        part = 1 / self.num_batches_tracked.to(mean) if self.momentum is None else self.momentum
        self.running_mean.copy_(self.running_mean.to(mean).lerp(mean, part))
        self.running_var.copy_(self.running_var.to(mean).lerp(unbiased_variance, part))


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
    kinds = dict(_KINDS)
    norms = [(name, m) for name, m in net.named_modules() if isinstance(m, _BatchNorm)]
    norms = [(name, m) for name, m in norms if not isinstance(m, Synchronised | nn.SyncBatchNorm)]
    if any(type(m) not in kinds for _, m in norms):  # timm takes a while to import
        from byol_pytorch._timm_norm import TIMM

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


# What sync_batchnorm makes of torch's.
class SyncBatchNorm1d(Synchronised, nn.BatchNorm1d): ...


class SyncBatchNorm2d(Synchronised, nn.BatchNorm2d): ...


class SyncBatchNorm3d(Synchronised, nn.BatchNorm3d): ...


_KINDS: dict[type[nn.Module], type[Synchronised]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
}


class _SyncNorm(torch.autograd.Function):
    """x (B, C, ...) normalised over all processes; their mean, biased variance and count too.

    One all-gather in the forward and one all-reduce in the backward pass, which keeps x in its own
    dtype and three values a channel. Statistics are float32, or float64 of float64.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance, count = _joint_moments(x)
        weight_, bias_ = (None if p is None else p.to(mean) for p in (weight, bias))
        y = F.batch_norm(x, mean, variance, weight_, bias_, training=False, eps=eps)
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), count)
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, count = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight.to(mean)
        # In eager mode they move a third of the bytes of the formula below.
        kernels = x.is_cuda and x.numel() > 0 and not torch.compiler.is_compiling()
        if kernels:
            sums: Any = torch.batch_norm_backward_reduce(
                dy, x, mean, invstd, scale, True, False, False
            )
            sum_dy, sum_dy_centred = sums[:2]
        else:
            each = (-1,) + (1,) * (x.ndim - 2)  # broadcasts over images and positions
            centred = x - mean.view(each)
            sum_dy = dy.sum(_all_but_channels(x), dtype=mean.dtype)
            sum_dy_centred = (dy * centred).sum(_all_but_channels(x))
        dx = dweight = dbias = None
        if weight is not None:
            # Of this process alone: DDP and FSDP average the gradients of weights.
            dweight, dbias = (sum_dy_centred * invstd).to(weight), sum_dy.to(weight)
        if not ctx.needs_input_grad[0]:
            return None, dweight, dbias, None
        sum_dy, sum_dy_centred = summed(torch.cat((sum_dy, sum_dy_centred))).chunk(2)
        if kernels:
            dx = torch.batch_norm_backward_elemt(
                dy, x, mean, invstd, scale, sum_dy, sum_dy_centred, count.int().view(1)
            )
        else:
            slope = sum_dy_centred / count * invstd.square()
            dx = dy - (sum_dy / count).view(each) - centred * slope.view(each)
            dx = (dx * (invstd * scale).view(each)).to(x.dtype)
        return dx, dweight, dbias, None


def _joint_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), biased variance (C,) and count () of (B, C, ...) of all processes.

    Each process' own moments are gathered at once and merged by Chan's formula: no cancellation,
    and one message instead of the two that a sum and then centred squares take.
    """
    channels, dtype = x.shape[1], torch.promote_types(x.dtype, torch.float32)
    mean, variance = torch.zeros(2, channels, dtype=dtype, device=x.device)
    if x.numel() and torch.compiler.is_compiling():
        variance, mean = torch.var_mean(x.to(dtype), _all_but_channels(x), correction=0)
    elif x.numel():  # without a copy of x in float32; the zeros stay, they set the dtype
        mean, variance = torch.batch_norm_update_stats(x, mean, variance, 0.0)
    count = mean.new_full((1,), x.numel() // channels)
    moments = gathered(torch.cat((mean, variance, count)))
    means, variances, counts = moments.split((channels, channels, 1), dim=1)
    total = counts.sum()
    parts = counts / total
    mean = (parts * means).sum(0)
    return mean, (parts * (variances + (means - mean).square())).sum(0), total


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]
