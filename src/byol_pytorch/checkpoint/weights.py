"""What a network says of its weights: which may be missing in a file, and what timm knows of it.

How other projects name them is in names.py.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Names that classifiers have where timm does not say: torchvision, transformers. Distilled DeiTs
# have two.
CLASSIFIERS = ("fc", "head", "heads", "classifier")
DISTILLED = ("head_dist", "cls_classifier", "distillation_classifier")
# What hangs beside a backbone and not between the images and its representation: the auxiliary
# classifiers of Inception and VOLO, and in a file the parts that other methods train along.
AUXILIARY = re.compile(r"(AuxLogits|aux1|aux2|aux_head)\..+")
BESIDE = re.compile(
    r"(projector|predictor|projection_head|prediction_head|prototypes|decoder(_\w+)?)\..+"
    r"|decoder_\w+"
)
# Counters, masks that follow from the size of the images, tokens for masked images alone
NO_MATTER = re.compile(r"(.+\.)?(num_batches_tracked|attn_mask|mask_token)")
STATISTICS = (".running_mean", ".running_var")


def fitting(own: Tensor, found: Tensor) -> bool:
    """Whether `found` can be loaded into `own`: integers in place of floats are quantised."""
    numbers = [x.is_floating_point() or x.is_complex() for x in (own, found)]
    return own.shape == found.shape and numbers[0] == numbers[1] and not found.is_meta


def misfits(
    net: nn.Module, own: Mapping[str, Tensor], found: Mapping[str, Tensor], loaded: Iterable[str]
) -> list[str]:
    """The names that say that the file's tensors `found` are of another backbone than `net`.

    All that is not `loaded` needs a reason. Missing in the file may be the network's last layer,
    and buffers that the network computes. Left over may be the file's last layer, what no
    representation passes through, and buffers that the network computes alike.
    """
    last = last_layers(net)
    parameters = {name for name, _ in net.named_parameters(remove_duplicate=False)}
    computed = {n: b for n, b in net.named_buffers(remove_duplicate=False) if n not in own}
    loaded = set(loaded)
    missing = [name for name in own if name not in loaded]
    left = {name: value for name, value in found.items() if name not in loaded}

    def no_matter(name: str) -> bool:
        if _is_within(name, last) or NO_MATTER.fullmatch(name) or AUXILIARY.fullmatch(name):
            return True
        return name not in own and BESIDE.fullmatch(name) is not None

    def explained(name: str, value: Tensor) -> bool:
        if name in own or name in computed:  # of another shape, or not stored
            return name in computed and _equal(computed[name], value)
        indices = not (value.is_floating_point() or value.is_complex())
        return indices or name.endswith("relative_coords_table") or _is_classifier(name, found)

    lacking = [n for n in missing if n in parameters or n in left or n.endswith(STATISTICS)]
    homeless = [n for n, v in left.items() if not no_matter(n) and not explained(n, v)]
    heads = {n: v for n, v in left.items() if not NO_MATTER.fullmatch(n)}
    has_its_head = any(_is_within(name, last) for name in loaded)
    if homeless and not has_its_head and _is_a_linear_after_all(heads, own):
        homeless = []
    return list(dict.fromkeys([n for n in lacking if not no_matter(n)] + homeless))


def last_layers(net: Any) -> tuple[str, ...]:
    """The names of the modules after the representation: a network's classifier, or several."""
    names = {id(module): name for name, module in net.named_modules()}
    if hasattr(net, "forward_head") and hasattr(net, "get_classifier"):  # timm
        try:
            heads = net.get_classifier()
        except AttributeError:  # of a classifier that was built without its inner layer
            return (str(timm_config(net).get("classifier", "head")).partition(".")[0],)
        heads = heads if isinstance(heads, tuple | list) else (heads,)
        return tuple(names[id(head)] for head in heads if id(head) in names)
    children = dict(net.named_children())
    last = [name for name, child in children.items() if next(child.parameters(), None) is not None]
    # A layer with a head's name in the middle is none.
    heads = [name for name in children if name in DISTILLED]
    heads += [n for n in last[-1:] if n in CLASSIFIERS or isinstance(children[n], nn.Linear)]
    found: list[str] = []
    for head in dict.fromkeys(heads):
        # What comes before its last layer counts as part of the representation.
        inner = [m for m in children[head].modules() if m._parameters]
        weighted = [i for i, m in enumerate(inner) if isinstance(m, nn.Linear | nn.Conv2d)]
        found += [names[id(m)] for m in inner[weighted[-1] if weighted else len(inner) :]]
    return tuple(found)


def timm_args(net: Any, weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Arguments with which timm.create_model, given the architecture, has a place for `weights`.

    None for a network that is not timm's, or whose other arguments it does not tell.
    """
    config = timm_config(net)
    if "architecture" not in config:
        return None
    args: dict[str, Any] = {"num_classes": 0}
    if any(_is_within(name, last_layers(net)) for name in weights):
        args["num_classes"] = net.num_classes
    stem = config.get("first_conv")
    if isinstance(stem, str) and f"{stem}.weight" in weights:
        args["in_chans"] = weights[f"{stem}.weight"].shape[1] * net.get_submodule(stem).groups
    size = getattr(getattr(net, "patch_embed", None), "img_size", None)
    if size is not None:
        args["img_size"] = list(size)
    if args.get("in_chans") == config.get("input_size", (3,))[0]:
        del args["in_chans"]
    if args.get("img_size") == list(config.get("input_size", ())[1:]):
        del args["img_size"]
    return args if _rebuilds(config["architecture"], args, weights) else None


def _rebuilds(name: str, args: Mapping[str, Any], weights: Mapping[str, Tensor]) -> bool:
    import timm

    try:
        with torch.device("meta"):
            built = timm.create_model(name, **args).state_dict()
    except Exception:  # whatever timm raises: then the arguments stay unknown
        return False
    return {n: v.shape for n, v in built.items()} == {n: v.shape for n, v in weights.items()}


def without_classifier(
    net: nn.Module, weights: Mapping[str, Tensor], unreached: Iterable[str]
) -> dict[str, Tensor]:
    """The weights without those last layers all of whose parameters are `unreached`."""
    parameters = {name for name, _ in net.named_parameters()}
    trained = parameters - set(unreached)
    heads = [h for h in last_layers(net) if not any(_is_within(name, (h,)) for name in trained)]
    return {name: value for name, value in weights.items() if not _is_within(name, heads)}


def _is_within(name: str, modules: Iterable[str]) -> bool:
    return name.startswith(tuple(f"{module}." for module in modules if module))


def _is_classifier(name: str, found: Iterable[str]) -> bool:
    """Whether the name is of a head that is one layer in the file."""
    heads = next((h for h in (CLASSIFIERS, DISTILLED) if name.partition(".")[0] in h), ())
    layers = {n.rpartition(".")[0] for n in found if n.partition(".")[0] in heads}
    return heads == DISTILLED or len(layers) == 1


def _is_a_linear_after_all(left: Mapping[str, Tensor], own: Iterable[str]) -> bool:
    """Whether all that is left is one Linear, outside of the network's own children."""
    layer = next(iter(left), "").rpartition(".")[0]
    children = {name.partition(".")[0] for name in own}
    dims = {name.removeprefix(f"{layer}."): value.ndim for name, value in left.items()}
    return dims == {"weight": 2, "bias": 1} and layer.partition(".")[0] not in children


def _equal(a: Tensor, b: Tensor) -> bool:
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and (a.is_meta or torch.allclose(a.cpu(), b.cpu(), rtol=1e-4, atol=1e-5))


def timm_config(net: nn.Module) -> dict[str, Any]:
    """What timm knows of a model, empty for others."""
    config = getattr(net, "default_cfg", None)
    return config if isinstance(config, dict) else {}
