"""Reads a network's representation (B, D) through a tap that leaves the network as it is.

Which layer that is, and how its output is pooled, is found out by locate.py.
"""

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from byol_pytorch.inputs import call, given, tensors
from byol_pytorch.parallel import is_sharded, uncompiled

Pool = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Place:
    """Where a network's representation is: what of which layer, pooled how.

    `take` is "input" or "output" of the layer with the dotted name `layer`, the output of the
    "net" itself, or the result of timm's two public "methods". `pool` runs at the layer, which may
    be inside a gradient checkpoint or before a change in place, so it must keep no tensor for the
    backward; `finish`, a user's callable, runs on what it gave when the network is done.
    """

    take: Literal["input", "output", "net", "methods"]
    layer: str
    pool: Pool
    droppable: bool = False  # the target works without the layer, as a probe has shown
    finish: Pool | None = None


class Tap:
    """Holds one layer's input or output while its own learner's forward runs.

    It knows nothing of the learner, does nothing when anybody else calls the network, also at
    the same time in another thread, and is empty when copied or pickled.
    """

    def __init__(self) -> None:
        self.pool: Pool | None = None  # None: disarmed
        self.finish: Pool | None = None
        self.thread: int | None = None  # armed for this thread; None: for whoever calls
        self.value: Tensor | None = None
        self.runs = 0

    def __reduce__(self) -> tuple[type["Tap"], tuple[()]]:
        return Tap, ()

    def armed(self) -> bool:
        if self.pool is None:
            return False
        # A compiler cannot ask for the thread, and compiles for one at a time.
        return torch.compiler.is_compiling() or self.thread in (None, threading.get_ident())

    def take_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.pool is not None and self.armed():
            self.value, self.runs = self.pool(given(args, kwargs)), self.runs + 1

    def take_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.pool is not None and self.armed():
            self.value, self.runs = self.pool(output), self.runs + 1

    def give(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """On the root: what the network returns while armed is the pooled representation.

        FSDP2 hangs its backward on what a module returns, so the loss must be made of that.
        """
        if not self.armed() or self.runs != 1:
            return output
        return self.value if self.finish is None else self.finish(self.value)


class Hooks(OrderedDict[int, Any]):
    """A module's hooks. Its copies, its pickles and its TorchScript get all of them but the taps.

    torch calls hooks by items() and compiles them to TorchScript by values(). Copied or pickled,
    this is a plain OrderedDict, so that a saved network loads without this library.
    """

    def values(self) -> Any:
        return [hook for hook in super().values() if not _is_tap(hook)]

    def __reduce__(self) -> Any:
        kept = [(key, hook) for key, hook in self.items() if not _is_tap(hook)]
        return OrderedDict, (), None, None, iter(kept)


class Representation:
    """Reads the representation that `place` describes off `net`, which is called as usual.

    The hooks are removed together with this object, and are in no copy or pickle of the network:
    of a copied Representation only its place is left, with which its owner makes a new one.
    Calls from several threads wait for each other.
    """

    def __init__(self, net: nn.Module, place: Place) -> None:
        self.place, self.tap, self.lock = place, Tap(), threading.RLock()
        root = uncompiled(net)
        layer = root.get_submodule(place.layer)
        for module in (root, layer):
            _hide_taps(module)
        self.handles = []
        if place.take == "input":
            hook = layer.register_forward_pre_hook(self.tap.take_input, with_kwargs=True)
            self.handles.append(hook)
            # Any value means True to torch; this one is hidden with the hook.
            layer._forward_pre_hooks_with_kwargs[hook.id] = self.tap.take_input  # type: ignore
        elif place.take in ("output", "net"):
            self.handles.append(layer.register_forward_hook(self.tap.take_output))
        if place.take != "methods":
            self.handles.append(root.register_forward_hook(self.tap.give))

    def __del__(self) -> None:
        for handle in getattr(self, "handles", ()):
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place}

    def __call__(self, net: nn.Module, inputs: Any) -> Tensor:
        """(B, D) of `inputs`. Raises RuntimeError where the layer did not run exactly once."""
        if self.place.take == "methods":
            return self.place.pool(timm_methods(net, inputs))
        if torch.compiler.is_compiling():
            return self._read(net, inputs)
        with self.lock:
            self.tap.thread = threading.get_ident()
            return self._read(net, inputs)

    def _read(self, net: nn.Module, inputs: Any) -> Tensor:
        self.tap.pool, self.tap.finish = self.place.pool, self.place.finish
        try:
            result: Tensor = call(net, inputs)
            runs = self.tap.runs
        finally:
            self.tap.pool, self.tap.finish, self.tap.value, self.tap.runs = None, None, None, 0
            self.tap.thread = None
        if runs != 1:
            self._refuse(net, runs)
        return result

    def _refuse(self, net: nn.Module, runs: int) -> NoReturn:
        layer = uncompiled(net).get_submodule(self.place.layer)
        hooks = (*layer._forward_hooks.items(), *layer._forward_pre_hooks.items())
        if not any(getattr(hook, "__self__", None) is self.tap for _, hook in hooks):
            raise RuntimeError(
                f"Layer {self.place.layer!r}, where the representation is taken, was replaced "
                "after BYOL was built, as nn.SyncBatchNorm.convert_sync_batchnorm does: convert "
                "first, then wrap."
            )
        raise RuntimeError(runs_message(self.place.layer, runs))


def copy_for_target(net: nn.Module, place: Place) -> nn.Module:
    """A deep copy of `net` without taps, and without the head that its representation skips."""
    root = uncompiled(net)
    # A deepcopy refuses what has a history: weights that torch.nn.utils.weight_norm computes anew
    # in each forward, features that a network keeps.
    memo: dict[int, Any] = {
        id(x): x.detach().clone()
        for module in root.modules()
        for held in vars(module).values()
        for x in tensors(held)
        if not x.is_leaf
    }
    if place.droppable:
        memo[id(root.get_submodule(place.layer))] = nn.Identity()
    try:
        twin = copy.deepcopy(root, memo)
    except Exception as error:
        raise TypeError(
            f"The EMA target is a deep copy of the network, but {type(net).__name__} cannot be "
            f"deep-copied ({type(error).__name__}: {error}). Remove what holds files, locks, "
            "non-leaf tensors or generators from its attributes, or give use_momentum=False."
        ) from error
    for module in twin.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [k for k, hook in hooks.items() if _is_tap(hook)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    return twin


def timm_methods(net: nn.Module, images: Tensor) -> Tensor:
    """The pooled feature by timm's public interface, for models without one plain classifier.

    Raises RuntimeError where the network is an FSDP unit of its own: its methods would then run
    on sharded parameters.
    """
    network: Any = net
    if is_sharded(net):
        raise RuntimeError(
            f"{type(net).__name__}'s representation comes from its methods forward_features and "
            "forward_head, which fully_shard(net) does not cover. Shard its blocks and the "
            "learner, or name a layer with hidden_layer=."
        )
    return network.forward_head(network.forward_features(images), pre_logits=True)


def check_gradient(
    representation: Tensor, net: nn.Module, place: Place, unreached: Collection[str] = ()
) -> None:
    """Raise RuntimeError where what reaches the representation trains but it has no gradient.

    `unreached` names the parameters of `net` that do not reach it.
    """
    if not torch.is_grad_enabled() or representation.requires_grad:
        return
    named = uncompiled(net).named_parameters()
    if any(p.requires_grad and name not in unreached for name, p in named):
        raise RuntimeError(
            f"The representation, taken at layer {place.layer!r}, carries no gradient although "
            "the network trains: the layer runs under no_grad or inside a reentrant checkpoint. "
            "Use torch.utils.checkpoint with use_reentrant=False, or name a layer outside of it."
        )


def runs_message(layer: str, runs: int) -> str:
    """Why a layer that did not run exactly once cannot be the representation."""
    if runs == 0:
        return (
            f"Layer {layer!r} did not run in the network's forward, so there is no representation. "
            "Name another with hidden_layer=; if the network was already compiled and called, "
            "build BYOL first and compile the learner."
        )
    return (
        f"Layer {layer!r} ran {runs} times in one forward, so it is not clear which run is the "
        "representation. Name a layer that runs once with hidden_layer=."
    )


def _hide_taps(module: nn.Module) -> None:
    # Hooks that are there already stay where they are, or their handles could not remove them.
    # Then the tap is copied along, empty.
    if not module._forward_hooks:
        module._forward_hooks = Hooks()
    if not module._forward_pre_hooks:
        module._forward_pre_hooks = Hooks()
        module._forward_pre_hooks_with_kwargs = Hooks()


def _is_tap(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), Tap)
