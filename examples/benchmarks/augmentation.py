"""Times BYOL's two view distributions against stock kornia, torchvision and lightly, side by side.

    python examples/benchmarks/augmentation.py --sizes 224 --batch 64 --json figures.json

uint8 images go in, normalised float32 views come out, on the device at hand. The methods take turns
in every round and the medians are reported, so that a busy machine slows all of them alike.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import kornia.augmentation as K
import torch
import torchvision.transforms.v2 as T
from torch import Tensor, nn

from byol_pytorch.augment import IMAGENET_MEAN, IMAGENET_STD, byol_views, per_image

BLUR = (1.0, 0.1)  # of the first and the second view
SOLARIZE = (0.0, 0.2)
Method = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    size: int
    view: int
    method: str
    milliseconds: float  # median, of one batch
    images_per_second: float
    times_ours: float  # time over that of ours, eager
    times_floor: float  # time over that of reading the images and writing the views once
    peak_memory: float  # most extra memory held at a time, over the bytes of the views


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    bandwidth = copy_bandwidth(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{args.threads} CPU threads"
    print(
        f"{name}, torch {torch.__version__}, batch {args.batch}, {bandwidth / 1e9:.1f} GB/s copied"
    )
    rows = []
    for size in args.sizes:
        images = smooth_noise(args.batch, round(size * 256 / 224)).to(device)
        floor = (images.nbytes + args.batch * 3 * size * size * 4) / bandwidth
        for view in args.views:
            methods = peers(size, view - 1, images, compiled=not args.skip_compiled)
            seconds = medians(methods, images, args.rounds)
            ours = seconds["byol_pytorch, eager"]
            for method, s in seconds.items():
                memory = peak_memory(methods[method], images) / (args.batch * 3 * size * size * 4)
                figures = (s * 1e3, args.batch / s, s / ours, s / floor, memory)
                rows.append(Row(size, view, method, *(round(figure, 3) for figure in figures)))
            print_table([row for row in rows if (row.size, row.view) == (size, view)])
    if args.json:
        setting = {**vars(args), "json": None, "device": name, "copy_gb_per_s": bandwidth / 1e9}
        args.json.write_text(
            json.dumps({**setting, "rows": [asdict(row) for row in rows]}, indent=2)
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[32, 96, 224], help="side of the views"
    )
    parser.add_argument("--views", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument("--batch", type=int, default=256 if device == "cuda" else 32)
    parser.add_argument("--rounds", type=int, default=7, help="timed turns of each method")
    parser.add_argument("--device", default=device)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on a CPU")
    parser.add_argument("--skip-compiled", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    args = parser.parse_args()
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    return args


def peers(size: int, index: int, images: Tensor, *, compiled: bool) -> dict[str, Method]:
    view = byol_views(size)[index]
    methods: dict[str, Method] = {"byol_pytorch, eager": view}
    if compiled:
        methods["byol_pytorch, compiled"] = torch.compile(view, fullgraph=True)
    stock = kornia_operations(size, index, images.device)
    container = K.AugmentationSequential(*stock, data_keys=["input"])
    plain = nn.Sequential(*stock)
    methods["kornia AugmentationSequential"] = lambda x: container(x / 255)
    methods["kornia nn.Sequential"] = lambda x: plain(x / 255)
    torchvision = torchvision_transform(size, index)
    methods["torchvision v2, per image"] = per_image(torchvision)
    methods["torchvision v2, ONE draw a batch"] = torchvision
    if importlib.util.find_spec("lightly"):
        methods["lightly BYOL transform, per image"] = lightly_transform(size, index)
    return methods


def kornia_operations(size: int, index: int, device: torch.device) -> list[nn.Module]:
    mean, std = (torch.tensor(values, device=device) for values in (IMAGENET_MEAN, IMAGENET_STD))
    kernel = 2 * int(size / 20) + 1
    operations = [
        K.RandomResizedCrop((size, size), (0.08, 1.0), (3 / 4, 4 / 3), resample="bicubic"),
        K.RandomHorizontalFlip(0.5),
        K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=BLUR[index]),
        K.Normalize(mean, std),
    ]
    if SOLARIZE[index]:
        solarize = K.RandomSolarize((0.5, 0.5), (0.0, 0.0), p=SOLARIZE[index])
        operations.insert(-1, solarize)
    return operations


def torchvision_transform(size: int, index: int) -> T.Transform:
    blur = T.GaussianBlur(2 * int(size / 20) + 1, (0.1, 2.0))
    return T.Compose(
        [
            T.RandomResizedCrop(size, interpolation=T.InterpolationMode.BICUBIC, antialias=True),
            T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            T.RandomGrayscale(0.2),
            T.RandomApply([blur], p=BLUR[index]),
            T.RandomSolarize(128, p=SOLARIZE[index]),
            T.ToDtype(torch.float32, scale=True),
            T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def lightly_transform(size: int, index: int) -> Method:
    """On PIL images, as lightly's loaders give them; turning tensors into those is part of it."""
    from lightly.transforms import byol_transform

    kind = (byol_transform.BYOLView1Transform, byol_transform.BYOLView2Transform)[index]
    return per_image(T.Compose([T.ToPILImage(), kind(input_size=size)]))


def smooth_noise(batch: int, side: int) -> Tensor:
    """uint8 images with a photograph's share of low frequencies."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, 8, 8, generator=generator)
    fine = torch.rand(batch, 3, side, side, generator=generator)
    images = nn.functional.interpolate(coarse, (side, side), mode="bicubic") * 0.8 + fine * 0.2
    return (images.clamp(0, 1) * 255).to(torch.uint8)


def medians(methods: dict[str, Method], images: Tensor, rounds: int) -> dict[str, float]:
    for method in methods.values():
        for _ in range(3):
            method(images)
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            times[name].append(seconds_of(lambda method=method: method(images), images.device))
    return {name: statistics.median(values) for name, values in times.items()}


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source).copy_(source)
    best = min(seconds_of(lambda: target.copy_(source), device) for _ in range(7))
    return 2 * source.nbytes / best


def peak_memory(method: Method, images: Tensor) -> int:
    """The most bytes that one call holds at a time beyond its input, its result included."""
    if images.device.type == "cuda":
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


def print_table(rows: list[Row]) -> None:
    print(f"\n{rows[0].size} px, view {rows[0].view}")
    print(f"{'':36}{'ms':>9}{'images/s':>10}{'x ours':>8}{'x floor':>9}{'memory':>8}")
    for row in rows:
        print(
            f"{row.method:36}{row.milliseconds:9.2f}{row.images_per_second:10.0f}"
            f"{row.times_ours:8.2f}{row.times_floor:9.1f}{row.peak_memory:8.2f}"
        )
    print("ms: one batch; memory: peak, result included, over the bytes of the float32 views")


if __name__ == "__main__":
    main()
