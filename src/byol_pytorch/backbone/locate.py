"""Finds a network's representation by one probe: which layer, pooled how, reached by what."""

import difflib
import random
import sys
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from byol_pytorch.backbone.pooling import hugging_face_pool, pool_for
from byol_pytorch.backbone.probe import Channels, Trace
from byol_pytorch.backbone.representation import (
    Place,
    Pool,
    Representation,
    check_gradient,
    copy_for_target,
    runs_message,
    timm_methods,
)
from byol_pytorch.backbone.undisturbed import undisturbed
from byol_pytorch.inputs import copied, fresh, map_tensors, tensors
from byol_pytorch.parallel import uncompiled

TRAINING_DRAWS = 16  # a layer that is skipped half of the time is missed once in 65,536 probes


@dataclass(frozen=True)
class Located:
    """The place, the probe's representation (B, D), and the parameters that do not reach it."""

    place: Place
    probe: Tensor
    unreached: frozenset[str]


def locate(
    net: nn.Module, inputs: Any, hidden_layer: str | int, pool: str | Pool | None
) -> Located:
    """Find the representation of `net`, called on the probe `inputs`.

    Raises ValueError where the layer does not exist, did not run exactly once, does not depend on
    the inputs, or does not give (B, D) by `pool`.
    """
    root = uncompiled(net)
    name = None if hidden_layer == "auto" else _layer_name(root, hidden_layer)
    with undisturbed(root):
        trace = Trace(root, name)
        trace.run(inputs)
        if name is None:
            place = _auto(root, inputs, trace, pool)
        elif name == "":
            place = Place("net", "", pool_for(trace.output, trace.channels, pool, "the network"))
        else:
            if trace.runs.get(name, 0) != 1:
                raise ValueError(runs_message(name, trace.runs.get(name, 0)))
            place = Place("output", name, pool_for(*trace.tapped, pool, f"layer {name!r}"))
        if callable(pool) and place.take in ("input", "output"):
            place = replace(place, pool=copied, finish=place.pool)
        probe, reached = _evaluated(root, inputs, place)
        named = {name: p for name, p in root.named_parameters() if p.requires_grad}
        outputs: list[Tensor] = []
        map_tensors(outputs.append, trace.output)
        beyond = _leaves(_nodes(*outputs)) - reached
    evaluated = {name for name, p in named.items() if id(p) in reached}
    heads = {name for name, p in named.items() if id(p) in beyond}
    trained, in_training = _trained(root, inputs, place, named.keys() - heads)
    if place.take == "input":
        droppable = _works_without_head(root, inputs, place, (probe, in_training))
        place = replace(place, droppable=droppable)
    unreached = named.keys() - (evaluated if in_training is None else trained)
    return Located(place, probe, frozenset(unreached))


def _auto(root: nn.Module, inputs: Any, trace: Trace, pool: str | Pool | None) -> Place:
    if all(hasattr(root, m) for m in ("get_classifier", "forward_features", "forward_head")):
        return _auto_timm(root, inputs, trace, pool)
    libraries = {base.__module__.split(".")[0] for base in type(root).__mro__}
    head = trace.head
    if head is not None and trace.ends_in_head(exactly="torchvision" not in libraries):
        if trace.runs[head.name] != 1:
            raise ValueError(runs_message(head.name, trace.runs[head.name]))
        label = f"the input of layer {head.name!r}"
        return Place("input", head.name, pool_for(head.value, head.channels, pool, label))
    if "transformers" in libraries and hasattr(root, "config"):
        return Place("net", "", hugging_face_pool(root, trace.output, trace.channels, pool))
    return Place("net", "", pool_for(trace.output, trace.channels, pool, "the network"))


def _auto_timm(root: Any, inputs: Any, trace: Trace, pool: str | Pool | None) -> Place:
    pooled = timm_methods(root, inputs)
    classifier = root.get_classifier()
    if isinstance(classifier, nn.Module):
        seen = trace.inputs.get(id(classifier))
        # To the bit: a batch norm between the two changes next to nothing until it is trained.
        if seen is not None and trace.runs[seen.name] == 1 and _equal(seen.value, pooled):
            label = f"the input of the classifier {seen.name!r}"
            return Place("input", seen.name, pool_for(seen.value, seen.channels, pool, label))
    width = getattr(root, "head_hidden_size", None) or getattr(root, "num_features", None)
    channels = Channels(width, None) if isinstance(width, int) else None
    return Place("methods", "", pool_for(pooled, channels, pool, "forward_head(pre_logits=True)"))


def _evaluated(root: nn.Module, inputs: Any, place: Place) -> tuple[Tensor, set[int]]:
    """The representation, and the ids of the parameters that it depends on, in evaluation."""
    watched = map_tensors(
        lambda x: x.detach().clone().requires_grad_() if x.is_floating_point() else x, inputs
    )
    leaves = tensors(watched)
    representation, reached = _reach(root, watched, place)
    rows = representation.detach()
    if not any(id(x) in reached for x in leaves) and not _differs(root, inputs, place, rows):
        where = f"layer {place.layer!r}" if place.layer else "the network's output"
        raise ValueError(
            f"The representation at {where} does not depend on the images: it is the same for "
            "different ones. Name another layer with hidden_layer=."
        )
    check_gradient(representation, root, place)
    return rows, reached


def _differs(root: nn.Module, inputs: Any, place: Place, rows: Tensor) -> bool:
    """Whether other inputs give another representation; True where none are known to be valid."""
    if not _alike(rows):
        return True
    integers = [x for x in tensors(inputs) if not x.is_floating_point()]
    if integers and all(map(_alike, integers)):
        return True
    if len(integers) == len(tensors(inputs)):
        return False
    _seed(root, 0)
    read = Representation(root, place)
    return not torch.equal(read(root, _at_least_two(inputs)), read(root, _varied(inputs)))


def _alike(rows: Tensor) -> bool:
    return torch.equal(rows, rows[:1].expand_as(rows))


def _trained(
    root: nn.Module, inputs: Any, place: Place, wanted: set[str]
) -> tuple[set[str], Tensor | None]:
    """Names of the parameters that the representation depends on in training, and its first draw.

    The forward is repeated until all `wanted` names are found, because it may use parameters at
    random (LayerDrop, mask tokens) or depending on its input (experts). No names and None where
    it fails on the probe, as one that asks for labels does.
    """
    trained: set[str] = set()
    first: Tensor | None = None
    with undisturbed(root, training=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for draw in range(TRAINING_DRAWS):
            _seed(root, draw)
            drawn = _varied(inputs) if draw else _at_least_two(inputs)
            try:
                representation, reached = _reach(root, drawn, place)
            except Exception:  # whatever a foreign forward raises
                if first is None:
                    break
                continue
            first = representation.detach() if first is None else first
            trained |= {name for name, p in root.named_parameters() if id(p) in reached}
            if wanted <= trained:
                break
    return trained, first


def _reach(root: nn.Module, inputs: Any, place: Place) -> tuple[Tensor, set[int]]:
    """The representation, and the ids of the inputs and parameters that it depends on."""
    representation = Representation(root, place)(root, fresh(inputs))
    nodes = _nodes(representation)
    if any(type(node).__name__.startswith("CheckpointFunction") for node in nodes):
        raise ValueError(
            "The network uses reentrant gradient checkpointing, through which its representation "
            "cannot be traced. Use torch.utils.checkpoint with use_reentrant=False."
        )
    return representation, _leaves(nodes)


def _nodes(*outputs: Tensor) -> set[Any]:
    # The graph says what DDP will wait for, and walking it runs no backward hook of the user's.
    nodes: set[Any] = set()
    following = {x.grad_fn for x in outputs if x.grad_fn is not None}
    while following:
        nodes |= following
        following = {n for node in following for n, _ in node.next_functions if n is not None}
        following -= nodes
    return nodes


def _leaves(nodes: set[Any]) -> set[int]:
    return {id(node.variable) for node in nodes if type(node).__name__ == "AccumulateGrad"}


def _seed(root: nn.Module, seed: int) -> None:
    # The same in every process: DDP hangs where two do not wait for the same parameters.
    torch.default_generator.manual_seed(seed)
    for device in {p.device for p in root.parameters() if p.device.type == "cuda"}:
        torch.cuda.default_generators[device.index].manual_seed(seed)
    random.seed(seed)
    if (np := sys.modules.get("numpy")) is not None:
        np.random.seed(seed)


def _at_least_two(inputs: Any) -> Any:
    return map_tensors(lambda x: torch.cat((x, x)) if x.ndim and len(x) == 1 else x, inputs)


def _varied(inputs: Any) -> Any:
    """At least two rows, their floats scaled and shifted at random, each row for itself."""

    def vary(x: Tensor) -> Tensor:
        if not x.ndim or not x.is_floating_point():
            return x
        scale, shift = torch.randn(2, len(x), device=x.device, dtype=x.dtype)
        shape = (-1, *[1] * (x.ndim - 1))
        return x * scale.view(shape) + shift.view(shape)

    return map_tensors(vary, _at_least_two(inputs))


def _works_without_head(
    root: nn.Module, inputs: Any, place: Place, expected: tuple[Tensor, Tensor | None]
) -> bool:
    """Whether a copy without its head gives `expected`, in evaluation and in training."""
    trial = replace(place, droppable=True)
    try:
        twin = copy_for_target(root, trial)
        for training, value in zip((False, True), expected, strict=True):
            with undisturbed(twin, training=training), torch.no_grad():
                _seed(twin, 0)
                given = fresh(_at_least_two(inputs) if training else inputs)
                if value is not None and not _same(Representation(twin, trial)(twin, given), value):
                    return False
    except Exception:  # whatever a foreign copy or forward raises: then the target keeps its head
        return False
    return True


def _layer_name(root: nn.Module, hidden_layer: str | int) -> str:
    if isinstance(hidden_layer, bool) or not isinstance(hidden_layer, str | int):
        raise TypeError(
            f"hidden_layer={hidden_layer!r}; expected a layer's dotted name, an index into "
            "net.children(), or 'auto'. Print [name for name, _ in net.named_modules()] for names."
        )
    children = [name for name, _ in root.named_children()]
    if isinstance(hidden_layer, int):
        if hidden_layer == -1:
            return ""
        if not -len(children) <= hidden_layer < len(children):
            raise ValueError(
                f"hidden_layer={hidden_layer} is no index into the network's {len(children)} "
                f"children: {', '.join(children) or 'none'}. Give one of their names, or 'auto'."
            )
        return children[hidden_layer]
    modules = dict(root.named_modules(remove_duplicate=False))
    if hidden_layer in modules:
        found = modules[hidden_layer]
        return next(name for name, module in root.named_modules() if module is found)
    names = [name for name in modules if name]
    near = difflib.get_close_matches(hidden_layer, names, n=5, cutoff=0.4) or children[:8]
    raise ValueError(
        f"hidden_layer={hidden_layer!r} is no layer of {type(root).__name__}. Nearest names: "
        f"{', '.join(near) or 'none'}. Give one of them, an index into net.children(), -1 for "
        "the network's own output, or 'auto'."
    )


def _equal(a: Any, b: Tensor) -> bool:
    return isinstance(a, Tensor) and torch.equal(a, b)


def _same(a: Any, b: Any) -> bool:
    tensor = isinstance(a, Tensor) and isinstance(b, Tensor)
    return tensor and a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)
