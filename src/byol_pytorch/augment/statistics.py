"""The mean and deviation of each channel, from one pass over a user's data."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def channel_statistics(batches: Iterable[Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of each channel over all pixels, for `mean=` and `std=` of BYOL and byol_views.

        mean, std = channel_statistics(loader)
        learner = BYOL(net, image_size, mean=mean, std=std)

    `batches` gives images (B, C, ...), uint8 in [0, 255] or float in [0, 1], or tuples of which
    they are the first, as the DataLoader of a labelled data set does. The figures are those of
    images in [0, 1], summed in float64 on the images' device. Some thousand images are enough.

    Raises TypeError for other types, ValueError where there is no image, where the channels
    differ from batch to batch, or where a channel is not finite or constant (its std would be 0).
    """
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        part = _by_channel(images)
        if count and len(part) != len(mean):
            raise ValueError(
                f"a batch has {len(part)} channels and those before it {len(mean)}. Expected one "
                "number; leave images of other kinds out."
            )
        pixels = part.shape[1]
        shift = part.mean(1) - mean
        # Chan's formula: sums of squares lose what differs where the mean is large.
        squares = squares + (part.var(1, correction=0) * pixels)
        squares = squares + shift**2 * (count * pixels / (count + pixels))
        mean = mean + shift * (pixels / (count + pixels))
        count += pixels
    if not count:
        raise ValueError("no batch has an image. Expected batches of (B, C, ...) images.")
    std = (squares / count).sqrt()
    for channel, deviation in enumerate(std.tolist()):
        if not deviation > 0:  # NaN too
            raise ValueError(
                f"channel {channel} has mean {mean[channel].item():.4g} and std {deviation:.4g}. "
                "Expected finite values that vary; leave the channel out, or mend its pixels."
            )
    return tuple(mean.tolist()), tuple(std.tolist())


def _by_channel(images: Any) -> Tensor:
    """(C, pixels) in float64."""
    if not isinstance(images, Tensor) or images.ndim < 3:
        came = type(images).__name__
        came = f"a {came} {tuple(images.shape)}" if isinstance(images, Tensor) else f"a {came}"
        raise TypeError(
            f"a batch is {came}. Expected images (B, C, ...), or a tuple that begins so."
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(
            f"images have dtype {images.dtype}. Expected uint8 in [0, 255] or float in [0, 1]. "
            "Divide by the largest value of your data."
        )
    full = 255.0 if images.dtype == torch.uint8 else 1.0
    return images.transpose(0, 1).flatten(1).double() / full
