"""Files that survive: training states and backbones, written whole or not at all, read safely."""

from byol_pytorch.checkpoint.backbones import (
    LoadedBackbone,
    export_backbone,
    facts,
    load_backbone,
)
from byol_pytorch.checkpoint.deepmind import same_padding
from byol_pytorch.checkpoint.files import replacing
from byol_pytorch.checkpoint.states import keep_last, load, save

__all__ = [
    "LoadedBackbone",
    "export_backbone",
    "facts",
    "keep_last",
    "load",
    "load_backbone",
    "replacing",
    "same_padding",
    "save",
]
