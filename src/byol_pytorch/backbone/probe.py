"""One look at a network that leaves no trace: what it takes, and what runs in its forward."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from byol_pytorch.backbone.undisturbed import undisturbed
from byol_pytorch.inputs import call, copied, fresh, given, map_tensors, tensors
from byol_pytorch.parallel import REPLICATED, is_sharded, uncompiled

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def check_network(net: Any) -> None:
    """Raise TypeError, ValueError or RuntimeError unless `net` is a bare, trainable module."""
    if not isinstance(net, nn.Module):
        raise TypeError(
            f"net is a {type(net).__name__}; expected a torch.nn.Module, such as "
            'timm.create_model("resnet50") (the model, not its name or class).'
        )
    if isinstance(net, REPLICATED) or is_sharded(net):
        raise TypeError(
            f"net is already a {type(net).__name__}; expected the bare network. Build BYOL first, "
            "then wrap the learner: DDP(learner) or fully_shard(learner)."
        )
    if not any(p.is_floating_point() for p in net.parameters()):
        raise ValueError(
            f"net ({type(net).__name__}) has no floating-point parameters; expected a network "
            "with weights to train."
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "BYOL was called under torch.inference_mode(), where no layer that is made can train. "
            "Build it outside of it."
        )
    scripted = [name for name, m in net.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise TypeError(
            f"net is TorchScript{f' in its layer {scripted[0]!r}' if scripted[0] else ''}, whose "
            "layers cannot be observed; expected the plain nn.Module. Train that with BYOL, then "
            "torch.jit.script(net)."
        )
    quantised = [type(module).__name__ for module in net.modules() if _quantises(module)]
    if quantised:
        raise TypeError(
            f"net is quantised or prepared for it: it holds {len(quantised)} modules such as a "
            f"{quantised[0]}; expected the plain float network. Train it with BYOL first, then "
            "prepare and quantise net."
        )


def _quantises(module: nn.Module) -> bool:
    # By name: torchao, whose classes are meant too, need not be there.
    return any(
        base.__name__.startswith("FakeQuantize")
        or base.__name__ in ("ObserverBase", "WeightedQuantizedModule")
        for base in type(module).__mro__
    )


def check_example(example: Any) -> None:
    """Raise TypeError for an example_input without tensors, ValueError for one without a batch."""
    if example is None:
        return
    held = tensors(example)
    if not held:
        raise TypeError(
            f"example_input is a {type(example).__name__} without tensors; expected a tensor, or "
            "a flat tuple or mapping of tensors, batch first. Convert arrays by torch.from_numpy."
        )
    if any(x.ndim == 0 or x.shape[0] == 0 for x in held):
        shapes = ", ".join(str(tuple(x.shape)) for x in held)
        raise ValueError(
            f"example_input has shape {shapes}; expected at least 1 sample in axis 0 of each "
            "tensor. Put a batch axis in front: x[None]."
        )


def probe_inputs(net: nn.Module, size: tuple[int, int] | None, example: Any) -> Any:
    """Two images of noise that the network takes, or `example`, on its device and in its dtype.

    The channel count is the first convolution's, else what a first Linear's width allows. Raises
    TypeError, ValueError or RuntimeError for what is no bare network with weights to train, an
    example without tensors or a batch, and where the network takes no such input.
    """
    check_network(net)
    check_example(example)
    net = uncompiled(net)
    parameter = next(p for p in net.parameters() if p.is_floating_point())
    if example is not None:
        candidates = [
            map_tensors(
                lambda x: x.to(parameter if x.is_floating_point() else parameter.device), example
            )
        ]
    else:
        assert size is not None
        # Every kind of default, of device and of dtype, is set around some user's construction.
        generator = torch.Generator("cpu").manual_seed(0)
        plain: Any = {"device": "cpu", "dtype": torch.float32, "generator": generator}
        candidates = [
            torch.rand(2, channels, *size, **plain).to(parameter)
            for channels in _input_channels(net, size)
        ]
    first: Exception | None = None
    for inputs in candidates:
        try:
            with undisturbed(net), torch.no_grad():
                call(net, fresh(inputs))
            return inputs
        except Exception as error:  # whatever a foreign forward raises
            first = first or error
    shapes = " or ".join(str([tuple(x.shape) for x in tensors(c)])[1:-1] for c in candidates)
    raise ValueError(
        f"{type(net).__name__} does not take an input of shape {shapes}: "
        f"{type(first).__name__}: {first}. Give the image_size that it was built for, or "
        "example_input= with an input that it takes."
    ) from first


def check_other_size(
    net: nn.Module, read: Callable[[nn.Module, Any], Tensor], probe: Tensor, size: tuple[int, int],
    width: int,
) -> None:  # fmt: skip
    """Raise ValueError unless `read` gives `width` features also of images of `size`."""
    cause, found = None, ""
    net = uncompiled(net)
    with undisturbed(net), torch.no_grad():
        try:
            features = read(net, nn.functional.interpolate(probe, size))
            if features.shape[1] != width:
                found = f"gives {features.shape[1]} features of them, and {width}"
        except Exception as error:  # whatever a foreign forward raises
            cause, found = error, f"fails on them ({type(error).__name__}: {error}), and not"
    if found:
        raise ValueError(
            f"Local views are of {size} pixels: {type(net).__name__} {found} of "
            f"{tuple(probe.shape[2:])}. Build it for several sizes (timm's ViTs: "
            "dynamic_img_size=True), or give local_size= that of its images."
        ) from cause


def _input_channels(net: nn.Module, size: tuple[int, int]) -> list[int]:
    found: list[int] = []
    for module in net.modules():
        if isinstance(module, _CONVOLUTIONS):
            found.append(module.in_channels)
            break
        if isinstance(module, nn.Linear):
            if module.in_features % (size[0] * size[1]) == 0:
                found.append(module.in_features // (size[0] * size[1]))
            break
    configured = getattr(getattr(net, "config", None), "num_channels", None)
    found += [configured] if isinstance(configured, int) else []
    return list(dict.fromkeys([c for c in found if c > 0] + [3, 1]))


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode, and every module in its own mode afterwards."""
    modes = [(module, module.training) for module in net.modules()]
    try:
        net.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Channels(NamedTuple):
    """How many channels the last layer with weights gave, and on which axis: 1, -1 or unknown."""

    width: int
    axis: int | None


@dataclass(frozen=True)
class Seen:
    """What a module was given in a forward, and the channels of it as far as they are known."""

    name: str
    value: Any
    channels: Channels | None


def drawing(net: nn.Module, inputs: Any) -> frozenset[str]:
    """Names of the modules that draw random numbers in training, outside of their submodules.

    So do dropout and stochastic depth, by whatever name, and functional dropout. Only torch's
    generators are looked at. Empty where the network cannot run in training mode.
    """
    found: set[str] = set()
    running: list[str] = []
    cuda = sorted({p.device.index for p in net.parameters() if p.device.type == "cuda"})

    def state() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in cuda)]

    last = state()

    def look() -> None:
        nonlocal last
        now = state()
        if running and not all(map(torch.equal, last, now)):
            found.add(running[-1])
        last = now

    def before(name: str, *_: Any) -> None:
        look()
        running.append(name)

    def after(*_: Any) -> None:
        look()
        running.pop()

    # What was compiled runs eagerly; where nothing was, the compiler's import costs seconds.
    compiler = "torch._dynamo" in sys.modules
    eagerly = torch.compiler.set_stance("force_eager") if compiler else nullcontext()
    try:
        with undisturbed(net), torch.no_grad(), eagerly, _hooked(net, before, after, first=True):
            for module in net.modules():
                # Batch norm draws nothing, and a synchronised one would wait for other processes.
                module.training = not isinstance(module, nn.modules.batchnorm._BatchNorm)
            call(net, fresh(inputs))
    except Exception:  # whatever a foreign forward raises
        return frozenset()
    return frozenset(found)


@contextmanager
def _hooked(
    net: nn.Module, before: Callable[..., None], after: Callable[..., None], *, first: bool
) -> Iterator[None]:
    """`before` and `after` each module's forward, called with its name, itself and what it takes.

    `first`: before the module's own pre-hooks.
    """
    handles = []
    try:
        for name, module in net.named_modules():
            hook = partial(before, name)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first))
            handles.append(module.register_forward_hook(partial(after, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class Trace:
    """Records a forward through temporary hooks: what ran how often, and the last head."""

    def __init__(self, root: nn.Module, layer: str | None = None) -> None:
        self.root, self.layer = root, layer
        self.runs: dict[str, int] = {}
        self.inputs: dict[int, Seen] = {}
        self.head: Seen | None = None  # the last Linear, convolution, or placeholder for one
        self.channels: Channels | None = None
        self.tapped: tuple[Any, Channels | None] = (None, None)
        self.output: Any = None
        self._head_output: Any = None
        self._head_is_last = False

    def run(self, inputs: Any) -> None:
        with _hooked(self.root, self._before, self._after, first=False):
            self.output = call(self.root, fresh(inputs))

    def ends_in_head(self, exactly: bool) -> bool:
        """Whether the network returns (B, classes), which its last head gives.

        With `exactly` the head's own output; else layers without weights may have changed it.
        """
        made, returned = self._head_output, tensors(self.output)
        if not isinstance(made, Tensor) or not returned or returned[0].ndim != 2:
            return False
        if not exactly:
            return self._head_is_last
        same_memory = returned[0].data_ptr() == made.data_ptr()
        return same_memory and returned[0].numel() == made.numel()

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.runs[name] = self.runs.get(name, 0) + 1
        self.inputs[id(module)] = Seen(name, given(args, kwargs), self.channels)

    def _after(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        is_head = isinstance(module, (nn.Linear, *_CONVOLUTIONS)) or _is_empty(module)
        if name and is_head:
            seen, own = self.inputs[id(module)], _channels_in(module)
            self.head = Seen(name, seen.value, own or seen.channels)
            self._head_output, self._head_is_last = output, True
        elif module._parameters and not module._modules:
            self._head_is_last = False
        self.channels = _channels_out(module, output) or self.channels
        if name == self.layer:
            self.tapped = (copied(output), self.channels)


def _is_empty(module: nn.Module) -> bool:
    # What users put where a classifier was: nn.Identity() or an empty nn.Sequential().
    return isinstance(module, nn.Identity) or (type(module) is nn.Sequential and len(module) == 0)


def _channels_in(module: nn.Module) -> Channels | None:
    if isinstance(module, nn.Linear):
        return Channels(module.in_features, -1)
    return Channels(module.in_channels, 1) if isinstance(module, _CONVOLUTIONS) else None


def _channels_out(module: nn.Module, output: Any) -> Channels | None:
    if isinstance(module, nn.Linear):
        return Channels(module.out_features, -1)
    weight = module._parameters.get("weight")
    count = getattr(module, "out_channels", None)
    if not isinstance(count, int):  # a norm
        count = weight.shape[0] if weight is not None and weight.ndim == 1 else None
    if weight is None or count is None or not isinstance(output, Tensor) or output.ndim < 2:
        return None
    if output.shape[1] != count and output.shape[-1] == count:
        return Channels(count, -1)
    if output.shape[1] == output.shape[-1] and type(module) is nn.LayerNorm:
        return Channels(count, -1)
    return Channels(count, 1)
