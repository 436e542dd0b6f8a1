"""The recipe of docs/deploy.md gives the learner's features, for batch sizes it did not see."""

import re
from pathlib import Path

import pytest
import timm
import torch

from byol_pytorch import BYOL
from byol_pytorch.checkpoint import export_backbone

PAGE = Path(__file__).parents[1] / "docs" / "deploy.md"
NETWORKS = {
    "resnet10t": {},
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_exported_programs_give_the_features_of_the_learner(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    torch.manual_seed(0)
    learner = BYOL(timm.create_model(name, **NETWORKS[name]), 32, projection_hidden_size=16)
    learner(torch.rand(8, 3, 32, 32))  # moves the batch statistics
    learner.eval()
    monkeypatch.chdir(tmp_path)
    export_backbone(learner, "backbone.safetensors", model_args=NETWORKS[name])
    capture, to_onnx, run, _ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)

    names: dict[str, object] = {}
    exec(capture, names)
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = learner.representation(images)
        features = torch.export.load("backbone.pt2").module()(images)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)

    exec(to_onnx, names)
    names["example"] = images
    exec(run, names)
    torch.testing.assert_close(torch.from_numpy(names["features"]), expected, rtol=1e-4, atol=1e-5)
