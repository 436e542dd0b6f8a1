"""How the scripts build a backbone from timm's name of it. Files of weights are read elsewhere."""

from typing import Any

import timm
from torch import nn


def timm_model(name: str, image_size: int | None, options: dict[str, Any]) -> nn.Module:
    """timm's model; `options` are its constructor's, and without num_classes it has no classifier.

    Of some models the size of the images is fixed when they are built, and of the others unused.
    """
    options = {"num_classes": 0, **options}
    try:  # vision transformers have to know
        return timm.create_model(
            name, **({"img_size": image_size} if image_size else {}), **options
        )
    except TypeError:
        return timm.create_model(name, **options)


def shrink_stem(net: nn.Module) -> None:
    """Give a ResNet the first layers for 32 px: 3x3, stride 1, no max-pool."""
    if not isinstance(getattr(net, "conv1", None), nn.Conv2d):
        raise ValueError("--small-stem is for ResNets that begin with one convolution, conv1")
    width = net.conv1.out_channels
    net.conv1, net.maxpool = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.Identity()
