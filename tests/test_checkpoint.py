"""Files stay readable whatever interrupts a save, and loading them runs nothing."""

import argparse
import itertools
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from byol_pytorch import BYOL
from byol_pytorch.augment import IMAGENET_MEAN, IMAGENET_STD
from byol_pytorch.checkpoint import (
    export_backbone,
    facts,
    keep_last,
    load,
    load_backbone,
    save,
)


def state(step: int, size: int = 1000) -> dict:
    return {"step": step, "weights": torch.full((size,), float(step))}


def is_whole(found: dict) -> bool:
    return bool((found["weights"] == found["step"]).all())


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    learner = BYOL(small_net(), 16, projection_size=8, projection_hidden_size=16)
    optimizer = torch.optim.AdamW(learner.parameters())
    learner(torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)).backward()
    optimizer.step()
    learner.update_moving_average()
    given = {
        "learner": learner.state_dict(), "optimizer": optimizer.state_dict(), "step": 3,
        "random": random.getstate(), "torch": torch.get_rng_state(), "note": None, "best": 0.5,
        "done": False, "raw": b"ab", "dtype": torch.bfloat16, "size": torch.Size([2, 3]),
        "device": torch.device("cpu"), 7: ["a", ("b", 2j.imag)],
    }  # fmt: skip
    save(given, tmp_path / "new" / "folder" / "last.pt")
    found = load(tmp_path / "new" / "folder" / "last.pt")
    assert list(found) == list(given)
    for key in set(given) - {"learner", "optimizer", "torch"}:
        assert found[key] == given[key]
    assert torch.equal(found["torch"], given["torch"])
    random.setstate(found["random"])
    fresh = BYOL(small_net(), 16, projection_size=8, projection_hidden_size=16)
    fresh.load_state_dict(found["learner"])
    assert same(fresh, learner)
    optimizer.load_state_dict(found["optimizer"])


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (argparse.Namespace(lr=1), r"state\['config'\]\[1\] is a argparse.Namespace"),
        (Path("a"), r"state\['config'\]\[1\] is a pathlib"),
        (torch.zeros(1).numpy(), r"numpy.ndarray"),
        (torch.zeros(1).numpy().mean(), r"numpy.float32"),
        (print, r"builtin"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(value: object, named: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=named + r".*; expected tensors, .*\. Convert it"):
        save({"config": [1, value]}, tmp_path / "last.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    save(state(1), tmp_path / "real.pt")
    (tmp_path / "link.pt").symlink_to("real.pt")
    save(state(2), tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink()
    assert load(tmp_path / "real.pt")["step"] == 2


def test_a_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save(state(1), tmp_path / "last.pt")
    assert (tmp_path / "last.pt").stat().st_mode == (tmp_path / "plain").stat().st_mode


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes of a file fails with an OSError, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 100, 1000, 3000, 10_000, 39_000, 41_000])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(size: int, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save(state(1), path)
    with files_of_at_most(size), pytest.raises(OSError):
        save(state(2, 10_000), path)
    assert load(path)["step"] == 1
    assert [f.name for f in tmp_path.iterdir()] == ["last.pt"]
    save(state(3), path)
    assert load(path)["step"] == 3


def test_a_full_disk_leaves_the_old_backbone(tmp_path: Path) -> None:
    net, path = small_net(), tmp_path / "net.safetensors"
    export_backbone(net, path)
    before = path.read_bytes()
    with files_of_at_most(100), pytest.raises(OSError):
        export_backbone(small_net(), path)
    assert path.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["net.safetensors"]


def in_a_fork(work: Callable[[], None]) -> int:
    """The id of a process that runs `work`: a copy of this one, so that it starts at once."""
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(0)
    return process


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_dying_at_any_stage_leaves_the_old_file(moment: str, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save(state(1), path)

    def work() -> None:
        setattr(os, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        save(state(2), path)

    _, status = os.waitpid(in_a_fork(work), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert load(path)["step"] == 1
    (left,) = set(tmp_path.iterdir()) - {path}
    old = time.time() - 2 * 3600
    save(state(3), path)
    assert left.exists()  # might be another process's
    os.utime(left, (old, old))
    save(state(4), path)
    assert list(tmp_path.iterdir()) == [path]


def test_the_bytes_reach_the_disk_before_the_name_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = tmp_path / "last.pt", []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def recorded(*args, name=name, real=real):  # type: ignore[no-untyped-def]
            kind = "folder" if name == "fsync" and os.path.isdir(f"/proc/self/fd/{args[0]}") else ""
            calls.append(name + kind)
            return real(*args)

        monkeypatch.setattr(os, name, recorded)
    save(state(1), path)
    assert calls == ["fsync", "replace", "fsyncfolder"]


def killed_while_saving(path: Path, rounds: int) -> None:
    save(state(0, 50_000), path)
    chance, last = random.Random(0), 0

    def work() -> None:
        for step in itertools.count(last + 1):
            save(state(step, 50_000), path)

    for _ in range(rounds):
        process = in_a_fork(work)
        time.sleep(chance.uniform(0.01, 0.15))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        found = load(path)
        assert is_whole(found) and found["step"] >= last
        last = found["step"]
    assert last > 0


def test_kill_9_at_random_moments_leaves_a_whole_file(tmp_path: Path) -> None:
    killed_while_saving(tmp_path / "last.pt", 8)


@pytest.mark.slow
def test_kill_9_at_many_random_moments_leaves_a_whole_file(tmp_path: Path) -> None:
    killed_while_saving(tmp_path / "last.pt", 300)


def test_the_last_files_by_number_are_kept_and_others_are_left_alone(tmp_path: Path) -> None:
    for name in ("epoch-1.pt", "epoch-9.pt", "epoch-10.pt", "epoch-100.pt", "best.pt", "last.pt"):
        (tmp_path / name).touch()
    deleted = keep_last(tmp_path, "epoch-*.pt", 2)
    assert [f.name for f in deleted] == ["epoch-1.pt", "epoch-9.pt"]
    left = sorted(f.name for f in tmp_path.iterdir())
    assert left == ["best.pt", "epoch-10.pt", "epoch-100.pt", "last.pt"]
    assert keep_last(tmp_path, "epoch-*.pt", 5) == []
    with pytest.raises(ValueError, match="count=0; expected at least 1"):
        keep_last(tmp_path, "*.pt", 0)


class Unsafe:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused(
    zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Unsafe()}, "bad.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"holds posix\.mkdir, and .*; expected tensors"):
        load("bad.pt")
    with pytest.raises(ValueError, match=r"holds posix\.mkdir, and"):
        load_backbone("bad.pt", small_net())
    assert not Path("ran").exists()


def test_a_missing_file_is_named_with_its_neighbours(tmp_path: Path) -> None:
    save(state(1), tmp_path / "last.pt")
    with pytest.raises(FileNotFoundError, match=r"lost.pt is no file; .*: last.pt\."):
        load(tmp_path / "lost.pt")
    with pytest.raises(FileNotFoundError, match=r"lost.safetensors is no file; .*: none"):
        load_backbone(tmp_path / "lost.safetensors", small_net())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, -1])
def test_a_torn_file_is_named(kept: float, tmp_path: Path) -> None:
    save(state(1), tmp_path / "last.pt")
    export_backbone(small_net(), tmp_path / "net.safetensors")
    for name in ("last.pt", "net.safetensors"):
        data = (tmp_path / name).read_bytes()
        short = data[: int(kept * len(data)) if isinstance(kept, float) else kept]
        (tmp_path / name).write_bytes(short)
        with pytest.raises(ValueError, match=rf"{name} \({len(short)} bytes\) is damaged"):
            load_backbone(tmp_path / name, small_net())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("data", [b"hello world\n" * 9, b"\0" * 999, bytes(range(256)) * 9])
def test_a_file_of_another_kind_is_named(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "other.pt").write_bytes(data)
    with pytest.raises(ValueError, match="damaged, cut short or no checkpoint"):
        load(tmp_path / "other.pt")


def test_a_file_without_a_dict_is_named(tmp_path: Path) -> None:
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="holds a Tensor; expected a dict"):
        load(tmp_path / "tensor.pt")


def small_net(classes: int = 10) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, classes),
    )  # fmt: skip


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(m == n and torch.equal(v, w) for (m, v), (n, w) in pairs)


def test_a_learners_backbone_goes_through_timm_and_back(tmp_path: Path) -> None:
    net = timm.create_model("resnet18").to(memory_format=torch.channels_last)
    with torch.no_grad():
        for buffer in net.buffers():
            buffer.add_(1)
    learner = BYOL(net, (64, 48), projection_size=8, projection_hidden_size=16)
    export_backbone(learner, tmp_path / "net.safetensors")
    other = timm.create_model("resnet18", num_classes=10)
    report = load_backbone(tmp_path / "net.safetensors", other)
    assert set(report.missing) == {"fc.weight", "fc.bias"} and report.unexpected == ()
    assert (report.mean, report.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert (report.image_size, report.architecture) == ((64, 48), "resnet18")
    # Also by timm's own loader, with and without classes.
    file = str(tmp_path / "net.safetensors")
    third = timm.create_model("resnet18", num_classes=0, checkpoint_path=file)
    overlay = {"file": file, "num_classes": 0}
    fourth = timm.create_model("resnet18", num_classes=10, pretrained=True,
                               pretrained_cfg_overlay=overlay)  # fmt: skip
    for loaded in (net, other, fourth):
        loaded.reset_classifier(0)
        assert same(loaded, third)


def test_a_bare_network_is_exported_with_what_is_said_of_it(tmp_path: Path) -> None:
    net, path = small_net(), tmp_path / "net.safetensors"
    export_backbone(net, path, mean=(0.5, 0.25, 0.75), std=[0.1, 0.2, 0.3], image_size=32)
    report = load_backbone(path, small_net())
    assert (report.mean, report.std) == ((0.5, 0.25, 0.75), (0.1, 0.2, 0.3))
    assert (report.image_size, report.architecture) == ((32, 32), None)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and metadata["byol_pytorch"][0] == '"'
    export_backbone(net, path)
    report = load_backbone(path, small_net())
    assert report.mean is report.std is report.image_size is None


def test_an_argument_goes_before_what_the_learner_says(tmp_path: Path) -> None:
    learner = BYOL(small_net(), 16, augment_fn=nn.Identity(), projection_hidden_size=16)
    export_backbone(learner, tmp_path / "net.safetensors", mean=[0.5] * 3, std=[0.5] * 3)
    report = load_backbone(tmp_path / "net.safetensors", small_net())
    assert (report.mean, report.image_size) == ((0.5,) * 3, (16, 16))
    export_backbone(learner, tmp_path / "net.safetensors")
    assert load_backbone(tmp_path / "net.safetensors", small_net()).mean is None


@pytest.mark.parametrize(
    "stats", [{"mean": [0.5]}, {"std": [0.5]}, {"mean": [0.5], "std": [0.5, 0.5]}]
)
def test_a_mean_without_its_std_is_refused(stats: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mean=.*; expected one value a channel for both"):
        export_backbone(small_net(), tmp_path / "net.safetensors", **stats)
    assert list(tmp_path.iterdir()) == []


def in_file(path: Path) -> set[str]:
    with safe_open(path, "pt") as file:
        return set(file.keys())


def test_only_a_classifier_that_nothing_trained_is_left_out(tmp_path: Path) -> None:
    path, heads = tmp_path / "net.safetensors", {"5.weight", "5.bias"}
    for net in (small_net(), torch.compile(small_net())):
        learner = BYOL(net, 16, projection_size=8, projection_hidden_size=16)
        export_backbone(learner, path)
        assert in_file(path) == set(small_net().state_dict()) - heads
        assert set(load_backbone(path, small_net(3)).missing) == heads
    # Trained, or given by the user as it is.
    export_backbone(BYOL(small_net(), 16, hidden_layer=-1, projection_hidden_size=16), path)
    assert in_file(path) == set(small_net().state_dict())
    export_backbone(small_net(), path)
    assert in_file(path) == set(small_net().state_dict())


def test_layers_within_the_network_stay_where_the_representation_is_earlier(
    tmp_path: Path,
) -> None:
    net, path = torchvision.models.resnet18(), tmp_path / "net.safetensors"
    export_backbone(BYOL(net, 32, hidden_layer="layer3", projection_hidden_size=16), path)
    assert in_file(path) == {n for n in net.state_dict() if not n.startswith("fc.")}
    assert len(load_backbone(path, torchvision.models.resnet18()).missing) == 2


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("resnet10t", {"num_classes": 0}, {"num_classes": 0}),
        ("resnet10t", {"in_chans": 1}, {"num_classes": 1000, "in_chans": 1}),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 12, "num_classes": 5},
         {"num_classes": 5, "img_size": [32, 32]}),
        ("resnet10t", {"channels": (8, 8, 8, 8)}, None),
        ("resnet10t", {"channels": (8, 8, 8, 8), "num_classes": 0, "by hand": True},
         {"channels": [8, 8, 8, 8], "num_classes": 0}),
    ],
)  # fmt: skip
def test_a_file_says_how_to_build_its_network(
    name: str, options: dict, told: dict | None, tmp_path: Path
) -> None:
    given = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    args = given if given.pop("by hand", False) else None
    net = timm.create_model(name, **{k: v for k, v in options.items() if k != "by hand"})
    path = tmp_path / "net.safetensors"
    export_backbone(net, path, mean=[0.5], std=[0.25], model_args=args)
    found = facts(path)
    assert found.pop("architecture") == name
    assert found.pop("model_args", None) == told
    assert found == {"mean": (0.5,), "std": (0.25,)}
    if told is not None:
        again = timm.create_model(name, **told)
        report = load_backbone(path, again)
        assert report.model_args == told and report.missing == () and same(again, net)


def test_facts_of_other_files_are_empty(tmp_path: Path) -> None:
    save(small_net().state_dict(), tmp_path / "net.pt")
    export_backbone(small_net(), tmp_path / "net.safetensors")
    assert facts(tmp_path / "net.pt") == facts(tmp_path / "net.safetensors") == {}
    with pytest.raises(ValueError, match=r"model_args=.*; expected what JSON holds"):
        export_backbone(small_net(), tmp_path / "a", model_args={"act_layer": nn.ReLU})


class Tied(nn.Module):
    """Two names for one weight, one the transpose of a buffer, as some language models have."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4, bias=False)
        self.two = nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight
        self.register_buffer("view", self.one.weight.detach().t())

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def test_shared_and_strided_tensors_are_exported(tmp_path: Path) -> None:
    net, other = Tied(), Tied()
    export_backbone(net, tmp_path / "net.safetensors")
    load_backbone(tmp_path / "net.safetensors", other)
    assert same(net, other)
    assert other.one.weight is other.two.weight


def export_rank(rank: int, folder: str) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    net = torch.load(f"{folder}/net.pt", weights_only=False)
    whole, mesh = net[0].weight.detach(), init_device_mesh("cpu", (2,))
    net[0].weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    with pytest.raises(TypeError, match=r"DTensor; expected .*full_tensor"):
        save(net.state_dict(), f"{folder}/a_shard.pt")
    export_backbone(net, f"{folder}/net.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def test_a_sharded_network_is_exported_whole_and_a_shard_is_not_saved(tmp_path: Path) -> None:
    net, other = small_net(), small_net()
    torch.save(net, tmp_path / "net.pt")
    mp.start_processes(export_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    load_backbone(tmp_path / "net.safetensors", other)
    assert same(net, other)


@pytest.mark.parametrize(
    "where",
    [
        "bare",
        "state_dict",
        "compiled",
        "learner",
        "state of a learner",
        "compiled in a learner",
        "data parallel",
    ],
)
def test_plain_state_dicts_are_read_however_they_are_wrapped(where: str, tmp_path: Path) -> None:
    net, path = small_net(), tmp_path / "file.pt"
    learner = BYOL(net, 16, projection_size=8, projection_hidden_size=16)
    torch.save(
        {
            "bare": net.state_dict(),
            "state_dict": {"state_dict": net.state_dict(), "epoch": 3},
            "compiled": torch.compile(net).state_dict(),
            "learner": learner.state_dict(),
            "state of a learner": {"learner": torch.compile(learner).state_dict(), "step": 1},
            "compiled in a learner": BYOL(torch.compile(net), 16).state_dict(),
            "data parallel": {f"module.{name}": v for name, v in learner.state_dict().items()},
        }[where],
        path,
    )
    other = small_net()
    report = load_backbone(path, other)
    assert same(net, other)
    assert (report.missing, report.unexpected, report.mean) == ((), (), None)


@pytest.mark.parametrize("classes", [0, 3])
def test_another_classifier_is_reported_and_left(classes: int, tmp_path: Path) -> None:
    export_backbone(timm.create_model("resnet18"), tmp_path / "net.safetensors")
    net = timm.create_model("resnet18", num_classes=classes)
    before = {name: value.clone() for name, value in net.get_classifier().state_dict().items()}
    report = load_backbone(tmp_path / "net.safetensors", net)
    assert set(report.missing) == ({"fc.weight", "fc.bias"} if classes else set())
    assert set(report.unexpected) == {"fc.weight", "fc.bias"}
    for name, value in net.get_classifier().state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("make", "head"),
    [
        (small_net, "5"),
        (lambda n: timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=n), "head"),
        (lambda n: torchvision.models.mobilenet_v3_small(num_classes=n), "classifier.3"),
    ],
)
def test_the_classifier_is_known_in_other_families(
    make: Callable[[int], nn.Module], head: str, tmp_path: Path
) -> None:
    save(make(10).state_dict(), tmp_path / "net.pt")
    report = load_backbone(tmp_path / "net.pt", make(3))
    assert set(report.missing) == {f"{head}.weight", f"{head}.bias"}


@pytest.mark.parametrize(
    ("saved", "built", "named"),
    [
        ("resnet18", "resnet26", r"layer1\.0\.conv1\.weight is \(64, 64, 1, 1\) in the network, "),
        ("resnet18", "resnet34", r"layer1\.2\.conv1\.weight is .* network, absent in the file"),
        ("resnet34", "resnet18", r"layer1\.2\..* is absent in the network, \(64"),
        ("vit_tiny_patch16_224", "resnet18", r"conv1\.weight .* absent in the file"),
    ],
)
def test_another_backbone_is_refused_and_nothing_changes(
    saved: str, built: str, named: str, tmp_path: Path
) -> None:
    export_backbone(timm.create_model(saved), tmp_path / "net.safetensors")
    net = timm.create_model(built)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=rf"does not fit ResNet in .*{named}.*'{saved}' by its"):
        load_backbone(tmp_path / "net.safetensors", net)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_lost_batch_statistics_are_refused_but_not_lost_counters(tmp_path: Path) -> None:
    weights = small_net().state_dict()
    del weights["1.num_batches_tracked"]
    save(weights, tmp_path / "net.pt")
    assert load_backbone(tmp_path / "net.pt", small_net()).missing == ("1.num_batches_tracked",)
    del weights["1.running_var"]
    save(weights, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"1\.running_var is \(8,\) in the network, absent"):
        load_backbone(tmp_path / "net.pt", small_net())
    save({"step": 1}, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"holds no tensors under its keys \('step'\); expected a"):
        load_backbone(tmp_path / "net.pt", small_net())
