"""CUDA on a machine without one: tensors that are fake, and a watch on what would wait for a GPU.

Under FakeTensorMode shapes, dtypes and devices are true and values are none: .item() and its like
raise, and so do most mixtures of devices. The watch names what passes there in silence. Backward
passes do not run over fake CUDA tensors: without a driver autograd's engine stops.
"""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SOURCES = str(Path(__file__).parents[1] / "src")
# Operations that ask the device for a result before they go on, whatever their arguments.
WAITING = {
    "_linalg_svd", "_linalg_eigh", "linalg_qr", "linalg_cholesky_ex", "_unique2", "unique_dim",
    "unique_consecutive", "equal", "bincount", "histc", "repeat_interleave", "multinomial",
    "masked_select", "nonzero", "_local_scalar_dense",
}  # fmt: skip
READING = {"cpu", "tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


def why_not() -> str:
    """Why fake CUDA tensors are of no use here; empty where they are."""
    if not torch.backends.cuda.is_built():
        return "torch was built without CUDA"
    try:
        with FakeTensorMode():
            torch.empty(2, 2, device="cuda")[:, 0]
    except RuntimeError:  # of torch 2.9, whose indexing asks the driver for the device
        return f"torch {torch.__version__} does not index fake CUDA tensors without a driver"
    return ""


@contextlib.contextmanager
def fake_cuda() -> Iterator[list[str]]:
    """What would wait for a GPU, as it is done: made with device="cuda", tensors are fake ones."""
    found: list[str] = []
    # What a module holds beside parameters and buffers is a real tensor, on the CPU.
    with FakeTensorMode(allow_non_fake_inputs=True), Operations(found), Calls(found):
        yield found


def to_cuda(
    module: nn.Module, memory_format: torch.memory_format = torch.contiguous_format
) -> nn.Module:
    """The module with fake CUDA weights of the same shapes; within fake_cuda()."""

    def move(t: Tensor) -> Tensor:
        made = torch.empty(t.shape, dtype=t.dtype, device="cuda")
        return made.to(memory_format=memory_format) if t.ndim == 4 else made

    return module._apply(move)


def give_gradients(module: nn.Module) -> None:
    for p in module.parameters():
        if p.requires_grad:
            p.grad = torch.empty_like(p)


class Operations(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        devices = {x.device.type for x in given}
        if name in ("_to_copy", "copy_"):
            target = torch.device(kwargs.get("device") or given[0].device).type
            non_blocking = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
            if devices | {target} == {"cpu", "cuda"} and not non_blocking:
                note(self.found, f"{name} between {given[-1].device.type} and {target}")
        elif name in WAITING and "cuda" in devices:
            note(self.found, name)
        elif name in INDEXING and "cuda" in devices:
            if any(
                x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1]) if x is not None
            ):
                note(self.found, f"{name} by a mask")
            if "cpu" in devices:
                note(self.found, f"{name} by an index on the CPU")
        elif len(devices) > 1 and any(x.ndim for x in given if x.device.type == "cpu"):
            note(self.found, f"{name} of tensors on {sorted(devices)}")
        return func(*args, **kwargs)


class Calls(TorchFunctionMode):
    """Tensors made of Python values on the device, which copies them, and read ones."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("tensor", "new_tensor", "as_tensor", "scalar_tensor"):
            values = args[-1] if args else (kwargs or {}).get("data")
            if out.device.type == "cuda" and not isinstance(values, Tensor):
                note(self.found, f"{name} of Python values")
        if name in READING and isinstance(args[0], Tensor) and args[0].device.type == "cuda":
            note(self.found, name)
        return out


def note(found: list[str], what: str) -> None:
    lines = [f for f in traceback.extract_stack() if f.filename.startswith(SOURCES)]
    where = f" at {Path(lines[-1].filename).name}:{lines[-1].lineno}" if lines else ""
    found.append(what + where)
