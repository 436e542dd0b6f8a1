"""BYOL's regression loss between predictions and target projections. Nothing else lives here."""

import torch
import torch.nn.functional as F
from torch import Tensor


def regression_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean over the batch of |normalised prediction - normalised target|^2 = 2 - 2 cos.

    Paper, equation 2. Both are (B, D) of any float dtype; the result is a float32 scalar in
    [0, 4], computed in float32 also under autocast. Detach the target beforehand.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        difference = F.normalize(prediction.float(), dim=-1) - F.normalize(target.float(), dim=-1)
        return difference.square().sum(dim=-1).mean()
