"""How linear heads are trained, by published protocol; linear.py trains them."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from byol_pytorch.arguments import is_count, is_number
from byol_pytorch.optim import LARS, scaled_lr

Optimizer = Literal["sgd", "lars"]


@dataclass(frozen=True)
class Protocol:
    """How heads are trained. Raises ValueError for a setting out of its range."""

    epochs: int
    batch_size: int  # images of one step, over all processes
    base_lrs: tuple[float, ...]  # for 256 images; scaled linearly with the batch
    optimizer: Optimizer = "sgd"  # sgd has Nesterov's momentum
    momentum: float = 0.9
    weight_decay: float = 0.0
    milestones: tuple[int, ...] = ()  # epochs at which the rate falls to a tenth; none: half cosine
    by_epoch: bool = False  # the cosine moves once an epoch, not at each step
    batch_norm: bool = False  # per channel and without affine, before each head

    def __post_init__(self) -> None:
        if self.optimizer not in get_args(Optimizer):
            raise ValueError(
                f"optimizer={self.optimizer!r}; expected one of {get_args(Optimizer)}. Train heads "
                "with another one in a loop of your own, on stored features."
            )
        counts = (self.epochs, self.batch_size, len(self.base_lrs))
        numbers = (*self.base_lrs, self.weight_decay, self.momentum)
        within = all(is_number(x) and 0 <= x < math.inf for x in numbers) and self.momentum < 1
        if not all(map(is_count, counts)) or not within:
            raise ValueError(
                f"{self}; expected 1 or more epochs, images and rates, rates and weight_decay of "
                "0 or more, momentum in [0, 1). Change one by dataclasses.replace(protocol, ...)."
            )

    @property
    def lrs(self) -> tuple[float, ...]:
        """The learning rates themselves."""
        return tuple(scaled_lr(lr, self.batch_size) for lr in self.base_lrs)

    def factor(self, epoch: float) -> float:
        """What the learning rates are multiplied by after `epoch` epochs, parts of one counted."""
        if self.milestones:
            return float(0.1 ** sum(epoch >= at for at in self.milestones))
        done = math.floor(epoch) if self.by_epoch else epoch
        return (1 + math.cos(math.pi * done / self.epochs)) / 2

    def new_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over parameter groups that each have a learning rate."""
        momentum, decay = self.momentum, self.weight_decay
        if self.optimizer == "lars":
            return LARS(groups, 0.0, momentum, decay)
        # On CUDA torch chooses well by itself; on a CPU it would go over the weights four times.
        fused = groups[0]["params"][0].device.type == "cpu" or None
        return torch.optim.SGD(
            groups, momentum=momentum, weight_decay=decay, nesterov=momentum > 0, fused=fused
        )


# arXiv 2006.07733, appendix C.1, with the one rate of byol/configs/eval.py of DeepMind's code;
# the paper chooses among PAPER_LRS by 10009 held-out training images. Crop and flip alone.
PAPER = Protocol(epochs=80, batch_size=1024, base_lrs=(0.2,))
PAPER_LRS = (0.4, 0.3, 0.2, 0.1, 0.05)
# github.com/open-mmlab/mmselfsup, configs/benchmarks/classification: imagenet/
# resnet50_linear-8xb512-coslr-90e_in1k (SimSiam's protocol): lr 1.6 at 4096 images, the bias
# adapted too. Its LARS takes the rate into the momentum, this one (optim.LARS) multiplies after.
MMSELFSUP_LINEAR = Protocol(90, 4096, base_lrs=(0.1,), optimizer="lars", by_epoch=True)
# The same place: imagenet/resnet50_mhead_linear-8xb32-steplr-90e_in1k, places205/
# resnet50_mhead_8xb32-steplr-28e_places205, inaturalist2018/resnet50_mhead_8xb32-steplr-84e_inat18.
# All of branch 0.x, which measured the published figures: in 1.x the first has no feature1, and
# inherits the milestones 60 and 80.
MULTI_HEAD = Protocol(90, 256, (0.01,), weight_decay=1e-4, milestones=(30, 60), batch_norm=True)
PLACES205 = replace(MULTI_HEAD, epochs=28, milestones=(7, 14, 21))
INATURALIST = replace(MULTI_HEAD, epochs=84, milestones=(24, 48, 72))
