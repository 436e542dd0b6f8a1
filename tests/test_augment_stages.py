"""Every stage of a view, with fixed draws, against an independent reference."""

import math

import kornia
import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from augment_helpers import (
    BARE,
    JITTER,
    PATHS,
    STILL,
    close,
    drawn,
    many,
    photographs,
    small_photographs,
    transform,
)

from byol_pytorch.augment import IMAGENET_MEAN, IMAGENET_STD, ViewAugmentation, byol_views


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


# Crop and permutations


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("out", [(64, 64), (48, 96), (224, 224)])
def test_crop_equals_torchvisions_antialiased_resized_crop(path: str, out: tuple[int, int]) -> None:
    view = ViewAugmentation(out, **{**BARE, "flip": 0.5, "vertical_flip": 0.3})
    images = photographs().repeat(2, 1, 1, 1)
    params = drawn(view, images)
    got = transform(view, path)(images, params)
    got_float = transform(view, path)(images / 255, params)
    for i, box in enumerate(params["box"].tolist()):
        args = (*box, list(out), TF.InterpolationMode.BICUBIC)
        expected = TF.resized_crop(images[i], *args, antialias=True)
        as_float = TF.resized_crop(images[i] / 255, *args, antialias=True).clamp(0, 1)
        if params["flip"][i]:
            expected, as_float = expected.flip(-1), as_float.flip(-1)
        if params["vertical_flip"][i]:
            expected, as_float = expected.flip(-2), as_float.flip(-2)
        torch.testing.assert_close(got_float[i], as_float, atol=2e-5, rtol=0)
        if path == "eager":
            assert torch.equal(got[i], expected / 255)
        else:
            assert (got[i] - as_float).abs().max() < 2e-5
            assert (got[i] - expected / 255).abs().mean() < 0.003  # torchvision rounds to uint8


def test_crop_agrees_with_pil() -> None:
    view = ViewAugmentation(64, **BARE)
    params = drawn(view, photographs())
    got = view.transform(photographs(), params)
    for i, (top, left, height, width) in enumerate(params["box"].tolist()):
        crop = TF.to_pil_image(photographs()[i]).crop((left, top, left + width, top + height))
        expected = TF.to_image(crop.resize((64, 64), 3))  # 3: bicubic, always antialiased in PIL
        assert (got[i] * 255 - expected).abs().max() <= 1.01


@pytest.mark.parametrize("path", PATHS)
def test_flips_and_turns_are_exact_permutations(path: str) -> None:
    images = small_photographs(24, 24)
    view = ViewAugmentation(24, **{**STILL, "vertical_flip": 0.5, "rotate90": 0.5})
    apply = transform(view, path)
    for flip, vertical, turns in [(f, v, t) for f in (0, 1) for v in (0, 1) for t in range(4)]:
        params = drawn(view, images, flip=flip, vertical_flip=vertical, quarter_turns=turns)
        expected = images / 255
        expected = expected.flip(-1) if flip else expected
        expected = expected.flip(-2) if vertical else expected
        assert torch.equal(apply(images, params), expected.rot90(turns, (-2, -1)))


def test_turns_have_the_asked_rate_and_fit_the_view() -> None:
    square = ViewAugmentation(32, rotate90=0.6, vertical_flip=0.3).sample(many())
    assert close(square["vertical_flip"], 0.3)
    for turns, rate in enumerate((0.4, 0.2, 0.2, 0.2)):
        assert close(square["quarter_turns"] == turns, rate)
    oblong = ViewAugmentation((32, 48), rotate90=0.6).sample(many())
    assert close(oblong["quarter_turns"] == 2, 0.6)
    assert set(oblong["quarter_turns"].tolist()) == {0, 2}
    assert ViewAugmentation((32, 48), rotate90=1.0)(photographs()).shape == (4, 3, 32, 48)


# Colour, blur, solarize, normalisation


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("first", range(4))
def test_jitter_equals_torchvision_and_kornia_in_each_images_order(first: int, path: str) -> None:
    images = small_photographs(32, 40).repeat(6, 1, 1, 1) / 255
    view = ViewAugmentation((32, 40), **{**STILL, "jitter": 0.8})
    rest = [number for number in range(4) if number != first]
    permutations = [[first, *(rest[i] for i in p)] for p in ([0, 1, 2], [2, 0, 1], [1, 2, 0])]
    order = torch.tensor(permutations).repeat(8, 1)
    params = drawn(view, images, order=order)
    got = transform(view, path)(images, params)
    for i, image in enumerate(images):
        expected = by_kornia = image
        for number in order[i].tolist() if params["jitter"][i] else ():
            factor = params[JITTER[number]][i].item()
            expected = getattr(TF, f"adjust_{JITTER[number]}")(expected, factor)
            by_kornia = (
                kornia.enhance.adjust_brightness_accumulative,
                kornia.enhance.adjust_contrast_with_mean_subtraction,
                kornia.enhance.adjust_saturation_with_gray_subtraction,
                lambda x, turns: kornia.enhance.adjust_hue(x, 2 * math.pi * turns),
            )[number](by_kornia, factor)
        torch.testing.assert_close(got[i], expected, atol=2e-5, rtol=0)
        torch.testing.assert_close(got[i], by_kornia, atol=2e-4, rtol=0)  # gray weights 0.299


@pytest.mark.parametrize("path", PATHS)
def test_hue_is_hsvs_for_every_shift_and_for_tied_channels(path: str) -> None:
    images = (torch.rand(8, 3, 16, 16) * 4).round() / 4  # many gray pixels and ties
    view = ViewAugmentation(16, **{**STILL, "jitter": 1, "hue": 0.5, "brightness": 0})
    turns = torch.linspace(-0.5, 0.5, 8)
    params = drawn(view, images, hue=turns, contrast=1, saturation=1, jitter=True)
    expected = kornia.enhance.adjust_hue(images, 2 * math.pi * turns)
    torch.testing.assert_close(transform(view, path)(images, params), expected, atol=5e-6, rtol=0)


def test_yiq_hue_keeps_luma_and_turns_the_same_way() -> None:
    image = torch.tensor([0.6, 0.4, 0.4]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    view = ViewAugmentation(
        8, **{**STILL, "jitter": 1, "hue_mode": "yiq", "contrast": 0, "saturation": 0}
    )
    params = drawn(view, image, hue=0.1, brightness=1)
    red, green, blue = view.transform(image, params)[0, :, 0, 0].tolist()
    assert green > blue  # from red towards yellow, as HSV's positive shifts
    assert 0.299 * red + 0.587 * green + 0.114 * blue == pytest.approx(0.4598, abs=2e-3)


@pytest.mark.parametrize("path", PATHS)
def test_grayscale_is_torchvisions_for_the_drawn_images_only(path: str) -> None:
    images = small_photographs(24, 24)
    view = ViewAugmentation(24, **{**STILL, "grayscale": 0.5})
    chosen = torch.tensor([True, False, True, False])
    got = transform(view, path)(images, drawn(view, images, grayscale=chosen))
    expected = TF.rgb_to_grayscale(images / 255, 3)
    torch.testing.assert_close(got[chosen], expected[chosen], atol=2e-6, rtol=0)
    assert torch.equal(got[~chosen], images[~chosen] / 255)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("size", "kernel"), [((224, 224), 23), ((40, 72), 5), ((33, 20), 39)])
def test_blur_is_kornias_and_torchvisions(size: tuple[int, int], kernel: int, path: str) -> None:
    images = small_photographs(*size) / 255
    view = ViewAugmentation(size, **{**STILL, "blur": 0.5, "blur_kernel": kernel})
    chosen = torch.tensor([True, False, True, False])
    sigma = torch.tensor([0.1, 0.7, 2.0, 1.0])
    got = transform(view, path)(images, drawn(view, images, blur=chosen, sigma=sigma))
    assert torch.equal(got[~chosen], images[~chosen])
    both = sigma[:, None].expand(4, 2)
    expected = kornia.filters.gaussian_blur2d(images, (kernel, kernel), both, "reflect")
    torch.testing.assert_close(got[chosen], expected[chosen], atol=2e-6, rtol=0)
    by_torchvision = TF.gaussian_blur(images[2], [kernel, kernel], [2.0, 2.0])
    torch.testing.assert_close(got[2], by_torchvision, atol=2e-6, rtol=0)


def test_default_kernel_is_about_a_tenth_of_the_side() -> None:
    sides = {224: 23, 96: 9, 64: 7, 32: 3, (224, 448): 23}
    assert {side: ViewAugmentation(side).blur_kernel for side in sides} == sides


@pytest.mark.parametrize("path", PATHS)
def test_solarize_is_kornias(path: str) -> None:
    images = small_photographs(24, 24) / 255
    view = ViewAugmentation(24, **{**STILL, "solarize": 0.5, "solarize_threshold": 0.3})
    chosen = torch.tensor([False, True, True, False])
    got = transform(view, path)(images, drawn(view, images, solarize=chosen))
    assert torch.equal(got[~chosen], images[~chosen])
    assert torch.equal(got[chosen], kornia.enhance.solarize(images[chosen], 0.3))


def test_normalisation_is_imagenets_for_three_channels_and_none_for_others() -> None:
    images = small_photographs(24, 24) / 255
    quiet = {key: value for key, value in STILL.items() if key not in ("mean", "std")}
    view = ViewAugmentation(24, **quiet)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    expected = kornia.enhance.normalize(images, mean, std)
    torch.testing.assert_close(view(images), expected, atol=1e-6, rtol=0)
    assert torch.equal(view(images[:, :1]), images[:, :1])
    two = ViewAugmentation(24, **quiet | {"mean": (0.5, 0.1), "std": None})
    expected = images[:, :2] - torch.tensor([0.5, 0.1]).view(2, 1, 1)
    torch.testing.assert_close(two(images[:, :2]), expected)


# The whole deepmind view, and other channel counts


def deepmind_view(image: np.ndarray, p: dict[str, np.ndarray], side: int) -> np.ndarray:
    """DeepMind's dataset.py and augmentations.py, (H, W, 3) uint8 -> (side, side, 3), written anew
    from what their functions do, one pixel axis at a time."""
    top, left, height, width = p["box"]
    crop = image[top : top + height, left : left + width].astype(np.float64)

    def resize(x: np.ndarray) -> np.ndarray:  # along axis 0; tf.image.resize, Keys' cubic
        n = x.shape[0]
        out = np.zeros((side, *x.shape[1:]))
        for target in range(side):
            at = (target + 0.5) * n / side - 0.5
            total = 0.0
            for source in range(math.floor(at) - 1, math.floor(at) + 3):
                d = abs(source - at)
                near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
                weight = (near if d <= 1 else far) if 0 <= source < n else 0.0
                if weight:
                    out[target] += weight * x[source]
                    total += weight
            out[target] /= total
        return out

    x = np.clip(resize(resize(crop).swapaxes(0, 1)).swapaxes(0, 1) / 255, 0, 1)
    if p["flip"]:
        x = x[:, ::-1]

    def through_hsv(x: np.ndarray, saturation: float, shift: float) -> np.ndarray:
        import colorsys

        flat = [colorsys.rgb_to_hsv(*pixel) for pixel in x.reshape(-1, 3)]
        flat = [((h + shift) % 1, min(max(s * saturation, 0), 1), v) for h, s, v in flat]
        return np.array([colorsys.hsv_to_rgb(*pixel) for pixel in flat]).reshape(x.shape)

    for number in p["order"] if p["jitter"] else ():
        if number == 0:
            x = x + p["brightness"]
        elif number == 1:
            mean = x.mean(axis=(0, 1))
            x = p["contrast"] * (x - mean) + mean
        elif number == 2:
            x = through_hsv(x, p["saturation"], 0)
        else:
            x = through_hsv(x, 1, p["hue"])
        x = np.clip(x, 0, 1)
    if p["grayscale"]:
        x = np.repeat(x @ [[0.2989], [0.5870], [0.1140]], 3, axis=2)
    if p["blur"]:
        radius = int(side / 10 / 2)
        kernel = np.exp(-(np.arange(-radius, radius + 1.0) ** 2) / (2 * p["sigma"] ** 2))
        kernel /= kernel.sum()
        for axis in (1, 0):
            x = np.apply_along_axis(np.convolve, axis, x, kernel, mode="same")
    if p["solarize"]:
        x = np.where(x < 0.5, x, 1 - x)
    return np.clip(x, 0, 1)


@pytest.mark.parametrize("path", PATHS)
def test_deepmind_preset_is_deepminds_code(path: str) -> None:
    images = small_photographs(60, 76).repeat(4, 1, 1, 1)
    view = byol_views(40, "deepmind", mean=None, std=None, blur=0.5, solarize=0.5, grayscale=0.3)[1]
    params = drawn(view, images)
    got = transform(view, path)(images, params)
    for i, image in enumerate(images):
        values = {name: value[i].numpy() for name, value in params.items()}
        expected = deepmind_view(image.permute(1, 2, 0).numpy(), values, 40)
        np.testing.assert_allclose(got[i].permute(1, 2, 0).numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("channels", [1, 4, 13])
def test_other_channel_counts_leave_out_what_needs_rgb(channels: int, path: str) -> None:
    images = small_photographs(50, 70).flatten(0, 1).repeat(9, 1, 1)[: 8 * channels]
    images = images.unflatten(0, (8, channels))
    view = byol_views((32, 40))[1]
    assert view(images).shape == (8, channels, 32, 40)
    view = ViewAugmentation((50, 70), **{**STILL, "jitter": 1, "grayscale": 1})
    params = drawn(view, images)
    got = transform(view, path)(images, params)
    for i, image in enumerate(images / 255):
        brightness, contrast = params["brightness"][i], params["contrast"][i]
        x = image
        for number in params["order"][i].tolist():
            if number == 0:
                x = (x * brightness).clamp(0, 1)
            if number == 1:
                x = (x * contrast + (1 - contrast) * x.mean()).clamp(0, 1)
        torch.testing.assert_close(got[i], x, atol=1e-5, rtol=0)
