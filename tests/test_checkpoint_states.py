"""What save takes comes back exactly; what load could not read is refused before it is written."""

import argparse
import dataclasses
import enum
import inspect
import json
import random
import re
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel
from torchvision import tv_tensors

from byol_pytorch.checkpoint import export_backbone, load, load_backbone, save


def same(a: Any, b: Any) -> bool:
    attributes = [getattr(x, "__dict__", {}) for x in (a, b)]
    if type(a) is not type(b) or (any(attributes) and not same(*attributes)):
        return False
    if isinstance(a, Tensor):
        alike = (a.dtype, a.layout, a.requires_grad) == (b.dtype, b.layout, b.requires_grad)
        return alike and torch.equal(a.to_dense(), b.to_dense())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def comes_back(value: Any, path: Path) -> bool:
    save({"value": value}, path)
    return same(load(path), {"value": value})


def classes(module: Any, base: type) -> list[type]:
    found = {c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, base)}
    return sorted(found - {base, lr_scheduler._LRScheduler}, key=lambda c: c.__name__)


OPTIMIZERS = classes(torch.optim, torch.optim.Optimizer)
SCHEDULERS = classes(lr_scheduler, lr_scheduler.LRScheduler)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizers_state_comes_back(kind: Any, tmp_path: Path) -> None:
    sparse = kind is torch.optim.SparseAdam
    weight = nn.Parameter(torch.rand(3, 3))
    optimizer = kind([weight], lr=0.1)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.embedding(torch.tensor([0, 1]), weight, sparse=sparse).square().sum()
        value.backward()
        return value

    for _ in range(2):
        optimizer.step(loss)
    assert comes_back(optimizer.state_dict(), tmp_path / "last.pt")
    optimizer.load_state_dict(load(tmp_path / "last.pt")["value"])


class Rule:
    """A rule with something to save, as LambdaLR saves it."""

    def __init__(self) -> None:
        self.factor = 0.5

    def __call__(self, step: int) -> float:
        return self.factor


BUILD: dict[str, Callable[[Any, Any], Any]] = {
    "StepLR": lambda kind, sgd: kind(sgd, 2),
    "MultiStepLR": lambda kind, sgd: kind(sgd, [2, 4, 4]),
    "LambdaLR": lambda kind, sgd: kind(sgd, Rule()),
    "MultiplicativeLR": lambda kind, sgd: kind(sgd, lambda step: 0.9),
    "ExponentialLR": lambda kind, sgd: kind(sgd, 0.9),
    "CosineAnnealingLR": lambda kind, sgd: kind(sgd, 5),
    "CosineAnnealingWarmRestarts": lambda kind, sgd: kind(sgd, 5),
    "CyclicLR": lambda kind, sgd: kind(sgd, 0.01, 0.1, scale_fn=Rule()),
    "OneCycleLR": lambda kind, sgd: kind(sgd, 0.1, total_steps=9),
    "SequentialLR": lambda kind, sgd: kind(
        sgd, [lr_scheduler.ConstantLR(sgd), lr_scheduler.MultiStepLR(sgd, [3])], [2]),
    "ChainedScheduler": lambda kind, sgd: kind(
        [lr_scheduler.ConstantLR(sgd), lr_scheduler.MultiStepLR(sgd, [3])]),
    "SWALR": lambda kind, sgd: kind(sgd, 0.1),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*SCHEDULERS, SWALR])
def test_every_schedules_state_comes_back(kind: Any, tmp_path: Path) -> None:
    sgd = torch.optim.SGD([nn.Parameter(torch.rand(3))], lr=0.1, momentum=0.9)
    schedule = BUILD.get(kind.__name__, lambda kind, sgd: kind(sgd))(kind, sgd)
    for _ in range(3):
        sgd.step()
        schedule.step(*([0.5] if kind is lr_scheduler.ReduceLROnPlateau else []))
    assert comes_back(schedule.state_dict(), tmp_path / "last.pt")
    schedule.load_state_dict(load(tmp_path / "last.pt")["value"])


def attributed(value: Any, attribute: Any) -> Any:
    value.note = attribute
    return value


KEPT: dict[str, Callable[[], Any]] = {
    "GradScaler": lambda: torch.amp.GradScaler("cpu").state_dict(),
    "AveragedModel": lambda: AveragedModel(nn.BatchNorm1d(2)).state_dict(),
    "state of torch's generator": torch.get_rng_state,
    "state of Python's generator": random.getstate,
    "state of numpy's generator": lambda: np.random.default_rng(0).bit_generator.state,
    "Parameter": lambda: nn.Parameter(torch.rand(2), requires_grad=False),
    "Parameter with an attribute": lambda: attributed(nn.Parameter(torch.rand(2)), [1]),
    "tensor with an attribute": lambda: attributed(torch.rand(2), {"a": 1}),
    "buffer": lambda: nn.Buffer(torch.rand(2)),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "conjugate": lambda: torch.tensor([1j]).conj(),
    "float8": lambda: torch.rand(2).to(torch.float8_e4m3fn).view(torch.uint8),
    "uint16": lambda: torch.tensor([65535], dtype=torch.uint16),
    "OrderedDict": lambda: nn.BatchNorm1d(2).state_dict(),
    "Counter": lambda: Counter("aab"),
    "set": lambda: {1, "a", (2, 3)},
    "bytes": lambda: bytes(range(256)),
    "complex": lambda: 2 + 1j,
    "integers": lambda: [0, -1, 2**63, -(2**2000), True],
    "strings": lambda: ["", "é", "\ud800", "a" * 70000],
    "floats": lambda: [float("inf"), -0.0, 1e-320],
    "keys": lambda: {None: 1, (1, "a"): 2, 2.5: 3, b"a": 4},
    "shared": lambda: [[1, 2]] * 3,
    "dtype and device": lambda: [torch.bfloat16, torch.device("cuda:1"), torch.Size([1])],
}


@pytest.mark.parametrize("name", KEPT)
def test_what_a_training_script_keeps_comes_back(name: str, tmp_path: Path) -> None:
    assert comes_back(KEPT[name](), tmp_path / "last.pt")


@dataclasses.dataclass
class Progress:
    step: int = 3


class Phase(enum.IntEnum):
    WARM_UP = 1


Pair = namedtuple("Pair", "a b")

LOST: dict[str, tuple[Callable[[], Any], str]] = {
    "tensor subclass": (
        lambda: tv_tensors.Image(torch.ones(3, 2, 2)), "torchvision.tv_tensors._image.Image"),
    "lazy parameter": (lambda: nn.LazyLinear(3).weight, "UninitializedParameter"),
    "ragged tensor": (
        lambda: torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged), "NestedTensor"),
    "attribute of a parameter": (
        lambda: attributed(nn.Parameter(torch.ones(2)), Progress()), r"\.note is a .*\.Progress"),
    "attribute of a tensor": (lambda: attributed(torch.ones(2), Progress()), r"\.note is a .*Prog"),
    "attribute of a dict": (lambda: attributed(OrderedDict(), Progress()), r"\.note is a .*Progre"),
    "dataclass": (Progress, r".*\.Progress"),
    "enum": (lambda: Phase.WARM_UP, r".*\.Phase"),
    "named tuple": (lambda: Pair(1, 2), r".*\.Pair"),
    "torch's named tuple": (lambda: torch.ones(2).max(0), r"torch\.return_types\.max"),
    "defaultdict": (lambda: defaultdict(list), r"collections\.defaultdict"),
    "deque": (lambda: deque([1]), r"collections\.deque"),
    "frozenset": (lambda: frozenset({1}), r"builtins\.frozenset"),
    "set of paths": (lambda: {Path("a")}, r"pathlib"),
    "key": (lambda: {Path("a"): 1}, r"a pathlib"),
    "Namespace": (lambda: argparse.Namespace(lr=1), r"argparse\.Namespace"),
    "empty bytes": (lambda: b"", "empty bytes"),
    "long integer": (lambda: 2**3000, "a very long integer"),
    "numpy array": (lambda: np.random.get_state(), r"numpy\.ndarray"),
    "numpy string": (lambda: np.str_("a"), r"numpy\.str_"),
    "generator": (torch.Generator, r"torch\._C\.Generator"),
    "storage": (lambda: torch.ones(2).untyped_storage(), r"torch\.storage\.UntypedStorage"),
    "function": (lambda: len, r"builtins\.builtin_function_or_method"),
    "class": (lambda: Progress, r"builtins\.type"),
    "opaque tensor": (lambda: torch.ones(2, 2).to_mkldnn(), r"a tensor that torch cannot write"),
    "narrow integers": (lambda: torch.zeros(2, dtype=torch.int4), r"a tensor that torch cannot w"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOST)
def test_what_would_not_come_back_is_refused_when_saving(name: str, tmp_path: Path) -> None:
    make, message = LOST[name]
    with pytest.raises(
        TypeError, match=rf"(state\['value'\]|The state ).*{message}.*; expected .*\. Con"
    ):
        save({"value": make()}, tmp_path / "last.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_contains_itself_is_named(tmp_path: Path) -> None:
    circle: list[Any] = []
    circle.append(circle)
    deep: dict[str, Any] = {}
    for _ in range(600):
        deep = {"inner": deep}
    for value in (circle, deep):
        with pytest.raises(ValueError, match="nested too deep, or contains itself; expected up to"):
            save({"value": value}, tmp_path / "last.pt")
    assert list(tmp_path.iterdir()) == []


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {"mean": "0.5, 0.5, 0.5", "architecture": "resnet50", "padding": "same"},
        {"mean": "{", "std": "", "image_size": "NaN", "architecture": "[1]"},
        {"mean": "0.5", "std": '"a"', "image_size": "224", "architecture": "1", "padding": "1"},
        {"mean": '["a"]', "std": "[null]", "image_size": "[1, 2, 3]", "padding": '"valid"'},
        {"mean": "[" * 5000, "config": '{"model": 1}'},
    ],
)
def test_others_notes_in_safetensors_are_passed_over(
    metadata: dict[str, str] | None, tmp_path: Path
) -> None:
    net, other = tiny(), tiny()
    save_file(net.state_dict(), tmp_path / "net.safetensors", metadata)
    report = load_backbone(tmp_path / "net.safetensors", other)
    assert report.missing == report.unexpected == () and same(net.state_dict(), other.state_dict())
    assert (report.mean, report.std, report.image_size, report.architecture) == (None,) * 4


def test_the_format_is_seen_in_the_file_not_in_its_name(tmp_path: Path) -> None:
    net, other = tiny(), tiny()
    export_backbone(net, tmp_path / "net.safetensors", mean=[0.5], std=[0.25])
    (tmp_path / "net.safetensors").rename(tmp_path / "net.pth")
    assert load_backbone(tmp_path / "net.pth", other).mean == (0.5,)
    torch.save(net.state_dict(), tmp_path / "net.safetensors")
    load_backbone(tmp_path / "net.safetensors", tiny())
    assert same(net.state_dict(), other.state_dict())
    with pytest.raises(ValueError, match=r"net\.pth is a safetensors file; expected one by save"):
        load(tmp_path / "net.pth")


@pytest.mark.parametrize("name", ["net.safetensors", "net.bin"])
def test_a_header_that_begins_as_a_pickle_does_is_read(name: str, tmp_path: Path) -> None:
    for padding in range(0, 256, 8):  # the header's length is a multiple of 8
        save_file(tiny().state_dict(), tmp_path / name, {"note": "a" * padding})
        if (tmp_path / name).read_bytes()[:1] == b"\x80":
            break
    assert (tmp_path / name).read_bytes()[:1] == b"\x80"
    assert load_backbone(tmp_path / name, tiny()).missing == ()


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def torn_inside(path: Path) -> None:
    """The index at the end is whole, the pickle is not."""
    torch.save(tiny().state_dict(), path)
    data = bytearray(path.read_bytes())
    start = data.index(b"data.pkl") + 100
    data[start : start + 300] = b"\xff" * 300
    path.write_bytes(data)


def scripted(path: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(str(path))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit")
@pytest.mark.parametrize("reader", [load, lambda path: load_backbone(path, tiny())])
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (zipped, "is a zip file of something else; expected a file by torch.save"),
        (scripted, "is a TorchScript archive; expected a file by torch.save of a state_dict"),
        (torn_inside, "is damaged, cut short or no checkpoint|holds .*; expected tensors"),
        (lambda path: path.write_text(json.dumps({"a": 1})), "is damaged, cut short or no check"),
        (lambda path: torch.save([torch.ones(2)], path), "holds a list; expected a dict"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named(
    reader: Any, write: Any, message: str, tmp_path: Path
) -> None:
    write(tmp_path / "file.pt")
    with pytest.raises(ValueError, match=re.escape("file.pt") + rf".*({message})"):
        reader(tmp_path / "file.pt")


@pytest.mark.parametrize("reader", [load, lambda path: load_backbone(path, tiny())])
def test_a_folder_is_named_with_what_is_in_it(reader: Any, tmp_path: Path) -> None:
    (tmp_path / "last.pt").touch()
    with pytest.raises(FileNotFoundError, match=r"is a folder; expected .*In it: last\.pt\."):
        reader(tmp_path)
