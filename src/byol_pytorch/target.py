"""The EMA target: a frozen copy of the online backbone and projector, its update and schedule.

How the copy is made lives in representation.py, when it is updated in learner.py.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from byol_pytorch.representation import Representation, Source


def ema_decay(base: float, step: int, total_steps: int | None) -> float:
    """The decay of EMA update number `step` = 0, 1, ...

    Without `total_steps` it is `base`; with K of them it rises by a half cosine,
    1 - (1 - base) (cos(pi step / K) + 1) / 2, and stays at 1 from K on (paper, section 3.2).
    """
    if total_steps is None:
        return base
    progress = min(step / total_steps, 1.0)
    return 1 - (1 - base) * (math.cos(math.pi * progress) + 1) / 2


class Target(nn.Module):
    """The frozen copies `net`, read at `source`, and `projector`; both are taken over as they are.

    Parameters follow the online ones by EMA. Buffers are never averaged: the target's batch
    statistics come from its own forward passes, as in DeepMind's code; every other buffer keeps
    the value that it was copied with. Modules start in the modes of their originals and train
    with the learner, but dropout and stochastic depth are off unless `dropout`. Parameters
    narrower than float32 are rounded from a float32 copy (`float32` in the state_dict), because
    at a decay of 0.996 nine tenths of the entries of a bfloat16 EMA never change.
    """

    def __init__(
        self, net: nn.Module, projector: nn.Module, source: Source, *, dropout: bool = False
    ) -> None:
        super().__init__()
        self.net, self.projector, self.dropout = net, projector, dropout
        self._representation = Representation(net, source)
        self.float32 = nn.Module()
        self.requires_grad_(False)
        self._widen()
        self._quieten()

    def forward(self, view: Any) -> Tensor:
        """The projection (B, P) of a view that is as the network should see it."""
        return self.projector(self._representation(self.net, view))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copied or unpickled network comes without the hooks.
        self._representation = Representation(self.net, self._representation.source)

    def train(self, mode: bool = True) -> "Target":
        super().train(mode)
        self._quieten()
        return self

    def _quieten(self) -> None:
        # Not eval() for all: batch norm takes batch statistics in the paper's target, and some
        # networks cache functions of their parameters in evaluation mode, which EMA would outdate.
        for module in self.modules():
            if not self.dropout and _drops(module):
                module.training = False
                if isinstance(module, nn.Dropout):
                    module.p = 0.0  # fused attention reads it off its dropout, whatever its mode

    @torch.no_grad()
    def update(self, net: nn.Module, projector: nn.Module, decay: float) -> None:
        """Move each parameter p of the target to decay p + (1 - decay) online, in place."""
        target, online = self._pairs(net, projector)
        wide = [i for i, p in enumerate(target) if _is_float(p) and not _is_narrow(p)]
        narrow = [i for i, p in enumerate(target) if _is_narrow(p)]
        rest = [i for i, p in enumerate(target) if not _is_float(p)]
        if wide:
            torch._foreach_lerp_([target[i] for i in wide], [online[i] for i in wide], 1 - decay)
        if narrow:
            copies = self._float32_copies([target[i] for i in narrow])
            torch._foreach_mul_(copies, decay)
            torch._foreach_add_(copies, [online[i] for i in narrow], alpha=1 - decay)
            torch._foreach_copy_([target[i] for i in narrow], copies)
        if rest:
            torch._foreach_copy_([target[i] for i in rest], [online[i] for i in rest])

    def _pairs(self, net: nn.Module, projector: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        # Read at each call, and as local shards: FSDP swaps the parameters of a module.
        target: list[Tensor] = []
        online: list[Tensor] = []
        for copy, source in ((self.net, net), (self.projector, projector)):
            sources = dict(source.named_parameters())
            for name, parameter in copy.named_parameters():
                other = sources.get(name)
                if other is None or other.shape != parameter.shape:
                    came = "is gone" if other is None else f"has shape {tuple(other.shape)}"
                    raise RuntimeError(
                        f"The online parameter {name!r} {came}, the target's has shape "
                        f"{tuple(parameter.shape)}: the network or its heads changed after BYOL "
                        "was built. Call reset_moving_average() after such a change."
                    )
                target.append(_local(parameter))
                online.append(_local(other))
        return target, online

    def _float32_copies(self, narrow: list[Tensor]) -> list[Tensor]:
        copies = list(self.float32.buffers())
        if [c.shape for c in copies] != [p.shape for p in narrow]:  # just sharded, or replaced
            self._widen(narrow)
            copies = list(self.float32.buffers())
        return copies

    def _widen(self, narrow: Sequence[Tensor] | None = None) -> None:
        if narrow is None:
            narrow = [p for p in self.parameters() if _is_narrow(p)]
        self.float32 = nn.Module()
        for i, parameter in enumerate(narrow):
            self.float32.register_buffer(str(i), parameter.detach().float().clone())

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        before = list(self.float32.buffers())
        super()._apply(fn, recurse)
        narrow = [p for p in self.parameters() if _is_narrow(p)]
        if len(narrow) != len(before):
            self._widen(narrow)
        else:  # moved or cast: the copies move along, but stay float32
            for i, (copy, parameter) in enumerate(zip(before, narrow, strict=True)):
                self.float32.register_buffer(str(i), copy.to(parameter.device))
        return self


def _drops(module: nn.Module) -> bool:
    # Dropout by its own module, or by a rate that the module hands to functional dropout.
    kind = type(module).__name__.lower()
    return (
        "drop" in kind
        or kind == "stochasticdepth"
        or any("drop" in k and isinstance(v, float) and v > 0 for k, v in vars(module).items())
    )


def _is_float(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _is_narrow(x: Tensor) -> bool:
    return x.is_floating_point() and x.dtype.itemsize < 4


def _local(parameter: Tensor) -> Tensor:
    to_local = getattr(parameter, "to_local", None)
    return parameter.detach() if to_local is None else to_local().detach()
