"""How long, and for how much, a pre-training run would take on more GPUs than are at hand.

    python examples/benchmarks/step.py --json step.json              # on one of those GPUs
    python examples/benchmarks/scaling.py --step step.json --data IMAGENET --price 2.5

A calculation from three measurements (the step on one GPU; what a CPU core of this machine decodes
of the data; the bytes of gradients and batch statistics) and the assumptions that it prints. One
optimizer step costs its share of the batch at the measured rate, then a ring all-reduce, which is
taken to hide behind nothing; the data path runs beside it, and the slower of the two counts.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from step_contestants import OURS

sys.path.insert(0, str(Path(__file__).parents[1]))
from parts.backbone import build
from parts.batches import TrainingImages
from parts.decoding import PAPER_CROP
from parts.processes import fail
from parts.sources import open_data
from parts.tables import markdown

from byol_pytorch import BYOL

IMAGENET = 1_281_167  # training images of ILSVRC 2012
BATCH = 4096  # arXiv 2006.07733, section 3.3
EPOCHS, DEVICES = (300, 1000), (1, 8, 32, 128)
HEAD_NORMS = 2 * 4096  # features of the two heads' batch norms, synchronised in every forward


class Prediction(NamedTuple):
    """Of one optimizer step."""

    compute: float  # seconds
    reduction: float
    data: float

    @property
    def seconds(self) -> float:
        return max(self.compute + self.reduction, self.data)

    @property
    def limit(self) -> str:
        if self.data > self.compute + self.reduction:
            return "data"
        return "all-reduce" if self.reduction > self.compute else "step"


def main() -> None:
    args = parse_arguments()
    rate, setting = (args.rate, "as given") if args.rate else step_rate(args.step)
    decode = args.decode_rate or decode_rate(args)
    size = gradient_bytes(args.model, args.image_size)
    print(
        f"Measured or given: {rate:.0f} images/s a GPU ({setting}); {decode:.0f} images/s decoded "
        f"by a CPU core; {size / 2**20:.0f} MiB all-reduced a step (float32 gradients of "
        f"{args.model} and its heads, the heads' batch statistics).\n"
        f"Assumed: {args.images:,} images, batch {args.batch_size}; {args.cores} CPU cores a GPU, "
        f"all decoding; {args.bandwidth:g} GB/s all-reduce bandwidth a GPU inside a node of "
        f"{args.node}, {args.network:g} GB/s between nodes; no overlap of gradients' reduction "
        "with the backward pass; the rate of one GPU does not depend on its share of the batch; "
        "no restarts, evaluations or checkpoints."
    )
    columns = ["GPUs", "images a GPU", "step ms", "all-reduce ms", "data ms", "limit"]
    columns += [f"{epochs} epochs, hours" for epochs in EPOCHS]
    columns += [f"{epochs} epochs, cost" for epochs in EPOCHS if args.price]
    rows: list[list[str | float | None]] = []
    for devices in DEVICES:
        step = predict(devices, rate, decode, size, args)
        steps = args.images // args.batch_size
        hours = [epochs * steps * step.seconds / 3600 for epochs in EPOCHS]
        rows.append(
            [str(devices), str(args.batch_size // devices)]
            + [f"{1e3 * t:.0f}" for t in step]
            + [step.limit]
            + [f"{h:.1f}" for h in hours]
            + [f"{h * devices * args.price:,.0f}" for h in hours if args.price]
        )
    print(f"\n{markdown(columns, rows)}\n\nThe data path is the limit {where(rate, decode, args)}.")
    if args.json:
        figures = {"images_per_second": rate, "decode_rate": decode, "bytes": size}
        args.json.write_text(json.dumps({**figures, "columns": columns, "rows": rows}, indent=1))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--step", type=Path, metavar="FILE", help="what step.py --json wrote on such a GPU")
    add("--rate", type=float, help="images a second of one GPU, in place of --step")
    add("--data", type=Path, metavar="FOLDER", help="of which a core's decoding is timed here")
    add("--decode-rate", type=float, help="images a second of one CPU core, in place of --data")
    add("--decode-size", type=int, help="as imagenet_ddp.py's; default: crops of the originals")
    add("--seconds", type=float, default=10.0, help="for which decoding is timed")
    add("--model", default="resnet50")
    add("--image-size", type=int, default=224)
    add("--images", type=int, default=IMAGENET, help="default: ImageNet's %(default)s")
    add("--batch-size", type=int, default=BATCH, help="of all GPUs; default: the paper's")
    add("--cores", type=int, default=16, help="CPU cores a GPU; default: %(default)s")
    add("--node", type=int, default=8, help="GPUs a node; default: %(default)s")
    add("--bandwidth", type=float, default=200.0, help="GB/s inside a node; default: %(default)s")
    add("--network", type=float, default=40.0, help="GB/s a GPU between nodes; %(default)s")
    add("--price", type=float, default=0.0, help="of a GPU hour, in any currency")
    add("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if (args.step is None) == (args.rate is None):
        parser.error("give either --step FILE (step.py --json on such a GPU) or --rate IMAGES")
    if (args.data is None) == (args.decode_rate is None):
        parser.error("give either --data FOLDER or --decode-rate IMAGES")
    positive = ("rate", "decode_rate", "cores", "node", "bandwidth", "network", "batch_size")
    for name in positive:
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}; expected above 0")
    return args


def step_rate(path: Path) -> tuple[float, str]:
    """Images a second end to end, views included, and on what."""
    try:
        figures = json.loads(path.read_text())
        row = next(row for row in figures["rows"] if row["contestant"] == OURS)
    except (OSError, ValueError, KeyError, StopIteration) as error:
        fail(f"--step {path} is not what step.py --json writes: {type(error).__name__}: {error}")
    return float(row["images_per_second"]), str(figures["setting"])


def decode_rate(args: argparse.Namespace) -> float:
    """Images a second that one core of this machine reads and crops, as the training does."""
    torch.set_num_threads(1)
    images = TrainingImages(
        open_data(args.data)[0], [(args.image_size, PAPER_CROP)] * 2, 0, args.decode_size
    )
    order = np.random.default_rng(0).permutation(len(images.source))
    keys = np.column_stack((np.zeros_like(order), order))  # epoch and image
    images[keys[:8]]  # files and libraries are opened once
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < args.seconds:
        images[keys[np.arange(done, done + 16) % len(keys)]]
        done += 16
    return done / (time.perf_counter() - start)


def gradient_bytes(model: str, image_size: int) -> int:
    """Of one all-reduce: float32 gradients, and four forwards' statistics of the heads."""
    learner = BYOL(build(model, None, False, False, {}), image_size)
    parameters = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    return 4 * (parameters + 4 * 2 * HEAD_NORMS)


def predict(
    devices: int, rate: float, decode: float, size: int, args: argparse.Namespace
) -> Prediction:
    share = args.batch_size / devices
    slowest = args.bandwidth if devices <= args.node else args.network
    # A ring passes every byte twice, but for the own part: Patarasuk and Yuan, 2009.
    reduction = 2 * (devices - 1) / devices * size / (slowest * 1e9)
    return Prediction(share / rate, reduction, share / (decode * args.cores))


def where(rate: float, decode: float, args: argparse.Namespace) -> str:
    needed = rate / decode
    verdict = "with these cores" if needed > args.cores else "only below that"
    return f"below {needed:.1f} CPU cores a GPU ({args.cores} assumed: {verdict})"


if __name__ == "__main__":
    main()
