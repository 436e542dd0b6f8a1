"""Steps with gradients that are not finite: the ranks agree on them and take them back."""

from collections import defaultdict, deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parts.resume import Progress


class Verdicts:
    """What the ranks have to agree on after every step: were the gradients finite, is one of them
    asked to stop. The device has the answer at once; the host reads it when it is there anyway, on
    CUDA two steps later, and so never waits.
    """

    def __init__(self, device: torch.device, world: int) -> None:
        self.device, self.world = device, world
        self.lag = 2 if device.type == "cuda" else 0
        self.pending: deque[tuple[Tensor, Any]] = deque()

    def agree(self, norm: Tensor, stop: bool) -> Tensor:
        """1 on the device, where all ranks' gradients are finite, else 0."""
        bad = (~torch.isfinite(norm)).float()
        both = torch.stack([bad, torch.full_like(bad, float(stop))])
        if self.world > 1:
            dist.all_reduce(both, dist.ReduceOp.MAX)
        if self.device.type == "cuda":
            host = torch.empty(2, pin_memory=True).copy_(both, non_blocking=True)
            event = torch.cuda.current_stream().record_event()
            self.pending.append((host, event))
        else:
            self.pending.append((both, None))
        return 1 - both[0]

    def count(self, progress: Progress, all_of_them: bool) -> bool:
        """Count the skipped steps, of those far enough behind or of all: is one asked to stop?"""
        asked = False
        while len(self.pending) > (0 if all_of_them else self.lag):
            host, event = self.pending.popleft()
            if event is not None:
                event.synchronize()
            skipped, stop = host.tolist()
            progress.skipped += int(skipped)
            progress.streak = progress.streak + 1 if skipped else 0
            asked |= bool(stop)
        return asked


class Undo:
    """Takes an optimizer step back where its gradients were not finite, without asking the device
    whether they were. Costs one more copy of weights, optimizer state and BN statistics.
    """

    def __init__(self, learner: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.learner, self.optimizer = learner, optimizer
        self.saved: list[Tensor] = []

    @torch.no_grad()
    def remember(self) -> None:
        """Before the first forward pass, which moves BN statistics."""
        now = self._tensors()
        if len(self.saved) != len(now):
            self.saved = [torch.empty_like(t) for t in now]
        torch._foreach_copy_(self.saved, now)

    @torch.no_grad()
    def unless(self, keep: Tensor) -> None:
        """Leave everything as it is where `keep` is 1, else as it was remembered."""
        now = self._tensors()
        # State that the optimizer has just made was zero.
        saved = self.saved + [torch.zeros_like(t) for t in now[len(self.saved) :]]
        by_dtype = defaultdict(list)
        for live, old in zip(now, saved, strict=True):
            # As integers old + keep (live - old) is exact, and 0 x nan is no nan.
            pair = (bits(live), bits(old))
            by_dtype[pair[0].dtype].append(pair)
        for dtype, pairs in by_dtype.items():
            lives, olds = map(list, zip(*pairs, strict=True))
            torch._foreach_sub_(lives, olds)
            torch._foreach_mul_(lives, keep.to(dtype))
            torch._foreach_add_(lives, olds)

    def _tensors(self) -> list[Tensor]:
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = [
            value
            for p in trained
            for value in self.optimizer.state.get(p, {}).values()
            if isinstance(value, Tensor) and value.device == p.device
        ]
        every = [*trained, *self.learner.buffers(), *state]
        return [local(t.detach()) for t in every]


def bits(x: Tensor) -> Tensor:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.view(integers[x.element_size()]) if x.is_floating_point() else x


def local(x: Any) -> Tensor:
    """This rank's shard of a DTensor."""
    return x.to_local() if hasattr(x, "to_local") else x
