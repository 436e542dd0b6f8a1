"""Fine-tune a ResNet for segmentation, by the protocols that BYOL's published figures come from:

    torchrun --nproc-per-node=4 examples/finetune_segmentation.py --protocol voc12aug \\
        --data VOCdevkit/VOC2012 --checkpoint runs/pretrain/backbone.safetensors
    torchrun --nproc-per-node=4 examples/finetune_segmentation.py --protocol cityscapes --data CITY

MMSegmentation's FCN around a torchvision or timm ResNet dilated to stride 8, on one's own masks
too: see masks.open_masks. The loop is parts/finetuning.py's. Every batch norm is synchronised over
the GPUs. Of MMSegmentation's colour distortion the saturation is changed by blending with grey
instead of in HSV; all else follows it.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parts import openmp  # noqa: F401, before torch

# isort: split

import numpy as np
import torch
import torch.nn.functional as F
from parts.backbone import Facts, open_backbone
from parts.finetuning import Figures, check_shares, fine_tune, one_by_one, save_rows
from parts.flags import flag, parse_protocol, protocol_parser, set_up
from parts.machine import Machine
from parts.masks import IGNORED, Masked, open_masks
from parts.processes import fail, launch, leave_processes, rank, summed, tell, world_size
from parts.published import VOC12AUG as VOC12AUG_DATA
from parts.tables import Cell, write_results
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

PICTURES = 6  # images of OUTPUT/predictions.png
CROP_ATTEMPTS = 10  # mmseg/datasets/transforms/transforms.py, RandomCrop


@dataclass(frozen=True)
class SegmentationProtocol:
    """How a network is trained and tested."""

    iterations: int = flag("steps [MMSegmentation's schedule_20k.py, schedule_40k.py]")
    batch_size: int = flag("images of a step, over all processes [fcn_r50-d8_4xb4-20k_voc12aug-"
                           "512x512.py, fcn_r50-d8_4xb2-40k_cityscapes-769x769.py]")  # fmt: skip
    lr: float = flag("at the start, whatever the batch [schedule_20k.py, schedule_40k.py]")
    min_lr: float = flag("at the end [the same]")
    power: float = flag("of the rate's polynomial [the same]")
    momentum: float = flag("of SGD [the same]")
    weight_decay: float = flag("of all parameters [the same]")
    image_size: int = flag("side of the training crops in pixels [pascal_voc12.py, "
                           "cityscapes_769x769.py]")  # fmt: skip
    short_edge: int = flag("of the images, before the random scale and in testing [the same]")
    long_edge: int = flag("at most, scaled likewise [the same]")
    min_scale: float = flag("of the random scale [the same]")
    max_scale: float = flag("of the random scale [the same]")
    max_share: float = flag("of one class in a crop, tried for ten times [the same]")
    distort: bool = flag("brightness, contrast, saturation and hue [the same]")
    aux_weight: float = flag("of the loss of the head on stage 3 [fcn_r50-d8.py]")
    dropout: float = flag("of channels before the classifier [the same]")
    align_corners: bool = flag("how maps are enlarged [the same]")
    window: int = flag("of sliding inference in pixels, 0 for whole images [the same]")
    stride: int = flag("of the window [the same]")


VOC12AUG = SegmentationProtocol(
    iterations=20_000, batch_size=16, lr=0.01, min_lr=1e-4, power=0.9, momentum=0.9,
    weight_decay=5e-4, image_size=512, short_edge=512, long_edge=2048, min_scale=0.5,
    max_scale=2.0, max_share=0.75, distort=True, aux_weight=0.4, dropout=0.1, align_corners=False,
    window=0, stride=0,
)  # fmt: skip
CITYSCAPES = replace(
    VOC12AUG, iterations=40_000, batch_size=8, image_size=769, short_edge=1025, long_edge=2049,
    align_corners=True, window=769, stride=513,
)  # fmt: skip
PROTOCOLS = {"voc12aug": VOC12AUG, "cityscapes": CITYSCAPES}
# MMSelfSup's configs/selfsup/byol/README.md, byol_resnet50_8xb32-accum16-coslr-200e.
PUBLISHED: list[Cell] = [
    "published: BYOL, ResNet-50, 200 epochs, on VOC12aug (MMSelfSup)", 20_000, 67.16, None, None,
]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args, protocol = parse_arguments(argv)
    machine = set_up(args)
    check_shares(protocol.batch_size)
    if world_size() == 1 and protocol.batch_size < 2:
        fail("--batch-size 1: batch norm needs 2 images or more.")
    train, test = open_masks(args.data, args.classes, args.ignore_index, not args.without_sbd)
    # timm and torchvision dilate the first block of a stage as the stage before it, as
    # MMSegmentation's contract_dilation does.
    dilated = {"replace_stride_with_dilation": [False, True, True]}
    options = dilated if args.model.startswith("torchvision/") else {"output_stride": 8}
    backbone, facts = open_backbone(args, **options)
    net = Segmenter(backbone, len(train.classes), args.model, protocol)
    tell(f"{len(train.pairs)} images to train on, {len(test.pairs)} to test on, classes: "
         f"{', '.join(train.classes)}")  # fmt: skip
    history = fine_tune(
        net, Crops(train, facts, protocol, args.seed), batch_of,
        lambda step: learning_rate(step, protocol),
        lambda: evaluate(net, test, facts, protocol, machine, args.output), protocol, machine, args,
    )  # fmt: skip
    if rank() == 0:
        report(history, train, test, facts, protocol, args)
    leave_processes()


def learning_rate(step: int, protocol: SegmentationProtocol) -> float:
    """A polynomial from lr to min_lr."""
    rest = (1 - step / protocol.iterations) ** protocol.power
    return float(protocol.min_lr + (protocol.lr - protocol.min_lr) * rest)


def batch_of(samples: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [torch.stack(each) for each in zip(*samples, strict=True)]


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, SegmentationProtocol]:
    parser = protocol_parser("Fine-tune a ResNet for segmentation.", PROTOCOLS)
    parser.add_argument("--ignore-index", type=int, default=IGNORED,
                        help="in the masks of a folder: pixels without a class (default: 255)",
                        )  # fmt: skip
    parser.add_argument("--without-sbd", action="store_true",
                        help="of VOC2012: train on its own 1,464 masks alone")  # fmt: skip
    args, protocol = parse_protocol(parser, PROTOCOLS, argv)
    for name in ("short_edge", "long_edge", "min_scale", "lr"):
        if getattr(protocol, name) <= 0:
            fail(f"--{name.replace('_', '-')} {getattr(protocol, name)}; expected more than 0.")
    if protocol.max_scale < protocol.min_scale:
        fail(f"--max-scale {protocol.max_scale} is below --min-scale {protocol.min_scale}.")
    if protocol.window and not 0 < protocol.stride <= protocol.window:
        fail(f"--stride {protocol.stride}; expected 1 to --window {protocol.window}.")
    vars(args).update(vars(protocol))  # what the flags came to
    return args, protocol


# Training images --------------------------------------------------------------------------------


@dataclass
class Crops(Dataset[Any]):
    """(3, size, size) float32, normalised, and (size, size) int64; as MMSegmentation crops."""

    part: Masked
    facts: Facts
    protocol: SegmentationProtocol
    seed: int

    def __len__(self) -> int:
        return len(self.part.pairs)

    def __getitem__(self, request: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, number = map(int, request)
        how, rng = self.protocol, np.random.default_rng((self.seed, epoch, number))
        image, mask = self.part.read(number)
        scale = rng.uniform(how.min_scale, how.max_scale)
        size = fitted(image.shape[1:], how.short_edge * scale, how.long_edge * scale)
        image, mask = resized(image, size), F.interpolate(mask[None, None], size)[0, 0]
        place = choose_crop(mask, how.image_size, how.max_share, rng)
        image, mask = image[:, *place], mask[place]
        if rng.random() < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        if how.distort:
            image = distorted(image, rng)
        image = TF.normalize(image, self.facts.mean, self.facts.std)
        missing = [0, how.image_size - mask.shape[1], 0, how.image_size - mask.shape[0]]
        return F.pad(image, missing), F.pad(mask, missing, value=IGNORED).long()


def fitted(shape: Any, short_edge: float, long_edge: float) -> tuple[int, int]:
    """The largest height and width of the same shape within both edges."""
    scale = min(short_edge / min(shape), long_edge / max(shape))
    height, width = (max(1, int(side * scale + 0.5)) for side in shape)
    return height, width


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(image[None], size, mode="bilinear")[0]  # not antialiased, as OpenCV's


def choose_crop(
    mask: Tensor, size: int, max_share: float, rng: np.random.Generator
) -> tuple[slice, slice]:
    """A random place where no class has more than its share of the pixels, if one is found."""
    for _ in range(CROP_ATTEMPTS):
        top, left = (int(rng.integers(max(side - size, 0) + 1)) for side in mask.shape)
        place = slice(top, top + size), slice(left, left + size)
        counts = torch.bincount(mask[place].flatten(), minlength=IGNORED + 1)[:IGNORED]
        if (counts > 0).sum() > 1 and counts.max() < max_share * counts.sum():
            break
    return place


def distorted(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Each with probability 0.5: brightness by up to 32 of 255 added, contrast as a factor of 0.5
    to 1.5, before or after saturation by 0.5 to 1.5 and hue by up to 18 of 180 (MMSegmentation's
    PhotoMetricDistortion)."""

    def contrast(image: Tensor) -> Tensor:
        return (image * rng.uniform(0.5, 1.5)).clamp(0, 1)

    def maybe(change: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
        return change(image) if rng.random() < 0.5 else image

    image = maybe(lambda x: (x + rng.uniform(-32, 32) / 255).clamp(0, 1), image)
    contrast_first = rng.random() < 0.5
    if contrast_first:
        image = maybe(contrast, image)
    image = maybe(lambda x: TF.adjust_saturation(x, rng.uniform(0.5, 1.5)), image)
    image = maybe(lambda x: TF.adjust_hue(x, rng.uniform(-0.1, 0.1)), image)
    return image if contrast_first else maybe(contrast, image)


# The network ------------------------------------------------------------------------------------


class Segmenter(nn.Module):
    """Losses from (images, masks), logits (B, classes, H, W) from images alone."""

    def __init__(
        self, net: nn.Module, classes: int, model: str, protocol: SegmentationProtocol
    ) -> None:
        super().__init__()
        missing = [name for name in ("layer3", "layer4") if not hasattr(net, name)]
        if missing:
            fail(f"--model {model} has no {', '.join(missing)}; expected a ResNet of timm or "
                 "torchvision.")  # fmt: skip
        self.body = IntermediateLayerGetter(net, {"layer3": "aux", "layer4": "out"})
        device = next(net.parameters()).device
        with torch.no_grad():
            maps = self.body.eval()(torch.zeros(1, 3, 64, 64, device=device))
        # MMSegmentation's fcn_r50-d8.py: 512 and 256 channels for ResNet-50's 2048 and 1024.
        out, aux = (maps[name].shape[1] for name in ("out", "aux"))
        self.head = FCNHead(out, out // 4, classes, protocol.dropout, convolutions=2, concat=True)
        self.aux = FCNHead(aux, aux // 4, classes, protocol.dropout, convolutions=1, concat=False)
        self.aux_weight, self.align_corners = protocol.aux_weight, protocol.align_corners

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Any:
        maps = self.body(images)
        if masks is None:
            return self.enlarged(self.head(maps["out"]), images)
        losses = [
            # Over all pixels, ignored ones included: avg_non_ignore=False in the original.
            F.cross_entropy(self.enlarged(head(x), images).float(), masks, ignore_index=IGNORED,
                            reduction="none").mean()
            for head, x in ((self.head, maps["out"]), (self.aux, maps["aux"]))
        ]  # fmt: skip
        return {"loss_segmentation": losses[0], "loss_aux": self.aux_weight * losses[1]}

    def enlarged(self, logits: Tensor, images: Tensor) -> Tensor:
        return enlarged(logits, images.shape[2:], self.align_corners)


class FCNHead(nn.Module):
    """MMSegmentation's: 3 x 3 convolutions, one more on their output beside the input, dropout of
    channels, classifier."""

    def __init__(
        self, inputs: int, channels: int, classes: int, dropout: float, convolutions: int,
        concat: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = [inputs, *[channels] * convolutions]
        self.convolutions = nn.Sequential(*map(convolution, sizes[:-1], sizes[1:]))
        self.concat = convolution(inputs + channels, channels) if concat else None
        last = nn.Conv2d(channels, classes, 1)
        nn.init.normal_(last.weight, std=0.01)
        nn.init.zeros_(last.bias)
        self.classifier = nn.Sequential(nn.Dropout2d(dropout), last)

    def forward(self, x: Tensor) -> Tensor:
        features = self.convolutions(x)
        if self.concat is not None:
            features = self.concat(torch.cat([x, features], dim=1))
        return self.classifier(features)


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", mode="fan_out")
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def enlarged(logits: Tensor, size: Any, align_corners: bool) -> Tensor:
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=align_corners)


# Testing ----------------------------------------------------------------------------------------


@dataclass
class WholeImages(Dataset[Any]):
    """The image at the size to look at (3, h, w), normalised; and its mask (H, W)."""

    part: Masked
    facts: Facts
    protocol: SegmentationProtocol

    def __len__(self) -> int:
        return len(self.part.pairs)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        image, mask = self.part.read(number)
        size = fitted(image.shape[1:], self.protocol.short_edge, self.protocol.long_edge)
        return TF.normalize(resized(image, size), self.facts.mean, self.facts.std), mask


def evaluate(
    net: nn.Module, test: Masked, facts: Facts, protocol: SegmentationProtocol, machine: Machine,
    output: Path,
) -> Figures:  # fmt: skip
    """mIoU, mean accuracy and pixel accuracy in percent; and OUTPUT/predictions.png."""
    counts = torch.zeros(len(test.classes), len(test.classes), dtype=torch.long)
    shown: list[Tensor] = []
    loader = one_by_one(WholeImages(test, facts, protocol), machine)
    bar = tqdm(loader, "test", leave=False, disable=None if rank() == 0 else True)
    for number, (image, mask) in enumerate(bar):
        with machine.autocast():
            logits = predict(net, image[None].to(machine.device), protocol.window, protocol.stride)
        found = enlarged(logits.float(), mask.shape, protocol.align_corners)[0].argmax(dim=0).cpu()
        counts += confusion(found, mask, len(test.classes))
        if number % -(-len(loader) // PICTURES) == 0:
            shown.append(side_by_side(image, mask, found, facts))
    if rank() == 0:
        save_rows(shown, output / "predictions.png")
    return scores(summed(counts.to(machine.device)).cpu(), test.classes)


def predict(net: nn.Module, images: Tensor, window: int, stride: int) -> Tensor:
    """Logits (B, classes, h, w): the mean over overlapping windows, or with 0 of whole images."""
    height, width = images.shape[2:]
    if not window or max(height, width) <= window:
        return net(images)
    total: Any = 0
    seen = torch.zeros(1, 1, height, width, device=images.device)
    for top in window_starts(height, window, stride):
        for left in window_starts(width, window, stride):
            place = (..., slice(top, top + window), slice(left, left + window))
            logits = net(images[place])
            if isinstance(total, int):
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[place] += logits
            seen[place] += 1
    return total / seen


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """The last window ends at the edge."""
    last = max(side - window, 0)
    return [min(start, last) for start in range(0, last + stride, stride)]


def confusion(found: Tensor, truth: Tensor, classes: int) -> Tensor:
    """(classes, classes) counts of pixels: row the true class, column the found one."""
    known = truth != IGNORED
    cells = truth[known].long() * classes + found[known]
    return torch.bincount(cells, minlength=classes**2).reshape(classes, classes)


def scores(counts: Tensor, classes: list[str]) -> Figures:
    """In percent; the means are over the classes that occur, as MMSegmentation's."""
    right, true, found = counts.diag().double(), counts.sum(dim=1), counts.sum(dim=0)
    iou = 100 * right / (true + found - right)
    accuracy = 100 * right / true
    figures = {"mIoU": iou.nanmean().item(), "mAcc": accuracy.nanmean().item(),
               "aAcc": (100 * right.sum() / true.sum()).item()}  # fmt: skip
    each = zip(classes, iou.tolist(), strict=True)
    return figures | {f"IoU of {name}": value for name, value in each if value == value}


def side_by_side(image: Tensor, mask: Tensor, found: Tensor, facts: Facts) -> Tensor:
    """(3, H, 3 W): the image, the true classes and those found, black where there is no class."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (facts.mean, facts.std))
    whole = resized((image * std + mean).clamp(0, 1), tuple(mask.shape))
    found = torch.where(mask == IGNORED, mask, found)
    colours = torch.from_numpy(palette()).float() / 255
    return torch.cat([whole, *(colours[m.long()].permute(2, 0, 1) for m in (mask, found))], dim=2)


def palette() -> np.ndarray:
    """(256, 3) uint8: colours far apart, the bits of a number spread over red, green and blue as
    in VOC's, but without its black; the last one is black, for pixels without a class."""
    number = np.arange(1, 257)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((number >> (3 * bit + channel)) & 1) << (7 - bit)).astype("u1")
    colours[IGNORED] = 0
    return colours


def report(
    history: list[Figures], train: Masked, test: Masked, facts: Facts,
    protocol: SegmentationProtocol, args: argparse.Namespace,
) -> None:  # fmt: skip
    figures = history[-1]
    own: list[Cell] = [f"{facts.model}, {facts.start}", protocol.iterations]
    rows = [[*own, *(figures[name] for name in ("mIoU", "mAcc", "aAcc"))]]
    if (len(train.pairs), len(test.pairs), len(test.classes)) == VOC12AUG_DATA:
        rows.append(PUBLISHED)
    more = {"history": history, "classes": test.classes, "test images": len(test.pairs)}
    columns = ["backbone", "steps", "mIoU", "mAcc", "aAcc"]
    write_results(args, "Segmentation, FCN d8, in %", columns, rows, facts, more)


if __name__ == "__main__":
    launch(main)
