import copy
import math

import pytest
import torch
from torch import nn

from byol_pytorch import BYOL
from byol_pytorch.representation import Source
from byol_pytorch.target import Target, ema_decay


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def learner(net: nn.Module | None = None, **options) -> BYOL:
    options = {"projection_size": 8, "projection_hidden_size": 16} | options
    return BYOL(net or small_net(), 16, **options)


def drift(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_constant_decay_without_total_steps():
    assert [ema_decay(0.99, k, None) for k in (0, 5, 10**9)] == [0.99] * 3


def test_decay_rises_by_the_papers_half_cosine_and_stays_at_one():
    total = 40
    for k in range(total + 1):
        expected = 1 - (1 - 0.996) * (math.cos(math.pi * k / total) + 1) / 2
        assert ema_decay(0.996, k, total) == pytest.approx(expected, abs=1e-15)
    assert ema_decay(0.996, 0, total) == pytest.approx(0.996)
    assert ema_decay(0.996, total, total) == 1
    assert ema_decay(0.996, 10 * total, total) == 1


def test_target_after_many_updates_equals_the_closed_form():
    model = learner(total_steps=7, moving_average_decay=0.9)
    start = {n: p.double() for n, p in model.target.net.named_parameters()}
    snapshots, decays = [], []
    for k in range(9):
        drift(model.net)
        snapshots.append({n: p.detach().double() for n, p in model.net.named_parameters()})
        decays.append(1 - 0.1 * (math.cos(math.pi * min(k, 7) / 7) + 1) / 2)
        assert model.moving_average_decay == pytest.approx(decays[-1], abs=1e-12)
        model.update_moving_average()
    for name, parameter in model.target.net.named_parameters():
        expected = start[name] * math.prod(decays)
        for k, snapshot in enumerate(snapshots):
            expected = expected + (1 - decays[k]) * math.prod(decays[k + 1 :]) * snapshot[name]
        torch.testing.assert_close(parameter.double(), expected, atol=1e-5, rtol=1e-5)


def test_update_is_in_place_and_moves_the_projector_too():
    model = learner(moving_average_decay=0.5)
    storages = [p.data_ptr() for p in model.target.parameters()]
    before = model.target.projector[0].weight.clone()
    drift(model.projector)
    model.update_moving_average()
    assert [p.data_ptr() for p in model.target.parameters()] == storages
    expected = (before + model.projector[0].weight) / 2
    torch.testing.assert_close(model.target.projector[0].weight, expected)


def test_target_has_no_gradient_and_follows_only_when_told():
    model = learner()
    before = copy.deepcopy(model.target.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)).backward()
    optimizer.step()
    assert all(p.grad is None and not p.requires_grad for p in model.target.parameters())
    for name, parameter in model.target.named_parameters():
        assert torch.equal(parameter, before[name])


def test_update_before_any_step_keeps_the_target_and_counts():
    model = learner(total_steps=10, moving_average_decay=0.5)
    before = copy.deepcopy(model.target.state_dict())
    model.update_moving_average()
    torch.testing.assert_close(model.target.state_dict(), before, rtol=0, atol=0)
    assert model.moving_average_decay > 0.5


def test_batch_statistics_are_the_targets_own_and_buffers_are_never_averaged():
    model = learner(moving_average_decay=0.0)
    with torch.no_grad():
        model.target.net[0].weight.mul_(3)
    views = torch.randn(2, 6, 3, 16, 16)
    with torch.no_grad():
        features = model.target.net[0](views[0]), model.target.net[0](views[1])
    model(*views)
    expected = torch.zeros(8)
    for f in features:
        expected = 0.9 * expected + 0.1 * f.mean((0, 2, 3))
    torch.testing.assert_close(model.target.net[1].running_mean, expected)
    model.update_moving_average()
    torch.testing.assert_close(model.target.net[1].running_mean, expected)
    assert int(model.target.net[1].num_batches_tracked) == 2


def test_a_narrow_target_follows_although_single_updates_are_below_its_precision():
    model = learner(small_net().bfloat16(), moving_average_decay=0.996)
    start = model.target.net[0].weight.float().clone()
    with torch.no_grad():
        model.net[0].weight.add_(0.5)
    for _ in range(300):
        model.update_moving_average()
    goal = model.net[0].weight.float()
    expected = goal + (start - goal) * 0.996**300
    assert model.target.net[0].weight.dtype == torch.bfloat16
    torch.testing.assert_close(model.target.net[0].weight.float(), expected, atol=4e-3, rtol=1e-2)


def test_float32_copies_survive_a_cast_a_round_trip_and_a_deepcopy():
    model = learner(moving_average_decay=0.99).bfloat16()
    drift(model.net)
    for _ in range(3):
        model.update_moving_average()
    twin = learner().bfloat16()
    twin.load_state_dict(model.state_dict())
    third = copy.deepcopy(model)
    for other in (twin, third):
        with torch.no_grad():
            for a, b in zip(other.net.parameters(), model.net.parameters(), strict=True):
                a.copy_(b)
        other.update_moving_average()
    model.update_moving_average()
    ours = [b for n, b in model.named_buffers() if "float32" in n]
    assert ours
    assert all(b.dtype == torch.float32 for b in ours)
    torch.testing.assert_close(third.state_dict(), model.state_dict())
    for name, buffer in model.target.float32.named_buffers():
        # twin's base decay is 0.996, so its copies differ from ours by that step alone
        assert (twin.target.float32.get_buffer(name) - buffer).abs().max() < 0.05


@pytest.mark.parametrize("kept", [False, True])
def test_dropout_is_off_in_the_target_unless_asked_for(kept):
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop_rate = 0.5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(x, self.drop_rate, self.training)

    net = nn.Sequential(small_net(), nn.Dropout(0.5), Functional())
    model = learner(net, target_dropout=kept)
    model.train()
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        same = torch.equal(model.target.net(x), model.target.net(x))
    assert same is not kept
    assert model.net[1].training
    assert model.target.net[0][1].training, "batch norm takes batch statistics in the target"
    assert not model.eval().target.net[0][1].training


def test_frozen_batch_norm_stays_frozen_in_the_target():
    net = small_net()
    net[1].eval()
    model = learner(net)
    assert not model.target.net[1].training
    assert not model.net[1].training


def test_a_changed_network_is_an_error_and_never_a_silent_zip():
    model = learner()
    model.net[0] = nn.Conv2d(3, 8, 5, 2)
    with pytest.raises(RuntimeError, match=r"0\.weight.*reset_moving_average"):
        model.update_moving_average()
    model.projector = nn.Sequential(nn.Linear(8, 8))
    model.reset_moving_average()
    model.update_moving_average()


def test_reset_makes_a_fresh_copy_and_step_zero():
    model = learner(total_steps=5, moving_average_decay=0.5)
    for _ in range(3):
        drift(model.net)
        model.update_moving_average()
    model.reset_moving_average()
    assert model.moving_average_decay == 0.5
    for name, parameter in model.target.net.named_parameters():
        assert torch.equal(parameter, model.net.get_parameter(name))
        assert parameter.data_ptr() != model.net.get_parameter(name).data_ptr()


def test_integer_parameters_are_copied():
    class WithTable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.arange(3), requires_grad=False)
            self.weight = nn.Parameter(torch.randn(3))

    online = WithTable()
    target = Target(copy.deepcopy(online), nn.Identity(), Source("net", "", nn.Identity()))
    online.table.data += 5
    target.update(online, nn.Identity(), 0.9)
    assert torch.equal(target.net.table, online.table)


def test_a_step_that_a_scaler_skips_moves_the_target_unless_the_fallen_scale_is_heeded():
    learner = BYOL(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 16,
        projection_size=4, projection_hidden_size=8, total_steps=10, moving_average_decay=0.5,
    )  # fmt: skip
    optimizer = torch.optim.SGD(learner.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(overflows: bool, heed: bool) -> tuple[bool, bool, bool]:
        """Whether network, target and decay moved."""
        weights = [learner.net[0].weight, learner.target.net[0].weight]
        before, decay = [w.detach().clone() for w in weights], learner.moving_average_decay
        optimizer.zero_grad()
        scaler.scale(learner(*torch.randn(2, 4, 3, 16, 16))).backward()
        if overflows:
            weights[0].grad[0] = torch.inf
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if not (heed and scaler.get_scale() < scale):
            learner.update_moving_average()
        net, target = (not torch.equal(w, b) for w, b in zip(weights, before, strict=True))
        return net, target, learner.moving_average_decay != decay

    assert step(overflows=False, heed=True) == (True, True, True)
    assert step(overflows=True, heed=False) == (False, True, True)
    assert step(overflows=True, heed=True) == (False, False, False)
