"""On a GPU nothing is read back, copied while others wait, or computed on two devices.

Shown without a GPU, on fake CUDA tensors; numerics are for `pytest -m gpu`.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from absent_gpu_helpers import fake_cuda, give_gradients, to_cuda, why_not
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from byol_pytorch import BYOL
from byol_pytorch.augment import PRESETS, byol_views
from byol_pytorch.evaluation.linear import LinearHeads, accuracy, train_epoch
from byol_pytorch.evaluation.neighbours import search
from byol_pytorch.evaluation.protocols import Protocol
from byol_pytorch.heads import sync_batchnorm
from byol_pytorch.optim import LARS, param_groups

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
SIZE = 32


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    )  # fmt: skip


def transformer() -> nn.Module:
    sizes = {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 8, "img_size": SIZE}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def learner_of(net: nn.Module, **options: Any) -> BYOL:
    return BYOL(net, SIZE, projection_size=8, projection_hidden_size=16, **options)


def uint8(count: int = 4) -> Tensor:
    return torch.randint(0, 256, (count, 3, 40, 44), dtype=torch.uint8, device="cuda")


def floats(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 40, 44, device="cuda")


def ready() -> tuple[Tensor, Tensor]:
    one, two = (torch.randn(4, 3, SIZE, SIZE, device="cuda") for _ in range(2))
    return one, two


@pytest.fixture(autouse=True)
def _autocast_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast for CUDA switches itself off where there is none."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)


# The training step ------------------------------------------------------------------------------

INPUTS: dict[str, Callable[[], tuple[Tensor, ...]]] = {
    "uint8": lambda: (uint8(),),
    "float": lambda: (floats(),),
    "ready views": ready,
}


@pytest.mark.parametrize(
    ("images", "amp", "concatenate"),
    [
        ("uint8", torch.bfloat16, False), ("float", None, False), ("ready views", None, False),
        ("ready views", torch.bfloat16, False), ("ready views", torch.float16, False),
        ("ready views", torch.bfloat16, True), ("uint8", torch.float16, True),
    ],
)  # fmt: skip
def test_the_loss(images: str, amp: torch.dtype | None, concatenate: bool) -> None:
    learner = learner_of(convolutions(), concatenate_views=concatenate)
    dtypes = []
    learner.net[0].register_forward_hook(lambda *values: dtypes.append(values[-1].dtype))
    with fake_cuda() as found:
        to_cuda(learner, torch.channels_last)
        with torch.autocast("cuda", amp) if amp else contextlib.nullcontext():
            loss = learner(*INPUTS[images]())
        assert (loss.device.type, loss.dtype, loss.shape) == ("cuda", torch.float32, ())
    assert set(dtypes) == {amp or torch.float32}
    assert found == []


@pytest.mark.parametrize(
    "options",
    [
        {"use_momentum": False}, {"use_simplicial_embeddings": True},
        {"local_views": 2, "local_size": 16},
    ],
    ids=str,
)  # fmt: skip
def test_the_loss_of_other_learners(options: dict[str, Any]) -> None:
    learner = learner_of(convolutions(), **options)
    with fake_cuda() as found:
        assert to_cuda(learner)(uint8()).device.type == "cuda"
    assert found == []


@pytest.mark.parametrize("optimizer", ["lars", "adamw", "adamw fused", "sgd"])
@pytest.mark.parametrize("make", [convolutions, transformer])
def test_optimizers_and_the_moving_average(optimizer: str, make: Callable[[], nn.Module]) -> None:
    learner = learner_of(make(), total_steps=10)
    with fake_cuda() as found:
        to_cuda(learner, torch.channels_last)
        groups = param_groups(learner, 1e-6)
        opt = {
            "lars": lambda: LARS(groups, 0.2),
            "adamw": lambda: torch.optim.AdamW(groups, 1e-3),
            "adamw fused": lambda: torch.optim.AdamW(groups, 1e-3, fused=True),
            "sgd": lambda: torch.optim.SGD(groups, 0.1, momentum=0.9),
        }[optimizer]()
        for _ in range(2):
            give_gradients(learner)
            opt.step()
            opt.zero_grad()
            learner.update_moving_average()
        held = [t for state in opt.state.values() for t in state.values() if t.ndim]
        assert held and {t.device.type for t in held} == {"cuda"}
    assert found == []


def test_the_moving_average_of_narrow_weights() -> None:
    learner = learner_of(convolutions().to(torch.bfloat16))
    with fake_cuda() as found:
        to_cuda(learner)
        found.clear()  # its float32 copies moved by themselves
        learner(uint8())
        learner.update_moving_average()
        held = [*learner.target.float32.parameters(), *learner.target.float32.buffers()]
        assert {x.device.type for x in held} == {"cuda"}
    assert found == []


@pytest.mark.parametrize("make", [convolutions, transformer])
def test_representations(make: Callable[[], nn.Module]) -> None:
    learner = learner_of(make())
    with fake_cuda() as found:
        to_cuda(learner, torch.channels_last).eval()
        assert learner.representation(uint8()[..., :SIZE, :SIZE]).device.type == "cuda"
        images = floats()[..., :SIZE, :SIZE]
        assert {x.device.type for x in learner(images, return_embedding=True)} == {"cuda"}
    assert found == []


@pytest.fixture
def eight_processes() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    # Known to CUDA alone, so that it tells the shapes of fakes nothing.
    library = torch.library.Library("aten", "IMPL")
    moments = lambda x, *_: tuple(x.new_empty(2, x.shape[1], dtype=torch.float32))  # noqa: E731
    library.impl("batch_norm_update_stats", moments, "Meta")
    yield
    library._destroy()
    dist.destroy_process_group()


def test_the_loss_where_batch_norms_span_processes(eight_processes: None) -> None:
    learner = learner_of(sync_batchnorm(convolutions()))
    with fake_cuda() as found:
        to_cuda(learner, torch.channels_last)
        with torch.autocast("cuda", torch.bfloat16):
            assert learner(uint8()).device.type == "cuda"
    assert found == []


# Views ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [uint8, floats])
def test_views_of_the_learner(make: Callable[[], Tensor]) -> None:
    learner = learner_of(convolutions())
    with fake_cuda() as found:
        to_cuda(learner)
        for view in learner.views(make()):
            assert (view.device.type, tuple(view.shape)) == ("cuda", (4, 3, SIZE, SIZE))
    assert found == []


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("number", [0, 1])
def test_views_of_all_presets(preset: str, number: int) -> None:
    view = byol_views(SIZE, preset)[number]
    with fake_cuda() as found:
        made = view(uint8())
        assert (made.device.type, tuple(made.shape)) == ("cuda", (4, 3, SIZE, SIZE))
    assert found == []


# Evaluation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [True, False], ids=["queries", "leave one out"])
def test_the_search_for_neighbours(apart: bool) -> None:
    with fake_cuda() as found:
        bank, queries = (torch.randn(n, 16, device="cuda") for n in (300, 70))
        cosines, numbers = search(bank, queries if apart else None, 5)
        assert {cosines.device.type, numbers.device.type} == {"cuda"}
    assert found == []


@pytest.mark.parametrize(
    "options", [{}, {"optimizer": "lars"}, {"batch_norm": True, "weight_decay": 1e-4}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_epoch_of_linear_heads_and_their_test(
    options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(loss: Tensor, weights: list[Tensor]) -> list[Tensor]:
        return [torch.empty_like(w) for w in weights]

    monkeypatch.setattr(torch.autograd, "grad", made)
    protocol = Protocol(2, 16, (0.1, 0.2), **options)
    heads = LinearHeads(
        {"a": torch.randn(2, 8, 3, 3), "b": torch.randn(2, 5)}, 10, protocol, dtype=dtype
    )

    def features(images: Tensor) -> dict[str, Tensor]:
        assert images.device.type == "cuda"
        return {"a": torch.randn(16, 8, 3, 3, device="cuda"), "b": images[:, :5, 0, 0]}

    monkeypatch.setattr("byol_pytorch.evaluation.linear._check_range", lambda *_: None)
    with fake_cuda() as found:
        to_cuda(heads)
        batches = [(torch.rand(16, 5, 4, 4), torch.randint(0, 10, (16,))) for _ in range(2)]
        assert train_epoch(heads, features, batches, 0).device.type == "cuda"
        assert found == []
        accuracy(heads, features, batches)  # which reads its result once, at the end
    assert [what.split(" at ")[0] for what in found] == ["_to_copy between cuda and cpu", "cpu"]


# The watch itself -------------------------------------------------------------------------------

HAZARDS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "float": lambda x: float(x.sum()),
    "tolist": lambda x: x[:, 0].tolist(),
    "cpu": lambda x: x.cpu(),
    "to the CPU": lambda x: x.to("cpu"),
    "to CUDA": lambda x: torch.zeros(3).to("cuda"),
    "copy from the CPU": lambda x: x.copy_(torch.zeros(8, 4)),
    "tensor": lambda x: torch.tensor([1, 2], device="cuda"),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "new_tensor of a number": lambda x: x.new_tensor(3.0),
    "nonzero": lambda x: (x > 0).nonzero(),
    "mask": lambda x: x[x[:, 0] > 0],
    "assignment by a mask": lambda x: x.__setitem__(x > 0, 0.0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "index on the CPU": lambda x: x[torch.tensor([1, 2])],
    "list as an index": lambda x: x[[1, 2]],
    "index_copy": lambda x: x.index_copy(0, torch.tensor([1]), x[:1]),
    "two devices": lambda x: x + torch.zeros(4),
    "where": lambda x: torch.where(torch.ones(8, 1, dtype=torch.bool), x, x),
    "equal": lambda x: torch.equal(x, x),
    "unique": lambda x: x.long().unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(x[:, 0].long(), dim=0),
    "svdvals": lambda x: torch.linalg.svdvals(x),
    "multinomial": lambda x: x.abs().multinomial(2),
}  # fmt: skip
HARMLESS: dict[str, Callable[[Tensor], object]] = {
    "number": lambda x: x.clamp(0, 1) + 1,
    "full": lambda x: x.new_full((1,), 8.0) + torch.arange(4, device="cuda"),
    "index": lambda x: x[torch.arange(2, device="cuda")],
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "scalar on the CPU": lambda x: x * torch.ones(()),
    "to CUDA without waiting": lambda x: torch.zeros(3).to("cuda", non_blocking=True),
    "copy without waiting": lambda x: x.copy_(torch.zeros(8, 4), non_blocking=True),
    "random": lambda x: torch.rand(8, device="cuda").argsort() + torch.randperm(8, device="cuda"),
}  # fmt: skip


@pytest.mark.parametrize("name", HAZARDS)
def test_a_hazard_is_caught(name: str) -> None:
    with fake_cuda() as found:
        x = torch.randn(8, 4, device="cuda")
        with contextlib.suppress(RuntimeError, NotImplementedError):
            HAZARDS[name](x)
            assert found, "it ran, and nothing was noted"


@pytest.mark.parametrize("name", HARMLESS)
def test_what_waits_for_nothing_is_let_pass(name: str) -> None:
    with fake_cuda() as found:
        HARMLESS[name](torch.randn(8, 4, device="cuda"))
    assert found == []
