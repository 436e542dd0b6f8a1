import pytest
import torch
from torch import nn

from byol_pytorch.heads import BatchNorm, mlp, simplicial_embedding, simsiam_mlp


def kinds(head: nn.Module) -> list[str]:
    return [type(m).__name__ for m in head.modules() if not list(m.children())]


def test_mlp_is_the_papers_linear_norm_relu_linear_with_biases_as_in_deepminds_code():
    head = mlp(12, 8, 20, None)
    assert kinds(head) == ["Linear", "BatchNorm", "ReLU", "Linear"]
    assert head[0].weight.shape == (20, 12)
    assert head[0].bias is not None
    assert head[3].weight.shape == (8, 20)
    assert head[3].bias is None


def test_simsiam_projector_has_three_layers_and_a_last_norm_without_affine():
    head = simsiam_mlp(12, 8, 20, None)
    assert kinds(head).count("Linear") == 3
    assert head[-1].weight is None
    assert head(torch.randn(16, 12)).mean(0).abs().max() < 1e-5


def test_batch_norm_of_one_process_equals_torchs_in_value_gradient_and_statistics():
    ours, theirs = BatchNorm(6, sync=None), nn.BatchNorm1d(6)
    x = torch.randn(10, 6)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours(a).square().sum().backward()
    theirs(b).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_simplicial_embedding_gives_distributions_of_each_simplex():
    embedding = simplicial_embedding(10, 4, 8, 0.1, None)
    out = embedding(torch.randn(16, 10))
    assert out.shape == (16, 32)
    assert (out >= 0).all()
    torch.testing.assert_close(out.view(16, 4, 8).sum(-1), torch.ones(16, 4))
    logits = embedding[1](embedding[0](torch.zeros(16, 10)))
    expected = torch.cat([(part / 0.1).softmax(-1) for part in logits.split(8, dim=-1)], dim=-1)
    torch.testing.assert_close(embedding(torch.zeros(16, 10)), expected)


@pytest.mark.parametrize("sync", [None, True, False])
def test_heads_need_no_process_group(sync):
    assert mlp(4, 4, 8, sync)(torch.randn(3, 4)).shape == (3, 4)
