"""Files found or refused by name, read as safetensors, and written whole or not at all."""

import contextlib
import glob
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

StrPath = str | os.PathLike[str]
WEIGHTS = "model.safetensors"  # in a folder by export_backbone, as model hubs name it
STALE = 3600.0  # seconds after which nobody still writes to a temporary file


def _numbers(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(isinstance(v, kind) for v in value)


# What export_backbone writes beside the tensors, and whether a value has its form
FACTS: dict[str, Callable[[Any], bool]] = {
    "mean": lambda value: _numbers(value, (int, float)),
    "std": lambda value: _numbers(value, (int, float)),
    "image_size": lambda value: _numbers(value, int) and len(value) == 2,
    "architecture": lambda value: isinstance(value, str),
    "model_args": lambda value: isinstance(value, dict),
    "padding": lambda value: value == "same",
}


def existing(path: StrPath) -> Path:
    """`path`, or the weights in a folder by export_backbone.

    Raises FileNotFoundError, with what is beside it, where there is no such file.
    """
    path = Path(path)
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    if path.is_dir():
        inside = ", ".join(sorted(f.name for f in path.iterdir())[:8])
        raise FileNotFoundError(
            f"{path} is a folder; expected a checkpoint's file. In it: {inside or 'nothing'}."
        )
    if not path.is_file():
        beside = ", ".join(sorted(f.name for f in path.parent.glob(f"*{path.suffix}"))[:8])
        raise FileNotFoundError(
            f"{path} is no file; expected a checkpoint. In its folder: {beside or 'none'}."
        )
    return path


def is_safetensors(path: Path) -> bool:
    """Whether a file is of that format: by its start where that tells, else by its name."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"PK\3\4":  # by torch.save
        return False
    # The length of the header, which is JSON
    header = int.from_bytes(start[:8], "little")
    starts_so = start[8:] == b"{" and header + 8 <= path.stat().st_size
    return starts_so or path.suffix == ".safetensors"


def read_safetensors(
    path: Path, *, tensors: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and what export_backbone wrote beside them; others' notes are passed over.

    Raises ValueError for a file that is no whole safetensors file.
    """
    import safetensors

    try:
        with safetensors.safe_open(path, "pt") as file:
            names = file.keys() if tensors else ()
            weights = {name: file.get_tensor(name) for name in names}
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is damaged, cut short or no safetensors file; "
            "expected one by export_backbone. Copy it again, or export it again."
        ) from error
    facts = {}
    for name, has_its_form in FACTS.items():
        try:
            value = json.loads(metadata.get(name, "null"))
        except (ValueError, RecursionError):  # no JSON, or thousands of brackets
            continue
        if has_its_form(value):
            facts[name] = tuple(value) if isinstance(value, list) else value
    return weights, facts


@contextlib.contextmanager
def replacing(path: StrPath) -> Iterator[BinaryIO]:
    """A new file that takes the name `path` when the block ends well, and vanishes otherwise."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE:
                left.unlink()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # some systems cannot synchronise a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def damaged(path: Path, expected: str) -> ValueError:
    """The error for a file that cannot be read to its end."""
    return ValueError(
        f"{path} ({path.stat().st_size} bytes) is damaged, cut short or no checkpoint; "
        f"expected {expected}. Take an earlier one, or copy it again."
    )


def unsafe(path: Path, holds: str) -> ValueError:
    """The error for a file that names what could run code."""
    return ValueError(
        f"{path} holds {holds}, and loading such objects can run code; expected tensors, numbers, "
        "strings and containers of them. If you trust its origin, torch.load(path, "
        "weights_only=False) once, and save what you need of it."
    )
