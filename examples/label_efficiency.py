"""Did pre-training pay? Accuracy against the number of labels, from several starts.

    python examples/label_efficiency.py --data FOLDER --model resnet18 --starts FILE random timm

For each start (a checkpoint's file, random, or timm for timm's own weights) and each part of the
labels: kNN and a linear head on the frozen features, and fine-tuning of the whole network. All see
the same labelled images, drawn evenly from the classes, and are tested on the same ones. Leaves a
table and the picture label_efficiency.png in OUTPUT; fine-tuning goes on where it was stopped.
"""

import argparse
import json
import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from parts import openmp  # noqa: F401, before torch

# isort: split

import finetune_classification
import torch
from matplotlib.figure import Figure
from parts.backbone import fill_in_model, open_backbone
from parts.flags import common_flags, set_up
from parts.labelled import balanced, evaluation_images, open_images
from parts.processes import fail, launch, tell
from parts.tables import Cell, drawn, write_results
from torch import Tensor

from byol_pytorch import checkpoint
from byol_pytorch.checkpoint import replacing
from byol_pytorch.evaluation.knn import knn_accuracy
from byol_pytorch.evaluation.linear import linear_probe
from byol_pytorch.evaluation.protocols import PAPER, PAPER_LRS

NEIGHBOURS = 20  # MMSelfSup's best on ImageNet; fewer where a part has fewer images
HELD_OUT = 0.2  # of the labelled images: chooses the linear head's learning rate
MEASURES = ("kNN", "linear", "fine-tuned")

Figures = dict[tuple[str, str, float], float]  # by start, measure and percent of the labels


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    one_model_and_size(args)
    machine = set_up(args, join=False)
    train, test = open_images(args.data, args.max_value)
    source, numbers = train
    parts = {p: balanced(source.labels[numbers], p, args.seed) for p in args.labels}
    figures: Figures = {}
    for start in args.starts:
        frozen = argparse.Namespace(**{**vars(args), "checkpoint": weights(start)})
        net, facts = open_backbone(frozen)
        args.image_size = facts.image_size
        (bank, labels), (queries, truth) = (
            machine.features(net, evaluation_images(part, facts)) for part in (train, test)
        )
        for percent, kept in parts.items():
            some, known = bank[kept], labels[kept]
            k = min(NEIGHBOURS, len(kept))
            figures[start, "kNN", percent] = 100 * knn_accuracy(some, known, queries, truth, k=k)
            figures[start, "linear", percent] = linear(
                some, known, queries, truth, args.linear_epochs, args.seed, machine.device
            )
            figures[start, "fine-tuned", percent] = fine_tuned(start, percent, args)
            tell("  ".join(f"{m} {figures[start, m, percent]:.2f} %" for m in MEASURES)
                 + f"  ({start}, {percent:g} % of the labels, {len(kept)} images)")  # fmt: skip
    chance = 100 * truth.bincount().max().item() / len(truth)
    report(figures, {p: len(kept) for p, kept in parts.items()}, len(truth), chance, args)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common_flags(parser)
    parser.set_defaults(output=Path("runs/label_efficiency"))
    add = parser.add_argument
    add("--starts", nargs="+", required=True, metavar="START", help="files, random, timm")
    add("--labels", nargs="+", type=float, default=[1.0, 10.0, 100.0], metavar="PERCENT",
        help="of each class's training images (default: 1 10 100)")  # fmt: skip
    add(
        "--linear-epochs", type=int, default=PAPER.epochs, help="(default: the paper's %(default)s)"
    )
    add("--finetune", nargs=argparse.REMAINDER, default=[],
        help="what follows goes to finetune_classification.py, such as --epochs 30")  # fmt: skip
    args = parser.parse_args(argv)
    if args.checkpoint:
        fail("--checkpoint names one start; give all of them by --starts.")
    args.starts, args.labels = list(dict.fromkeys(args.starts)), sorted(set(args.labels))
    for start in args.starts:
        if start not in ("random", "timm") and not Path(start).is_file():
            fail(f"--starts {start} is no file; expected a checkpoint, random or timm.")
    if not all(0 < percent <= 100 for percent in args.labels):
        fail(f"--labels {args.labels}; expected percentages above 0 and up to 100.")
    if args.linear_epochs < 1:
        fail(f"--linear-epochs {args.linear_epochs}; expected 1 or more.")
    return args


def one_model_and_size(args: argparse.Namespace) -> None:
    """The model and the image size of the files among the starts, for all of them: what is shown
    larger would look better than it is."""
    files = [start for start in args.starts if start not in ("random", "timm")]
    fill_in_model(args, files[0] if files else None)
    sizes: list[int] = []
    for file in files:
        with suppress(ValueError):  # open_backbone names it
            sizes += checkpoint.facts(file).get("image_size", ())
    args.image_size = args.image_size or max(sizes, default=None)


def weights(start: str) -> str | None:
    return None if start == "random" else start


def linear(
    some: Tensor, known: Tensor, queries: Tensor, truth: Tensor, epochs: int, seed: int,
    device: torch.device,
) -> float:  # fmt: skip
    """Top-1 in percent of the head at the learning rate that held-out labels choose."""
    enough = int(known.bincount().min()) * HELD_OUT >= 1  # one of each class can be spared
    rates, held_out = (PAPER_LRS, HELD_OUT) if enough else (PAPER.base_lrs, 0.0)
    protocol = replace(PAPER, base_lrs=rates, epochs=epochs)
    probe = linear_probe(some, known, queries, truth, protocol=protocol, seed=seed,
                         held_out=held_out, device=device)  # fmt: skip
    best = probe.chosen[probe.stages[0]] if probe.chosen else 0
    return 100 * probe.top1[0, best].item()


def fine_tuned(start: str, percent: float, args: argparse.Namespace) -> float:
    """Top-1 in percent after the last epoch, by finetune_classification.py."""
    name = (
        start if start in ("random", "timm") else f"{args.starts.index(start)}-{Path(start).stem}"
    )
    output = args.output / f"{name}-{percent:g}"
    shared = ("data", "model", "image_size", "batch_size", "workers", "device", "seed", "dtype",
              "padding", "max_value")  # fmt: skip
    given = {name.replace("_", "-"): getattr(args, name) for name in shared}
    given |= {"model-args": json.dumps(args.model_args), "labels": percent, "output": output}
    given["checkpoint"] = weights(start)
    flags = [f"--{name}={value}" for name, value in given.items() if value is not None]
    flags += ["--small-stem"] * args.small_stem + args.finetune
    finetune_classification.main(flags)
    history = json.loads((output / "results.json").read_text())["history"]
    return 100 * float(history[-1]["top1"])


def report(
    figures: Figures, images: dict[float, int], tested: int, chance: float, args: argparse.Namespace
) -> None:
    """The table and the picture; `tested` images were asked, of which `chance` percent would be
    right by naming the commonest class."""
    columns = ["top-1, %", "start", *(f"{p:g} % ({n} images)" for p, n in images.items())]
    rows: list[list[Cell]] = [
        [measure, Path(start).name, *(figures[start, measure, percent] for percent in images)]
        for measure in MEASURES
        for start in args.starts
    ]
    content: dict[str, Any] = {"images": {f"{p:g}": n for p, n in images.items()}}
    content |= {"test images": tested, "chance": chance}
    title = f"Accuracy by labels, {args.model}, {args.image_size} px, {args.data.name}"
    write_results(args, title, columns, rows, None, content)
    figure = Figure((4 * len(MEASURES), 3.4), layout="constrained")
    figure.suptitle(f"{title}, {tested} test images; bars: one standard error", fontsize=9)
    axes = figure.subplots(1, len(MEASURES), sharey=True)
    for ax, measure in zip(axes, MEASURES, strict=True):
        for start in args.starts:
            values = [figures[start, measure, percent] for percent in images]
            errors = [math.sqrt(v * (100 - v) / tested) for v in values]
            label = drawn(Path(start).name)
            ax.errorbar(list(images.values()), values, errors, marker="o", capsize=3, label=label)
        ax.axhline(chance, color="0.5", linestyle=":", label="chance")
        ax.set(title=measure, xlabel="labelled images", xscale="log")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("top-1 accuracy, %")
    axes[0].legend()
    with replacing(args.output / "label_efficiency.png") as file:
        figure.savefig(file, format="png", dpi=150)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    launch(main)
