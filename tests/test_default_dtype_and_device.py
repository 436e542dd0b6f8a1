"""torch's defaults for new tensors change nothing that is created here."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from byol_pytorch import heads
from byol_pytorch.diagnostics import health
from byol_pytorch.evaluation import knn_accuracy, linear_probe, nearest_neighbours
from byol_pytorch.evaluation.protocols import Protocol
from byol_pytorch.loss import regression_loss
from byol_pytorch.optim import LARS, warmup_cosine


@contextmanager
def default(given: torch.dtype | str) -> Iterator[None]:
    """A default dtype, or a device that holds no values, as a stand-in for a GPU."""
    if isinstance(given, str):
        with torch.device(given):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(given)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


ROWS = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2] * 8)


def head(make: Callable[..., nn.Module], *arguments: Any) -> list[Tensor]:
    torch.manual_seed(3)
    return list(make(6, *arguments, None).state_dict().values())


def lars() -> list[Tensor]:
    weights = [nn.Parameter(ROWS.clone()), nn.Parameter(ROWS.bfloat16())]
    optimizer = LARS(weights, lr=0.5, weight_decay=0.01)
    for p in weights:
        p.grad = p.detach().sin()
    optimizer.step()
    return [p.detach() for p in weights] + [optimizer.state[p]["momentum_buffer"] for p in weights]


def probe() -> list[Tensor]:
    protocol = Protocol(2, 8, (0.1, 1.0), batch_norm=True)
    found = linear_probe(
        ROWS, LABELS, ROWS, LABELS, protocol=protocol, num_classes=3, held_out=0.25
    )
    classifier = found.heads.classifier("pooled", 1)
    return [found.top1, found.held_out, *found.heads.state_dict().values(), classifier.weight]


CREATIONS: dict[str, Callable[[], Any]] = {
    "mlp": lambda: head(heads.mlp, 4, 8),
    "simsiam_mlp": lambda: head(heads.simsiam_mlp, 4, 8),
    "simplicial_embedding": lambda: head(heads.simplicial_embedding, 2, 3, 0.1),
    "lars": lars,
    "schedule": lambda: warmup_cosine(7, 20, 5, 0.3),
    "health": lambda: health(ROWS, ROWS.roll(1), ROWS),
    "loss": lambda: [regression_loss(ROWS, ROWS.roll(1))],
    "knn": lambda: knn_accuracy(ROWS, LABELS, k=(1, 5)),
    "neighbours": lambda: nearest_neighbours(ROWS, k=3),
    "linear": probe,
}


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float64, "meta"], ids=str)
@pytest.mark.parametrize("create", CREATIONS.values(), ids=CREATIONS.keys())
def test_what_is_created_is_the_same_under_every_default(create, given):
    expected = create()
    with default(given):
        found = create()
    # Equal to the bit, and of one dtype and device.
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
