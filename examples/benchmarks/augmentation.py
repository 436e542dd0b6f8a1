"""Times BYOL's two view distributions against those of other libraries, side by side.

    python examples/benchmarks/augmentation.py --sizes 224 --batch 64 --json figures.json
    pip install --target peers --no-deps torchtransform==1.0.1 lightly lightly-utils
    python examples/benchmarks/augmentation.py --peers peers --float

uint8 images go in, with --float also float images in [0, 1]; normalised float32 views come out, on
the device at hand. All methods take a turn in every round, at both views, and each is set against
ours of the same round: a busy machine slows both alike. The medians over the rounds are printed,
first of each view, then of both together. A peer that is not installed is left out.
"""

import argparse
import json
import statistics
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from augmentation_methods import OURS, Method, available
from torch import Tensor, nn

Key = tuple[str, str]  # a method's name, and the kind of images that it gets: "uint8" or "float"
Turns = dict[Key, list[list[float]]]  # of each method and round, the seconds of each view


@dataclass(frozen=True)
class Row:
    size: int
    view: int | str  # 1, 2 or "both"
    method: str
    images: str  # "uint8" or "float"
    milliseconds: float  # median, of one batch
    images_per_second: float
    times_floor: float  # time over that of reading the images and writing the views once
    peak_memory: float  # most extra memory held at a time, over the bytes of one view
    times_ours: float  # time over that of ours, eager, from uint8: median over the rounds
    times_ours_float: float | None = None  # the same, of ours from float images; with --float


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    # A view that cannot be compiled goes on without; here it would be timed under a wrong name.
    warnings.filterwarnings("error", "The views go on uncompiled")
    device = torch.device(args.device)
    bandwidth = copy_bandwidth(device, args.clock)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{args.threads} CPU threads"
    print(
        f"{name}{', CPU time' if args.clock == 'cpu' else ''}, torch {torch.__version__}, "
        f"batch {args.batch}, {bandwidth / 1e9:.1f} GB/s copied"
    )
    builders = available(args)
    rows = []
    for size in args.sizes:
        torch.compiler.reset()  # a few sizes would reach torch's limit of recompilations
        batches = {"uint8": smooth_noise(args.batch, round(size * 256 / 224)).to(device)}
        if args.float:
            batches["float"] = batches["uint8"] / 255
        methods = {
            (name, kind): [build(size, view - 1, kind, device) for view in args.views]
            for kind in batches
            for name, build in builders.items()
        }
        turns = take_turns(methods, batches, args)
        of_size = rows_of(size, turns, methods, batches, bandwidth, args.views)
        print_tables(of_size)
        rows += of_size
    if args.json:
        setting = {**vars(args), "json": None, "peers": None, "device": name}
        setting["copy_gb_per_s"] = bandwidth / 1e9
        args.json.write_text(
            json.dumps({**setting, "rows": [asdict(row) for row in rows]}, indent=2) + "\n"
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[32, 96, 224], help="default: %(default)s")
    add("--views", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    add("--batch", type=int, default=256 if gpu else 32, help="default: %(default)s")
    add("--rounds", type=int, default=11, help="turns of each method; default: %(default)s")
    add("--float", action="store_true", help="time float images in [0, 1] as well as uint8 ones")
    add(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: the process's CPU time, for busy machines without GPU; default: %(default)s",
    )
    add("--device", default="cuda" if gpu else "cpu", help="default: %(default)s, as found here")
    add("--threads", type=int, default=torch.get_num_threads(), help="of a CPU")
    add("--skip-compiled", action="store_true", help="leave our compiled views out")
    add("--compile-kornia", action="store_true", help="stock kornia compiled too: minutes a view")
    add("--peers", type=Path, metavar="FOLDER", help="where torchtransform and lightly are")
    add("--json", type=Path, metavar="FILE", help="write the figures there as well")
    args = parser.parse_args()
    args.views = sorted(set(args.views))
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}; expected a number of at least 1")
    if args.clock == "cpu" and torch.device(args.device).type != "cpu":
        parser.error(f"--clock cpu does not see what {args.device} does; use --clock wall")
    if args.peers and not args.peers.is_dir():
        parser.error(f"--peers {args.peers} is no folder; see the second line of --help")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    return args


def smooth_noise(batch: int, side: int) -> Tensor:
    """uint8 images with a photograph's share of low frequencies."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, 8, 8, generator=generator)
    fine = torch.rand(batch, 3, side, side, generator=generator)
    images = nn.functional.interpolate(coarse, (side, side), mode="bicubic") * 0.8 + fine * 0.2
    return (images.clamp(0, 1) * 255).to(torch.uint8)


def take_turns(
    methods: dict[Key, list[Method]], batches: dict[str, Tensor], args: argparse.Namespace
) -> Turns:
    for (_, kind), views in methods.items():
        for view in views:
            for _ in range(3):
                view(batches[kind])
    turns: Turns = {key: [] for key in methods}
    keys = list(methods)
    for number in range(args.rounds):
        for key in keys if number % 2 == 0 else reversed(keys):  # so that neighbours change
            images = batches[key[1]]
            seconds = [seconds_of(view, images, args.clock) for view in methods[key]]
            turns[key].append(seconds)
    return turns


def seconds_of(work: Method, images: Tensor, clock: str) -> float:
    synchronize = torch.cuda.synchronize if images.is_cuda else lambda: None
    now = time.process_time if clock == "cpu" else time.perf_counter
    synchronize()
    start = now()
    work(images)
    synchronize()
    return now() - start


def copy_bandwidth(device: torch.device, clock: str) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source).copy_(source)
    best = min(seconds_of(target.copy_, source, clock) for _ in range(7))
    return 2 * source.nbytes / best


def peak_memory(method: Method, images: Tensor) -> int:
    """The most bytes that one call holds at a time beyond its input, its result included."""
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        method(images)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        method(images)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def rows_of(
    size: int,
    turns: Turns,
    methods: dict[Key, list[Method]],
    batches: dict[str, Tensor],
    bandwidth: float,
    views: list[int],
) -> list[Row]:
    """The rows of each view, then of both together."""
    batch = len(batches["uint8"])
    view_bytes = batch * 3 * size * size * 4
    peaks = {
        key: [peak_memory(view, batches[key[1]]) / view_bytes for view in methods[key]]
        for key in methods
    }
    parts: dict[int | str, list[int]] = {view: [i] for i, view in enumerate(views)}
    if len(views) == 2:
        parts["both"] = [0, 1]
    rows = []
    for part, chosen in parts.items():
        rounds = {key: [sum(turn[i] for i in chosen) for turn in turns[key]] for key in turns}
        for (name, kind), seconds in rounds.items():
            median = statistics.median(seconds)
            ratios = [median_ratio(seconds, rounds[OURS, base]) for base in batches]
            floor = len(chosen) * (batches[kind].nbytes + view_bytes) / bandwidth
            peak = max(peaks[name, kind][i] for i in chosen)
            figures = (median * 1e3, batch / median, median / floor, peak, *ratios)
            rows.append(Row(size, part, name, kind, *(round(figure, 3) for figure in figures)))
    return rows


def median_ratio(seconds: list[float], base: list[float]) -> float:
    """Within a round, where both met the same machine."""
    return statistics.median(a / b for a, b in zip(seconds, base, strict=True))


def print_tables(rows: list[Row]) -> None:
    for part, title in {1: "view 1", 2: "view 2", "both": "both views"}.items():
        of_part = [row for row in rows if row.view == part]
        if of_part:
            print(f"\n{rows[0].size} px, {title}")
            print(f"{'':34}{'images':>7}{'ms':>10}{'images/s':>10}", end="")
            print(f"{'x floor':>9}{'memory':>8}{'x ours':>8}{'x float':>9}")
        for row in of_part:
            ratio = "" if row.times_ours_float is None else f"{row.times_ours_float:9.2f}"
            print(
                f"{row.method:34}{row.images:>7}{row.milliseconds:10.2f}"
                f"{row.images_per_second:10.0f}{row.times_floor:9.1f}{row.peak_memory:8.2f}"
                f"{row.times_ours:8.2f}{ratio}"
            )
    print("ms: one batch; memory: peak, result included, over the bytes of one float32 view;")
    print("x ours: over our eager views from uint8; x float: over those from float (with --float)")


if __name__ == "__main__":
    main()
