"""A folder by export_backbone is a pretrained model to timm's own loader."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from byol_pytorch import BYOL
from byol_pytorch.checkpoint import export_backbone, facts, load_backbone, same_padding

NETWORKS = {
    "resnet10t": {},
    "resnet10t, narrow, gray": {"in_chans": 1, "channels": [8, 8, 16, 16]},
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]},
    "efficientnet_b0": {},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_timm_loads_the_folder_and_gives_the_features(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    args = NETWORKS[name]
    net = timm.create_model(name.split(",")[0], **args)
    channels = args.get("in_chans", 3)
    learner = BYOL(net, 32, projection_hidden_size=16)
    learner(torch.rand(8, channels, 32, 32))  # moves the batch statistics
    folder = tmp_path / "folder"
    export_backbone(learner, folder, model_args=args or None)
    assert {f.name for f in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}

    images = torch.rand(3, channels, 32, 32)
    learner.eval()
    with torch.no_grad():
        expected = learner.representation(images)
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        found = timm.data.resolve_model_data_config(loaded)
        if channels == 3:
            mean, std = (torch.tensor(found[key]).view(3, 1, 1) for key in ("mean", "std"))
            images = (images - mean) / std
        torch.testing.assert_close(loaded(images), expected, rtol=1e-4, atol=1e-5)
        assert tuple(found["input_size"]) == (channels, 32, 32)

        classes = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=10).eval()
        pooled = classes.forward_head(classes.forward_features(images), pre_logits=True)
        torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)
        assert classes(images).shape == (3, 10)


def test_the_folder_reads_as_the_file_does(tmp_path: Path) -> None:
    net = timm.create_model("resnet10t")
    learner = BYOL(net, 32, projection_hidden_size=16)
    export_backbone(learner, tmp_path / "one.safetensors")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "README.md").write_text("mine")
    export_backbone(learner, tmp_path / "folder")
    assert (tmp_path / "folder" / "README.md").read_text() == "mine"
    assert facts(tmp_path / "folder") == facts(tmp_path / "one.safetensors")
    other = timm.create_model("resnet10t", num_classes=0)
    load_backbone(tmp_path / "folder", other)
    for name, value in other.state_dict().items():
        assert torch.equal(value, net.state_dict()[name])


def test_a_card_names_what_the_network_expects(tmp_path: Path) -> None:
    export_backbone(timm.create_model("resnet10t"), tmp_path / "f", mean=[0.5] * 3, std=[0.2] * 3)
    text = (tmp_path / "f" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: timm\n")
    assert "mean [0.5, 0.5, 0.5] and std [0.2, 0.2, 0.2]" in text
    config = json.loads((tmp_path / "f" / "config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == [0.5] * 3
    assert config["num_classes"] == 1000  # a bare network keeps its classifier


def test_a_folder_of_what_timm_cannot_build_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"this Sequential.*model_args=.*\.safetensors"):
        export_backbone(nn.Sequential(nn.Conv2d(3, 4, 3)), tmp_path / "f")
    narrow = timm.create_model("resnet10t", channels=[8, 8, 16, 16])
    with pytest.raises(ValueError, match="model_args="):
        export_backbone(narrow, tmp_path / "f")
    padded = timm.create_model("resnet10t")
    same_padding(padded)
    with pytest.raises(ValueError, match="pads as TensorFlow"):
        export_backbone(padded, tmp_path / "f")
    assert not (tmp_path / "f").exists()
