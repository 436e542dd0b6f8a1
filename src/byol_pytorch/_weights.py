"""What a network says of its weights: which may be missing in a file, and what timm knows of it.

How other projects name them is in _layouts.py.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

# Names that classifiers have where timm's configuration does not say: torchvision, transformers.
CLASSIFIERS = ("fc", "head", "heads", "classifier")
STATISTICS = (".running_mean", ".running_var")
WEIGHTS = (".weight", ".bias")
FACTS = ("mean", "std", "image_size", "architecture", "padding")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and what export_backbone wrote beside them.

    Raises ValueError for a file that is no whole safetensors file.
    """
    import safetensors

    try:
        with safetensors.safe_open(path, "pt") as file:
            names = file.keys()
            weights = {name: file.get_tensor(name) for name in names}
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is damaged, cut short or no safetensors file; "
            "expected one by export_backbone. Copy it again, or export it again."
        ) from error
    facts = {name: json.loads(metadata[name]) for name in FACTS if name in metadata}
    return weights, {n: tuple(v) if isinstance(v, list) else v for n, v in facts.items()}


def misfits(
    net: nn.Module, missing: Iterable[str], unexpected: Iterable[str], *, translated: bool = False
) -> list[str]:
    """The names that say that a file is of another backbone than `net`.

    Those are parameters and batch statistics missing in the file, and weights of the file inside
    the network's own children for which it has no place (a deeper variant), anywhere where the
    names are `translated`; the classifier's are not among them, nor are constant buffers.
    """
    heads = tuple(f"{head}." for head in (*_heads(net), *(CLASSIFIERS if translated else ())))
    children = ("",) if translated else tuple(f"{name}." for name, _ in net.named_children())
    parameters = {name for name, _ in net.named_parameters(remove_duplicate=False)}
    untrained = [n for n in missing if n in parameters or n.endswith(STATISTICS)]
    homeless = [n for n in unexpected if n.startswith(children) and n.endswith(WEIGHTS)]
    return [name for name in dict.fromkeys(untrained + homeless) if not name.startswith(heads)]


def unwrapped(module: Any) -> Any:
    """The module inside the wrappers of DDP and torch.compile."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        module = module.module
    return getattr(module, "_orig_mod", module)


def timm_config(net: nn.Module) -> dict[str, Any]:
    """What timm knows of a model, empty for others."""
    config = getattr(net, "default_cfg", None)
    return config if isinstance(config, dict) else {}


def _heads(net: nn.Module) -> tuple[str, ...]:
    if "classifier" in timm_config(net):
        heads = timm_config(net)["classifier"]  # a name, several, or None
        return (heads,) if isinstance(heads, str) else tuple(heads or ())
    last = list(net.named_children())[-1:]
    return (*CLASSIFIERS, *(name for name, child in last if isinstance(child, nn.Linear)))
