"""Fine-tune a backbone on all labels or on a few: the semi-supervised evaluation.

    python examples/finetune_classification.py --data CIFAR --checkpoint FILE --labels 10
    torchrun --nproc-per-node=4 examples/finetune_classification.py --data IMAGENET \\
        --checkpoint FILE --label-list 1percent.txt --recipe paper --grid --held-out 0.0078

The second is the protocol of the paper's figures; --recipe mmselfsup-1 and mmselfsup-10 with --grid
are MMSelfSup's, which has no figures for BYOL. From a checkpoint, or without one from random
weights. The data are evaluate_linear.py's.
"""

import argparse
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parts import openmp  # noqa: F401, before torch

# isort: split

import numpy as np
import torch
import torch.nn.functional as F
from parts.backbone import Facts, open_backbone
from parts.flags import add_flags, common_flags, flag, set_up, with_flags
from parts.journal import Journal
from parts.labelled import (
    Labelled,
    balanced,
    evaluation_images,
    listed,
    open_images,
    training_loader,
    training_transform,
)
from parts.machine import Machine
from parts.order import seed_of
from parts.processes import (
    fail,
    launch,
    leave_processes,
    parallel,
    rank,
    summed,
    synchronised,
    tell,
    world_size,
)
from parts.published import IMAGENET, IMAGENET_PERCENT, DataSet
from parts.resume import LastState, identity, the_only_run
from parts.tables import Cell, write_results
from torch import Tensor, nn

from byol_pytorch.heads import sync_batchnorm
from byol_pytorch.optim import scaled_lr, warmup_cosine


@dataclass(frozen=True)
class FineTuningRecipe:
    """SGD without warm-up on crops and flips."""

    epochs: int = flag("passes over the labelled images", default=20)
    total_batch: int = flag("images of one step over all processes", default=256)
    base_lr: float = flag(
        "the backbone's learning rate for 256 images, scaled linearly", default=0.01
    )
    head_multiplier: float = flag(
        "the head's learning rate in units of the backbone's", default=10.0
    )
    momentum: float = flag("of SGD", default=0.9)
    nesterov: bool = flag("Nesterov's momentum", default=False)
    weight_decay: float = flag("of all parameters", default=1e-4)
    milestones: tuple[int, ...] = flag(
        "epochs at which the rate falls; none: half cosine to 0", default=(12, 16)
    )
    gamma: float = flag("to this part it falls", default=0.2)
    bilinear: bool = flag("resizing, else bicubic", default=True)


# MMSelfSup 0.x, configs/benchmarks/classification/imagenet/imagenet_{1,10}percent/
# resnet50_head{1,10,100}_4xb64-steplr{1e-1,1e-2,1e-3}-20e_in1k-{1,10}pct: of 9 settings the middle.
MMSELFSUP_10 = FineTuningRecipe()
MMSELFSUP_GRID = {"base_lr": (0.1, 0.01, 0.001), "head_multiplier": (1.0, 10.0, 100.0)}
RECIPES = {
    "mmselfsup-10": MMSELFSUP_10,
    "mmselfsup-1": replace(MMSELFSUP_10, weight_decay=5e-4),
    # arXiv 2006.07733, appendix C.1; cosine as in DeepMind's byol/eval_experiment.py.
    "paper": FineTuningRecipe(
        epochs=30, total_batch=1024, base_lr=0.02, head_multiplier=1.0, nesterov=True,
        weight_decay=0.0, milestones=(), bilinear=False,
    ),
}  # fmt: skip
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "mmselfsup-10": MMSELFSUP_GRID,
    "mmselfsup-1": MMSELFSUP_GRID,
    "paper": {"base_lr": (0.005, 0.01, 0.02, 0.05, 0.1), "epochs": (30, 50)},
}
# The paper's tables 2 and 8, by the images trained on: ResNet-50 pre-trained for 1000 epochs,
# top-1 and top-5, the setting chosen on held-out training images.
PUBLISHED = {
    IMAGENET_PERCENT[1]: (53.2, 78.4), IMAGENET_PERCENT[10]: (68.8, 89.0), IMAGENET: (77.7, 93.9),
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args, settings, machine = parse(argv)
    (source, every), test = open_images(args.data, args.max_value)
    classes = int(source.labels[every].max()) + 1
    if args.label_list:
        numbers = listed((source, every), args.label_list)
    else:
        numbers = every[balanced(source.labels[every], args.labels, args.seed)]
    labelled = DataSet(len(numbers), len(test[1]), classes)
    numbers, held_out = apart(source.labels, every, numbers, args.held_out, args.seed)
    results = []
    for recipe in settings:
        net, facts = open_backbone(args)
        training = Labelled(source, training_transform(facts, recipe.bilinear), numbers)
        testing, choosing = (
            evaluation_images(part, facts, recipe.bilinear) for part in (test, (source, held_out))
        )
        recipe = replace(recipe, total_batch=min(recipe.total_batch, len(training)))
        tell(f"{len(training)} labelled images of {classes} classes, {len(testing)} to test on, "
             f"{recipe}")  # fmt: skip
        classifier = Classifier(net, classes, facts.image_size).to(machine.device)
        own = name_of(recipe).replace(" ", "").replace(",", "-")
        output = args.output / own if args.grid else args.output
        history = fine_tune(classifier, training, testing, recipe, machine, args, output)
        result = {"recipe": str(recipe), "name": name_of(recipe), "history": history}
        if len(held_out):
            result["held_out"] = evaluate(classifier, machine.share_loader(choosing), machine)[0]
        results.append(result)
    if rank() == 0:
        report(results, labelled, facts, args)
    leave_processes()


def name_of(recipe: FineTuningRecipe) -> str:
    return f"lr {recipe.base_lr:g}, head x{recipe.head_multiplier:g}, {recipe.epochs} epochs"


def apart(
    labels: np.ndarray, every: np.ndarray, numbers: np.ndarray, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The images to train on and those that choose: `share` of every class of all training images,
    of those without a label here or, where all have one, out of `numbers`."""
    if not share:
        return numbers, numbers[:0]
    rest = np.setdiff1d(every, numbers)
    pool = rest if len(rest) else numbers
    percent = min(100 * share * len(every) / len(pool), 100)
    held_out = pool[balanced(labels[pool], percent, seed)]
    return np.setdiff1d(numbers, held_out), held_out


def fine_tune(
    net: "Classifier", training: Labelled, testing: Labelled, recipe: FineTuningRecipe,
    machine: Machine, args: argparse.Namespace, output: Path,
) -> list[dict[str, float]]:  # fmt: skip
    """Train; the figures of each epoch. Goes on from `output`/last.pt, with the same images."""
    if world_size() > 1:
        sync_batchnorm(net)
    lr = scaled_lr(recipe.base_lr, recipe.total_batch)
    groups = [
        {"params": net.backbone.parameters(), "scale": 1.0},
        {"params": net.head.parameters(), "scale": recipe.head_multiplier},
    ]
    optimizer = torch.optim.SGD(groups, lr, recipe.momentum, weight_decay=recipe.weight_decay,
                                nesterov=recipe.nesterov)  # fmt: skip
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype is torch.float16)
    parts = {"model": net, "optimizer": optimizer, "scaler": scaler}
    last = LastState(output / "last.pt", identity(vars(args), len(training)), parts)
    loader = training_loader(training, recipe.total_batch, args.seed, machine)
    tests, steps = machine.share_loader(testing), len(loader)
    with the_only_run(output):
        state = last.restore()
        history = state["history"] if state else []
        if state:
            tell(f"goes on from {last.path}")
        step, total = len(history) * steps, recipe.epochs * steps
        journal = Journal(output, rank() == 0, step, total, recipe.total_batch)
        model = parallel(net, machine.device)
        for epoch in range(len(history), recipe.epochs):
            loader.batch_sampler.only(epoch)
            losses = torch.zeros((), device=machine.device)
            net.train()
            for images, labels in loader:
                factor = rate(recipe, step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr * factor * group["scale"]
                torch.manual_seed(seed_of(args.seed, rank(), step))  # dropout and its like
                optimizer.zero_grad()
                for x, y, share, final in passes(images, labels, machine):
                    with synchronised(model, final), machine.autocast():
                        loss = F.cross_entropy(model(x), y) * share
                        scaler.scale(loss).backward()
                    losses += loss.detach()
                scaler.step(optimizer)
                scaler.update()
                step += 1
                journal.advance()
            top1, top5 = evaluate(net, tests, machine)
            loss = summed(losses).item() / world_size() / steps
            if not math.isfinite(loss):
                fail(f"the loss is {loss} in epoch {epoch + 1}: lower --base-lr.")
            figures = {"epoch": epoch + 1, "top1": top1, "top5": top5}
            history.append({**figures, "loss": loss, "lr": lr * factor})
            journal.figures(step, history[-1])
            last.save(history=history)
        journal.close()
    return history


def rate(recipe: FineTuningRecipe, step: int, steps: int) -> float:
    """What learning rates are multiplied by at a step, with `steps` in an epoch."""
    if recipe.milestones:
        return recipe.gamma ** sum(step >= at * steps for at in recipe.milestones)
    return warmup_cosine(step, recipe.epochs * steps, 0, 1.0)


def passes(
    images: Tensor, labels: Tensor, machine: Machine
) -> Iterator[tuple[Tensor, Tensor, float, bool]]:
    """This rank's images of a step in parts of at most --batch-size.

    Each part is its images, its labels, its share of the step and whether it is the last.
    """
    size = machine.batch_size
    parts = list(zip(images.split(size), labels.split(size), strict=True))
    for number, (x, y) in enumerate(parts, 1):
        x, y = (t.to(machine.device, non_blocking=True) for t in (x, y))
        yield x, y, len(y) / len(labels), number == len(parts)


@torch.no_grad()
def evaluate(net: nn.Module, tests: Iterable[Any], machine: Machine) -> tuple[float, float]:
    """Top-1 and top-5 in [0, 1] over the images of all ranks."""
    net.eval()
    right = torch.zeros(3, dtype=torch.float64, device=machine.device)
    for images, labels in tests:
        with machine.autocast():
            logits = net(images.to(machine.device, non_blocking=True))
        best = logits.topk(min(5, logits.shape[1])).indices
        hits = best == labels.to(machine.device)[:, None]
        right += torch.stack([hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels))])
    first, five, count = summed(right).tolist()
    return first / count, five / count


class Classifier(nn.Module):
    """A backbone whose pooled feature goes to a new linear head, N(0, 0.01), biases 0."""

    def __init__(self, net: nn.Module, classes: int, image_size: int) -> None:
        super().__init__()
        self.backbone = net if hasattr(net, "forward_head") else headless(net)
        device = next(net.parameters()).device
        with torch.no_grad():
            example = self.backbone.eval()(torch.zeros(2, 3, image_size, image_size, device=device))
        if example.ndim != 2:
            fail(f"the backbone gives {tuple(example.shape)}; expected a pooled feature (B, D).")
        self.head = nn.Linear(example.shape[1], classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def headless(net: nn.Module) -> nn.Module:
    """torchvision's classifiers end in a Linear: without it."""
    linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        fail(f"{type(net).__name__} has no Linear to replace by the new head. Take timm's model.")
    net.set_submodule(linear[-1], nn.Identity())
    return net


# Flags and figures ------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[FineTuningRecipe], Machine]:
    parser = argparse.ArgumentParser(
        description="Fine-tune a backbone on all labels or a few. The same command goes on from "
        "the last epoch that an earlier one ended.",
    )
    common_flags(parser)
    add = parser.add_argument
    add("--labels", type=float, default=100.0,
        help="percent of each class's training images, drawn by --seed (default: 100)")  # fmt: skip
    add("--label-list", type=Path,
        help="instead: a file with an image on each line, as the lists of ImageNet's 1 and 10 "
        "percent")  # fmt: skip
    add("--recipe", choices=RECIPES, default="mmselfsup-10", help="what the rest defaults to")
    add("--grid", action="store_true",
        help="train once for each setting that the recipe's source tries, each in a folder of "
        "its own; what is given by a flag stays")  # fmt: skip
    add("--held-out", type=float, default=0.0,
        help="share of the training images that chooses among the settings; without it all are "
        "shown. The paper: 10009 of 1281167")  # fmt: skip
    group = parser.add_argument_group("recipe", FineTuningRecipe.__doc__)
    add_flags(group, RECIPES)
    args = parser.parse_args(argv)
    machine = set_up(args)
    recipe = with_flags(RECIPES[args.recipe], args)
    if not 0 <= args.held_out < 1:
        fail(f"--held-out {args.held_out}; expected a share in [0, 1).")
    grid = {name: values for name, values in GRIDS[args.recipe].items()
            if args.grid and getattr(args, name) is None}  # fmt: skip
    if not 0 < args.labels <= 100:
        fail(f"--labels {args.labels:g}; expected a percentage above 0 and up to 100.")
    for name, least in (("epochs", 1), ("total_batch", world_size()), ("base_lr", 0),
                        ("head_multiplier", 0), ("weight_decay", 0)):  # fmt: skip
        if getattr(recipe, name) < least:
            fail(f"--{name.replace('_', '-')} {getattr(recipe, name)}; expected {least} or more.")
    if not 0 <= recipe.momentum < 1 or (recipe.nesterov and not recipe.momentum):
        fail(f"--momentum {recipe.momentum}; expected it in [0, 1), and above 0 for --nesterov.")
    settings = [replace(recipe, **dict(zip(grid, values, strict=True)))
                for values in itertools.product(*grid.values())]  # fmt: skip
    return args, settings, machine


def report(
    results: list[dict[str, Any]], labelled: DataSet, facts: Facts, args: argparse.Namespace
) -> None:
    """The chosen setting or all of them; the paper's row beside a choice by its own protocol."""
    what = f"{labelled.train} labelled images" + (
        f", {args.labels:g} %" if args.label_list is None else f" of {args.label_list.name}"
    )
    shown, chosen = results, max(results, key=lambda r: r.get("held_out", 0.0))
    if args.held_out:
        shown, what = [chosen], f"{what}; setting chosen on held-out training images"
    rows: list[list[Cell]] = []
    for result in shown:
        name, last = f"{facts.model}, {facts.start}", result["history"][-1]
        name += f", {result['name']}" if args.grid else ""
        rows.append([name, what, 100 * last["top1"], 100 * last["top5"]])
    if args.recipe == "paper" and args.grid and args.held_out and labelled in PUBLISHED:
        rows.append(["the paper's BYOL, ResNet-50, 1000 epochs", "the same part of ImageNet",
                     *PUBLISHED[labelled]])  # fmt: skip
    title = f"Fine-tuning, {args.recipe}: accuracy in % on {Path(args.data).name} after the last "
    title += "epoch"
    columns = ["", "trained on", "top-1", "top-5"]
    more = {"history": chosen["history"], "images": labelled.train, "settings": results}
    write_results(args, title, columns, rows, facts, more)


if __name__ == "__main__":
    launch(main)
