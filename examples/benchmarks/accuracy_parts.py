"""What accuracy.py compares: the rungs' images, and one training step of each method.

Everything is held in memory as uint8; the labels serve the evaluation alone.
"""

import argparse
import io
import itertools
import math
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from parts.photographs import as_batch, photograph_windows
from quickstart import RECIPE
from step_contestants import LightlyBYOL, lightly_views, peer_class

from byol_pytorch import BYOL
from byol_pytorch.augment import byol_views, local_views
from byol_pytorch.augment.views import GLOBAL_SCALE

SIZE, BATCH = 32, 128
DECAY = 0.97  # of the EMA at the start: the quick start's for runs of some hundred steps
HEAD = {"projection_size": RECIPE.projection_size,
        "projection_hidden_size": RECIPE.projection_hidden_size}  # fmt: skip
OURS, PEER, LIGHTLY = "byol_pytorch", "byol-pytorch 0.9.1", "lightly's parts"
LOCAL, SHARED = "byol_pytorch, 2 local views", "byol_pytorch, 2 local views, one predictor"
METHODS = (OURS, LOCAL, SHARED, PEER, LIGHTLY)


# The rungs --------------------------------------------------------------------------------------


@dataclass
class Rung:
    """uint8 images (N, 3, 32, 32): to train on without labels, to vote, and to test on."""

    train: Tensor
    bank: Tensor
    bank_labels: Tensor
    test: Tensor
    test_labels: Tensor
    few: int  # labels a class
    preset: str = "imagenet"  # of byol_pytorch's views

    def tuning(self) -> "Rung":
        """The same without the test images: every fifth that votes takes their place."""
        held = torch.arange(len(self.bank)) % 5 == 4
        votes, labels = self.bank[~held], self.bank_labels[~held]
        return Rung(self.train, votes, labels, self.bank[held], self.bank_labels[held],
                    self.few, self.preset)  # fmt: skip


def photographs(_: argparse.Namespace) -> Rung:
    """The quick start's: from which of 20 photographs was a window cut?"""
    p = photograph_windows(SIZE, BATCH)
    mixed = torch.randperm(len(p.train), generator=torch.Generator().manual_seed(0))
    train, labels = p.train[mixed], p.train_labels[mixed]
    return Rung(train, train, labels, p.test, p.test_labels, few=5)


def cifar10(args: argparse.Namespace, train: int = 10_000, test: int = 2_000) -> Rung:
    """The first images of CIFAR-10, from .npz files of `jpeg`, `offsets` and `labels`."""
    (images, labels), (queries, truth) = (
        read_npz(args.cifar / f"{name}.npz", count)
        for name, count in (("train", train), ("test", test))
    )
    return Rung(images, images, labels, queries, truth, few=10, preset="cifar")


def read_npz(path: Path, count: int) -> tuple[Tensor, Tensor]:
    z = np.load(path)
    ends = z["offsets"][: count + 1]
    data = z["jpeg"][: ends[-1]].tobytes()
    images = [
        np.asarray(Image.open(io.BytesIO(data[a:b])).convert("RGB"))
        for a, b in itertools.pairwise(ends)
    ]
    return as_batch(images), torch.from_numpy(z["labels"][:count].astype(np.int64))


def cells(args: argparse.Namespace, window: int = 96, a_photograph: int = 20) -> Rung:
    """BCCD microscopy: train on windows anywhere; which kind of cell is a window centred on?

    Of the kinds, which are 12 to 1 in number, up to 300 vote and up to 60 are tested on.
    """
    rng = np.random.default_rng(0)
    names = {s: (args.bccd / "ImageSets/Main" / f"{s}.txt").read_text().split()
             for s in ("trainval", "test")}  # fmt: skip
    windows, found = [], {}
    for split, limit in (("trainval", 300), ("test", 60)):
        centred: dict[str, list[np.ndarray]] = {}
        for name in names[split]:
            image = Image.open(args.bccd / "JPEGImages" / f"{name}.jpg").convert("RGB")
            if split == "trainval":
                lefts = rng.integers(0, image.width - window, a_photograph, endpoint=True)
                tops = rng.integers(0, image.height - window, a_photograph, endpoint=True)
                windows += [cut(image, *at, window) for at in zip(lefts, tops, strict=True)]
            for kind, x, y in centres(args.bccd / "Annotations" / f"{name}.xml"):
                left = min(max(0, x - window // 2), image.width - window)
                top = min(max(0, y - window // 2), image.height - window)
                centred.setdefault(kind, []).append(cut(image, left, top, window))
        chosen = [(kind, of[i]) for kind, of in sorted(centred.items())
                  for i in rng.permutation(len(of))[:limit]]  # fmt: skip
        found[split] = [chosen[i] for i in rng.permutation(len(chosen))]
    kinds = sorted({kind for kind, _ in found["trainval"]})
    (bank, labels), (test, truth) = (
        (as_batch([w for _, w in part]), torch.tensor([kinds.index(k) for k, _ in part]))
        for part in found.values()
    )
    return Rung(as_batch(windows), bank, labels, test, truth, few=5)


def cut(image: Image.Image, left: int, top: int, window: int) -> np.ndarray:
    box = (left, top, left + window, top + window)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box))


def centres(annotation: Path) -> list[tuple[str, int, int]]:
    """Name and middle of every box of a PASCAL VOC annotation."""
    found = []
    for thing in ElementTree.parse(annotation).iter("object"):
        sides = (int(thing.findtext(f"bndbox/{side}", "0")) for side in ("xmin", "xmax"))
        ends = (int(thing.findtext(f"bndbox/{side}", "0")) for side in ("ymin", "ymax"))
        found.append((thing.findtext("name", ""), sum(sides) // 2, sum(ends) // 2))
    return found


RUNGS = {"photographs": photographs, "cifar10": cifar10, "cells": cells}


# The methods ------------------------------------------------------------------------------------


@dataclass
class Method:
    """`loss` of a uint8 batch, on the paper's scale; `moved` after each optimizer step."""

    parameters: list[nn.Parameter]
    loss: Callable[[Tensor], Tensor]
    moved: Callable[[int], None]  # given the number of the step


def build(name: str, net: Any, rung: Rung, steps: int, args: argparse.Namespace) -> Method:
    """Heads and EMA alike, views of each library's own kind with its defaults for this size."""
    if name in (OURS, LOCAL, SHARED):
        return ours(net, rung, steps, name)
    return peer(net, args) if name == PEER else lightly(net, rung, steps)


def ours(net: nn.Module, rung: Rung, steps: int, name: str) -> Method:
    options: dict[str, Any] = {"preset": rung.preset, "channels_last": True}
    local: dict[str, Any] = {}
    if name != OURS:
        options["scale"] = GLOBAL_SCALE
        small = local_views(SIZE // 2, preset=rung.preset, channels_last=True)
        local = {"local_views": 2, "local_size": SIZE // 2, "local_augment_fn": small}
    first, second = byol_views(SIZE, **options)
    learner = BYOL(net, SIZE, augment_fn=first, augment_fn2=second, **HEAD, **local,
                   moving_average_decay=DECAY, total_steps=steps)  # fmt: skip
    if name == SHARED:
        learner.local_predictor = learner.predictor
    return Method(list(learner.parameters()), learner, lambda step: learner.update_moving_average())


def peer(net: nn.Module, args: argparse.Namespace) -> Method:
    """byol-pytorch 0.9.1, whose decay is constant; BYOL's plain heads, not its simplicial ones."""
    learner = peer_class(args)(
        net, SIZE, hidden_layer=-1, moving_average_decay=DECAY,
        use_simplicial_embeddings=False, **HEAD,
    )  # fmt: skip
    learner(torch.rand(2, 3, SIZE, SIZE))  # as its constructor does; README's table was made so
    parameters = [p for p in learner.parameters() if p.requires_grad]
    return Method(
        parameters, lambda images: learner(images / 255),
        lambda step: learner.update_moving_average(),
    )  # fmt: skip


def lightly(net: Any, rung: Rung, steps: int) -> Method:
    parts = LightlyBYOL(net, HEAD["projection_hidden_size"], HEAD["projection_size"])
    transform = lightly_views(SIZE, rung.preset)

    def loss(images: Tensor) -> Tensor:
        pictures = (Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy())
        views = zip(*(transform(picture) for picture in pictures), strict=True)
        return 4 * parts.loss(*(torch.stack(view) for view in views)) + 4  # on the paper's scale

    def moved(step: int) -> None:
        parts.move(1 - (1 - DECAY) * (math.cos(math.pi * step / steps) + 1) / 2)

    return Method(parts.parameters, loss, moved)
