"""The views: BYOL's two distributions as kornia pipelines, and a wrapper for transforms of others.

`augment.stages` holds the stages that are not kornia's own, `augment.pipeline` their container;
both import kornia, which this face leaves to the first call.
"""

from byol_pytorch.augment.statistics import channel_statistics
from byol_pytorch.augment.views import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PRESETS,
    byol_views,
    local_views,
    per_image,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "PRESETS",
    "byol_views",
    "channel_statistics",
    "local_views",
    "per_image",
]
