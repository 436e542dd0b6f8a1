"""Fine-tune a ResNet for detection, by the protocols that BYOL's published figures come from:

    torchrun --nproc-per-node=8 examples/finetune_detection.py --protocol voc-c4 \\
        --data VOCdevkit --checkpoint runs/pretrain/backbone.safetensors
    torchrun --nproc-per-node=8 examples/finetune_detection.py --protocol coco-mask-fpn --data COCO

torchvision's Faster and Mask R-CNN around a torchvision or timm ResNet, on one's own boxes too;
the layouts are boxes.open_detection's, the loop is parts/finetuning.py's. Nothing is frozen,
and every batch norm is synchronised over the GPUs. Beyond torchvision this follows MMDetection in
what it samples and how it initialises and pools; torchvision's box losses are smooth at errors
below 1/9, where the originals' are L1, and batches are not grouped by aspect ratio.
"""

import argparse
import math
from collections import OrderedDict
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
from parts.finetuning import Figures, check_shares, fine_tune, one_by_one, save_rows
from parts.flags import check_at_least, flag, parse_protocol, protocol_parser, set_up
from parts.machine import Machine
from parts.processes import fail, launch, leave_processes, rank, tell, world_size
from parts.tables import Cell, write_results
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.utils import draw_bounding_boxes
from tqdm import tqdm

STAGES = ("layer1", "layer2", "layer3", "layer4")
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
    warmup: int = flag("steps over which the rate rises from a thousandth [MoCo's yaml; "
                       "schedule_1x.py]")  # fmt: skip
    batch_size: int = flag("images of a step, over all processes [MoCo's Base-RCNN-C4-BN.yaml; "
                           "MMDetection's 8x2]")  # fmt: skip
    base_lr: float = flag("for 16 images; scaled linearly with the batch [the same files]")
    momentum: float = flag("of SGD [schedule_1x.py; detectron2's defaults]")
    weight_decay: float = flag("of all parameters [schedule_1x.py]")
    train_sizes: tuple[int, ...] = flag("short edges in pixels, one drawn for each image [MoCo's "
                                        "yaml; MMSelfSup's mask-rcnn_r50_fpn_ms-1x]")  # fmt: skip
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
    warmup=500, train_sizes=tuple(range(640, 801, 32)),
)  # fmt: skip
PROTOCOLS = {"voc-c4": VOC_C4, "coco-mask-fpn": COCO_MASK_FPN}
# Proposals before and after suppression: MMSelfSup's faster_rcnn_r50_c4.py, MMDetection's
# mask-rcnn_r50_fpn.py (there before it by level).
PROPOSALS = {
    "c4": {"rpn_pre_nms_top_n_train": 12_000, "rpn_post_nms_top_n_train": 2000,
           "rpn_pre_nms_top_n_test": 6000},
    "fpn": {"rpn_pre_nms_top_n_train": 2000, "rpn_post_nms_top_n_train": 1000,
            "rpn_pre_nms_top_n_test": 1000},
}  # fmt: skip
RATIOS = (0.5, 1.0, 2.0)  # height to width of the anchors, in all of them
# By measure: MMSelfSup's configs/selfsup/byol/README.md, byol_resnet50_8xb32-accum16-coslr-200e.
PUBLISHED: dict[str, list[Cell]] = {
    "voc": ["published: BYOL, ResNet-50, 200 epochs, on VOC07+12 (MMSelfSup)", "c4", 24_000,
            80.35, None, None],
    "coco": ["published: BYOL, ResNet-50, 200 epochs, on COCO (MMSelfSup)", "mask-fpn", 87_960,
             40.9, 61.0, 44.6, 36.8, 58.1, 39.5],
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
    )  # fmt: skip
    if rank() == 0:
        report(history, test, facts, protocol, args)
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


# The detector -----------------------------------------------------------------------------------


def build_detector(
    net: nn.Module, facts: Facts, classes: int, protocol: DetectionProtocol
) -> FasterRCNN:
    """torchvision's detector of `classes` classes and the background, around `net`'s stages."""
    channels, strides = stages(net, facts.model)
    shared: dict[str, Any] = {
        "min_size": protocol.train_sizes, "max_size": protocol.long_edge, "image_mean": facts.mean,
        "image_std": facts.std, "box_batch_size_per_image": protocol.regions,
        "rpn_post_nms_top_n_test": protocol.proposals,
        "box_detections_per_img": protocol.detections,
        **PROPOSALS["c4" if protocol.detector == "c4" else "fpn"],
    }  # fmt: skip
    if protocol.detector == "c4":
        body = IntermediateLayerGetter(net, {"layer3": "0"})
        body.out_channels = channels[2]
        detector = FasterRCNN(
            body, rpn_anchor_generator=AnchorGenerator((protocol.anchors,), (RATIOS,)),
            box_roi_pool=Regions(["0"], 14, strides[2:3]), box_head=last_stage(net, channels[3]),
            box_predictor=FastRCNNPredictor(channels[3], classes + 1), **shared,
        )  # fmt: skip
    else:
        body = BackboneWithFPN(
            net, {stage: str(i) for i, stage in enumerate(STAGES)}, channels, 256,
            norm_layer=nn.BatchNorm2d,
        )  # fmt: skip
        shared |= {
            "rpn_anchor_generator": AnchorGenerator([(a,) for a in protocol.anchors], [RATIOS] * 5),
            "box_roi_pool": Regions(["0", "1", "2", "3"], 7, strides),
            "box_head": FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], nn.BatchNorm2d),
            "box_predictor": FastRCNNPredictor(1024, classes + 1),
        }
        if protocol.detector == "fpn":
            detector = FasterRCNN(body, **shared)
        else:
            detector = MaskRCNN(
                body, mask_roi_pool=Regions(["0", "1", "2", "3"], 14, strides),
                mask_head=MaskRCNNHeads(256, [256] * 4, 1, nn.BatchNorm2d),
                mask_predictor=MaskRCNNPredictor(256, 256, classes + 1), **shared,
            )  # fmt: skip
    # detectron2's and MMDetection's; torchvision leaves torch's default.
    predictor = detector.roi_heads.box_predictor
    for layer, deviation in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)
    return detector


@torch.no_grad()
def stages(net: nn.Module, model: str) -> tuple[list[int], list[int]]:
    """The channels and the strides of layer1 to layer4."""
    missing = [name for name in STAGES if not hasattr(net, name)]
    if missing:
        fail(f"--model {model} has no {', '.join(missing)}; expected a ResNet of timm or "
             "torchvision.")  # fmt: skip
    body = IntermediateLayerGetter(net, {name: name for name in STAGES}).eval()
    maps = body(torch.zeros(1, 3, 128, 128, device=next(net.parameters()).device))
    return [m.shape[1] for m in maps.values()], [128 // m.shape[2] for m in maps.values()]


def last_stage(net: nn.Module, channels: int) -> nn.Module:
    """Stage 4 on each region, and MoCo's extra norm after it (its train_net.py; MMSelfSup's
    ResLayerExtraNorm)."""
    parts: dict[str, Any] = {"layer4": net.layer4, "norm": nn.BatchNorm2d(channels)}
    return nn.Sequential(OrderedDict(parts, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten()))


class Regions(MultiScaleRoIAlign):
    """Pools (N, C, size, size) as detectron2 and MMDetection do: half a pixel apart from
    torchvision's, and with as many samples as a cell has pixels."""

    def __init__(self, levels: list[str], size: int, strides: list[int]) -> None:
        super().__init__(levels, size, sampling_ratio=0)
        self.strides = strides

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        corners = torch.cat(boxes)
        image = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
        regions = torch.cat([image, corners], dim=1)
        # A region of 224 px goes to the level of stride 16 (arXiv 1612.03144, equation 1).
        sides = (corners[:, 2:] - corners[:, :2]).prod(dim=1).sqrt()
        first, last = (int(math.log2(stride)) for stride in (self.strides[0], self.strides[-1]))
        level = (4 + torch.log2(sides / 224) + 1e-6).floor().clamp(first, last) - first
        features = [x[name] for name in self.featmap_names]
        shape = (len(regions), features[0].shape[1], *self.output_size)
        pooled = features[0].new_zeros(shape)
        for i, (feature, stride) in enumerate(zip(features, self.strides, strict=True)):
            here = torch.where(level == i)[0]
            part = roi_align(feature, regions[here], self.output_size, 1 / stride, 0, aligned=True)
            pooled[here] = part.to(pooled.dtype)
        return pooled


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
    history: list[Figures], test: Annotated, facts: Facts, protocol: DetectionProtocol,
    args: argparse.Namespace,
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
    rows.append(PUBLISHED[protocol.measure][: len(rows[0])])
    more = {"history": history, "classes": test.classes, "test images": len(test.images)}
    write_results(args, title, ["backbone", "detector", "steps", *columns], rows, facts, more)


if __name__ == "__main__":
    launch(main)
