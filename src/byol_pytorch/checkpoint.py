"""Files that survive: training states and backbones, written whole or not at all, read safely.

What a training state holds, and when it is saved, is the training script's business.
"""

import json
import re
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from byol_pytorch._card import model_card
from byol_pytorch._files import StrPath, existing, replacing
from byol_pytorch._haiku import pads_same, read_deepmind, same_padding
from byol_pytorch._layouts import Found, exported_names, find_backbone
from byol_pytorch._pickles import is_plain_pickle, read_torch
from byol_pytorch._weights import misfits, read_safetensors, timm_config, unwrapped

__all__ = [
    "LoadedBackbone",
    "export_backbone",
    "keep_last",
    "load",
    "load_backbone",
    "replacing",
    "same_padding",
    "save",
]
PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size)


def save(state: dict[str, Any], path: StrPath) -> None:
    """Write `state` to `path` such that at every moment the old or the new file is there, whole.

    The bytes go to a temporary file in the same folder, reach the disk, and then take the name
    (a symbolic link stays one). Folders are made where they are missing. A temporary file that a
    killed process left is removed by a save to the same path an hour later. Only one process
    should save: under DDP rank 0; sharded states are gathered first (get_state_dict of
    torch.distributed.checkpoint, full_state_dict=True).

    `state` may hold what `load` can read: tensors, numbers, strings, None, and lists, tuples and
    dicts of those. A best checkpoint beside the last is one more call with another path.

    Raises TypeError, before anything is written, for other values, naming the first; OSError, disk
    full included, with the old file untouched and no temporary file left.
    """
    _check_plain(state, "state")
    with replacing(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # torch's writer hides what the disk said behind an error of its own.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def keep_last(folder: StrPath, pattern: str, count: int) -> list[Path]:
    """Delete all but the last `count` files of `folder` that match `pattern`, return the deleted.

    The order is that of the numbers in the names: epoch-9.pt comes before epoch-10.pt. Give a best
    checkpoint a name that the pattern misses. Raises ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"count={count}; expected at least 1. To keep none, do not save any.")
    files = sorted((f for f in Path(folder).glob(pattern) if f.is_file()), key=_numbered)
    for file in files[:-count]:
        file.unlink(missing_ok=True)
    return files[:-count]


def load(path: StrPath, map_location: Any = "cpu") -> dict[str, Any]:
    """The state that `save` wrote, its tensors on `map_location`. Never runs code of the file.

    Raises FileNotFoundError; ValueError for a file that is damaged, is no checkpoint, or holds
    other objects than tensors, numbers, strings and containers of them.
    """
    return read_torch(existing(path), map_location)


def export_backbone(
    source: nn.Module,
    path: StrPath,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | tuple[int, int] | None = None,
    naming: Literal["timm", "torchvision"] | None = None,
    card: str | None = None,
) -> None:
    """Write a backbone's state_dict as a safetensors file, whole or not at all.

    `source` is a BYOL learner (its online network, with the normalisation and the size of its
    views) or a network; torch.compile's and DDP's wrappers are looked through. The file's metadata
    hold as JSON `mean` and `std` (one value a channel, of images in [0, 1]), `image_size` (height
    and width in pixels), `architecture` (timm's name), `padding` ("same" after `same_padding`) and
    `byol_pytorch` (the version), as far as they are known; arguments go before what the learner
    says. Values that are no tensors are left out. Of several processes rank 0 writes; a sharded
    network is gathered, so call this on all.

    `naming` renames a ViT of timm or torchvision to the other's names (their ResNets have the same
    names); without it names stay. `card` says how and on what the network was trained: a model card
    for a hub with it is written as README.md beside the file, its licence left to you.

    Needs safetensors. Raises ValueError for a mean and std that do not go together or a network
    without such names, FileExistsError for a README.md already there, OSError as `save` does.
    """
    import safetensors.torch

    from byol_pytorch import __version__

    net, recorded = unwrapped(source), (None, None, None)
    if hasattr(net, "ddp_ignored"):  # a learner
        recorded = (*(net.normalisation or (None, None)), net.image_size)
        net = unwrapped(net.net)
    if mean is None and std is None:
        mean, std = recorded[:2]
    size = image_size if image_size is not None else recorded[2]
    if (mean is None) != (std is None) or len(mean or ()) != len(std or ()):
        raise ValueError(
            f"mean={mean!r}, std={std!r}; expected one value a channel for both, or neither. Give "
            "the numbers that the training images were normalised with."
        )
    readme = Path(path).parent / "README.md"
    if card is not None and readme.exists():
        raise FileExistsError(f"{readme} exists; expected none. Move it, or export without card=.")
    facts = {
        "mean": None if mean is None else [float(v) for v in mean],
        "std": None if std is None else [float(v) for v in std],
        "image_size": [size, size] if isinstance(size, int) else size and list(size),
        "architecture": timm_config(net).get("architecture"),
        "padding": "same" if pads_same(net) else None,
        "byol_pytorch": __version__,
    }
    metadata = {name: json.dumps(value) for name, value in facts.items() if value is not None}
    state = {name: v for name, v in net.state_dict().items() if isinstance(v, Tensor)}
    names = list(state) if naming is None else exported_names(state, naming)
    tensors = {n: _plain_copy(v) for n, v in zip(names, state.values(), strict=True)}
    # The ranks' batch statistics may differ, so not just anyone's file may be the last.
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    with replacing(path) as file:
        file.write(safetensors.torch.save(tensors, {"format": "pt", **metadata}))
    if card is not None:
        with replacing(readme) as file:
            file.write(model_card(Path(path).name, facts, card).encode())


@dataclass(frozen=True)
class LoadedBackbone:
    """What `load_backbone` did, by names of the state_dict, and what the file says of itself."""

    loaded: tuple[str, ...]  # of the network
    missing: tuple[str, ...]  # of the network, kept as they were: absent in the file, or misfits
    unexpected: tuple[str, ...]  # of the backbone in the file, not used
    renamed: tuple[tuple[str, str], ...] = ()  # of the loaded, the file's name and the network's
    source: str = ""  # whose layout and naming the file has
    padding: Literal["same", "torch"] = "torch"  # how the network's strided layers pad now
    mean: tuple[float, ...] | None = None  # of images in [0, 1], one value a channel
    std: tuple[float, ...] | None = None
    image_size: tuple[int, int] | None = None  # height, width
    architecture: str | None = None


def load_backbone(
    path: StrPath, net: nn.Module, *, padding: Literal["same", "torch"] | None = None
) -> LoadedBackbone:
    """Load a backbone's weights into `net`, in place, and report what was loaded.

    Reads files by `export_backbone` (.safetensors); by torch.save: state_dicts of torchvision and
    timm, and training states, whose online network is taken, of this library, byol-pytorch 0.x,
    MMSelfSup and MMPretrain, lightly, solo-learn and MoCo; and DeepMind's pickles. Nothing that a
    file names is imported or called. Names are translated where theirs differ from the network's:
    ViTs of torchvision and MMPretrain, numbered ResNets. The classifier may be absent, or of
    another shape, and then stays as it is; so do constant buffers. In a learner, call
    reset_moving_average() afterwards; load before fully_shard.

    DeepMind's networks pad as SAME. `padding="same"` has `net` do so too, by `same_padding`, for
    the same features; "torch" leaves it and warns of the loss.

    Raises FileNotFoundError; ValueError for a file that cannot be read (see `load`), that wants the
    padding chosen, or that is of another backbone: weights of `net` would stay unset, or the file
    has layers for which it has no place. Then `net` is as it was.
    """
    if padding not in (None, "same", "torch"):
        raise ValueError(f"padding={padding!r}; expected 'same', 'torch' or None.")
    path = existing(path)
    net = unwrapped(net)
    own = {name: v for name, v in net.state_dict().items() if isinstance(v, Tensor)}
    facts: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        weights, facts = read_safetensors(path)
        found = find_backbone(weights, own)
    elif is_plain_pickle(path):
        weights, origins, facts = read_deepmind(path)
        found = Found("DeepMind", weights, origins)
    else:
        found = find_backbone(read_torch(path, foreign=True), own)
    fitting = {n: t for n, t in found.weights.items() if n in own and t.shape == own[n].shape}
    missing = tuple(name for name in own if name not in fitting)
    unexpected = tuple(name for name in found.weights if name not in fitting)
    wrong = misfits(net, missing, unexpected, translated=found.translated)
    if wrong or not fitting:
        names = (wrong or missing)[:4]
        shown = "; ".join(_difference(n, own.get(n), found.weights.get(n)) for n in names)
        known = f", {facts['architecture']!r} by its metadata" if "architecture" in facts else ""
        raise ValueError(
            f"{path} does not fit {type(net).__name__} in {len(wrong)} of {len(own)} entries: "
            f"{shown}{'; and more' if len(wrong) > 4 else ''} (read as {found.source}). "
            f"Expected the weights of the same architecture{known}. Build the network as it "
            "was trained (the classifier may differ)."
        )
    if facts.pop("padding", None) == "same" and not pads_same(net):
        _choose_padding(path, net, padding)
    if padding == "same":
        same_padding(net)
    net.load_state_dict(fitting, strict=False)
    return LoadedBackbone(
        loaded=tuple(fitting),
        missing=missing,
        unexpected=tuple(found.origins[name] for name in unexpected),
        renamed=tuple((found.origins[n], n) for n in fitting if found.origins[n] != n),
        source=found.source,
        padding="same" if pads_same(net) else "torch",
        **facts,
    )


def _choose_padding(path: Path, net: nn.Module, padding: str | None) -> None:
    # The figures: github.com/google-deepmind/deepmind-research, issue 84
    if padding is None:
        raise ValueError(
            f"{path} is of a network that pads as TensorFlow's SAME, and {type(net).__name__} does "
            "not; expected padding='same', to let its strided layers pad so too, or "
            "padding='torch', which costs several points of accuracy."
        )
    if padding == "torch":
        warnings.warn(
            f"{path} is of a network that pads as TensorFlow's SAME; with torch's padding its "
            "features lose several points of accuracy (of DeepMind's ResNet-50 74.6 % of ImageNet "
            "fell to about 70 %). padding='same' keeps them.",
            stacklevel=3,
        )


def _check_plain(value: Any, where: str) -> None:
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif hasattr(value, "full_tensor") or not (type(value) in PLAIN or isinstance(value, Tensor)):
        raise TypeError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}; expected tensors, "
            "numbers, strings, None, and lists, tuples and dicts of those, which load() can read "
            "without running code. Convert it: vars(x), str(x), float(x), torch.as_tensor(x), or "
            "x.full_tensor() of a sharded tensor."
        )


def _difference(name: str, own: Tensor | None, found: Tensor | None) -> str:
    here, there = ("absent" if x is None else str(tuple(x.shape)) for x in (own, found))
    return f"{name} is {here} in the network, {there} in the file"


def _plain_copy(value: Any) -> Tensor:
    # Contiguous and of its own memory: safetensors takes neither shared nor strided tensors.
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    return torch.empty(whole.shape, dtype=whole.dtype, device="cpu").copy_(whole.detach())


def _numbered(file: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", file.name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
