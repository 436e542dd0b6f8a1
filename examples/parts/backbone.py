"""A backbone by its name in timm or torchvision, and the weights that it starts from."""

import argparse
import shlex
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from byol_pytorch.checkpoint import facts as facts_of
from byol_pytorch.checkpoint import load_backbone
from parts.processes import fail, tell


def timm_model(
    name: str, image_size: int | None, options: dict[str, Any], pretrained: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """timm's model, and what timm.create_model took beside the name.

    `options` are the constructor's; without num_classes it has no classifier. `image_size` is for
    models that are built for one size; others do not use it.
    """
    options = {"num_classes": 0, **options}
    sized = options | ({"img_size": image_size} if image_size else {})
    try:  # vision transformers have to know
        return timm.create_model(name, pretrained, **sized), sized
    except TypeError:
        return timm.create_model(name, pretrained, **options), options


def fill_in_model(args: argparse.Namespace, checkpoint: str | None) -> None:
    """--model and --model-args, where they are not given, as the checkpoint's file has them."""
    known: dict[str, Any] = {}
    if checkpoint and checkpoint != "timm":
        with suppress(OSError, ValueError):  # open_backbone names it
            known = facts_of(checkpoint)
    architecture = known.get("architecture")
    if args.model is None and architecture:
        tell(f"--model {architecture}, as {checkpoint} says")
    args.model = args.model or architecture or "resnet50"
    if args.model_args is None:
        args.model_args = known.get("model_args", {}) if args.model == architecture else {}


def what_next(weights: Path, data: str, labelled: bool, flags: str = "") -> str:
    """Commands, ready to paste, for a backbone in a file that says how it is built."""
    programs = {"embed": "which images look alike"}
    if labelled:
        programs |= {
            "evaluate_knn": "how often the nearest neighbours have an image's label",
            "evaluate_linear": "a linear head on the frozen backbone",
            "finetune_classification": "all of it fine-tuned",
        }
    given = f"--data {data} --checkpoint {shlex.quote(str(weights))}{flags}"
    folder = Path(__file__).parents[1]
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    extra = {"evaluate_linear": " --cached"}
    return "\n".join(
        f"    python {shlex.quote(str(folder / name))}.py {given}{extra.get(name, '')}  # {what}"
        for name, what in programs.items()
    )


def shrink_stem(net: nn.Module) -> None:
    """Give a ResNet the first layers for 32 px: 3x3, stride 1, no max-pool."""
    if not isinstance(getattr(net, "conv1", None), nn.Conv2d):
        raise ValueError("--small-stem is for ResNets that begin with one convolution, conv1")
    width = net.conv1.out_channels
    net.conv1, net.maxpool = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.Identity()


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
        net, _ = timm_model(name, image_size, options, pretrained)
    elif pretrained:
        raise ValueError("--checkpoint timm goes with timm's models alone.")
    else:
        net = torchvision.models.get_model(name.removeprefix("torchvision/"), **options)
    if small_stem:
        shrink_stem(net)
    return net
