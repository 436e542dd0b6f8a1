"""What is found inside the wrappers of torch.compile, DDP and DataParallel."""

import pytest
import torch
from torch import nn

from byol_pytorch import BYOL
from byol_pytorch.checkpoint import export_backbone, load_backbone
from byol_pytorch.parallel import is_learner, uncompiled, unreplicated, unwrapped


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


WRAPPERS = {
    "compiled": torch.compile,
    "replicated": nn.DataParallel,
    "replicated, then compiled": lambda net: torch.compile(nn.DataParallel(net)),
    "compiled, then replicated": lambda net: nn.DataParallel(torch.compile(net)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_every_wrapper_is_looked_through(wrap):
    net = network()
    assert unwrapped(wrap(net)) is net and unwrapped(net) is net


def test_one_kind_of_wrapper_is_taken_off_by_itself():
    net = network()
    compiled = torch.compile(net)
    assert unreplicated(nn.DataParallel(compiled)) is compiled
    assert uncompiled(compiled) is net and unreplicated(compiled) is compiled


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_learner_is_exported_as_the_bare_one(wrap, tmp_path):
    learner = BYOL(network(), 16, projection_size=4, projection_hidden_size=8)
    export_backbone(wrap(learner), tmp_path / "net.safetensors")
    other = network()
    report = load_backbone(tmp_path / "net.safetensors", wrap(other))
    assert set(report.loaded) == set(learner.net.state_dict()) and report.image_size == (16, 16)
    torch.testing.assert_close(other.state_dict(), learner.net.state_dict())


def test_a_learner_is_known_by_its_face_and_a_network_is_not_one():
    learner = BYOL(network(), 16, projection_size=4, projection_hidden_size=8)
    assert is_learner(learner) and is_learner(torch.compile(learner))
    assert not is_learner(learner.net) and not is_learner(learner.target)
