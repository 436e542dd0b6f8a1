"""Batch norms that take their training statistics over all processes, on CPU and CUDA.

Who has them is decided in heads.py; timm's, which is slow to import, is in timm_norm.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from byol_pytorch.parallel import gathered, summed, world_size


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


# What sync_batchnorm makes of torch's.
class SyncBatchNorm1d(Synchronised, nn.BatchNorm1d): ...


class SyncBatchNorm2d(Synchronised, nn.BatchNorm2d): ...


class SyncBatchNorm3d(Synchronised, nn.BatchNorm3d): ...


KINDS: dict[type[nn.Module], type[Synchronised]] = {
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
