"""channel_statistics against numpy over the joint images, however they come in batches."""

import numpy as np
import pytest
import torch

from byol_pytorch.augment import channel_statistics


@pytest.mark.parametrize("kind", ["uint8", "float", "labelled"])
def test_the_statistics_are_those_of_all_pixels(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    images = (
        torch.rand(11, 3, 6, 5, generator=generator) * torch.tensor([0.1, 0.5, 1.0])[:, None, None]
    )
    images[:5] = images[:5] / 3  # the batches differ
    batches = list(images.split(4))
    if kind == "uint8":
        images = (images * 255).round().to(torch.uint8)
        batches = list(images.split(4))
        images = images / 255
    if kind == "labelled":
        batches = [(batch, torch.zeros(len(batch))) for batch in batches]
    mean, std = channel_statistics(batches)
    pixels = images.double().numpy().transpose(1, 0, 2, 3).reshape(3, -1)
    np.testing.assert_allclose(mean, pixels.mean(1), rtol=1e-6)
    np.testing.assert_allclose(std, pixels.std(1), rtol=1e-6)


def test_a_small_deviation_beside_a_large_mean_is_kept() -> None:
    volumes = 0.9 + 1e-6 * torch.randn(64, 2, 2, 8, 8, dtype=torch.float64)
    _, std = channel_statistics(volumes.split(8))
    expected = volumes.transpose(0, 1).flatten(1).numpy().std(1)
    np.testing.assert_allclose(std, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "no batch has an image"),
        ([torch.rand(2, 3, 4, 4), torch.rand(2, 1, 4, 4)], ValueError, "1 channels and those"),
        ([torch.zeros(2, 3, 4, 4)], ValueError, "channel 0 has mean 0 and std 0"),
        ([torch.full((2, 3, 4, 4), torch.nan)], ValueError, "channel 0 has mean nan"),
        ([torch.zeros(2, 3, 4, 4, dtype=torch.int16)], TypeError, "dtype torch.int16"),
        ([torch.zeros(5)], TypeError, r"a Tensor \(5,\)"),
        ([{"image": torch.rand(2, 3, 4, 4)}], TypeError, "dict"),
    ],
)
def test_what_has_no_statistics_is_refused(batches, error, message) -> None:
    with pytest.raises(error, match=message):
        channel_statistics(batches)
