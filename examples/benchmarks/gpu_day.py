"""Everything that is to be known of a GPU, in slices of at most 9 minutes.

    python examples/benchmarks/gpu_day.py --cifar FOLDER --pack runs/cifar10   # where the data is
    python examples/benchmarks/gpu_day.py --results runs/day.jsonl --peers peers --data runs/cifar10

Give the second command three times or more: each call goes on from what the file holds, and prints
the table of all of it. The cheapest and most telling steps come first; each is a process with a
limit of its time, so that one that fails becomes a row and the next goes on. At last the CIFAR-10
recipe trains for what is left of the time. --peers: see --help of step.py and augmentation.py.
--device cpu --toy runs all of it at its smallest, for figures that mean nothing.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECIPE, RECIPE_SECONDS = "CIFAR-10 recipe", 90  # less is not worth its start
STOPPING = 45  # seconds that a run needs to save and measure after --max-minutes
DATA = ("train.npz", "test.npz")
TOY_PATIENCE = 4  # times the limits, on a CPU that is busy
ERROR_LINES, ERROR_CHARACTERS = 3, 300

Row = tuple[str, str]  # what, and its value with the unit
Line = dict[str, Any]  # of the results file


@dataclass(frozen=True)
class Step:
    name: str
    seconds: int  # its limit
    script: str
    arguments: str
    toy: str  # arguments in their place
    rows: Callable[[dict[str, Any]], list[Row]]  # of the JSON that the script leaves
    has_peers: bool = False


def main() -> None:
    args = parse_arguments()
    if args.pack:
        return pack(args.cifar, args.pack)
    end = time.monotonic() + args.budget
    done = {line["step"] for line in read(args.results)} - set(args.again)
    card = run(STEPS[0], args, end)  # in every call: another call may meet another card
    for step in STEPS[1:]:
        needed = min(step.seconds, args.budget - 60)  # a short call starts it nevertheless
        if step.name not in done and end - time.monotonic() >= needed:
            run(step, args, end, card)
    if end - time.monotonic() >= RECIPE_SECONDS:
        train(args, end, card)
    lines = read(args.results)
    left = [step.name for step in STEPS if step.name not in {line["step"] for line in lines}]
    print(table(lines))
    if left:
        print(f"\nStill to come, by the same command: {', '.join(left)}.")
    return None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--results", type=Path, default=Path("runs/day.jsonl"), help="default: %(default)s")
    add("--budget", type=float, default=520, help="seconds of this call; default: %(default)s")
    add("--again", nargs="+", default=[], metavar="STEP", help="measure these steps once more")
    add("--peers", type=Path, metavar="FOLDER", help="where other libraries are installed")
    add("--data", type=Path, metavar="FOLDER", help="of --pack; without it no recipe runs")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--toy", action="store_true", help="all of it at its smallest")
    add("--pack", type=Path, metavar="FOLDER", help="copy CIFAR-10's files there, and end")
    add("--cifar", type=Path, metavar="FOLDER", help="of train.npz and test.npz to pack")
    args = parser.parse_args()
    known = [step.name for step in STEPS]
    if unknown := set(args.again) - set(known):
        parser.error(f"--again {', '.join(unknown)}; expected some of {', '.join(known)}")
    if (args.pack is None) != (args.cifar is None):
        parser.error("--pack and --cifar go together: to which folder, and from which")
    if args.cifar and not all((args.cifar / name).is_file() for name in DATA):
        parser.error(f"--cifar {args.cifar} has not both of {' and '.join(DATA)}")
    if args.data and not (args.data / "train.npz").is_file():
        parser.error(f"--data {args.data} has no train.npz; make it with --cifar and --pack")
    args.results.parent.mkdir(parents=True, exist_ok=True)
    return args


def pack(source: Path, folder: Path) -> None:
    """Copy the data next to the code, where git does not see it."""
    inside = folder.resolve().is_relative_to(ROOT)
    ignored = ["git", "-C", str(ROOT), "check-ignore", "-q", str(folder.resolve() / "train.npz")]
    if inside and subprocess.run(ignored, check=False).returncode:
        sys.exit(f"--pack {folder} is not ignored by git; expected a folder such as runs/cifar10")
    folder.mkdir(parents=True, exist_ok=True)
    for name in DATA:
        shutil.copyfile(source / name, folder / name)
        print(f"{folder / name}: {(folder / name).stat().st_size / 1e6:.1f} MB")


def run(step: Step, args: argparse.Namespace, end: float, card: str = "unknown") -> str:
    """Take the step and write its line; returns the card, which the first step says."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [step.script, "--device", args.device, "--json", str(file)]
        command += (step.toy if args.toy else step.arguments).split()
        if step.has_peers and args.peers:
            command += ["--peers", str(args.peers)]
        limit = min(step.seconds * (TOY_PATIENCE if args.toy else 1), end - time.monotonic())
        seconds, error = finish(command, limit)
        rows = [("failed", error)] if error else []
        if file.is_file():
            figures = json.loads(file.read_text())
            rows += step.rows(figures)
            card = figures.get("card", card)
    write(args.results, step.name, card, seconds, rows)
    return card


def train(args: argparse.Namespace, end: float, card: str) -> None:
    """The recipe, from where an earlier call left it, for the rest of the time."""
    if args.data is None:
        write(args.results, RECIPE, card, 0, [("left out", "--data is not given")])
        return
    output = args.results.with_suffix("")
    minutes = (end - time.monotonic() - STOPPING) / 60
    command = ["../imagenet_ddp.py", "--recipe", "small", "--data", str(args.data)]
    command += ["--output", str(output), "--device", args.device, "--max-minutes", f"{minutes:.2f}"]
    command += (TOY_RECIPE if args.toy else CIFAR_RECIPE).split()
    seconds, error = finish(command, end - time.monotonic())
    rows = [("failed", error)] if error else []
    write(args.results, RECIPE, card, seconds, rows + of_log(output / "log.jsonl"))


def finish(command: list[str], limit: float) -> tuple[float, str]:
    """Run a script of this folder; its seconds, and of its error the last lines."""
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    script, *arguments = command
    print(f"... {' '.join(command)}", file=sys.stderr, flush=True)
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str((HERE / script).resolve()), *arguments],
        env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        printed = process.communicate(timeout=limit)[1]
        error = last_lines(printed) if process.returncode else ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own processes too
        error = f"not done after {limit:.0f} s: {last_lines(process.communicate()[1])}"
    return time.monotonic() - start, error


def last_lines(printed: str) -> str:
    lines = [line.strip() for line in printed.replace("\r", "\n").splitlines() if line.strip()]
    return " / ".join(lines[-ERROR_LINES:])[-ERROR_CHARACTERS:] or "without a word"


# What the scripts leave, as rows ----------------------------------------------------------------


def of_parts(figures: dict[str, Any]) -> list[Row]:
    return [(what, value) for what, value in figures["rows"]]


def of_views(figures: dict[str, Any]) -> list[Row]:
    rows = of_views_here(figures)
    return rows + missing(rows, ("kornia", "torchvision", "torchtransform", "lightly"))


def of_views_here(figures: dict[str, Any]) -> list[Row]:
    return [
        (
            f"view {row['view']}, {row['method']}",
            f"{row['milliseconds']:.2f} ms, {row['times_floor']:.1f} x floor",
        )
        for row in figures["rows"]
    ]


def of_step(figures: dict[str, Any]) -> list[Row]:
    rows = [
        (
            row["contestant"],
            f"{row['milliseconds']:.1f} ms, {row['images_per_second']:.0f} images/s, "
            f"{row['times_floor']:.3f} x floor, peak {row['peak_mebibytes']:.0f} MiB",
        )
        for row in figures["rows"]
    ]
    parts = [(name, f"{ms:.2f} ms") for name, ms in figures["parts_milliseconds"].items()]
    return rows + missing(rows, ("byol-pytorch 0.9.1", "lightly")) + parts


def missing(rows: list[Row], peers: tuple[str, ...]) -> list[Row]:
    there = " ".join(what for what, _ in rows)
    return [(peer, "not installed, or it failed") for peer in peers if peer not in there]


def of_log(path: Path) -> list[Row]:
    """The last that the run wrote of each figure."""
    last: dict[str, Any] = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            last |= json.loads(line)
    names = ("step", "loss", "images_per_second", "epoch", "knn_accuracy")
    return [(name, f"{last[name]:.5g}") for name in names if last.get(name) is not None]


# The steps --------------------------------------------------------------------------------------

PARTS = "gpu_day_parts.py"
BIG = "--model resnet50 --batch-size 256 --dtype bfloat16 --channels-last"
TINY = "--model test_resnet --image-size 32 --batch-size 4 --steps 1 --threads 1"
FEW = "--sizes 32 --batch 4 --rounds 1 --threads 1"
CIFAR_RECIPE = (
    "--compile --channels-last --save-every 200 --knn-images 50000 --knn-neighbours 200 "
    "--knn-temperature 0.1"
)
TOY_RECIPE = (
    "--steps 2 --batch-size 8 --projection-hidden-size 16 --workers 0 --log-every 1 --knn-every 1"
)
STEPS = (
    Step("environment", 40, PARTS, "environment", "environment", of_parts),
    Step("tests", 180, PARTS, "tests", "tests --toy", of_parts),
    Step("step, 224 px", 160, "step.py", f"{BIG} --image-size 224 --steps 9", TINY, of_step, True),
    Step("GradScaler", 40, PARTS, "scaler", "scaler --toy", of_parts),
    Step(
        "views, 224 px", 180, "augmentation.py", "--sizes 224 --batch 256 --rounds 3",
        f"{FEW} --skip-compiled", of_views, True,
    ),
    Step("CUDA graph", 80, PARTS, "graph", "graph --toy", of_parts),
    Step("processes", 180, PARTS, "processes", "processes --toy", of_parts),
    Step(
        "step, 224 px, compiled", 180, "step.py", f"{BIG} --image-size 224 --steps 9 --compile",
        f"{TINY} --compile", of_step,
    ),
    Step("step, 96 px", 80, "step.py", f"{BIG} --image-size 96", TINY, of_step, True),
    Step(
        "step, 32 px", 80, "step.py", f"{BIG} --image-size 32 --views cifar",
        f"{TINY} --views cifar", of_step, True,
    ),
    Step(
        "views of kornia compiled, 224 px", 180, "augmentation.py",
        "--sizes 224 --batch 256 --rounds 3 --compile-kornia --skip-compiled --views 2",
        f"{FEW} --compile-kornia --skip-compiled --views 2", of_views_here,
    ),
)  # fmt: skip


# The results file -------------------------------------------------------------------------------


def read(path: Path) -> list[Line]:
    """The last line of each step, in the order of the steps."""
    if not path.is_file():
        return []
    lines = {line["step"]: line for line in map(json.loads, path.read_text().splitlines())}
    order = [step.name for step in STEPS] + [RECIPE]
    return sorted(lines.values(), key=lambda line: order.index(line["step"]))


def write(path: Path, step: str, card: str, seconds: float, rows: list[Row]) -> None:
    line = {"step": step, "card": card, "seconds": round(seconds, 1), "rows": rows}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def table(lines: list[Line]) -> str:
    printed = ["| step | card | what | value |", "|---|---|---|---|"]
    for line in lines:
        for what, value in [*line["rows"], ("seconds of this step", line["seconds"])]:
            value = str(value).replace("|", "/")
            printed.append(f"| {line['step']} | {line['card']} | {what} | {value} |")
    return "\n".join(printed)


if __name__ == "__main__":
    main()
