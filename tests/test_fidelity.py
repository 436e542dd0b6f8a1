"""A hundred steps of training equal a plain implementation of the paper, written here from it."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from byol_pytorch import BYOL
from byol_pytorch.optim import LARS, param_groups

STEPS, SIZE, BATCH, BASE = 100, 32, 16, 0.9
WEIGHT_DECAY, MOMENTUM = 1e-3, 0.9


def mlp(features: int, hidden: int, out: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(features, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, out, bias=False),
    )


def small_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


class Paper:
    """arXiv 2006.07733, section 3 and figure 2, one line after the other."""

    def __init__(self, backbone: nn.Module, features: int, hidden: int, size: int) -> None:
        self.f = backbone
        self.g, self.q = mlp(features, hidden, size), mlp(size, hidden, size)
        self.k = 0

    def start(self) -> None:
        self.f_xi, self.g_xi = copy.deepcopy(self.f), copy.deepcopy(self.g)

    def online(self) -> list[nn.Parameter]:
        return [p for part in (self.f, self.g, self.q) for p in part.parameters()]

    def loss(self, v: Tensor, w: Tensor) -> Tensor:
        return self.regression(v, w) + self.regression(w, v)

    def regression(self, v: Tensor, w: Tensor) -> Tensor:
        prediction = self.q(self.g(self.f(v)))
        with torch.no_grad():
            z = self.g_xi(self.f_xi(w))
        prediction = prediction / prediction.norm(dim=1, keepdim=True)
        z = z / z.norm(dim=1, keepdim=True)
        return ((prediction - z) ** 2).sum(1).mean()

    def move_target(self) -> None:
        tau = 1 - (1 - BASE) * (math.cos(math.pi * self.k / STEPS) + 1) / 2
        with torch.no_grad():
            for theta, xi in ((self.f, self.f_xi), (self.g, self.g_xi)):
                for a, b in zip(theta.parameters(), xi.parameters(), strict=True):
                    b.copy_(tau * b + (1 - tau) * a)
        self.k += 1


def paper_lars(parameters: list[nn.Parameter], momenta: list[Tensor], lr: float) -> None:
    """DeepMind's byol/utils/optimizers.py, a parameter at a time; vectors are excluded."""
    with torch.no_grad():
        for w, m in zip(parameters, momenta, strict=True):
            u = w.grad
            if w.ndim > 1:
                u = u + WEIGHT_DECAY * w
                norms = w.norm(), u.norm()
                if norms[0] > 0 and norms[1] > 0:
                    u = u * 1e-3 * norms[0] / norms[1]
            m.mul_(MOMENTUM).add_(u)
            w.sub_(lr * m)


# Rates at which rounding is not amplified: batch norm at higher ones makes it grow step by step.
@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.002), ("lars", 0.01)])
def test_a_hundred_steps_give_the_papers_losses_and_features(optimizer: str, lr: float) -> None:
    torch.manual_seed(0)
    net = small_network()
    learner = BYOL(
        net, SIZE, projection_size=16, projection_hidden_size=32,
        moving_average_decay=BASE, total_steps=STEPS,
    )  # fmt: skip
    paper = Paper(copy.deepcopy(net), 32, 32, 16)
    for own, ours in ((paper.g, learner.projector), (paper.q, learner.predictor)):
        for mine, theirs in zip(own.parameters(), ours.parameters(), strict=True):
            mine.data.copy_(theirs.data)
    paper.start()
    if optimizer == "lars":
        opt = LARS(param_groups(learner, WEIGHT_DECAY), lr, momentum=MOMENTUM)
        momenta = [torch.zeros_like(p) for p in paper.online()]
    else:
        opt = torch.optim.SGD(learner.parameters(), lr, MOMENTUM)
        reference = torch.optim.SGD(paper.online(), lr, MOMENTUM)

    images = torch.rand(BATCH, 3, SIZE, SIZE)
    views = torch.Generator().manual_seed(1)
    losses: list[tuple[float, float]] = []
    for _ in range(STEPS):
        v, w = (images + 0.2 * torch.randn(images.shape, generator=views) for _ in range(2))
        ours, theirs = learner(v, w), paper.loss(v, w)
        opt.zero_grad()
        ours.backward()
        opt.step()
        learner.update_moving_average()
        for p in paper.online():
            p.grad = None
        theirs.backward()
        if optimizer == "lars":
            paper_lars(paper.online(), momenta, lr)
        else:
            reference.step()
        paper.move_target()
        losses.append((ours.item(), theirs.item()))

    got, expected = torch.tensor(losses).unbind(1)
    assert expected[-1] < expected[0] - 1  # it trains
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
    # The target's running statistics depend on which view it saw last; its batch statistics do not.
    for ours, theirs in ((net.eval(), paper.f.eval()), (learner.target.net, paper.f_xi)):
        with torch.no_grad():
            a, b = ours(images), theirs(images)
        torch.testing.assert_close(a, b, rtol=0, atol=0.02 * b.std().item())
