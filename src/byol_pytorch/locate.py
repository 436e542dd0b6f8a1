"""Finds a network's representation by one probe: which layer, pooled how, reached by what."""

import difflib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from byol_pytorch.pooling import hugging_face_pool, pool_for
from byol_pytorch.probe import Channels, Trace, rebuild, tensors, undisturbed
from byol_pytorch.representation import (
    Pool,
    Representation,
    Source,
    check_gradient,
    copy_for_target,
    runs_message,
    timm_methods,
    uncompiled,
)


@dataclass(frozen=True)
class Located:
    """The source, the probe's representation (2, D), and the parameters that do not reach it."""

    source: Source
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
            source = _auto(root, inputs, trace, pool)
        elif name == "":
            source = Source("net", "", pool_for(trace.output, trace.channels, pool, "the network"))
        else:
            if trace.runs.get(name, 0) != 1:
                raise ValueError(runs_message(name, trace.runs.get(name, 0)))
            source = Source("output", name, pool_for(*trace.tapped, pool, f"layer {name!r}"))
        probe, unreached = _reach(root, inputs, source)
    if source.take == "input":
        source = replace(source, droppable=_works_without_head(root, inputs, source, probe))
    return Located(source, probe, unreached)


def _auto(root: nn.Module, inputs: Any, trace: Trace, pool: str | Pool | None) -> Source:
    if all(hasattr(root, m) for m in ("get_classifier", "forward_features", "forward_head")):
        return _auto_timm(root, inputs, trace, pool)
    libraries = {base.__module__.split(".")[0] for base in type(root).__mro__}
    head = trace.head
    if head is not None and trace.ends_in_head(exactly="torchvision" not in libraries):
        if trace.runs[head.name] != 1:
            raise ValueError(runs_message(head.name, trace.runs[head.name]))
        label = f"the input of layer {head.name!r}"
        return Source("input", head.name, pool_for(head.value, head.channels, pool, label))
    if "transformers" in libraries and hasattr(root, "config"):
        return Source("net", "", hugging_face_pool(root, trace.output, trace.channels, pool))
    return Source("net", "", pool_for(trace.output, trace.channels, pool, "the network"))


def _auto_timm(root: Any, inputs: Any, trace: Trace, pool: str | Pool | None) -> Source:
    pooled = timm_methods(root, inputs)
    classifier = root.get_classifier()
    if isinstance(classifier, nn.Module):
        seen = trace.inputs.get(id(classifier))
        # To the bit: a batch norm between the two changes next to nothing until it is trained.
        if seen is not None and trace.runs[seen.name] == 1 and _equal(seen.value, pooled):
            label = f"the input of the classifier {seen.name!r}"
            return Source("input", seen.name, pool_for(seen.value, seen.channels, pool, label))
    width = getattr(root, "head_hidden_size", None) or getattr(root, "num_features", None)
    channels = Channels(width, None) if isinstance(width, int) else None
    return Source("methods", "", pool_for(pooled, channels, pool, "forward_head(pre_logits=True)"))


def _reach(root: nn.Module, inputs: Any, source: Source) -> tuple[Tensor, frozenset[str]]:
    leaves = [
        x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in tensors(inputs)
    ]
    named = {n: p for n, p in root.named_parameters() if p.requires_grad}
    ends = [*(x for x in leaves if x.requires_grad), *named.values()]
    representation = Representation(root, source)(root, rebuild(inputs, iter(leaves)))
    gradients: tuple[Tensor | None, ...] = (None,) * len(ends)
    try:
        if representation.requires_grad:
            gradients = torch.autograd.grad(representation.sum(), ends, allow_unused=True)
    except RuntimeError as error:
        if "heckpoint" not in str(error):
            raise
        raise ValueError(
            "The network uses reentrant gradient checkpointing, through which its representation "
            "cannot be traced. Use torch.utils.checkpoint with use_reentrant=False."
        ) from error
    of_inputs, of_parameters = gradients[: -len(named)], gradients[-len(named) :]
    rows = representation.detach()
    if all(g is None for g in of_inputs) and torch.equal(rows, rows[:1].expand_as(rows)):
        where = f"layer {source.layer!r}" if source.layer else "the network's output"
        raise ValueError(
            f"The representation at {where} does not depend on the images: it is the same for "
            "different ones. Name another layer with hidden_layer=."
        )
    check_gradient(representation, root, source)
    reached = zip(named, of_parameters, strict=True)
    return rows, frozenset(name for name, gradient in reached if gradient is None)


def _works_without_head(root: nn.Module, inputs: Any, source: Source, expected: Tensor) -> bool:
    trial = replace(source, droppable=True)
    try:
        twin = copy_for_target(root, trial)
        with undisturbed(twin), torch.no_grad():
            found = Representation(twin, trial)(twin, inputs)
    except Exception:  # whatever a foreign copy or forward raises: then the target keeps its head
        return False
    return _same(found, expected)


def _layer_name(root: nn.Module, hidden_layer: str | int) -> str:
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
    if isinstance(hidden_layer, str) and hidden_layer in modules:
        found = modules[hidden_layer]
        return next(name for name, module in root.named_modules() if module is found)
    names = [name for name in modules if name]
    hidden_layer = str(hidden_layer)
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
