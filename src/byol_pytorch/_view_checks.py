"""Checks of the views' arguments, once, at the boundary. An error says what came, what was
expected and how to mend it.

Each function returns the value in the form that augment.py works with.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Statistics = Literal["auto"] | Sequence[float] | None
Name = TypeVar("Name", bound=str)


def images(value: Any, image_size: tuple[int, int] | None) -> None:
    """A batch of images; of the height and width `image_size` where that is given."""
    if not isinstance(value, Tensor) or value.ndim != 4:
        came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"images came as {came}. Expected a tensor (B, C, H, W); "
            "stack single images with torch.stack, or add the batch axis with images[None]."
        )
    if value.dtype != torch.uint8 and not value.is_floating_point():
        raise ValueError(
            f"images came as {value.dtype}. Expected uint8 in [0, 255] or float in [0, 1]; "
            "scale others to float, for 16 bits: images = images.float() / 65535."
        )
    if image_size is not None and tuple(value.shape[2:]) != image_size:
        raise ValueError(
            f"images came as {tuple(value.shape[2:])} with crop=False. Expected image_size="
            f"{image_size}; resize them, or leave the crop to the view with crop=True."
        )


def size(image_size: Any) -> tuple[int, int]:
    pair = (image_size, image_size) if isinstance(image_size, int) else image_size
    if (
        not isinstance(pair, Sequence)
        or len(pair) != 2
        or any(not isinstance(side, int) or isinstance(side, bool) or side < 1 for side in pair)
    ):
        raise ValueError(
            f"image_size={image_size!r}. Expected a positive int or (height, width) of two; "
            "for example 224 or (192, 256)."
        )
    return (pair[0], pair[1])


def within(name: str, value: float, high: float = math.inf) -> float:
    if not 0 <= value <= high:
        bound = f"a number in [0, {high:g}]" if high < math.inf else "a number of at least 0"
        raise ValueError(f"{name}={value!r}. Expected {bound}; 0 switches it off.")
    return value


def range(name: str, value: tuple[float, float]) -> tuple[float, float]:
    if len(value) != 2 or not 0 < value[0] <= value[1] < math.inf:
        raise ValueError(
            f"{name}={value!r}. Expected (low, high) with 0 < low <= high; "
            f"for one fixed value give it twice, {name}=(1.0, 1.0)."
        )
    return (value[0], value[1])


def one_of(name: str, value: Name, allowed: tuple[Name, ...]) -> Name:
    if value not in allowed:
        raise ValueError(
            f"{name}={value!r}. Expected one of {', '.join(map(repr, allowed))}; "
            "the docstring of ViewAugmentation says what they mean."
        )
    return value


def kernel(blur_kernel: int | str | None, image_size: tuple[int, int]) -> int:
    side = min(image_size)
    if blur_kernel in (None, "auto"):
        return 2 * int(side / 20) + 1  # DeepMind's: a radius of int(side / 10 / 2)
    if not isinstance(blur_kernel, int) or blur_kernel % 2 != 1 or not 0 < blur_kernel < 2 * side:
        raise ValueError(
            f"blur_kernel={blur_kernel!r} for views of {image_size}. Expected an odd int from 1 to "
            f"{2 * side - 1}; 'auto' takes a tenth of the shorter side, blur=0 switches it off."
        )
    return blur_kernel


def statistics(name: str, value: Statistics) -> Statistics:
    if value is None or value == "auto":
        return value
    numbers = value.tolist() if isinstance(value, Tensor) else value
    if (
        not isinstance(numbers, Sequence)
        or not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)
        or (name == "std" and min(numbers, default=0) <= 0)
    ):
        kind = "positive" if name == "std" else "finite"
        raise ValueError(
            f"{name}={value!r}. Expected {kind} numbers, one a channel, for images in [0, 1]; "
            "'auto', or None for no normalisation."
        )
    return tuple(float(number) for number in numbers)


def per_channel(
    name: str, given: Statistics, imagenet: Sequence[float], channels: int, neutral: float
) -> Sequence[float]:
    if given is None or (given == "auto" and channels != 3):
        return (neutral,) * channels
    values = imagenet if given == "auto" else given
    if len(values) != channels:
        raise ValueError(
            f"{name} has {len(values)} values, the images have {channels} channels. Expected one "
            f"value a channel; {name}=None leaves it out."
        )
    return [float(value) for value in values]
