"""How the output of a layer becomes a representation (B, D). Nothing is ever flattened silently."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from byol_pytorch.backbone.probe import Channels
from byol_pytorch.backbone.representation import Pool
from byol_pytorch.inputs import tensors


def pool_for(value: Any, channels: Channels | None, pool: str | Pool | None, what: str) -> Pool:
    """The pooling of a layer's output as probed, behind a last layer that gave `channels`.

    Raises ValueError where `pool` does not say how `value` becomes (B, D).
    """
    if callable(pool):
        _check_stateless(pool, value, what)
        found = partial(by_user, what=what, function=pool)
        found(value)
        return found
    if pool not in ("auto", "mean", "cls", None):
        raise ValueError(
            f"pool={pool!r} is not known. Give 'auto', 'mean', 'cls', None, or a callable that "
            "turns the layer's output into (B, D)."
        )
    x = only_tensor(value, what)
    if x.ndim == 2 or pool is None:
        checked(x, what)
        return partial(unchanged, what=what)
    shape = tuple(x.shape)
    if x.ndim < 3:
        raise ValueError(
            f"The output of {what} has shape {shape}; expected (B, D) or more axes. Name a layer "
            "with hidden_layer= whose output has them, or give pool= a callable."
        )
    if pool == "cls":
        if x.ndim != 3:
            raise ValueError(
                f"pool='cls' takes the first token of (B, N, D), but {what} gives {shape}. Give "
                "pool='mean', or a callable."
            )
        return partial(first_token, what=what)
    return partial(mean_over, what=what, channel_axis=_channel_axis(x, channels, pool, what))


# Functions of a module, and partials of them, so that a learner can be pickled. What they give is
# a tensor of its own, because a layer behind may work in place.


def unchanged(value: Any, what: str) -> Tensor:
    """(B, D) as it is."""
    return checked(only_tensor(value, what), what).clone()


def mean_over(value: Any, what: str, channel_axis: int) -> Tensor:
    """The mean over all axes but the first and the channel axis."""
    x = only_tensor(value, what)
    keep = (0, channel_axis % x.ndim)
    return x.mean(dim=[axis for axis in range(x.ndim) if axis not in keep])


def first_token(value: Any, what: str) -> Tensor:
    """The first token of (B, N, D)."""
    return only_tensor(value, what)[:, 0].clone()


def by_user(value: Any, what: str, function: Pool) -> Tensor:
    """What the user's callable gives, which must be (B, D)."""
    return checked(function(value), f"pool= of {what}").clone()


def _check_stateless(pool: Any, value: Any, what: str) -> None:
    owner = getattr(pool, "__self__", pool)  # of a method such as layer.forward
    holds = isinstance(owner, nn.Module) and bool([*owner.parameters(), *owner.buffers()])
    if not holds and isinstance(value, Tensor):  # a function may use a layer from around it
        with torch.enable_grad():
            pooled = pool(value.detach())
        holds = isinstance(pooled, Tensor) and pooled.requires_grad
    if holds:
        name = getattr(pool, "__name__", type(owner).__name__)
        raise ValueError(
            f"pool= of {what}, {name}, has parameters or buffers; expected a callable without, "
            "because the optimizer, .to(), the state_dict and the target's copy would miss them. "
            "Make it the network's last layer: BYOL(nn.Sequential(backbone, pool), image_size)."
        )


def _channel_axis(x: Tensor, channels: Channels | None, pool: str | None, what: str) -> int:
    count, axis = channels or (None, None)
    shape, first, last = tuple(x.shape), x.shape[1] == count, x.shape[-1] == count
    if x.ndim == 3:
        if pool == "mean":
            return 1 if axis == 1 and (first or not last) else -1
        if first and not last and axis == 1:
            return 1
        raise ValueError(
            f"{what[0].upper() + what[1:]} gives tokens {shape}, and how to pool them is not "
            "known. Give pool='mean' for the mean token, pool='cls' for the first one, or a "
            "callable."
        )
    # Concatenated maps are wider than their last part, whose width a side may equal by chance.
    chance = (first and axis == -1 and x.shape[2] == count) or (last and axis == 1)
    if first != last and not chance:
        return 1 if first else -1
    came = "both its second and its last axis fit" if first else "no axis fits for certain"
    raise ValueError(
        f"{what[0].upper() + what[1:]} gives {shape}, and which axis holds the channels is not "
        f"known ({came} the {count} channels of the last layer with weights). Give pool=, for "
        "example pool=lambda x: x.mean((2, 3)) for (B, C, H, W)."
    )


def hugging_face_pool(net: nn.Module, output: Any, channels: Channels | None, pool: Any) -> Pool:
    """What the classification head that transformers puts on this base model would be given."""
    if callable(pool):
        return pool_for(output, channels, pool, "the network")
    if not isinstance(output, Mapping):
        raise ValueError(
            f"The Hugging Face model returns a {type(output).__name__} instead of a ModelOutput. "
            "Give its config return_dict=True, or pool= a callable that returns (B, D)."
        )
    if pool != "auto":
        what = "the network's last_hidden_state"
        found = pool_for(output.get("last_hidden_state"), channels, pool, what)
        return partial(_of_last_hidden_state, pool=found)
    config: Any = net.config
    registers = getattr(config, "num_register_tokens", 0) or 0
    found = partial(hugging_face_feature, model_type=config.model_type, registers=registers)
    found(output)
    return found


def _of_last_hidden_state(output: Any, pool: Pool) -> Tensor:
    return pool(output["last_hidden_state"])


def hugging_face_feature(output: Any, model_type: str, registers: int) -> Tensor:
    """What modeling_<model_type>.py of transformers 5 feeds its ForImageClassification.

    A type that is not listed gives its pooler_output.
    """
    tokens = output.get("last_hidden_state")
    kind = model_type.removesuffix("_vision_model")
    if tokens is not None and tokens.ndim == 3:
        if kind in ("vit", "deit", "vit_msn", "pvt"):
            return tokens[:, 0]
        if kind in ("dinov2", "dinov2_with_registers"):
            return torch.cat((tokens[:, 0], tokens[:, 1 + registers :].mean(1)), dim=1)
        if kind in ("clip", "metaclip_2"):
            return tokens[:, 1:].mean(1)
        if kind in ("siglip", "siglip2", "ijepa", "levit"):
            return tokens.mean(1)
    if kind in ("segformer", "pvt_v2", "textnet") and tokens is not None and tokens.ndim == 4:
        return tokens.mean((2, 3))
    pooled = output.get("pooler_output")
    if pooled is None:
        raise ValueError(
            f"Which output of a Hugging Face {model_type!r} model is its representation is not "
            "known: it gives no pooler_output. Give pool='mean' for the mean over its positions, "
            "name a layer with hidden_layer=, or pass the ForImageClassification model."
        )
    return pooled.flatten(1) if pooled.shape[2:].numel() == 1 else checked(pooled, "pooler_output")


def only_tensor(value: Any, what: str) -> Tensor:
    """The tensor that `value` is, or the only one that it holds."""
    if isinstance(value, Tensor):
        return value
    held = tensors(value)
    if len(held) == 1:
        return held[0]
    names = f" ({', '.join(map(str, value))})" if isinstance(value, Mapping) else ""
    raise ValueError(
        f"The output of {what} is a {type(value).__name__} with {len(held)} tensors{names}, not "
        "one tensor. Give pool= a callable that takes it and returns (B, D)."
    )


def checked(x: Any, what: str) -> Tensor:
    """`x` if it is (B, D)."""
    if not isinstance(x, Tensor) or x.ndim != 2:
        came = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"The output of {what} is {came}; a representation is (B, D). Give pool='mean', "
            "pool='cls', or a callable that returns (B, D)."
        )
    return x
