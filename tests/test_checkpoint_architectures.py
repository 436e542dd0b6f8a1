"""Files of other architectures are refused, and those accepted give the features they gave."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.models.convnext import ConvNeXt
from timm.models.deit import VisionTransformerDistilled
from timm.models.efficientnet import EfficientNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from timm.models.volo import VOLO
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

from byol_pytorch import BYOL
from byol_pytorch.checkpoint import export_backbone, load_backbone

vision = torchvision.models
Make = Callable[..., nn.Module]

narrow = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}
small = partial(timm.create_model, "resnet18", num_classes=5, **narrow)
levit = partial(timm.create_model, "levit_128s", img_size=64, embed_dim=(16, 16, 16), key_dim=8,
                num_heads=(1, 1, 1), depth=(1, 1, 1), num_classes=5)  # fmt: skip
vit = partial(VisionTransformer, img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2,
              num_classes=5)  # fmt: skip
distilled = partial(VisionTransformerDistilled, img_size=32, patch_size=8, embed_dim=16, depth=2,
                    num_heads=2, num_classes=5)  # fmt: skip
torchvision_vit = partial(vision.VisionTransformer, 32, 8, 2, 2, 16, 32, num_classes=5)
convnext = partial(ConvNeXt, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=5)
volo = partial(VOLO, (1, 1), embed_dims=(16, 16), num_heads=(2, 2), mlp_ratio=2.0, img_size=32,
               downsamples=(True, False), outlook_attention=(True, False), stem_hidden_dim=8,
               post_layers=("ca",))  # fmt: skip
swin = partial(SwinTransformer, img_size=32, patch_size=2, window_size=4, embed_dim=8,
               depths=(2, 2), num_heads=(2, 2), num_classes=5)  # fmt: skip
swin_v2 = partial(SwinTransformerV2, img_size=32, patch_size=2, window_size=4, embed_dim=8,
                  depths=(2, 2), num_heads=(2, 2), num_classes=5)  # fmt: skip


def torchvision_swin_v2(window: int) -> nn.Module:
    return vision.SwinTransformer([2, 2], 8, [2, 2], [2, 2], [window, window], num_classes=5,
                                  block=SwinTransformerBlockV2,
                                  downsample_layer=PatchMergingV2)  # fmt: skip


def efficientnet(**options: Any) -> nn.Module:
    block = {"block_type": "ir", "dw_kernel_size": 3, "pw_kernel_size": 1, "out_chs": 8,
             "exp_ratio": 2.0, "stride": 2, "act_layer": None, "noskip": False}  # fmt: skip
    return EfficientNet([[{**block, "se_ratio": 0.25, **options}]], stem_size=8, num_features=16,
                        num_classes=5)  # fmt: skip


def groups(channels: int, **_: Any) -> nn.Module:
    return nn.GroupNorm(8, channels)


def normed() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 4, 3))


def unnormed() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))


REFUSED: dict[str, tuple[Make, Make, str]] = {
    "BatchNorm for GroupNorm": (
        small, partial(small, norm_layer=groups), r"bn1\.running_mean is absent in the network"),
    "GroupNorm for BatchNorm": (
        partial(small, norm_layer=groups), small, r"bn1\.running_mean is \(64,\) in the network"),
    "LayerScale": (partial(vit, init_values=1.0), vit, r"blocks\.0\.ls1\.gamma is absent in the"),
    "no LayerScale": (vit, partial(vit, init_values=1.0), r"ls1\.gamma is \(16,\) in the network"),
    "register tokens": (partial(vit, reg_tokens=4, no_embed_class=True),
                        partial(vit, no_embed_class=True), r"reg_token is absent in the network"),
    "class token for mean": (vit, partial(vit, global_pool="avg"), r"fc_norm\.weight is \(16,\)"),
    "mean for class token": (partial(vit, global_pool="avg"), vit, r"norm\.weight is \(16,\) in"),
    "bias of qkv": (vit, partial(vit, qkv_bias=False), r"attn\.qkv\.bias is absent in the network"),
    "no bias of qkv": (partial(vit, qkv_bias=False), vit, r"attn\.qkv\.bias is \(48,\) in the"),
    "no positions": (vit, partial(vit, pos_embed="none"), "pos_embed is absent.*Build the network"),
    "positions of another size": (vit, partial(vit, img_size=48),
                                  r"pos_embed is \(1, 37, 16\) in the network, \(1, 17, 16\) in "
                                  r"the file.*size of the images.*\(timm: img_size=\)"),
    "distilled": (distilled, vit, r"dist_token is absent in the network, \(1, 1, 16\) in the file"),
    "inner layer of a head": (partial(torchvision_vit, representation_size=16), torchvision_vit,
                              r"heads\.pre_logits\.weight is absent in the network"),
    "no inner layer of a head": (
        torchvision_vit, partial(torchvision_vit, representation_size=16),
        r"pre_logits\.weight is .* in the network.*its last layer may differ\), load, and"),
    "inner layer of a head, to timm": (partial(torchvision_vit, representation_size=16),
                                       partial(vit, num_classes=0, mlp_ratio=2),
                                       r"heads\.pre_logits\.weight is absent"),
    "layer scale of ConvNeXt": (convnext, partial(convnext, ls_init_value=None),
                                r"blocks\.0\.gamma is absent in the network"),
    "squeeze and excitation": (efficientnet, partial(efficientnet, se_ratio=0.0),
                               r"se\.conv_reduce\.weight is absent in the network"),
    "no squeeze and excitation": (partial(efficientnet, se_ratio=0.0), efficientnet,
                                  r"se\.conv_reduce\.weight is \(.*\) in the network"),
    "stem of ResNet-D": (partial(timm.create_model, "resnet18d", num_classes=5, **narrow), small,
                         r"conv1\.weight is \(64, 3, 7, 7\) in the network, absent"),
    "windows": (swin, partial(swin, window_size=2), r"bias_table is .* in the network.*windows"),
    "windows without a table": (partial(torchvision_swin_v2, 4), partial(torchvision_swin_v2, 2),
                                r"relative_coords_table is \(1, 3, 3, 2\) in the network, "),
    "weight norm": (normed, unnormed, r"0\.weight is .* in the network, absent in the file"),
    "no weight norm": (unnormed, normed, r"original0 is .* in the network, absent in the file"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_of_another_architecture_is_refused(case: str, tmp_path: Path) -> None:
    saved, built, message = REFUSED[case]
    torch.save(saved().state_dict(), tmp_path / "net.pt")
    net = built()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=rf"does not fit {type(net).__name__} in .*{message}"):
        load_backbone(tmp_path / "net.pt", net)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("make", "left_out"),
    [
        (vision.mobilenet_v3_small, "classifier.0."),
        (partial(vision.vgg11, init_weights=False), "classifier.3."),
        (vision.convnext_tiny, "classifier.0."),
    ],
)
def test_only_the_last_layer_of_a_classifier_may_be_missing(
    make: Make, left_out: str, tmp_path: Path
) -> None:
    with torch.device("meta"):
        net = make()
    names = {n: tuple(v.shape) for n, v in net.state_dict().items()}
    last = max((n for n in names if n.startswith("classifier.")), key=list(names).index)[:13]
    path = tmp_path / "net.pt"
    zero = torch.zeros(())
    torch.save({n: zero.expand(s) for n, s in names.items() if s and n[:13] != last}, path)
    with pytest.warns(UserWarning, match="non-meta parameter"):
        missing = load_backbone(path, net).missing
    assert {n[:13] for n in missing if not n.endswith("num_batches_tracked")} == {last}
    kept = {n: zero.expand(s) for n, s in names.items() if s and not n.startswith(left_out)}
    torch.save(kept, path)
    with pytest.raises(ValueError, match=rf"{left_out}weight is .* in the network, absent in the"):
        load_backbone(path, net)


def with_prefix(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def older_swin(net: nn.Module) -> dict[str, Tensor]:
    """With the buffers that timm stored until 0.9."""
    buffers = {n: b for n, b in net.named_buffers() if b is not None}
    assert any("relative_position_index" in n for n in buffers)
    return {**net.state_dict(), **buffers, "layers.0.blocks.1.attn_mask": torch.zeros(3, 3)}


def averaged(net: nn.Module) -> dict[str, Tensor]:
    return torch.optim.swa_utils.AveragedModel(net).state_dict()


def with_ema(net: nn.Module) -> dict[str, Any]:
    other = {n: torch.zeros_like(v) for n, v in net.state_dict().items()}
    return {"model": net.state_dict(), "model_ema": other, "epoch": 3}


def inside_lightning(net: nn.Module) -> dict[str, Any]:
    other = {n: torch.zeros_like(v) for n, v in net.state_dict().items()}
    both = with_prefix("ema_model.", other) | with_prefix("model.", net.state_dict())
    return {"state_dict": {**both, "criterion.weight": torch.ones(5)}}


def compiled_blocks(net: nn.Module) -> dict[str, Tensor]:
    return {n.replace("layer1.", "layer1._orig_mod."): v for n, v in net.state_dict().items()}


def masked(net: nn.Module) -> dict[str, Any]:
    """As masked autoencoders are published."""
    extra = {"mask_token": torch.ones(1, 1, 16), "decoder_pos_embed": torch.ones(1, 17, 8),
             "decoder_blocks.0.norm1.weight": torch.ones(8)}  # fmt: skip
    return {"model": net.state_dict() | extra}


def plain(net: nn.Module) -> dict[str, Tensor]:
    return net.state_dict()


ACCEPTED: dict[str, tuple[Make, Callable[[nn.Module], Any], Make]] = {
    "another last layer": (small, plain, partial(small, num_classes=3)),
    "no last layer": (small, plain, partial(small, num_classes=0)),
    "no last layer in the file": (partial(small, num_classes=0), plain, small),
    "norm before the last layer": (levit, plain, partial(levit, num_classes=0)),
    "no norm before the last layer": (partial(levit, num_classes=0), plain, levit),
    "an auxiliary last layer": (
        partial(volo, num_classes=7), plain, partial(volo, num_classes=5)),
    "no auxiliary last layer": (partial(volo, num_classes=0), plain, partial(volo, num_classes=5)),
    "two last layers": (distilled, plain, partial(distilled, num_classes=0)),
    "weights for other methods": (vit, masked, vit),
    "buffers of older timm": (swin, older_swin, partial(swin, num_classes=0)),
    "buffers of older timm, again": (swin_v2, older_swin, swin_v2),
    "buffers of torchvision": (partial(torchvision_swin_v2, 4), plain,
                               partial(torchvision_swin_v2, 4)),
    "half precision": (vit, lambda net: net.bfloat16().state_dict(), vit),
    "averaged": (small, averaged, small),
    "with EMA": (small, with_ema, small),
    "with EMA and a criterion": (small, inside_lightning, small),
    "compiled blocks": (small, compiled_blocks, small),
    "one dict under another key": (
        small, lambda net: {"model_state_dict": net.state_dict(), "epoch": 3}, small),
    "weight norm": (normed, plain, normed),
}  # fmt: skip


def randomised(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        for name, buffer in net.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand(buffer.shape))
    return net.eval()


def features(net: nn.Module, images: Tensor) -> Tensor:
    learner = BYOL(net.float().eval(), tuple(images.shape[2:]), projection_size=2,
                   projection_hidden_size=2, use_momentum=False).eval()  # fmt: skip
    with torch.no_grad():
        return learner.representation(images, normalise=False)


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_accepted_gives_the_features_it_gave(case: str, tmp_path: Path) -> None:
    saved, state_of, built = ACCEPTED[case]
    source, net = randomised(saved()), built()
    torch.save(state_of(source), tmp_path / "net.pt")
    load_backbone(tmp_path / "net.pt", net)
    images = torch.rand(3, 3, *((64, 64) if type(net).__name__.startswith("Levit") else (32, 32)))
    torch.testing.assert_close(features(net, images), features(source, images))


def test_what_no_name_can_tell_is_told_by_the_metadata(tmp_path: Path) -> None:
    export_backbone(timm.create_model("resnet50", **narrow), tmp_path / "net.safetensors")
    blurred = timm.create_model("resnetblur50", **narrow)
    with pytest.warns(UserWarning, match="is of 'resnet50' by its metadata, .* 'resnetblur50'"):
        load_backbone(tmp_path / "net.safetensors", blurred)


def state(**changes: Any) -> dict[str, Any]:
    return nn.Linear(4, 4).state_dict() | changes


@pytest.mark.parametrize(
    ("held", "net", "message"),
    [
        (state(weight=torch.ones(4, 4, dtype=torch.int8)), lambda: nn.Linear(4, 4),
         r"weight is \(4, 4\) in the network, \(4, 4\) int8 in the file"),
        (state(weight=torch.ones(4, 4, device="meta")), lambda: nn.Linear(4, 4),
         r"weight is \(4, 4\) in the network, \(4, 4\) without values in the file"),
        ({0: torch.ones(3)}, small, r"holds no tensors under its keys \(0\); expected a state_"),
        ({"weight": [torch.ones(3)]}, small, "holds no tensors under its keys"),
        ({}, small, r"holds no tensors under its keys \(none\)"),
        ({"student": state(), "teacher": state()}, small,
         r"the tensors of several under its keys \('student', 'teacher'\).*by itself"),
        (state(), lambda: nn.LazyLinear(4), "weight of LazyLinear has no shape yet; expected"),
        (state(), lambda: BYOL(unnormed(), 16, projection_hidden_size=4),
         r"is a BYOL learner; expected its backbone.*load_backbone\(path, learner\.net\)"),
        (state(), small, "No name is the same: the file has weight, bias"),
    ],
)  # fmt: skip
def test_what_holds_no_weights_for_a_network_is_named(
    held: dict, net: Make, message: str, tmp_path: Path
) -> None:
    torch.save(held, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=message):
        load_backbone(tmp_path / "net.pt", net())


def chain(**parts: nn.Module) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for name, part in parts.items():
        net.add_module(name, part)
    return net


PLAIN = partial(nn.Linear, 8, 8)
IN_THE_PATH: dict[str, tuple[Make, Make]] = {
    "a projector": (chain, lambda: chain(projector=nn.Sequential(PLAIN()), fc=PLAIN())),
    "a decoder of another width": (
        lambda: chain(decoder=nn.Sequential(nn.Linear(8, 6)), fc=nn.Linear(6, 4)),
        lambda: chain(decoder=nn.Sequential(nn.Linear(8, 7)), fc=nn.Linear(7, 4)),
    ),
    "a head's name in the middle": (
        lambda: chain(classifier=PLAIN()),
        lambda: chain(fc=nn.Sequential(PLAIN(), nn.BatchNorm1d(8)), classifier=PLAIN()),
    ),
    "a Linear before the file's own head": (
        lambda: chain(embed=PLAIN(), fc=nn.Linear(8, 4)),
        lambda: chain(fc=nn.Linear(8, 4)),
    ),
}


@pytest.mark.parametrize(("made", "given"), IN_THE_PATH.values(), ids=IN_THE_PATH.keys())
def test_layers_between_images_and_representation_are_never_excused_by_their_names(
    made: Make, given: Make, tmp_path: Path
) -> None:
    torch.save(made().state_dict(), tmp_path / "net.pt")
    with pytest.raises(ValueError, match="does not fit"):
        load_backbone(tmp_path / "net.pt", given())
