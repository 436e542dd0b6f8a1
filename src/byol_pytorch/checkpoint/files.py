"""Files found or refused by name, and files written whole or not at all."""

import contextlib
import glob
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

StrPath = str | os.PathLike[str]
STALE = 3600.0  # seconds after which nobody still writes to a temporary file


def existing(path: StrPath) -> Path:
    """`path`; raises FileNotFoundError, with what is beside it, where there is no such file."""
    path = Path(path)
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
