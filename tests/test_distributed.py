"""Two real processes on gloo must do what one does on the joint batch."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel as DDP

from byol_pytorch import BYOL
from byol_pytorch.heads import BatchNorm, sync_batchnorm

STEPS, BATCH, WORLD = 3, 8, 2
SYNCHRONISED = "with sync_batchnorm, "  # a backbone of batch norms
EAGER = ("ddp", "ddp_wrapper", "fsdp_root", "fsdp_blocks", "fsdp_net")
EAGER += (f"{SYNCHRONISED}ddp", f"{SYNCHRONISED}fsdp_blocks")
COMPILED = ("compiled_ddp", "ddp_of_compiled", "fsdp_root_compiled")
COMPILED += (f"{SYNCHRONISED}compiled_ddp",)
BACKEND = "aot_eager"  # captures the same single graph as inductor, without its code generation


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(2, channels)


def build(norm: Callable[[int], nn.Module] = group_norm) -> BYOL:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2), norm(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 16, 3, 2), norm(16), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    return BYOL(
        net, 16, projection_size=8, projection_hidden_size=32, moving_average_decay=0.9,
        total_steps=10,
    )  # fmt: skip


def views() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    shape = (BATCH, 3, 16, 16)
    return [
        (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
        for _ in range(STEPS)
    ]


class Wrapper(nn.Module):
    """A module around the learner, as a LightningModule is one."""

    def __init__(self, learner: BYOL) -> None:
        super().__init__()
        self.learner = learner
        self._ddp_params_and_buffers_to_ignore = learner.ddp_ignored("learner.")

    def forward(self, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        return self.learner(one, two)


def wrapped(learner: BYOL, how: str) -> nn.Module:
    if how == "ddp":  # buffers that are the same by themselves need no broadcast
        differ = any(isinstance(m, nn.GroupNorm) for m in learner.modules())
        return DDP(learner, broadcast_buffers=differ)
    if how == "ddp_wrapper":
        return DDP(Wrapper(learner))
    if how == "compiled_ddp":
        learner.compile(fullgraph=True, backend=BACKEND)
        return DDP(learner)
    if how == "ddp_of_compiled":
        return DDP(torch.compile(learner, fullgraph=True, backend=BACKEND))
    mesh = init_device_mesh("cpu", (WORLD,))
    if how == "fsdp_blocks":
        for part in (learner.net[0], learner.net[1]):
            fully_shard(part, mesh=mesh)
    if how == "fsdp_net":
        fully_shard(learner.net, mesh=mesh)
        fully_shard(learner.target.net, mesh=mesh)
    fully_shard(learner, mesh=mesh)
    if how == "fsdp_root_compiled":
        learner.compile(fullgraph=True, backend=BACKEND)
    return learner


def train(learner: BYOL, call: nn.Module, rank: int, world: int) -> torch.Tensor:
    optimizer = torch.optim.SGD(learner.parameters(), 0.05, momentum=0.9)
    losses = []
    device = next(learner.parameters()).device
    for one, two in ((a.to(device), b.to(device)) for a, b in views()):
        loss = call(one.chunk(world)[rank], two.chunk(world)[rank])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learner.update_moving_average()
        losses.append(loss.detach())
    return torch.stack(losses)


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def synchronised_norm(channels: int) -> nn.Module:
    return sync_batchnorm(nn.BatchNorm2d(channels))


def scenario(how: str, rank: int) -> dict:
    torch._dynamo.reset()
    learner = build(synchronised_norm if how.startswith(SYNCHRONISED) else group_norm)
    how = how.removeprefix(SYNCHRONISED)
    losses = train(learner, wrapped(learner, how), rank, WORLD)
    dist.all_reduce(losses)
    classifier = learner.net[4].weight
    result = {"losses": losses / WORLD, "classifier_grad": classifier.grad}
    result["state"] = {name: whole(value) for name, value in learner.state_dict().items()}
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    learner.eval()
    with torch.no_grad():
        result["embedding"] = learner(images, return_embedding=True, return_projection=False)
        if how == "fsdp_root":
            register_fsdp_forward_method(learner, "representation")
            result["representation"] = learner.representation(images)
    return result


def batch_norm(rank: int) -> dict:
    """The synchronised norm on ranks with different numbers of rows."""
    norm = BatchNorm(4, sync=None)
    rows = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    mine = rows[:5] if rank == 0 else rows[5:]
    mine = mine.clone().requires_grad_()
    (norm(mine) ** 3).sum().backward()
    return {"grad": mine.grad, "state": norm.state_dict()}


def details(rank: int) -> dict:
    torch.manual_seed(100 + rank)
    learner = build()
    images = torch.rand(1, 3, 16, 16)
    torch.manual_seed(100 + rank)
    one, _ = learner.views(torch.full((4, 3, 16, 16), 0.5) + images[0] * 0)
    single = learner(torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16))
    local = BYOL(build().net, 16, projection_size=8, projection_hidden_size=8, sync_batchnorm=False)
    try:
        local(torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16))
        refused = False
    except ValueError:
        refused = True
    draws = [torch.zeros_like(one) for _ in range(WORLD)]
    dist.all_gather(draws, one)
    return {"draws": draws, "single": single.detach(), "refused": refused}


class Moody(nn.Module):
    """Adds a token in training alone, scales in evaluation alone, and may skip a layer."""

    def __init__(self, skips: bool) -> None:
        super().__init__()
        self.conv, self.skipped = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 1)
        self.token, self.scale = nn.Parameter(torch.zeros(8, 1, 1)), nn.Parameter(torch.ones(8))
        self.fc, self.skips = nn.Linear(8, 10), skips

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x) + self.token if self.training else self.conv(x)
        if not (self.training and self.skips and torch.rand(()) < 0.5):
            x = x + self.skipped(x)
        x = x.mean((2, 3))
        return self.fc(x if self.training else x * self.scale)


def moody(rank: int) -> dict:
    results = {}
    for skips in (False, True):
        torch.manual_seed(0)
        net = Moody(skips)
        torch.manual_seed(rank)  # as a script that seeds each rank does
        learner = BYOL(net, 16, projection_size=8, projection_hidden_size=8)
        call = DDP(learner, find_unused_parameters=skips)
        state = torch.get_rng_state()
        train(learner, call, rank, WORLD)
        results[skips] = {
            "ignored": learner.ddp_ignored(),
            "moved": bool(net.token.abs().sum() > 0),
            "state": {n: p.detach() for n, p in learner.named_parameters()},
            "drew": not torch.equal(state, torch.get_rng_state()),
        }
    return results


def work(rank: int, names: tuple[str, ...], port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    extra = {"batch_norm": batch_norm, "details": details, "moody": moody, "on_cuda": on_cuda}
    results = {n: extra[n](rank) if n in extra else scenario(n, rank) for n in names}
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def run(names: tuple[str, ...], folder: Path) -> list[dict]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(work, (names, port, str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def one_process(norm: Callable[[int], nn.Module]) -> dict:
    learner = build(norm)
    losses = train(learner, learner, 0, 1)
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    learner.eval()
    embedding = learner(images, return_embedding=True, return_projection=False).detach()
    return {"losses": losses, "state": learner.state_dict(), "embedding": embedding}


@pytest.fixture(scope="module")
def alone() -> dict[bool, dict]:
    """By whether the backbone has batch norms."""
    return {False: one_process(group_norm), True: one_process(nn.BatchNorm2d)}


def check_equals_one_process(results: list[dict], how: str, alones: dict[bool, dict]) -> None:
    alone = alones[how.startswith(SYNCHRONISED)]
    for result in (r[how] for r in results):
        torch.testing.assert_close(result["losses"], alone["losses"], atol=1e-5, rtol=1e-5)
        assert set(result["state"]) == set(alone["state"])
        for name, value in alone["state"].items():
            torch.testing.assert_close(
                result["state"][name],
                value,
                atol=2e-5,
                rtol=1e-4,
                msg=lambda m, n=name: f"{n}: {m}",
            )
        torch.testing.assert_close(result["embedding"], alone["embedding"], atol=1e-4, rtol=1e-4)
        assert result["classifier_grad"] is None


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run((*EAGER, "batch_norm", "details", "moody"), tmp_path_factory.mktemp("eager"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run(COMPILED, tmp_path_factory.mktemp("compiled"))


@pytest.mark.xdist_group("two processes")
class TestTwoProcesses:
    @pytest.mark.parametrize("how", EAGER)
    def test_equal_one_process_on_the_joint_batch(self, how, eager, alone):
        check_equals_one_process(eager, how, alone)

    def test_representation_is_one_line_away_under_fsdp(self, eager):
        for result in (r["fsdp_root"] for r in eager):
            torch.testing.assert_close(result["representation"], result["embedding"])

    def test_synchronised_norm_equals_one_norm_over_all_rows(self, eager):
        rows = torch.randn(7, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
        norm = nn.BatchNorm1d(4)
        (norm(rows) ** 3).sum().backward()
        joint = torch.cat([r["batch_norm"]["grad"] for r in eager])
        torch.testing.assert_close(joint, rows.grad, atol=1e-5, rtol=1e-4)
        for result in eager:
            torch.testing.assert_close(result["batch_norm"]["state"], norm.state_dict())

    def test_ranks_draw_different_views(self, eager):
        first, second = eager[0]["details"]["draws"]
        assert (first - second).abs().max() > 1e-3

    def test_a_batch_of_one_is_judged_on_all_ranks_where_norms_are_synchronised(self, eager):
        for result in eager:
            assert result["details"]["single"].isfinite()
            assert result["details"]["refused"]

    @pytest.mark.parametrize("skips", [False, True], ids=["plain", "skips"])
    def test_stay_equal_where_training_and_evaluation_use_different_parameters(self, skips, eager):
        first, second = (r["moody"][skips] for r in eager)
        assert first["ignored"] == ["net.fc.bias", "net.fc.weight", "net.scale"]
        assert first["ignored"] == second["ignored"]
        assert first["moved"] and first["drew"] == skips
        for name, value in first["state"].items():
            torch.testing.assert_close(value, second["state"][name], atol=0, rtol=0, msg=name)


@pytest.mark.xdist_group("two processes compiled")
class TestTwoCompiledProcesses:
    @pytest.mark.parametrize("how", COMPILED)
    def test_equal_one_eager_process_on_the_joint_batch(self, how, compiled, alone):
        check_equals_one_process(compiled, how, alone)


def on_cuda(rank: int) -> dict:
    """A backbone whose batch norms span both ranks, which share one GPU."""
    learner = build(synchronised_norm).cuda()
    losses = train(learner, DDP(learner), rank, WORLD)
    dist.all_reduce(losses)
    state = {name: value.cpu() for name, value in learner.state_dict().items()}
    return {"losses": losses.cpu() / WORLD, "state": state}


@pytest.mark.gpu
def test_a_backbone_with_sync_batchnorm_equals_one_process_on_cuda(tmp_path):
    learner = build(norm=nn.BatchNorm2d).cuda()
    losses = train(learner, learner, 0, 1)
    for result in (r["on_cuda"] for r in run(("on_cuda",), tmp_path)):
        torch.testing.assert_close(result["losses"], losses.cpu(), atol=1e-4, rtol=1e-4)
        for name, value in learner.state_dict().items():
            torch.testing.assert_close(result["state"][name], value.cpu(), atol=1e-3, rtol=1e-3)
