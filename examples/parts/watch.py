"""How a pre-training run is watched: figures, nearest neighbours, collapse, and what it would take.

Nothing here changes what is trained: a run that is not watched ends with the same weights.
"""

import math
import resource
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from byol_pytorch import BYOL
from byol_pytorch.evaluation import knn_accuracy
from byol_pytorch.evaluation.features import extract_features
from parts.amount import by_amount
from parts.batches import Bad, EvaluationImages, make_loader
from parts.decoding import PAPER_CROP, Crop, draw_box
from parts.journal import Clock, Journal
from parts.neighbours import draw, nearest
from parts.processes import fail, gathered, rank, summed, world_size
from parts.resume import Run
from parts.sources import Source, header_size

EVALUATION_BATCH = 256
COLLAPSED, FALLEN = 0.2, 0.5  # of the healthy feature std, and of the run's highest so far
HEALTH_IMAGES = 256
PAGE_IMAGES, PAGE_QUERIES, PAGE_NEIGHBOURS = 500, 6, 7  # of the picture of neighbours


def memory_gib(device: torch.device) -> float:
    """The highest so far: of the device, or on CPUs of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@dataclass(frozen=True)
class Watching:
    """How closely a run is watched; each is a flag of its program."""

    log_every: int  # steps
    health_every: int  # steps
    knn_every: int  # epochs
    knn_images: int
    knn_neighbours: int
    knn_temperature: float
    max_bad: float  # share of the images
    max_skipped: int  # steps in a row


class Watch:
    """What is done beside the training: figures, nearest neighbours, alarms, unreadable images."""

    def __init__(
        self, plan: Any, run: Run, journal: Journal, source: Source, test: Source | None
    ) -> None:
        self.plan, self.recipe, self.how = plan, plan.recipe, plan.watching
        self.learner, self.progress = run.learner, run.progress
        self.journal, self.source = journal, source
        self.clock = Clock(plan.device)
        self.losses: list[Tensor] = []
        self.unread: list[Bad] = []
        self.logged = run.progress.step
        self.neighbours = Neighbours(
            source, test, self.how.knn_images, self.how.knn_neighbours, self.how.knn_temperature
        )
        every = range(0, len(source), max(1, len(source) // HEALTH_IMAGES))
        self.sample, good = EvaluationImages(source, self.recipe.image_size)[np.array(every)]
        self.sample = self.sample[good == 1][:HEALTH_IMAGES].to(plan.device)
        if self.how.knn_every and not self.neighbours:
            journal.tell("no labels, so no kNN accuracy: neighbours.png at the end shows what the "
                         "backbone takes for alike")  # fmt: skip
        if run.progress.step == 0:
            self._neighbours()

    def before(self, bad: list[Bad], one: Tensor, two: Tensor) -> None:
        """Before a forward pass; the very first one's views become a picture."""
        self.unread += bad
        if self.progress.step == 0 and not self.losses:
            self.journal.views(one, two, self.learner.normalisation)

    def after(self, loss: Tensor) -> None:
        self.losses.append(loss.detach())

    def look(self, norm: Tensor, lr: float, everything: bool) -> None:
        """After a step, which the progress counts already."""
        step, how = self.progress.step, self.how
        self.journal.advance()
        last = step == self.plan.steps
        if step % how.log_every == 0 or everything:
            self._bad_images()
            self._figures(norm, lr)
        if step == 1 or step % how.health_every == 0 or last:
            self._health()
        epoch, rest = divmod(step, self.plan.epoch_steps)
        if (how.knn_every and rest == 0 and epoch % how.knn_every == 0) or last:
            self._neighbours()

    def show_neighbours(self) -> None:
        """What the backbone takes for alike, where no label says whether it is. On all ranks."""
        if self.neighbours or len(self.source) < 2:
            return
        order = np.random.default_rng(0).permutation(len(self.source))[:PAGE_IMAGES]
        plan, size = self.plan, self.recipe.image_size
        found, kept = embed(self.learner, self.source, order, size, plan.device, plan.workers)
        names = [self.source.name(i) for i in kept]
        if rank() or len(kept) < 2:
            return
        queries = list(range(min(PAGE_QUERIES, len(kept))))
        page = nearest(found, names, queries, PAGE_NEIGHBOURS)
        draw(plan.output / "neighbours.png", self.source, kept, page)
        self.journal.tell(
            f"{plan.output / 'neighbours.png'} shows the nearest of {len(kept)} images"
        )

    def stop_if_skipping(self) -> None:
        progress = self.progress
        if progress.streak < self.how.max_skipped:
            return
        sentence = (
            f"the gradients of {progress.streak} steps in a row were not finite, "
            f"{progress.skipped} steps in all. These steps were not taken, and last.pt is of "
            "before. Lower --lr, or use --amp bf16 or none; a batch that does this alone is found "
            "by starting again."
        )
        self.journal.note(progress.step, sentence)
        fail(sentence)

    def too_many_bad(self) -> bool:
        return len(self.progress.bad) > self.how.max_bad * len(self.source)

    def stop_if_bad(self) -> None:
        # Not a run that is done, whose backbone is there.
        if self.too_many_bad() and self.progress.step < self.plan.steps:
            first = next(iter(self.progress.bad.items()))
            fail(
                f"{len(self.progress.bad)} of {len(self.source)} images cannot be read, and "
                f"--max-bad is {self.how.max_bad:g}. log.jsonl names them, the first is "
                f"{self.source.name(first[0])}: {first[1]}"
            )

    def say_saved(self, error: OSError | None, asked: bool) -> None:
        step = self.progress.step
        if error is not None:
            self.journal.note(step, f"NOT saved, the last.pt of before remains: {error}")
        if asked and error is not None:
            fail(f"asked to stop, and the state of step {step} could not be saved: {error}")
        if asked and step < self.plan.steps:
            self.journal.note(step, "asked to stop: saved, the same command goes on from here")

    def _figures(self, norm: Tensor, lr: float) -> None:
        steps, self.logged = self.progress.step - self.logged, self.progress.step
        if not steps:
            return
        loss = torch.stack(self.losses).mean()
        self.losses.clear()
        speed = self.clock.read(steps)
        figures = {
            "epoch": self.progress.step / self.plan.epoch_steps,
            "loss": summed(loss).item() / self.plan.world,
            "lr": lr,
            "ema_decay": self.learner.moving_average_decay,
            "grad_norm": norm.item(),
            "skipped_steps": self.progress.skipped,
            "unreadable_images": len(self.progress.bad),
            "images_per_second": speed.pop("steps_per_second") * self.recipe.batch_size,
            **speed,
            "memory_gib": memory_gib(self.plan.device),
        }
        self.journal.figures(self.progress.step, figures)

    def _bad_images(self) -> None:
        found = sorted(bad for of_rank in gathered(self.unread) for bad in of_rank)
        self.unread = []
        for index, reason in found:
            if index not in self.progress.bad:
                self.progress.bad[index] = reason
                name = self.source.name(index)
                self.journal.note(self.progress.step, f"cannot read {name}: {reason}", bad=name)

    def _health(self) -> None:
        progress, recipe = self.progress, self.recipe
        try:
            figures = self.learner.diagnostics(self.sample)
        except torch.linalg.LinAlgError:  # of the singular values
            self.journal.note(progress.step, "the projections are not finite: lower --lr")
            return
        self.journal.figures(progress.step, figures)
        std = figures["feature_std"]
        if progress.step == self.plan.steps:
            self.journal.tell(
                f"feature std {std:.3f} (healthy: near {recipe.projection_size**-0.5:.3f}), "
                f"effective rank {figures['effective_rank']:.1f} (1 is collapse)"
            )
        collapsed = has_collapsed(std, progress.highest_std, recipe.projection_size)
        if collapsed and not progress.alarmed:
            cause = likely_cause(
                bn_batch=recipe.batch_size // recipe.accumulate,
                decay=figures["ema_decay"],
                lr_ratio=self.plan.lr / self.plan.usual_lr,
                weight_decay=recipe.weight_decay,
                skipped=progress.skipped,
            )
            sentence = (
                f"COLLAPSE? feature std {std:.2g}, it was {progress.highest_std:.2g}; {cause}"
            )
            self.journal.note(progress.step, sentence, collapse=True)
        progress.alarmed = collapsed
        progress.highest_std = max(progress.highest_std, std)

    def _neighbours(self) -> None:
        if not self.how.knn_every or not self.neighbours:
            return
        plan = self.plan
        accuracy = self.neighbours.accuracy(
            self.learner, self.recipe.image_size, plan.device, plan.workers
        )
        epoch, step = self.progress.step / plan.epoch_steps, self.progress.step
        self.journal.figures(step, {"epoch": epoch, "knn_accuracy": accuracy})
        self.journal.tell(f"epoch {epoch:.1f}: kNN accuracy {accuracy:.2f} %")


class Neighbours:
    """The online kNN accuracy: how many test images have the label of their nearest neighbours.

    Up to `limit` training images vote on up to a fifth as many test images; without a test set
    other training images take its place.
    """

    def __init__(
        self, train: Source, test: Source | None, limit: int, k: int, temperature: float
    ) -> None:
        self.k, self.temperature = k, temperature
        rng = np.random.default_rng(0)
        bank = rng.permutation(np.flatnonzero(train.labels >= 0))
        if test is None or not (test.labels >= 0).any():
            test = train
            queries, bank = np.split(bank[: limit + limit // 5], [min(limit, len(bank)) // 6])
        else:
            queries = rng.permutation(np.flatnonzero(test.labels >= 0))
        self.bank, self.queries = (train, bank[:limit]), (test, queries[: limit // 5])

    def __bool__(self) -> bool:
        return min(len(self.bank[1]), len(self.queries[1])) > 0

    def accuracy(self, learner: BYOL, size: int, device: torch.device, workers: int) -> float:
        """In percent, of the backbone as it is, in evaluation mode. Every rank calls it."""
        try:
            (bank, voting), (queries, asked) = (
                embed(learner, *part, size, device, workers) for part in (self.bank, self.queries)
            )
            labels, truth = (
                torch.from_numpy(part[0].labels[numbers])
                for part, numbers in ((self.bank, voting), (self.queries, asked))
            )
            k = min(self.k, len(bank))
            return 100 * knn_accuracy(
                bank, labels, queries, truth, k=k, temperature=self.temperature
            )
        except ValueError:  # NaN, or one class left: no figure, and no end of the run
            return math.nan


def embed(
    learner: BYOL, source: Source, numbers: np.ndarray, size: int, device: torch.device,
    workers: int,
) -> tuple[Tensor, list[int]]:  # fmt: skip
    """Representations (N, D) and numbers of the images that can be read, by all ranks."""
    # As many on each rank: under FSDP a forward pass is one of all ranks.
    share = math.ceil(len(numbers) / world_size())
    mine = np.resize(numbers, share * world_size())[rank() :: world_size()]
    parts = np.array_split(mine, math.ceil(share / EVALUATION_BATCH))
    loader = make_loader(EvaluationImages(source, size), parts, workers, device)
    features, readable = extract_features(learner, loader, device=device)
    assert readable is not None
    good = readable[: len(numbers)] == 1
    return features[: len(numbers)][good], numbers[good.numpy()].tolist()


def has_collapsed(std: float, highest: float, projection_size: int) -> bool:
    """Whether the feature std fell: far below 1 / sqrt(D) and below what the run had reached."""
    return std < COLLAPSED / math.sqrt(projection_size) and std < FALLEN * highest


def likely_cause(
    *, bn_batch: int, decay: float, lr_ratio: float, weight_decay: float, skipped: int
) -> str:
    """The first thing to try, in the order in which these are usual.

    `bn_batch` images share a batch norm; `lr_ratio` is the learning rate over the recipe's.
    """
    if lr_ratio > 1.5:
        return f"the learning rate is {lr_ratio:.1f} times the recipe's: lower --lr"
    if decay < 0.9:
        return f"the target follows at once (EMA decay {decay:g}): raise --base-decay"
    if bn_batch < 32:
        return (
            f"batch norm sees only {bn_batch} images: a larger --batch-size or a smaller "
            "--accumulate"
        )
    if weight_decay > 0.2:
        return f"the weight decay of {weight_decay:g} is high: lower --weight-decay"
    if skipped:
        return f"{skipped} steps had non-finite gradients: lower --lr, or --amp bf16"
    return "most often the learning rate or a short warm-up: lower --lr, raise --warmup-epochs"


def describe(learner: BYOL, plan: Any, source: Source, shards: int) -> None:
    """What --dry-run prints; the weights of a run are split into `shards` parts."""
    recipe = plan.recipe
    epochs = plan.steps / plan.epoch_steps
    shown = plan.identity | {"epochs": f"{epochs:.4g}"}
    del shown["names of the images"]  # a number that tells others apart
    for name, value in shown.items():
        print(f"{name.replace('_', '-'):24} {value}")
    usual = by_amount(len(source))
    other = {name: getattr(recipe, name) for name in usual if getattr(recipe, name) != usual[name]}
    print(
        f"\nusual for {len(source)} images of your own: {as_flags(usual)}\n"
        f"here: {as_flags(other) or 'the same'}"
    )
    share = upsampled_share(source, recipe.image_size, plan.decode_size, recipe.crops[0][1])
    together = plan.images * (plan.world if plan.sync_bn else 1)
    print(
        f"\nglobal batch {recipe.batch_size}: {plan.world} processes x {recipe.accumulate} passes "
        f"x {plan.images} images, on {plan.device.type}\n"
        f"batch norm of the backbone spans {together} images, as accumulated passes do not share "
        "it (4096 in the paper's runs and 16xb256, 256 in 8xb32-accum16)\n"
        f"autocast: {plan.amp} (the published runs: none)\n"
        f"{len(source)} images, {plan.epoch_steps} steps an epoch, {plan.steps} steps\n"
        f"learning rate {plan.lr:g} after {plan.warmup_steps} steps of warm-up, "
        f"EMA decay {plan.decay:g}{'' if recipe.constant_decay else ' rising to 1'}\n"
        f"{100 * share:.0f} % of the views are enlarged from fewer pixels than they have\n"
        f"memory: about {estimated_gib(learner, plan, shards):.2f} GiB a process"
    )


def as_flags(settings: dict[str, Any]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in settings.items())


def estimated_gib(learner: BYOL, plan: Any, shards: int) -> float:
    """Weights and what belongs to them, and what a backward pass of both views keeps, which is
    measured with two images."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    size = (2, 3, plan.recipe.image_size, plan.recipe.image_size)
    one, two = (torch.randn(size, device=plan.device) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), plan.autocast():
        loss = learner(one, two)
    del loss
    weights = list(learner.parameters())
    for p in weights:
        kept.pop(p.untyped_storage().data_ptr(), None)
    own = sum(p.nbytes for p in weights)
    states = 2 if plan.recipe.optimizer == "adamw" else 1
    # Of what trains: gradient, optimizer's state, and the copies that undo a step.
    copies = (2 + 2 * states) * sum(p.nbytes for p in weights if p.requires_grad)
    return ((own + copies) / shards + sum(kept.values()) / len(one) * plan.images) / 2**30


def upsampled_share(
    source: Source, size: int, decode_size: int | None, crop: Crop = PAPER_CROP
) -> float:
    """The part of all crops with fewer pixels than their view, from up to 500 images."""
    rng, small, drawn = np.random.default_rng(0), 0, 0
    for index in range(0, len(source), max(1, len(source) // 500)):
        try:
            shape = (decode_size, decode_size) if decode_size else header_size(source, index)
        except Exception:  # an unreadable file; training counts it
            continue
        boxes = [draw_box(rng, *shape, crop) for _ in range(20)]
        small += sum(h * w < size * size for _, _, h, w in boxes)
        drawn += len(boxes)
    return small / max(1, drawn)
