"""Backbones in files: exported with what builds them anew, loaded from our files and others'.

How other projects name their weights is in names.py and deepmind.py.
"""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from byol_pytorch.checkpoint.deepmind import pads_same, read_deepmind, same_padding
from byol_pytorch.checkpoint.files import (
    WEIGHTS,
    StrPath,
    existing,
    is_safetensors,
    read_safetensors,
    replacing,
)
from byol_pytorch.checkpoint.hub import card, check_hub, config
from byol_pytorch.checkpoint.names import Found, find_backbone
from byol_pytorch.checkpoint.pickles import is_plain_pickle, read_torch
from byol_pytorch.checkpoint.weights import (
    fitting,
    misfits,
    timm_args,
    timm_config,
    without_classifier,
)
from byol_pytorch.parallel import is_learner, is_sharded, process, unwrapped


def export_backbone(
    source: nn.Module,
    path: StrPath,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | tuple[int, int] | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> None:
    """Write a backbone's state_dict as a safetensors file, or as a folder that timm loads.

    A path that ends in .safetensors is a file. Any other is a folder of model.safetensors and
    timm's config.json, for timm.create_model("local-dir:PATH", pretrained=True), also with
    num_classes=10, and, uploaded to a hub, "hf-hub:USER/NAME"; a README.md that says so is added
    where there is none. Each file is written whole or not at all.

    `source` is a BYOL learner (its online network, with the normalisation and the size of its
    views) or a network; the wrappers of torch.compile, DDP and DataParallel are looked through. A
    learner's classifier is left out where it does not reach the representation: nothing has trained
    it. So timm.create_model(..., num_classes=0, checkpoint_path=path) takes the file, and with
    classes load_backbone does.

    The file's metadata hold as JSON `mean` and `std` (one value a channel, of images in [0, 1]),
    `image_size` (height and width in pixels), `architecture` (timm's name), `model_args` (for
    timm.create_model beside the name: those given, else what the network tells if it can be built
    anew from that), `padding` ("same" after `same_padding`) and `byol_pytorch` (the version), as
    far as they are known, for `facts` to read; arguments go before what the learner says. Values
    that are no tensors are left out. Of several processes rank 0 writes; a sharded network is
    gathered, so call this on all.

    Needs safetensors. Raises ValueError for a mean and std that do not go together, for model_args
    that are no JSON, and for a folder of a network that timm cannot build from what is known;
    OSError as `save` does.
    """
    import safetensors.torch

    from byol_pytorch import __version__

    net, recorded = unwrapped(source), (None, None, None)
    unreached: list[str] = []
    if is_learner(net):
        recorded = (*(net.normalisation or (None, None)), net.image_size)
        unreached = [n.removeprefix("net.").removeprefix("_orig_mod.") for n in net.ddp_ignored()]
        net = unwrapped(net.net)
    if mean is None and std is None:
        mean, std = recorded[:2]
    size = image_size if image_size is not None else recorded[2]
    if (mean is None) != (std is None) or len(mean or ()) != len(std or ()):
        raise ValueError(
            f"mean={mean!r}, std={std!r}; expected one value a channel for both, or neither. Give "
            "the numbers that the training images were normalised with."
        )
    state = {name: v for name, v in net.state_dict().items() if isinstance(v, Tensor)}
    if unreached:
        state = without_classifier(net, state, unreached)
    notes = {
        "mean": None if mean is None else [float(v) for v in mean],
        "std": None if std is None else [float(v) for v in std],
        "image_size": [size, size] if isinstance(size, int) else size and list(size),
        "architecture": timm_config(net).get("architecture"),
        "model_args": timm_args(net, state) if model_args is None else dict(model_args),
        "padding": "same" if pads_same(net) else None,
        "byol_pytorch": __version__,
    }
    try:
        metadata = {name: json.dumps(value) for name, value in notes.items() if value is not None}
    except TypeError as error:
        raise ValueError(
            f"model_args={model_args!r}; expected what JSON holds: numbers, strings, lists, None "
            f"({error}). Leave out classes and functions."
        ) from error
    path = Path(path)
    alone = path.suffix == ".safetensors"
    if not alone:
        check_hub(net, notes)
    tensors = {name: _plain_copy(value) for name, value in state.items()}
    # The ranks' batch statistics may differ, so not just anyone's file may be the last.
    if process()[0] != 0:
        return
    with replacing(path if alone else path / WEIGHTS) as file:
        file.write(safetensors.torch.save(tensors, {"format": "pt", **metadata}))
    if alone:
        return
    with replacing(path / "config.json") as file:
        file.write(config(net, notes))
    if not (path / "README.md").exists():
        with replacing(path / "README.md") as file:
            file.write(card(notes))


def facts(path: StrPath) -> dict[str, Any]:
    """What `export_backbone` wrote beside the tensors, to build the network that they are of.

    Some of mean, std, image_size (tuples), architecture (timm's name), model_args (a dict for
    timm.create_model) and padding; empty for files of other origin. Reads the header alone. Raises
    FileNotFoundError; ValueError for a damaged file.
    """
    path = existing(path)
    return read_safetensors(path, tensors=False)[1] if is_safetensors(path) else {}


@dataclass(frozen=True)
class LoadedBackbone:
    """What `load_backbone` did, by names of the state_dict, and what the file says of itself."""

    loaded: tuple[str, ...]  # of the network
    missing: tuple[str, ...]  # of the network, kept as they were: absent in the file, or misfits
    unexpected: tuple[str, ...]  # of the backbone in the file, not used
    renamed: tuple[tuple[str, str], ...] = ()  # the file's name and the network's, if loaded
    source: str = ""  # the project whose file and names it has been read as
    padding: Literal["same", "torch"] = "torch"  # how the network's strided layers pad now
    mean: tuple[float, ...] | None = None  # of images in [0, 1], one value a channel
    std: tuple[float, ...] | None = None
    image_size: tuple[int, int] | None = None  # height, width
    architecture: str | None = None
    model_args: dict[str, Any] | None = None  # for timm.create_model, beside the architecture


def load_backbone(
    path: StrPath, net: nn.Module, *, padding: Literal["same", "torch"] | None = None
) -> LoadedBackbone:
    """Load a backbone's weights into `net`, in place, and report what was loaded.

    Reads files by `export_backbone` (.safetensors); by torch.save: state_dicts of torchvision and
    timm, and training states, whose online network is taken, of this library, byol-pytorch 0.x,
    MMSelfSup and MMPretrain, lightly, solo-learn and MoCo; and DeepMind's pickles. Nothing that a
    file names is imported or called. Names are translated where theirs differ from the network's:
    ViTs of torchvision and MMPretrain, numbered ResNets. The last layer may be absent, or of
    another shape, and then stays as it is; so do constant buffers. What the file has beyond the
    network must be heads, counters or constants. Give `learner.net`, and call
    reset_moving_average() afterwards; load before fully_shard.

    DeepMind's networks pad as SAME. `padding="same"` has `net` do so too, by `same_padding`, for
    the same features; "torch" leaves it and warns of the loss.

    Raises FileNotFoundError; ValueError for a file that cannot be read (see `load`), that wants the
    padding chosen, or that is of another backbone: weights of `net` would stay unset, or the file
    has weights for which it has no place. Then `net` is as it was. Warns where the file's metadata
    name another architecture of timm with the same weights.
    """
    if padding not in (None, "same", "torch"):
        raise ValueError(f"padding={padding!r}; expected 'same', 'torch' or None.")
    path = existing(path)
    net = unwrapped(net)
    own = _own_weights(net)
    found, notes = _read(path, own)
    loaded = {n: w for n, w in found.weights.items() if n in own and fitting(own[n], w)}
    missing = tuple(name for name in own if name not in loaded)
    unexpected = tuple(name for name in found.weights if name not in loaded)
    wrong = misfits(net, own, found.weights, loaded)
    if wrong or not loaded:
        shown = wrong if loaded else list(missing)
        raise ValueError(_misfit(path, net, shown, own, found, notes))
    if notes.get("architecture") != (architecture := timm_config(net).get("architecture")):
        _warn_of_another(path, notes.get("architecture"), architecture)
    if notes.pop("padding", None) == "same" and not pads_same(net):
        _choose_padding(path, net, padding)
    if padding == "same":
        same_padding(net)
    net.load_state_dict(loaded, strict=False)
    return LoadedBackbone(
        loaded=tuple(loaded),
        missing=missing,
        unexpected=tuple(found.origins[name] for name in unexpected),
        renamed=tuple((found.origins[n], n) for n in loaded if found.origins[n] != n),
        source=found.source,
        padding="same" if pads_same(net) else "torch",
        **notes,
    )


def _own_weights(net: nn.Module) -> dict[str, Tensor]:
    if is_learner(net):
        raise ValueError(
            "The network given is a BYOL learner; expected its backbone. Call "
            "load_backbone(path, learner.net), then learner.reset_moving_average()."
        )
    own = {name: v for name, v in net.state_dict().items() if isinstance(v, Tensor)}
    for name, value in own.items():
        if is_lazy(value):
            raise ValueError(
                f"{name} of {type(net).__name__} has no shape yet; expected a network without "
                "lazy layers left. Call it once on a batch, then load."
            )
        if is_sharded(value):
            raise ValueError(
                f"{name} of {type(net).__name__} is sharded; expected whole weights. Load before "
                "fully_shard."
            )
    return own


def _read(path: Path, own: dict[str, Tensor]) -> tuple[Found, dict[str, Any]]:
    notes: dict[str, Any] = {}
    if is_safetensors(path):  # first: its header's length may begin as a pickle does
        state, notes = read_safetensors(path)
    elif is_plain_pickle(path):
        weights, origins, notes = read_deepmind(path)
        return Found("DeepMind", weights, origins), notes
    else:
        state = read_torch(path, foreign=True)
    try:
        return find_backbone(state, own), notes
    except ValueError as error:
        raise ValueError(f"{path} is no file of one network: {error}") from None


def _misfit(
    path: Path,
    net: nn.Module,
    wrong: list[str],
    own: dict[str, Tensor],
    found: Found,
    notes: dict[str, Any],
) -> str:
    def shown(value: Tensor | None) -> str:
        if value is None:
            return "absent"
        kind = "" if value.is_floating_point() else f" {value.dtype}".replace("torch.", "")
        return f"{tuple(value.shape)}{kind}{' without values' if value.is_meta else ''}"

    each = "; ".join(
        f"{name} is {shown(own.get(name))} in the network, {shown(found.weights.get(name))} in "
        "the file"
        for name in wrong[:4]
    )
    known = f", {notes['architecture']!r} by its metadata" if "architecture" in notes else ""
    if not any(name in own for name in found.weights):
        mend = f"No name is the same: the file has {', '.join(list(found.origins.values())[:3])}."
    elif all(re.search("pos|coords", n) and n in own and n in found.weights for n in wrong):
        mend = "Tables of positions have the size of the images (or windows) that they were "
        mend += "trained with: build the network for that (timm: img_size=), and resize afterwards."
    else:
        mend = "Build the network as it was trained (its last layer may differ), load, and take "
        mend += "layers off or replace them afterwards."
    return (
        f"{path} does not fit {type(net).__name__} in {len(wrong)} of {len(own)} entries: {each}"
        f"{'; and more' if len(wrong) > 4 else ''} (read as {found.source}). Expected the weights "
        f"of the same architecture{known}. {mend}"
    )


def _warn_of_another(path: Path, there: str | None, here: str | None) -> None:
    if there is not None and here is not None:
        warnings.warn(
            f"{path} is of {there!r} by its metadata, and the network is {here!r}: all names and "
            "shapes fit, but what has no weights (activations, padding, blur) may differ, and then "
            f"the features do. Build {there!r} to be sure.",
            stacklevel=3,
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


def _plain_copy(value: Any) -> Tensor:
    # Contiguous and of its own memory: safetensors takes neither shared nor strided tensors.
    whole = value.full_tensor() if is_sharded(value) else value
    return torch.empty(whole.shape, dtype=whole.dtype, device="cpu").copy_(whole.detach())
