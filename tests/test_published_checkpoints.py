"""Files of other projects load name by name, and run nothing that they name."""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from checkpoint_helpers import installed, layout, marked, write_mmengine
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from byol_pytorch.checkpoint import load, load_backbone

NUMBERS = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


def numbered(name: str) -> str:
    """Where nn.Sequential(*list(resnet.children())[:-1]) has a ResNet's weight."""
    first, _, rest = name.partition(".")
    return f"backbone.{NUMBERS[first]}.{rest}"


def after(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


FILES = [
    # the layout's file, the network, where the file has its weights, and what the report says
    ("mmpretrain_byol_resnet50", "resnet50", after("backbone."), "MMSelfSup or MMPretrain"),
    ("mmselfsup_0x_byol_resnet18", "resnet18", after("backbone."), "MMSelfSup or MMPretrain"),
    ("lightly_benchmark_byol_resnet50", "resnet50", after("backbone."), "lightly"),
    ("lightly_byol_resnet18", "resnet18", numbered, "lightly, numbered ResNet"),
    ("solo_learn_byol_resnet18", "resnet18", after("backbone."), "solo-learn"),
    ("solo_learn_older_byol_resnet18", "resnet18", after("encoder."), "solo-learn, older"),
    ("lucidrains_byol_resnet18", "resnet18", after("net."), "lucidrains byol-pytorch"),
    ("moco_v2_resnet18", "resnet18", after("module.encoder_q."), "MoCo"),
]


@pytest.mark.parametrize("make", [timm.create_model, torchvision.models.get_model])
@pytest.mark.parametrize(("file", "name", "where", "source"), FILES, ids=[f[0] for f in FILES])
def test_each_weight_is_the_online_networks(
    file: str, name: str, where: Any, source: str, make: Any, tmp_path: Path
) -> None:
    tensors, net = marked(layout(file)), make(name, num_classes=7)
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "file.pth")
    report = load_backbone(tmp_path / "file.pth", net)
    backbone = {n: v for n, v in net.state_dict().items() if not n.startswith("fc.")}
    for weight, value in backbone.items():
        assert (value == tensors[where(weight)]).all(), weight
    assert set(report.loaded) == set(backbone)
    assert set(report.missing) == {"fc.weight", "fc.bias"}
    assert set(report.renamed) == {(where(weight), weight) for weight in backbone}
    assert all(where("fc.")[:-3] in unused and "fc." in unused for unused in report.unexpected)
    assert report.source == source and report.padding == "torch"


@pytest.mark.parametrize("zipped", [True, False])
def test_mmengines_logs_do_not_hinder(zipped: bool, tmp_path: Path) -> None:
    tensors = marked(layout("mmselfsup_0x_byol_resnet18"))
    write_mmengine(tensors, tmp_path / "epoch_200.pth", zipped=zipped)
    with pytest.raises(ValueError, match=r"holds (mmengine|numpy)\..*, and"):
        load(tmp_path / "epoch_200.pth")
    net = torchvision.models.resnet18(num_classes=7)
    assert set(load_backbone(tmp_path / "epoch_200.pth", net).missing) == {"fc.weight", "fc.bias"}
    assert (net.layer4[1].bn2.bias == tensors["backbone.layer4.1.bn2.bias"]).all()
    assert not any(name.startswith("mmengine") for name in sys.modules)


def test_lightnings_settings_do_not_hinder(tmp_path: Path) -> None:
    learner = {f"learner.{n}": v for n, v in marked(layout("lucidrains_byol_resnet18")).items()}
    with installed("omegaconf.dictconfig.DictConfig", "train.Settings") as (config, settings):
        hyper = {"backbone": nn.Linear(2, 2), "config": config(), "own": settings(),
                 "args": argparse.Namespace(a=1), "path": Path("a"), "seed": np.int64(3),
                 "counts": defaultdict(list, a=[1]), "dims": {1, 2}}  # fmt: skip
        torch.save({"state_dict": learner, "hyper_parameters": hyper}, tmp_path / "last.ckpt")
    report = load_backbone(tmp_path / "last.ckpt", timm.create_model("resnet18"))
    assert report.missing == () and report.source == "lucidrains byol-pytorch"


def test_an_extracted_backbone_is_read(tmp_path: Path) -> None:
    net, other = torchvision.models.resnet18(), timm.create_model("resnet18", num_classes=0)
    weights = {n: v for n, v in net.state_dict().items() if not n.startswith("fc.")}
    torch.save({"state_dict": weights, "author": "MMSelfSup"}, tmp_path / "backbone.pth")
    report = load_backbone(tmp_path / "backbone.pth", other)
    assert report.missing == report.unexpected == report.renamed == ()
    assert report.source == "plain names"


def test_a_numbered_network_takes_a_named_file(tmp_path: Path) -> None:
    net, images = torchvision.models.resnet18().eval(), torch.rand(1, 3, 64, 64)
    numbered_net = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1]).eval()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    load_backbone(tmp_path / "net.pt", numbered_net)
    net.fc = nn.Identity()
    assert torch.equal(numbered_net(images).flatten(1), net(images))


def timm_vit() -> nn.Module:
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2,
                             mlp_ratio=2, num_classes=5).eval()  # fmt: skip


def torchvision_vit(**options: Any) -> nn.Module:
    net = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5, **options)
    return net.eval()


def randomised(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.5)
    return net


@pytest.mark.parametrize("pair", [(timm_vit, torchvision_vit), (torchvision_vit, timm_vit)])
def test_timms_and_torchvisions_transformers_give_the_same(pair: Any, tmp_path: Path) -> None:
    source, other = randomised(pair[0]()), pair[1]()
    torch.save(source.state_dict(), tmp_path / "vit.pt")
    report = load_backbone(tmp_path / "vit.pt", other)
    assert report.missing == report.unexpected == ()
    assert report.source == "plain names, torchvision ViT"
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(other(images), source(images), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_the_published_transformers_fit_whole(tmp_path: Path) -> None:
    with torch.device("meta"):
        timm_net = timm.create_model("vit_base_patch16_224")
        torchvision_net = torchvision.models.vit_b_16()
    shapes = {n: tuple(v.shape) for n, v in torchvision_net.state_dict().items()}
    old = {n.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): s
           for n, s in shapes.items()}  # fmt: skip
    for names in (shapes, old, layout("mmpretrain_vit_base")):
        torch.save({"state_dict": marked(names)}, tmp_path / "vit.pth")
        report = load_backbone(tmp_path / "vit.pth", timm_net)
        assert set(report.missing) <= {"head.weight", "head.bias"} and report.unexpected == ()


def mmpretrain_forward(w: dict[str, Tensor], x: Tensor, heads: int) -> Tensor:
    """mmpretrain/models/backbones/vision_transformer.py, out_type cls_token."""

    def norm(x: Tensor, at: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{at}.weight"], w[f"{at}.bias"], 1e-6)

    def linear(x: Tensor, at: str) -> Tensor:
        return F.linear(x, w[f"{at}.weight"], w[f"{at}.bias"])

    patch = w["patch_embed.projection.weight"]
    x = F.conv2d(x, patch, w["patch_embed.projection.bias"], patch.shape[-1])
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1) + w["pos_embed"]
    for at in sorted({name.rsplit(".ln1", 1)[0] for name in w if ".ln1" in name}):
        q, k, v = (
            linear(norm(x, f"{at}.ln1"), f"{at}.attn.qkv").unflatten(-1, (3, heads, -1)).unbind(2)
        )
        attention = (torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", attention, v).flatten(2)
        x = x + linear(mixed, f"{at}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"{at}.ln2"), f"{at}.ffn.layers.0.0"))
        x = x + linear(hidden, f"{at}.ffn.layers.1")
    return norm(x, "ln1")[:, 0]


def small_mmpretrain_vit() -> dict[str, Tensor]:
    sizes = {768: 16, 2304: 48, 3072: 32, 197: 17, 16: 8}
    shapes = {n: tuple(sizes.get(v, v) for v in s) for n, s in layout("mmpretrain_vit_base").items()
              if not n.startswith("layers.") or int(n.split(".")[1]) < 2}  # fmt: skip
    return {name: torch.randn(shape) * 0.5 for name, shape in shapes.items()}


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_mmpretrains_transformer_gives_the_same(prefix: str, tmp_path: Path) -> None:
    weights, net = small_mmpretrain_vit(), timm_vit()
    torch.save({"state_dict": {prefix + n: v for n, v in weights.items()}}, tmp_path / "vit.pth")
    report = load_backbone(tmp_path / "vit.pth", net)
    assert report.source.endswith(", MMPretrain ViT")
    assert ("ln1.weight", "norm.weight") in [(a.removeprefix(prefix), b) for a, b in report.renamed]
    images = torch.rand(2, 3, 32, 32)
    features = net.forward_head(net.forward_features(images), pre_logits=True)
    torch.testing.assert_close(
        features, mmpretrain_forward(weights, images, 2), rtol=1e-4, atol=1e-4
    )


def test_a_transformer_with_more_than_the_network_has_is_refused(tmp_path: Path) -> None:
    weights = small_mmpretrain_vit()
    weights["layers.0.ffn.gamma2.weight"] = torch.ones(16)  # layer scale
    torch.save({"state_dict": weights}, tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=r"ffn\.gamma2\.weight is absent in the network, \(16,\)"):
        load_backbone(tmp_path / "vit.pth", timm_vit())
    stem = [torchvision.models.vision_transformer.ConvStemConfig(16, 3, 8)]
    torch.save(torchvision_vit(conv_stem_configs=stem).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=r"patch_embed\.proj\.weight is \(16, 3, 8, 8\) in"):
        load_backbone(tmp_path / "vit.pth", timm_vit())
