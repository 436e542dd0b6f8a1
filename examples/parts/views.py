"""The two views of each batch of a pre-training run.

`plan` is imagenet_ddp.py's.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from byol_pytorch.augment import byol_views
from parts.batches import Bad, TrainingImages, make_loader, on_device, resident
from parts.order import Order, seed_of
from parts.sources import Source


class Views:
    """The batches and their two views. A step's draws are those of its whole global batch, of which
    each rank takes its part: views differ between ranks and do not depend on how many there are.
    """

    def __init__(self, plan: Any, source: Source, normalisation: tuple[Any, Any]) -> None:
        self.plan, recipe, (mean, std) = plan, plan.recipe, normalisation
        self.data = TrainingImages(
            source, recipe.image_size, plan.seed, plan.decode_size, recipe.crop
        )
        self.shape = self.data.shape or (recipe.image_size, recipe.image_size)
        self.pair = byol_views(
            recipe.image_size,
            recipe.views,
            crop=self.data.shape is not None,
            mean=mean,
            std=std,
            channels_last=plan.channels_last,
            compile=plan.compile or None,  # on a GPU the views compile in any case
            **recipe.view_args,
        )
        for view in self.pair:
            view.to(plan.device)

    def batches(self, start: int) -> Iterator[tuple[list[Tensor], list[Bad]]]:
        plan, device = self.plan, self.plan.device
        order = Order(
            len(self.data.source), plan.recipe.batch_size, plan.seed, plan.steps, start,
            passes=plan.recipe.accumulate, shard=self.data.source.shard, rank=plan.rank,
            world=plan.world,
        )  # fmt: skip
        kept = resident(self.data, device)
        if kept is None:
            yield from on_device(make_loader(self.data, order, plan.workers, device), device)
            return
        for wanted in order:
            numbers = torch.from_numpy(wanted[:, 1])
            if device.type == "cuda":  # from pinned memory a copy does not wait for the device
                numbers = numbers.pin_memory().to(device, non_blocking=True)
            yield [kept[numbers]], []

    def draw(self, step: int) -> list[Any]:
        devices = [self.plan.device] if self.plan.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed_of(self.plan.seed, 2, step))
            shape = torch.Size((self.plan.recipe.batch_size, 3, *self.shape))
            return [view.forward_parameters(shape) for view in self.pair]

    def make(self, images: list[Tensor], draws: list[Any], part: int) -> list[Tensor]:
        first = (self.plan.rank * self.plan.recipe.accumulate + part) * self.plan.images
        mine = slice(first, first + self.plan.images)
        sides = (images[0], images[-1])
        return [
            view(some, params=view.take(params, mine))
            for view, some, params in zip(self.pair, sides, draws, strict=True)
        ]
