"""Train BYOL on real photographs in about two minutes and see whether the features got better.

Here: the recipe, the training loop and the figures. parts/photographs.py has the images,
parts/report.py the table, the picture and the files that a run leaves.
"""

import argparse
import difflib
import json
import math
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from parts import openmp  # noqa: F401, before torch

# isort: split

import timm
import torch
import torch.nn.functional as F
from parts import report
from parts.amount import base_decay
from parts.backbone import timm_model, what_next
from parts.flags import MAX_VALUE_HELP, WithDefaults, json_object
from parts.photographs import Pictures, photograph_windows, read_folder
from parts.processes import fail, launch, leave_after, until_asked_to_stop
from torch import Tensor, nn
from torchvision.transforms.functional import center_crop
from tqdm import tqdm

from byol_pytorch import BYOL, checkpoint
from byol_pytorch.augment import IMAGENET_MEAN, IMAGENET_STD, byol_views
from byol_pytorch.evaluation.knn import knn_accuracy


@dataclass(frozen=True)
class QuickstartRecipe:
    """What runs by default, chosen on the built-in photographs for some hundred steps on a CPU."""

    model: str = "resnet10t"
    # timm's resnet10t with a quarter of its channels.
    model_options: dict[str, Any] = field(default_factory=lambda: {"channels": (16, 32, 64, 128)})
    steps: int = 480  # about 100 s on 2 free cores
    batch_size: int = 128
    lr: float = 2e-3
    weight_decay: float = 1e-4
    warmup: float = 0.1  # part of the steps; a half cosine to 0 follows
    projection_size: int = 256
    projection_hidden_size: int = 1024
    # Changes of the paper's views for the built-in windows, which colour tells apart more than it
    # does objects. A folder gets the paper's views.
    window_views: dict[str, Any] = field(
        default_factory=lambda: {"jitter": 0.5, "hue": 0.05, "grayscale": 0.1}
    )


RECIPE = QuickstartRecipe()

NEIGHBOURS = 20  # that vote, or as many as there are
FEW_LABELS, DRAWS = 5, 10  # labels a class, and random choices of them to average over
HEALTH_EVERY, HEALTH_BATCH = 25, 128
PIXEL_MEAN, PIXEL_STD = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
# What networks raise on images of a size that they are not made for.
UNFIT = (ValueError, TypeError, RuntimeError, AssertionError)


@dataclass
class History:
    """What one training run did: the loss of every step, and the health of some of them."""

    losses: list[float] = field(default_factory=list)
    health: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    ideal_std: float = RECIPE.projection_size**-0.5  # of features spread evenly over the sphere

    @property
    def shown(self) -> str:
        return f"feature_std={self.health[-1]['feature_std']:.4f}"


def main() -> None:
    args = parse_arguments()
    device = pick_device()
    report.prepare(args.output, args.json)
    # Bad input is found before the long work.
    options = model_options(args.model, args.image_size)
    build_learner(args, options, device, seed=0, announce=True)
    pictures = (
        read_folder(args.data, args.image_size, args.batch_size, args.max_value)
        if args.data
        else photograph_windows(args.image_size, args.batch_size)
    )
    describe(args, pictures, device)

    card = describe_backbone(args, options)
    pixels = knn_figures(raw_pixels(pictures, args.image_size), pictures)
    runs: list[dict[str, Any]] = []
    backbone = args.output / "backbone.safetensors"
    for seed in range(args.seeds):
        learner = build_learner(args, options, device, seed)
        before = embed(learner, pictures, args.image_size)
        with until_asked_to_stop() as stop:
            history = train(learner, pictures.train, args, seed, stop)
        if seed == 0:
            checkpoint.export_backbone(learner, backbone, model_args=options)
        if stop:
            done = f"{len(history.losses)} steps" if seed == 0 else f"{seed} seeds"
            print(f"stopped after {done}: saved {backbone}")
            leave_after(stop)
            return
        after = embed(learner, pictures, args.image_size)
        accuracy = {
            "raw pixels": pixels,
            args.start: knn_figures(before, pictures),
            "trained backbone": knn_figures(after, pictures),
        }
        runs.append({"seed": seed, "knn": accuracy, "history": history})
        report.print_seed(seed, accuracy, history.seconds)
        if seed == 0:
            report.draw(
                args.output / "report.png",
                pictures,
                examples=views_to_show(pictures.train, args.views),
                history=history,
                accuracy=accuracy,
                features={args.start: before, "trained backbone": after},
            )

    report.print_table(runs, pictures)
    if args.json:
        report.save_json(args.json, runs, pictures, card | {"device": str(device)})
    for sentence in report.verdicts(runs, pictures):
        print(sentence)
    report.print_outcome(args.output, card, pictures.unreadable)
    data = shlex.quote(str(args.data)) if args.data else "FOLDER"
    print(f"\nWhat can follow:\n{what_next(backbone, data, bool(args.data and pictures.classes))}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train BYOL and compare the features before and after: by default on windows "
        "cut from 20 photographs that scikit-image and scikit-learn ship (no download), on CUDA, "
        "MPS or the CPU, whichever is there. Leaves a picture (report.png) and the trained "
        "backbone (backbone.safetensors, for timm).",
        formatter_class=WithDefaults,
    )
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="train on the images in this folder and below; class subfolders, where there are two "
        "or more, are the labels; the decoded images have to fit in 4 GiB",
    )
    add("--model", default=RECIPE.model, help="any model of timm; the default one is narrowed")
    add(
        "--init-from",
        type=Path,
        metavar="FILE",
        help="weights to start from: .safetensors, or a state_dict in .pt or .pth",
    )
    add(
        "--view-args",
        type=partial(json_object, "--view-args"),
        help="JSON, what differs from the paper's views: arguments of augment.byol_views, such as "
        "'{\"hue\": 0}' for stained cells",
    )
    add("--max-value", type=float, help=MAX_VALUE_HELP)
    add("--image-size", type=positive_int, help="pixels; 32, and with --data 64")
    add("--batch-size", type=positive_int, default=RECIPE.batch_size, help="images a step")
    add("--steps", type=positive_int, default=RECIPE.steps, help="optimizer steps")
    add("--minutes", type=float, help="stop each training after so many minutes")
    add("--seeds", type=positive_int, default=1, help="runs to average over: seeds 0, 1, ...")
    add("--output", type=Path, default=Path("runs/quickstart"), help="folder for what a run leaves")
    add("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    args = parser.parse_args()
    args.image_size = args.image_size or (64 if args.data else 32)
    args.start = "initial backbone" if args.init_from else "untrained backbone"
    if args.batch_size < 2:
        fail("--batch-size is 1, and batch normalisation needs 2 images or more.")
    for name in ("minutes", "max_value"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            fail(f"--{name.replace('_', '-')} is {value:g}; expected more than 0.")
    if args.view_args is None:
        args.view_args = {} if args.data else RECIPE.window_views
    try:
        args.views = byol_views(args.image_size, channels_last=True, **args.view_args)
    except (ValueError, TypeError) as error:
        fail(f"--view-args {json.dumps(args.view_args)} makes no views: {error}")
    return args


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def pick_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def describe(args: argparse.Namespace, pictures: Pictures, device: torch.device) -> None:
    labels = f"{len(pictures.classes)} classes" if pictures.classes else "no labels"
    print(
        f"{len(pictures.train)} training and {len(pictures.test)} test images of "
        f"{args.image_size} px, {labels}; {args.model}, {args.steps} steps of "
        f"{args.batch_size} on {device}"
    )
    if args.data and not pictures.classes:
        print("fewer than two subfolders hold images: no accuracies, only neighbours and the map")


# The network and its training -------------------------------------------------------------------


def model_options(model: str, image_size: int) -> dict[str, Any]:
    """What timm.create_model takes beside the name; vision transformers take the image's size."""
    if not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models(), n=4, cutoff=0.5)
        hint = f"Near names: {', '.join(near)}." if near else "timm.list_models() has the names."
        fail(f"--model {model!r} is not a model of timm. {hint}")
    try:
        return timm_model(model, image_size, RECIPE.model_options if model == RECIPE.model else {})[
            1
        ]
    except UNFIT as error:
        fail_to_fit(model, image_size, error)


def build_learner(
    args: argparse.Namespace,
    options: dict[str, Any],
    device: torch.device,
    seed: int,
    announce: bool = False,
) -> BYOL:
    torch.manual_seed(seed)
    try:
        net = timm.create_model(args.model, **options)
        if args.init_from:
            init_from(args.init_from, net, announce)
        learner = BYOL(
            net,
            args.image_size,
            projection_size=RECIPE.projection_size,
            projection_hidden_size=RECIPE.projection_hidden_size,
            moving_average_decay=base_decay(args.steps),
            total_steps=args.steps,
        )
    except UNFIT as error:
        fail_to_fit(args.model, args.image_size, error)
    # Convolutions are faster so, on CPUs too.
    return learner.to(device, memory_format=torch.channels_last)


def fail_to_fit(model: str, image_size: int, error: Exception) -> NoReturn:
    fail(
        f"{model} does not take images of {image_size} px ({first_line(error)}): give "
        "another --image-size or --model."
    )


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def init_from(path: Path, net: nn.Module, announce: bool) -> None:
    """Load the weights of the same backbone; the library refuses others."""
    try:
        report = checkpoint.load_backbone(path, net)
    except (OSError, ValueError) as error:
        fail(f"--init-from: {first_line(error)}")
    if announce:
        print(f"{path}: loaded {len(report.loaded)} tensors")
        for what, names in (
            ("not in the file, or of another shape", report.missing),
            ("in the file but not used", report.unexpected),
        ):
            if names:
                shown = [*names[:5], *["..."] * (len(names) > 5)]
                print(f"  {what}: {', '.join(shown)} ({len(names)})")


def train(
    learner: BYOL, images: Tensor, args: argparse.Namespace, seed: int, stop: list[int]
) -> History:
    """The whole of BYOL's training loop, until `stop` holds something."""
    device = next(learner.parameters()).device
    optimizer = torch.optim.AdamW(
        learner.parameters(), lr=RECIPE.lr, weight_decay=RECIPE.weight_decay
    )
    history, losses, start = History(), [], time.monotonic()
    first_view, second_view = args.views
    healthy = center_crop(images[:: max(1, len(images) // HEALTH_BATCH)], args.image_size)
    healthy = healthy[:HEALTH_BATCH].to(device)
    batches = endless_batches(len(images), args.batch_size, seed)
    bar = tqdm(range(args.steps), f"seed {seed}", unit=" steps")
    for step in bar:
        optimizer.param_groups[0]["lr"] = RECIPE.lr * lr_factor(step, args.steps)
        batch = images[next(batches)].to(device)
        loss = learner(first_view(batch), second_view(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learner.update_moving_average()

        losses.append(loss.detach())
        late = args.minutes is not None and time.monotonic() - start > 60 * args.minutes
        last = step == args.steps - 1 or late or bool(stop)
        if step % HEALTH_EVERY == 0 or last:
            history.losses += torch.stack(losses).tolist()
            history.health.append({"step": step, **learner.diagnostics(healthy)})
            losses.clear()
            show(bar, history)
        elif device.type == "cpu":  # others would have to wait for it
            bar.set_postfix_str(f"loss={losses[-1].item():.3f}, {history.shown}", refresh=False)
        if late:
            tqdm.write(f"--minutes {args.minutes:g} is over: stopped after {step + 1} steps")
        if last:
            break
    bar.close()
    history.seconds = time.monotonic() - start
    return history


def show(bar: tqdm, history: History) -> None:
    """The latest figures beside the progress bar; the end of the run where they are no numbers."""
    loss = history.losses[-1]
    bar.set_postfix_str(f"loss={loss:.3f}, {history.shown}")
    if not math.isfinite(loss):
        fail(f"the loss is {loss} after {len(history.losses)} steps: nothing is saved.")


def lr_factor(step: int, steps: int) -> float:
    """A linear warm-up, then a half cosine to 0."""
    warmup = max(1, round(RECIPE.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def endless_batches(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Indices: one random order of all images after another, without the last incomplete batch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % batch_size].split(batch_size)


def views_to_show(
    images: Tensor, pair: tuple[nn.Module, nn.Module], count: int = 7
) -> tuple[Tensor, Tensor, Tensor]:
    """Some images and two views of each, with the views' normalisation undone."""
    some = images[:: max(1, len(images) // count)][:count]
    one, two = (view(some) * PIXEL_STD + PIXEL_MEAN for view in pair)
    return some / 255, one, two


# The figures ------------------------------------------------------------------------------------


@torch.no_grad()
def embed(learner: BYOL, pictures: Pictures, image_size: int) -> tuple[Tensor, Tensor]:
    """The representations (N, D) of the training and of the test images, without augmentation."""
    device = next(learner.parameters()).device
    learner.eval()
    train, test = (
        torch.cat(
            [
                learner.representation(center_crop(batch, image_size).to(device)).float().cpu()
                for batch in images.split(256)
            ]
        )
        for images in (pictures.train, pictures.test)
    )
    learner.train()
    return train, test


def raw_pixels(pictures: Pictures, image_size: int) -> tuple[Tensor, Tensor]:
    """The pixels as the network sees them, averaged to 32 px where they are more, as features."""
    train, test = (
        torch.cat(
            [
                F.adaptive_avg_pool2d(
                    (center_crop(batch, image_size) / 255 - PIXEL_MEAN) / PIXEL_STD,
                    min(32, image_size),
                ).flatten(1)
                for batch in images.split(256)
            ]
        )
        for images in (pictures.train, pictures.test)
    )
    return train, test


def knn_figures(features: tuple[Tensor, Tensor], pictures: Pictures) -> dict[str, float]:
    """kNN accuracy in percent with `few` labels a class (the mean over 10 random choices, the same
    for all features) and with `all` labels of the training images."""
    if not pictures.classes:
        return {}
    (bank, queries), labels = features, pictures.train_labels
    few = []
    for draw in range(DRAWS):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(draw))
        chosen = torch.cat(
            [order[labels[order] == c][:FEW_LABELS] for c in range(len(pictures.classes))]
        )
        few.append(vote(bank[chosen], labels[chosen], queries, pictures.test_labels))
    known = labels >= 0
    return {
        "few": sum(few) / DRAWS,
        "all": vote(bank[known], labels[known], queries, pictures.test_labels),
    }


def vote(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor) -> float:
    """Percent of queries whose class wins the vote of the nearest of the bank."""
    k = min(NEIGHBOURS, len(bank))
    return 100 * knn_accuracy(bank, bank_labels, queries, labels, k=k)


def describe_backbone(args: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """What someone needs to know to use the backbone."""
    return {
        "model": args.model,
        "options": options,
        "image_size": args.image_size,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "batch_size": args.batch_size,
    }


if __name__ == "__main__":
    launch(main)
