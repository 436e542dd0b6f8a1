import copy

import pytest
import torch
from torch import nn

from byol_pytorch import BYOL


def backbone() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    )  # fmt: skip


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum", [True, False])
def test_the_whole_learner_compiles_as_one_graph_and_equals_eager(backend, momentum):
    torch._dynamo.reset()
    eager = BYOL(
        backbone(), 16, projection_size=6, projection_hidden_size=12, use_momentum=momentum
    )
    compiled = copy.deepcopy(eager)
    compiled.compile(fullgraph=True, backend=backend)
    for _ in range(2):
        views = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
        for model in (eager, compiled):
            model.zero_grad()
            model(*views).backward()
            if momentum:
                model.update_moving_average()
        assert compiled(*views).item() == pytest.approx(eager(*views).item(), abs=1e-5)
        for (name, a), b in zip(compiled.named_parameters(), eager.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            if a.grad is not None:
                # A bias before a batch norm has gradient 0, up to the rounding of large sums.
                torch.testing.assert_close(
                    a.grad, b.grad, atol=5e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
                )
    assert compiled.net[5].weight.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_compile_with_the_step_and_do_not_recompile_between_batches(backend):
    torch._dynamo.reset()
    model = BYOL(backbone(), 16, projection_size=6, projection_hidden_size=12)
    model.compile(fullgraph=True, backend=backend)
    images = torch.randint(0, 256, (4, 3, 20, 18), dtype=torch.uint8)
    losses = [model(images)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            loss = model(images)
            loss.backward()
            model.update_moving_average()
            losses.append(loss)
    assert len({loss.item() for loss in losses}) == 4, "every call draws its own views"


def test_a_network_compiled_in_place_is_wrapped_too():
    torch._dynamo.reset()
    net = backbone()
    net.compile(backend="aot_eager")
    model = BYOL(net, 16, projection_size=6, projection_hidden_size=12)
    model(torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)).backward()
    assert model.net[0].weight.grad is not None
    assert model.net[5].weight.grad is None


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("inside", [False, True])
def test_functional_dropout_of_a_compiled_network_is_off_in_the_target(inside):
    torch._dynamo.reset()
    net = nn.Sequential(Noisy(), backbone())
    net.compile(backend="aot_eager", fullgraph=True)
    if inside:
        net = torch.compile(nn.Sequential(Noisy(), backbone()), backend="aot_eager", fullgraph=True)
    model = BYOL(net, 16, projection_size=6, projection_hidden_size=12)
    x = torch.randn(4, 3, 16, 16)
    assert torch.equal(model.target(x), model.target(x))
    assert not model.target.net[0].training
    assert model.target.net[1].training
    assert model.net.training
    assert model.representation(x, normalise=False).shape == (4, 8)


def test_a_network_inside_torch_compile_is_wrapped_too():
    torch._dynamo.reset()
    net = torch.compile(backbone(), backend="aot_eager")
    model = BYOL(net, 16, projection_size=6, projection_hidden_size=12, moving_average_decay=0.5)
    views = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    model(*views).backward()
    assert net._orig_mod[0].weight.grad is not None
    assert set(model.ddp_ignored()) == {"net._orig_mod.5.weight", "net._orig_mod.5.bias"}
    model.update_moving_average()
    assert model.representation(views[0]).shape == (4, 8)
    with torch.no_grad():
        logits = net(views[0])
    assert logits.shape == (4, 5)
