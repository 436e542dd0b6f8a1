"""Files as other projects write them, without those projects installed."""

import contextlib
import pickle
import sys
import types
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

LAYOUTS = Path(__file__).parent / "layouts"


def layout(name: str) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a published file, as its project's definition has them."""
    lines = (LAYOUTS / f"{name}.txt").read_text().splitlines()
    entries = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {
        key: () if size == "-" else tuple(int(n) for n in size.split("x")) for key, size in entries
    }


def marked(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A tensor for each name, each of a value of its own; small files, since all are expanded."""
    counters = ("num_batches_tracked", "steps", "queue_ptr")
    return {
        name: (torch.tensor(i) if name.endswith(counters) else torch.tensor(i + 0.5)).expand(shape)
        for i, (name, shape) in enumerate(shapes.items(), start=1)
    }


@contextlib.contextmanager
def installed(*paths: str) -> Iterator[list[type]]:
    """Classes under full names of packages, installed or not, for as long as the block."""
    classes, before = [], set(sys.modules)
    held: list[tuple[types.ModuleType, str, Any]] = []
    for path in paths:
        module, _, name = path.rpartition(".")
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            package = ".".join(parts[:end])
            sys.modules.setdefault(package, types.ModuleType(package))
        classes.append(type(name, (), {"__module__": module}))
        held.append((sys.modules[module], name, getattr(sys.modules[module], name, None)))
        setattr(sys.modules[module], name, classes[-1])
    try:
        yield classes
    finally:
        for holder, name, original in held:
            setattr(holder, name, original)
        for name in set(sys.modules) - before:
            del sys.modules[name]


def write_mmengine(state_dict: dict[str, Tensor], path: Path, *, zipped: bool = True) -> None:
    """A checkpoint of mmengine's Runner: meta and message_hub hold more than tensors.

    mmengine/runner/runner.py and mmengine/logging/history_buffer.py.
    """
    with installed("mmengine.logging.history_buffer.HistoryBuffer") as (buffer,):
        history = buffer()
        history.__dict__.update(max_length=1000000, _log_history=np.array([4.0, 3.5]),
                                _count_history=np.array([1, 1]))  # fmt: skip
        meta = {"epoch": 200, "cfg": "model = dict()", "seed": np.int64(3), "best": np.float32(0.5)}
        hub = {"log_scalars": {"train/loss": history}, "runtime_info": {"iter": 1000},
               "resumed_keys": {"train/loss": True}}  # fmt: skip
        state = {"meta": meta, "state_dict": state_dict, "message_hub": hub, "optimizer": {}}
        torch.save(state, path, _use_new_zipfile_serialization=zipped)


class DillLike(pickle.Pickler):
    """Writes as dill 0.3.2 or 0.4 do what they do not write as pickle: dill/_dill.py."""

    dill: dict[str, type]
    version: str

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type) and issubclass(obj, tuple) and hasattr(obj, "_fields"):
            named = obj.__name__, obj._fields, "byol.byol_experiment"
            return self.dill["_create_namedtuple"], named
        if isinstance(obj, np.ndarray) and self.version == "0.4":
            return self.dill["_create_array"], (*obj.__reduce__(), None)
        if isinstance(obj, types.BuiltinFunctionType) and self.version == "0.3.2":
            return self.dill["_get_attr"], (obj.__self__, obj.__name__)
        if isinstance(obj, types.ModuleType):
            return self.dill["_import_module"], (obj.__name__,)
        return NotImplemented


def write_deepmind(
    params: Any, state: Any, path: Path, *, mapping: str = "FlatMapping", dill: str = "0.3.2"
) -> None:
    """A checkpoint as byol/utils/checkpointing.py writes it: dill, protocol 2, Haiku's mappings."""
    fields = ("online_params", "target_params", "online_state", "target_state", "opt_state")
    record = namedtuple("_ByolExperimentState", fields)
    names = (f"haiku._src.data_structures.{mapping}", "byol.utils.optimizers.LarsState",
             "jax.interpreters.xla.DeviceArray", "dill._dill._create_namedtuple",
             "dill._dill._create_array", "dill._dill._get_attr",
             "dill._dill._import_module")  # fmt: skip
    with installed(*names) as (haiku_map, lars, jax_array, *dills), path.open("wb") as file:
        haiku_map.__reduce__ = lambda self: (haiku_map, (self.inner,))

        def frozen(tree: Any) -> Any:
            if not isinstance(tree, dict):
                return tree
            made = haiku_map()
            made.inner = {name: frozen(value) for name, value in tree.items()}
            return made

        target = {name: {"w": np.full(3, 9.0, np.float32)} for name in params}
        whole = record(frozen(params), frozen(target), frozen(state), frozen({}), lars())
        pickler = DillLike(file, protocol=2)
        pickler.dill, pickler.version = {kind.__name__: kind for kind in dills}, dill
        pickler.dump({"experiment_state": whole, "step": 312000, "rng": jax_array()})
