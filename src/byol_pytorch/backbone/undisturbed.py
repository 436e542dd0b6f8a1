"""Runs a network and puts back what that changed: objects, their contents, the random states.

probe.py decides what is run, locate.py what it shows.
"""

import random
import sys
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import CellType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

Undo = Callable[[], Any]

_UNINITIALISED = (UninitializedParameter, UninitializedBuffer)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NOTHING_INSIDE = (int, float, complex, str, bytes, type, type(None), ModuleType)
_OWN_ATTRIBUTES = frozenset(vars(nn.Module()))
# Objects of these hold locks, files and caches, not what a network keeps.
_LIBRARIES = (sys.stdlib_module_names | {"torch", "numpy"}) - {"collections", "types", "argparse"}
_MISSING = object()


@contextmanager
def undisturbed(net: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Evaluation or training mode, gradients for every float parameter, no autocast.

    Afterwards all is as it was: the network's tensors, modes and attributes; the dicts, lists,
    sets, deques, arrays, random generators and plain objects that it reaches, the same objects
    with the same contents; the objects that its hooks reach, but not the values of their tensors;
    and the random states of torch, numpy and Python. Left alone are globals, attributes of
    classes, iterators, and the objects of torch and of Python's library (files, loggers).

    Layers and parameters that a first forward makes stay, and the random states then stay where
    their initialisation has moved them. In training mode batch norm stays in evaluation, where it
    needs no second image and waits for no other process.
    """
    made, random_states, undo = _made(net), _random_states(net), _undo(net)
    floats = [p for p in net.parameters() if p.is_floating_point()]
    try:
        with ExitStack() as stack, torch.enable_grad():
            for kind in {p.device.type for p in floats} - {"meta"}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            net.train(training)
            for module in net.modules():
                if training and isinstance(module, _BATCH_NORMS):
                    module.training = False
            for parameter in floats:
                if not isinstance(parameter, _UNINITIALISED):
                    parameter.requires_grad_()
            yield
    finally:
        with torch.no_grad():
            for action in undo if made != _made(net) else undo + random_states:
                action()


def _made(net: nn.Module) -> set[str]:
    return {name for name, p in net.named_parameters() if not isinstance(p, _UNINITIALISED)}


def _random_states(net: nn.Module) -> list[Undo]:
    states: list[Undo] = [
        partial(torch.set_rng_state, torch.get_rng_state()),
        partial(random.setstate, random.getstate()),
    ]
    cuda = {p.device for p in net.parameters() if p.device.type == "cuda"}
    states += [partial(torch.cuda.set_rng_state, torch.cuda.get_rng_state(d), d) for d in cuda]
    if (np := sys.modules.get("numpy")) is not None:
        states.append(partial(np.random.set_state, np.random.get_state()))
    return states


def _undo(net: nn.Module) -> list[Undo]:
    """The actions that put back all that `net` reaches; what only its hooks reach comes last."""
    undo: list[Undo] = []
    seen: dict[int, Any] = {}  # alive, so that no other object gets its id
    hooks: list[Any] = []
    for of_hooks, todo in ((False, [net]), (True, hooks)):
        while todo:
            x = todo.pop()
            if isinstance(x, _NOTHING_INSIDE) or id(x) in seen:
                continue
            seen[id(x)] = x
            if isinstance(x, nn.Module):
                todo.extend(_of_module(x, undo))
                hooks.extend(_hooks(x))
            elif isinstance(x, Tensor):
                # A hook may be the method of a trainer, which holds data sets.
                undo.extend([] if of_hooks else _of_tensor(x))
            else:
                todo.extend(_of_object(x, undo))
    return undo


def _of_module(module: nn.Module, undo: list[Undo]) -> list[Any]:
    """Append what puts `module` back to `undo`; returns what it holds."""
    undo.append(partial(setattr, module, "training", module.training))
    if isinstance(module, torch.jit.ScriptModule):  # its attributes are not Python's
        return [*module.parameters(), *module.buffers()]
    own = vars(module)
    kept = {k: v for k, v in own.items() if k not in _OWN_ATTRIBUTES}
    parameters, children = dict(module._parameters), dict(module._modules)
    # What its first forward writes into a lazy module must last.
    lazy = isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()

    def put_back() -> None:
        made = _keep_made(module._parameters, parameters) | _keep_made(module._modules, children)
        if not lazy:
            for key in own.keys() - kept.keys() - _OWN_ATTRIBUTES:
                del own[key]
            own.update({k: v for k, v in kept.items() if k not in made})

    undo.append(put_back)
    held = [module._buffers, module._non_persistent_buffers_set]
    return [*held, *kept.values(), *parameters.values(), *children.values()]


def _keep_made(held: dict[str, Any], before: dict[str, Any]) -> set[str]:
    made = {k for k, v in held.items() if v is not None and before.get(k) is None}
    held.update({k: v for k, v in before.items() if k not in made})
    return made


def _hooks(module: nn.Module) -> list[Any]:
    held = [v for k, v in vars(module).items() if k in _OWN_ATTRIBUTES and "hooks" in k]
    return [hook for hooks in held if isinstance(hooks, dict) for hook in hooks.values()]


def _of_tensor(x: Tensor) -> list[Undo]:
    plain = type(x).__torch_dispatch__ is Tensor.__torch_dispatch__  # no tensor made of tensors
    if not plain or x.is_meta or x.layout != torch.strided or isinstance(x, _UNINITIALISED):
        return []
    alias = x.detach()  # keeps the storage that `x.data = ...` would drop
    value, requires_grad = alias.clone(), x.requires_grad

    def put_back() -> None:
        if not _same_memory(x, alias):
            x.data = alias
        # Compared first: a write would spoil the backward of a graph that the user still holds.
        if not torch.equal(alias, value):
            x.copy_(value)
        if x.is_leaf and x.requires_grad != requires_grad:
            x.requires_grad_(requires_grad)

    return [put_back]


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _of_object(x: Any, undo: list[Undo]) -> list[Any]:
    """Append what puts the contents of `x` back to `undo`; returns what it holds."""
    library = type(x).__module__.partition(".")[0] in _LIBRARIES
    if isinstance(x, dict):
        pairs = list(_kind(x).items(x))
        undo.append(partial(_refill, x, pairs))
        inner = [part for pair in pairs for part in pair]
    elif isinstance(x, (list, deque, set)):
        inner = list(x)
        undo.append(partial(_put, x, inner))
    elif isinstance(x, (tuple, frozenset)):
        inner = list(x)
    elif isinstance(x, (bytearray, array)):
        undo.append(partial(x.__setitem__, slice(None), x[:]))
        return []
    elif isinstance(x, CellType):
        return _of_cell(x, undo)
    elif isinstance(x, (FunctionType, MethodType, partial)):
        return _of_function(x)
    elif library:
        undo.extend(_of_generator_or_array(x))
        return []
    else:
        inner = []
    if not library:
        own = getattr(x, "__dict__", None)
        inner += [own] if isinstance(own, dict) else []
        inner += _of_slots(x, undo)
    return inner


def _refill(x: dict[Any, Any], pairs: list[tuple[Any, Any]]) -> None:
    kind = _kind(x)
    now = list(kind.items(x))
    if len(now) == len(pairs) and all(
        a[0] is b[0] and a[1] is b[1] for a, b in zip(now, pairs, strict=True)
    ):
        return
    kind.clear(x)
    for key, value in pairs:
        kind.__setitem__(x, key, value)


def _kind(x: dict[Any, Any]) -> Any:
    # Not the methods of a subclass: a Counter's update counts, a ModelOutput sets attributes.
    return OrderedDict if isinstance(x, OrderedDict) else dict


def _put(x: Any, contents: list[Any]) -> None:
    if len(x) == len(contents) and all(a is b for a, b in zip(x, contents, strict=True)):
        return
    x.clear()
    x.update(contents) if isinstance(x, set) else x.extend(contents)


def _of_cell(cell: CellType, undo: list[Undo]) -> list[Any]:
    try:
        contents = cell.cell_contents
    except ValueError:  # not filled yet
        return []
    undo.append(partial(setattr, cell, "cell_contents", contents))
    return [contents]


def _of_function(x: Any) -> list[Any]:
    if isinstance(x, MethodType):
        return [x.__self__, x.__func__]
    if isinstance(x, partial):
        return [x.func, x.args, x.keywords]
    if (x.__module__ or "").partition(".")[0] in _LIBRARIES:
        return []
    return [*(x.__closure__ or ()), x.__defaults__, x.__kwdefaults__, vars(x)]


def _of_slots(x: Any, undo: list[Undo]) -> list[Any]:
    inner = []
    for kind in type(x).__mro__:
        slots = vars(kind).values() if "__slots__" in vars(kind) else ()
        for slot in [s for s in slots if isinstance(s, MemberDescriptorType)]:
            value = getattr(x, slot.__name__, _MISSING)
            undo.append(partial(_put_slot, x, slot, value))
            inner.append(value)
    return inner


def _put_slot(x: Any, slot: MemberDescriptorType, value: Any) -> None:
    if value is not _MISSING:
        slot.__set__(x, value)
    elif hasattr(x, slot.__name__):
        slot.__delete__(x)


def _of_generator_or_array(x: Any) -> list[Undo]:
    if isinstance(x, torch.Generator):
        return [partial(x.set_state, x.get_state())]
    if isinstance(x, random.Random) and not isinstance(x, random.SystemRandom):
        return [partial(x.setstate, x.getstate())]
    np: Any = sys.modules.get("numpy")
    if np is None:
        return []
    if isinstance(x, np.ndarray) and x.flags.writeable and not isinstance(x, np.memmap):
        return [partial(np.copyto, x, x.copy())]
    if isinstance(x, np.random.RandomState):
        return [partial(x.set_state, x.get_state())]
    if isinstance(x, np.random.Generator):
        return [partial(setattr, x.bit_generator, "state", x.bit_generator.state)]
    return []
