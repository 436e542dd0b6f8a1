"""Fine-tune a ResNet for segmentation, by the protocols that BYOL's published figures come from:

    torchrun --nproc-per-node=4 examples/finetune_segmentation.py --protocol voc12aug \\
        --data VOCdevkit/VOC2012 --checkpoint runs/pretrain/backbone.safetensors
    torchrun --nproc-per-node=4 examples/finetune_segmentation.py --protocol cityscapes --data CITY

MMSegmentation's FCN around a torchvision or timm ResNet dilated to stride 8, on one's own masks
too: see open_masks. The loop is finetune_loop.py's. Every batch norm is synchronised over the GPUs.
Of MMSegmentation's colour distortion the saturation is changed by blending with grey instead of in
HSV; all else follows it.
"""

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import openmp  # noqa: F401, before torch

# isort: split

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from detection_data import VOC_CLASSES
from evaluation_parts import Cell, Facts, fail, open_backbone, tell, write_results
from finetune_loop import (
    Figures,
    autocast,
    evaluation_loader,
    fine_tune,
    leave_processes,
    parse,
    protocol_parser,
    rank,
    world_size,
)
from PIL import Image
from pretrain_data import ENDINGS, flag, once
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.datasets import Cityscapes
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

IGNORED = 255  # in masks as they are trained on
PICTURES = 6  # images of OUTPUT/predictions.png
CROP_ATTEMPTS = 10  # mmseg/datasets/transforms/transforms.py, RandomCrop


@dataclass(frozen=True)
class Protocol:
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


VOC12AUG = Protocol(
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
    args = parse_arguments(argv)
    train, test = open_masks(args.data, args.classes, args.ignore_index)
    # timm and torchvision dilate the first block of a stage as the stage before it, as
    # MMSegmentation's contract_dilation does.
    dilated = {"replace_stride_with_dilation": [False, True, True]}
    options = dilated if args.model.startswith("torchvision/") else {"output_stride": 8}
    backbone, facts = open_backbone(args, **options)
    net = Segmenter(backbone, len(train.classes), args)
    tell(f"{len(train.pairs)} images to train on, {len(test.pairs)} to test on, classes: "
         f"{', '.join(train.classes)}")  # fmt: skip
    history = fine_tune(
        net, Crops(train, facts, args), batch_of, partial(learning_rate, args=args),
        partial(evaluate, net, test, facts, args), args,
    )  # fmt: skip
    if rank() == 0:
        report(history, test, facts, args)
    leave_processes()


def learning_rate(step: int, args: argparse.Namespace) -> float:
    rest = (1 - step / args.iterations) ** args.power
    return float(args.min_lr + (args.lr - args.min_lr) * rest)


def batch_of(samples: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [torch.stack(each) for each in zip(*samples, strict=True)]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = protocol_parser("Fine-tune a ResNet for segmentation.", PROTOCOLS)
    parser.add_argument("--ignore-index", type=int, default=IGNORED,
                        help="in the masks of a folder: pixels without a class (default: 255)",
                        )  # fmt: skip
    args, _ = parse(parser, PROTOCOLS, argv)
    for name in ("short_edge", "long_edge", "min_scale", "lr"):
        if getattr(args, name) <= 0:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}; expected more than 0.")
    if args.max_scale < args.min_scale:
        fail(f"--max-scale {args.max_scale} is below --min-scale {args.min_scale}.")
    if args.window and not 0 < args.stride <= args.window:
        fail(f"--stride {args.stride}; expected 1 to --window {args.window}.")
    if args.batch_size // world_size() < 2 and world_size() == 1:
        fail("--batch-size 1: batch norm needs 2 images or more.")
    return args


# Layouts ----------------------------------------------------------------------------------------


@dataclass
class Masked:
    """Images with masks, as pairs of files, and what the masks' values mean."""

    pairs: list[tuple[Path, Path]]
    classes: list[str]
    meaning: np.ndarray  # (256,) uint8: value in a file to class, or IGNORED

    def read(self, number: int) -> tuple[Tensor, Tensor]:
        """(3, H, W) float32 in [0, 1] and (H, W) uint8."""
        image, mask = self.pairs[number]
        with Image.open(image) as file:
            pixels = TF.to_dtype(TF.pil_to_tensor(file.convert("RGB")), scale=True)
        return pixels, torch.from_numpy(self.meaning[values(mask)])


def open_masks(folder: Path, classes: list[str] | None, ignore_index: int) -> tuple[Masked, Masked]:
    """The images to train and to test on of what `folder` holds.

    VOC2012 (also below VOCdevkit): SegmentationClass of train.txt, and SegmentationClassAug of
    aug.txt, both as MMSegmentation's voc_aug.py leaves them; tested on val.txt. Cityscapes:
    leftImg8bit and gtFine, as torchvision reads them. Else train/images, train/masks and the same
    in val or test: files of equal stems, the masks with the numbers of the classes.
    """
    places = (folder, folder / "VOC2012", folder / "VOCdevkit" / "VOC2012")
    voc = next((p for p in places if (p / "ImageSets" / "Segmentation").is_dir()), None)
    if voc or (folder / "leftImg8bit").is_dir():
        if classes or ignore_index != IGNORED:
            fail("--classes and --ignore-index are for folders of masks: VOC and Cityscapes have "
                 "their own.")  # fmt: skip
        return open_voc(voc) if voc else open_cityscapes(folder)
    test = next((name for name in ("val", "test") if (folder / name / "masks").is_dir()), None)
    if test is None or not (folder / "train" / "masks").is_dir():
        fail(f"--data {folder} is none of VOC2012 (ImageSets/Segmentation), Cityscapes "
             "(leftImg8bit, gtFine) and a folder of train/images, train/masks, val/images and "
             "val/masks. Segmentation needs a mask for each image.")  # fmt: skip
    return open_folder(folder, test, classes, ignore_index)


def open_voc(folder: Path) -> tuple[Masked, Masked]:
    """VOC2012 with SBD's masks, 10,582 images, or without them."""
    lists = {"train": "SegmentationClass", "aug": "SegmentationClassAug"}
    found = {name: masks for name, masks in lists.items()
             if (folder / "ImageSets" / "Segmentation" / f"{name}.txt").is_file()}  # fmt: skip
    if "aug" not in found:
        tell("no aug.txt: without SBD's masks, which the published figure includes")
    train = [pair for name, masks in found.items() for pair in voc_pairs(folder, name, masks)]
    test = voc_pairs(folder, "val", "SegmentationClass")
    classes = ["background", *VOC_CLASSES]
    meaning = meanings(len(classes))
    return Masked(train, classes, meaning), Masked(test, classes, meaning)


def voc_pairs(folder: Path, name: str, masks: str) -> list[tuple[Path, Path]]:
    path = folder / "ImageSets" / "Segmentation" / f"{name}.txt"
    if not path.is_file():
        fail(f"{path} is missing; expected VOC2012's list of images.")
    pairs = [(folder / "JPEGImages" / f"{stem}.jpg", folder / masks / f"{stem}.png")
             for stem in path.read_text().split()]  # fmt: skip
    missing = [str(file) for pair in pairs for file in pair if not file.is_file()]
    if missing or not pairs:
        fail(f"{path} names {len(pairs)} images, and {len(missing)} files of theirs are missing, "
             f"such as {next(iter(missing), 'all')}.")  # fmt: skip
    return pairs


def open_cityscapes(folder: Path) -> tuple[Masked, Masked]:
    meaning = np.full(256, IGNORED, np.uint8)
    named: dict[int, str] = {}
    for kind in Cityscapes.classes:
        if 0 <= kind.train_id < IGNORED:
            meaning[kind.id], named[kind.train_id] = kind.train_id, kind.name
    parts = []
    for split in ("train", "val"):
        try:
            found = Cityscapes(folder, split, mode="fine", target_type="semantic")
        except RuntimeError as error:
            fail(f"--data {folder}: {error}")
        masks = [target[0] for target in found.targets]
        pairs = [(Path(i), Path(m)) for i, m in zip(found.images, masks, strict=True)]
        parts.append(Masked(pairs, [named[i] for i in sorted(named)], meaning))
    return parts[0], parts[1]


def open_folder(
    folder: Path, test: str, classes: list[str] | None, ignore_index: int
) -> tuple[Masked, Masked]:
    """Images and masks of `folder`/train and `folder`/`test`; all masks are looked at."""
    both = [once(partial(folder_pairs, folder / split)) for split in ("train", test)]
    highest = once(lambda: [highest_class(pairs, ignore_index) for pairs in both])
    names = classes or [f"class {i}" for i in range(highest[0][0] + 1)]
    for number, mask in highest:
        if number >= len(names):
            meant = "--classes names" if classes else "the training masks hold"
            fail(f"{mask} holds the class {number}, and {meant} {len(names)}, from 0. Is it a "
                 "number for pixels without a class (--ignore-index)?")  # fmt: skip
    meaning = meanings(len(names))
    meaning[ignore_index] = IGNORED
    return Masked(both[0], names, meaning), Masked(both[1], names, meaning)


def folder_pairs(folder: Path) -> list[tuple[Path, Path]]:
    images, masks = (
        {f.stem: f for f in sorted((folder / name).glob("*")) if f.name.lower().endswith(ENDINGS)}
        for name in ("images", "masks")
    )
    alone = [stem for stem in images if stem not in masks]
    if alone or not images:
        fail(f"{folder}: {len(alone)} of {len(images)} images have no mask of the same stem in "
             f"{folder / 'masks'}, such as {next(iter(alone), 'all')}.")  # fmt: skip
    return [(image, masks[stem]) for stem, image in images.items()]


def highest_class(pairs: list[tuple[Path, Path]], ignore_index: int) -> tuple[int, Path]:
    """The highest class of all masks and a mask that holds it; their sizes are checked too."""

    def highest(pair: tuple[Path, Path]) -> tuple[int, Path]:
        found = values(pair[1])
        with Image.open(pair[0]) as image:
            if image.size != found.shape[::-1]:
                fail(f"{pair[1]} is {found.shape[1]} x {found.shape[0]} pixels, its image "
                     f"{image.size[0]} x {image.size[1]}.")  # fmt: skip
        return int(found[found != ignore_index].max(initial=0)), pair[1]

    with ThreadPoolExecutor(8) as pool:
        return max(pool.map(highest, pairs), key=lambda found: found[0])


def values(mask: Path) -> np.ndarray:
    """(H, W) uint8."""
    try:
        with Image.open(mask) as file:
            pixels = np.array(file)
    except OSError as error:
        fail(f"{mask} cannot be read: {error}")
    if pixels.ndim != 2 or pixels.dtype != np.uint8:
        fail(f"{mask} has pixels of {pixels.dtype} in {file.mode} mode; expected one channel of 8 "
             "bits with the numbers of the classes, not their colours.")  # fmt: skip
    return pixels


def meanings(classes: int) -> np.ndarray:
    meaning = np.full(256, IGNORED, np.uint8)
    meaning[:classes] = np.arange(classes)
    return meaning


# Training images --------------------------------------------------------------------------------


@dataclass
class Crops(Dataset[Any]):
    """(3, size, size) float32, normalised, and (size, size) int64; as MMSegmentation crops."""

    part: Masked
    facts: Facts
    args: argparse.Namespace

    def __len__(self) -> int:
        return len(self.part.pairs)

    def __getitem__(self, request: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, number = request
        args, rng = self.args, np.random.default_rng((self.args.seed, epoch, number))
        image, mask = self.part.read(number)
        scale = rng.uniform(args.min_scale, args.max_scale)
        size = fitted(image.shape[1:], args.short_edge * scale, args.long_edge * scale)
        image, mask = resized(image, size), F.interpolate(mask[None, None], size)[0, 0]
        place = choose_crop(mask, args.image_size, args.max_share, rng)
        image, mask = image[:, *place], mask[place]
        if rng.random() < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        if args.distort:
            image = distorted(image, rng)
        image = TF.normalize(image, self.facts.mean, self.facts.std)
        missing = [0, args.image_size - mask.shape[1], 0, args.image_size - mask.shape[0]]
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

    def __init__(self, net: nn.Module, classes: int, args: argparse.Namespace) -> None:
        super().__init__()
        missing = [name for name in ("layer3", "layer4") if not hasattr(net, name)]
        if missing:
            fail(f"--model {args.model} has no {', '.join(missing)}; expected a ResNet of timm or "
                 "torchvision.")  # fmt: skip
        self.body = IntermediateLayerGetter(net, {"layer3": "aux", "layer4": "out"})
        with torch.no_grad():
            maps = self.body.eval()(torch.zeros(1, 3, 64, 64, device=args.device))
        # MMSegmentation's fcn_r50-d8.py: 512 and 256 channels for ResNet-50's 2048 and 1024.
        out, aux = (maps[name].shape[1] for name in ("out", "aux"))
        self.head = FCNHead(out, out // 4, classes, args.dropout, convolutions=2, concat=True)
        self.aux = FCNHead(aux, aux // 4, classes, args.dropout, convolutions=1, concat=False)
        self.aux_weight, self.align_corners = args.aux_weight, args.align_corners

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
    args: argparse.Namespace

    def __len__(self) -> int:
        return len(self.part.pairs)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        image, mask = self.part.read(number)
        size = fitted(image.shape[1:], self.args.short_edge, self.args.long_edge)
        return TF.normalize(resized(image, size), self.facts.mean, self.facts.std), mask


def evaluate(net: nn.Module, test: Masked, facts: Facts, args: argparse.Namespace) -> Figures:
    """mIoU, mean accuracy and pixel accuracy in percent; and OUTPUT/predictions.png."""
    counts = torch.zeros(len(test.classes), len(test.classes), dtype=torch.long)
    shown: list[Tensor] = []
    loader = evaluation_loader(WholeImages(test, facts, args), args)
    bar = tqdm(loader, "test", leave=False, disable=None if rank() == 0 else True)
    for number, (image, mask) in enumerate(bar):
        with autocast(args):
            logits = predict(net, image[None].to(args.device), args)
        found = enlarged(logits.float(), mask.shape, args.align_corners)[0].argmax(dim=0).cpu()
        counts += confusion(found, mask, len(test.classes))
        if number % -(-len(loader) // PICTURES) == 0:
            shown.append(side_by_side(image, mask, found, facts))
    if rank() == 0:
        height, width = (max(row.shape[side] for row in shown) for side in (1, 2))
        shown = [F.pad(r, [0, width - r.shape[2], 0, height - r.shape[1]]) for r in shown]
        save_image(make_grid(shown, nrow=1), args.output / "predictions.png")
    if world_size() > 1:
        counts = counts.to(args.device)
        dist.all_reduce(counts)
    return scores(counts.cpu(), test.classes)


def predict(net: nn.Module, images: Tensor, args: argparse.Namespace) -> Tensor:
    """Logits (B, classes, h, w), of whole images or as the mean over overlapping windows."""
    height, width = images.shape[2:]
    if not args.window or max(height, width) <= args.window:
        return net(images)
    total: Any = 0
    seen = torch.zeros(1, 1, height, width, device=images.device)
    for top in window_starts(height, args.window, args.stride):
        for left in window_starts(width, args.window, args.stride):
            place = (..., slice(top, top + args.window), slice(left, left + args.window))
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


def report(history: list[Figures], test: Masked, facts: Facts, args: argparse.Namespace) -> None:
    figures = history[-1]
    own: list[Cell] = [f"{facts.model}, {facts.start}", args.iterations]
    rows = [[*own, *(figures[name] for name in ("mIoU", "mAcc", "aAcc"))]]
    if args.protocol == "voc12aug":
        rows.append(PUBLISHED)
    more = {"history": history, "classes": test.classes, "test images": len(test.pairs)}
    columns = ["backbone", "steps", "mIoU", "mAcc", "aAcc"]
    write_results(args, "Segmentation, FCN d8, in %", columns, rows, facts, more)


if __name__ == "__main__":
    main()
