"""Every stage of a view, with fixed draws, against an independent reference."""

import math

import kornia
import kornia.augmentation as K
import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from augment_helpers import (
    BARE,
    JITTER,
    PATHS,
    STILL,
    boxes,
    by,
    close,
    drew,
    fix,
    many,
    of,
    one_view,
    photographs,
    small_photographs,
)

from byol_pytorch.augment import IMAGENET_MEAN, IMAGENET_STD, byol_views, stages


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


# Crop and permutations


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("out", [(64, 64), (48, 96), (224, 224)])
def test_crop_equals_torchvisions_antialiased_resized_crop(path: str, out: tuple[int, int]) -> None:
    view = by(one_view(out, **BARE), path)
    images = photographs().repeat(2, 1, 1, 1)
    params = one_view(out, **BARE).forward_parameters(images.shape)
    got, got_float = view(images, params=params), view(images / 255, params=params)
    for i, box in enumerate(boxes(params).tolist()):
        args = (*box, list(out), TF.InterpolationMode.BICUBIC)
        expected = TF.resized_crop(images[i], *args, antialias=True)
        as_float = TF.resized_crop(images[i] / 255, *args, antialias=True).clamp(0, 1)
        torch.testing.assert_close(got_float[i], as_float, atol=2e-5, rtol=0)
        if path == "eager":
            assert torch.equal(got[i], expected / 255)
        else:
            assert (got[i] - as_float).abs().max() < 2e-5
            assert (got[i] - expected / 255).abs().mean() < 0.003  # torchvision rounds to uint8


def test_crop_agrees_with_pil() -> None:
    view = one_view(64, **BARE)
    got = view(photographs())
    for i, (top, left, height, width) in enumerate(boxes(view._params).tolist()):
        crop = TF.to_pil_image(photographs()[i]).crop((left, top, left + width, top + height))
        expected = TF.to_image(crop.resize((64, 64), 3))  # 3: bicubic, always antialiased in PIL
        assert (got[i] * 255 - expected).abs().max() <= 1.01


def test_without_the_filter_the_crop_is_stock_kornias_where_it_enlarges() -> None:
    # torch's bicubic without antialiasing has a = -0.75 where Keys, PIL and TensorFlow have -0.5.
    image = small_photographs(20, 24) / 255
    crop = stages.RandomResizedCrop((40, 40), antialias=False)
    stock = K.RandomResizedCrop((40, 40), resample="bicubic", align_corners=False)
    got = crop(image)
    assert (stock(image, params=crop._params) - got).abs().mean() < 0.01


@pytest.mark.parametrize("path", PATHS)
def test_flips_and_turns_are_exact_permutations(path: str) -> None:
    images = small_photographs(24, 24)
    view = one_view(24, **{**STILL, "flip": 0.5, "vertical_flip": 0.5, "rotate90": 0.5})
    apply = by(view, path)
    for flip, vertical, turns in [(f, v, t) for f in (0, 1) for v in (0, 1) for t in range(4)]:
        params = view.forward_parameters(images.shape)
        fix(params, "RandomHorizontalFlip", batch_prob=flip)
        fix(params, "RandomVerticalFlip", batch_prob=vertical)
        fix(params, "RandomRotation90", batch_prob=turns > 0, times=turns)
        expected = images / 255
        expected = expected.flip(-1) if flip else expected
        expected = expected.flip(-2) if vertical else expected
        assert torch.equal(apply(images, params=params), expected.rot90(turns, (-2, -1)))


def test_turns_have_the_asked_rate_and_fit_the_view() -> None:
    square = one_view(32, rotate90=0.6, vertical_flip=0.3).forward_parameters(many())
    assert close(drew(square, "RandomVerticalFlip"), 0.3)
    assert close(drew(square, "RandomRotation90"), 0.6)
    for turns in (1, 2, 3):
        assert close(of(square, "RandomRotation90")["times"] == turns, 1 / 3)
    oblong = one_view((32, 48), rotate90=0.6).forward_parameters(many())
    assert set(of(oblong, "RandomRotation90")["times"].tolist()) == {2}
    assert one_view((32, 48), rotate90=1.0)(photographs()).shape == (4, 3, 32, 48)


def test_quarter_turns_turn_as_stock_kornias() -> None:
    images = small_photographs(25, 25) / 255
    ours, stock = stages.RandomRotation90((1, 3), p=1.0), K.RandomRotation90((1, 3), p=1.0)
    torch.testing.assert_close(ours(images), stock(images, params=ours._params), atol=1e-4, rtol=0)


# Colour, blur, solarize, normalisation


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("first", range(4))
def test_jitter_equals_torchvision_and_kornia_in_each_images_order(first: int, path: str) -> None:
    images = small_photographs(32, 40).repeat(6, 1, 1, 1) / 255
    view = one_view((32, 40), **{**STILL, "jitter": 0.8})
    rest = [number for number in range(4) if number != first]
    permutations = [[first, *(rest[i] for i in p)] for p in ([0, 1, 2], [2, 0, 1], [1, 2, 0])]
    orders = torch.tensor(permutations).repeat(8, 1)
    params = fix(view.forward_parameters(images.shape), "ColorJitter", orders=orders)
    got, draws = by(view, path)(images, params=params), of(params, "ColorJitter")
    for i, image in enumerate(images):
        expected = by_kornia = image
        for number in orders[i].tolist() if draws["batch_prob"][i] else ():
            factor = draws[f"{JITTER[number]}_factor"][i].item()
            expected = getattr(TF, f"adjust_{JITTER[number]}")(expected, factor)
            by_kornia = (
                kornia.enhance.adjust_brightness_accumulative,
                kornia.enhance.adjust_contrast_with_mean_subtraction,
                kornia.enhance.adjust_saturation_with_gray_subtraction,
                lambda x, turns: kornia.enhance.adjust_hue(x, 2 * math.pi * turns),
            )[number](by_kornia, factor)
        torch.testing.assert_close(got[i], by_kornia, atol=1e-5, rtol=0)
        torch.testing.assert_close(got[i], expected, atol=2e-4, rtol=0)  # gray weights 0.2989


@pytest.mark.parametrize("path", PATHS)
def test_hue_is_hsvs_for_every_shift_and_for_tied_channels(path: str) -> None:
    images = (torch.rand(8, 3, 16, 16) * 4).round() / 4  # many gray pixels and ties
    view = one_view(16, **{**STILL, "jitter": 1, "hue": 0.5, "brightness": 0})
    turns = torch.linspace(-0.5, 0.5, 8)
    params = view.forward_parameters(images.shape)
    fix(params, "ColorJitter", hue_factor=turns, contrast_factor=1, saturation_factor=1)
    expected = kornia.enhance.adjust_hue(images, 2 * math.pi * turns)
    torch.testing.assert_close(by(view, path)(images, params=params), expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("path", PATHS)
def test_a_jitter_of_one_strength_changes_nothing_else(path: str) -> None:
    images = small_photographs(16, 16) / 255
    for name, expected in (
        ("brightness", lambda x, f: (x * f).clamp(0, 1)),
        ("hue", lambda x, f: kornia.enhance.adjust_hue(x[None], 2 * math.pi * f)[0]),
    ):
        still = dict.fromkeys(JITTER, 0.0) | {name: 0.3}
        view = one_view(16, **{**STILL, "jitter": 1.0, **still})
        params = view.forward_parameters(images.shape)
        got = by(view, path)(images, params=params)
        for i, factor in enumerate(of(params, "ColorJitter")[f"{name}_factor"]):
            torch.testing.assert_close(got[i], expected(images[i], factor), atol=5e-6, rtol=0)


@pytest.mark.parametrize("path", PATHS)
def test_grayscale_is_for_the_drawn_images_only(path: str) -> None:
    images = small_photographs(24, 24)
    chosen = torch.tensor([True, False, True, False])
    for preset, red in (("imagenet", 0.299), ("deepmind", 0.2989)):
        view = one_view(24, preset, **{**STILL, "grayscale": 0.5})
        params = view.forward_parameters(images.shape)
        got = by(view, path)(images, params=fix(params, "RandomGrayscale", batch_prob=chosen))
        weights = torch.tensor([red, 0.587, 0.114]).view(3, 1, 1)
        expected = (images[chosen] / 255 * weights).sum(1, keepdim=True).expand(-1, 3, -1, -1)
        torch.testing.assert_close(got[chosen], expected, atol=2e-6, rtol=0)
        assert torch.equal(got[~chosen], images[~chosen] / 255)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("size", "kernel"), [((224, 224), 23), ((40, 72), 5), ((33, 20), 39)])
def test_blur_is_kornias_and_torchvisions(size: tuple[int, int], kernel: int, path: str) -> None:
    images = small_photographs(*size) / 255
    view = one_view(size, **{**STILL, "blur": 0.5, "blur_kernel": kernel})
    chosen = torch.tensor([True, False, True, False])
    sigma = torch.tensor([0.1, 0.7, 2.0, 1.0])
    params = view.forward_parameters(images.shape)
    got = by(view, path)(
        images, params=fix(params, "RandomGaussianBlur", batch_prob=chosen, sigma=sigma)
    )
    assert torch.equal(got[~chosen], images[~chosen])
    both = sigma[:, None].expand(4, 2)
    expected = kornia.filters.gaussian_blur2d(images, (kernel, kernel), both, "reflect")
    torch.testing.assert_close(got[chosen], expected[chosen], atol=2e-6, rtol=0)
    by_torchvision = TF.gaussian_blur(images[2], [kernel, kernel], [2.0, 2.0])
    torch.testing.assert_close(got[2], by_torchvision, atol=2e-6, rtol=0)


def test_default_kernel_is_about_a_tenth_of_the_side() -> None:
    sides = {224: 23, 96: 9, 64: 7, 32: 3, (224, 448): 23}
    for side, kernel in sides.items():
        assert one_view(side)[4].flags["kernel_size"] == (kernel, kernel)


@pytest.mark.parametrize("path", PATHS)
def test_solarize_is_kornias(path: str) -> None:
    images = small_photographs(24, 24) / 255
    view = one_view(24, **{**STILL, "solarize": 0.5, "solarize_threshold": 0.3})
    chosen = torch.tensor([False, True, True, False])
    params = view.forward_parameters(images.shape)
    got = by(view, path)(images, params=fix(params, "RandomSolarize", batch_prob=chosen))
    assert torch.equal(got[~chosen], images[~chosen])
    assert torch.equal(got[chosen], kornia.enhance.solarize(images[chosen], 0.3))
    with_additions = stages.RandomSolarize((0.2, 0.8), (-0.3, 0.3), p=1.0)
    stock = K.RandomSolarize((0.2, 0.8), (-0.3, 0.3), p=1.0)
    torch.testing.assert_close(
        with_additions(images), stock(images, params=with_additions._params), atol=1e-6, rtol=0
    )


def test_normalisation_is_imagenets_for_three_channels_and_none_for_others() -> None:
    images = small_photographs(24, 24) / 255
    quiet = {key: value for key, value in STILL.items() if key not in ("mean", "std")}
    view = one_view(24, **quiet)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    expected = kornia.enhance.normalize(images, mean, std)
    torch.testing.assert_close(view(images), expected, atol=1e-6, rtol=0)
    assert torch.equal(view(images[:, :1]), images[:, :1])
    two = one_view(24, **quiet | {"mean": (0.5, 0.1), "std": None})
    expected = images[:, :2] - torch.tensor([0.5, 0.1]).view(2, 1, 1)
    torch.testing.assert_close(two(images[:, :2]), expected)
    for given in (np.array([0.5, 0.1]), torch.tensor([0.5, 0.1])):
        again = one_view(24, **quiet | {"mean": given, "std": None})
        torch.testing.assert_close(again(images[:, :2]), expected)


# Our stages in kornia's hands


PAIRS = [
    (stages.ColorJitter(0.4, 0.4, 0.2, 0.1), K.ColorJitter(0.4, 0.4, 0.2, 0.1)),
    (
        stages.RandomGaussianBlur((5, 5), (0.1, 2.0), p=0.5),
        K.RandomGaussianBlur((5, 5), (0.1, 2.0), p=0.5),
    ),
    (
        stages.RandomSolarize((0.3, 0.7), (0.0, 0.0), p=0.5),
        K.RandomSolarize((0.3, 0.7), (0.0, 0.0), p=0.5),
    ),
]


@pytest.mark.parametrize(("ours", "stock"), PAIRS, ids=lambda stage: type(stage).__module__[:6])
def test_draws_replay_in_stock_kornia_and_stocks_in_ours(ours: K.base, stock: K.base) -> None:
    images = torch.rand(12, 3, 20, 24)
    from_stock = stock(images)
    torch.testing.assert_close(ours(images, params=stock._params), from_stock, atol=1e-5, rtol=0)
    ours.same_on_batch = True  # stock has one order for all
    from_ours = ours(images)
    torch.testing.assert_close(stock(images, params=ours._params), from_ours, atol=1e-5, rtol=0)
    ours.same_on_batch = False


def test_what_is_not_ours_to_do_faster_is_stock_kornias() -> None:
    images = torch.rand(4, 3, 20, 24)
    for size, border in ((7, "reflect"), (5, "replicate"), (5, "circular"), (5, "constant")):
        kernel = (3, size) if size == 7 else (5, 5)
        ours, stock = (m.RandomGaussianBlur(kernel, (0.5, 2.0), border, p=1.0) for m in (stages, K))
        expected = stock(images)
        torch.testing.assert_close(ours(images, params=stock._params), expected, atol=1e-5, rtol=0)
    ours, stock = (m.RandomSolarize(0.1, 0.1, p=1.0) for m in (stages, K))
    expected = stock(images)
    torch.testing.assert_close(ours(images, params=stock._params), expected, atol=1e-6, rtol=0)
    assert ours.flags["thresholds"] == (0.4, 0.6)
    with pytest.raises(ValueError, match=r"times=\(1, 3\).*\(20, 24\).*times=\(2, 2\)"):
        stages.RandomRotation90((1, 3), p=1.0)(images)
    assert stages.RandomResizedCrop((8, 8))(images[:0]).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("shift", [0.4, -30.0])
def test_edited_boxes_are_whole_pixels_inside_the_image_on_every_path(shift: float) -> None:
    view, images = one_view(16, **BARE), small_photographs(40, 50) / 255
    params = view.forward_parameters(images.shape)
    of(params, "RandomResizedCrop")["src"] += shift
    eager, traced = (by(view, path)(images, params=params) for path in PATHS)
    torch.testing.assert_close(eager, traced, atol=2e-5, rtol=0)


def test_stages_used_alone_pass_gradients_on() -> None:
    images = small_photographs(24, 24) / 255
    for ours, stock in PAIRS:
        ours.same_on_batch = True
        grads = []
        for stage, given in ((ours, None), (stock, ours)):
            x = images.clone().requires_grad_()
            stage(x, params=given and given._params).square().sum().backward()
            grads.append(x.grad)
        ours.same_on_batch = False
        assert (grads[0] - grads[1]).abs().mean() < 0.02


def test_masks_boxes_and_keypoints_follow_the_crop_and_the_flip() -> None:
    images = torch.zeros(6, 3, 60, 80)
    images[:, :, 20:24, 30:36] = 1.0
    mask = (torch.arange(80) // 20 % 2 * 7.0).expand(6, 1, 60, 80)
    pipeline = K.AugmentationSequential(
        stages.RandomResizedCrop((48, 48), (0.6, 1.0)),
        K.RandomHorizontalFlip(p=0.5),
        stages.ColorJitter(0.4, 0.4, 0.2, 0.1),
        data_keys=["input", "mask", "bbox_xyxy", "keypoints"],
    )
    stock = K.AugmentationSequential(
        K.RandomResizedCrop((48, 48), (0.6, 1.0), resample="bicubic", align_corners=False),
        K.RandomHorizontalFlip(p=0.5),
        K.ColorJitter(0.4, 0.4, 0.2, 0.1),
        data_keys=["input", "mask", "bbox_xyxy", "keypoints"],
    )
    box = torch.tensor([[[30.0, 20.0, 36.0, 24.0]]]).expand(6, -1, -1)
    point = torch.tensor([[[33.0, 22.0]]]).expand(6, -1, -1)
    got = pipeline(images, mask, box, point)
    assert set(got[1].unique().tolist()) == {0.0, 7.0}
    expected = stock(images, mask, box, point, params=pipeline._params)
    for mine, theirs in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, theirs)
    for i in range(6):
        x, y = got[3][i, 0].round().long().tolist()
        if 2 <= x < 46 and 2 <= y < 46:
            # The bright rectangle is where the point is.
            assert got[0][i, :, y, x].amin() > got[0][i].mean() + 0.2


def test_a_later_stage_draws_for_the_cropped_size() -> None:
    for container in (K.ImageSequential, K.AugmentationSequential):
        pipeline = container(
            stages.RandomResizedCrop((24, 32)), K.RandomErasing(scale=(0.9, 0.99), p=1.0)
        )
        pipeline(torch.ones(8, 3, 200, 300))
        erased = of(pipeline._params, "RandomErasing")
        assert (erased["xs"] + erased["widths"] <= 32).all()
        assert (erased["ys"] + erased["heights"] <= 24).all()


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
    params = view.forward_parameters(images.shape)
    got = by(view, path)(images, params=params)
    jitter = of(params, "ColorJitter")
    values = {
        "box": boxes(params),
        "order": jitter["orders"],
        "brightness": jitter["brightness_factor"] - 1,
        "sigma": of(params, "RandomGaussianBlur")["sigma"],
        **{name: jitter[f"{name}_factor"] for name in JITTER[1:]},
        **{
            name: drew(params, kind)
            for name, kind in (
                ("flip", "RandomHorizontalFlip"), ("jitter", "ColorJitter"),
                ("grayscale", "RandomGrayscale"), ("blur", "RandomGaussianBlur"),
                ("solarize", "RandomSolarize"),
            )
        },
    }  # fmt: skip
    for i, image in enumerate(images):
        of_image = {name: value[i].numpy() for name, value in values.items()}
        expected = deepmind_view(image.permute(1, 2, 0).numpy(), of_image, 40)
        np.testing.assert_allclose(got[i].permute(1, 2, 0).numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("channels", [1, 4, 13])
def test_other_channel_counts_leave_out_what_needs_rgb(channels: int, path: str) -> None:
    images = small_photographs(50, 70).flatten(0, 1).repeat(9, 1, 1)[: 8 * channels]
    images = images.unflatten(0, (8, channels))
    view = byol_views((32, 40))[1]
    assert view(images).shape == (8, channels, 32, 40)
    view = one_view((50, 70), **{**STILL, "jitter": 1, "grayscale": 1})
    params = view.forward_parameters(images.shape)
    got, draws = by(view, path)(images, params=params), of(params, "ColorJitter")
    for i, image in enumerate(images / 255):
        brightness, contrast = draws["brightness_factor"][i], draws["contrast_factor"][i]
        x = image
        for number in draws["orders"][i].tolist():
            if number == 0:
                x = (x * brightness).clamp(0, 1)
            if number == 1:
                x = (x * contrast + (1 - contrast) * x.mean()).clamp(0, 1)
        torch.testing.assert_close(got[i], x, atol=1e-5, rtol=0)
