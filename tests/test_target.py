import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from byol_pytorch import BYOL
from byol_pytorch.backbone.representation import Place
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


class Noisy(nn.Module):
    """Drops by a function whose rate nothing names, around a batch norm of its own."""

    def __init__(self, draw: Callable[[torch.Tensor, bool], torch.Tensor]) -> None:
        super().__init__()
        self.norm, self.draw = nn.BatchNorm2d(3), draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.draw(self.norm(x), self.training)


def attention(x: torch.Tensor, training: bool) -> torch.Tensor:
    return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if training else 0.0)


def path(x: torch.Tensor, training: bool) -> torch.Tensor:
    return x * torch.rand(len(x), 1, 1, 1).round() if training else x


DRAWS = {
    "dropout": lambda x, training: F.dropout(x, 0.5, training),
    "attention": attention,
    "stochastic depth": path,
    "rrelu": lambda x, training: F.rrelu(x - 0.5, training=training),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
@pytest.mark.parametrize("kept", [False, True])
def test_functional_dropout_is_off_in_the_target_unless_asked_for(draw, kept):
    net = nn.Sequential(nn.Sequential(Noisy(draw)), small_net())
    model = learner(net, target_dropout=kept)
    model.reset_moving_average()
    model = copy.deepcopy(model).eval().train()
    x = torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        outputs = [torch.equal(n(x), n(x)) for n in (model.net, model.target.net)]
    assert outputs == [False, not kept]
    assert all(m.training for m in model.net.modules())
    assert model.target.net[0][0].norm.training
    assert model.target.net[0].training


def test_looking_for_dropout_leaves_no_trace_and_takes_any_network():
    class Raises(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                raise RuntimeError("not in training")
            return x

    net = nn.Sequential(Noisy(DRAWS["dropout"]), nn.utils.spectral_norm(nn.Conv2d(3, 8, 3)))
    net += nn.Sequential(nn.BatchNorm2d(8), Raises())
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    modes = [m.training for m in net.modules()]
    learner(net)
    torch.set_rng_state(state)
    learner(copy.deepcopy(net), target_dropout=True)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    learner(net)
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert [m.training for m in net.modules()] == modes
    assert sum(len(m._forward_pre_hooks) for m in net.modules()) == 1  # spectral_norm's


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
    target = Target(copy.deepcopy(online), nn.Identity(), Place("net", "", nn.Identity()))
    online.table.data += 5
    target.update(online, nn.Identity(), 0.9)
    assert torch.equal(target.net.table, online.table)


def test_a_cast_takes_nothing_from_the_targets_precision():
    model = learner()
    exact = [p.double().clone() for p in model.target.parameters()]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model.to(dtype)
        assert all(p.dtype == dtype for p in model.target.parameters())
        assert all(b.dtype == torch.float32 for b in model.target.float32.buffers())
        narrow = dtype != torch.float32
        assert len(list(model.target.float32.buffers())) == (len(exact) if narrow else 0)
    for found, expected in zip(model.target.parameters(), exact, strict=True):
        assert torch.equal(found.double(), expected)
    model.bfloat16()
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.add_(1)
    model.update_moving_average()
    copies = [b.clone() for b in model.target.float32.buffers()]
    model.double()
    for found, expected in zip(model.target.parameters(), copies, strict=True):
        assert torch.equal(found, expected.double())


def test_a_narrow_learner_leaves_the_meta_device():
    model = learner(small_net().bfloat16())
    state = copy.deepcopy(model.state_dict())
    model.to("meta").to_empty(device="cpu")
    model.load_state_dict(state)
    model.update_moving_average()
    torch.testing.assert_close(model.state_dict()["target.float32.0"], state["target.float32.0"])


@pytest.mark.parametrize("narrow", [False, True])
def test_a_target_that_was_reset_under_inference_mode_trains_on(narrow):
    model = learner(small_net().bfloat16() if narrow else None, moving_average_decay=0.5)
    with torch.inference_mode():
        model.reset_moving_average()
        model.update_moving_average()
    drift(model.net)
    before = model.target.net[0].weight.float().clone()
    model(torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)).backward()
    model.update_moving_average()
    expected = (before + model.net[0].weight.float()) / 2
    torch.testing.assert_close(model.target.net[0].weight.float(), expected, rtol=1e-2, atol=1e-2)


def test_a_learner_that_is_built_under_inference_mode_is_an_error():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="Build it outside of"):
        learner(small_net())


CHANGES = {
    "an online layer": lambda model: setattr(model.net, "0", nn.Conv2d(3, 8, 5, 2)),
    "an inner layer": lambda model: setattr(model.net[5], "0", nn.Linear(8, 4)),
    "a parameter": lambda model: setattr(model.net[0], "weight", nn.Parameter(torch.zeros(8))),
    "a bias": lambda model: setattr(model.net[0], "bias", None),
    "a target's layer": lambda model: setattr(model.target.net, "5", nn.Linear(8, 9)),
    "a layer more": lambda model: model.target.net.append(nn.Linear(8, 8)),
    "a parameter more": lambda model: setattr(
        model.target.net[2], "weight", nn.Parameter(torch.zeros(3))
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_network_that_changes_between_two_updates_is_an_error(change):
    model = learner(small_net().append(nn.Sequential(nn.Linear(8, 8))), hidden_layer=-1)
    model.update_moving_average()
    change(model)
    with pytest.raises(RuntimeError, match="reset_moving_average"):
        model.update_moving_average()


def test_an_update_reads_parameters_that_were_swapped_or_replaced_alike():
    model = learner(moving_average_decay=0.0)
    model.update_moving_average()
    model.net[0].weight = nn.Parameter(torch.full_like(model.net[0].weight, 2))
    model.net[1] = nn.BatchNorm2d(8)
    nn.init.constant_(model.net[1].weight, 3)
    model.update_moving_average()
    assert model.target.net[0].weight.unique().tolist() == [2]
    assert model.target.net[1].weight.unique().tolist() == [3]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_after_an_update_follows_its_own_network(copied):
    model = learner(moving_average_decay=0.0)
    size = len(pickle.dumps(model.target))
    model.update_moving_average()
    assert len(pickle.dumps(model.target)) == size
    twin = copied(model)
    nn.init.constant_(twin.net[0].weight, 2)
    nn.init.constant_(model.net[0].weight, 1)
    twin.update_moving_average()
    assert twin.target.net[0].weight.unique().tolist() == [2]


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
