"""What BYOL is trained with: LARS, the parameter groups, the learning rate's schedule and scaling.

The loop that calls them is the user's; the EMA's own schedule lives in target.py.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from byol_pytorch.arguments import is_number
from byol_pytorch.parallel import is_learner, local, uncompiled

TensorList = list[Tensor] | tuple[Tensor, ...]
CACHED = 2**18  # parameters that a CPU updates at a time; a larger tensor comes alone


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (arXiv 1708.03888) in the form of DeepMind's BYOL code.

    Each weight w with gradient g moves by

        u = g + weight_decay w
        u = u trust_coefficient |w| / |u|      (u as it is where a norm is 0)
        m = momentum m + u
        w = w - lr m

    (byol/utils/optimizers.py of deepmind-research). A parameter group with `adapt=False` leaves the
    second line out; `param_groups` sets that, and no decay, for biases and norms. Parameters
    without a gradient are skipped, gradients stay as they are, nothing waits for the device.

    Momenta and norms are in float32 or wider. Narrower parameters take their update in float32
    and are rounded after it: small updates of bfloat16 weights are lost, so train float32 weights
    under autocast. Of sharded parameters (DTensor, FSDP2) the norms span the whole parameter, by
    one all-reduce a group; every rank must then hold a gradient for the same parameters.

    Args:
        params: tensors, or parameter groups, each with its own settings where it names any.
        lr: with momentum 0.9, 0.2 x batch / 256 (arXiv 2006.07733, section 3.3): `scaled_lr`.
        momentum: in [0, 1).
        weight_decay: 1.5e-6 in the paper.
        trust_coefficient: 1e-3 in DeepMind's code.

    Raises ValueError for a setting out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": True,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; settings that it does not name are the constructor's."""
        settings = {**self.defaults, **param_group}
        for name in ("lr", "weight_decay", "trust_coefficient"):
            _check_number(name, settings[name], math.inf)
        _check_number("momentum", settings["momentum"], 1.0)
        if settings["adapt"] not in (True, False):
            raise ValueError(
                f"adapt={settings['adapt']!r}; expected a bool. Give True to scale a group's "
                "updates by the trust ratio, False to leave them as they are."
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameters in _alike(p for p in group["params"] if p.grad is not None):
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            if not self.state[p]:
                wide = torch.promote_types(p.dtype, torch.float32)
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=wide)
        weights = [local(p) for p in parameters]
        momenta = [local(self.state[p]["momentum_buffer"]) for p in parameters]
        updates: TensorList = [local(p.grad) for p in parameters]
        if updates[0].dtype != momenta[0].dtype:
            gradients, updates = updates, [torch.empty_like(m) for m in momenta]
            torch._foreach_copy_(updates, gradients)
        if group["weight_decay"]:
            updates = torch._foreach_add(updates, weights, alpha=group["weight_decay"])
        torch._foreach_mul_(momenta, group["momentum"])
        if group["adapt"]:
            ratios = _trust_ratios(parameters[0], weights, updates, group["trust_coefficient"])
            torch._foreach_addcmul_(momenta, updates, ratios)
        else:
            torch._foreach_add_(momenta, updates)
        torch._foreach_add_(weights, momenta, alpha=-group["lr"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what state_dict() gave, the momenta in their own width."""
        super().load_state_dict(state_dict)
        # torch has just cast the state to the parameters' dtype, which rounds wider momenta.
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, own, strict=True):
            if p.dtype.itemsize < 4 and index in state_dict["state"]:
                momentum = state_dict["state"][index]["momentum_buffer"]
                self.state[p]["momentum_buffer"] = momentum.to(p.device, torch.float32)


def param_groups(learner: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups of a BYOL learner, for LARS and for every optimizer of torch.

    The first holds the weights, with `weight_decay`; the second, without decay and with
    `adapt=False`, which LARS reads and others ignore, the biases, the parameters of norms of any
    shape and library, scales and tokens (one axis, apart from axes of length 1), and what the
    network or a part of it names in `no_weight_decay()`, as timm's do their position embeddings.
    Neither holds the target, what is frozen (freeze before the call), or what
    `learner.ddp_ignored()` names. Call it after fully_shard, as any optimizer is built.

    Raises ValueError for a negative decay, or a module other than a BYOL learner.
    """
    _check_number("weight_decay", weight_decay, math.inf)
    source: Any = uncompiled(learner)
    if not is_learner(source):
        hint = "ddp.module" if hasattr(source, "module") else "BYOL(net, image_size)"
        raise ValueError(
            f"param_groups got a {type(source).__name__}; expected the BYOL learner. Pass {hint}."
        )
    unreached = set(source.ddp_ignored())
    trained = {
        name: parameter
        for name, parameter in source.named_parameters()
        if parameter.requires_grad and name not in unreached and not name.startswith("target.")
    }
    named = _named_by_network(source)
    weights = [p for name, p in trained.items() if name not in named and _decays(source, name, p)]
    decayed = set(map(id, weights))
    rest = [p for p in trained.values() if id(p) not in decayed]
    return [
        {"params": weights, "weight_decay": weight_decay, "adapt": True},
        {"params": rest, "weight_decay": 0.0, "adapt": False},
    ]


def _decays(root: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether the parameter is a weight, by the module that holds it."""
    holder, _, own = name.rpartition(".")
    module = root.get_submodule(holder)
    if parameter.ndim <= 1 or "bias" in own or _is_norm(module):
        return False
    # A scale (C, 1, 1) or a token (1, 1, D) is a vector; the weight of Linear(D, 1) is none.
    return own == "weight" or parameter.numel() > max(parameter.shape)


def _is_norm(module: nn.Module) -> bool:
    # By name, which holds for torch's too: those of timm, Hugging Face and others need not be there
    # and often subclass none of torch's. Not a NormedLinear, and no NormFreeNet, which has parts.
    names = [base.__name__.lower() for base in type(module).__mro__]
    named = any("norm" in name or name.endswith("grn") for name in names)
    parts = any(True for child in module.children() for _ in child.parameters())
    return named and not parts and not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)


def _named_by_network(root: nn.Module) -> set[str]:
    names: set[str] = set()
    for prefix, module in root.named_modules():
        named = getattr(module, "no_weight_decay", None)
        if callable(named):
            names.update(f"{prefix}.{name}" if prefix else name for name in named())
    return names


def warmup_cosine(
    step: int, total_steps: int, warmup_steps: int, peak: float, final: float = 0.0
) -> float:
    """The learning rate of optimizer step number `step` = 0, 1, ...

    It rises linearly from 0 at step 0 to `peak` at `warmup_steps`, falls by a half cosine to
    `final` at `total_steps`, and stays there (learning_schedule in byol/utils/schedules.py of
    deepmind-research; the paper's warm-up is 10 epochs). A function of the step alone, so a
    resumed run needs no scheduler's state.

    Raises ValueError unless 0 <= warmup_steps <= total_steps and step >= 0, and the rates are
    finite numbers of at least 0.
    """
    _check_number("peak", peak, math.inf)
    _check_number("final", final, math.inf)
    for name, count in (("warmup_steps", warmup_steps), ("total_steps", total_steps)):
        _check_number(name, count, math.inf)
    if not is_number(step) or not 0 <= step < math.inf or warmup_steps > total_steps:
        raise ValueError(
            f"step={step}, warmup_steps={warmup_steps}, total_steps={total_steps}; expected "
            "step >= 0 and 0 <= warmup_steps <= total_steps. A short trial run needs a shorter "
            "warm-up."
        )
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step >= total_steps:
        return final
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2


def scaled_lr(base: float, batch_size: int, reference: int = 256) -> float:
    """`base` x batch_size / reference: the linear scaling of the paper (section 3.3).

    `batch_size` counts all processes and accumulated batches of one optimizer step. It is a rule
    for SGD and LARS; Adam's usual one is the square root. Raises ValueError for a negative rate or
    batch, or a reference of 0.
    """
    _check_number("base", base, math.inf)
    _check_number("batch_size", batch_size, math.inf)
    _check_number("reference", reference, math.inf)
    if reference == 0:
        raise ValueError("reference=0; expected the batch size that `base` is for, such as 256.")
    return base * batch_size / reference


def scaled_decay(decay: float, ratio: float) -> float:
    """`decay` ** ratio: the EMA decay for a batch `ratio` times the one that `decay` was tuned for.

    So the target forgets at the same pace per image (arXiv 2307.13813, section 3). Scale the
    learning rate along with it. Raises ValueError unless 0 <= decay <= 1 and ratio > 0.
    """
    numbers = is_number(decay) and is_number(ratio)
    if not numbers or not 0 <= decay <= 1 or not 0 < ratio < math.inf:
        raise ValueError(
            f"decay={decay!r}, ratio={ratio!r}; expected a decay in [0, 1] and a positive ratio. "
            "Give the batch size over the one that the decay was tuned for."
        )
    return float(decay**ratio)


def _check_number(name: str, value: Any, limit: float) -> None:
    if not is_number(value) or not 0 <= value < limit:
        bound = "a finite number >= 0" if limit == math.inf else f"a number in [0, {limit:g})"
        raise ValueError(
            f"{name}={value!r}; expected {bound}. Pass {name}= in this range, as a Python float."
        )


def _alike(parameters: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    # foreach takes its fast path over lists of one device and dtype; a mesh and its placements
    # say over which processes a norm is to be summed.
    lists: dict[Any, list[Tensor]] = {}
    held: Counter[Any] = Counter()
    for p in parameters:
        assert p.grad is not None
        kind = (p.device, p.dtype, p.grad.dtype, *_sharding(p))
        part = 0
        if p.device.type == "cpu":
            # Lists that fit its cache, large tensors alone: one list would cost twice as much.
            large = p.numel() >= CACHED
            part = id(p) if large else held[kind] // CACHED
            held[kind] += 0 if large else p.numel()
        lists.setdefault((kind, part), []).append(p)
    return lists.values()


def _sharding(p: Any) -> tuple[Any, Any]:
    return getattr(p, "device_mesh", None), getattr(p, "placements", None)


def _trust_ratios(
    example: Any, weights: TensorList, updates: TensorList, coefficient: float
) -> list[Tensor]:
    """coefficient |w| / |u| of each pair as 0-d tensors on the device; 1 where a norm is 0."""
    dtype = updates[0].dtype
    norms = torch.stack([*_norms(weights, dtype), *_norms(updates, dtype)]).view(2, -1)
    mesh = getattr(example, "device_mesh", None)
    if mesh is not None:
        norms = norms.square_()
        for axis, placement in enumerate(example.placements):
            if not placement.is_replicate():
                dist.all_reduce(norms, group=mesh.get_group(axis))
        norms = norms.sqrt_()
    of_weights, of_updates = norms
    ratios = coefficient * of_weights / of_updates
    return list(torch.where((of_weights > 0) & (of_updates > 0), ratios, 1.0).unbind())


def _norms(tensors: TensorList, dtype: torch.dtype) -> TensorList:
    if len(tensors) > 1:
        return torch._foreach_norm(tensors, 2, dtype=dtype)
    # On a CPU foreach takes a norm in one thread, and the threads that write the weights next fetch
    # them from its core, which costs several times the norm. Norms of rows avoid that.
    rows = torch.linalg.vector_norm(tensors[0], dim=tuple(range(1, tensors[0].ndim)), dtype=dtype)
    return [torch.linalg.vector_norm(rows)]
