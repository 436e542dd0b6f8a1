"""LARS against a plain-Python reference, the groups' members, and the schedules' corners."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from byol_pytorch import BYOL
from byol_pytorch.optim import LARS, param_groups, scaled_decay, scaled_lr, warmup_cosine

STEPS = 10
Settings = dict[str, float]


class Reference:
    """One parameter under DeepMind's LARS, in Python floats.

    byol/utils/optimizers.py: add_weight_decay, scale_by_lars (adaptation, then the momentum
    mu = momentum mu + update), scale(-learning_rate).
    """

    def __init__(self, w: Sequence[float], adapt: bool, settings: Settings) -> None:
        self.w, self.mu = list(w), [0.0] * len(w)
        self.adapt, self.settings = adapt, settings

    def step(self, gradient: Sequence[float]) -> None:
        s = self.settings
        decay = s["weight_decay"]
        update = [g + decay * w for g, w in zip(gradient, self.w, strict=True)]
        if self.adapt:
            w_norm, u_norm = math.hypot(*self.w), math.hypot(*update)
            ratio = s["trust_coefficient"] * w_norm / u_norm if w_norm > 0 and u_norm > 0 else 1.0
            update = [u * ratio for u in update]
        self.mu = [s["momentum"] * m + u for m, u in zip(self.mu, update, strict=True)]
        self.w = [w - s["lr"] * m for w, m in zip(self.w, self.mu, strict=True)]


def gradients(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(STEPS)]


SHAPES = [(4, 3), (5, 2, 3, 3), (7, 1), (8,), (6,), (2, 2)]
ADAPTED = [True, True, True, True, False, False]
ZERO_WEIGHT, ZERO_GRADIENT = 2, 3


@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"),
    [(torch.float64, 1e-12, 1e-14), (torch.float32, 1e-5, 1e-6), (torch.bfloat16, 1e-2, 1e-4)],
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
@pytest.mark.parametrize("at_a_time", [1, 20, 10**9])
def test_lars_takes_every_step_of_the_reference_however_many_parameters_go_at_a_time(
    dtype: torch.dtype,
    rtol: float,
    atol: float,
    weight_decay: float,
    at_a_time: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("byol_pytorch.optim.CACHED", at_a_time)
    adapted = {"lr": 2.0, "momentum": 0.9, "weight_decay": weight_decay, "trust_coefficient": 1e-2}
    plain = {**adapted, "lr": 0.05, "momentum": 0.7, "weight_decay": 0.0}
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    parameters[ZERO_WEIGHT].data.zero_()
    references = [
        Reference(p.flatten().tolist(), adapt, adapted if adapt else plain)
        for p, adapt in zip(parameters, ADAPTED, strict=True)
    ]
    optimizer = LARS(
        [
            {"params": parameters[:4]},
            {"params": parameters[4:], "adapt": False, "lr": 0.05, "momentum": 0.7,
             "weight_decay": 0.0},
        ],
        lr=2.0, weight_decay=weight_decay, trust_coefficient=1e-2,
    )  # fmt: skip
    for step, given in enumerate(gradients(SHAPES, dtype)):
        given[ZERO_GRADIENT].mul_(step > 4)
        adapted["lr"] = optimizer.param_groups[0]["lr"] = 0.5 * (step + 1)
        for p, g, reference in zip(parameters, given, references, strict=True):
            p.grad = g
            if dtype == torch.bfloat16:  # weights are rounded after each step
                reference.w = p.flatten().tolist()
            reference.step(g.flatten().tolist())
        optimizer.step()
        for p, reference in zip(parameters, references, strict=True):
            expected = torch.tensor(reference.w, dtype=torch.float64).view_as(p)
            torch.testing.assert_close(p.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lars_leaves_gradients_and_parameters_without_one_alone(dtype: torch.dtype) -> None:
    used, unused = (nn.Parameter(torch.randn(3, 3, dtype=dtype)) for _ in range(2))
    before = unused.clone()
    used.grad = torch.randn(3, 3, dtype=dtype)
    gradient = used.grad.clone()
    for adapt in (True, False):
        optimizer = LARS([{"params": [used, unused], "adapt": adapt}], lr=0.1, weight_decay=0.1)
        optimizer.step()
        assert torch.equal(used.grad, gradient)
        assert torch.equal(unused, before)
        assert unused not in optimizer.state


def test_lars_steps_by_a_closure_with_gradients_on() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([p], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert (p < 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lars_goes_on_from_its_state_dict_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    def fresh() -> tuple[nn.Parameter, LARS]:
        p = nn.Parameter(torch.linspace(-1, 1, 12, dtype=dtype).view(3, 4))
        return p, LARS([p], lr=0.5, weight_decay=0.01)

    def advance(p: nn.Parameter, optimizer: LARS, steps: list[list[Tensor]]) -> None:
        for (g,) in steps:
            p.grad = g
            optimizer.step()

    given = gradients([(3, 4)], dtype)
    through, through_optimizer = fresh()
    advance(through, through_optimizer, given)

    first, first_optimizer = fresh()
    advance(first, first_optimizer, given[:5])
    torch.save(first_optimizer.state_dict(), tmp_path / "state.pt")
    second, second_optimizer = fresh()
    second.data.copy_(first)
    second_optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    advance(second, second_optimizer, given[5:])
    assert torch.equal(second, through)
    momentum = second_optimizer.state[second]["momentum_buffer"]
    assert momentum.dtype == torch.float32
    assert torch.equal(momentum, through_optimizer.state[through]["momentum_buffer"])


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": -0.1}, {"lr": math.nan}, {"lr": "0.1"}, {"momentum": 1.0}, {"momentum": -0.1},
        {"weight_decay": -1e-6}, {"trust_coefficient": math.inf}, {"lr": True}, {"momentum": None},
    ],
)  # fmt: skip
def test_lars_names_a_bad_setting_also_of_a_group(bad: dict[str, float]) -> None:
    p = nn.Parameter(torch.ones(2))
    (name,) = bad
    with pytest.raises(ValueError, match=rf"{name}=.*; expected .*\. Pass"):
        LARS([p], **{"lr": 0.1, **bad})
    with pytest.raises(ValueError, match=rf"{name}=.*; expected"):
        LARS([{"params": [p], **bad}], lr=0.1)


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 10),
    )  # fmt: skip


def learner_of(net: nn.Module, size: int = 16) -> BYOL:
    return BYOL(net, size, projection_size=8, projection_hidden_size=16)


def names_in(learner: nn.Module, group: dict) -> set[str]:
    ids = {id(p) for p in group["params"]}
    return {name for name, p in learner.named_parameters() if id(p) in ids}


def test_param_groups_hold_what_trains_and_nothing_else() -> None:
    learner = learner_of(small_net())
    weights, rest = param_groups(learner, 0.1)
    assert names_in(learner, weights) == {
        "net.0.weight", "projector.0.weight", "projector.3.weight", "predictor.0.weight",
        "predictor.3.weight",
    }  # fmt: skip
    assert names_in(learner, rest) == {
        "net.0.bias", "net.1.weight", "net.1.bias", "projector.0.bias", "projector.1.weight",
        "projector.1.bias", "predictor.0.bias", "predictor.1.weight", "predictor.1.bias",
    }  # fmt: skip
    assert (weights["weight_decay"], weights["adapt"]) == (0.1, True)
    assert (rest["weight_decay"], rest["adapt"]) == (0.0, False)


def test_param_groups_leave_out_frozen_parameters() -> None:
    learner = learner_of(small_net())
    learner.net[0].requires_grad_(False)
    names = set().union(*(names_in(learner, g) for g in param_groups(learner, 0.1)))
    assert not any(name.startswith("net.0.") for name in names)
    assert "net.1.weight" in names


@pytest.mark.parametrize("model", ["resnet18", "vit_tiny_patch16_224"])
def test_param_groups_are_the_parameters_that_get_a_gradient(model: str) -> None:
    settings = {"img_size": 32} if model.startswith("vit") else {}
    learner = learner_of(timm.create_model(model, **settings), 32)
    learner(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)).backward()
    expected = {name for name, p in learner.named_parameters() if p.grad is not None}
    groups = param_groups(learner, 0.1)
    assert set().union(*(names_in(learner, group) for group in groups)) == expected
    assert sum(len(group["params"]) for group in groups) == len(expected)


@pytest.mark.parametrize("inside", [True, False])
def test_param_groups_see_through_torch_compile(inside: bool) -> None:
    net = small_net()
    learner = learner_of(torch.compile(net) if inside else net)
    plain = [len(group["params"]) for group in param_groups(learner_of(small_net()), 0.1)]
    given = param_groups(learner if inside else torch.compile(learner), 0.1)
    assert [len(group["params"]) for group in given] == plain


class RMSNorm(nn.Module):
    """As in Hugging Face's models: no subclass of torch's. Here over all of (C, H, W)."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean((1, 2, 3), keepdim=True).add(1e-6).rsqrt() * self.weight


class ForeignNorm(RMSNorm):
    pass


class Affine(nn.Module):
    """torchvision's layer_scale, a weight of one output, and a bias with several axes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_scale = nn.Parameter(torch.ones(8, 1, 1))
        self.position_bias = nn.Parameter(torch.zeros(8, 14, 14))
        self.gate = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.layer_scale + self.position_bias
        return x * self.gate(x.mean((2, 3)))[..., None, None]


class Normalised(nn.Module):
    """A network whose own name is that of a norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 16))
        self.conv, self.norm = nn.Conv2d(3, 8, 3), norm

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.table[..., None]
        return self.norm(self.conv(x)).mean((2, 3))


class NormFreeNet(Normalised):
    pass


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm([8, 14, 14]), nn.RMSNorm([8, 14, 14]), ForeignNorm(8, 14, 14),
        nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True), timm.layers.BatchNormAct2d(8),
        timm.layers.LayerNorm2d(8), timm.layers.RmsNorm2d(8),
        timm.layers.grn.GlobalResponseNorm(8, channels_last=False),
    ],
    ids=lambda norm: type(norm).__name__,
)  # fmt: skip
def test_param_groups_know_a_norm_by_its_type(norm: nn.Module) -> None:
    learner = learner_of(NormFreeNet(norm))
    weights, rest = (names_in(learner, g) for g in param_groups(learner, 0.1))
    assert {n for n in weights if n.startswith("net.")} == {"net.table", "net.conv.weight"}
    assert {f"net.norm.{n}" for n, _ in norm.named_parameters()} <= rest


def test_param_groups_know_scales_biases_and_weights_by_their_part_not_their_axes() -> None:
    learner = learner_of(Normalised(Affine()))
    weights, rest = (names_in(learner, g) for g in param_groups(learner, 0.1))
    assert {"net.norm.gate.weight", "net.conv.weight", "net.table"} <= weights
    assert {"net.norm.layer_scale", "net.norm.position_bias", "net.norm.gate.bias"} <= rest


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_param_groups_leave_out_of_decay_what_timm_names(inside: bool, compiled: bool) -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    net: nn.Module = nn.Sequential(vit, nn.Linear(192, 6)) if inside else vit
    learner = learner_of(torch.compile(net) if compiled else net, 32)
    weights, rest = (names_in(learner, g) for g in param_groups(learner, 0.1))
    tokens = {"pos_embed", "cls_token"}
    assert {n.rpartition(".")[2] for n in rest} >= tokens
    assert not {n.rpartition(".")[2] for n in weights} & tokens
    assert all(n.endswith(".weight") for n in weights)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, LARS])
def test_every_optimizer_takes_the_groups(kind: type[torch.optim.Optimizer]) -> None:
    learner = learner_of(small_net())
    optimizer = kind(param_groups(learner, 0.1), lr=0.01)
    learner(torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)).backward()
    before = [p.clone() for p in learner.net.parameters()]
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, learner.net.parameters(), strict=True)]
    assert moved == [True, True, True, True, False, False]  # the classifier stays
    optimizer.load_state_dict(optimizer.state_dict())


def test_param_groups_name_a_wrong_module() -> None:
    with pytest.raises(ValueError, match="got a DataParallel; expected the BYOL learner"):
        param_groups(nn.DataParallel(learner_of(small_net())), 0.1)
    with pytest.raises(ValueError, match="got a Linear; expected the BYOL learner"):
        param_groups(nn.Linear(2, 2), 0.1)
    with pytest.raises(ValueError, match="weight_decay=-1; expected"):
        param_groups(learner_of(small_net()), -1)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.0), (5, 1.6), (9, 2.88), (10, 3.2), (60, 1.6), (110, 0.0), (500, 0.0)],
)
def test_the_schedule_at_its_corners(step: int, expected: float) -> None:
    assert warmup_cosine(step, 110, 10, 3.2) == pytest.approx(expected)


def test_the_schedule_is_deepminds() -> None:
    # learning_schedule of byol/utils/schedules.py, where the final value is 0.
    total, warmup, peak = 50, 7, 0.9
    for step in range(60):
        passed = min(step - warmup, total - warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * passed / (total - warmup))) * peak
        expected = step / warmup * peak if step < warmup else cosine
        assert warmup_cosine(step, total, warmup, peak) == pytest.approx(expected)


def test_the_schedule_without_warmup_without_rest_and_with_a_floor() -> None:
    assert warmup_cosine(0, 100, 0, 1.0) == 1.0
    assert warmup_cosine(10, 10, 10, 1.0) == 0.0
    assert warmup_cosine(9, 10, 10, 1.0) == 0.9
    assert warmup_cosine(50, 100, 0, 1.0, final=0.5) == pytest.approx(0.75)
    assert warmup_cosine(100, 100, 0, 1.0, final=0.5) == 0.5


@pytest.mark.parametrize(
    ("step", "total", "warmup"), [(-1, 10, 0), (0, 10, 11), (math.nan, 10, 0), (True, 10, 0)]
)
def test_the_schedule_names_a_bad_step(step: int, total: int, warmup: int) -> None:
    with pytest.raises(ValueError, match=r"step=.*; expected step >= 0"):
        warmup_cosine(step, total, warmup, 1.0)


@pytest.mark.parametrize("bad", [-1, math.nan, math.inf, True, "3", None])
@pytest.mark.parametrize("name", ["total_steps", "warmup_steps", "peak", "final"])
def test_the_schedule_names_a_bad_setting(name: str, bad: object) -> None:
    settings = {"total_steps": 10, "warmup_steps": 1, "peak": 1.0, "final": 0.0, name: bad}
    with pytest.raises(ValueError, match=rf"{name}={bad!r}; expected a finite number >= 0"):
        warmup_cosine(0, **settings)


@pytest.mark.parametrize("bad", [-1, math.nan, math.inf, True, "3", None])
@pytest.mark.parametrize("name", ["base", "batch_size", "reference"])
def test_the_scaling_names_a_bad_setting(name: str, bad: object) -> None:
    settings = {"base": 0.2, "batch_size": 64, "reference": 256, name: bad}
    with pytest.raises(ValueError, match=rf"{name}={bad!r}; expected a finite number >= 0"):
        scaled_lr(**settings)
    with pytest.raises(ValueError, match=r"reference=0; expected the batch size"):
        scaled_lr(0.2, 64, reference=0)


def test_lars_takes_numbers_of_numpy_and_names_a_flag_that_is_none() -> None:
    p = nn.Parameter(torch.ones(2))
    LARS([p], lr=np.float32(0.1), momentum=np.float64(0.5))
    with pytest.raises(ValueError, match=r"adapt='no'; expected a bool"):
        LARS([{"params": [p], "adapt": "no"}], lr=0.1)


def test_scaling_by_batch_size() -> None:
    assert scaled_lr(0.2, 4096) == pytest.approx(3.2)
    assert scaled_lr(0.06, 512, reference=128) == pytest.approx(0.24)
    # Sixteen steps at a sixteenth of the batch forget as much as one at the whole.
    assert scaled_decay(0.99, 1 / 16) ** 16 == pytest.approx(0.99)
    assert scaled_decay(1.0, 3) == 1.0
    for decay, ratio in ((1.1, 1.0), (-0.1, 1), (0.9, 0.0), (0.9, math.inf), (True, 1), (0.9, "2")):
        with pytest.raises(ValueError, match=r"decay=.*; expected"):
            scaled_decay(decay, ratio)


SHARDED = [(5, 3), (4, 4), (1, 6), (7,)]  # first axes split over two unevenly, evenly, to nothing


def after_three_steps(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The parameters after LARS steps with given gradients, each tensor put where `place` says."""
    generator = torch.Generator().manual_seed(4)
    parameters = [nn.Parameter(place(torch.randn(s, generator=generator))) for s in SHARDED]
    optimizer = LARS(
        [{"params": parameters[:3]}, {"params": parameters[3:], "adapt": False}],
        lr=1.0, weight_decay=0.1,
    )  # fmt: skip
    for given in gradients(SHARDED, torch.float32)[:3]:
        for p, g in zip(parameters, given, strict=True):
            p.grad = place(g)
        optimizer.step()
    return [p.detach() for p in parameters]


def sharded_rank(rank: int, folder: str) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    found = after_three_steps(lambda x: distribute_tensor(x, mesh, [Replicate(), Shard(0)]))
    whole = [x.full_tensor() for x in found]
    if rank == 0:
        torch.save(whole, os.path.join(folder, "sharded.pt"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("at_a_time", [1, 10**9])
def test_lars_of_sharded_parameters_takes_the_norm_of_the_whole(
    at_a_time: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("byol_pytorch.optim.CACHED", at_a_time)
    # Forked, which takes a tenth of the time of fresh processes; no autograd runs in them.
    mp.start_processes(sharded_rank, (str(tmp_path),), nprocs=4, start_method="fork")
    found = torch.load(tmp_path / "sharded.pt", weights_only=True)
    for whole, expected in zip(found, after_three_steps(lambda x: x), strict=True):
        torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-7)
