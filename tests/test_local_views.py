"""Local views with a predictor of their own, against the method written out here."""

import copy
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from byol_pytorch import BYOL
from byol_pytorch.augment import byol_views, local_views
from byol_pytorch.optim import LARS, param_groups

LARGE, SMALL = 32, 16


def backbone(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    def layer(channels: int) -> nn.Module:
        return nn.GroupNorm(2, channels) if norm is nn.GroupNorm else norm(channels)

    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), layer(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), layer(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def wrap(net: nn.Module | None = None, **options) -> BYOL:
    options = {
        "projection_size": 6, "projection_hidden_size": 20, "local_views": 2, "local_size": SMALL,
        **options,
    }  # fmt: skip
    return BYOL(backbone() if net is None else net, LARGE, **options)


def views(batch: int = 8, count: int = 2, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    large = [torch.randn(batch, 3, LARGE, LARGE, generator=generator) for _ in range(2)]
    small = [torch.randn(batch, 3, SMALL, SMALL, generator=generator) for _ in range(count)]
    return large, small


def written_out(learner: BYOL, large: list[Tensor], small: list[Tensor]) -> tuple[Tensor, dict]:
    """The loss and its gradients in float64: MULAN's tasks "global" and "local", with weights 1.

    Its loss of a task is the mean over the task's pairs of a view and a target; ours is twice that,
    as the paper sums its two directions.
    """
    twin = copy.deepcopy(learner).double()
    online, target = twin.net[:-1], twin.target
    project, targets = twin.projector, []
    for view in large:
        with torch.no_grad():
            targets.append(target.projector(target.net[:-1](view.double())))

    def distance(prediction: Tensor, goal: Tensor) -> Tensor:
        cosine = (prediction * goal).sum(1) / prediction.norm(dim=1) / goal.norm(dim=1)
        return (2 - 2 * cosine).mean()

    tasks = {"global": [], "local": []}
    for number, view in enumerate(large):
        prediction = twin.predictor(project(online(view.double())))
        tasks["global"].append(distance(prediction, targets[1 - number]))
    for view in small:
        prediction = twin.local_predictor(project(online(view.double())))
        tasks["local"] += [distance(prediction, goal) for goal in targets]
    loss = 2 * sum(torch.stack(terms).mean() for terms in tasks.values())
    loss.backward()
    return loss, {name: p.grad for name, p in twin.named_parameters()}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_loss_and_all_gradients_are_those_of_the_method(count: int) -> None:
    torch.manual_seed(0)
    learner = wrap(local_views=count)
    for p in learner.target.parameters():
        p.data.add_(0.05 * torch.randn_like(p))  # another network than the online one
    large, small = views(count=count)
    expected, gradients = written_out(learner, large, small)
    loss = learner(*large, local_views=small)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    seen = 0
    for name, p in learner.named_parameters():
        if gradients[name] is None:
            assert p.grad is None, name
            continue
        torch.testing.assert_close(p.grad.double(), gradients[name], rtol=1e-3, atol=1e-5)
        seen += name.startswith(("predictor", "local_predictor"))
    assert seen == 2 * len(list(learner.predictor.parameters()))


def test_a_learner_without_local_views_is_the_learner_of_before() -> None:
    torch.manual_seed(0)
    plain = BYOL(backbone(), LARGE, projection_size=6, projection_hidden_size=20)
    torch.manual_seed(0)
    local = wrap()
    assert not any("local" in name for name in plain.state_dict())
    missing = local.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing
    assert all(name.startswith("local_predictor.") for name in missing)
    large, small = views()
    # The same draws for all that both have, and the paper's loss inside of the larger one.
    with_local, without = local(*large, local_views=small), plain(*large)
    assert 0 <= without <= 8
    assert without < with_local <= without + 8


def test_joined_local_views_are_one_pass() -> None:
    torch.manual_seed(0)
    norm_free = backbone(nn.GroupNorm)
    large, small = views()
    apart = wrap(norm_free)
    # The heads' batch norms alone tell the two apart; in evaluation they do not look across.
    joined = copy.deepcopy(apart)
    joined.concatenate_views = True
    passes = []
    joined.net.register_forward_hook(lambda *args: passes.append(len(args[1][0])))
    a, b = (x.eval()(*large, local_views=small) for x in (apart, joined))
    torch.testing.assert_close(a, b)
    assert passes == [16, 16]


# Views -------------------------------------------------------------------------------------------


def test_the_views_are_two_large_ones_and_the_local_ones() -> None:
    learner = wrap(local_views=3)
    images = torch.randint(0, 256, (4, 3, 40, 44), dtype=torch.uint8)
    made = learner.views(images)
    assert [tuple(view.shape) for view in made] == [(4, 3, 32, 32)] * 2 + [(4, 3, 16, 16)] * 3
    assert not torch.equal(made[2], made[3])
    torch.manual_seed(5)
    loss = learner(images)
    torch.manual_seed(5)
    one, two, *small = learner.views(images)
    assert learner(one, two, local_views=small) == loss


def crop_of(view) -> tuple[float, float]:
    return tuple(view[0].flags["scale"])


def test_the_crops_and_the_strengths_are_mulans() -> None:
    learner = wrap()
    assert [crop_of(v) for v in (learner.augment_fn, learner.augment_fn2)] == [(0.25, 1.0)] * 2
    assert crop_of(learner.local_augment_fn) == (0.08, 0.25)
    names = [type(stage).__name__ for stage in learner.local_augment_fn]
    assert "RandomSolarize" not in names
    blur = next(s for s in local_views(96) if type(s).__name__ == "RandomGaussianBlur")
    assert blur.p == 0.5
    assert [crop_of(v) for v in byol_views(32)] == [(0.08, 1.0)] * 2
    names = [type(stage).__name__ for stage in local_views(16, preset="cifar")]
    assert "RandomGaussianBlur" not in names


def test_areas_of_local_crops_are_small() -> None:
    view = local_views(16, jitter=0, grayscale=0, blur=0, flip=0, mean=None, std=None)
    ramp = torch.linspace(0, 1, 256).expand(64, 3, 256, 256).contiguous()
    width = (view(ramp)[..., -1] - view(ramp, params=view._params)[..., 0]).mean((1, 2))
    area = width.square()  # near the share of a square crop
    assert area.min() > 0.03
    assert area.max() < 0.4


@pytest.mark.parametrize(("side", "expected"), [(224, 96), (96, 48), (64, 32), (32, 16)])
def test_the_size_follows_that_of_the_images(side: int, expected: int) -> None:
    learner = BYOL(
        backbone(), side, projection_size=6, projection_hidden_size=8, local_views=1
    )  # fmt: skip
    assert learner.local_augment_fn.image_size == (expected, expected)


def test_local_views_are_normalised_as_the_others() -> None:
    first, second = byol_views(LARGE, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    learner = wrap(augment_fn=first, augment_fn2=second)
    mean, std = learner.local_augment_fn.statistics(3)
    torch.testing.assert_close(mean, torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(std, torch.tensor([0.5, 0.6, 0.7]))
    gray = BYOL(
        timm.create_model("resnet10t", in_chans=1), LARGE, projection_hidden_size=8, local_views=1,
        local_size=SMALL,
    )  # fmt: skip
    assert gray(torch.rand(4, 1, 40, 40)).isfinite()
    own = wrap(augment_fn=lambda x: x, local_augment_fn=lambda x: x[..., :SMALL, :SMALL])
    assert own(torch.rand(4, 3, LARGE, LARGE)).isfinite()
    own.local_augment_fn = local_views(SMALL)  # a module in a function's place
    assert own(torch.rand(4, 3, LARGE, LARGE)).isfinite()


# Ways of running ---------------------------------------------------------------------------------


def test_a_vit_of_several_sizes_goes_and_one_of_a_single_size_is_refused() -> None:
    sizes = {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 8, "img_size": LARGE}
    learner = wrap(timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **sizes))
    assert learner(torch.rand(4, 3, 40, 40)).isfinite()
    with pytest.raises(ValueError, match=r"VisionTransformer fails.*dynamic_img_size=True"):
        wrap(timm.create_model("vit_tiny_patch16_224", **sizes))
    flat = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU(), nn.Flatten())
    with pytest.raises(ValueError, match="gives 16 features of them, and 64"):
        wrap(flat)
    net = backbone()
    before = copy.deepcopy(net.state_dict())
    wrap(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_step_is_one_graph_and_equals_eager() -> None:
    torch._dynamo.reset()
    eager = wrap()
    compiled = copy.deepcopy(eager)
    compiled.compile(fullgraph=True, backend="aot_eager")
    large, small = views()
    losses = [learner(*large, local_views=small) for learner in (eager, compiled)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-5)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(
                a.grad, b.grad, atol=5e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
    images = torch.randint(0, 256, (4, 3, 40, 44), dtype=torch.uint8)
    assert compiled(images).isfinite()


def test_amp_accumulation_copies_and_groups_know_the_second_predictor() -> None:
    learner = wrap()
    images = torch.randint(0, 256, (4, 3, 40, 44), dtype=torch.uint8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = learner(images)
    assert loss.dtype == torch.float32
    loss.backward()
    learner(images).backward()
    assert all(p.grad is not None for p in learner.local_predictor.parameters())
    grouped = [p for group in param_groups(learner, 1e-3) for p in group["params"]]
    assert {id(p) for p in learner.local_predictor.parameters()} <= {id(p) for p in grouped}
    LARS(param_groups(learner, 1e-3), 0.1).step()
    learner.update_moving_average()
    twin = copy.deepcopy(learner)
    torch.manual_seed(1)
    expected = learner(images)
    torch.manual_seed(1)
    assert twin(images) == expected
    other = wrap()
    other.load_state_dict(learner.state_dict())
    for a, b in zip(other.parameters(), learner.parameters(), strict=True):
        assert torch.equal(a, b)
    simsiam = wrap(use_momentum=False)
    assert simsiam(images).isfinite()


def train(rank: int, world: int, how: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/{how}{world}", world_size=world, rank=rank)
    torch.manual_seed(0)
    learner = wrap(backbone(nn.GroupNorm))
    model: nn.Module = learner
    if how == "ddp":
        model = DistributedDataParallel(learner)  # without find_unused_parameters
    elif how == "fsdp":
        fully_shard(learner, mesh=init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.SGD(learner.parameters(), 0.1)
    losses = []
    for step in range(3):
        large, small = ([v.chunk(world)[rank] for v in kind] for kind in views(seed=step))
        loss = model(*large, local_views=small)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learner.update_moving_average()
        total = loss.detach() / world
        dist.all_reduce(total)
        losses.append(total.item())
    if rank == 0:
        torch.save(losses, f"{folder}/{how}{world}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_do_what_one_does_on_the_joint_batch(how: str, tmp_path: Path) -> None:
    for name, world in (("alone", 1), (how, 2)):
        mp.spawn(train, (world, name, str(tmp_path)), nprocs=world)
    alone, together = (torch.load(tmp_path / f"{name}.pt") for name in ("alone1", f"{how}2"))
    assert together == pytest.approx(alone, abs=1e-4)


# What does not fit -------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_in_one_sentence() -> None:
    learner, (large, small) = wrap(), views()
    with pytest.raises(ValueError, match="0 local views came; this learner was built for"):
        learner(*large)
    with pytest.raises(ValueError, match="8 local views came"):
        learner(*large, local_views=small[0])  # a tensor in place of a list
    with pytest.raises(ValueError, match="1 local views came"):
        learner(*large, local_views=small[:1])
    with pytest.raises(ValueError, match="without a second ready view"):
        learner(large[0], local_views=small)
    with pytest.raises(ValueError, match=r"local views are \(32, 32\) pixels.*local_size"):
        learner(*large, local_views=large)
    with pytest.raises(ValueError, match="of 4 images, the two views of 8"):
        learner(*large, local_views=[view[:4] for view in small])
    plain = BYOL(backbone(), LARGE, projection_hidden_size=8)
    with pytest.raises(ValueError, match=r"2 local views came; .* built for local_views=0"):
        plain(*large, local_views=small)
    own = wrap(augment_fn=lambda x: x)
    with pytest.raises(ValueError, match="no default local views"):
        own(torch.rand(4, 3, LARGE, LARGE))
    for options, message in (
        ({"local_views": -1}, "local_views=-1"),
        ({"local_views": True}, "local_views=True"),
        ({"local_views": 0, "local_size": 16}, "local_size came with local_views=0"),
        ({"local_size": 0}, "local_size=0"),
    ):
        with pytest.raises(ValueError, match=message):
            wrap(**options)
    with pytest.raises(TypeError, match="local_augment_fn is a str"):
        wrap(local_augment_fn="crop")
    with pytest.raises(ValueError, match="expected the same of all"):
        wrap(local_augment_fn=local_views(SMALL, mean=(0.0,) * 3, std=(1.0,) * 3))
