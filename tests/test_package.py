import subprocess
import sys

import pytest

import byol_pytorch


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    return done.stdout


def test_importing_the_library_imports_neither_kornia_nor_timm():
    out = python(
        "import sys, byol_pytorch; print([m for m in ('kornia', 'timm', 'transformers')"
        " if m in sys.modules])"
    )
    assert out.strip() == "[]"


def test_the_learner_works_without_timm():
    out = python(
        "import sys; sys.modules['timm'] = None\n"
        "import torch, torchvision\nfrom byol_pytorch import BYOL\n"
        "learner = BYOL(torchvision.models.resnet18(), 32)\n"
        "print(learner(torch.rand(2, 3, 32, 32)).isfinite().item())"
    )
    assert out.strip() == "True"


@pytest.mark.parametrize("name", ["BYOLTrainer", "MockDataset"])
def test_what_0_9_1_had_beside_the_learner_points_to_the_example(name):
    with pytest.raises(ImportError, match=f"{name}.*examples/quickstart.py"):
        getattr(byol_pytorch, name)


def test_other_missing_names_are_attribute_errors():
    assert not hasattr(byol_pytorch, "nothing")


def test_version_is_at_least_one():
    assert int(byol_pytorch.__version__.split(".")[0]) >= 1
