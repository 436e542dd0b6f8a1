"""What the tests of the views share: photographs, fixed draws, and the two ways to a view."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import skimage.data
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor

from byol_pytorch.augment import byol_views

BARE = {"flip": 0, "jitter": 0, "grayscale": 0, "blur": 0, "mean": None, "std": None}
STILL = {**BARE, "crop": False}
JITTER = ("brightness", "contrast", "saturation", "hue")
PATHS = ("eager", "traced")


@cache
def photographs(height: int = 240, width: int = 300) -> Tensor:
    """(4, 3, height, width) uint8."""
    names = ("astronaut", "chelsea", "coffee", "rocket")
    pictures = [torch.from_numpy(getattr(skimage.data, name)()) for name in names]
    return torch.stack([TF.center_crop(p.permute(2, 0, 1), [height, width]) for p in pictures])


def small_photographs(height: int, width: int) -> Tensor:
    return TF.resize(photographs(), [height, width], antialias=True)


def one_view(image_size: int | tuple[int, int], preset: str = "imagenet", **settings: Any) -> Any:
    return byol_views(image_size, preset, **settings)[0]


def by(view: Any, path: str) -> Callable[..., Tensor]:
    """The view as an eager CPU computes it, or as a GPU and a compiler do."""
    if path == "eager":
        return view
    return torch.compile(view, fullgraph=True, backend="eager", dynamic=False)


def of(params: list[Any], kind: str) -> dict[str, Tensor]:
    """The draws of the stage with the class name `kind`."""
    return next(item.data for item in params if item.name.startswith(kind))


def boxes(params: list[Any]) -> Tensor:
    """(B, 4): top, left, height and width of the crops."""
    corners = of(params, "RandomResizedCrop")["src"]
    (left, top), (right, bottom) = corners[:, 0].T, corners[:, 2].T
    return torch.stack((top, left, bottom - top + 1, right - left + 1), dim=1).long()


def drew(params: list[Any], kind: str) -> Tensor:
    """(B,) bool: the images that drew the stage."""
    return of(params, kind)["batch_prob"] > 0.5


def fix(params: list[Any], kind: str, **values: Any) -> list[Any]:
    """The draws with some of one stage's set to values for each image or for all."""
    draws = of(params, kind)
    for name, value in values.items():
        value = torch.as_tensor(value, dtype=draws[name].dtype)
        draws[name] = value.expand_as(draws[name]).clone()
    return params


def many(batch: int = 20_000, height: int = 240, width: int = 300) -> tuple[int, ...]:
    """The shape of a large batch to draw for."""
    return (batch, 3, height, width)


def close(rate: Tensor, expected: float, batch: int = 20_000) -> bool:
    return abs(rate.float().mean().item() - expected) <= 4.5 * math.sqrt(0.25 / batch) * (
        0 < expected < 1
    )
