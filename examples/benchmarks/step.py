"""Times one step of BYOL against what its backbone alone costs, and against other libraries.

    python examples/benchmarks/step.py --json figures.json
    pip install --target peers --no-deps byol-pytorch==0.9.1 einops
    python examples/benchmarks/step.py --peers peers
    pip install --target peers --no-deps lightly lightly-utils
    python examples/benchmarks/step.py --peers peers --workers 16 --views cifar --image-size 32

The floor is the backbone's share of a step: two forward-backwards, two forwards without gradient
and the optimizer, on views that are ready. On ready views the others add heads, loss and EMA;
end to end also the views, of each library's own kind, from uint8 images. Each contestant lives in
a process of its own, and they take turns, so that a busy machine slows all of them alike. Heads
4096 wide and torch's SGD everywhere; LARS, SGD and the EMA are timed apart. With --workers also
lightly's whole step with its views from a DataLoader, of pictures that are decoded already.
"""

import argparse
import importlib.util
import json
import multiprocessing
import resource
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import timm
import torch
from step_contestants import (
    FLOOR,
    LIGHTLY_READY,
    OURS,
    OURS_JOINT,
    OURS_READY,
    PEER,
    PEER_READY,
    Step,
    backbone,
    build,
    lightly,
    lightly_batches,
    peer_file,
    sgd,
)  # fmt: skip

from byol_pytorch import BYOL
from byol_pytorch.augment import PRESETS
from byol_pytorch.optim import LARS, param_groups

PARTS = ("EMA", "SGD", "LARS")
Turns = dict[str, list[list[float]]]  # of each contestant, seconds of each step of each turn
TURN = 3  # timed steps of one turn; one before them is not timed


@dataclass(frozen=True)
class Row:
    contestant: str
    milliseconds: float  # median, of one step
    images_per_second: float
    times_floor: float  # median over the rounds
    peak_mebibytes: float  # allocated on the GPU; on a CPU the process's largest resident set


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    contestants = [FLOOR, OURS_READY, OURS]
    if args.peers:
        contestants += [OURS_JOINT, PEER_READY, PEER]
        sys.path.append(str(args.peers))
    if importlib.util.find_spec("lightly"):
        contestants.append(LIGHTLY_READY)
    elif args.workers:
        sys.exit("--workers times lightly, which is not there; see the fourth line of --help")
    print(describe(args))
    workers = {name: worker for name in contestants if (worker := start(name, args))}
    turns: Turns = {name: [] for name in workers}
    for _ in range(-(-args.steps // TURN)):
        for name, worker in workers.items():
            worker.send("turn")
            turns[name].append(worker.recv())
    rows = [
        row_of(name, turns, finish(worker), args.batch_size) for name, worker in workers.items()
    ]
    print_table(rows)
    parts = time_parts(args)
    print_parts(parts, turns)
    data_path = {}
    if args.workers and LIGHTLY_READY in turns:
        data_path = time_data_path(args)
        print_data_path(data_path, rows, args)
    if args.json:
        setting = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        rows_and_parts = {"rows": [asdict(row) for row in rows], "parts_milliseconds": parts}
        rows_and_parts["lightly_images_per_second"] = data_path
        args.json.write_text(
            json.dumps({**setting, "setting": describe(args), **rows_and_parts}, indent=2) + "\n"
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--device", default="cuda" if gpu else "cpu", help="default: %(default)s, as found here")
    add("--model", help="of timm; default: resnet50 on a GPU, resnet18 on a CPU")
    add("--image-size", type=int, help="side of the views; default: 224 on a GPU, 64 on a CPU")
    add("--batch-size", type=int, help="images a step; default: 256 on a GPU, 32 on a CPU")
    add("--dtype", choices=["float32", "bfloat16"], help="of autocast; default: bfloat16 on a GPU")
    add("--channels-last", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    add("--compile", action="store_true", help="the whole learner; of the others the backbones")
    add(
        "--steps",
        type=int,
        default=15,
        help=f"timed steps of each, in turns of {TURN}; default: %(default)s",
    )
    add(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: the processes' CPU time, for busy machines without GPU; default: %(default)s",
    )
    add("--views", choices=PRESETS, default="imagenet", help="of the end-to-end rows")
    add("--workers", type=int, help="time lightly's views too, made by so many processes")
    add("--threads", type=int, default=torch.get_num_threads(), help="of a CPU")
    add("--peers", type=Path, metavar="FOLDER", help="where byol-pytorch 0.9.1 is installed")
    add("--json", type=Path, metavar="FILE", help="write the figures there as well")
    args = parser.parse_args()
    big = torch.device(args.device).type == "cuda"
    defaults = {
        "model": "resnet50" if big else "resnet18",
        "image_size": 224 if big else 64,
        "batch_size": 256 if big else 32,
        "dtype": "bfloat16" if big else "float32",
        "channels_last": big,
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers {args.workers}; expected a number of at least 1")
    if args.workers and args.clock == "cpu":
        parser.error("--workers needs --clock wall: other processes' CPU time is not seen here")
    if args.steps < 1:
        parser.error(f"--steps {args.steps}; expected a number of at least 1")
    if big and not gpu:
        parser.error(f"--device {args.device}, but torch finds no GPU here; use --device cpu")
    if not timm.is_model(args.model):
        parser.error(f"--model {args.model} is unknown to timm; see timm.list_models()")
    if args.peers and not peer_file(args).is_file():
        parser.error(f"{peer_file(args)} is not there; see the second line of --help")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    return args


def time_parts(args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of the EMA, and of SGD's and LARS's step, over the learner's parameters."""
    learner = BYOL(backbone(args), args.image_size).to(args.device)
    groups = param_groups(learner, weight_decay=1e-6)
    for group in groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    lars = LARS([dict(group) for group in groups], lr=1e-4)
    steps = dict(
        zip(PARTS, (learner.update_moving_average, sgd(groups).step, lars.step), strict=True)
    )
    times: dict[str, list[float]] = {name: [] for name in PARTS}
    for turn in range(3 + max(args.steps, 20)):
        for name, step in steps.items():
            seconds = seconds_of(step, args)
            if turn >= 3:
                times[name].append(seconds * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def time_data_path(args: argparse.Namespace) -> dict[str, float]:
    """Images a second of lightly's DataLoader alone, and of its whole step behind that."""
    ahead, timed = 2 * args.workers + 2, max(args.steps, 2 * args.workers)

    def images_per_second(step: Step) -> float:
        for _ in range(ahead):  # what the workers had made in advance
            step()
        seconds = seconds_of(lambda: [step() for _ in range(timed)], args)
        return args.batch_size * timed / seconds

    batches = lightly_batches(args)
    alone = images_per_second(lambda: next(batches))
    whole = images_per_second(lightly(backbone(args), lambda: next(batches), args))
    return {"data": alone, "whole": whole}


def print_data_path(path: dict[str, float], rows: list[Row], args: argparse.Namespace) -> None:
    speed = {row.contestant: row.images_per_second for row in rows}
    binds = "data" if path["data"] < speed[LIGHTLY_READY] else "step"
    print(
        f"lightly's parts with its views from {args.workers} workers: {path['whole']:.1f} images/s "
        f"(data alone {path['data']:.1f}, step alone {speed[LIGHTLY_READY]:.1f}: the {binds} "
        f"binds); {OURS} end to end is {speed[OURS] / path['whole']:.2f} times as fast"
    )


def start(name: str, args: argparse.Namespace) -> Connection | None:
    """A process for the contestant, ready to take turns; None where a peer cannot be built."""
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    context.Process(target=serve, args=(there, name, args), daemon=True).start()
    there.close()  # the process holds it; its end is noticed so
    try:
        trouble = here.recv()
    except EOFError:
        trouble = "its process was ended, perhaps for want of memory"
    if trouble and name in (FLOOR, OURS, OURS_READY):
        sys.exit(f"{name} failed: {trouble}")
    if trouble:
        print(f"{name} is left out: {trouble}", file=sys.stderr)
        return None
    return here


def serve(parent: Connection, name: str, args: argparse.Namespace) -> None:
    """Build the contestant, then take a turn at each message until the parent says stop."""
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    if args.peers:
        sys.path.append(str(args.peers))
    try:
        step = build(name, args)
        step()
    except Exception as error:
        parent.send(f"{type(error).__name__}: {error}")
        return
    parent.send("")
    while parent.recv() == "turn":
        step()
        parent.send([seconds_of(step, args) for _ in range(TURN)])
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()  # the GPU is the next one's
    parent.send(peak_bytes(args))


def row_of(name: str, turns: Turns, peak: int, batch_size: int) -> Row:
    seconds = statistics.median(s for turn in turns[name] for s in turn)
    times_floor = ratio(turns, name, FLOOR)
    return Row(name, seconds * 1e3, batch_size / seconds, times_floor, peak / 2**20)


def ratio(turns: Turns, name: str, other: str) -> float:
    """How many times the other's time: within a round, where both met the same machine."""
    rounds = zip(turns[name], turns[other], strict=True)
    return statistics.median(statistics.median(a) / statistics.median(b) for a, b in rounds)


def finish(worker: Connection) -> int:
    worker.send("stop")
    return int(worker.recv())


def seconds_of(step: Step, args: argparse.Namespace) -> float:
    synchronize = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    synchronize()
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    begin = clock()
    step()
    synchronize()
    return clock() - begin


def peak_bytes(args: argparse.Namespace) -> int:
    if args.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts the parent's memory too, until exec
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def describe(args: argparse.Namespace) -> str:
    cuda = args.device.startswith("cuda")
    name = torch.cuda.get_device_name(args.device) if cuda else f"{args.threads} CPU threads"
    layout = ", channels_last" if args.channels_last else ""
    clock = ", CPU time" if args.clock == "cpu" else ""
    return (
        f"{name}{clock}, torch {torch.__version__}: {args.model}, {args.image_size} px, batch "
        f"{args.batch_size}, {args.dtype}{layout}{', compiled' if args.compile else ''}"
    )


def print_table(rows: list[Row]) -> None:
    print(f"{'':34}{'ms':>9}{'images/s':>10}{'x floor':>9}{'peak MiB':>10}")
    for row in rows:
        print(
            f"{row.contestant:34}{row.milliseconds:9.1f}{row.images_per_second:10.1f}"
            f"{row.times_floor:9.3f}{row.peak_mebibytes:10.0f}"
        )


def print_parts(parts: dict[str, float], turns: Turns) -> None:
    print(", ".join(f"{name} {parts[name]:.2f} ms" for name in PARTS), end="; ")
    print(f"LARS takes {parts['LARS'] / parts['SGD']:.2f} times torch's SGD")
    pairs = [(OURS, PEER), (OURS_JOINT, PEER_READY), (OURS_READY, LIGHTLY_READY)]
    for ours, other in pairs:
        if other in turns:
            print(f"{ours} is {ratio(turns, other, ours):.2f} times as fast as {other}")


if __name__ == "__main__":
    main()
