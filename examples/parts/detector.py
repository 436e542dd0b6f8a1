"""torchvision's Faster and Mask R-CNN around a ResNet's stages, changed to train as MMDetection's:
L1 losses of boxes, anchors that leave the image ignored (C4), its pooling and its initialisation.
"""

import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign, box_iou, roi_align

from parts.backbone import Facts
from parts.processes import fail

STAGES = ("layer1", "layer2", "layer3", "layer4")
# Proposals before and after suppression: MMSelfSup 0.x, configs/benchmarks/mmdetection/_base_/
# models/faster_rcnn_r50_c4.py and mask_rcnn_r50_fpn.py (there before it by level).
PROPOSALS = {
    "c4": {"rpn_pre_nms_top_n_train": 12_000, "rpn_post_nms_top_n_train": 2000,
           "rpn_pre_nms_top_n_test": 6000},
    "fpn": {"rpn_pre_nms_top_n_train": 2000, "rpn_post_nms_top_n_train": 1000,
            "rpn_pre_nms_top_n_test": 1000},
}  # fmt: skip
RATIOS = (0.5, 1.0, 2.0)  # height to width of the anchors, in all of them


def build_detector(net: nn.Module, facts: Facts, classes: int, protocol: Any) -> FasterRCNN:
    """The detector of a DetectionProtocol, of `classes` classes and the background."""
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
    # FasterRCNN makes both of them and takes no other class.
    detector.rpn.__class__, detector.roi_heads.__class__ = Proposals, Heads
    detector.rpn.inside = protocol.detector == "c4"
    for part in (detector.rpn.head, detector.roi_heads.box_predictor):
        part.register_forward_hook(in_float32)
    # detectron2's and MMDetection's; torchvision leaves torch's default.
    predictor = detector.roi_heads.box_predictor
    for layer, deviation in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)
    return detector


def in_float32(_module: nn.Module, _args: Any, outputs: Any) -> Any:
    """Boxes and anchors take the type of what is predicted, and bfloat16 has no odd numbers
    above 256: under autocast they would be off by pixels."""
    return tuple([x.float() for x in out] if isinstance(out, list) else out.float()
                 for out in outputs)  # fmt: skip


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


# Losses -----------------------------------------------------------------------------------------
# MMSelfSup 0.x, configs/benchmarks/mmdetection/_base_/models/{faster_rcnn_r50_c4,mask_rcnn_r50_fpn}
# .py: loss_bbox=dict(type='L1Loss', loss_weight=1.0), of the proposals and of the box head;
# min_pos_iou=0.3 of the anchors.
MIN_POS_IOU = 0.3


class Proposals(RegionProposalNetwork):
    """torchvision's, with an L1 loss of boxes. With `inside`, anchors that leave the image are
    neither right nor wrong (allowed_border=0 of faster_rcnn_r50_c4.py)."""

    inside: bool

    def forward(self, images: Any, features: Any, targets: Any = None) -> Any:
        if targets is not None:
            targets = [{**t, "size": size}
                       for t, size in zip(targets, images.image_sizes, strict=True)]  # fmt: skip
        # Anchors take their type from the features: see in_float32.
        features = {name: x.float() for name, x in features.items()}
        return super().forward(images, features, targets)

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Any]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of each anchor 1 (object), 0 (background) or -1 (ignored), and the box it is for."""
        labels, boxes = [], []
        for every, target in zip(anchors, targets, strict=True):
            labels.append(every.new_full((len(every),), -1))
            boxes.append(every.clone())
            height, width = target["size"]
            # As MMDetection's anchor_inside_flags: 0 is inside, the other edge is not.
            kept = (every[:, :2] >= 0).all(1) & (every[:, 2] < width) & (every[:, 3] < height)
            kept = torch.where(kept | (not self.inside))[0]
            if not len(kept):
                continue
            (found,), (matched,) = super().assign_targets_to_anchors([every[kept]], [target])
            # torchvision's best anchor of a box is always its own; MMDetection's from 0.3 on.
            overlap = box_iou(target["boxes"], every[kept]).amax(dim=0)
            labels[-1][kept] = found.where(overlap >= MIN_POS_IOU, 0.0)
            boxes[-1][kept] = matched
        return labels, boxes

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        on, off = (torch.where(torch.cat(part))[0] for part in self.fg_bg_sampler(labels))
        sampled, wanted = torch.cat([on, off]), torch.cat(regression_targets)
        boxes = F.l1_loss(pred_bbox_deltas[on], wanted[on], reduction="sum") / len(sampled)
        truth = torch.cat(labels)[sampled]
        return F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], truth), boxes


class Heads(RoIHeads):
    """torchvision's, with an L1 loss of boxes."""

    def forward(
        self, features: dict[str, Tensor], proposals: list[Tensor],
        image_shapes: list[tuple[int, int]], targets: Any = None,
    ) -> Any:  # fmt: skip
        if not self.training:
            return super().forward(features, proposals, image_shapes, targets)
        proposals, matched, labels, wanted = self.select_training_samples(proposals, targets)
        x = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        logits, boxes = self.box_predictor(x)
        truth, on = torch.cat(labels), [torch.where(part > 0)[0] for part in labels]
        some = torch.where(truth > 0)[0]
        boxes, wanted = boxes.unflatten(1, (-1, 4))[some, truth[some]], torch.cat(wanted)[some]
        losses = {
            "loss_classifier": F.cross_entropy(logits, truth),
            "loss_box_reg": F.l1_loss(boxes, wanted, reduction="sum") / len(truth),
        }
        if self.has_mask():
            objects = [p[i] for p, i in zip(proposals, on, strict=True)]
            x = self.mask_head(self.mask_roi_pool(features, objects, image_shapes))
            losses["loss_mask"] = maskrcnn_loss(
                self.mask_predictor(x), objects, [t["masks"] for t in targets],
                [t["labels"] for t in targets], [m[i] for m, i in zip(matched, on, strict=True)],
            )  # fmt: skip
        return [], losses
