"""Any backbone: one family of each kind by examples/benchmarks/backbones.py, and odd modules.

What "auto" and named layers give is in test_representation.py, what is refused in test_inputs.py.
"""

import copy
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from byol_pytorch import BYOL

sys.path.append(str(Path(__file__).parents[1] / "examples" / "benchmarks"))

import backbone_families
import backbones
from backbone_families import BareForwardError
from backbones import Result

HEADS = {"projection_size": 4, "projection_hidden_size": 8}


def wrap(net: nn.Module, image_size: Any = 16, **kwargs: Any) -> BYOL:
    return BYOL(net, image_size, **HEADS, **kwargs)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def train(learner: BYOL, steps: int = 2, shape: tuple[int, ...] = (4, 3, 16, 16)) -> None:
    optimizer = torch.optim.SGD(learner.parameters(), 0.1)
    for step in range(steps):
        loss = learner(noise(*shape, seed=2 * step), noise(*shape, seed=2 * step + 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learner.update_moving_average()


class Small(nn.Module):
    """A convolution, batch norm, pooling, a hidden layer and a classifier."""

    def __init__(self, channels: int = 3, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.norm, self.hidden = nn.BatchNorm2d(width), nn.Linear(width, width)
        self.fc = nn.Linear(width, 5)

    def features(self, x: Tensor) -> Tensor:
        return self.hidden(self.norm(self.conv(x)).relu().mean((2, 3)))

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.features(x))


# ---- families ------------------------------------------------------------------------------------

KINDS = [
    "timm/repghost",
    "timm/pit",
    "torchvision/squeezenet",
    "transformers/Dinov2",
    "transformers/CLIP",
    "transformers/MobileViT",
]


def uncaptured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the check that takes longest."""
    monkeypatch.setattr(backbones, "captured_alone", lambda found, result: False)


@pytest.mark.parametrize("family", KINDS)
def test_one_family_of_each_kind_passes_every_check(family, monkeypatch):
    uncaptured(monkeypatch)
    result = backbones.check(family)
    assert result.passes, result.reasons


def test_a_network_of_ones_own_passes_every_check_and_is_captured_as_one_graph():
    result = backbones.check("other/audio CNN")
    assert result.passes, result.reasons
    assert result.checks["compiles"]


@pytest.mark.slow
@pytest.mark.parametrize("family", backbone_families.families())
def test_every_family_that_runs_by_itself_passes_every_check(family):
    result = backbones.check(family)
    if not result.runs:
        pytest.skip(result.reasons["forward"])
    if family in ("transformers/PoolFormer", "transformers/SwiftFormer"):  # their norm is elsewhere
        assert "Give pool='mean'" in result.reasons["wraps"]
        return
    assert result.passes, result.reasons


def test_the_families_are_every_model_file_of_timm_and_every_library():
    names = backbone_families.families()
    files = {p.stem for p in Path(timm.models.__file__).parent.glob("*.py") if p.stem[0] != "_"}
    found = {name.removeprefix("timm/") for name in names if name.startswith("timm/")}
    assert found <= files and len(found) > 90
    for file in files - found:
        path = Path(timm.models.__file__).with_name(f"{file}.py")
        assert "@register_model" not in path.read_text(), file
    assert {"torchvision/resnet", "torchvision/video.mvit", "transformers/CLIP"} <= set(names)


def broken(change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> Result:
    """What the checks say of a plain network after `change` of its Subject."""
    found = change(backbone_families.subject("other/nn.Sequential"))
    monkeypatch.setattr(backbones, "subject", lambda family: found)
    uncaptured(monkeypatch)
    return backbones.check("other/broken")


def blind() -> nn.Module:
    class Blind(Small):
        def features(self, x: Tensor) -> Tensor:
            return 1e-9 * super().features(x) + 1

    return Blind()


def uncopied() -> nn.Module:
    class Uncopied(Small):
        def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
            return Uncopied()  # other weights

    return Uncopied()


@pytest.mark.parametrize(
    ("change", "fails"),
    [
        (lambda s: replace(s, feature=lambda net, x: net(x)), "feature"),
        (lambda s: replace(s, make=blind, feature=lambda net, x: net.features(x)), "varies"),
        (lambda s: replace(s, make=uncopied, feature=lambda net, x: net.features(x)), "copies"),
        (lambda s: replace(s, feature=lambda net, x: net[:7](x) + net[8].bias[0] * 0), "gradient"),
    ],
)
def test_a_check_fails_where_what_it_asks_does_not_hold(change, fails, monkeypatch):
    result = broken(change, monkeypatch)
    assert result.checks[fails] is False and result.reasons[fails]
    assert not result.passes


def test_a_model_that_does_not_run_by_itself_is_named_with_its_reason(monkeypatch):
    def refuses(family: str) -> Any:
        raise BareForwardError("ValueError: it takes no image")

    monkeypatch.setattr(backbones, "subject", refuses)
    result = backbones.check("other/nothing")
    assert not result.runs and not result.passes
    table = backbones.document([result])
    assert "0 of 0 families pass; 1 more do not run by themselves." in table
    assert "other/nothing: ValueError: it takes no image" in table


def test_the_table_has_a_row_a_family_and_goes_on_after_the_last_result(monkeypatch, tmp_path):
    done: list[str] = []

    def quickly(family: str, args: Any) -> Result:
        done.append(family)
        checks = dict.fromkeys(backbones.CHECKS, True)
        if family == "other/nn.Sequential":
            return Result(family, checks=checks | {"SGD": False}, reasons={"SGD": "it rises"})
        return Result(family, "a model", 32, 2058, (1, 4000), checks, seconds=2)

    monkeypatch.setattr(backbones, "isolated", quickly)
    output, results = tmp_path / "docs" / "table.md", tmp_path / "runs" / "results.jsonl"
    files = ["--output", str(output), "--results", str(results), "--library", "other"]
    backbones.main([*files, "--only", "audio"])
    backbones.main([*files, "--resume"])
    assert done == ["other/audio CNN", "other/nn.Sequential"]
    table = output.read_text()
    assert "**1 of 2 families pass.**" in table
    assert "| other/audio CNN | a model | 32 | 0.00 M | 1 x 4000 | ✓ | ✓ | ✓ |" in table
    assert "- other/nn.Sequential: SGD, it rises" in table
    backbones.main([*files, "--only", "audio"])
    assert done[2:] == ["other/audio CNN"]
    with pytest.raises(SystemExit, match="No family's name contains 'zebra'"):
        backbones.main([*files, "--only", "zebra"])


@pytest.mark.slow
def test_a_family_that_takes_too_long_or_too_much_memory_is_a_result_too(tmp_path):
    args = backbones.parse_arguments(["--timeout", "0"])
    assert backbones.isolated("other/audio CNN", args).reasons["process"] == "not done after 0 s"
    args = backbones.parse_arguments(["--memory", "0.001"])
    result = backbones.isolated("other/audio CNN", args)
    assert result.reasons and not result.passes


# ---- weights that are shared, computed, or made late ---------------------------------------------


class Shared(nn.Module):
    """One weight in two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.one, self.two = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.two.weight = self.one.weight
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.two(self.one(self.stem(x)).relu()).mean((2, 3)))


def test_a_shared_weight_stays_shared_in_the_target_and_moves_once():
    net = Shared()
    learner = wrap(net, moving_average_decay=0.5)
    target = learner.target.net
    assert target.one.weight is target.two.weight is not net.one.weight
    before = net.one.weight.detach().clone()
    with torch.no_grad():
        net.one.weight.add_(1)
    learner.update_moving_average()
    torch.testing.assert_close(target.two.weight, before + 0.5)
    assert learner.ddp_ignored() == ["net.fc.bias", "net.fc.weight"]


def test_a_classifier_that_shares_the_bodys_weight_does_not_keep_it_from_training():
    net = Small()
    net.fc = nn.Linear(6, 6)
    net.fc.weight = net.hidden.weight
    learner = wrap(net)
    assert learner.ddp_ignored() == ["net.fc.bias"]
    before = net.fc.weight.detach().clone()
    train(learner, 1)
    assert not torch.equal(net.fc.weight, before)


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "former weight_norm": torch.nn.utils.weight_norm,
    "former spectral_norm": torch.nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED.keys())
def test_computed_weights_train_and_the_target_follows(compute):
    net = Small()
    for layer in (net.conv, net.hidden):
        compute(layer)
    state = copy.deepcopy(net.state_dict())
    learner = wrap(net, moving_average_decay=0.0)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert learner.ddp_ignored() == ["net.fc.bias", "net.fc.weight"]
    train(learner)
    for name, parameter in learner.target.net.named_parameters():
        assert torch.equal(parameter, net.get_parameter(name)), name
        assert name == "conv.bias" or not torch.equal(parameter, state[name]), name
    learner.reset_moving_average()  # between two forward passes, as after other heads
    images = noise(4, 3, 16, 16)
    learner.eval()
    projection = learner.projector(learner.representation(images, normalise=False))
    torch.testing.assert_close(learner.target(images), projection.detach())


def test_lazy_modules_are_made_by_the_probe():
    lazy = nn.Sequential(nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d(), nn.ReLU())
    lazy += nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5))
    learner = wrap(lazy, None, example_input=noise(2, 13, 16, 16))
    assert lazy[0].in_channels == 13
    assert learner.ddp_ignored() == ["net.5.bias", "net.5.weight"]
    train(learner, shape=(4, 13, 16, 16))
    images = noise(4, 13, 16, 16)
    expected = lazy.eval()[:5](images)
    assert torch.equal(learner.eval().representation(images), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.complex64])
def test_a_buffer_that_is_no_float_keeps_its_value(dtype):
    class Counting(Small):
        def forward(self, x: Tensor) -> Tensor:
            self.count.copy_(torch.ones(3).to(dtype))
            return super().forward(x)

    net = Counting()
    net.register_buffer("count", torch.tensor([0, 1, 0]).to(dtype))
    learner = wrap(net)
    assert net.count.dtype == dtype and net.count.tolist() == [0, 1, 0]
    train(learner)
    assert net.count.tolist() == [1, 1, 1]
    assert learner.target.net.count.dtype == dtype


# ---- what does not train -------------------------------------------------------------------------


def test_what_is_frozen_does_not_move_in_the_target_either():
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    net.patch_embed.requires_grad_(False)
    kept = [p.clone() for p in net.patch_embed.parameters()]
    learner = wrap(net, 32, moving_average_decay=0.9)
    train(learner, shape=(4, 3, 32, 32))
    for of in (net, learner.target.net):
        for parameter, value in zip(of.patch_embed.parameters(), kept, strict=True):
            assert not parameter.requires_grad and torch.equal(parameter, value)
    assert net.blocks[0].attn.qkv.weight.grad is not None


def test_batch_norm_in_evaluation_mode_keeps_its_statistics_in_both_networks():
    net = Small()
    train(wrap(net), 1)  # statistics other than a new layer's
    learner = wrap(net)
    mean = net.norm.running_mean.clone()
    for module in learner.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    train(learner)
    assert torch.equal(net.norm.running_mean, mean)
    assert torch.equal(learner.target.net.norm.running_mean, mean)


VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT |= {"intermediate_size": 32, "image_size": 32, "patch_size": 8}


def dropping_timm() -> nn.Module:
    rates = {"attn_drop_rate": 0.5, "proj_drop_rate": 0.5, "drop_path_rate": 0.5}
    rates |= {"pos_drop_rate": 0.5, "patch_drop_rate": 0.5}
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, **rates)


def dropping_torchvision() -> nn.Module:
    block = torchvision.models.convnext.CNBlockConfig
    setting = [block(8, 16, 1), block(16, None, 1)]
    return torchvision.models.ConvNeXt(setting, stochastic_depth_prob=0.9, layer_scale=1.0)


def dropping_transformers() -> nn.Module:
    rates = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    config = transformers.Dinov2Config(**VIT, **rates, drop_path_rate=0.5, layerscale_value=1.0)
    return transformers.Dinov2Model(config)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("make", [dropping_timm, dropping_torchvision, dropping_transformers])
def test_nothing_drops_in_the_target_unless_asked_for(make, kept):
    learner = wrap(make(), 32, target_dropout=kept).train()
    images = noise(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(learner.target(images), learner.target(images)) is not kept
        online = [learner.representation(images) for _ in range(2)]
    assert not torch.equal(*online)


# ---- adapters ------------------------------------------------------------------------------------


def timm_vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)


def hugging_face_vit() -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(**VIT))


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize(
    ("make", "layers", "feature"),
    [
        (timm_vit, ["qkv"], lambda net, x: net.forward_features(x)[:, 0]),
        (hugging_face_vit, ["q_proj", "v_proj"], lambda net, x: net(x).last_hidden_state[:, 0]),
    ],
    ids=["timm", "transformers"],
)
def test_with_lora_only_the_adapters_train_and_the_target_follows(make, layers, feature, wrapped):
    peft = pytest.importorskip("peft")
    inner = make()
    config = peft.LoraConfig(target_modules=layers, r=2, lora_dropout=0.5)
    if wrapped:
        net = peft.get_peft_model(inner, config)
    else:
        net = peft.inject_adapter_in_model(config, inner)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    learner = wrap(net, 32, moving_average_decay=0.0)
    train(learner, shape=(4, 3, 32, 32))
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name} != set()
    for name, parameter in learner.target.net.named_parameters():
        assert torch.equal(parameter, net.get_parameter(name)), name
    images = noise(2, 3, 32, 32)
    with torch.no_grad():
        found = learner.eval().representation(images, normalise=False)
        torch.testing.assert_close(found, feature(inner, images))


# ---- inputs other than pictures ------------------------------------------------------------------


def pooled(convolution: nn.Module, pool: nn.Module, width: int = 6) -> nn.Sequential:
    return nn.Sequential(convolution, nn.ReLU(), pool, nn.Flatten(), nn.Linear(width, 5))


def masked(spectrograms: Tensor) -> Tensor:
    """One band of frequencies and one of time set to 0, as SpecAugment does."""
    masked = spectrograms.clone()
    masked[:, :, 2:4] = 0
    masked[..., 5:9] = 0
    return masked


OWN_VIEWS = {
    "volumes": (
        lambda: pooled(nn.Conv3d(4, 6, 3), nn.AdaptiveAvgPool3d(1)),
        lambda: noise(4, 4, 6, 9, 9),
        lambda volumes: volumes.flip(2),
    ),
    "video": (
        lambda: pooled(nn.Conv3d(3, 6, 3), nn.AdaptiveAvgPool3d(1)),
        lambda: (noise(4, 3, 5, 9, 9) * 255).byte(),
        lambda clips: clips[:, :, :, :, torch.randperm(9)],
    ),
    "spectrograms": (
        lambda: pooled(nn.Conv2d(1, 6, 3), nn.AdaptiveAvgPool2d(1)),
        lambda: noise(4, 1, 8, 20),
        masked,
    ),
    "waveforms": (
        lambda: pooled(nn.Conv1d(2, 6, 3), nn.AdaptiveAvgPool1d(1)),
        lambda: noise(4, 2, 50) * 2 - 1,
        lambda waves: waves * 0.5,
    ),
}


@pytest.mark.parametrize(("make", "batch", "augment"), OWN_VIEWS.values(), ids=OWN_VIEWS.keys())
def test_own_augmentations_fit_every_kind_of_input(make, batch, augment):
    net, inputs = make(), batch()
    example = inputs[:2] / 255 if inputs.dtype == torch.uint8 else inputs[:2]
    learner = wrap(net, None, example_input=example, augment_fn=augment)
    assert all(view.is_floating_point() and view.max() <= 1 for view in learner.views(inputs))
    loss = learner(inputs)
    loss.backward()
    assert loss.isfinite()
    assert {n for n, p in net.named_parameters() if p.grad is None} == {"4.weight", "4.bias"}
    assert learner.representation(inputs).shape == (4, 6)


class PictureAndAngle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.angle, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(1, 6), nn.Linear(6, 2)

    def forward(self, image: Tensor, angle: Tensor) -> Tensor:
        return self.fc(self.conv(image).mean((2, 3)) + self.angle(angle))


def test_an_own_augmentation_is_given_a_mapping_with_its_pictures_scaled():
    seen: list[dict[str, Tensor]] = []

    def turned(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(inputs)
        return {"image": inputs["image"].flip(-1), "angle": -inputs["angle"]}

    example = {"image": noise(2, 3, 9, 9), "angle": noise(2, 1)}
    net = PictureAndAngle()
    learner = wrap(net, None, example_input=example, augment_fn=turned)
    pictures = (noise(4, 3, 9, 9) * 255).byte()
    batch = {"image": pictures, "angle": noise(4, 1) * 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an angle is no image that was not scaled
        learner(batch).backward()
    assert net.angle.weight.grad is not None and net.fc.weight.grad is None
    assert len(seen) == 2 and set(seen[0]) == {"image", "angle"}
    torch.testing.assert_close(seen[0]["image"], pictures / 255)
    torch.testing.assert_close(seen[0]["angle"], batch["angle"])
    projection, embedding = learner(batch, return_embedding=True)
    assert projection.shape == (4, 4) and embedding.shape == (4, 6)
    assert set(learner.diagnostics(batch)) >= {"feature_std", "agreement"}


def test_of_a_tuple_of_logits_and_more_the_classifiers_input_is_taken():
    class Twofold(Small):
        def forward(self, x: Tensor) -> Any:
            features = self.features(x)
            return self.fc(features), features.detach()

    net = Twofold()
    learner = wrap(net).eval()
    images = noise(2, 3, 16, 16)
    found = learner.representation(images, normalise=False)
    assert torch.equal(found, net.features(images))
    assert learner.ddp_ignored() == ["net.fc.bias", "net.fc.weight"]
