"""Training states, written whole or not at all and read safely.

What a training state holds, and when it is saved, is the training script's business.
"""

import re
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from byol_pytorch.checkpoint.files import StrPath, existing, is_safetensors, replacing
from byol_pytorch.checkpoint.pickles import read_torch
from byol_pytorch.parallel import is_sharded

PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes),
    *(torch.dtype, torch.device, torch.Size, Tensor, nn.Parameter),
)
LONGEST = 2039  # bits of an integer that torch reads


def save(state: dict[str, Any], path: StrPath) -> None:
    """Write `state` to `path` such that at every moment the old or the new file is there, whole.

    The bytes go to a temporary file in the same folder, reach the disk, and then take the name
    (a symbolic link stays one). Folders are made where they are missing. A temporary file that a
    killed process left is removed by a save to the same path an hour later. Only one process
    should save: under DDP rank 0; sharded states are gathered first (get_state_dict of
    torch.distributed.checkpoint, full_state_dict=True).

    `state` may hold what `load` can read: tensors, numbers, strings, None, and lists, tuples, sets,
    dicts and Counters of those: the states of torch's optimizers, schedules and GradScaler, of
    Python's and torch's random generators. A best checkpoint beside the last is one more call with
    another path.

    Raises TypeError, before anything is written, for other values, naming the first, ValueError
    for a state that contains itself; OSError, disk full included, with the old file untouched and
    no temporary file left.
    """
    try:
        _check_plain(state, "state")
        with replacing(path) as file:
            torch.save(state, file)
    except RecursionError:
        raise ValueError(
            "The state is nested too deep, or contains itself; expected up to a hundred levels of "
            "dicts, lists and tuples. Leave out what refers back to its owner."
        ) from None
    except (KeyError, NotImplementedError) as error:
        raise TypeError(
            f"The state holds a tensor that torch cannot write ({error}); expected dense or sparse "
            "tensors of common types. Convert it: x.to_dense(), x.to(torch.uint8)."
        ) from error
    except RuntimeError as error:
        # torch's writer hides what the disk said behind an error of its own.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def keep_last(folder: StrPath, pattern: str, count: int) -> list[Path]:
    """Delete all but the last `count` files of `folder` that match `pattern`, return the deleted.

    The order is that of the numbers in the names: epoch-9.pt comes before epoch-10.pt. Give a best
    checkpoint a name that the pattern misses. Raises ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"count={count}; expected at least 1. To keep none, do not save any.")
    files = sorted((f for f in Path(folder).glob(pattern) if f.is_file()), key=_numbered)
    for file in files[:-count]:
        file.unlink(missing_ok=True)
    return files[:-count]


def load(path: StrPath, map_location: Any = "cpu") -> dict[str, Any]:
    """The state that `save` wrote, its tensors on `map_location`. Never runs code of the file.

    Raises FileNotFoundError; ValueError for a file that is damaged, is no checkpoint, or holds
    other objects than tensors, numbers, strings and containers of them.
    """
    path = existing(path)
    if is_safetensors(path):
        raise ValueError(
            f"{path} is a safetensors file; expected one by save. load_backbone(path, net) loads "
            "such a file into a network."
        )
    return read_torch(path, map_location)


def _check_plain(value: Any, where: str) -> None:
    kind = type(value)
    if kind in (dict, OrderedDict, Counter):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif kind in (list, tuple, set):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif kind not in PLAIN or is_sharded(value):
        raise _not_plain(where, f"a {kind.__module__}.{kind.__qualname__}")
    elif (value == b"" and kind is bytes) or (kind is int and value.bit_length() > LONGEST):
        raise _not_plain(where, f"{'empty bytes' if value == b'' else 'a very long integer'}")
    # Tensors and OrderedDicts are pickled with what has been set on them.
    for name, item in getattr(value, "__dict__", {}).items():
        _check_plain(item, f"{where}.{name}")


def _not_plain(where: str, came: str) -> TypeError:
    return TypeError(
        f"{where} is {came}; expected tensors, numbers, strings, None, and lists, tuples, sets and "
        "dicts of those, which load() can read without running code. Convert it: dict(x), list(x), "
        "vars(x), str(x), x.item(), torch.as_tensor(x), x.as_subclass(torch.Tensor) of a subclass "
        "of tensors, or x.full_tensor() of a sharded tensor."
    )


def _numbered(file: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", file.name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
