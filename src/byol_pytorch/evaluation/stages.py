"""What a network makes of one batch: its representation, and maps of its stages.

The maps are pooled to few cells, as the protocols that train heads on stages want them. features.py
reads a whole data set so.
"""

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byol_pytorch.backbone import Representation, locate
from byol_pytorch.inputs import for_network, map_tensors, tensors
from byol_pytorch.parallel import is_learner, uncompiled

Model = nn.Module | Callable[[Any], Tensor]
Features = Tensor | Mapping[str, Tensor]  # one tensor, or several by the names of stages
POOLED = "pooled"  # the representation's name among the stages


class _Pooling(NamedTuple):
    side: int  # of the map at 224 px
    kernel: int
    stride: int
    padding: int
    cells: int  # a side


# MMSelfSup's MultiPooling, pool_type "specified"; its "adaptive" gives as many cells.
_POOLINGS = {
    "feature1": _Pooling(112, 10, 10, 4, 12),
    "feature2": _Pooling(56, 16, 8, 0, 6),
    "feature3": _Pooling(28, 13, 5, 0, 4),
    "feature4": _Pooling(14, 8, 3, 0, 3),
    "feature5": _Pooling(7, 6, 1, 0, 2),
}
# The most values that these give of a stage of ResNet-50 ("around 9000 dimensions").
_VALUES = 9216


def resnet_stages(net: nn.Module) -> dict[str, str]:
    """The layers feature1 to feature5 of a ResNet of timm or torchvision, or of a learner on one.

    feature1 is the stem's activation before the max-pool, the others the four stages (MMSelfSup's
    out_indices 0 to 4). Raises ValueError for a network without these layers.
    """
    root = _network(net)
    known = [name for name, _ in root.named_children()]
    stem = [name for name in ("act1", "relu") if name in known]
    layers = stem[:1] + [f"layer{number}" for number in range(1, 5)]
    if not stem or not set(layers) <= set(known):
        raise ValueError(
            f"{type(root).__name__} is no ResNet of timm or torchvision: its children are "
            f"{', '.join(known) or 'none'}; expected act1 or relu, and layer1 to layer4. Name the "
            "layers: stages={'feature4': 'stages.2', ...}."
        )
    return dict(zip(_POOLINGS, layers, strict=True))


def stage_pool(maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each map (B, C, H, W) averaged over few cells and flattened: (B, C * cells * cells).

    feature1 to feature5 have 12, 6, 4, 3 and 2 cells a side. They are averaged by the kernels of
    MMSelfSup's multi-head pooling where the map has the side that it has at 224 px (112, 56, 28,
    14, 7), else adaptively. A map of another name has as many cells as keep it within 9216 values,
    the most that the five give of ResNet-50. No map has more cells than positions.
    """
    return {name: _pool(name, x) for name, x in maps.items()}


def _pool(name: str, x: Tensor) -> Tensor:
    if x.ndim != 4:
        raise ValueError(
            f"The layer for {name!r} gives {tuple(x.shape)}; expected a map (B, C, H, W). Name "
            "another layer, or pool tokens by a callable in place of the network."
        )
    pooling, (height, width) = _POOLINGS.get(name), x.shape[-2:]
    if pooling and height == width == pooling.side:
        return F.avg_pool2d(x, pooling.kernel, pooling.stride, pooling.padding).flatten(1)
    cells = pooling.cells if pooling else max(1, int((_VALUES / x.shape[1]) ** 0.5))
    return F.adaptive_avg_pool2d(x, (min(cells, height), min(cells, width))).flatten(1)


class FeatureReader:
    """Reads the features of one batch as extract_features does, for loops of one's own.

    It is built on a first batch, of which only the form matters. A call gives (B, D), or with
    `stages` a dict, in the network's current mode, with gradients where they are enabled. Between
    the calls the network is as it was. `model` and `stages` are those of extract_features.
    """

    def __init__(self, model: Model, images: Any, stages: Mapping[str, str] | None = None) -> None:
        if not (stages is None or isinstance(stages, Mapping)):
            raise TypeError(
                f"stages is a {type(stages).__name__}; expected a mapping from names of features "
                "to layers. Give resnet_stages(net), or {'feature4': 'layer3'}."
            )
        self.stages = None if stages is None else dict(stages)
        self._layers = _find_layers(model, self.stages or {})
        self._read: Callable[[Any], Any] = model
        if is_learner(model):
            learner: Any = model
            self._read = learner.representation
        elif isinstance(model, nn.Module):
            self._read = _representation(model, images)

    def __call__(self, images: Any) -> Tensor | dict[str, Tensor]:
        if self.stages is None:
            return self._vectors(images)
        maps: dict[str, list[Tensor]] = {name: [] for name in self.stages}
        handles = [
            layer.register_forward_hook(partial(_keep_pooled, maps[name], name))
            for name, layer in self._layers.items()
        ]
        try:
            features = {POOLED: self._vectors(images)}
        finally:
            for handle in handles:
                handle.remove()
        for name, found in maps.items():
            if len(found) != 1:
                raise ValueError(
                    f"Layer {self.stages[name]!r}, for {name!r}, ran {len(found)} times in one "
                    "forward pass; expected once. Name another; a compiled network may have to "
                    "be given as it was before."
                )
            features[name] = found[0]
        return features

    def _vectors(self, images: Any) -> Tensor:
        x = self._read(images)
        if not isinstance(x, Tensor) or x.ndim != 2:
            came = tuple(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise ValueError(
                f"The model gives {came}; expected features (B, D). Let it pool them, for example "
                "lambda images: net(images).mean((2, 3)) of maps."
            )
        return x


def _keep_pooled(kept: list[Tensor], name: str, module: nn.Module, args: Any, out: Tensor) -> None:
    # Pooled at once: a map is large, and the next layer may work in place.
    kept.append(_pool(name, out))


def _network(model: Any) -> nn.Module:
    """The bare network whose layers `stages` names."""
    return uncompiled(model.net if is_learner(model) else model)


def _representation(net: nn.Module, images: Any) -> Callable[[Any], Tensor]:
    """What BYOL would train of a network, by the same probe on two of the images.

    A network without parameters is not probed: what it gives is the representation.
    """
    dtype = next((p.dtype for p in net.parameters() if p.is_floating_point()), None)
    if dtype is None:
        return net
    if any(x.dtype == torch.uint8 for x in tensors(images)):
        raise ValueError(
            f"The loader gives uint8 images to {type(net).__name__}; expected floats, normalised "
            "as it was trained with. Do that in the loader, or pass the BYOL learner, which does."
        )
    two = map_tensors(lambda x: x[:2], images)
    try:
        found = locate(net, for_network(two, dtype), "auto", "auto")
    except ValueError as error:
        raise ValueError(
            f"{error} Here that means: pass a callable that gives (B, D) in place of the network."
        ) from error
    representation = Representation(net, found.place)
    return lambda inputs: representation(net, for_network(inputs, dtype))


def _find_layers(model: Model, stages: Mapping[str, str]) -> dict[str, nn.Module]:
    """The modules that `stages` names, by the names of the stages."""
    if not stages:
        return {}
    if not isinstance(model, nn.Module) or POOLED in stages:
        raise ValueError(
            f"stages={dict(stages)}; expected layers of a network by names other than {POOLED!r}, "
            "which is the representation's. Give a network, not a function, and other names."
        )
    net = _network(model)
    layers = dict(net.named_modules(remove_duplicate=False))
    for name, layer in stages.items():
        if layer not in layers:
            near = difflib.get_close_matches(layer, layers, n=5, cutoff=0.3) or list(layers)[1:8]
            raise ValueError(
                f"stages[{name!r}] is {layer!r}, which is no layer of {type(net).__name__}. "
                f"Nearest names: {', '.join(near)}. Give one of them."
            )
    return {name: layers[layer] for name, layer in stages.items()}
