"""MMSelfSup's SVM tables of a backbone: mAP of linear SVMs on every stage, and from few labels.

    python examples/evaluate_svm.py --data VOCdevkit --model resnet50 --checkpoint FILE

PASCAL VOC 2007 as torchvision.datasets.VOCDetection unpacks it, any data in its layout (without
the lists of each class, its annotations say what is in an image), or images with one class each,
as examples/evaluate_knn.py takes them. The measures are byol_pytorch.evaluation.svm's.
"""

import argparse
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from parts import openmp  # noqa: F401, before torch

# isort: split

import numpy as np
import torch
from parts import voc
from parts.backbone import Facts, open_backbone
from parts.decoding import CENTRE
from parts.flags import common_flags, set_up
from parts.labelled import Chosen, Labelled, Transform, as_tensor, evaluation_transform, open_images
from parts.processes import fail, launch, tell
from parts.published import VOC07
from parts.tables import Cell, write_results
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from byol_pytorch.evaluation.features import resnet_stages
from byol_pytorch.evaluation.svm import (
    VOC07_COSTS,
    VOC07_SHOTS,
    Form,
    LowShotResult,
    SVMResult,
    low_shot_map,
    low_shot_sample,
    svm_map,
)

# MMSelfSup, configs/selfsup/byol/README.md, "VOC SVM / Low-shot SVM": feature5 of
# byol_resnet50_8xb32-accum16-coslr-200e.
PUBLISHED = "feature5 of MMSelfSup's BYOL, ResNet-50, 200 epochs"
PUBLISHED_SVM = 86.31
PUBLISHED_LOW_SHOT = dict(
    zip(VOC07_SHOTS, (45.37, 56.83, 68.47, 74.12, 78.30, 81.53, 83.56, 84.73), strict=True)
)

View = Callable[[bool], Transform]  # of images that are all of one size, or are not


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Defaults are what MMSelfSup's tools/benchmarks/classification/svm_voc07 runs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    common_flags(parser)
    add = parser.add_argument
    add("--layers", nargs="+", help="feature1 to feature5 (a ResNet's default), pooled (others')")
    add("--low-shot", default="best", help="the layer for few labels: a name, best, all or none")
    add("--framing", choices=("whole", "centre"), default="whole",
        help="the image squeezed into a square, as published, or its central square")  # fmt: skip
    add("--train-split", default="trainval", help="a list in VOC's ImageSets/Main")
    add("--test-split", default="test", help="likewise")
    add("--classes", nargs="+", help="of VOC data (default: all)")
    add("--train-images", type=int, help="a random draw of so many (default: all)")
    add("--test-images", type=int, help="likewise")
    add("--costs", type=float, nargs="+", default=VOC07_COSTS, help="eval_svm_full.sh and "
        "parse_cost_list: 1, 10, 100 and 2^-4 to 2^-19")  # fmt: skip
    add("--folds", type=int, default=3, help="train_svm_kfold.py")
    add("--shots", type=int, nargs="+", default=VOC07_SHOTS, help="eval_svm_lowshot.sh")
    add("--samplings", type=int, default=5, help="eval_svm_lowshot.sh")
    add("--metric", choices=get_args(Form), default="voc10", help="the form of AP: svm_helper.py")
    add("--positive-weight", type=float, default=2.0, help="train_svm_kfold.py")
    add("--tol", type=float, default=1e-4, help="train_svm_kfold.py")
    add("--max-iter", type=int, default=2000, help="train_svm_kfold.py")
    add("--drop-difficult", action="store_true",
        help="leave difficult images out of training (published: they are negatives)")  # fmt: skip
    add("--memmap", type=Path, metavar="FOLDER",
        help="keep the features in files there, where memory is too small for them")  # fmt: skip
    add("--jobs", type=int, default=-1, help="processes that fit SVMs; -1: one a core")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    machine = set_up(args, join=False)
    folder = voc.find_year(args.data, "VOC2007", "Main")
    net, facts = open_backbone(args)
    stages = find_stages(net)
    layers = args.layers or list(stages) or ["pooled"]
    check(args, layers, stages)
    view = partial(transform, args.framing, facts)
    counts = (args.train_images, args.test_images)
    if folder:
        splits = (args.train_split, args.test_split)
        train, test, classes = open_voc(folder, splits, args.classes, counts, args.seed, view)
    else:
        train, test, classes = open_classes(
            open_images(args.data, args.max_value), counts, args.seed, view
        )
    few, many = train.labels, test.labels
    tell(f"{len(few)} images to train on, {len(many)} to test on, {len(classes)} classes")
    svm, low_shot = {}, {}
    try:
        if args.low_shot != "none":
            low_shot_sample(few, max(args.shots))  # refuses what low_shot_map would, at once
        read = {name: stages[name] for name in layers if name in stages}
        (features, labels), (tests, truth) = (
            machine.features(net, part, stages=read, memmap=args.memmap and args.memmap / name)
            for name, part in (("train", train), ("test", test))
        )
        settings = {
            "costs": args.costs, "metric": args.metric, "positive_weight": args.positive_weight,
            "tol": args.tol, "max_iter": args.max_iter, "seed": args.seed, "n_jobs": args.jobs,
            "progress": True,
        }  # fmt: skip
        for layer in layers:
            svm[layer] = svm_map(
                features[layer], labels, tests[layer], truth, folds=args.folds,
                train_on_ignored=not args.drop_difficult, **settings,
            )  # fmt: skip
            tell(f"{layer}: mAP {100 * svm[layer].mean_ap:.2f} %")
        best = max(layers, key=lambda layer: svm[layer].mean_ap)
        chosen = {"best": [best], "all": layers, "none": []}.get(args.low_shot, [args.low_shot])
        for layer in chosen:
            low_shot[layer] = low_shot_map(
                features[layer], labels, tests[layer], truth, shots=args.shots,
                samplings=args.samplings, **settings,
            )  # fmt: skip
    except ValueError as error:
        fail(str(error))
    chance = float(np.mean([(t == 1).sum() / (t != -1).sum() for t in one_hot(many).T]))
    counts = len(few), len(many), len(classes)
    report(args, facts, classes, counts, svm, low_shot, best, chance)


def report(
    args: argparse.Namespace,
    facts: Facts,
    classes: list[str],
    counts: tuple[int, int, int],
    svm: dict[str, SVMResult],
    low_shot: dict[str, LowShotResult],
    best: str,
    chance: float,
) -> None:
    """One row a layer, the best in bold; beside them the published row where the data is VOC07.

    `counts`: of the images to train and to test on and of the classes. `chance`: the mean share of
    positives, which is the AP of scores that say nothing.
    """
    accurate = svm[best].top1 is not None
    columns = ["layer", "SVM", *(["top-1"] if accurate else [])]
    columns += [f"k={k}" for k in args.shots] if low_shot else []
    rows: list[list[Cell]] = []
    for layer, found in svm.items():
        figures = [found.mean_ap] + ([found.top1] if found.top1 is not None else [])
        cells = [layer, *(f"{100 * figure:.2f}" for figure in figures)]
        rows.append([f"**{cell}**" for cell in cells] if layer == best else [*cells])
        if layer in low_shot:
            few = zip(low_shot[layer].mean_ap, low_shot[layer].deviation, strict=True)
            rows[-1] += [f"{100 * mean:.2f} ± {100 * deviation:.2f}" for mean, deviation in few]
    rows.append(["chance", f"{100 * chance:.2f}"])
    if counts == VOC07 and set(classes) == set(voc.CLASSES):
        published = [PUBLISHED_LOW_SHOT.get(k) for k in args.shots] if low_shot else []
        rows.append([PUBLISHED, PUBLISHED_SVM, *published])
    rows = [row + [None] * (len(columns) - len(row)) for row in rows]
    title = (
        f"Linear SVMs on {facts.model} with {facts.start}, {args.data.name}, {len(classes)} "
        f"classes: mAP in %{', and accuracy' if accurate else ''}"
    )
    if low_shot:
        title += f"; k labels a class: mean and deviation of {args.samplings} samplings"
    more = {
        "classes": classes,
        "best": best,
        "chance": chance,
        "svm": {layer: plain(found) for layer, found in svm.items()},
        "low_shot": {layer: plain(found) for layer, found in low_shot.items()},
    }
    write_results(args, title, columns, rows, facts, more)


def one_hot(labels: np.ndarray) -> np.ndarray:
    return labels if labels.ndim == 2 else labels[:, None] == np.arange(labels.max() + 1)


def plain(found: SVMResult | LowShotResult) -> dict[str, Any]:
    fields = asdict(found).items()
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in fields}


def find_stages(net: nn.Module) -> dict[str, str]:
    try:
        return dict(resnet_stages(net))
    except ValueError:  # no ResNet
        return {}


def check(args: argparse.Namespace, layers: list[str], stages: dict[str, str]) -> None:
    """Before images are read."""
    known = [*stages, "pooled"]
    for layer in layers:
        if layer not in known:
            fail(f"--layers {layer}: {args.model} has {', '.join(known)}.")
    if args.low_shot not in (*layers, "best", "all", "none"):
        fail(f"--low-shot {args.low_shot}; expected best, all, none or one of {', '.join(layers)}.")
    names = ("costs", "folds", "shots", "samplings", "positive_weight", "tol", "max_iter")
    for name in (*names, "train_images", "test_images"):
        value = getattr(args, name)
        if value is not None and np.min(value) <= 0:
            fail(f"--{name.replace('_', '-')} {np.min(value)}; expected positive numbers.")
    if args.folds < 2 or args.jobs == 0:
        fail(f"--folds {args.folds} --jobs {args.jobs}; expected at least 2 folds, and no 0 jobs.")


# Images and labels ------------------------------------------------------------------------------


def transform(framing: str, facts: Facts, whole: bool) -> Transform:
    """Short edge to 256, then all of it to 224 x 224 whatever its shape, both bilinear.

    As FAIR's "scale" and "global_resize" (voc07/resnet50_jigsaw_extract_features.yaml) and
    MMSelfSup's ResizeEdge and mmcv's Resize (svm_voc07.py); theirs are OpenCV's, without
    antialiasing. "centre": the 224 x 224 in the middle of them instead. `whole`: images of one
    size, such as CIFAR's, go to theirs directly.
    """
    size = facts.image_size
    if framing == "centre":
        return evaluation_transform(facts, whole, bilinear=True)
    first = [] if whole else [v2.Resize(round(size / CENTRE))]
    return v2.Compose([*first, v2.Resize((size, size)), *as_tensor(facts)])


@dataclass
class VOCImages(Dataset[tuple[Tensor, Tensor]]):
    """Images with labels (C,): 1 present, 0 not, -1 present as difficult objects alone."""

    folder: Path
    names: list[str]
    labels: np.ndarray  # (N, C) int8
    transform: Transform

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path = self.folder / "JPEGImages" / f"{self.names[index]}.jpg"
        try:
            image = Image.open(path).convert("RGB")
        except OSError as error:
            raise RuntimeError(f"{path} cannot be read: {error}") from error
        return self.transform(image), torch.from_numpy(self.labels[index])


def open_classes(
    data: tuple[Chosen, Chosen], counts: tuple[int | None, int | None], seed: int, view: View
) -> tuple[Labelled, Labelled, list[str]]:
    """Training and test images of one class each, at most `counts` of them, and the classes."""
    train, test = (
        Labelled(source, view(source.size is not None), indices[draw(len(indices), count, seed)])
        for (source, indices), count in zip(data, counts, strict=True)
    )
    return train, test, [str(c) for c in range(max(train.labels.max(), test.labels.max()) + 1)]


def open_voc(
    folder: Path, splits: tuple[str, str], wanted: list[str] | None,
    counts: tuple[int | None, int | None], seed: int, view: View,
) -> tuple[VOCImages, VOCImages, list[str]]:  # fmt: skip
    """The same of the lists `splits` of a VOC folder, of the `wanted` classes or of all."""
    names = [read_names(folder, split) for split in splits]
    tables = [class_lists(folder, split) for split in splits]
    if not all(tables):
        tables = [annotated(folder, part) for part in names]
    classes = sorted(set(tables[0]) | set(tables[1]))
    wanted = wanted or classes
    for name in wanted:
        if any(name not in table for table in tables):
            fail(f"{folder} has no class {name} in both {' and '.join(splits)}; it has "
                 f"{', '.join(classes)}.")  # fmt: skip
    parts = []
    for all_names, table, count in zip(names, tables, counts, strict=True):
        part = [all_names[i] for i in draw(len(all_names), count, seed)]
        # What a list leaves out is ignored, as in create_voc_data_files.py.
        marks = [[table[c].get(name, -1) for c in wanted] for name in part]
        parts.append(VOCImages(folder, part, np.array(marks, np.int8), view(False)))
    return parts[0], parts[1], wanted


def draw(total: int, count: int | None, seed: int) -> np.ndarray:
    """Which `count` of `total` images, all if None, in their order."""
    return np.sort(np.random.default_rng(seed).permutation(total)[:count])


def read_names(folder: Path, split: str) -> list[str]:
    path = folder / "ImageSets" / "Main" / f"{split}.txt"
    there = sorted(p.stem for p in path.parent.glob("*.txt") if "_" not in p.stem)
    return voc.read_list(path, f"not there; the splits are {', '.join(there) or 'missing'}. "
                         "Choose by --train-split and --test-split.")  # fmt: skip


def class_lists(folder: Path, split: str) -> dict[str, dict[str, int]]:
    """Of each CLASS_SPLIT.txt the label of every image, from PASCAL's 1, -1 and 0 (difficult)."""
    code = {"1": 1, "-1": 0, "0": -1}
    tables = {}
    for path in sorted((folder / "ImageSets" / "Main").glob(f"*_{split}.txt")):
        lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
        if any(len(line) != 2 or line[1] not in code for line in lines):
            fail(f"{path} has lines other than an image's name and 1, -1 or 0.")
        tables[path.stem.removesuffix(f"_{split}")] = {name: code[mark] for name, mark in lines}
    return tables


def annotated(folder: Path, names: list[str]) -> dict[str, dict[str, int]]:
    """The same from the objects in the annotations; ignored: all of a class are difficult."""
    tables: dict[str, dict[str, int]] = {}
    for name in names:
        root = voc.read_annotation(folder / "Annotations" / f"{name}.xml")
        for label, difficult, _ in voc.objects_of(root):
            table = tables.setdefault(label, dict.fromkeys(names, 0))
            table[name] = 1 if not difficult or table[name] == 1 else -1
    return tables


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_: f"{message}\n"  # without the line of code
    launch(main)
