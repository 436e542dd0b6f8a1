"""What the learner takes and refuses: networks, arguments, layers, images and views.

Each error says what came, what was expected and how to mend it; the patterns ask for all three.
"""

import copy
import functools
import math
import re
import threading
import warnings
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torchvision
import transformers
from torch import Tensor, nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx
from torch.utils.checkpoint import checkpoint

from byol_pytorch import BYOL
from byol_pytorch.backbone.probe import probe_inputs
from byol_pytorch.inputs import map_tensors

HEADS = {"projection_size": 4, "projection_hidden_size": 8}


def wrap(net: Any, image_size: Any = 32, **kwargs: Any) -> BYOL:
    return BYOL(net, image_size, **HEADS, **kwargs)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def views() -> tuple[Tensor, Tensor]:
    return noise(4, 3, 16, 16, seed=2), noise(4, 3, 16, 16, seed=3)


def read(learner: BYOL, images: Any) -> Tensor:
    with torch.no_grad():
        return learner.eval().representation(images, normalise=False)


class Small(nn.Module):
    """A convolution, batch norm, pooling, and a classifier."""

    def __init__(self, channels: int = 3, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(width), nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, 5)

    def features(self, x: Tensor) -> Tensor:
        return self.pool(self.relu(self.norm(self.conv(x)))).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


# ---- networks and arguments ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "error", "message"),
    [
        ("resnet50", TypeError, r"net is a str; expected a torch\.nn\.Module.*timm\.create_model"),
        (Small, TypeError, r"net is a type; expected a torch\.nn\.Module.*not its name or class"),
        (nn.Flatten(), ValueError, r"\(Flatten\) has no floating-point parameters; expected a"),
        (
            nn.DataParallel(Small()),
            TypeError,
            r"a DataParallel; expected the bare .*Build BYOL first",
        ),
    ],
)
def test_what_is_no_bare_trainable_network_is_an_error(net, error, message):
    with pytest.raises(error, match=message):
        wrap(net, 16)


def observed(net: nn.Module) -> nn.Module:
    net.qconfig = quantization.get_default_qconfig("fbgemm")
    return quantization.prepare(net.eval())


def fake_quantised(net: nn.Module) -> nn.Module:
    net.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    return quantization.prepare_qat(net.train())


def traced(net: nn.Module) -> nn.Module:
    mapping = quantization.get_default_qat_qconfig_mapping("fbgemm")
    return quantize_fx.prepare_qat_fx(net.train(), mapping, (views()[0],))


def dynamic(net: nn.Module) -> nn.Module:
    return quantization.quantize_dynamic(net.eval(), {nn.Linear})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max")
@pytest.mark.parametrize("quantise", [observed, fake_quantised, traced, dynamic])
def test_a_network_that_is_prepared_for_quantisation_is_an_error(quantise):
    message = r"quantised or prepared .* such as a \w+; expected the plain float .*BYOL first"
    with pytest.raises(TypeError, match=message):
        wrap(quantise(Small()), 16)


def test_a_network_with_places_for_quantisation_is_a_plain_one():
    net = torchvision.models.quantization.mobilenet_v2(weights=None, quantize=False)
    assert any(isinstance(m, quantization.QuantStub) for m in net.modules())
    assert read(wrap(net), noise(2, 3, 32, 32)).shape == (2, 1280)


def test_a_network_inside_ddp_is_an_error():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        net = nn.parallel.DistributedDataParallel(Small())
        with pytest.raises(TypeError, match=r"already a Distr.*expected the bare.*DDP\(learner\)"):
            wrap(net, 16)
    finally:
        dist.destroy_process_group()


def test_a_network_that_does_not_take_the_probe_is_an_error():
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    with pytest.raises(
        ValueError, match=r"does not take .*48, 48\).*Give the image_size.*example_in"
    ):
        wrap(net, 48)


class Locked(Small):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize("layer", ["auto", "pool"])
def test_a_network_that_cannot_be_copied_is_an_error(layer):
    message = r"Locked cannot be deep-copied \(TypeError: .*Remove .*or give use_momentum=False"
    with pytest.raises(TypeError, match=message):
        wrap(Locked(), 16, hidden_layer=layer)


@pytest.mark.parametrize("layer", ["auto", "pool"])
def test_a_network_that_cannot_be_copied_trains_without_momentum(layer):
    learner = wrap(Locked(), 16, hidden_layer=layer, use_momentum=False)
    learner(*views()).backward()
    assert learner.net.conv.weight.grad is not None


def test_a_network_that_can_be_copied_before_its_forward_but_not_in_it_is_wrapped():
    net = Small()
    torch.nn.utils.spectral_norm(net.conv)  # replaces `weight` by a non-leaf in each forward
    copy.deepcopy(net)
    wrap(net, 16)(*views()).backward()


ARGUMENTS = [
    *(
        ("moving_average_decay", d, r"expected a number in \[0, 1\], .*0\.996")
        for d in (-0.1, 1.1, math.nan, "0.99", None)
    ),
    *(("total_steps", k, "expected the number .*at least 1, or None") for k in (0, -5, True)),
    *(
        ("image_size", s, r"expected a positive int or \(height, width\).*for example 224")
        for s in (0, -1, 16.0, "16", True, None, (16,), (16, 16, 16), (16, 0), (16, 16.0))
    ),
    *(
        (name, values, f"{len(values)} values.* 3 channels.*expected one value a channel.*None")
        for name in ("mean", "std")
        for values in ((0.5,), [0.5] * 4)
    ),
    ("std", (1.0, 0.0, 1.0), "expected positive numbers"),
    *(("mean", m, r"Expected finite numbers.*None for") for m in (0.5, "imagenet", [math.nan] * 3)),
]


@pytest.mark.parametrize(("name", "value", "message"), ARGUMENTS)
def test_an_argument_that_does_not_fit_is_an_error(name, value, message):
    shown = f"{name} has" if "channel" in message else re.escape(f"{name}={value!r}")
    with pytest.raises(ValueError, match=f"(?i){shown}.*{message}"):
        wrap(Small(), **{"image_size": 16, name: value})


def test_normalisation_beside_a_given_augmentation_is_an_error():
    with pytest.raises(ValueError, match=r"augment_fn replaces those: normalise in augment_fn"):
        wrap(Small(), 16, augment_fn=nn.Identity(), mean=(0.5, 0.5, 0.5))


@pytest.mark.parametrize("name", ["BYOLTrainer", "MockDataset"])
def test_importing_what_0_9_1_had_beside_the_learner_names_the_example(name):
    with pytest.raises(ImportError, match=rf"{name} is not part .*examples/quickstart\.py.*--data"):
        exec(f"from byol_pytorch import {name}")


def test_there_is_no_target_to_update_without_momentum():
    learner = wrap(Small(), 16, use_momentum=False)
    with pytest.raises(RuntimeError, match=r"use_momentum=False.*leave out update_moving_average"):
        learner.update_moving_average()


# ---- images and views ----------------------------------------------------------------------------

DTYPES = (torch.int64, torch.int16, torch.bool, torch.complex64)
SCALE = r"; expected uint8 .*Scale them: images = images\.float\(\) / 255"
EXPECTED = r"expected (a tensor )?\(B, 3, H, W\)"
IMAGES = [
    (noise(3, 16, 16), ValueError, rf"\(3, 16, 16\); {EXPECTED}.*images\[None\]"),
    (noise(2, 1, 3, 16, 16), ValueError, rf"\(2, 1, 3, 16, 16\); {EXPECTED}"),
    (noise(2, 1, 16, 16), ValueError, rf"1 channels .*takes 3: {EXPECTED}.*Build BYOL on"),
    (noise(2, 16, 16, 3), ValueError, rf"\(2, 16, 16, 3\).*{EXPECTED}.*permute\(0, 3, 1, 2\)"),
    (noise(0, 3, 16, 16), ValueError, r"\(0, 3, 16, 16\), an empty batch; expected at least 1"),
    ([noise(3, 16, 16)] * 2, TypeError, rf"are a list; {EXPECTED}.*stack"),
    (list("ab"), TypeError, rf"are a list; {EXPECTED}.*torch\.stack"),
    (None, TypeError, rf"are a NoneType; {EXPECTED}"),
    *((torch.ones(2, 3, 16, 16).to(dtype), TypeError, f"dtype {dtype}{SCALE}") for dtype in DTYPES),
]


@pytest.mark.parametrize(
    "use",
    [lambda x, i: x(i), lambda x, i: x.representation(i), lambda x, i: x(i, return_embedding=True)],
    ids=["loss", "representation", "embedding"],
)
@pytest.mark.parametrize(("images", "error", "message"), IMAGES)
def test_images_that_do_not_fit_are_an_error(images, error, message, use):
    learner = wrap(Small(), 16, augment_fn=nn.Identity())
    with pytest.raises(error, match="The images.*" + message):
        use(learner, images)


VIEWS = [
    (views()[0].byte(), TypeError, r"torch\.uint8; ready views are float.*255.*learner\(images\)"),
    (noise(4, 3, 8, 8), ValueError, r"\(8, 8\) pixels.*image_size=\(16, 16\).*Resize them"),
    (noise(3, 3, 16, 16), ValueError, r"different shapes, .*\(4, 3.*\(3, 3.*; expected the same"),
]


@pytest.mark.parametrize(("view", "error", "message"), VIEWS)
def test_ready_views_that_do_not_fit_are_an_error(view, error, message):
    with pytest.raises(error, match=message):
        wrap(Small(), 16)(views()[0], view)


def test_augmentations_of_different_sizes_are_an_error():
    learner = wrap(Small(), 16, augment_fn=nn.Identity(), augment_fn2=nn.AvgPool2d(2))
    with pytest.raises(ValueError, match=r"different shapes, .*16\).*8\).*; expected the same"):
        learner(views()[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_an_error_only_where_asked(value):
    bad = views()[0].index_fill(3, torch.tensor([2]), value)
    learner = wrap(Small(), 16, augment_fn=nn.Identity(), check_finite=True)
    message = "hold NaN or infinite values; expected finite ones.*nan_to_num"
    embed = functools.partial(learner, return_embedding=True)
    for call in (learner, embed, learner.representation, lambda x: learner(x, views()[0])):
        with pytest.raises(ValueError, match=message):
            call(bad)
    wrap(Small(), 16)(bad, views()[0])


def test_float_images_that_reach_far_beyond_one_warn_once():
    learner = wrap(Small(), 16, augment_fn=nn.Identity())
    message = r"floats from .* to 25.*; expected \[0, 1\]\. Divide them by 255 .* as uint8"
    with pytest.warns(UserWarning, match=message) as caught:
        learner(views()[0] * 255)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner(views()[0] * 255)
        learner.representation(views()[0] * 255)


def test_scaled_images_and_ready_views_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(Small(), 16)(views()[0] * 9, views()[1] * 9)
        wrap(Small(), 16, augment_fn=nn.Identity())(views()[0])
        wrap(Small(), 16, augment_fn=nn.Identity())((views()[0] * 255).byte())


def test_floats_outside_zero_to_one_give_a_finite_loss():
    learner = wrap(Small(), 16)
    with pytest.warns(UserWarning, match="look normalised already"):
        loss = learner(torch.cat((noise(4, 3, 20, 20) * 1.9 - 1, torch.zeros(1, 3, 20, 20))))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in learner.parameters() if p.grad is not None)


def test_a_batch_of_one_is_an_error_in_training():
    one = views()[0][:1]
    message = r"holds 1 image, .*at least 2 in training.*Give larger batches .*learner\.eval\(\)"
    with pytest.raises(ValueError, match=message):
        wrap(Small(), 16)(one, one)
    assert wrap(Small(), 16).eval()(one, one).isfinite()


def test_an_embedding_of_one_image_in_training_is_an_error_that_names_eval():
    with pytest.raises(ValueError, match=r"holds 1 image.*learner\.eval\(\)"):
        wrap(Small(), 16)(views()[0][:1], return_embedding=True)


def test_a_batch_of_one_trains_where_the_heads_have_no_batch_norm():
    learner = wrap(Small(), 16)
    learner.projector, learner.predictor = nn.Linear(6, 4), nn.Linear(4, 4)
    learner.reset_moving_average()
    learner(views()[0][:1], views()[1][:1]).backward()
    assert learner.net.conv.weight.grad.isfinite().all()


# ---- layers and poolings -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ("max", r"pool='max' is not known.*'auto', 'mean', 'cls', None"),
        ("cls", r"pool='cls' takes the first token.*gives \(2, 6, 16, 16\)"),
        (None, r"is \(2, 6, 16, 16\); a representation is \(B, D\)"),
        (lambda x: x.mean(2), r"pool= of layer 'conv' is \(2, 6, 16\)"),
        (lambda x: x.mean((2, 3)).tolist(), "pool= of layer 'conv' is list"),
    ],
)
def test_a_pooling_that_gives_no_vector_is_an_error(pool, message):
    with pytest.raises(ValueError, match=message):
        wrap(Small(), 16, hidden_layer="conv", pool=pool)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("layer4.1.bn3", r"no layer of ResNet.*layer4\.1\.bn2"),
        ("avg_pool", r"no layer of ResNet.*avgpool.*index into net.children"),
        (10, r"hidden_layer=10 is no index into the network's 10 children: conv1, .*fc\. Give"),
    ],
)
def test_a_layer_that_does_not_exist_is_an_error_with_the_nearest_names(layer, message):
    with pytest.raises(ValueError, match=message):
        wrap(torchvision.models.resnet18(), hidden_layer=layer)


class Odd(Small):
    def __init__(self) -> None:
        super().__init__()
        self.never, self.twice, self.blind = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.fc(self.twice(self.twice(x)) + self.blind(x.new_ones(len(x), 4)))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("never", "Layer 'never' did not run.*hidden_layer="),
        ("twice", "Layer 'twice' ran 2 times in one forward.*hidden_layer="),
        ("blind", "layer 'blind' does not depend on the images.*hidden_layer="),
    ],
)
def test_a_layer_that_cannot_be_the_representation_is_an_error(layer, message):
    net = Odd()
    with pytest.raises(ValueError, match=message):
        wrap(net, 16, hidden_layer=layer)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


class Switched(Small):
    """Skips its pooling layer, or recomputes by a reentrant checkpoint, when told to."""

    skips = recomputes = False

    def forward(self, x: Tensor) -> Tensor:
        if self.skips:
            return self.fc(self.conv(x).mean((2, 3)))
        if self.recomputes:
            return self.fc(checkpoint(self.features, x, use_reentrant=True))
        return super().forward(x)


def test_a_layer_that_is_skipped_later_is_an_error_that_leaves_the_tap_disarmed():
    net = Switched()
    learner = wrap(net, 16, hidden_layer="pool")
    net.skips = True
    with pytest.raises(RuntimeError, match=r"'pool' did not run.*hidden_layer="):
        learner.representation(views()[0])
    assert net(views()[0]).shape == (4, 5)
    net.skips = False
    assert learner.representation(views()[0]).shape == (4, 6)


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("layer", ["auto", "pool"])
def test_reentrant_checkpointing_is_refused(layer):
    net = Switched()
    net.recomputes = True
    with pytest.raises((ValueError, RuntimeError), match=r"reentrant.*use_reentrant=False"):
        wrap(net, 16, hidden_layer=layer)
    net.recomputes = False
    learner = wrap(net, 16, hidden_layer=layer)
    net.recomputes = True
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        learner(*views())


@pytest.mark.parametrize("pool", ["auto", None])
def test_tokens_without_a_pooling_are_an_error_naming_mean_and_cls(pool):
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    with pytest.raises(ValueError, match=r"\(2, 5, 192\)") as caught:
        wrap(net, hidden_layer="blocks.1", pool=pool)
    assert "pool='mean'" in str(caught.value) and "pool='cls'" in str(caught.value)


@pytest.mark.parametrize("pool", ["auto", "mean"])
def test_a_map_as_wide_as_its_channels_is_an_error_naming_pool(pool):
    with pytest.raises(ValueError, match=r"\(2, 8, 8, 8\).*both .* axis fit.*Give pool="):
        wrap(Small(width=8), 8, hidden_layer="conv", pool=pool)


class GeM(nn.Module):
    def __init__(self, trains: bool = True) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.ones(()) * 3, requires_grad=trains)

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=1e-6).pow(self.p).mean((2, 3)).pow(1 / self.p)


def around(layer: nn.Module) -> Any:
    return lambda x: layer(x)


POOLS = {
    "a module": GeM,
    "a frozen module": lambda: GeM(trains=False),
    "a module with buffers": lambda: nn.Sequential(
        nn.BatchNorm2d(6, affine=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ),
    "a method": lambda: GeM().forward,
    "a function around a module": lambda: around(GeM()),
}


@pytest.mark.parametrize("make", POOLS.values(), ids=POOLS.keys())
def test_a_pool_with_parameters_is_an_error_that_says_where_it_belongs(make):
    message = r"pool= of layer 'conv', \S+, has parameters or buffers.*nn\.Sequential\(backbone"
    with pytest.raises(ValueError, match=message):
        wrap(Small(), 16, hidden_layer="conv", pool=make())


def test_a_module_without_parameters_is_a_pool_and_one_with_some_a_last_layer():
    net = Small()
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    learner = wrap(net, 16, hidden_layer="conv", pool=pool)
    assert not any("pool" in name for name in learner.state_dict())
    expected = net.conv(views()[0]).mean((2, 3))
    torch.testing.assert_close(read(learner, views()[0]), expected.detach())
    trained = wrap(nn.Sequential(nn.Conv2d(3, 6, 3), GeM()), 16)
    trained(*views()).backward()
    assert trained.net[1].p.grad is not None
    assert trained.target.net[1].p is not trained.net[1].p


@pytest.mark.parametrize("inner", [False, True])
def test_torchscript_is_an_error_that_names_the_plain_module(inner):
    net = nn.Sequential(Small()) if inner else Small()
    scripted = nn.Sequential(torch.jit.script(net[0])) if inner else torch.jit.script(net)
    with pytest.raises(TypeError, match=r"is TorchScript.*expected the plain nn\.Module"):
        wrap(scripted, 16)


def test_sync_batchnorm_conversion_of_the_tapped_layer_is_an_error():
    net = Small()
    learner = wrap(net, 16, hidden_layer="norm")
    nn.SyncBatchNorm.convert_sync_batchnorm(net)
    with pytest.raises(RuntimeError, match=r"'norm'.*convert first, then wrap"):
        read(learner, views()[0])


class Holding(nn.Module):
    def __init__(self, holder: Any) -> None:
        super().__init__()
        self.body, self.fc, self.holder = nn.Conv2d(3, 6, 16), nn.Linear(6, 3), holder

    def forward(self, x: Tensor) -> Any:
        feature = self.body(x).flatten(1)
        return self.holder(feature, self.fc(feature))


@pytest.mark.parametrize(
    ("holder", "pool"),
    [
        (lambda f, y: (f,), "auto"),
        (lambda f, y: {"feature": f}, "auto"),
        (lambda f, y: [f, None, "aux"], "auto"),
        (lambda f, y: (y, f), lambda output: output[1]),
        (lambda f, y: {"logits": y, "feature": f}, lambda output: output["feature"]),
    ],
)
def test_the_one_tensor_of_a_container_is_taken_or_what_pool_picks(holder, pool):
    net = Holding(holder)
    images = noise(2, 3, 16, 16)
    found = read(wrap(net, 16, hidden_layer=-1, pool=pool), images)
    torch.testing.assert_close(found, net.body(images).flatten(1).detach())


@pytest.mark.parametrize(
    ("holder", "came"),
    [
        (lambda f, y: (f, y), "tuple with 2 tensors"),
        (lambda f, y: {"feature": f, "logits": y}, r"dict with 2 tensors \(feature, logits\)"),
    ],
)
def test_several_tensors_of_a_container_are_refused(holder, came):
    with pytest.raises(ValueError, match=f"the network is a {came}.*Give pool= a callable"):
        wrap(Holding(holder), 16, hidden_layer=-1)


def test_a_hugging_face_model_that_returns_a_tuple_is_refused():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(image_size=32, **sizes, return_dict=False)
    with pytest.raises(ValueError, match=r"returns a tuple.*return_dict=True.*callable"):
        wrap(transformers.ViTModel(config))


@pytest.mark.parametrize(
    ("pool", "by_hand"),
    [
        ("mean", lambda out: out.last_hidden_state.mean(1)),
        ("cls", lambda out: out.last_hidden_state[:, 0]),
        (lambda out: out["pooler_output"], lambda out: out.pooler_output),
    ],
)
def test_pool_decides_for_a_hugging_face_base_model_too(pool, by_hand):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    net = transformers.ViTModel(transformers.ViTConfig(image_size=32, **sizes)).eval()
    images = noise(2, 3, 32, 32)
    learner = wrap(net, pool=pool).eval()
    got = learner.representation(images, normalise=False)
    torch.testing.assert_close(got, by_hand(net(images)))


@pytest.mark.parametrize(
    ("name", "widths"), [("PoolFormer", "hidden_sizes"), ("SwiftFormer", "embed_dims")]
)
def test_a_hugging_face_model_without_a_known_feature_is_refused_and_takes_its_mean(name, widths):
    config = getattr(transformers, f"{name}Config")(**{widths: [8, 8, 16, 16]}, depths=[1] * 4)
    net = getattr(transformers, f"{name}Model")(config).eval()
    with pytest.raises(ValueError, match=r"gives no pooler_output. Give pool='mean'"):
        wrap(net, 64)
    images = noise(2, 3, 64, 64)
    got = wrap(net, 64, pool="mean").eval().representation(images, normalise=False)
    torch.testing.assert_close(got, net(images).last_hidden_state.mean((2, 3)))


# ---- inputs of every kind ------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
@pytest.mark.parametrize("size", [16, (16, 24)])
def test_the_channel_count_is_the_networks_and_sizes_may_be_rectangular(channels, size):
    net = Small(channels)
    learner = wrap(net, size)
    shape = (16, 16) if size == 16 else size
    images = torch.randint(0, 256, (3, channels, 20, 28), dtype=torch.uint8)
    assert [view.shape for view in learner.views(images)] == [(3, channels, *shape)] * 2
    learner(images).backward()
    assert net.conv.weight.grad.isfinite().all()


def test_a_first_linear_layer_tells_the_channel_count_too():
    net = nn.Sequential(nn.Flatten(), nn.Linear(13 * 6 * 8, 6), nn.ReLU(), nn.Linear(6, 2))
    images = noise(2, 13, 6, 8)
    torch.testing.assert_close(read(wrap(net, (6, 8)), images), net[:3](images).detach())


class ImageAndAngle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.angle, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(1, 6), nn.Linear(6, 2)

    def features(self, image: Tensor, angle: Tensor) -> Tensor:
        return self.conv(image).mean((2, 3)) + self.angle(angle)

    def forward(self, image: Tensor, angle: Tensor) -> Tensor:
        return self.fc(self.features(image, angle))


def pooled(conv: nn.Module, pool: nn.Module) -> nn.Sequential:
    return nn.Sequential(conv, nn.ReLU(), pool, nn.Flatten(), nn.Linear(6, 2))


def picture_and_angle(seed: int) -> dict[str, Tensor]:
    return {"image": noise(4, 3, 9, 9, seed=seed), "angle": noise(4, 1, seed=seed)}


KINDS = {
    "video": (
        lambda: pooled(nn.Conv3d(2, 6, 3), nn.AdaptiveAvgPool3d(1)),
        lambda seed: noise(4, 2, 5, 9, 9, seed=seed),
        lambda net, x: net[:4](x),
    ),
    "audio": (
        lambda: pooled(nn.Conv1d(1, 6, 3), nn.AdaptiveAvgPool1d(1)),
        lambda seed: noise(4, 1, 40, seed=seed),
        lambda net, x: net[:4](x),
    ),
    "mapping": (ImageAndAngle, picture_and_angle, lambda net, x: net.features(**x)),
    "tuple": (
        ImageAndAngle,
        lambda seed: tuple(picture_and_angle(seed).values()),
        lambda net, x: net.features(*x),
    ),
    "integers": (
        lambda: nn.Sequential(nn.Embedding(50, 6), nn.Flatten(), nn.Linear(42, 2)),
        lambda seed: (noise(4, 7, seed=seed) * 50).long(),
        lambda net, x: net[:2](x),
    ),
}


@pytest.mark.parametrize("concatenate", [False, True])
@pytest.mark.parametrize(("make", "inputs", "features"), KINDS.values(), ids=KINDS.keys())
def test_example_input_fits_networks_of_other_inputs(make, inputs, features, concatenate):
    net = make()
    learner = wrap(net, None, example_input=inputs(0), concatenate_views=concatenate)
    learner(inputs(1), inputs(2)).backward()
    unreached = {n for n, p in net.named_parameters() if p.grad is None}
    assert {f"net.{n}" for n in unreached} == set(learner.ddp_ignored())
    assert len(unreached) == 2
    torch.testing.assert_close(read(learner, inputs(3)), features(net, inputs(3)).detach())


@pytest.mark.parametrize(("kind", "axes"), [("video", (2, 3, 4)), ("audio", 2)])
def test_a_named_convolution_of_video_or_audio_is_pooled_over_all_its_positions(kind, axes):
    make, inputs, _ = KINDS[kind]
    net = make()
    learner = wrap(net, None, example_input=inputs(0), hidden_layer=0)
    torch.testing.assert_close(read(learner, inputs(3)), net[0](inputs(3)).mean(axes).detach())


def test_other_inputs_are_judged_against_the_example_and_have_no_default_views():
    make, inputs, _ = KINDS["video"]
    learner = wrap(make(), None, example_input=inputs(0))
    with pytest.raises(
        ValueError, match=r"\(4, 3, 9, 9\); expected \(B, 2, 5, 9, 9\), as example_in"
    ):
        learner(noise(4, 3, 9, 9), noise(4, 3, 9, 9))
    with pytest.raises(ValueError, match=r"no default views .*augment_fn, or call learner\(view"):
        learner(inputs(1))
    learner = wrap(make(), None, example_input=inputs(0), augment_fn=lambda x: x.flip(-1))
    assert learner(inputs(1)).isfinite()


# ---- parameters that do not reach the representation ---------------------------------------------


def test_the_classifier_stays_in_the_network_and_gets_no_gradient():
    net = torchvision.models.resnet18(num_classes=5)
    keys = list(net.state_dict())
    weight = net.fc.weight.detach().clone()
    learner = wrap(net)
    learner(noise(4, 3, 32, 32), noise(4, 3, 32, 32, seed=2)).backward()
    assert learner.net is net and list(net.state_dict()) == keys
    assert net.fc.weight.requires_grad and torch.equal(net.fc.weight, weight)
    assert {n for n, p in net.named_parameters() if p.grad is None} == {"fc.weight", "fc.bias"}
    assert learner.ddp_ignored("model.") == ["model.net.fc.bias", "model.net.fc.weight"]
    assert "net.fc.weight" in learner.state_dict()
    assert not any(key.startswith("target.net.fc.") for key in learner.state_dict())


def test_layers_behind_a_named_layer_do_not_reach_it():
    learner = wrap(Small(), 16, hidden_layer="conv")
    expected = ["net.fc.bias", "net.fc.weight", "net.norm.bias", "net.norm.weight"]
    assert learner.ddp_ignored() == expected


class NeedsHead(Small):
    def forward(self, x: Tensor) -> Tensor:
        assert self.fc.in_features == 6
        return super().forward(x)


def test_the_target_keeps_a_head_that_the_network_cannot_run_without():
    learner = wrap(NeedsHead(), 16)
    assert "target.net.fc.weight" in learner.state_dict()
    learner(*views()).backward()
    learner.update_moving_average()
    assert learner.ddp_ignored() == ["net.fc.bias", "net.fc.weight"]


def test_frozen_parameters_stay_frozen():
    net = Small()
    net.conv.requires_grad_(False)
    learner = wrap(net, 16)
    learner(*views()).backward()
    assert [p.requires_grad for p in net.conv.parameters()] == [False, False]
    assert net.conv.weight.grad is None and net.norm.weight.grad is not None
    assert not any(p.requires_grad for p in learner.target.parameters())
    assert "net.conv.weight" not in learner.ddp_ignored()


def test_tensors_inside_of_a_structure_are_walked_at_any_depth():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x, others):
            return self.fc(x + others["shift"] * others["scales"][0])

    rows, shift, scale = torch.rand(3, 2, 4)
    example = (rows, {"shift": shift, "scales": [scale], "name": "a"})
    net = Nested().double()
    probe = probe_inputs(net, None, example)
    assert isinstance(probe[1]["scales"], tuple) and probe[1]["name"] == "a"
    assert torch.equal(probe[1]["scales"][0], scale.double())
    two = map_tensors(lambda a, b: torch.cat((a, b)), example, example)
    assert torch.equal(two[1]["scales"][0], torch.cat((scale, scale)))
    learner = BYOL(net, None, example_input=example, projection_size=4, projection_hidden_size=8)
    assert learner(example, example).isfinite()
