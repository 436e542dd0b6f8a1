"""What a backbone learns without labels by this BYOL and by others, at equal steps and time.

    pip install --target peers --no-deps byol-pytorch==0.9.1 einops lightly lightly-utils
    python examples/benchmarks/accuracy.py --peers peers --cifar CIFAR --bccd BCCD

Three rungs of small images: windows of photographs (the quick start's), CIFAR-10, blood cells. On
each the same backbone, initial weights, heads, optimizer, batches and scale of the loss, by the
quick start's recipe. The views are each library's own by default; on CIFAR-10 this one's and
lightly's have no blur, 0.9.1's do. 0.9.1 goes without its simplicial embeddings, and its EMA decay
does not rise. Each method's learning rate is chosen by the same search, on a part of the images
that vote, in runs as long with a seed of their own. Then three seeds train for equal steps, and for
the time that this library needed for those. Every run has one thread, and its time is that thread's
CPU time, views included, evaluation excluded: what it would take on a core of its own. Accuracy is
the weighted kNN's with few labels a class (mean of 10 draws) and with all. Every finished run is
kept in OUTPUT: the same command goes on where it was.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from accuracy_parts import BATCH, LIGHTLY, METHODS, OURS, PEER, RUNGS, Rung, build
from quickstart import RECIPE, endless_batches, lr_factor
from scipy.stats import ttest_ind, ttest_rel
from torch import Tensor
from tqdm import tqdm

from byol_pytorch.augment import IMAGENET_MEAN, IMAGENET_STD
from byol_pytorch.evaluation.knn import knn_accuracy

RATES = (1e-3, 2e-3, 4e-3)
TUNING_SEED = 1000
NEIGHBOURS, DRAWS = 20, 10


@dataclass(frozen=True)
class Run:
    rung: str
    method: str
    seed: int
    steps: int
    lr: float
    tuning: bool = False
    equal: str = "steps"  # or "time"


@dataclass(frozen=True)
class Outcome:
    few: float  # percent
    all: float
    seconds: float
    loss: float


Outcomes = dict[Run, Outcome]


def main() -> None:
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    done = finished(args)
    untrained = [
        Run(r, "untrained", seed, 0, 0.0) for r in args.rungs for seed in range(args.seeds)
    ]
    search = [
        Run(rung, method, TUNING_SEED, args.steps, lr, tuning=True)
        for rung, method, lr in itertools.product(args.rungs, args.methods, RATES)
    ]
    carry_out(untrained + search, done, args)
    rates = {
        (rung, method): max(
            (r for r in search if (r.rung, r.method) == (rung, method)), key=lambda r: done[r].few
        ).lr
        for rung, method in itertools.product(args.rungs, args.methods)
    }
    equal_steps = [
        Run(rung, method, seed, args.steps, rates[rung, method])
        for seed, rung, method in itertools.product(range(args.seeds), args.rungs, args.methods)
    ]
    carry_out(equal_steps, done, args)
    equal_time = []
    for run in equal_steps:
        if run.method != OURS:
            pace = seconds(run.rung, run.method, equal_steps, done) / args.steps
            fits = max(1, round(seconds(run.rung, OURS, equal_steps, done) / pace))
            equal_time.append(Run(run.rung, run.method, run.seed, fits, run.lr, equal="time"))
    carry_out(equal_time, done, args)
    report(untrained, equal_steps, equal_time, done, args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--peers", type=Path, required=True, metavar="FOLDER", help="see the second line above")
    add("--cifar", type=Path, metavar="FOLDER", help="train.npz and test.npz of jpeg, offsets, "
        "labels; without it that rung is left out")  # fmt: skip
    add("--bccd", type=Path, metavar="FOLDER", help="BCCD in VOC's layout; as above")
    add("--methods", nargs="+", choices=METHODS, default=[OURS, PEER, LIGHTLY],
        help="default: two views and the peers; the first is always there")  # fmt: skip
    add("--steps", type=int, default=300, help="of each run; default: %(default)s")
    add("--seeds", type=int, default=3, help="default: %(default)s")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time; default: cores")
    add("--output", type=Path, default=Path("runs/accuracy"), help="default: %(default)s")
    args = parser.parse_args()
    folders = {"photographs": args.peers, "cifar10": args.cifar, "cells": args.bccd}
    needed = (
        ("--peers", args.peers / "byol_pytorch"),
        ("--peers", args.peers / "lightly"),
        ("--cifar", args.cifar and args.cifar / "train.npz"),
        ("--bccd", args.bccd and args.bccd / "ImageSets"),
    )
    for name, file in needed:
        if file and not file.exists():
            parser.error(f"{name}: {file} is not there; see --help")
    args.rungs = [rung for rung in RUNGS if folders[rung]]
    args.methods = [method for method in METHODS if method == OURS or method in args.methods]
    return args


# Running ----------------------------------------------------------------------------------------


def finished(args: argparse.Namespace) -> Outcomes:
    file = args.output / "runs.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    rows = []
    for line in lines:
        with suppress(ValueError):  # one that was cut short
            rows.append(json.loads(line))
    return {Run(**row["run"]): Outcome(**row["outcome"]) for row in rows}


def carry_out(runs: list[Run], done: Outcomes, args: argparse.Namespace) -> None:
    """Carry out those that are not done, in processes of their own, and keep each outcome."""
    missing = [run for run in runs if run not in done]
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(args.jobs, context, max_tasks_per_child=1) as pool,
        (args.output / "runs.jsonl").open("a") as journal,
        tqdm(total=len(missing), unit=" runs", disable=not missing) as bar,
    ):
        pending = {pool.submit(carry_out_one, run, args): run for run in missing}
        for future in as_completed(pending):
            run = pending[future]
            try:
                done[run] = future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)  # else the others would all run first
                raise
            journal.write("\n" + json.dumps({"run": asdict(run), "outcome": asdict(done[run])}))
            journal.flush()
            bar.update()


def carry_out_one(run: Run, args: argparse.Namespace) -> Outcome:
    torch.set_num_threads(1)
    sys.path.append(str(args.peers))  # behind everything that is installed
    rung = RUNGS[run.rung](args)
    if run.tuning:
        rung = rung.tuning()
    torch.manual_seed(run.seed)
    net = timm.create_model(RECIPE.model, num_classes=0, **RECIPE.model_options)
    net.to(memory_format=torch.channels_last)  # two thirds of the time, for every method
    loss, used = train(net, rung, run, args) if run.steps else (math.nan, 0.0)
    few, every = accuracies(net, rung)
    return Outcome(few, every, used, loss)


def train(net: Any, rung: Rung, run: Run, args: argparse.Namespace) -> tuple[float, float]:
    """The mean loss of the last tenth of the steps, and the CPU seconds of all."""
    method = build(run.method, net, rung, run.steps, args)
    optimizer = torch.optim.AdamW(method.parameters, run.lr, weight_decay=RECIPE.weight_decay)
    batches = endless_batches(len(rung.train), BATCH, run.seed)
    losses, start = [], time.process_time()
    for step in range(run.steps):
        optimizer.param_groups[0]["lr"] = run.lr * lr_factor(step, run.steps)
        loss = method.loss(rung.train[next(batches)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.moved(step)
        losses.append(loss.detach())
    used = time.process_time() - start
    return torch.stack(losses[-max(1, run.steps // 10) :]).mean().item(), used


def accuracies(net: Any, rung: Rung) -> tuple[float, float]:
    """kNN accuracy in percent with few labels a class, and with all."""
    bank, queries = features(net, rung.bank), features(net, rung.test)
    few = []
    for draw in range(DRAWS):
        order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(draw))
        labels = rung.bank_labels[order]
        chosen = torch.cat([order[labels == c][: rung.few] for c in labels.unique()])
        few.append(vote(bank[chosen], rung.bank_labels[chosen], queries, rung.test_labels))
    return statistics.mean(few), vote(bank, rung.bank_labels, queries, rung.test_labels)


def vote(bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor) -> float:
    return 100 * knn_accuracy(bank, labels, queries, truth, k=min(NEIGHBOURS, len(bank)))


@torch.no_grad()
def features(net: Any, images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    net.eval()
    return torch.cat([net((batch / 255 - mean) / std) for batch in images.split(256)])


# The tables -------------------------------------------------------------------------------------


def seconds(rung: str, method: str, runs: list[Run], done: Outcomes) -> float:
    """The median of the seeds."""
    return statistics.median(done[r].seconds for r in runs if (r.rung, r.method) == (rung, method))


def report(
    untrained: list[Run],
    equal_steps: list[Run],
    equal_time: list[Run],
    done: Outcomes,
    args: argparse.Namespace,
) -> None:
    at_equal_time = equal_time + [run for run in equal_steps if run.method == OURS]
    lines = [
        f"{args.steps} steps of {BATCH} images, {args.seeds} seeds, kNN accuracy in % (mean ± "
        "standard deviation), CPU seconds on one thread (median). A verdict needs two standard "
        "errors of the difference of the means, which of so few seeds is little: p is Welch's, "
        "paired that of the differences by seed. Methods share weights and batches by seed.",
        "",
        "| rung | method | lr | equal steps: few labels | all labels | seconds "
        "| equal time: steps | few labels | all labels |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for rung in args.rungs:
        start = [done[run] for run in untrained if run.rung == rung]
        lines.append(f"| {rung} | untrained | | {figure(start, 'few')} | {figure(start, 'all')} "
                     "| | | | |")  # fmt: skip
        for method in args.methods:
            steps = [run for run in equal_steps if (run.rung, run.method) == (rung, method)]
            timed = [run for run in at_equal_time if (run.rung, run.method) == (rung, method)]
            a, b = ([done[run] for run in runs] for runs in (steps, timed))
            lines.append(
                f"| {rung} | {method} | {steps[0].lr:g} | {figure(a, 'few')} | {figure(a, 'all')} "
                f"| {seconds(rung, method, equal_steps, done):.0f} | {timed[0].steps} "
                f"| {figure(b, 'few')} | {figure(b, 'all')} |"
            )
    lines.append("")
    for rung, (name, runs) in itertools.product(
        args.rungs, (("equal steps", equal_steps), ("equal time", at_equal_time))
    ):
        lines += [f"- {rung}, {name}: {verdict(rung, labels, runs, done, args.methods)}"
                  for labels in ("few", "all")]  # fmt: skip
    (args.output / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def figure(outcomes: list[Outcome], labels: str) -> str:
    values = [getattr(outcome, labels) for outcome in outcomes]
    return f"{statistics.mean(values):.1f} ± {deviation(values):.1f}"


def deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def verdict(rung: str, labels: str, runs: list[Run], done: Outcomes, methods: list[str]) -> str:
    """Whether ours is ahead of each of the others by more than two standard errors."""
    values = {
        method: [getattr(done[r], labels) for r in runs if (r.rung, r.method) == (rung, method)]
        for method in methods
    }
    said = []
    for method in methods[1:]:
        ours, other = values[OURS], values[method]
        ahead = statistics.mean(ours) - statistics.mean(other)
        error = math.hypot(deviation(ours), deviation(other)) / math.sqrt(len(ours))
        word = "no clear difference from"
        if abs(ahead) > 2 * error:
            word = "leads" if ahead > 0 else "trails"
        p = ttest_ind(ours, other, equal_var=False).pvalue
        paired = ttest_rel(ours, other).pvalue
        by_seed = ", ".join(f"{a - b:+.1f}" for a, b in zip(ours, other, strict=True))
        figures = f"{ahead:+.1f}, two standard errors {2 * error:.1f}, p {p:.2f}, "
        figures += f"paired {paired:.2f}; by seed {by_seed}"
        said.append(f"{word} {method} ({figures})")
    return f"{labels} labels: {'; '.join(said)}"


if __name__ == "__main__":
    main()
