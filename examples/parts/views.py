"""The views of each batch of a pre-training run: two, and local ones behind them.

`plan` is imagenet_ddp.py's.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from byol_pytorch.augment import byol_views, local_views
from parts.batches import Bad, TrainingImages, make_loader, on_device, resident
from parts.order import Order, seed_of
from parts.sources import Source


class Views:
    """The batches and their views. A step's draws are those of its whole global batch, of which
    each rank takes its part: views differ between ranks and do not depend on how many there are.
    """

    def __init__(self, plan: Any, source: Source, normalisation: tuple[Any, Any]) -> None:
        self.plan, recipe, (mean, std) = plan, plan.recipe, normalisation
        self.data = TrainingImages(source, recipe.crops, plan.seed, plan.decode_size)
        how = {
            "crop": self.data.shape is not None,
            "mean": mean,
            "std": std,
            "channels_last": plan.channels_last,
            "compile": plan.compile or None,  # on a GPU the views compile in any case
        }
        self.pipelines = pipelines(recipe, **how)
        self.shapes = [self.data.shape or (size, size) for size, _ in recipe.crops]
        for view in self.pipelines:
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
            first = (self.plan.recipe.batch_size, 3)
            pairs = zip(self.pipelines, self.shapes, strict=True)
            return [view.forward_parameters(torch.Size((*first, *shape))) for view, shape in pairs]

    def make(self, images: list[Tensor], draws: list[Any], part: int) -> list[Tensor]:
        first = (self.plan.rank * self.plan.recipe.accumulate + part) * self.plan.images
        mine = slice(first, first + self.plan.images)
        each = images if len(images) > 1 else images * len(draws)
        return [
            view(some, params=view.take(params, mine))
            for view, some, params in zip(self.pipelines, each, draws, strict=True)
        ]


def pipelines(recipe: Any, **how: Any) -> list[Any]:
    """The two views of the recipe, then one pipeline for all its local views, as often as those.

    --view-args changes the two views; of those of a crop, a blur and solarize the local views have
    their own. Raises TypeError or ValueError for arguments that make no views.
    """
    pair = byol_views(recipe.image_size, recipe.views, **recipe.view_options, **how)
    if not recipe.local_views:
        return list(pair)
    own = ("scale", "ratio", "blur", "solarize")
    shared = {name: value for name, value in recipe.view_args.items() if name not in own}
    local = local_views(recipe.local_side, recipe.views, **shared, **how)
    return [*pair, *[local] * recipe.local_views]
