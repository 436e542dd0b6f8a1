"""Files that survive: training states and backbones, written whole or not at all, read safely.

What a training state holds, and when it is saved, is the training script's business.
"""

import contextlib
import glob
import json
import os
import pickle
import re
import secrets
import time
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from byol_pytorch._weights import (
    backbone_weights,
    misfits,
    read_safetensors,
    timm_config,
    unwrapped,
)

StrPath = str | os.PathLike[str]
STALE = 3600.0  # seconds after which nobody still writes to a temporary file
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
    with _replacing(path) as file:
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
    path = _existing(path)
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        whole = zipfile.is_zipfile(path)  # the index is at the end: a torn file has none
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and (whole or unsafe):
            raise ValueError(
                f"{path} holds {unsafe[1] if unsafe else 'other objects than tensors'}, and "
                "loading such objects can run code; expected tensors, numbers, strings and "
                "containers of them. If you trust its origin, torch.load(path, weights_only=False) "
                "once, and save what you need of it."
            ) from error
        if whole or isinstance(error, PermissionError):
            raise
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is damaged, cut short or no checkpoint; "
            "expected a file by torch.save. Take an earlier one, or copy it again."
        ) from error
    if not isinstance(state, dict):
        raise ValueError(
            f"{path} holds a {type(state).__name__}; expected a dict. Save one: save(dict(...))."
        )
    return state


def export_backbone(
    source: nn.Module,
    path: StrPath,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> None:
    """Write a backbone's state_dict as a safetensors file, whole or not at all.

    `source` is a BYOL learner (its online network, with the normalisation and the size of its
    views) or a network; torch.compile's and DDP's wrappers are looked through. The file's metadata
    hold as JSON `mean` and `std` (one value a channel, of images in [0, 1]), `image_size` (height
    and width in pixels), `architecture` (timm's name) and `byol_pytorch` (the version), as far as
    they are known; arguments go before what the learner says. Values that are no tensors are left
    out. Of several processes rank 0 writes; a sharded network is gathered, so call this on all.

    Needs safetensors. Raises ValueError for a mean and std that do not go together, OSError as
    `save` does.
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
    facts = {
        "mean": None if mean is None else [float(v) for v in mean],
        "std": None if std is None else [float(v) for v in std],
        "image_size": [size, size] if isinstance(size, int) else size and list(size),
        "architecture": timm_config(net).get("architecture"),
        "byol_pytorch": __version__,
    }
    metadata = {name: json.dumps(value) for name, value in facts.items() if value is not None}
    state = net.state_dict()
    tensors = {name: _plain_copy(v) for name, v in state.items() if isinstance(v, Tensor)}
    # The ranks' batch statistics may differ, so not just anyone's file may be the last.
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    with _replacing(path) as file:
        file.write(safetensors.torch.save(tensors, {"format": "pt", **metadata}))


@dataclass(frozen=True)
class LoadedBackbone:
    """What `load_backbone` did, by names of the state_dict, and what the file says of itself."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]  # of the network, kept as they were: absent in the file, or misfits
    unexpected: tuple[str, ...]  # of the file, not used
    mean: tuple[float, ...] | None = None  # of images in [0, 1], one value a channel
    std: tuple[float, ...] | None = None
    image_size: tuple[int, int] | None = None  # height, width
    architecture: str | None = None


def load_backbone(path: StrPath, net: nn.Module) -> LoadedBackbone:
    """Load a backbone's weights into `net`, in place, and report what was loaded.

    Reads files by `export_backbone` (.safetensors), and by torch.save: state_dicts, also of a
    learner (its online network is taken), also inside a training state under "learner",
    "state_dict" or "model". The classifier may be absent, or of another shape, and then stays as
    it is; so do constant buffers. In a learner, call reset_moving_average() afterwards; load
    before fully_shard.

    Raises FileNotFoundError; ValueError for a file that cannot be read (see `load`), or that is of
    another backbone: weights of `net` would stay unset, or the file has layers for which it has no
    place. Then `net` is as it was.
    """
    path = _existing(path)
    net = unwrapped(net)
    if path.suffix == ".safetensors":
        weights, facts = read_safetensors(path)
    else:
        weights, facts = backbone_weights(load(path)), {}
    own = {name: v for name, v in net.state_dict().items() if isinstance(v, Tensor)}
    fitting = {n: t for n, t in weights.items() if n in own and t.shape == own[n].shape}
    missing = tuple(name for name in own if name not in fitting)
    unexpected = tuple(name for name in weights if name not in fitting)
    wrong = misfits(net, missing, unexpected)
    if wrong or not fitting:
        names = (wrong or missing)[:4]
        shown = "; ".join(_difference(n, own.get(n), weights.get(n)) for n in names)
        known = f", {facts['architecture']!r} by its metadata" if "architecture" in facts else ""
        raise ValueError(
            f"{path} does not fit {type(net).__name__} in {len(wrong)} of {len(own)} entries: "
            f"{shown}{'; and more' if len(wrong) > 4 else ''}. Expected the weights of the same "
            f"architecture{known}. Build the network as it was trained (the classifier may differ)."
        )
    net.load_state_dict(fitting, strict=False)
    return LoadedBackbone(tuple(fitting), missing, unexpected, **facts)


@contextlib.contextmanager
def _replacing(path: StrPath) -> Iterator[BinaryIO]:
    """A new file that takes the name `path` when the block ends well, and vanishes otherwise."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE:
                left.unlink()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # some systems cannot synchronise a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


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


def _existing(path: StrPath) -> Path:
    path = Path(path)
    if not path.is_file():
        beside = ", ".join(sorted(f.name for f in path.parent.glob(f"*{path.suffix}"))[:8])
        raise FileNotFoundError(
            f"{path} is no file; expected a checkpoint. In its folder: {beside or 'none'}."
        )
    return path


def _difference(name: str, own: Tensor | None, found: Tensor | None) -> str:
    here, there = ("absent" if x is None else str(tuple(x.shape)) for x in (own, found))
    return f"{name} is {here} in the network, {there} in the file"


def _plain_copy(value: Any) -> Tensor:
    # Contiguous and of its own memory: safetensors takes neither shared nor strided tensors.
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    return torch.empty(whole.shape, dtype=whole.dtype).copy_(whole.detach())


def _numbered(file: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", file.name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
