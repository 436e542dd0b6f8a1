"""How other projects name a backbone's weights, and which of those names a network has.

Two tables: where the online backbone is in a training state, and how its own names differ.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from byol_pytorch.checkpoint.weights import fitting

NESTED = ("learner", "state_dict", "model")  # keys of training states
WRAPPERS = ("module.", "learner.", "model.")  # DDP, Lightning
# torch.compile, FSDP and activation checkpointing, which wrap blocks too
INNER_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


@dataclass(frozen=True)
class TrainingState:
    """A training state: the prefix of the online backbone, and of a name beside it."""

    source: str
    prefix: str
    beside: str


# The first that fits counts. Sources are in tests/layouts. Of solo-learn note that its ResNet for
# CIFAR pads the stem by 2, which no name tells.
TRAINING_STATES = (
    TrainingState("byol_pytorch", "net.", "projector."),
    TrainingState("lucidrains byol-pytorch", "net.", "online_encoder."),
    TrainingState("MMSelfSup or MMPretrain", "backbone.", "target_net."),
    TrainingState("lightly", "backbone.", "projection_head."),
    TrainingState("solo-learn", "backbone.", "momentum_backbone."),
    TrainingState("solo-learn, older", "encoder.", "momentum_encoder."),
    TrainingState("MoCo", "encoder_q.", "encoder_k."),
    TrainingState("a network with a backbone", "backbone.", "backbone."),
    TrainingState("a module with a model", "model.", "model."),
    TrainingState("a module with an encoder", "encoder.", "encoder."),
)

# Pairs of names for the same weight; {} is the same text in both. The first that fits counts.
Pairs = tuple[tuple[str, str], ...]
NAMINGS: dict[str, Pairs] = {
    # torchvision.models.vit_b_16 and timm's vit_base_patch16_224
    "torchvision ViT": (
        ("class_token", "cls_token"),
        ("encoder.pos_embedding", "pos_embed"),
        ("conv_proj.{}", "patch_embed.proj.{}"),
        ("encoder.layers.encoder_layer_{}.ln_1.{}", "blocks.{}.norm1.{}"),
        ("encoder.layers.encoder_layer_{}.ln_2.{}", "blocks.{}.norm2.{}"),
        ("encoder.layers.encoder_layer_{}.self_attention.in_proj_{}", "blocks.{}.attn.qkv.{}"),
        ("encoder.layers.encoder_layer_{}.self_attention.out_proj.{}", "blocks.{}.attn.proj.{}"),
        ("encoder.layers.encoder_layer_{}.mlp.0.{}", "blocks.{}.mlp.fc1.{}"),
        ("encoder.layers.encoder_layer_{}.mlp.3.{}", "blocks.{}.mlp.fc2.{}"),
        ("encoder.layers.encoder_layer_{}.mlp.linear_1.{}", "blocks.{}.mlp.fc1.{}"),  # until 0.12
        ("encoder.layers.encoder_layer_{}.mlp.linear_2.{}", "blocks.{}.mlp.fc2.{}"),
        ("encoder.ln.{}", "norm.{}"),
        ("heads.head.{}", "head.{}"),
    ),
    # mmpretrain.models.VisionTransformer and timm's
    "MMPretrain ViT": (
        ("cls_token", "cls_token"),
        ("pos_embed", "pos_embed"),
        ("patch_embed.projection.{}", "patch_embed.proj.{}"),
        ("layers.{}.ln1.{}", "blocks.{}.norm1.{}"),
        ("layers.{}.ln2.{}", "blocks.{}.norm2.{}"),
        ("layers.{}.attn.qkv.{}", "blocks.{}.attn.qkv.{}"),
        ("layers.{}.attn.proj.{}", "blocks.{}.attn.proj.{}"),
        ("layers.{}.ffn.layers.0.0.{}", "blocks.{}.mlp.fc1.{}"),
        ("layers.{}.ffn.layers.1.{}", "blocks.{}.mlp.fc2.{}"),
        ("ln1.{}", "norm.{}"),
    ),
    # nn.Sequential(*list(resnet.children())[:-1]), as in lightly's examples, and the ResNet
    "numbered ResNet": (
        ("0.{}", "conv1.{}"),
        ("1.{}", "bn1.{}"),
        ("4.{}", "layer1.{}"),
        ("5.{}", "layer2.{}"),
        ("6.{}", "layer3.{}"),
        ("7.{}", "layer4.{}"),
    ),
}


@dataclass(frozen=True)
class Found:
    """A file's weights under a network's names, and the file's name of each (`origins`)."""

    source: str
    weights: dict[str, Tensor]
    origins: dict[str, str]


def find_backbone(state: Mapping[str, Any], own: Mapping[str, Tensor]) -> Found:
    """The weights of a file, read in the way in which most of them fit the network's `own`.

    Raises ValueError for a state without weights, or with several networks' of unknown keys.
    """
    tensors = _tensors(_network(state))
    candidates = [
        Found(source, {name: tensors[origin] for name, origin in names.items()}, names)
        for source, names in _candidates(tensors)
    ]

    def fits(found: Found) -> int:
        return sum(n in own and fitting(own[n], w) for n, w in found.weights.items())

    return max(candidates, key=fits)  # max keeps the first of ties


def _network(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a training state that is a network's state_dict."""
    inner = {k: v for k, v in state.items() if isinstance(v, dict) and _tensors(v)}
    for key in NESTED:
        if key in inner:
            return inner[key]
    if any(value.ndim for value in _tensors(state).values()):
        return state
    if len(inner) != 1:
        keys = ", ".join(repr(key) for key in list(inner or state)[:8])
        came = "the tensors of several" if inner else "no tensors"
        raise ValueError(
            f"it holds {came} under its keys ({keys or 'none'}); expected a state_dict, or a dict "
            f"with one under {', '.join(repr(key) for key in NESTED)}. Save the state_dict of the "
            "network that you want, by itself."
        )
    return next(iter(inner.values()))


def _tensors(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}


def _candidates(tensors: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Each possible origin of the weights, and from each of its names to the name in the file."""
    as_is = {name: name for name in tensors}
    # n_averaged: the counter of torch.optim.swa_utils.AveragedModel, beside the network
    bare = _unwrapped({INNER_WRAPPERS.sub("", n): n for n in as_is if n != "n_averaged"})
    known = [
        kind
        for kind in TRAINING_STATES
        if all(any(n.startswith(p) for n in bare) for p in (kind.prefix, kind.beside))
    ]
    within = [(kind.source, _unwrapped(_below(kind.prefix, bare))) for kind in known[:1]]
    for source, names in (*within, ("plain names", bare), ("plain names", as_is)):
        yield source, names
        for naming, pairs in NAMINGS.items():
            for rules in (pairs, _reversed(pairs)):
                renamed = {_translated(n, rules) or n: origin for n, origin in names.items()}
                yield f"{source}, {naming}", renamed


def _below(prefix: str, names: Mapping[str, str]) -> dict[str, str]:
    return {n.removeprefix(prefix): origin for n, origin in names.items() if n.startswith(prefix)}


def _unwrapped(names: dict[str, str]) -> dict[str, str]:
    for prefix in WRAPPERS:
        if names and all(name.startswith(prefix) for name in names):
            return _unwrapped(_below(prefix, names))
    return names


def _reversed(pairs: Pairs) -> Pairs:
    return tuple((two, one) for one, two in pairs)


def _translated(name: str, pairs: Pairs) -> str | None:
    for one, two in pairs:
        if found := _pattern(one).fullmatch(name):
            return two.format(*found.groups())
    return None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", "(.+?)"))
