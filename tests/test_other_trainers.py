"""The recipes for Lightning and Accelerate in docs/loops.md, run as they stand there."""

import copy
import functools
import math
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

from byol_pytorch import BYOL

PAGE = Path(__file__).parents[1] / "docs" / "loops.md"
PACKAGES = {"Lightning": "lightning", "Accelerate": "accelerate"}
ACCUMULATING = {
    "Lightning": "accumulate_grad_batches=2",
    "Accelerate": "gradient_accumulation_steps=2",
}
BASE_DECAY, TOTAL_STEPS, BATCHES, WORLD = 0.9, 10, 5, 2
CLASSIFIER = ("net.4.weight", "net.4.bias")

pytestmark = pytest.mark.xdist_group("other trainers")


def recipe(name: str, accumulate: int) -> str:
    """The first block of Python of the section with this name."""
    section = PAGE.read_text().split(f"\n## {name}\n")[1].split("\n## ")[0]
    found = re.search(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert found, f"{PAGE.name} has no recipe for {name}"
    assert found[1].count(ACCUMULATING[name]) == 1
    return found[1].replace(ACCUMULATING[name], ACCUMULATING[name][:-1] + str(accumulate))


def build(seed: int = 0) -> BYOL:
    """Views that nobody draws, and a classifier that gets no gradient."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.GroupNorm(2, 8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 16, 3, 2), nn.GroupNorm(2, 16), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    return BYOL(
        net, 16, projection_size=8, projection_hidden_size=32, moving_average_decay=BASE_DECAY,
        total_steps=TOTAL_STEPS, augment_fn=lambda x: x, augment_fn2=lambda x: x.flip(-1) * 0.5,
    )  # fmt: skip


def images(count: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (4 * count, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return DataLoader(list(pixels), batch_size=4)  # type: ignore[arg-type]


def decay_after(steps: int) -> float:
    return 1 - (1 - BASE_DECAY) * (math.cos(math.pi * steps / TOTAL_STEPS) + 1) / 2


def run(name: str, accumulate: int, learner: BYOL, loader: Any, devices: int) -> dict[str, Any]:
    """The recipe on CPUs and silent, with every loss and the number of optimizer steps."""
    losses: list[torch.Tensor] = []
    steps: list[object] = []
    hooks = (
        learner.register_forward_hook(lambda _, __, loss: losses.append(loss.detach())),
        register_optimizer_step_post_hook(lambda *_: steps.append(1)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        if name == "Lightning":
            import lightning

            quiet = functools.partial(
                lightning.Trainer,
                accelerator="cpu",
                devices=devices,
                strategy="ddp" if devices > 1 else "auto",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            patch.setattr(lightning, "Trainer", quiet)
        names = {"torch": torch, "BYOL": BYOL, "learner": learner, "loader": loader}
        exec(compile(recipe(name, accumulate), PAGE.name, "exec"), names)
    for hook in hooks:
        hook.remove()
    return {"losses": torch.stack(losses), "steps": len(steps)}


def plain(learner: BYOL, loader: Any, accumulate: int) -> None:
    optimizer = torch.optim.AdamW(learner.parameters(), lr=3e-4)
    for number, batch in enumerate(loader, start=1):
        (learner(batch) / accumulate).backward()
        if number % accumulate == 0 or number == BATCHES:
            optimizer.step()
            optimizer.zero_grad()
            learner.update_moving_average()


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    """Accelerate keeps its state for the life of a process."""
    yield
    try:
        from accelerate.state import AcceleratorState, GradientState
    except ImportError:
        return
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", PACKAGES)
def test_the_recipe_equals_the_plain_loop_with_one_ema_update_an_optimizer_step(
    name: str, accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(PACKAGES[name])
    monkeypatch.chdir(tmp_path)
    learner = build()
    before, by_hand = copy.deepcopy(learner.state_dict()), copy.deepcopy(learner)
    done = run(name, accumulate, learner, images(BATCHES), devices=1)
    assert len(done["losses"]) == BATCHES and done["losses"].isfinite().all()
    assert done["steps"] == math.ceil(BATCHES / accumulate)
    assert learner.moving_average_decay == pytest.approx(decay_after(done["steps"]), abs=1e-12)
    plain(by_hand, images(BATCHES), accumulate)
    expected = by_hand.state_dict()
    for key, value in learner.state_dict().items():
        torch.testing.assert_close(value, expected[key], msg=lambda m, k=key: f"{k}: {m}")
    assert not torch.equal(learner.net[0][0].weight, before["net.0.0.weight"])
    assert not torch.equal(learner.target.net[0][0].weight, before["target.net.0.0.weight"])
    assert all(torch.equal(learner.state_dict()[key], before[key]) for key in CLASSIFIER)


def work(rank: int, name: str, port: int, folder: str) -> None:
    os.chdir(folder)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD)}
    os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(WORLD))
    torch.set_num_threads(1)
    learner = build(seed=rank)  # DDP starts both from rank 0's weights
    before = learner.net[0][0].weight.detach().clone()
    result = run(name, 2, learner, images(8), devices=WORLD)
    result["decay"], result["state"] = learner.moving_average_decay, learner.state_dict()
    result |= {"before": before, "classifier_grad": learner.net[4].weight.grad}
    torch.save(result, Path(folder) / f"{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", [pytest.param("Lightning", marks=pytest.mark.slow), "Accelerate"])
def test_two_ranks_end_alike_also_with_a_classifier_that_gets_no_gradient(
    name: str, tmp_path: Path
) -> None:
    pytest.importorskip(PACKAGES[name])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (name, port, str(tmp_path)), nprocs=WORLD)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD))
    for result in (one, two):
        assert len(result["losses"]) == 4 and result["losses"].isfinite().all()
        assert result["steps"] == 2
        assert result["decay"] == pytest.approx(decay_after(2), abs=1e-12)
        assert result["classifier_grad"] is None
    assert not torch.equal(one["losses"], two["losses"])  # each has images of its own
    for key, value in one["state"].items():
        if key not in CLASSIFIER:
            torch.testing.assert_close(two["state"][key], value, rtol=0, atol=0, msg=key)
    assert not torch.equal(one["state"]["net.0.0.weight"], one["before"])
