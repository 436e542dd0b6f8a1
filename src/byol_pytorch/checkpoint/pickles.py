"""Files by torch.save and pickles, read without importing or calling anything that they name.

A pickle names classes and functions, and reading it calls them. torch reads its own files with a
short list of names; here every further name stands for an inert placeholder, or for one of the few
stand-ins below that make arrays and dicts.
"""

import pickle
import re
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from byol_pytorch.checkpoint.files import damaged, unsafe

# What published checkpoints hold of Python, numpy and torch beside their weights (logs, paths,
# settings). Other names of those packages are refused: only an attack has a use for them.
HARMLESS = re.compile(
    r"(argparse|collections|datetime|decimal|enum|functools|pathlib|typing|uuid)\..*"
    r"|builtins\.(bool|bytes|complex|dict|float|frozenset|int|list|object|range|set|slice|str|tuple)"
    r"|builtins\.getattr|copyreg\._reconstructor"  # how older pickles name nested classes
    r"|numpy\.(ndarray|dtype)|numpy\.(core|_core)\.multiarray\.(_reconstruct|scalar)"
    r"|torch\.(nn|optim)\..*"
)
# IMPORT_MAPPING: from Python 2's names, which pickles have up to protocol 2
KNOWN_PACKAGES = sys.stdlib_module_names | {"numpy", "torch"} | IMPORT_MAPPING.keys()
DICTS = (
    "collections.OrderedDict",
    "collections.defaultdict",
    "haiku._src.data_structures.FlatMapping",
    "haiku._src.data_structures.FlatMap",
    "haiku._src.data_structures.frozendict",
)
# How torch.save begins with its older format, which MMSelfSup publishes in
TORCH_MAGIC = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)


class _Refused(pickle.UnpicklingError):
    pass


class Inert:
    """Takes the place of an object of a class unknown here; holds and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise _Refused("calls of its own objects")

    # A pickle could otherwise set attributes, of these classes too.
    def __setstate__(self, state: Any) -> None:
        pass


class EmptyDict(Inert):
    """Takes the place of classes of dicts; what follows in the pickle fills it."""

    def __new__(cls, *args: Any) -> Any:  # a dict
        return dict(*args) if args and type(args[0]) is dict else {}


def placeholder(name: str) -> type[Inert] | None:
    """An inert class for the full name `name` of a pickle, None for a name that is refused."""
    if name.partition(".")[0] in KNOWN_PACKAGES and not HARMLESS.fullmatch(name):
        return None
    return type(name, (EmptyDict if name in DICTS else Inert,), {})


def read_torch(path: Path, map_location: Any = "cpu", *, foreign: bool = False) -> dict[str, Any]:
    """The dict in a file by torch.save; in a `foreign` one other projects' objects are inert.

    Raises ValueError for a file that is damaged, holds no dict, or names what torch does not allow
    (and what HARMLESS does not, where it is foreign).
    """
    inert: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = []
    seen: set[str] = set()
    while True:  # torch names one class that it does not know at a time
        try:
            # The open file: by its name alone torch takes .safetensors for that format.
            with torch.serialization.safe_globals(inert), path.open("rb") as file:
                state = torch.load(file, map_location=map_location, weights_only=True)
            break
        except Exception as error:
            whole = zipfile.is_zipfile(path)  # the index is at the end: a torn file has none
            named = re.search(r"GLOBAL (\S+)", str(error))
            if isinstance(error, pickle.UnpicklingError) and (whole or named or inert):
                name = named[1] if named else "other objects than tensors"
                full = name if "." in name else f"builtins.{name}"
                stand_in = placeholder(full) if foreign and named and full not in seen else None
                if stand_in is None:
                    raise unsafe(path, name) from error
                seen.add(full)
                inert.append((stand_in, full))
            elif whole and (kind := _other_archive(path)):
                raise ValueError(
                    f"{path} is {kind}; expected a file by torch.save of a state_dict. Save one: "
                    "torch.save(net.state_dict(), path)."
                ) from error
            elif isinstance(error, PermissionError | MemoryError) or (
                isinstance(error, RuntimeError) and whole and "Stream" not in str(error)
            ):  # of devices, say
                raise
            else:
                raise damaged(path, "a file by torch.save") from error
    if not isinstance(state, dict):
        raise ValueError(
            f"{path} holds a {type(state).__name__}; expected a dict. Save one: save(dict(...))."
        )
    return state


def _other_archive(path: Path) -> str | None:
    """What a whole zip file is that torch.save has not written."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript archive"
    return None if any(n.endswith("/data.pkl") for n in names) else "a zip file of something else"


def is_plain_pickle(path: Path) -> bool:
    """Whether the file is a pickle that torch.save has not written."""
    with path.open("rb") as file:
        start = file.read(len(TORCH_MAGIC))
    return start[:1] == b"\x80" and start != TORCH_MAGIC


def read_pickle(path: Path) -> Any:
    """What a plain pickle holds: containers, numbers, numpy arrays; the rest is inert.

    Raises ValueError for a file that is cut short, or that names what could run code.
    """
    try:
        with path.open("rb") as file:
            return _Unpickler(file).load()
    except _Refused as error:
        raise unsafe(path, str(error)) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise damaged(path, "a pickle of dicts and numpy arrays") from error


class Array(Inert):
    """An array as numpy pickles it: made empty, then given its shape, type and bytes."""

    value: np.ndarray[Any, Any]

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_column, data = state
        flat = np.frombuffer(data, dtype.value)
        self.value = flat.reshape(shape, order="F" if by_column else "C").copy()


class _Dtype(Inert):
    # Only numbers: arrays of objects are pickles inside.
    def __init__(self, code: str, *flags: Any) -> None:
        if not re.fullmatch(r"[biufc]\d{1,2}", code):
            raise _Refused(f"a numpy.dtype {code!r}")
        self.value = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        self.value = self.value.newbyteorder(state[1])


class _Scalar(Inert):
    def __new__(cls, dtype: _Dtype, data: bytes) -> Any:
        return np.frombuffer(data, dtype.value)[0].item()


class _Bytes(Inert):
    def __new__(cls, text: str, encoding: str) -> Any:  # bytes
        return text.encode("latin-1")


class _Record(Inert):
    fields: tuple[str, ...]

    def __new__(cls, *values: Any) -> Any:  # a dict
        return dict(zip(cls.fields, values, strict=True))


# dill writes the class of a named tuple as its name and fields, some arrays as a call with their
# state, and functions in C as attributes of modules.
class _DillNamedTuple(Inert):
    def __new__(cls, name: str, fields: tuple[str, ...], *rest: Any) -> Any:  # a _Record
        return type("Record", (_Record,), {"fields": tuple(fields)})


class _DillArray(Inert):
    def __new__(cls, function: Any, args: Any, state: Any, *rest: Any) -> Any:  # an Array
        array = Array()
        array.__setstate__(state)
        return array


class _DillModule(Inert):
    def __init__(self, name: str, *rest: Any) -> None:
        self.name = name


class _DillAttribute(Inert):
    def __new__(cls, owner: Any, name: str) -> Any:
        return _found(f"{owner.name}.{name}") if isinstance(owner, _DillModule) else Inert()


STAND_INS: dict[str, type[Inert]] = {
    "_codecs.encode": _Bytes,
    "numpy.dtype": _Dtype,
    **{
        f"numpy.{core}.{module}.{name}": stand_in
        for core in ("core", "_core")  # before and from numpy 2
        for module in ("multiarray", "_multiarray_umath")
        for name, stand_in in (("_reconstruct", Array), ("scalar", _Scalar))
    },
    "dill._dill._create_namedtuple": _DillNamedTuple,
    "dill._dill._create_array": _DillArray,
    "dill._dill._import_module": _DillModule,
    "dill._dill._get_attr": _DillAttribute,
}


def _found(name: str) -> type[Inert]:
    stand_in = STAND_INS.get(name) or placeholder(name)
    if stand_in is None:
        raise _Refused(name)
    return stand_in


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _found(f"{IMPORT_MAPPING.get(module, module)}.{name}")
