"""What the evaluation scripts share: flags, the backbone, labelled images, and where results go.

The measures are byol_pytorch.evaluation's, the reading of files pretrain_data.py's.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from backbone import shrink_stem, timm_model
from PIL import Image
from pretrain_data import CENTRE, Source, fail, open_data, open_image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from byol_pytorch.checkpoint import load_backbone, replacing

Transform = Callable[[Any], Tensor]
Cell = str | float | None  # of a table: None is a figure that does not exist
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HELD_OUT = 5  # of every so many images of a class one is tested on, where there is no test set


# Flags ------------------------------------------------------------------------------------------


def common_flags(parser: argparse.ArgumentParser, batch_size: int = 256) -> None:
    add = parser.add_argument
    add("--data", type=Path, required=True, help="a folder; what it may hold is in the README")
    add("--model", default="resnet50", help="a timm model, or torchvision/NAME")
    add("--model-args", type=json.loads, default={}, help="JSON, for the model's constructor")
    add("--small-stem", action="store_true", help="a ResNet's first layers for 32 px")
    add("--checkpoint", help="a file for checkpoint.load_backbone, or timm; none: random weights")
    add("--padding", choices=("same", "torch"), help="for DeepMind's weights, which need same")
    add("--output", type=Path, default=Path("runs") / Path(sys.argv[0]).stem, help="a folder")
    add("--json", type=Path, help="where the figures go (default: OUTPUT/results.json)")
    add("--image-size", type=int, help="pixels (default: the checkpoint's or the model's)")
    add("--batch-size", type=int, default=batch_size, help="images of one forward pass")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=DTYPES, default="fp32", help="of the backbone's forward pass")
    add("--seed", type=int, default=0)


def check_common(args: argparse.Namespace) -> None:
    """End the script where the flags cannot work, and make the folder for its results."""
    for name, least in (("batch_size", 1), ("workers", 0), ("image_size", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            fail(f"--{name.replace('_', '-')} {value}; expected at least {least}.")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}")
    args.output.mkdir(parents=True, exist_ok=True)


# The backbone -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What the backbone is, and what it expects of an image in [0, 1]."""

    model: str
    start: str  # where its weights come from
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    image_size: int = 224


def open_backbone(args: argparse.Namespace, **options: Any) -> tuple[nn.Module, Facts]:
    """The network on the device, and its facts; `options` go to the model's constructor.

    Random weights follow --seed. Ends the script where the checkpoint does not fit the model.
    """
    torch.manual_seed(args.seed)
    pretrained = args.checkpoint == "timm"
    facts = Facts(args.model, "timm's weights" if pretrained else "random weights")
    try:
        net = build(args.model, args.image_size, pretrained, args.small_stem,
                    args.model_args | options)  # fmt: skip
        config = getattr(net, "pretrained_cfg", None) or {}
        facts = replace(facts, image_size=config.get("input_size", (3, 224, 224))[-1])
        if pretrained:
            facts = replace(facts, mean=tuple(config["mean"]), std=tuple(config["std"]))
        elif args.checkpoint:
            report = load_backbone(args.checkpoint, net, padding=args.padding)
            known = {"mean": report.mean, "std": report.std}
            known["image_size"] = report.image_size and max(report.image_size)
            facts = replace(facts, start=Path(args.checkpoint).name)
            facts = replace(facts, **{name: value for name, value in known.items() if value})
            tell(f"{args.checkpoint} ({report.source}): {len(report.loaded)} tensors loaded, of "
                 f"them {len(report.renamed)} renamed, {len(report.missing)} of the network kept, "
                 f"{len(report.unexpected)} not used")  # fmt: skip
    except (ValueError, TypeError, RuntimeError, AttributeError, AssertionError, OSError) as error:
        fail(f"--model {args.model}, --checkpoint {args.checkpoint}: {error}")
    if args.image_size:
        facts = replace(facts, image_size=args.image_size)
    tell(f"{facts.model} with {facts.start}, {facts.image_size} px")
    return net.to(args.device), facts


def build(
    name: str, image_size: int | None, pretrained: bool, small_stem: bool, options: dict[str, Any]
) -> nn.Module:
    """timm's model `name`, without a classifier unless num_classes says so, or torchvision's."""
    if not name.startswith("torchvision/"):
        net = timm_model(name, image_size, {"pretrained": pretrained, **options})
    elif pretrained:
        raise ValueError("--checkpoint timm goes with timm's models alone.")
    else:
        net = torchvision.models.get_model(name.removeprefix("torchvision/"), **options)
    if small_stem:
        shrink_stem(net)
    return net


# Labelled images --------------------------------------------------------------------------------


@dataclass
class Labelled(Dataset[tuple[Tensor, int]]):
    """Images as `transform` makes them of a PIL image, with their labels."""

    source: Source
    transform: Transform
    indices: np.ndarray | None = None  # which images, all if None

    def __post_init__(self) -> None:
        if self.indices is None:
            self.indices = np.arange(len(self.source))

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64."""
        return self.source.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        index = int(self.indices[number])
        try:
            image = picture(self.source, index)
        except (OSError, ValueError) as error:
            raise RuntimeError(f"{self.source.name(index)} cannot be read: {error}") from error
        return self.transform(image), int(self.source.labels[index])


def open_labelled(folder: Path) -> tuple[tuple[Source, np.ndarray], tuple[Source, np.ndarray]]:
    """Training and test images: each a source and the numbers of its images.

    What pretrain_data.open_data reads, with labels. Without a test set every fifth image of a
    class is tested on, and left out of training.
    """
    train, test = open_data(folder)
    some = test is not None and (train.labels >= 0).any()  # as STL-10: training leaves others out
    for source in [source for source in (None if some else train, test) if source]:
        without = np.flatnonzero(source.labels < 0)
        if len(without):
            fail(f"--data {folder}: {len(without)} of {len(source)} images have no label, the "
                 f"first is {source.name(int(without[0]))}. Expected one folder for each class, "
                 "or a labelled data set.")  # fmt: skip
    known = np.flatnonzero(train.labels >= 0)
    if test is not None:
        return (train, known), (test, np.arange(len(test)))
    held_out = np.zeros(len(train), dtype=bool)
    for label in np.unique(train.labels[known]):
        held_out[np.flatnonzero(train.labels == label)[HELD_OUT - 1 :: HELD_OUT]] = True
    tell(f"no test set in {folder}: every {HELD_OUT}th image of a class is tested on")
    if not held_out.any():
        fail(f"--data {folder} has no class of {HELD_OUT} images to test on. Give train/ and val/.")
    return (train, np.flatnonzero(~held_out)), (train, np.flatnonzero(held_out))


def evaluation_transform(facts: Facts, part: float = CENTRE) -> Transform:
    """The central square over `part` of the short edge: at 224 px of a short edge of 256."""
    return v2.Compose([
        v2.Resize(round(facts.image_size / part), interpolation=v2.InterpolationMode.BICUBIC),
        v2.CenterCrop(facts.image_size),
        *as_tensor(facts),
    ])  # fmt: skip


def training_transform(facts: Facts) -> Transform:
    """Random resized crop and flip."""
    crop = v2.RandomResizedCrop(facts.image_size, interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), *as_tensor(facts)])


def as_tensor(facts: Facts) -> list[Transform]:
    """A PIL image to (3, H, W) float32, normalised as the backbone expects."""
    to_float = v2.ToDtype(torch.float32, scale=True)
    return [v2.ToImage(), to_float, v2.Normalize(facts.mean, facts.std)]


def evaluation_images(part: tuple[Source, np.ndarray], facts: Facts) -> Labelled:
    """For features: images of one size, such as CIFAR's, are seen whole."""
    source, indices = part
    whole = source.size is not None
    return Labelled(source, evaluation_transform(facts, 1.0 if whole else CENTRE), indices)


def image_loader(
    dataset: Dataset[Any], args: argparse.Namespace, shuffle: bool = False, **options: Any
) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        args.batch_size,
        shuffle=shuffle,
        num_workers=args.workers,
        pin_memory=torch.device(args.device).type == "cuda",
        persistent_workers=args.workers > 0,
        **options,
    )


def picture(source: Source, index: int) -> Image.Image:
    """RGB; raises OSError or ValueError where the image cannot be read."""
    data = source.read(index)
    if isinstance(data, bytes):
        return open_image(data).convert("RGB")
    return Image.fromarray(data.permute(1, 2, 0).numpy())


# Results ----------------------------------------------------------------------------------------


def write_results(
    args: argparse.Namespace,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    facts: Facts | None = None,
    more: dict[str, Any] | None = None,
) -> None:
    """Print the table; write it to OUTPUT/results.md, and with the flags to the JSON file."""
    table = "\n".join([f"**{title}**", "", markdown(columns, rows)])
    flags = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    content = {"title": title, "columns": list(columns), "rows": [list(row) for row in rows]}
    content |= {"backbone": asdict(facts) if facts else None, "flags": flags, **(more or {})}
    write_whole(args.output / "results.md", table + "\n")
    write_whole(args.json or args.output / "results.json", json.dumps(content, indent=1) + "\n")
    tell(f"\n{table}\n")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    def line(cells: Sequence[Cell]) -> str:
        shown = ("" if c is None else f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells)
        return f"| {' | '.join(shown)} |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, rows)])


def write_whole(path: Path, text: str) -> None:
    """Write `text` such that the old or the new file is there at every moment."""
    with replacing(path) as file:
        file.write(text.encode())


def tell(text: str) -> None:
    """Print on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)
