"""The probe in foreign hands: networks that keep state of their own, draw, or train otherwise.

Each network here is a pattern from public code; references are an unwrapped twin, gradients of a
plain backward, or hooks of the test's own.
"""

import copy
import random
import types
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from byol_pytorch import BYOL
from byol_pytorch.backbone.locate import locate
from byol_pytorch.backbone.probe import probe_inputs
from byol_pytorch.optim import param_groups

HEADS = {"projection_size": 4, "projection_hidden_size": 8}


def wrap(net: nn.Module, image_size: Any = 16, **kwargs: Any) -> BYOL:
    return BYOL(net, image_size, **HEADS, **kwargs)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def views(size: int = 16) -> tuple[Tensor, Tensor]:
    return noise(4, 3, size, size, seed=2), noise(4, 3, size, size, seed=3)


class Small(nn.Module):
    """A convolution, batch norm, pooling, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu().mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


# ---- objects stay the same objects ---------------------------------------------------------------


class Giver(nn.Module):
    def __init__(self, info: dict[str, Any]) -> None:
        super().__init__()
        self.conv, self.info = nn.Conv2d(3, 6, 3, padding=1), info

    def forward(self, x: Tensor) -> Tensor:
        self.info["skip"] = x
        return self.conv(x)


class Taker(nn.Module):
    def __init__(self, info: dict[str, Any]) -> None:
        super().__init__()
        self.conv, self.info = nn.Conv2d(9, 6, 3, padding=1), info

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.cat((x, self.info["skip"]), 1)) * self.info["scale"]


class Skipping(nn.Module):
    """Hands a skip connection, and a setting as ToMe's r, through one dict that its blocks hold."""

    def __init__(self) -> None:
        super().__init__()
        self.info: dict[str, Any] = {"scale": 1.0}
        self.down, self.up = Giver(self.info), Taker(self.info)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.up(self.down(x)).mean((2, 3)))


def test_blocks_that_share_a_dict_share_it_after_wrapping():
    net = Skipping()
    twin, info = copy.deepcopy(net), net.info
    learner = wrap(net)
    assert net.info is info and net.down.info is info and net.up.info is info
    assert info == {"scale": 1.0}
    net.info["scale"] = twin.info["scale"] = 3.0
    images = noise(2, 3, 16, 16)
    torch.testing.assert_close(net(images), twin(images))
    learner(*views()).backward()
    target = learner.target.net
    assert target.info is target.down.info is target.up.info is not info


class Settings:
    """A class of the user's own."""

    def __init__(self) -> None:
        self.calls, self.names = 0, ["a"]


class Slotted:
    __slots__ = ("calls", "late", "names")

    def __init__(self) -> None:
        self.calls, self.names = 0, ["a"]


class Options(dict[str, Any]):
    """A dict whose entries are its attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Hoarder(Small):
    """Changes all it holds in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.nested = {"list": [{"deep": {"calls": 0}}, ({"in a tuple": []},)]}
        self.order = OrderedDict(a=1, b=2)
        self.counter, self.names, self.recent = Counter("ab"), {"a"}, deque([1, 2, 3], maxlen=3)
        self.raw, self.options = bytearray(b"abc"), Options(calls=0)
        self.settings, self.slotted = Settings(), Slotted()
        self.space = types.SimpleNamespace(calls=0, names=["a"])
        self.array = np.zeros(3)
        self.bank = {"queue": torch.zeros(4), "list": [torch.ones(2)]}
        self.others = [nn.BatchNorm2d(6)]  # a module outside of the tree
        self.parent = weakref.ref(self.fc)
        self.generator = torch.Generator().manual_seed(5)
        self.numpy, self.python = np.random.default_rng(5), random.Random(5)
        self.calls, self.kept = 0, None
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.nested["list"][0]["deep"]["calls"] += 1
        self.nested["list"][1][0]["in a tuple"].append(x)
        self.nested["list"].append(x)
        self.nested["new"] = self.kept = x
        self.order.move_to_end("a")
        self.counter.update("abc")
        self.names.add("b")
        self.recent.append(4)
        self.raw += b"d"
        self.options["calls"] += 1
        for held in (self.settings, self.slotted, self.space):
            held.calls += 1
            held.names.append("b")
        self.settings.late = self.slotted.late = x
        self.array += 1
        self.bank["queue"].add_(1)
        self.bank["list"][0] = self.bank["list"][0] + 1
        self.others[0].train()(self.conv(x))
        if not hasattr(self, "mask"):
            self.register_buffer("mask", torch.ones(2))
        self.mean = self.mean + 1
        with torch.no_grad():
            self.fc.bias += 1
            self.conv.weight.data = torch.renorm(self.conv.weight.data, 2, 0, 0.1)  # EEGNet
        torch.rand((), generator=self.generator)
        self.numpy.random(), self.python.random(), np.random.random(), random.random()
        return super().forward(x)


ATOMS = (int, float, str, bytes, bool, type(None), weakref.ref)
Look = dict[str, tuple[int, Any]]


def look(x: Any, at: str = "net", seen: set[int] | None = None) -> Look:
    """The identity and value of `x` and of every object in it, by the way that leads there."""
    seen = set() if seen is None else seen
    if isinstance(x, ATOMS):
        return {at: (0, x)}
    if isinstance(x, (torch.Generator, np.random.Generator, random.Random)):
        state = {
            torch.Generator: lambda: x.get_state().tolist(),
            np.random.Generator: lambda: x.bit_generator.state,
            random.Random: lambda: x.getstate(),
        }[type(x)]()
        return {at: (id(x), str(state))}
    if isinstance(x, Tensor):
        value = x.data_ptr(), x.requires_grad, x.is_leaf, x.detach().numpy().tobytes()
        return {at: (id(x), value)}
    if isinstance(x, (np.ndarray, bytearray)):
        return {at: (id(x), x.tobytes() if isinstance(x, np.ndarray) else bytes(x))}
    if id(x) in seen:
        return {at: (id(x), None)}
    seen.add(id(x))
    found: Look = {at: (id(x), type(x).__name__)}
    inner: dict[Any, Any] = {}
    if isinstance(x, dict):
        found[at] = id(x), list(x)
        inner |= {f"[{k!r}]": v for k, v in x.items()}
    elif isinstance(x, set):
        found[at] = id(x), sorted(x)
    elif isinstance(x, (list, tuple, deque)):
        inner |= {f"[{i}]": v for i, v in enumerate(x)}
    if hasattr(x, "__dict__") and not isinstance(x, type):
        inner |= {f".{k}": v for k, v in vars(x).items()}
    for name in getattr(type(x), "__slots__", ()):
        if hasattr(x, name):
            inner[f".{name}"] = getattr(x, name)
    for name, value in inner.items():
        hooks = "hook" in name or name in ("._parameters", "._modules")
        found |= look(value, at + name, seen) if not hooks or value else {}
    return found


def test_every_object_that_a_forward_changes_is_the_same_object_with_its_contents():
    net = Hoarder()
    random.seed(1)
    np.random.seed(1)
    before, states = look(net), (random.getstate(), str(np.random.get_state()))
    assert len(before) > 80
    learner = wrap(net, use_momentum=False)
    assert states == (random.getstate(), str(np.random.get_state()))
    del learner
    after = look(net)
    assert {k: (before.get(k), after.get(k)) for k in before | after
            if before.get(k) != after.get(k)} == {}  # fmt: skip


def test_a_feature_kept_with_its_graph_still_gives_its_gradient():
    class Keeping(Small):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = self.features(x)
            return self.fc(self.kept)

    net = Keeping()
    net(views()[0])
    kept = net.kept
    wrap(net)
    assert net.kept is kept
    kept.square().sum().backward()
    assert net.conv.weight.grad is not None


def counting_hook() -> tuple[Callable[..., None], list[int], Callable[[], int]]:
    seen, calls = [], 0

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal calls
        calls += 1
        seen.append(calls)

    return hook, seen, lambda: calls


class Recorder:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(output)

    def bound(self, module: nn.Module, args: Any) -> None:
        self.seen.append(args[0])


def test_what_the_users_own_hooks_gather_holds_nothing_of_the_probe():
    net = Small()
    hook, seen, calls = counting_hook()
    recorder, other = Recorder(), Recorder()
    net.conv.register_forward_hook(hook)
    net.fc.register_forward_hook(recorder)
    net.fc.register_forward_pre_hook(other.bound)
    learner = wrap(net, use_momentum=False)
    assert (seen, calls(), recorder.seen, other.seen) == ([], 0, [], [])
    learner.representation(views()[0])
    assert (seen, calls(), len(recorder.seen), len(other.seen)) == ([1], 1, 1, 1)


def test_the_users_backward_hooks_do_not_run_in_the_probe():
    net, calls = Small(), []
    net.norm.register_full_backward_hook(lambda *args: calls.append("module"))
    net.conv.weight.register_hook(lambda gradient: calls.append("tensor"))
    learner = wrap(net)
    assert calls == []
    learner(*views()).backward()
    assert {"module", "tensor"} == set(calls)


def test_example_input_that_the_network_changes_in_place_stays_as_it_was():
    class Shifting(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(0.5))

    example = noise(2, 3, 16, 16)
    before = example.clone()
    wrap(Shifting(), None, example_input=example)
    assert torch.equal(example, before)


class MadeLate(nn.Module):
    """Makes its layers in its first forward, without torch's lazy modules."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.late = nn.Conv2d(3, 4, 3), None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.late is None:
            self.late = nn.Conv2d(x.shape[1], 6, 3)
            self.scale = nn.Parameter(torch.ones(6))
        return self.late(x).mean((2, 3)) * self.scale


def test_layers_that_the_first_forward_makes_last_and_train():
    net = MadeLate()
    learner = wrap(net, moving_average_decay=0.5)
    made = net.late
    before = made.weight.detach().clone()
    assert {"net.late.weight", "net.scale"} <= dict(learner.named_parameters()).keys()
    learner(*views()).backward()
    assert net.late is made and made.weight.grad is not None and net.scale.grad is not None
    with torch.no_grad():
        made.weight.add_(1)
    learner.update_moving_average()
    torch.testing.assert_close(learner.target.net.late.weight, before + 0.5)


# ---- what trains in the training forward alone, or at random -------------------------------------


class Masked(Small):
    """Hides the images behind a learned token, in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(3, 1, 1))
        self.calibration = nn.Parameter(torch.ones(6))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def features(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
            hidden = torch.rand(len(x), 1, 1, 1) < 0.3
            return super().features(torch.where(hidden, self.token, x))
        return super().features(x) * self.calibration


def drawn_by_torch(rate: float) -> bool:
    return float(torch.rand(())) < rate


def drawn_by_numpy(rate: float) -> bool:
    return np.random.uniform() < rate


def drawn_by_python(rate: float) -> bool:
    return random.random() < rate


class LayerDrop(nn.Module):
    """Skips layers at random in training (arXiv 1909.11556)."""

    def __init__(self, draw: Callable[[float], bool]) -> None:
        super().__init__()
        self.stem, self.fc, self.draw = nn.Conv2d(3, 6, 3), nn.Linear(6, 5), draw
        self.layers = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            if not self.training or not self.draw(0.5):
                x = x + layer(x)
        return self.fc(x.mean((2, 3)))


class SometimesMasked(Small):
    """Uses its token for half of the batches, in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(3, 1, 1))

    def features(self, x: Tensor) -> Tensor:
        hidden = self.training and drawn_by_torch(0.5)
        return super().features(x + self.token if hidden else x)


RANDOM = {
    "torch": lambda: LayerDrop(drawn_by_torch),
    "numpy": lambda: LayerDrop(drawn_by_numpy),
    "python": lambda: LayerDrop(drawn_by_python),
    "token": SometimesMasked,
}


def with_gradient(learner: BYOL, steps: int = 1) -> set[str]:
    """Names of the parameters that ever got a gradient in training."""
    found = set()
    for _ in range(steps):
        learner.zero_grad()
        learner.train()(*views()).backward()
        found |= {n for n, p in learner.named_parameters() if p.grad is not None}
    return found


def trained(learner: BYOL) -> set[str]:
    """Names of the parameters that the optimizer is given and DDP is to reduce."""
    grouped = {id(p) for group in param_groups(learner, 0.1) for p in group["params"]}
    names = {n for n, p in learner.named_parameters() if id(p) in grouped}
    assert names.isdisjoint(learner.ddp_ignored())
    online = {n for n, p in learner.named_parameters() if p.requires_grad}
    assert names | set(learner.ddp_ignored()) == online
    return names


def test_the_parameters_of_the_training_forward_train_and_those_of_evaluation_do_not():
    net = Masked()
    learner = wrap(net)
    assert learner.ddp_ignored() == ["net.calibration", "net.fc.bias", "net.fc.weight"]
    assert "net.token" in trained(learner) == with_gradient(learner)


@pytest.mark.parametrize("make", RANDOM.values(), ids=RANDOM.keys())
def test_parameters_that_are_used_at_random_train(make):
    learner = wrap(make())
    assert learner.ddp_ignored() == ["net.fc.bias", "net.fc.weight"]
    assert trained(learner) == with_gradient(learner, steps=30)


@pytest.mark.parametrize("make", RANDOM.values(), ids=RANDOM.keys())
def test_what_the_probe_finds_does_not_depend_on_the_random_state(make):
    net = make()
    found = []
    for seed in range(3):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        found.append(wrap(net, use_momentum=False).ddp_ignored())
    assert found[0] == found[1] == found[2]


class Routed(nn.Module):
    """Each image goes to one of two experts, by its brightness."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.dark, self.bright = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        dark = x.mean((1, 2, 3)) < 0.45
        features, out = self.stem(x), x.new_zeros(len(x), 6)
        for expert, rows in ((self.dark, dark), (self.bright, ~dark)):
            if rows.any():
                out[rows] = expert(features[rows]).mean((2, 3))
        return out


def test_an_expert_that_the_first_probe_does_not_choose_trains():
    net = Routed()
    assert wrap(net).ddp_ignored() == []


@pytest.mark.parametrize("make", [Masked, lambda: LayerDrop(drawn_by_torch)])
def test_probing_the_training_forward_leaves_no_trace(make):
    net = make()
    for index, module in enumerate(net.modules()):
        module.training = index % 2 == 0
    before = look(net)
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    states = torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())
    with torch.no_grad():
        heads = [nn.Linear(6, 8), nn.Linear(8, 4, bias=False), nn.Linear(4, 8)]
        heads += [nn.Linear(8, 4, bias=False)]
    expected = torch.get_rng_state().tolist()
    torch.manual_seed(3)
    wrap(net, use_momentum=True)
    assert torch.get_rng_state().tolist() == expected
    assert (random.getstate(), str(np.random.get_state())) == states[1:]
    after = look(net)
    assert [k for k in before | after if before.get(k) != after.get(k)] == []


class NeedsLabels(Small):
    """Refuses to train without labels, as detectors do."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        assert labels is not None or not self.training
        return super().forward(x)


def test_a_network_whose_training_forward_fails_in_the_probe_goes_by_evaluation():
    learner = wrap(NeedsLabels())
    assert learner.ddp_ignored() == ["net.fc.bias", "net.fc.weight"]
    assert learner.eval().representation(views()[0]).shape == (4, 6)


def test_an_example_of_one_image_shows_what_trains_beside_batch_norm():
    class Normed(Masked):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.BatchNorm1d(6)  # refuses to train on one row

        def features(self, x: Tensor) -> Tensor:
            return self.last(super().features(x))

    learner = wrap(Normed(), None, example_input=noise(1, 3, 16, 16))
    assert learner.ddp_ignored() == ["net.calibration", "net.fc.bias", "net.fc.weight"]


class NeedsHeadToTrain(Small):
    def forward(self, x: Tensor) -> Tensor:
        scale = self.fc.weight.norm() if self.training else 1.0
        return self.fc(self.features(x) / scale)


def test_the_target_keeps_a_head_that_the_training_forward_needs():
    learner = wrap(NeedsHeadToTrain())
    assert "target.net.fc.weight" in learner.state_dict()
    assert learner(*views()).isfinite()


# ---- keyword calls -------------------------------------------------------------------------------


class ByKeyword(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(input=self.norm(input=self.conv(input=x)).relu().mean((2, 3)))


def test_auto_finds_a_classifier_that_is_called_by_keyword():
    net = ByKeyword()
    learner = wrap(net)
    images = noise(2, 3, 16, 16)
    found = learner.eval().representation(images, normalise=False)
    torch.testing.assert_close(found, net.features(images))
    assert learner.ddp_ignored() == ["net.fc.bias", "net.fc.weight"]
    learner.train()(*views()).backward()


def test_auto_finds_timms_classifier_that_is_called_by_keyword():
    net = timm.create_model("resnet10t", num_classes=5)
    net.forward_head = types.MethodType(
        lambda self, x, pre_logits=False: (
            self.global_pool(x) if pre_logits else self.fc(input=self.global_pool(x))
        ),
        net,
    )
    images = noise(2, 3, 32, 32)
    learner = wrap(net, 32)
    seen = []
    net.fc.register_forward_pre_hook(lambda m, a, k: seen.append(k["input"]), with_kwargs=True)
    found = learner.eval().representation(images, normalise=False)
    assert len(seen) == 1 and torch.equal(found, seen[0])  # its forward ran, not its methods


class Scaled(nn.Module):
    """A layer whose first argument by keyword is not its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)

    def forward(self, *, scale: float, x: Tensor) -> Tensor:
        return self.conv(x) * scale


def test_a_named_layer_that_is_called_by_keyword_gives_its_output():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = Scaled(), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.body(scale=2.0, x=x).mean((2, 3)))

    net = Net()
    images = noise(2, 3, 16, 16)
    learner = wrap(net, hidden_layer="body").eval()
    expected = net.body(scale=2.0, x=images).mean((2, 3))
    torch.testing.assert_close(learner.representation(images, normalise=False), expected)


# ---- callables that keep what they pool ----------------------------------------------------------


def gem(x: Tensor) -> Tensor:
    return x.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)


def spread(x: Tensor) -> Tensor:
    return x.flatten(2).std(2)


class Recomputing(nn.Module):
    """Two convolutions in one checkpoint, an activation in place behind each."""

    recomputes = False

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
        self.relu = nn.ReLU(inplace=True)

    def body(self, x: Tensor) -> Tensor:
        return self.relu(self.two(self.relu(self.one(x))))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.recomputes else self.body(x)


def gradients(learner: BYOL) -> dict[str, Tensor]:
    learner.zero_grad()
    learner.train()(*views(learner.image_size[0])).backward()
    return {n: p.grad.clone() for n, p in learner.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layer", ["one", "two", -1])
@pytest.mark.parametrize("pool", [gem, spread])
@pytest.mark.parametrize("recomputes", [False, True])
def test_a_callable_that_keeps_tensors_pools_inside_a_checkpoint_and_before_relu(
    pool, layer, recomputes
):
    net = Recomputing()
    net.recomputes = recomputes
    learner = wrap(net, hidden_layer=layer, pool=pool)
    images = noise(2, 3, 16, 16)
    with torch.no_grad():
        one = net.one(images)
        value = {"one": one, "two": net.two(one.relu()), -1: net.two(one.relu()).relu()}[layer]
        found = learner.eval().representation(images, normalise=False)
    torch.testing.assert_close(found, pool(value))
    found = gradients(learner)
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU())
    plain[0].load_state_dict(net.one.state_dict())
    plain[2].load_state_dict(net.two.state_dict())
    reference = wrap(plain, hidden_layer={"one": 0, "two": 2, -1: -1}[layer], pool=pool)
    reference.projector, reference.predictor = learner.projector, learner.predictor
    reference.target.projector = learner.target.projector
    expected = gradients(reference)
    names = {"one": "0", "two": "2"}
    for name, gradient in found.items():
        part = name.split(".")
        key = ".".join([part[0], names.get(part[1], part[1]), *part[2:]])
        torch.testing.assert_close(gradient, expected[key])
    assert len(found) == len(expected) > 4


@pytest.mark.parametrize("layer", ["stages.0.blocks.0", "stages.3.blocks.0"])
def test_a_callable_that_keeps_tensors_pools_under_timms_gradient_checkpointing(layer):
    net = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(4, 4, 8, 8))
    plain = wrap(net, 32, hidden_layer=layer, pool=gem)
    other = copy.deepcopy(plain)
    other.net.set_grad_checkpointing()
    expected = gradients(plain)
    for found in (gradients(other), gradients(wrapped_again(other, layer, gem))):
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name])


def wrapped_again(learner: BYOL, layer: str, pool: Any) -> BYOL:
    """The learner built on the network whose checkpointing is already on."""
    again = wrap(learner.net, 32, hidden_layer=layer, pool=pool)
    again.projector, again.predictor = learner.projector, learner.predictor
    again.target.projector = learner.target.projector
    return again


def test_a_callable_takes_apart_what_a_layer_gives_and_later_changes():
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3)

        def forward(self, x: Tensor) -> dict[str, Any]:
            y = self.conv(x)
            return {"maps": [y, y * 2], "size": 14}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = Pyramid(), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            maps = self.body(x)["maps"]
            return self.fc(maps.pop().relu_().mean((2, 3)) + maps.pop().relu_().mean((2, 3)))

    net = Net()
    learner = wrap(net, hidden_layer="body", pool=lambda out: spread(out["maps"][1]))
    images = noise(2, 3, 16, 16)
    expected = spread(net.body.conv(images) * 2)
    torch.testing.assert_close(learner.eval().representation(images, normalise=False), expected)
    learner.train()(*views()).backward()


# ---- defaults of torch around the construction ---------------------------------------------------


@pytest.fixture
def default_dtype() -> Iterator[Callable[[torch.dtype], None]]:
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_probe_is_the_same_under_another_default_dtype(dtype, default_dtype):
    seen: list[Tensor] = []

    class Watching(Small):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return super().forward(x)

    net = Watching()
    wrap(net, use_momentum=False)
    expected = list(seen)
    seen.clear()
    default_dtype(dtype)
    wrap(net, use_momentum=False)
    assert len(seen) == len(expected) > 1
    assert all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(seen, expected, strict=True)
    )


def test_the_probe_runs_on_the_networks_device_whatever_the_default_is():
    net = LayerDrop(drawn_by_python)
    expected = locate(net, probe_inputs(net, (16, 16), None), "auto", "auto")
    with torch.device("meta"):
        found = locate(net, probe_inputs(net, (16, 16), None), "auto", "auto")
    assert repr(found.place) == repr(expected.place)
    assert found.unreached == expected.unreached
    torch.testing.assert_close(found.probe, expected.probe)


def test_autocast_around_the_construction_makes_no_narrow_heads():
    net = Small()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        learner = wrap(net)
    assert {p.dtype for p in learner.parameters()} == {torch.float32}


# ---- inputs of integers --------------------------------------------------------------------------


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.fc = nn.Embedding(50, 6), nn.Linear(6, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.words(ids).mean(1))


INTEGERS = {
    "constant": torch.zeros(2, 7, dtype=torch.int64),
    "one row": torch.arange(7)[None],
    "one constant row": torch.ones(1, 7, dtype=torch.int32),
}


@pytest.mark.parametrize("example", INTEGERS.values(), ids=INTEGERS.keys())
def test_an_example_of_integers_that_do_not_differ_is_taken(example):
    learner = wrap(Words(), None, example_input=example)
    ids = (noise(4, 7) * 50).long()
    learner(ids, ids.flip(1)).backward()
    assert learner.net.words.weight.grad is not None


def test_one_image_that_is_rounded_is_taken():
    class Rounding(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x.detach() * 255).round() / 255)

    learner = wrap(Rounding(), None, example_input=noise(1, 3, 16, 16))
    learner(*views()).backward()


class Blind(Words):
    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.words(torch.zeros_like(ids)).mean(1))


class BlindToImages(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.ones_like(x))


@pytest.mark.parametrize(
    ("make", "example"),
    [
        (Blind, torch.arange(14).view(2, 7)),
        (BlindToImages, noise(2, 3, 16, 16)),
        (BlindToImages, noise(1, 3, 16, 16)),
    ],
)
def test_what_does_not_depend_on_inputs_that_differ_is_refused(make, example):
    with pytest.raises(ValueError, match="does not depend on the images"):
        wrap(make(), None, example_input=example)
