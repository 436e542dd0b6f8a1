"""MMSelfSup's kNN table of a backbone: do the nearest training images know a test image's class?

    python examples/evaluate_knn.py --data IMAGENET --model resnet50 --checkpoint FILE
    torchrun --nproc-per-node=8 examples/evaluate_knn.py --data IMAGENET --checkpoint FILE

Nothing is trained. Labelled images as parts/labelled.py reads them; without a test set every fifth
image of a class is tested on. The measure is byol_pytorch.evaluation.knn's.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from parts import openmp  # noqa: F401, before torch

# isort: split

import numpy as np
import torch
from parts.backbone import open_backbone
from parts.flags import common_flags, set_up
from parts.labelled import Labelled, evaluation_images, open_images
from parts.processes import fail, launch, leave_processes, rank, summed, tell, world_size
from parts.published import IMAGENET
from parts.tables import write_results
from torch import Tensor

from byol_pytorch.evaluation.knn import TEMPERATURE, K, knn_predict

TOPS = (1, 5)
# MMSelfSup 0.x, configs/selfsup/byol/README.md, "ImageNet Nearest-Neighbor Classification":
# byol_resnet50_8xb32-accum16-coslr-{200,300}e, top-1.
PUBLISHED = {
    f"published: MMSelfSup's BYOL, ResNet-50, {epochs} epochs, ImageNet, top-1":
    dict(zip(K, figures, strict=True))
    for epochs, figures in ((200, (63.9, 64.2, 62.9, 61.9)), (300, (66.1, 66.3, 65.2, 64.4)))
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    machine = set_up(args)
    check(args)
    net, facts = open_backbone(args)
    train, test = (
        chosen(evaluation_images(part, facts, bilinear=True), wanted, args.seed)
        for part, wanted in zip(
            open_images(args.data, args.max_value),
            (args.train_images, args.test_images),
            strict=True,
        )
    )
    ks = fitting(args.k, len(train))
    tell(f"{len(train)} images vote on {len(test)}")
    try:
        (bank, labels), (queries, truth) = (
            machine.features(net, part, memmap=args.memmap and args.memmap / name)
            for name, part in (("train", train), ("test", test))
        )
        accuracy = accuracies(bank, labels, queries, truth, ks, args.temperature, machine.device)
    except ValueError as error:
        fail(str(error))
    name = f"{facts.model}, {facts.start}"
    rows = [[f"{name}, top-{top}", *(100 * accuracy[top, k] for k in ks)] for top in TOPS]
    counts = {"train_images": len(train), "test_images": len(test)}
    counts["classes"] = len(labels.unique())
    if tuple(counts.values()) == IMAGENET:
        rows += [[name, *(figures.get(k) for k in ks)] for name, figures in PUBLISHED.items()]
    if rank() == 0:
        columns = ["kNN accuracy, %", *(f"k={k}" for k in ks)]
        write_results(args, f"{name}: nearest neighbours", columns, rows, facts, counts)
    leave_processes()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Defaults are MMSelfSup's, tools/benchmarks/classification/knn_imagenet/test_knn.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    common_flags(parser)
    add = parser.add_argument
    add("--k", type=int, nargs="+", default=K, help="neighbours that vote (default: %(default)s)")
    add("--temperature", type=float, default=TEMPERATURE,
        help="a vote weighs exp(cosine / temperature) (default: %(default)s)")  # fmt: skip
    add("--train-images", type=int, help="a random draw of so many vote (default: all)")
    add("--test-images", type=int, help="a random draw of so many is asked (default: all)")
    add("--memmap", type=Path, metavar="FOLDER",
        help="keep the features in files there, where memory is too small for them")  # fmt: skip
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    least = min(*args.k, args.train_images or 1, args.test_images or 1)
    if least < 1 or not args.temperature > 0:
        fail(
            "--k, --train-images and --test-images are at least 1, and --temperature is above 0: "
            f"got {list(args.k)}, {args.train_images}, {args.test_images}, {args.temperature:g}."
        )


def chosen(images: Labelled, wanted: int | None, seed: int) -> Labelled:
    """All of the images, or so many, in their order."""
    assert images.indices is not None
    if wanted is None or wanted >= len(images):
        return images
    drawn = np.random.default_rng(seed).permutation(len(images))[:wanted]
    return replace(images, indices=images.indices[np.sort(drawn)])


def fitting(ks: list[int], images: int) -> list[int]:
    """Those k that so many images can serve; what is left out is said."""
    fit = [k for k in dict.fromkeys(ks) if k <= images]
    if len(fit) < len(set(ks)):
        tell(f"left out: k = {', '.join(str(k) for k in ks if k > images)}, as only {images} vote")
    if not fit:
        fail(f"--k {' '.join(map(str, ks))}; only {images} training images can vote.")
    return fit


def accuracies(
    bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, ks: list[int],
    temperature: float, device: torch.device,
) -> dict[tuple[int, int], Any]:  # fmt: skip
    """By top and k, in [0, 1]. Each process asks about its part of the queries."""
    mine = slice(rank(), None, world_size())
    ranked = knn_predict(
        bank, labels, queries[mine], k=ks, temperature=temperature, top=max(TOPS), device=device
    )
    truth = truth[mine, None].to(device)
    pairs = [(top, k) for top in TOPS for k in ks]
    hits = torch.stack([(ranked[k][:, :top] == truth).any(1).sum() for top, k in pairs])
    return dict(zip(pairs, (summed(hits).double() / len(queries)).tolist(), strict=True))


if __name__ == "__main__":
    launch(main)
