"""Any network's representation: a probe that leaves no trace finds it, a tap reads it.

undisturbed.py puts back what a probe changes, pooling.py makes (B, D) of a layer's output.
"""

from byol_pytorch.backbone.locate import locate
from byol_pytorch.backbone.probe import check_other_size, drawing, evaluating, probe_inputs
from byol_pytorch.backbone.representation import (
    Place,
    Pool,
    Representation,
    check_gradient,
    copy_for_target,
)

__all__ = [
    "Place",
    "Pool",
    "Representation",
    "check_gradient",
    "check_other_size",
    "copy_for_target",
    "drawing",
    "evaluating",
    "locate",
    "probe_inputs",
]
