"""Fine-tune a ResNet for detection, by the protocols that BYOL's published figures come from:

    torchrun --nproc-per-node=8 examples/finetune_detection.py --protocol voc-c4 \\
        --data VOCdevkit --checkpoint runs/pretrain/backbone.safetensors
    torchrun --nproc-per-node=8 examples/finetune_detection.py --protocol coco-mask-fpn --data COCO

torchvision's Faster and Mask R-CNN around a torchvision or timm ResNet, on one's own boxes too;
the layouts are boxes.open_detection's, the network is parts/detector.py's and the loop
parts/finetuning.py's. Nothing is frozen, and every batch norm is synchronised over the GPUs. The
constants are those of MMSelfSup's branch 0.x, which measured the published figures.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parts import openmp  # noqa: F401, before torch

# isort: split

import torch
import torch.distributed as dist
from parts.backbone import Facts, open_backbone
from parts.boxes import (
    Annotated,
    BoxedImages,
    PlainImages,
    Result,
    as_results,
    coco_ap,
    open_detection,
    voc_ap,
)
from parts.detector import build_detector
from parts.finetuning import Figures, check_shares, fine_tune, one_by_one, save_rows
from parts.flags import check_at_least, flag, parse_protocol, protocol_parser, set_up
from parts.machine import Machine
from parts.processes import fail, launch, leave_processes, rank, tell, world_size
from parts.published import COCO2017, VOC0712, DataSet
from parts.tables import Cell, write_results
from torchvision.models.detection import FasterRCNN
from torchvision.utils import draw_bounding_boxes
from tqdm import tqdm

PICTURES, SURE = 4, 0.5  # images of OUTPUT/predictions.png, and the score of the boxes drawn


@dataclass(frozen=True)
class DetectionProtocol:
    """A detector, how it is trained and how it is tested."""

    detector: str = flag("c4: stages 1 to 3, the 4th as box head (res5) with an extra norm; fpn: "
                         "feature pyramid, 4conv1fc box head; mask-fpn: and masks")  # fmt: skip
    measure: str = flag("voc: 11-point mAP; coco: COCO's AP")
    iterations: int = flag("steps [MoCo's pascal_voc_R_50_C4_24k.yaml; MMDetection's "
                           "schedule_1x.py: 12 epochs of 117,266 images with boxes]")  # fmt: skip
    lr_steps: tuple[int, ...] = flag("steps after which the rate falls to a tenth; they move with "
                                     "--iterations [the same files]")  # fmt: skip
    warmup: int = flag("steps over which the rate rises from a thousandth [MMSelfSup 0.x's "
                       "schedule_24k.py, schedule_1x.py]")  # fmt: skip
    batch_size: int = flag("images of a step, over all processes [MoCo's Base-RCNN-C4-BN.yaml; "
                           "MMDetection's 8x2]")  # fmt: skip
    base_lr: float = flag("for 16 images; scaled linearly with the batch [the same files]")
    momentum: float = flag("of SGD [schedule_1x.py; detectron2's defaults]")
    weight_decay: float = flag("of all parameters [schedule_1x.py]")
    train_sizes: tuple[int, ...] = flag("short edges in pixels, one drawn for each image [MoCo's "
                                        "yaml; MMSelfSup 0.x's *_mstrain_*.py]")  # fmt: skip
    image_size: int = flag("short edge in testing [the same files]")
    long_edge: int = flag("at most, in pixels [detectron2's defaults, MMDetection]")
    anchors: tuple[int, ...] = flag("sides of the anchors in pixels, on fpn one a level [the same]")
    regions: int = flag("sampled of each image for the box head, a quarter on objects [the same]")
    proposals: int = flag("regions to look at in testing, of each image [the same]")
    detections: int = flag("of each image, at most [the same]")


VOC_C4 = DetectionProtocol(
    detector="c4", measure="voc", iterations=24_000, lr_steps=(18_000, 22_000), warmup=100,
    batch_size=16, base_lr=0.02, momentum=0.9, weight_decay=1e-4,
    train_sizes=tuple(range(480, 801, 32)), image_size=800, long_edge=1333,
    anchors=(32, 64, 128, 256, 512), regions=512, proposals=1000, detections=100,
)  # fmt: skip
COCO_MASK_FPN = replace(
    VOC_C4, detector="mask-fpn", measure="coco", iterations=87_960, lr_steps=(58_640, 80_630),
    # 1000 in 0.x, whose figures these are; MMDetection's own schedule and 1.x have 500.
    warmup=1000, train_sizes=tuple(range(640, 801, 32)),
)  # fmt: skip
PROTOCOLS = {"voc-c4": VOC_C4, "coco-mask-fpn": COCO_MASK_FPN}
# By measure, with its data: MMSelfSup 0.x, configs/selfsup/byol/README.md,
# byol_resnet50_8xb32-accum16-coslr-200e.
PAGE = "published: BYOL, ResNet-50, 200 epochs, on"
PUBLISHED: dict[str, tuple[DataSet, list[Cell]]] = {
    "voc": (VOC0712, [f"{PAGE} VOC07+12 (MMSelfSup)", "c4", 24_000, 80.35, None, None]),
    "coco": (COCO2017, [f"{PAGE} COCO (MMSelfSup)", "mask-fpn", 87_960,
                        40.9, 61.0, 44.6, 36.8, 58.1, 39.5]),
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args, protocol = parse_arguments(argv)
    machine = set_up(args)
    check_shares(protocol.batch_size)
    masks = protocol.detector == "mask-fpn"
    train, test = open_detection(args.data, args.classes, masks)
    net, facts = open_backbone(args)
    detector = build_detector(net, facts, len(train.classes), protocol)
    images = BoxedImages(train, masks, args.seed)
    tell(f"{len(images)} images to train on, {len(test.images)} to test on, classes: "
         f"{', '.join(train.classes)}")  # fmt: skip
    history = fine_tune(
        detector, images, list_of_each, lambda step: learning_rate(step, protocol),
        lambda: evaluate(detector, test, protocol, machine, args.output), protocol, machine, args,
        kinds=images.wide,
    )  # fmt: skip
    if rank() == 0:
        report(history, train, test, facts, protocol, args)
    leave_processes()


def learning_rate(step: int, protocol: DetectionProtocol) -> float:
    """Linear warm-up from a thousandth, and a tenth after each of the steps."""
    rate = protocol.base_lr * protocol.batch_size / 16
    if step < protocol.warmup:
        rate *= 0.001 + 0.999 * step / protocol.warmup
    return float(rate * 0.1 ** sum(step >= s for s in protocol.lr_steps))


def list_of_each(samples: list[Any]) -> tuple[list[Any], ...]:
    return tuple(map(list, zip(*samples, strict=True)))


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, DetectionProtocol]:
    parser = protocol_parser("Fine-tune a ResNet for detection.", PROTOCOLS)
    args, protocol = parse_protocol(parser, PROTOCOLS, argv)
    for name, allowed in (("detector", ("c4", "fpn", "mask-fpn")), ("measure", ("voc", "coco"))):
        if getattr(protocol, name) not in allowed:
            fail(f"--{name} {getattr(protocol, name)} is none of {', '.join(allowed)}.")
    if protocol.detector == "mask-fpn" and protocol.measure == "voc":
        fail("--measure voc is of boxes alone: give --measure coco with --detector mask-fpn.")
    if protocol.detector != "c4" and len(protocol.anchors) != 5:
        fail(f"--anchors has {len(protocol.anchors)} values; expected 5, one a level of the "
             "pyramid.")  # fmt: skip
    names = ("train_sizes", "long_edge", "anchors", "regions", "proposals", "detections")
    check_at_least(1, protocol, *names)
    if args.lr_steps is None:
        scale = protocol.iterations / PROTOCOLS[args.protocol].iterations
        steps = tuple(round(step * scale) for step in protocol.lr_steps)
        protocol = replace(protocol, lr_steps=steps)
    vars(args).update(vars(protocol))  # what the flags came to
    return args, protocol


# Testing ----------------------------------------------------------------------------------------


def evaluate(
    detector: FasterRCNN,
    test: Annotated,
    protocol: DetectionProtocol,
    machine: Machine,
    output: Path,
) -> Figures:
    """The figures of the test images in percent, on rank 0; and OUTPUT/predictions.png."""
    sizes, detector.transform.min_size = detector.transform.min_size, (protocol.image_size,)
    results: list[Result] = []
    loader = one_by_one(PlainImages(test), machine)
    for picture, image in tqdm(loader, "test", leave=False, disable=None if rank() == 0 else True):
        with machine.autocast():
            found = detector([picture.to(machine.device)])[0]
        results += as_results(found, image, test.categories)
    detector.transform.min_size = sizes
    if world_size() > 1:
        parts: list[Any] | None = [None] * world_size() if rank() == 0 else None
        dist.gather_object(results, parts)
        results = [result for part in parts or [] for result in part]
    if rank():
        return {}
    draw(test, results, output / "predictions.png")
    if protocol.measure == "voc":
        return voc_ap(test.truth, results)
    figures = coco_ap(test.truth, results, "bbox")
    if protocol.detector == "mask-fpn":
        masks = coco_ap(test.truth, results, "segm")
        figures |= {f"mask {name}": value for name, value in masks.items()}
    return figures


def draw(test: Annotated, results: list[Result], path: Path) -> None:
    """The boxes of some images, true on the left, found on the right."""
    names = dict(zip(test.categories, test.classes, strict=True))
    rows = []
    for image in test.images[:: -(-len(test.images) // PICTURES)]:
        picture = test.picture(image)
        found = [r for r in results if r["image_id"] == image and r["score"] >= SURE]
        pair = [picture, picture.clone()]
        for i, things in enumerate((test.boxes(image), found)):
            boxes = torch.tensor([t["bbox"] for t in things]).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            labels = [names[t["category_id"]] for t in things]
            if things:
                pair[i] = draw_bounding_boxes(picture, boxes, labels, colors=("lime", "red")[i])
        rows.append(torch.cat(pair, dim=2))
    save_rows([row / 255 for row in rows], path)


def report(
    history: list[Figures], train: Annotated, test: Annotated, facts: Facts,
    protocol: DetectionProtocol, args: argparse.Namespace,
) -> None:  # fmt: skip
    if protocol.measure == "voc":
        names, columns = ("AP50", "AP", "AP75"), ["AP50", "AP", "AP75"]
        title = "Detection, Faster R-CNN: VOC's 11-point mAP in %"
    else:
        names, columns = ("AP", "AP50", "AP75"), ["mAP (box)", "AP50 (box)", "AP75 (box)"]
        title = "Detection: COCO's AP in %"
        if protocol.detector == "mask-fpn":
            names += tuple(f"mask {name}" for name in names)
            columns += ["mAP (mask)", "AP50 (mask)", "AP75 (mask)"]
    own = [f"{facts.model}, {facts.start}", protocol.detector, protocol.iterations]
    rows: list[list[Cell]] = [[*own, *(history[-1][name] for name in names)]]
    data, published = PUBLISHED[protocol.measure]
    if (len(train.images), len(test.images), len(test.classes)) == data:
        rows.append(published[: len(rows[0])])
    more = {"history": history, "classes": test.classes, "test images": len(test.images)}
    write_results(args, title, ["backbone", "detector", "steps", *columns], rows, facts, more)


if __name__ == "__main__":
    launch(main)
