"""What the tests of the views share: photographs, fixed draws, and the two ways to a view."""

import math
from collections.abc import Callable
from functools import cache

import skimage.data
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor

from byol_pytorch.augment import ViewAugmentation

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


def transform(view: ViewAugmentation, path: str) -> Callable[..., Tensor]:
    """As an eager CPU does it, or as a GPU and a compiler do."""
    if path == "eager":
        return view.transform
    return torch.compile(view.transform, fullgraph=True, backend="eager", dynamic=False)


def drawn(view: ViewAugmentation, images: Tensor, **fixed: object) -> dict[str, Tensor]:
    params = view.sample(images)
    for name, value in fixed.items():
        params[name] = torch.as_tensor(value).expand_as(params[name]).to(params[name].dtype)
    return params


def many(batch: int = 20_000, height: int = 240, width: int = 300) -> Tensor:
    """A batch to draw for that takes no memory."""
    return torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(batch, 3, height, width)


def close(rate: Tensor, expected: float, batch: int = 20_000) -> bool:
    return abs(rate.float().mean().item() - expected) <= 4.5 * math.sqrt(0.25 / batch) * (
        0 < expected < 1
    )
