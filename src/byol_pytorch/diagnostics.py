"""Health figures of a run: has it collapsed, do online and target network agree."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from byol_pytorch.inputs import tensors


@torch.no_grad()
def health(projections: Tensor, predictions: Tensor, targets: Tensor) -> dict[str, float]:
    """The three figures below as Python floats, for which the host waits for the device.

    NaN where the features hold NaN or infinite values, as those of a diverged network.
    """
    figures = torch.stack(
        [feature_std(projections), effective_rank(projections), agreement(predictions, targets)]
    )
    names = ("feature_std", "effective_rank", "agreement")
    return dict(zip(names, figures.tolist(), strict=True))


def check_diagnosed(images: Any) -> None:
    """Raise ValueError where `images` are too few for figures of a batch."""
    if tensors(images)[0].shape[0] < 2:
        raise ValueError(
            "diagnostics() got 1 image, and its figures say how the images of a batch differ; "
            "expected at least 2. Give it some hundred, which make feature_std and effective_rank "
            "comparable from call to call."
        )


@torch.no_grad()
def feature_std(projections: Tensor) -> Tensor:
    """The mean over dimensions of the std over the batch of the normalised (B, D) projections.

    A float32 scalar: 0 in collapse, about 1 / sqrt(D) for features spread evenly over the sphere
    (SimSiam, arXiv 2011.10566, section 4.1).
    """
    return _unit(projections).std(dim=0).mean()


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """RankMe (arXiv 2210.02885, equation 1): the exponential of the singular values' entropy.

    A float32 scalar in [1, min(B, D)] of (B, D) features: 1 in complete collapse.
    """
    features = features.float()
    # LAPACK raises where it meets a value that is not finite, so it is given zeros there.
    finite = features.isfinite().all()
    values = torch.linalg.svdvals(torch.where(finite, features, 0.0))
    p = values / values.sum().clamp_min(1e-12) + 1e-7
    return torch.where(finite, (-(p * p.log()).sum()).exp(), torch.nan)


@torch.no_grad()
def agreement(predictions: Tensor, target_projections: Tensor) -> Tensor:
    """The mean cosine in [-1, 1] between (B, D) predictions and the target's projections."""
    return (_unit(predictions) * _unit(target_projections)).sum(dim=-1).mean()


def _unit(rows: Tensor) -> Tensor:
    # Large values first by the largest: their squares overflow, the norm then is infinite, and the
    # row of zeros that it makes would pass for a collapse.
    rows = rows.float()
    return F.normalize(rows / rows.abs().amax(dim=-1, keepdim=True).clamp_min(1), dim=-1)
