"""Colour operations of the views, on planes: one (B, H, W) float tensor in [0, 1] a channel.

Planes instead of one (B, C, H, W) tensor let a compiler keep all of a pixel's channels in
registers from the crop to the normalisation. What is drawn, and when, is augment.py's business.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Planes = list[Tensor]
Operation = Callable[[Planes, Tensor], Planes]  # of planes and one factor a sample, (B, 1, 1)
Semantics = Literal["torchvision", "deepmind"]
HueMode = Literal["hsv", "yiq"]

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # torchvision's and kornia's numbering
GRAY = (0.2989, 0.5870, 0.1140)  # torchvision's and DeepMind's; kornia rounds the first to 0.299


def eager_on_cpu(tensor: Tensor) -> bool:
    """Whether looking at values is free here: no device to wait for, no graph to break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def change_some(
    planes: Planes, chosen: Tensor, change: Callable[..., Planes], *factors: Tensor
) -> Planes:
    """`change(planes, *factors)` for the chosen samples, each factor (B,) seen as (B, 1, 1).

    On a GPU or under a compiler all are computed and selected from, so that no shape depends on the
    draw; an eager CPU computes only the chosen ones.
    """
    factors = tuple(factor[:, None, None] for factor in factors)
    if not eager_on_cpu(chosen):
        changed = change(planes, *factors)
        mask = chosen[:, None, None]
        return [torch.where(mask, new, old) for new, old in zip(changed, planes, strict=True)]
    rows = [row for row, asked in enumerate(chosen.tolist()) if asked]
    if not rows:
        return planes
    if len(rows) == len(chosen):
        return change(planes, *factors)
    changed = change([plane[rows] for plane in planes], *(factor[rows] for factor in factors))
    at = torch.tensor(rows)
    return [old.index_copy(0, at, new) for old, new in zip(planes, changed, strict=True)]


def jitter(
    planes: Planes,
    chosen: Tensor,
    order: Tensor,
    factors: list[Tensor],
    operations: dict[int, Operation],
) -> Planes:
    """Colour jitter with an order of its own for each sample: `order` (B, 4) holds in column s the
    number of the operation done s-th, `factors[n]` (B,) the strength drawn for operation n."""
    if eager_on_cpu(order):
        for step in range(4):
            for number in set(order[:, step].tolist()) & operations.keys():
                turn = chosen & (order[:, step] == number)
                planes = change_some(planes, turn, operations[number], factors[number])
        return planes
    # Contrast needs a mean over the image. Everything before it, then it, then everything after it
    # is two passes over memory, where four steps that may each be contrast would be four.
    pointwise = [number for number in operations if number != CONTRAST]
    contrast_step = (order == CONTRAST).int().argmax(dim=1)
    for step in range(3):
        for number in pointwise:
            turn = chosen & (order[:, step] == number) & (contrast_step > step)
            planes = change_some(planes, turn, operations[number], factors[number])
    if CONTRAST in operations:
        planes = change_some(planes, chosen, operations[CONTRAST], factors[CONTRAST])
    for step in range(1, 4):
        for number in pointwise:
            turn = chosen & (order[:, step] == number) & (contrast_step < step)
            planes = change_some(planes, turn, operations[number], factors[number])
    return planes


def operations(semantics: Semantics, hue_mode: HueMode) -> dict[int, Operation]:
    """Number -> operation, each clipping its result to [0, 1]."""
    hue = shift_hue if hue_mode == "hsv" else rotate_hue
    if semantics == "deepmind":
        return dict(enumerate((add_brightness, scale_channel_contrast, scale_hsv_saturation, hue)))
    return dict(enumerate((scale_brightness, scale_contrast, scale_saturation, hue)))


def gray(planes: Planes) -> Tensor:
    """Luma of three planes, the plain mean of any other number."""
    if len(planes) != 3:
        return torch.stack(planes).mean(dim=0)
    red, green, blue = planes
    return torch.add(red * GRAY[0], green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])


def to_gray(planes: Planes) -> Planes:
    return [gray(planes)] * len(planes)


def solarize(planes: Planes, threshold: float) -> Planes:
    return [torch.where(plane < threshold, plane, 1 - plane) for plane in planes]


def scale_brightness(planes: Planes, factor: Tensor) -> Planes:
    return [(plane * factor).clamp_(0, 1) for plane in planes]


def add_brightness(planes: Planes, delta: Tensor) -> Planes:
    return [(plane + delta).clamp_(0, 1) for plane in planes]


def scale_contrast(planes: Planes, factor: Tensor) -> Planes:
    """Away from or towards the mean of the gray image."""
    return _blend(planes, gray(planes).mean(dim=(1, 2), keepdim=True), factor)


def scale_channel_contrast(planes: Planes, factor: Tensor) -> Planes:
    """Away from or towards each channel's own mean."""
    means = [plane.mean(dim=(1, 2), keepdim=True) for plane in planes]
    return [_blend([p], m, factor)[0] for p, m in zip(planes, means, strict=True)]


def scale_saturation(planes: Planes, factor: Tensor) -> Planes:
    """Away from or towards the gray image."""
    return _blend(planes, gray(planes), factor)


def scale_hsv_saturation(planes: Planes, factor: Tensor) -> Planes:
    """HSV's S times factor, S clipped to [0, 1]: hue and value keep still, so each channel moves
    along its distance to the maximum."""
    value = _maximum(planes)
    chroma = value - _minimum(planes)
    factor = torch.minimum(factor, value / chroma.clamp_min(1e-12))
    return [value - (value - plane) * factor for plane in planes]


def shift_hue(planes: Planes, turns: Tensor) -> Planes:
    """HSV's H moved by a part of the colour circle: exact, without a division or a branch.

    With maximum v, minimum m and chroma c = v - m, sixths of the circle as the unit, and D the
    distance of the hue from a channel's own (red 0, green 2, blue 4), the channel is v + c - D * c
    clipped to [m, v]. Red's D * c is v - 2m - r + g + b, on green's side where g > b; a distance x
    on a circle of 6c is 3c - ||x| - 3c|.
    """
    red, green, blue = planes
    value, minimum = _maximum(planes), _minimum(planes)
    chroma = value - minimum
    distance = torch.sub(value, minimum, alpha=2).sub_(red).add_(green).add_(blue)
    hue = torch.copysign(distance, green - blue)
    floor = torch.sub(value, chroma, alpha=2)
    shifted = []
    for own in (0, 2, 4):
        offset = (6 * turns - own + 3) % 6 - 3
        x = (chroma * offset).add_(hue).abs_().sub_(chroma, alpha=3).abs_()
        shifted.append(torch.clamp(x.add_(floor), minimum, value))
    return shifted


def rotate_hue(planes: Planes, turns: Tensor) -> Planes:
    """The chroma plane of YIQ rotated, as NVIDIA DALI does: linear and cheap. It keeps luma where
    HSV keeps maximum and minimum, so the two differ by about as much as either changes."""
    red, green, blue = planes
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    i = 0.5959 * red - 0.2746 * green - 0.3213 * blue
    q = 0.2115 * red - 0.5227 * green + 0.3112 * blue
    # HSV runs red, green, blue; in the I-Q plane that is clockwise.
    cos, sin = torch.cos(2 * math.pi * turns), torch.sin(2 * math.pi * turns)
    i, q = i * cos + q * sin, q * cos - i * sin
    rotated = [luma + a * i + b * q for a, b in ((0.956, 0.619), (-0.272, -0.647), (-1.106, 1.703))]
    return [plane.clamp_(0, 1) for plane in rotated]


def _blend(planes: Planes, other: Tensor, factor: Tensor) -> Planes:
    other = (1 - factor) * other
    return [(plane * factor).add_(other).clamp_(0, 1) for plane in planes]


def _maximum(planes: Planes) -> Tensor:
    red, green, blue = planes
    return torch.maximum(torch.maximum(red, green), blue)


def _minimum(planes: Planes) -> Tensor:
    red, green, blue = planes
    return torch.minimum(torch.minimum(red, green), blue)
