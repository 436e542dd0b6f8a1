"""What a file names is never imported and never called, in any of the formats read."""

import builtins
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_helpers import installed, write_deepmind
from torch import nn

from byol_pytorch.checkpoint import load, load_backbone

FILES = ["zip.pth", "legacy.pth", "protocol2.pkl", "protocol4.pkl"]


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call

    def __call__(self) -> None:  # pickle wants what it writes as a function to look like one
        raise AssertionError


def of_objects() -> np.ndarray:
    """Arrays of objects are pickles inside."""
    array = np.empty(1, object)
    array[0] = Call(os.mkdir, "ran")
    return array


ATTACKS = {
    "os.system": lambda: Call(os.system, "touch ran"),
    "os.mkdir": lambda: Call(os.mkdir, "ran"),
    "eval": lambda: Call(eval, "open('ran', 'w')"),
    "exec": lambda: Call(exec, "open('ran', 'w')"),
    "__import__": lambda: Call(__import__, "antigravity"),
    "subprocess.Popen": lambda: Call(subprocess.Popen, ["touch", "ran"]),
    "pickle.loads": lambda: Call(pickle.loads, pickle.dumps(Call(os.mkdir, "ran"))),
    "numpy.testing": lambda: Call(np.testing.rundocs, "ran.py"),
    "numpy.load": lambda: Call(np.load, "ran.npy"),
    "numpy object array": of_objects,
    "torch.load": lambda: Call(torch.load, "ran.pt"),
    "torch.hub.load": lambda: Call(torch.hub.load, "ran", "ran"),
    "a class's method": lambda: Call(getattr(Path("ran"), "mkdir")),  # noqa: B009
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2))


def files(payload: Any) -> dict[str, Callable[[str], None]]:
    """The payload beside good weights: where only they are looked at, nothing would stand out."""
    state = {"state_dict": net().state_dict(), "meta": payload}
    deepmind = {"online_params": {}, "online_state": {}, "rng": payload}
    return {
        "zip.pth": lambda path: torch.save(state, path),
        "legacy.pth": lambda path: torch.save(state, path, _use_new_zipfile_serialization=False),
        "protocol2.pkl": lambda path: Path(path).write_bytes(pickle.dumps(deepmind, 2)),
        "protocol4.pkl": lambda path: Path(path).write_bytes(pickle.dumps(deepmind, 4)),
    }


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("file", FILES)
def test_a_hostile_file_is_refused_and_does_nothing(attack: str, file: str, here: Path) -> None:
    files(ATTACKS[attack]())[file](file)
    imported = set(sys.modules)
    with pytest.raises(ValueError, match="loading such objects can run code"):
        load_backbone(file, net())
    if file.endswith(".pth"):
        with pytest.raises(ValueError, match="loading such objects can run code"):
            load(file)
    assert [f.name for f in here.iterdir()] == [file]
    assert "antigravity" not in set(sys.modules) - imported


@pytest.mark.parametrize(("module", "name"), [(os, "system"), (builtins, "eval"), (np, "load")])
def test_dills_way_to_a_function_is_refused_too(module: Any, name: str, here: Path) -> None:
    with installed("dill._dill._get_attr", "dill._dill._import_module") as (get_attr, imported):
        way = Call(Call(get_attr, Call(imported, module.__name__), name), "ran")
        for file in ("protocol2.pkl", "protocol4.pkl"):
            files(way)[file](file)
    for file in ("protocol2.pkl", "protocol4.pkl"):
        with pytest.raises(ValueError, match=rf"holds {module.__name__}\.{name}, and loading such"):
            load_backbone(file, net())


@pytest.mark.parametrize("file", FILES)
def test_a_scalar_of_an_object_is_not_unpickled(file: str, here: Path) -> None:
    """Which numpy does, in numpy.core.multiarray.scalar, with what a file has for its bytes."""
    inside = pickle.dumps(Call(os.mkdir, "ran"))
    files(Call(np._core.multiarray.scalar, np.dtype("O"), inside))[file](file)
    if file.endswith(".pth"):  # logs of numpy scalars are inert there
        assert len(load_backbone(file, net()).loaded) == 2
    else:
        with pytest.raises(ValueError, match=r"holds a numpy\.dtype 'O8', and loading such"):
            load_backbone(file, net())
    assert [f.name for f in here.iterdir()] == [file]


@pytest.mark.parametrize("file", FILES)
def test_a_class_of_another_package_is_not_imported(
    file: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "thirdparty.py").write_text("open('ran', 'w')\ndef run(*args): open('ran', 'w')\n")
    monkeypatch.syspath_prepend(str(here))
    with installed("thirdparty.run") as (run,):
        files(Call(run, "x"))[file](file)
    other = net()
    if file.endswith(".pth"):
        assert len(load_backbone(file, other).loaded) == 2
    else:
        with pytest.raises(ValueError, match="does not fit Sequential"):
            load_backbone(file, other)
    assert not (here / "ran").exists() and "thirdparty" not in sys.modules


def test_a_pickle_cannot_change_what_reads_the_next(here: Path) -> None:
    def op(name: str) -> bytes:
        module, _, last = name.rpartition(".")
        return f"c{module}\n{last}\n".encode()

    # The state of a class: its attributes, were it set.
    for name in ("haiku._src.data_structures.FlatMapping", "numpy.dtype", "numpy.ndarray",
                 "_codecs.encode", "dill._dill._create_array"):  # fmt: skip
        set_state = op(name) + b"N}X\x07\x00\x00\x00__new__" + op("some.thing") + b"s\x86b."
        (here / "bad.pkl").write_bytes(b"\x80\x02" + set_state)
        with pytest.raises(ValueError, match="is damaged"):
            load_backbone("bad.pkl", net())
    array = np.ones((1, 1, 1, 64), np.float32)
    write_deepmind({"a/~/initial_batchnorm": {"scale": array}}, {}, here / "good.pkl")
    with pytest.raises(ValueError, match=r"0\.weight is \(2, 2\) in the network, absent in"):
        load_backbone("good.pkl", net())


def test_a_pickled_network_is_named_as_such(here: Path) -> None:
    torch.save(net(), "net.pt")
    with pytest.raises(ValueError, match=r"holds a torch\.nn\..*Sequential; expected a dict"):
        load_backbone("net.pt", net())
