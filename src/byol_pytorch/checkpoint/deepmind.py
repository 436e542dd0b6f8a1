"""DeepMind's BYOL checkpoints: their names and shapes, and the padding that goes with them.

Sources: google-deepmind/deepmind-research, byol/utils/networks.py and byol/utils/checkpointing.py;
google-deepmind/dm-haiku, haiku/_src/nets/resnet.py and haiku/_src/batch_norm.py. A bottleneck
block strides in its 3x3 convolution and batch norm has eps 1e-5 and decay 0.9: all as in
torchvision's and timm's ResNets. Only the padding differs.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from byol_pytorch.checkpoint.pickles import Array, read_pickle

# From a module of Haiku's to a module of torch's. Older Haiku numbers the stem's convolution.
MODULES = (
    (r"initial_conv(?:_1)?", "conv1"),
    (r"initial_batchnorm", "bn1"),
    (r"block_group_(\d+)/~/block_(\d+)/~/conv_(\d)", "layer{}.{}.conv{}"),
    (r"block_group_(\d+)/~/block_(\d+)/~/batchnorm_(\d)", "layer{}.{}.bn{}"),
    (r"block_group_(\d+)/~/block_(\d+)/~/shortcut_conv", "layer{}.{}.downsample.0"),
    (r"block_group_(\d+)/~/block_(\d+)/~/shortcut_batchnorm", "layer{}.{}.downsample.1"),
    (r"classifier", "fc"),
)
LEAVES = {
    "w": "weight",
    "b": "bias",
    "scale": "weight",
    "offset": "bias",
    "mean_ema/average": "running_mean",
    "var_ema/average": "running_var",
    "mean_ema/counter": "num_batches_tracked",
}
HEADS = re.compile(r"(projector|predictor)/")
EMA = re.compile(r"(.+)/~/((?:mean|var)_ema)")
# dataset.normalize_images and _preprocess_image of byol/utils/dataset.py
FACTS = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "image_size": (224, 224),
    "padding": "same",
}


def read_deepmind(path: Path) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """The online backbone under torchvision's names, the file's name of each, and its facts.

    Also the classifier that DeepMind trains along, as "fc". Raises ValueError for other pickles
    and other networks, pre-activation ResNets included.
    """
    weights: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for module, leaf, value in _leaves(path):
        origin = f"{module}/{leaf}"
        if HEADS.match(origin) or origin.endswith(("/hidden", "/var_ema/counter")):
            continue
        name = _renamed(module, leaf)
        if name is None:
            raise ValueError(
                f"{path} holds {origin}, of a pre-activation ResNet (resnet_v2) or no ResNet; "
                "expected the kind that torchvision and timm have: DeepMind's resnet_v2=False."
            )
        weights[name], origins[name] = _tensor(value, origin, path), origin
    return weights, origins, dict(FACTS)


def same_padding(net: nn.Module) -> nn.Module:
    """Let `net` pad as TensorFlow's and Haiku's SAME do, in place, and return it.

    Its strided convolutions and max-pools become timm's Conv2dSame and MaxPool2dSame: padding of
    the input's size, the odd pixel at the right and below. Names and weights stay as they are, so
    state_dicts do. Do it before the network goes into a learner, torch.compile or fully_shard.
    """
    from timm.layers.conv2d_same import Conv2dSame
    from timm.layers.pool2d_same import MaxPool2dSame

    for module in _strided(net):
        sizes = {
            name: _pair(getattr(module, name)) for name in ("kernel_size", "stride", "dilation")
        }
        vars(module).update(sizes, padding=(0, 0))
        # The class alone changes: hooks, devices and who holds the module stay.
        module.__class__ = Conv2dSame if isinstance(module, nn.Conv2d) else MaxPool2dSame
    return net


def pads_same(net: nn.Module) -> bool:
    """Whether the network's strided layers pad as SAME."""
    names = {type(module).__name__ for module in net.modules()}
    return not names.isdisjoint(("Conv2dSame", "MaxPool2dSame")) and not any(_strided(net))


def _strided(net: nn.Module) -> Iterator[nn.Conv2d | nn.MaxPool2d]:
    # With stride 1, and for 1x1 kernels, both ways of padding are the same.
    for module in net.modules():
        exactly = type(module) in (nn.Conv2d, nn.MaxPool2d)
        if exactly and isinstance(module, nn.Conv2d | nn.MaxPool2d):
            kernel, stride = _pair(module.kernel_size), _pair(module.stride)
            if max(kernel) > 1 and max(stride) > 1:
                yield module


def _leaves(path: Path) -> Iterator[tuple[str, str, Any]]:
    """The module, the name in it and the value of each entry of the online network."""
    tree = read_pickle(path)
    state = tree.get("experiment_state", tree) if isinstance(tree, dict) else None
    for part in ("online_params", "online_state"):
        modules = state.get(part) if isinstance(state, dict) else None
        if not isinstance(modules, dict) or not all(isinstance(m, dict) for m in modules.values()):
            raise ValueError(
                f"{path} is a pickle without {part}; expected DeepMind's checkpoint "
                "(pretrain_res50x1.pkl), a file by torch.save, or safetensors."
            )
        for module, values in modules.items():
            yield from ((module, leaf, value) for leaf, value in values.items())


def _renamed(module: str, leaf: str) -> str | None:
    """The name in torchvision's ResNet, None where it has none."""
    inner = module.partition("/~/")[2] or module  # without the network's own name
    if ema := EMA.fullmatch(inner):
        inner, leaf = ema[1], f"{ema[2]}/{leaf}"
    for pattern, name in MODULES:
        found = re.fullmatch(pattern, inner)
        if found and leaf in LEAVES:
            # Groups, convolutions and batch norms count from 1 in torchvision, blocks from 0.
            numbers = (int(n) + (i != 1) for i, n in enumerate(found.groups()))
            return f"{name.format(*numbers)}.{LEAVES[leaf]}"
    return None


def _tensor(value: Any, name: str, path: Path) -> Tensor:
    if isinstance(value, int):  # a counter
        return torch.tensor(value)
    if not isinstance(value, Array):
        raise ValueError(
            f"{path} has no numpy array in {name}; expected numpy arrays throughout. Convert "
            "others, by jax.device_get, before saving."
        )
    array = value.value
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.ndim == 4 and name.endswith("/w"):  # (H, W, in, out)
        array = array.transpose(3, 2, 0, 1)
    elif array.ndim == 2:  # (in, out)
        array = array.T
    elif array.ndim:  # batch norm's (1, 1, 1, C)
        array = array.reshape(-1)
    return torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
