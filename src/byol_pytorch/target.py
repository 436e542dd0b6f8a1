"""The EMA target: a frozen copy of the online backbone and projector, its update and schedule.

The room backbone makes the copy; learner.py says when it is updated.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from byol_pytorch.arguments import is_count, is_number
from byol_pytorch.backbone import Place, Representation
from byol_pytorch.parallel import local


def ema_decay(base: float, step: int, total_steps: int | None) -> float:
    """The decay of EMA update number `step` = 0, 1, ...

    Without `total_steps` it is `base`; with K of them it rises by a half cosine,
    1 - (1 - base) (cos(pi step / K) + 1) / 2, and stays at 1 from K on (paper, section 3.2).
    """
    if total_steps is None:
        return base
    progress = min(step / total_steps, 1.0)
    return 1 - (1 - base) * (math.cos(math.pi * progress) + 1) / 2


def check_decay(decay: Any, total_steps: Any) -> None:
    """Raise ValueError unless the decay is in [0, 1] and total_steps None or at least 1."""
    if not is_number(decay) or not 0 <= decay <= 1:
        raise ValueError(
            f"moving_average_decay={decay!r}; expected a number in [0, 1], for example 0.996."
        )
    if total_steps is not None and not is_count(total_steps):
        raise ValueError(
            f"total_steps={total_steps!r}; expected the number of optimizer steps of the whole "
            "run, at least 1, or None for a constant decay."
        )


class Target(nn.Module):
    """The frozen copies `net`, read at `place`, and `projector`; both are taken over as they are.

    Parameters follow the online ones by EMA. Buffers are never averaged: the target's batch
    statistics come from its own forward passes, as in DeepMind's code; every other buffer keeps
    the value that it was copied with. Modules start in the modes of their originals and train
    with the learner, but dropout and stochastic depth are off unless `dropout`: each module with
    such a name or rate, and each that `drawing` names in `net`, stays in evaluation mode.
    Parameters narrower than float32 are rounded from a float32 copy (`float32` in the
    state_dict), because at a decay of 0.996 nine tenths of the entries of a bfloat16 EMA never
    change.
    """

    def __init__(
        self,
        net: nn.Module,
        projector: nn.Module,
        place: Place,
        *,
        dropout: bool = False,
        drawing: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.net, self.projector, self.dropout, self.drawing = net, projector, dropout, drawing
        self._representation = Representation(net, place)
        self.float32 = nn.Module()
        self.requires_grad_(False)
        self._float32_copies([p for p in self.parameters() if _is_narrow(p)])
        self._quieten()

    def forward(self, view: Any) -> Tensor:
        """The projection (B, P) of a view that is as the network should see it."""
        return self.projector(self._representation(self.net, view))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copied or unpickled network comes without the hooks.
        self._representation = Representation(self.net, self._representation.place)

    def train(self, mode: bool = True) -> "Target":
        super().train(mode)
        self._quieten()
        return self

    def _quieten(self) -> None:
        # Not eval() for all: batch norm takes batch statistics in the paper's target, and some
        # networks cache functions of their parameters in evaluation mode, which EMA would outdate.
        drawing = [m for name, m in self.net.named_modules() if name in self.drawing]
        for module in self.modules():
            if not self.dropout and (_drops(module) or module in drawing):
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
        """The target's parameters, in their order, and the online ones of the same names.

        Read at each call, and as local shards: FSDP swaps the parameters of a module. Raises
        RuntimeError where an online parameter is gone, or has another shape.
        """
        pairs: dict[int, tuple[Tensor, Tensor]] = {}
        seen: set[nn.Module] = set()
        # Down both trees at once: a tenth of a millisecond for a ResNet-18, a fifth of what
        # named_parameters() takes.
        todo: list[tuple[str, nn.Module, nn.Module | None]]
        todo = [("", self.projector, projector), ("", self.net, net)]
        while todo:
            path, copy, original = todo.pop()
            if copy in seen:
                continue
            seen.add(copy)
            parameters = {} if original is None else original._parameters
            children = {} if original is None else original._modules
            for name, parameter in copy._parameters.items():
                if parameter is None or id(parameter) in pairs:
                    continue
                online = parameters.get(name)
                if online is None or online.shape != parameter.shape:
                    came = "is gone" if online is None else f"has shape {tuple(online.shape)}"
                    raise RuntimeError(
                        f"The online parameter {path + name!r} {came}, the target's has shape "
                        f"{tuple(parameter.shape)}: the network or its heads changed after BYOL "
                        "was built. Call reset_moving_average() after such a change."
                    )
                pairs[id(parameter)] = (local(parameter), local(online))
            for name, child in reversed(copy._modules.items()):
                if child is not None:
                    todo.append((f"{path}{name}.", child, children.get(name)))
        return [mine for mine, _ in pairs.values()], [its for _, its in pairs.values()]

    def _float32_copies(self, narrow: Sequence[Tensor]) -> list[Tensor]:
        copies = list(self.float32.buffers())
        if [c.shape for c in copies] == [p.shape for p in narrow]:
            return copies
        # New, just sharded, or replaced. Made under inference_mode they could not be updated.
        with torch.inference_mode(False):
            return self._keep([parameter.detach().float().clone() for parameter in narrow])

    def _keep(self, copies: list[Tensor]) -> list[Tensor]:
        self.float32 = nn.Module()
        for i, copy in enumerate(copies):
            self.float32.register_buffer(str(i), copy)
        return copies

    @torch.no_grad()
    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # Moved or cast: what is narrow now has a float32 copy of the value as it was before, and
        # what was narrow takes its value from the copy.
        before = [local(p).detach() for p in self.parameters()]
        narrow = [i for i, p in enumerate(before) if _is_narrow(p)]
        for i, copy in zip(narrow, self._float32_copies([before[i] for i in narrow]), strict=True):
            before[i] = copy
        super()._apply(fn, recurse)
        copies = []
        for i, parameter in enumerate(map(local, self.parameters())):
            if _is_narrow(parameter):
                meta = before[i].is_meta  # to_empty(): there is no value to keep
                value = parameter if meta else before[i]
                copies.append(value.to(parameter.device, torch.float32))
            elif i in narrow and not before[i].is_meta:
                parameter.copy_(before[i])
        self._keep(copies)
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
