"""Finding and reading the representation: what "auto" and named layers give, without a trace.

References are written here: timm's public methods, hooks of the test's own, and what the
classification models of transformers feed to their classifiers.
"""

import copy
import gc
import io
import pickle
import threading
import weakref
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from byol_pytorch import BYOL

HEADS = {"projection_size": 4, "projection_hidden_size": 8}


def wrap(net: nn.Module, image_size: Any = 32, **kwargs: Any) -> BYOL:
    return BYOL(net, image_size, **HEADS, **kwargs)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def seen_by(layer: nn.Module, net: nn.Module, *args: Any, side: str = "input", **kw: Any) -> Any:
    """What `layer` gets or gives in net(*args, **kw), copied at once, in evaluation mode."""
    kept = []
    handle = layer.register_forward_hook(
        lambda m, i, o: kept.append(i[0] if side == "input" else o)
    )
    copies = layer.register_forward_hook(lambda m, i, o: kept.append(copy.deepcopy(kept.pop())))
    with torch.no_grad():
        net.eval()(*args, **kw)
    handle.remove()
    copies.remove()
    assert len(kept) == 1
    return kept[0]


def read(learner: BYOL, images: Any) -> Tensor:
    with torch.no_grad():
        return learner.eval().representation(images, normalise=False)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Small(nn.Module):
    """A convolution, batch norm, pooling, and a classifier."""

    def __init__(self, channels: int = 3, width: int = 6, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.pool(self.relu(self.norm(self.conv(x)))).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


# ---- "auto" ------------------------------------------------------------------------------------

SWIN = {"window_size": 7, "depths": (1, 1), "embed_dim": 24, "num_heads": (1, 2)}
TIMM = [
    ("resnet10t", {"num_classes": 10}, 32),
    ("resnet10t", {"num_classes": 0}, 32),
    ("resnet10t", {"num_classes": 0, "global_pool": "max"}, 32),
    ("resnet10t", {"global_pool": "catavgmax"}, 32),
    ("resnet10t", {"num_classes": 0, "in_chans": 1, "global_pool": "avgmax"}, 32),
    ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}, 32),
    ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "global_pool": "avg"}, 32),
    ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "num_classes": 0}, 32),
    ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "global_pool": "map"}, 32),
    ("swin_tiny_patch4_window7_224", {"img_size": 56, **SWIN}, 56),
    ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 2}, 28),
    ("convnext_atto", {}, 32),
    ("mobilenetv3_small_050", {}, 32),
    ("tf_efficientnetv2_b0", {}, 32),
    ("efficientnet_b0", {"num_classes": 0}, 32),
    ("densenet121", {}, 32),
    pytest.param("vgg11", {}, 32, marks=pytest.mark.slow),
    ("crossvit_tiny_240", {"depth": [[1, 1, 0]]}, 240),
    ("sequencer2d_s", {"img_size": 32, "layers": [1, 1, 1, 1]}, 32),
    ("levit_128s", {"depth": (1, 1, 1)}, 224),
    ("efficientvit_m0", {}, 224),  # a batch norm before its classifier
    ("efficientformer_l1", {}, 224),
    ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 2}, 32),
    ("pit_ti_distilled_224", {"depth": (1, 1, 1)}, 224),
]


@pytest.mark.parametrize(("model", "kwargs", "size"), TIMM)
def test_auto_is_timms_pooled_feature(model, kwargs, size):
    net = timm.create_model(model, **kwargs)
    images = noise(2, kwargs.get("in_chans", 3), size, size)
    learner = wrap(net, size)
    with torch.no_grad():
        expected = net.eval().forward_head(net.forward_features(images), pre_logits=True)
    assert expected.ndim == 2
    assert_equal(read(learner, images), expected)


def test_auto_is_timms_methods_where_the_classifier_gets_something_else():
    net = timm.create_model("resnet10t")
    net.fc.register_forward_pre_hook(lambda module, args: (args[0].cos(),))
    images = noise(2, 3, 32, 32)
    expected = net.eval().forward_features(images).detach().mean((2, 3))
    torch.testing.assert_close(read(wrap(net), images), expected)


def test_auto_of_timm_without_pooling_is_the_spatial_mean_of_the_feature_map():
    net = timm.create_model("resnet10t", num_classes=0, global_pool="")
    images = noise(2, 3, 64, 64)
    torch.testing.assert_close(read(wrap(net, 64), images), net(images).detach().mean((2, 3)))


def torchvision_net(name: str) -> nn.Module:
    if name == "vit":
        return torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=5)
    if name == "swin":
        return torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [1, 2], [4, 4], num_classes=5)
    kwargs = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return getattr(torchvision.models, name)(num_classes=5, **kwargs)


TORCHVISION = [
    ("resnet18", "fc", 32),
    ("squeezenet1_1", "classifier.1", 64),
    ("mobilenet_v2", "classifier.1", 32),
    ("mobilenet_v3_small", "classifier.3", 32),
    ("vit", "heads.head", 32),
    ("swin", "head", 32),
    ("googlenet", "fc", 64),
    pytest.param("convnext_tiny", "classifier.2", 32, marks=pytest.mark.slow),
    pytest.param("efficientnet_b0", "classifier.1", 32, marks=pytest.mark.slow),
    pytest.param("vgg11", "classifier.6", 32, marks=pytest.mark.slow),
    pytest.param("alexnet", "classifier.6", 64, marks=pytest.mark.slow),
    pytest.param("inception_v3", "fc", 75, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("model", "classifier", "size"), TORCHVISION)
def test_auto_is_what_torchvisions_classifier_gets(model, classifier, size):
    net = torchvision_net(model)
    images = noise(2, 3, size, size)
    expected = seen_by(net.get_submodule(classifier), net, images)
    if expected.ndim == 4:  # SqueezeNet classifies by a convolution
        expected = expected.mean((2, 3))
    torch.testing.assert_close(read(wrap(net, size), images), expected, rtol=1e-6, atol=1e-7)


def test_auxiliary_classifiers_of_googlenet_in_training_are_not_the_representation():
    net = torchvision_net("googlenet")
    learner = wrap(net, 64)
    net.train()
    net.dropout.p = 0.0
    kept: list[Tensor] = []
    net.fc.register_forward_pre_hook(lambda module, args: kept.append(args[0].detach().clone()))
    found = learner.representation(noise(4, 3, 64, 64))
    assert_equal(found.detach(), kept[0])
    ignored = learner.ddp_ignored()
    assert {"net.fc.weight", "net.aux1.fc1.weight", "net.aux2.conv.conv.weight"} <= set(ignored)
    assert all(name.startswith(("net.fc.", "net.aux1.", "net.aux2.")) for name in ignored)


@pytest.mark.parametrize("placeholder", [nn.Identity, nn.Sequential])
def test_a_resnet_whose_fc_was_replaced_gives_the_same_feature(placeholder):
    net = torchvision.models.resnet18(num_classes=5)
    images = noise(2, 3, 32, 32)
    expected = seen_by(net.fc, net, images)
    net.fc = placeholder()
    learner = wrap(net)
    assert_equal(read(learner, images), expected)
    assert learner.ddp_ignored() == []


class Headless(torchvision.models.ResNet):
    """A user's own: its classifier is there, but forward stops at the pooled feature."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.avgpool(self.layer4(self.layer3(self.layer2(self.layer1(x))))).flatten(1)


def test_auto_of_a_torchvision_subclass_without_a_head_is_its_output():
    net = Headless(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    images = noise(2, 3, 32, 32)
    assert_equal(read(wrap(net), images), net(images).detach())


VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT |= {"intermediate_size": 32, "image_size": 32, "patch_size": 8}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
FOUR = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}
NECK = {"neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 64], "hidden_sizes": [16, 24, 32]}
WINDOWS = {"patch_size": 4, "embed_dim": 8, "num_heads": [1, 2], "window_size": 4}
HUGGING_FACE = {
    "ViT": VIT,
    "DeiT": VIT,
    "Dinov2": VIT | {"mlp_ratio": 2},
    "Dinov2WithRegisters": VIT | {"mlp_ratio": 2},
    "Beit": VIT,
    "Swin": WINDOWS | {"image_size": 32, "depths": [1, 1]},
    "ConvNext": STAGES | {"num_stages": 2},
    "ResNet": STAGES | {"embedding_size": 8, "layer_type": "basic"},
    "RegNet": STAGES | {"embedding_size": 8, "groups_width": 4},
    "MobileViT": NECK | {"num_attention_heads": 2},
    "PvtV2": FOUR | {"image_size": 32},
    "Segformer": FOUR | {"decoder_hidden_size": 8},
    "TextNet": {"hidden_sizes": [8, 8, 8, 16, 16], "stem_out_channels": 8},
    "CLIP": VIT,
    "Siglip": VIT,
}


def hugging_face(name: str) -> tuple[nn.Module, nn.Module]:
    """A base vision model and a classification model with the same weights."""
    of_text_and_vision = name in ("CLIP", "Siglip")
    kwargs = {"vision_config": VIT} if of_text_and_vision else HUGGING_FACE[name]
    config = getattr(transformers, f"{name}Config")(num_labels=3, **kwargs)
    classifies = getattr(transformers, f"{name}ForImageClassification")(config)
    if of_text_and_vision:
        base = getattr(transformers, f"{name}VisionModel")(config.vision_config)
        weights = classifies.vision_model.state_dict()
    else:
        base = getattr(transformers, f"{name}Model")(config)
        weights = classifies.base_model.state_dict()
    # A pooler that only the base model has may keep its own weights; nothing else may.
    missing, unexpected = base.load_state_dict(weights, strict=False)
    assert not unexpected and all(key.startswith("pooler.") for key in missing)
    return base, classifies


@pytest.mark.parametrize("kind", ["base", "classification"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_auto_is_what_the_hugging_face_classifier_gets(name, kind):
    base, classifies = hugging_face(name)
    classifier = [m for m in classifies.modules() if isinstance(m, nn.Linear)][-1]
    assert classifier.out_features == 3
    size = 64 if name == "MobileViT" else 32
    images = noise(2, 3, size, size)
    expected = seen_by(classifier, classifies, pixel_values=images)
    learner = wrap(base if kind == "base" else classifies, size)
    assert_equal(read(learner, images), expected)
    assert learner(images, noise(2, 3, size, size, seed=2)).isfinite()


@pytest.mark.parametrize(
    ("end", "taken"),
    [
        ((nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3)), 5),
        ((), 3),
        ((nn.Linear(6, 7), nn.ReLU()), 5),
    ],
    ids=["last linear", "pooled", "last relu"],
)
def test_auto_of_a_plain_network_is_the_input_of_a_last_linear_else_its_output(end, taken):
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *end)
    images = noise(2, 3, 16, 16)
    assert_equal(read(wrap(net, 16), images), net[:taken](images).detach())


def test_auto_of_a_network_that_gives_a_feature_map_is_its_spatial_mean():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    images = noise(2, 3, 16, 16)
    found = read(wrap(net, 16), images)
    torch.testing.assert_close(found, net(images).mean((2, 3)).detach())


# ---- named layers and pooling --------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["pool", -2, 3])
def test_a_layer_is_named_by_its_path_or_its_index_among_the_children(layer):
    net = Small()
    images = noise(2, 3, 16, 16)
    expected = seen_by(net.pool, net, images, side="output").flatten(1)
    torch.testing.assert_close(read(wrap(net, 16, hidden_layer=layer), images), expected)


def test_minus_two_of_a_resnet_is_its_pooled_feature_as_in_byol_pytorch_0_9_1():
    net = torchvision.models.resnet18()
    images = noise(2, 3, 32, 32)
    expected = seen_by(net.fc, net, images)
    torch.testing.assert_close(read(wrap(net, hidden_layer=-2), images), expected)


def test_minus_one_is_the_networks_own_output():
    net = Small()
    images = noise(2, 3, 16, 16)
    learner = wrap(net, 16, hidden_layer=-1)
    expected = net.eval()(images).detach()
    assert_equal(read(learner, images), expected)
    assert learner.ddp_ignored() == []


@pytest.mark.parametrize("end", ["blocks.1", "norm"])
@pytest.mark.parametrize("pool", ["mean", "cls", lambda tokens: tokens[:, 1:].amax(1)])
def test_pool_says_how_tokens_become_one_vector(pool, end):
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    images = noise(2, 3, 32, 32)
    tokens = seen_by(net.get_submodule(end), net, images, side="output")
    expected = {"mean": tokens.mean(1), "cls": tokens[:, 0]}.get(pool, tokens[:, 1:].amax(1))
    assert_equal(read(wrap(net, hidden_layer=end, pool=pool), images), expected)


@pytest.mark.parametrize("pool", ["auto", "mean"])
@pytest.mark.parametrize("layer", ["layers.0", "layers.1", "norm"])
def test_a_swin_stage_is_pooled_over_height_and_width_its_channels_last(layer, pool):
    net = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, num_classes=5, **SWIN)
    images = noise(2, 3, 56, 56)
    stage = seen_by(net.get_submodule(layer), net, images, side="output")
    width = {"layers.0": 24, "layers.1": 48, "norm": 48}[layer]
    assert stage.ndim == 4 and stage.shape[-1] == width
    found = read(wrap(net, 56, hidden_layer=layer, pool=pool), images)
    torch.testing.assert_close(found, stage.mean((1, 2)))


def test_a_convnext_stage_is_pooled_over_height_and_width_its_channels_first():
    net = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))
    images = noise(2, 3, 64, 64)
    stage = seen_by(net.stages[2], net, images, side="output")
    assert stage.shape[1] == 16
    found = read(wrap(net, 64, hidden_layer="stages.2"), images)
    torch.testing.assert_close(found, stage.mean((2, 3)))


def test_a_callable_settles_a_map_as_wide_as_its_channels():
    net = Small(width=8)
    images = noise(2, 3, 8, 8)
    expected = seen_by(net.conv, net, images, side="output").mean((2, 3))
    learner = wrap(net, 8, hidden_layer="conv", pool=lambda x: x.mean((2, 3)))
    assert_equal(read(learner, images), expected)


def test_concatenated_branches_are_never_pooled_over_their_channels():
    net = torchvision.models.shufflenet_v2_x0_5()
    images = noise(2, 3, 192, 192)
    stage = seen_by(net.stage2, net, images, side="output")
    assert stage.shape == (2, 48, 24, 24)  # the last layer with weights gives 24 of the 48
    try:
        learner = wrap(net, 192, hidden_layer="stage2")
    except ValueError:
        return  # refused: honest as well
    torch.testing.assert_close(read(learner, images), stage.mean((2, 3)))


@pytest.mark.parametrize("layer", [0, 4])
def test_a_layer_before_an_in_place_activation_gives_its_own_output(layer):
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1))
    net += nn.Sequential(nn.Flatten(), nn.Linear(6, 6), nn.ReLU(inplace=True))
    images = noise(2, 3, 12, 12)
    expected = seen_by(net[layer], net, images, side="output")
    assert bool((expected < 0).any())
    found = read(wrap(net, 12, hidden_layer=layer), images)
    torch.testing.assert_close(found, expected.mean((2, 3)) if layer == 0 else expected)


# ---- no trace ------------------------------------------------------------------------------------


class Busy(Small):
    """Changes attributes and buffers of its own in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.history, self.cache = 0, [], {}
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("latest", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.history.append(self.calls)
        self.cache[self.calls] = self.feature = x
        self.count.add_(1)
        self.latest = x.detach().mean((1, 2, 3))
        return super().forward(x)


def everything(net: nn.Module) -> dict[Any, Any]:
    """Every parameter, gradient, buffer, mode and attribute, as values that == compares."""

    def plain(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.dtype, x.shape, x.detach().numpy().tobytes()
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        return [plain(v) for v in x] if isinstance(x, list) else x

    found = {("state", k): plain(v) for k, v in net.state_dict().items()}
    for name, p in net.named_parameters():
        found["parameter", name] = id(p), p.data_ptr(), p.requires_grad, plain(p.grad)
    for name, module in net.named_modules():
        found["buffers", name] = {k: (id(b), plain(b)) for k, b in module.named_buffers()}
        attributes = {k: plain(v) for k, v in vars(module).items() if not k.startswith("_")}
        found["attributes", name] = attributes  # `training` is one of them
    return found


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (Busy, 16),
        (lambda: timm.create_model("resnet10t", drop_rate=0.5), 32),
        (lambda: timm.create_model("levit_128s", depth=(1, 1, 1)), 224),
    ],
    ids=["busy", "resnet", "levit"],
)
def test_wrapping_leaves_every_tensor_mode_and_attribute_as_it_was(make, size):
    net = make()
    net(noise(4, 3, size, size)).sum().backward()
    parameters = list(net.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = None
    for index, module in enumerate(net.modules()):
        module.training = index % 3 == 0
    before = everything(net)
    wrap(net, size)
    after = everything(net)
    assert [k for k in before.keys() | after.keys() if before.get(k) != after.get(k)] == []


@pytest.mark.parametrize("model", ["resnet10t", "vit_tiny_patch16_224"])
def test_the_random_state_moves_only_by_what_initialising_the_heads_draws(model):
    kwargs = {"img_size": 32, "depth": 2} if model.startswith("vit") else {}
    net = timm.create_model(model, drop_rate=0.5, **kwargs)
    torch.manual_seed(3)
    learner = wrap(net)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    shapes = ((net.num_features, 8, True), (8, 4, False), (4, 8, True), (8, 4, False))
    heads = [nn.Linear(i, o, bias=bias) for i, o, bias in shapes]
    assert torch.equal(torch.get_rng_state(), state)
    made = [m for h in (learner.projector, learner.predictor) for m in h if type(m) is nn.Linear]
    assert all(torch.equal(m.weight, h.weight) for m, h in zip(made, heads, strict=True))


# ---- the tap -------------------------------------------------------------------------------------


def views(size: int = 16) -> tuple[Tensor, Tensor]:
    return noise(4, 3, size, size, seed=2), noise(4, 3, size, size, seed=3)


def saved(module: nn.Module) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return buffer


def hook_count(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def test_saving_or_copying_the_network_takes_no_learner_along():
    net = Small()
    before = len(saved(net).getvalue())
    learner = wrap(net, 16)
    learner.lock = threading.Lock()  # can be neither copied nor pickled
    learner(*views()).backward()
    assert len(saved(net).getvalue()) - before < 1000
    twin = copy.deepcopy(net)
    gone = weakref.ref(learner)
    del learner
    gc.collect()
    assert gone() is None
    assert_equal(twin.eval()(views()[0]), net.eval()(views()[0]))


@pytest.mark.parametrize("layer", ["auto", "pool", -1])
def test_a_wrapped_network_is_pickled_as_it_was_and_copied_without_hooks(layer):
    net = Small()
    before = pickle.dumps(net)
    learner = wrap(net, 16, hidden_layer=layer)
    assert pickle.dumps(net) == before
    learner(*views()).backward()
    assert hook_count(copy.deepcopy(net)) == 0 < hook_count(net)
    assert hook_count(learner.target.net) > 0
    assert b"byol_pytorch" not in saved(net).getvalue()


def test_the_networks_own_hooks_are_copied_and_can_be_removed():
    net = Small()
    first = net.fc.register_forward_pre_hook(own_pre_hook)
    learner = wrap(net, 16)
    second = net.conv.register_forward_hook(own_hook)
    third = net.register_forward_hook(own_hook)
    twin = copy.deepcopy(net)
    assert list(twin.conv._forward_hooks.values()) == [own_hook]
    assert list(twin._forward_hooks.values()) == [own_hook]
    assert own_pre_hook in twin.fc._forward_pre_hooks.values()
    assert_equal(pickle.loads(pickle.dumps(net))(views()[0]), net(views()[0]))
    assert net(views()[0]).abs().sum() == 0
    for handle in (first, second, third):
        handle.remove()
    assert net(views()[0]).abs().sum() > 0
    assert read(learner, views()[0]).isfinite().all()


def own_pre_hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] + 1,)


def own_hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output * 0


CAPTURES = {
    "jit.script": lambda net, x: torch.jit.script(net),
    "jit.trace": lambda net, x: torch.jit.trace(net, x),
    "fx": lambda net, x: torch.fx.symbolic_trace(net),
    "export": lambda net, x: torch.export.export(net, (x,), strict=False).module(),
    "strict export": lambda net, x: torch.export.export(net, (x,), strict=True).module(),
}


@pytest.mark.parametrize("capture", CAPTURES.values(), ids=CAPTURES.keys())
@pytest.mark.parametrize("layer", ["auto", "pool", -1])
def test_a_wrapped_network_is_captured_as_an_unwrapped_one(capture, layer):
    if capture is CAPTURES["strict export"] and torch.__version__ < (2, 14):
        pytest.skip("older torch's strict export takes a hooked network for two graphs")
    net = Small().eval()
    images = views()[0]
    expected = net(images)
    learner = wrap(net, 16, hidden_layer=layer)
    before = read(learner, images)
    captured = capture(net, images)
    torch.testing.assert_close(captured(images), expected)
    assert_equal(read(learner, images), before)
    assert "byol" not in str(getattr(captured, "graph", "")).lower()


class Meeting(Small):
    """Waits once in its forward for what another thread does meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: threading.Event | None = None

    def features(self, x: Tensor) -> Tensor:
        found = super().features(x)
        if (inside := self.inside) is not None:
            self.inside = None
            inside.set()
            self.outside.wait(0.3)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> "Meeting":
        twin = Meeting()
        twin.load_state_dict(self.state_dict())
        return twin


@pytest.mark.parametrize("call", ["net", "learner"])
@pytest.mark.parametrize("layer", ["auto", "pool"])
def test_what_another_thread_calls_meanwhile_changes_neither_result(call, layer):
    net = Meeting()
    learner = wrap(net, 16, hidden_layer=layer).eval()
    one, two = views()

    def other() -> Tensor:
        return net(two).detach() if call == "net" else read(learner, two)

    expected = read(learner, one), other()
    inside, net.outside, found = threading.Event(), threading.Event(), []

    def run() -> None:
        inside.wait()
        try:
            found.append(other())
        finally:
            net.outside.set()

    net.inside = inside
    thread = threading.Thread(target=run)
    thread.start()
    mine = read(learner, one)
    thread.join()
    assert_equal(mine, expected[0])
    assert_equal(found[0], expected[1])


@pytest.mark.parametrize("layer", ["auto", "conv", -1])
def test_the_networks_own_call_gives_its_logits_and_keeps_nothing(layer):
    net = Small().eval()
    images = views()[0]
    expected = net(images)
    learner = wrap(net, 16, hidden_layer=layer, pool="mean" if layer == "conv" else "auto")
    kept: list[Any] = []
    for module in (net.conv, net.pool, net.fc):
        module.register_forward_hook(lambda m, i, o: kept.append(weakref.ref(o)))
    learner.representation(images)
    assert len(kept) == 3 and all(ref() is None for ref in kept)
    assert_equal(net(images), expected)
    assert len(kept) == 6 and all(ref() is None for ref in kept)


def test_two_learners_on_one_network_are_independent():
    net = Small()
    a, b = wrap(net, 16, hidden_layer="pool"), wrap(net, 16, hidden_layer=-1)
    alone = [copy.deepcopy(a), copy.deepcopy(b)]
    expected = torch.zeros_like(net.conv.weight)
    for learner in alone:
        learner(*views()).backward()
        expected += learner.net.conv.weight.grad
    losses = a(*views()), b(*views())
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(net.conv.weight.grad, expected)
    assert read(a, views()[0]).shape == (4, 6) and read(b, views()[0]).shape == (4, 5)
    del a
    gc.collect()
    assert_equal(read(b, views()[0]), net(views()[0]).detach())


@pytest.mark.parametrize("layer", ["auto", "pool", -1])
def test_the_hooks_go_with_the_learner(layer):
    net = Small()
    learner = wrap(net, 16, hidden_layer=layer)
    learner(*views()).backward()
    assert hook_count(net) > 0
    learner.reset_moving_average()
    del learner
    gc.collect()
    assert hook_count(net) == 0


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda learner: pickle.loads(pickle.dumps(learner)),
    "torch.save": lambda learner: torch.load(saved(learner), weights_only=False),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("layer", ["auto", "pool"])
def test_a_copied_learner_reads_its_own_network(copied, layer):
    learner = wrap(Small(), 16, hidden_layer=layer)
    learner(*views()).backward()
    twin = copied(learner)
    expected = read(learner, views()[0])
    loss = learner.train()(*views()).item()
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.zero_()
    del learner
    gc.collect()
    assert_equal(read(twin, views()[0]), expected)
    assert twin.train()(*views()).item() == loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_cast_learner_reads_in_its_dtype(dtype):
    learner = wrap(Small(), 16)
    expected = read(learner, views()[0])
    learner.to(dtype)
    found = read(learner, views()[0])
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.03, atol=0.03)
    learner.train()(*views()).backward()
    assert learner.net.conv.weight.grad.dtype == dtype


class Checkpointed(Small):
    """Recomputes all up to its pooling in the backward pass."""

    recomputes = False

    def forward(self, x: Tensor) -> Tensor:
        if self.recomputes:
            return self.fc(checkpoint(self.features, x, use_reentrant=False))
        return super().forward(x)


@pytest.mark.parametrize("layer", ["auto", "pool", "relu"])
def test_gradient_checkpointing_around_the_tap_changes_no_gradient(layer):
    plainly = wrap(Checkpointed(), 16, hidden_layer=layer)
    recomputing = copy.deepcopy(plainly)
    recomputing.net.recomputes = True
    for learner in (plainly, recomputing):
        learner(*views()).backward()
    for one, two in zip(plainly.parameters(), recomputing.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        assert one.grad is None or torch.equal(one.grad, two.grad)


def test_sync_batchnorm_conversion_beside_the_tap_changes_nothing():
    net = Small()
    learner = wrap(net, 16)
    expected = read(learner, views()[0])
    nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert isinstance(net.norm, nn.SyncBatchNorm)
    assert_equal(read(learner, views()[0]), expected)


@pytest.mark.parametrize("layer", ["auto", "pool"])
@pytest.mark.parametrize("frozen", ["before", "after"])
def test_a_frozen_network_with_a_trainable_classifier_is_read_without_gradient(layer, frozen):
    net = Small()

    def freeze() -> None:
        net.requires_grad_(False)
        net.fc.requires_grad_(True)

    if frozen == "before":
        freeze()
    learner = wrap(net, 16, hidden_layer=layer)
    freeze()
    assert not learner.representation(views()[0]).requires_grad
    loss = learner(*views())
    loss.backward()
    assert all(p.grad is None for p in net.parameters())
    assert all(p.grad is not None for p in learner.predictor.parameters())


def test_a_network_that_trains_under_no_grad_is_still_an_error():
    class Ungraded(Small):
        off = False

        def features(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(not self.off):
                return super().features(x)

    net = Ungraded()
    learner = wrap(net, 16)
    net.off = True
    with pytest.raises(RuntimeError, match="carries no gradient although the network trains"):
        learner(*views())
