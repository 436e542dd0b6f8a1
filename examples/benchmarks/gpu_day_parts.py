"""The steps of gpu_day.py that no other script has; each leaves its rows in a JSON file."""

import argparse
import copy
import importlib.metadata
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from byol_pytorch import BYOL
from byol_pytorch.heads import sync_batchnorm

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "torchvision", "kornia", "timm", "lightly", "torchtransform")
STEPS, WARM = 8, 3  # of a training; those that are not timed
HOWS = (  # of "processes": what, how many, on a GPU through
    ("DDP", 2, "gloo"),  # NCCL refuses two ranks on one GPU
    ("DDP, compiled", 2, "gloo"),
    ("DDP", 1, "nccl"),
    ("DDP, compiled", 1, "nccl"),
    ("FSDP2", 1, "nccl"),
)

Row = tuple[str, str]


def main() -> None:
    args = parse_arguments()
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    rows: list[Row] = []
    for row in PARTS[args.part](args):
        rows.append(row)  # kept also where the next one takes too long
        args.json.write_text(json.dumps({"card": card, "rows": rows}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", required=True)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--toy", action="store_true")
    return parser.parse_args()


def environment(args: argparse.Namespace) -> Iterator[Row]:
    if args.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        yield (
            "card",
            f"{card.name}, {card.total_memory / 2**30:.0f} GiB, sm_{card.major}{card.minor}",
        )
        yield "CUDA of torch", str(torch.version.cuda)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            found = subprocess.run(query, capture_output=True, text=True, timeout=30)
            yield "driver", found.stdout.strip() or found.stderr.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            yield "driver", f"unknown: {error}"
    yield "python", platform.python_version()
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"


def tests(args: argparse.Namespace) -> Iterator[Row]:
    """The tests that need a GPU."""
    import pytest

    class Reports:
        def __init__(self) -> None:
            self.counts = {"passed": 0, "failed": 0, "skipped": 0}
            self.failures: list[Row] = []

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                self.counts[report.outcome] += 1
            if report.failed:
                sentence = report.longreprtext.strip().splitlines()[-1]
                self.failures.append((report.nodeid, sentence[:200]))

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                self.counts["failed"] += 1
                self.failures.append((report.nodeid, report.longreprtext.strip()[-200:]))

    reports = Reports()
    what = (
        [str(ROOT / "tests" / "test_loss.py")] if args.toy else ["-m", "gpu", str(ROOT / "tests")]
    )
    # Without the options of pyproject.toml: its plug-ins need not be there.
    code = pytest.main(["-o", "addopts=", "--rootdir", str(ROOT), *what], plugins=[reports])
    counts = ", ".join(f"{count} {outcome}" for outcome, count in reports.counts.items())
    name = "pytest of test_loss.py" if args.toy else "pytest -m gpu"
    yield name, f"{counts} (exit status {int(code)})"
    yield from reports.failures


def scaler(args: argparse.Namespace) -> Iterator[Row]:
    """float16 under GradScaler, from a scale that is too large at first."""
    learner, optimizer = build(args)
    grad_scaler = torch.amp.GradScaler(args.device, init_scale=2.0**40)
    one, two = views(args, batch=4 if args.toy else 32)
    losses = []
    for _ in range(4 if args.toy else 40):
        optimizer.zero_grad()
        with torch.autocast(args.device, torch.float16):
            loss = learner(one, two)
        grad_scaler.scale(loss).backward()
        grad_scaler.step(optimizer)
        grad_scaler.update()
        learner.update_moving_average()
        losses.append(loss.item())
    finite = all(torch.isfinite(p).all() for p in learner.parameters())
    yield f"loss, first and last of {len(losses)} steps", f"{losses[0]:.4f}, {losses[-1]:.4f}"
    yield "scale at the end, of 2^40", f"{grad_scaler.get_scale():g}"
    yield "all parameters finite", "yes" if finite else "NO"


def graph(args: argparse.Namespace) -> Iterator[Row]:
    """The whole step on ready views captured in a CUDA graph, against the same step eager."""
    for size in (32,) if args.toy else (32, 96, 224):
        learner, optimizer = build(args, size)
        batch = 4 if args.toy else 256
        one, two = views(args, batch, size)
        step = step_of(learner, optimizer, one, two, args, torch.bfloat16)
        seconds = [timed(step, args) for _ in range(STEPS)]
        state = copy.deepcopy((learner.state_dict(), optimizer.state_dict()))
        expected = [float(step()) for _ in range(5)]
        learner.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
        replay, result, taken = captured(step, args)
        got = []
        for _ in range(5 - taken):
            replay()
            got.append(float(result))
        apart = max(abs(a - b) for a, b in zip(expected[taken:], got, strict=True))
        replays = [timed(replay, args) for _ in range(STEPS)]
        eager, replayed = (statistics.median(times[WARM:]) * 1e3 for times in (seconds, replays))
        how = "replayed" if args.device == "cuda" else "(no CUDA graphs on a CPU)"
        yield f"{size} px, batch {batch}", f"eager {eager:.2f} ms, {how} {replayed:.2f} ms"
        yield f"{size} px, losses apart", f"{apart:.1e} at most, of {expected[-1]:.4f}"


def captured(
    step: Callable[[], Tensor], args: argparse.Namespace
) -> tuple[Callable[[], object], Tensor, int]:
    """A replay of the step, the loss that it writes, and how many steps were taken for it."""
    if args.device != "cuda":
        result = torch.zeros(())
        return lambda: result.copy_(step()), result, 0
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    cuda_graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(cuda_graph):
        result = step()
    return cuda_graph.replay, result, 3


def processes(args: argparse.Namespace) -> Iterator[Row]:
    """Losses of two processes, and of one under each wrapper, against none of these."""
    alone = spawn("plain", 1, "gloo", args)
    yield "plain, one process", f"{alone['milliseconds']:.1f} ms"
    for how, world, backend in HOWS:
        backend = backend if args.device == "cuda" else "gloo"
        name = f"{how}, {world} process{'es' if world > 1 else ''} through {backend}"
        try:
            found = spawn(how, world, backend, args)
        except Exception as error:  # what one way of wrapping does not do, others may
            yield name, f"FAILED: {str(error).strip().splitlines()[-1][:200]}"
            continue
        pairs = zip(found["losses"], alone["losses"], strict=True)
        apart = max(abs(a - b) for a, b in pairs)
        yield name, f"{found['milliseconds']:.1f} ms, losses apart {apart:.1e} at most"


def spawn(how: str, world: int, backend: str, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_of, (how, world, backend, args, folder), nprocs=world)
        return json.loads((Path(folder) / "rank0.json").read_text())


def rank_of(
    rank: int, how: str, world: int, backend: str, args: argparse.Namespace, folder: str
) -> None:
    torch.set_num_threads(1)
    # Exact float32: the losses are to be compared.
    torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group(
        backend, f"file://{folder}/store", world_size=world, rank=rank,
        timeout=timedelta(seconds=100),
    )  # fmt: skip
    size, batch = (32, 4) if args.toy else (96, 64)
    learner, _ = build(args, size)
    if "compiled" in how:
        learner.compile(fullgraph=True, backend="aot_eager" if args.toy else "inductor")
    model: nn.Module = learner
    if how.startswith("DDP"):
        model = DistributedDataParallel(learner)
    elif how == "FSDP2":
        fully_shard(learner, mesh=init_device_mesh(args.device, (world,)))
    optimizer = torch.optim.SGD(learner.parameters(), 0.01, momentum=0.9)
    one, two = (view.chunk(world)[rank] for view in views(args, batch, size))
    step = step_of(learner, optimizer, one, two, args, None, model)
    losses, seconds = [], []
    for _ in range(STEPS):
        start = time.perf_counter()
        loss = step() / world
        dist.all_reduce(loss)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        figures = {"losses": losses, "milliseconds": statistics.median(seconds[WARM:]) * 1e3}
        (Path(folder) / "rank0.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


def build(args: argparse.Namespace, size: int = 32) -> tuple[BYOL, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net: nn.Module = nn.Sequential(
        nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()
    )
    if not args.toy:
        net = timm.create_model("resnet50", num_classes=0)
    net = sync_batchnorm(net)
    learner = BYOL(net, size, projection_hidden_size=32 if args.toy else 4096).to(args.device)
    return learner, torch.optim.SGD(learner.parameters(), 0.01, momentum=0.9)


def views(args: argparse.Namespace, batch: int, size: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    one, two = (torch.randn(batch, 3, size, size, generator=generator) for _ in range(2))
    return one.to(args.device), two.to(args.device)


def step_of(
    learner: BYOL, optimizer: torch.optim.Optimizer, one: Tensor, two: Tensor,
    args: argparse.Namespace, amp: torch.dtype | None, model: nn.Module | None = None,
) -> Callable[[], Tensor]:  # fmt: skip
    def step() -> Tensor:
        optimizer.zero_grad()
        # Without the cache of cast weights: a captured graph must cast them itself.
        with torch.autocast(args.device, amp, enabled=amp is not None, cache_enabled=False):
            loss = (model or learner)(one, two)
        loss.backward()
        optimizer.step()
        learner.update_moving_average()
        return loss.detach()

    return step


def timed(work: Callable[[], object], args: argparse.Namespace) -> float:
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "environment": environment, "tests": tests, "scaler": scaler, "graph": graph,
    "processes": processes,
}  # fmt: skip

if __name__ == "__main__":
    main()
