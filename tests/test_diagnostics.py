import copy
import math

import pytest
import torch
from torch import nn

from byol_pytorch import BYOL
from byol_pytorch.diagnostics import agreement, effective_rank, feature_std


def test_feature_std_is_zero_in_collapse_and_one_over_root_d_on_the_sphere():
    assert feature_std(torch.ones(32, 16)).item() == pytest.approx(0, abs=1e-6)
    assert feature_std(3 * torch.randn(4096, 64)).item() == pytest.approx(1 / 8, rel=0.02)


def test_effective_rank_counts_equal_directions():
    basis = torch.eye(10)[:6]
    assert effective_rank(basis).item() == pytest.approx(6, rel=1e-3)
    assert effective_rank(torch.ones(20, 10)).item() == pytest.approx(1, rel=1e-3)


def test_effective_rank_equals_rankme_by_its_formula():
    x = torch.randn(30, 12, dtype=torch.float64)
    values = torch.linalg.eigvalsh(x.T @ x).clamp_min(0).sqrt()
    p = [float(v / values.sum()) + 1e-7 for v in values]
    expected = math.exp(-sum(q * math.log(q) for q in p))
    assert effective_rank(x).item() == pytest.approx(expected, rel=1e-4)


def test_agreement_is_the_mean_cosine():
    x = torch.randn(8, 5)
    assert agreement(x, 2 * x).item() == pytest.approx(1, abs=1e-6)
    assert agreement(x, -x).item() == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize("momentum", [True, False])
def test_diagnostics_report_the_run_and_leave_no_trace(momentum):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    learner = BYOL(net, 16, projection_size=8, projection_hidden_size=16, use_momentum=momentum)
    learner.net[1].eval()
    state = copy.deepcopy(learner.state_dict())
    modes = [m.training for m in learner.modules()]
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    figures = learner.diagnostics(images)
    assert set(figures) == {"feature_std", "effective_rank", "agreement", "ema_decay"}
    assert all(isinstance(v, float) and math.isfinite(v) for v in figures.values())
    assert figures["ema_decay"] == learner.moving_average_decay
    assert 1 <= figures["effective_rank"] <= 8
    torch.testing.assert_close(learner.state_dict(), state, rtol=0, atol=0)
    assert [m.training for m in learner.modules()] == modes


def test_diagnostics_see_a_collapsed_network():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    learner = BYOL(net, 16, projection_size=8, projection_hidden_size=16)
    images = torch.rand(12, 3, 16, 16)
    healthy = learner.diagnostics(images)["feature_std"]
    nn.init.zeros_(learner.net[0].weight)
    assert learner.diagnostics(images)["feature_std"] < 1e-3 * healthy


def diverged(value: float) -> BYOL:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    learner = BYOL(net, 16, projection_size=8, projection_hidden_size=16)
    with torch.no_grad():
        for layer in (learner.projector[-1], learner.target.projector[-1]):
            layer.weight.mul_(value)
    return learner


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_diagnostics_of_a_diverged_network_are_nan(value):
    learner = diverged(value)
    figures = learner.diagnostics(torch.rand(12, 3, 16, 16))
    assert all(math.isnan(figures[k]) for k in ("feature_std", "effective_rank", "agreement"))
    assert figures["ema_decay"] == learner.moving_average_decay


def test_diagnostics_of_a_network_about_to_overflow_are_not_those_of_a_collapse():
    images = torch.rand(12, 3, 16, 16)
    healthy, large = diverged(1.0).diagnostics(images), diverged(1e25).diagnostics(images)
    assert large["feature_std"] > 0.1 * healthy["feature_std"] > 0
    assert abs(large["agreement"]) > 1e-3
    assert 1 <= large["effective_rank"] <= 8


def test_diagnostics_of_one_image_are_an_error():
    with pytest.raises(ValueError, match=r"got 1 image, .*; expected at least 2\. Give it some"):
        diverged(1.0).diagnostics(torch.rand(1, 3, 16, 16))
