"""The two view distributions: what is drawn, and whole views against stock kornia."""

import copy
import math
import pickle

import kornia
import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
from augment_helpers import (
    JITTER,
    PATHS,
    close,
    drawn,
    many,
    photographs,
    small_photographs,
    transform,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from byol_pytorch.augment import ViewAugmentation, byol_views, per_image


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


# What is drawn


@pytest.mark.parametrize(
    ("preset", "index", "blur", "solarize"),
    [
        ("imagenet", 0, 1.0, 0.0),
        ("imagenet", 1, 0.1, 0.2),
        ("deepmind", 0, 1.0, 0.0),
        ("deepmind", 1, 0.1, 0.2),
        ("cifar", 0, 0.0, 0.0),
        ("cifar", 1, 0.0, 0.2),
    ],
)
def test_draws_have_the_papers_rates_and_ranges(
    preset: str, index: int, blur: float, solarize: float
) -> None:
    view = byol_views(224, preset)[index]
    params = view.sample(many())
    assert close(params["flip"], 0.5)
    assert close(params["jitter"], 0.8)
    assert close(params["grayscale"], 0.2)
    assert close(params["blur"], blur)
    assert close(params["solarize"], solarize)
    assert not params["vertical_flip"].any()
    assert not params["quarter_turns"].any()
    shift = -1 if preset == "deepmind" else 0
    for name, low, high in (
        ("brightness", 0.6 + shift, 1.4 + shift),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
        ("sigma", 0.1, 2.0),
    ):
        # Uniform: the quantiles lie on the straight line between the bounds.
        quantiles = params[name].quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
        expected = torch.linspace(low, high, 5)
        torch.testing.assert_close(quantiles, expected, atol=0.015 * (high - low), rtol=0)
        assert low - 1e-6 <= params[name].min() <= params[name].max() <= high + 1e-6
    orders, counts = params["order"].unique(dim=0, return_counts=True)
    assert len(orders) == 24
    assert (counts / 20_000 - 1 / 24).abs().max() < 0.007


@pytest.mark.parametrize("size", [(240, 300), (100, 500), (300, 100)])
def test_crop_boxes_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    height, width = size
    boxes = ViewAugmentation(224).sample(many(6000, *size))["box"]
    picture = torch.zeros(1, height, width)
    crop = T.RandomResizedCrop(224)
    values = [crop.make_params([picture]) for _ in range(6000)]
    expected = torch.tensor([[v["top"], v["left"], v["height"], v["width"]] for v in values])
    top, left, h, w = boxes.unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    for of in (
        lambda b: (b[:, 2] * b[:, 3]) / (height * width),
        lambda b: (b[:, 3] / b[:, 2]).log(),
        lambda b: b[:, 0].float(),
        lambda b: b[:, 1].float(),
        lambda b: b[:, 0] / (height - b[:, 2]).clamp(min=1),
    ):
        assert kolmogorov_smirnov(of(boxes), of(expected)) < 0.035  # its 99.9 % point is 0.0356


def kolmogorov_smirnov(a: Tensor, b: Tensor) -> float:
    at = torch.cat([a, b]).sort().values
    below = [torch.searchsorted(x.sort().values, at, right=True) / len(x) for x in (a, b)]
    return (below[0] - below[1]).abs().max().item()


def test_deepmind_boxes_are_one_draw_cut_to_the_image() -> None:
    boxes = byol_views(224, "deepmind")[0].sample(many(20_000, 100, 500))["box"]
    _, _, height, width = boxes.unbind(1)
    # sqrt(area / ratio) exceeds the height of 100 for most draws, and is then cut to it.
    rng = np.random.default_rng(0)
    area = rng.uniform(0.08, 1, 100_000) * 50_000
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), 100_000))
    expected_h = np.minimum(np.round(np.sqrt(area / ratio)), 100)
    expected_w = np.minimum(np.round(np.sqrt(area * ratio)), 500)
    assert abs((height == 100).float().mean().item() - (expected_h == 100).mean()) < 0.015
    assert abs(width.float().mean().item() - expected_w.mean()) < 1.5


def test_every_image_and_every_view_has_a_draw_of_its_own() -> None:
    twice = photographs()[:1].expand(2, -1, -1, -1)
    for view in byol_views(32, grayscale=0.0):
        one, two = view(twice)
        assert not torch.allclose(one, two)
        assert not torch.allclose(view(twice), view(twice))
    params = byol_views(32)[1].sample(many(512))
    for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
        assert 0 < params[name].sum() < 512
    for name in (*JITTER, "sigma"):
        assert len(params[name].unique()) > 500
    assert len(params["box"].unique(dim=0)) > 500


def test_different_draws_are_independent() -> None:
    params = byol_views(32)[1].sample(many())
    names = ("flip", "jitter", "grayscale", "blur", "solarize", *JITTER, "sigma")
    columns = [params[name].float() for name in names] + list(params["box"].float()[:, :3].T)
    correlation = torch.corrcoef(torch.stack(columns)) - torch.eye(len(columns))
    correlation[len(names) :, len(names) :] = 0  # a box's sides and place belong together
    assert correlation.abs().max() < 0.035


def test_a_generator_reproduces_views_and_leaves_the_global_one_alone() -> None:
    view = byol_views(32)[1]
    state = torch.get_rng_state()
    one, two, other = (
        view.sample(photographs(), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["box"], other["box"])
    views = []
    for _ in range(2):
        torch.manual_seed(3)
        views.append(view(photographs()))
    assert torch.equal(*views)


def test_no_more_samples_are_blurred_than_the_limit_allows() -> None:
    view = ViewAugmentation(32, blur=0.1)
    assert view.blur_limit(256) == math.ceil(25.6 + 4 * math.sqrt(0.1 * 0.9 * 256))
    assert ViewAugmentation(32, blur=1.0).blur_limit(256) == 256
    # A limit of 4 standard deviations is too rare to see, one of about 0 is not.
    view.blur_limit = lambda batch: batch // 10  # type: ignore[method-assign]
    counts = torch.tensor([view.sample(many(100))["blur"].sum() for _ in range(50)])
    assert counts.max() == 10


# Whole views


def statistics(view: Tensor) -> Tensor:
    """Per-channel mean and std, and the gradient energy."""
    steps = view.diff(dim=3).square().mean(), view.diff(dim=2).square().mean()
    spread = view.std(dim=(2, 3)).mean(dim=0)
    return torch.cat([view.mean(dim=(0, 2, 3)), spread, torch.stack(steps).sqrt()])


@pytest.mark.parametrize("index", [0, 1])
def test_views_are_distributed_as_stock_kornias(index: int) -> None:
    images = small_photographs(64, 64).repeat(150, 1, 1, 1)
    ours = byol_views(48, mean=None, std=None)[index](images)
    K = kornia.augmentation
    stock = K.AugmentationSequential(
        K.RandomResizedCrop((48, 48), (0.08, 1.0), (3 / 4, 4 / 3), resample="bicubic"),
        K.RandomHorizontalFlip(0.5),
        K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((5, 5), (0.1, 2.0), p=(1.0, 0.1)[index]),
        K.RandomSolarize(thresholds=(0.5, 0.5), additions=(0.0, 0.0), p=(0.0, 0.2)[index]),
        data_keys=["input"],
    )(images / 255)
    got, expected = statistics(ours), statistics(stock)
    torch.testing.assert_close(got[:3], expected[:3], atol=0.02, rtol=0)
    torch.testing.assert_close(got[3:6], expected[3:6], atol=0.01, rtol=0.05)
    torch.testing.assert_close(got[6:], expected[6:], atol=0, rtol=0.12)


@pytest.mark.parametrize("preset", ["imagenet", "deepmind", "cifar"])
def test_uint8_and_float_images_give_the_same_view(preset: str) -> None:
    for view in byol_views(64, preset, mean=None, std=None):
        params = drawn(view, photographs(), solarize=False)  # a jump at the threshold
        from_uint8 = view.transform(photographs(), params)
        for dtype in (torch.float32, torch.float64, torch.float16):
            difference = view.transform((photographs() / 255).to(dtype), params) - from_uint8
            assert difference.abs().mean() < 0.003


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("preset", ["imagenet", "deepmind"])
@pytest.mark.parametrize("hue_mode", ["hsv", "yiq"])
def test_floats_outside_the_unit_range_never_give_nan(
    preset: str, hue_mode: str, path: str
) -> None:
    images = torch.randn(8, 3, 40, 40)
    images[1] = 0
    images[2] *= 1e30
    images[3, :, ::2] = torch.inf
    view = byol_views(32, preset, hue_mode=hue_mode, mean=None, std=None)[1]
    others = (images.clamp(-60000, 60000).half(), images.bfloat16()) if path == "eager" else ()
    for batch in (images, *others):
        got = transform(view, path)(batch, view.sample(batch))
        assert got.dtype == torch.float32
        assert got.isfinite().all()
        assert got.min() >= 0
        assert got.max() <= 1


def test_views_carry_no_gradient_and_ignore_autocast() -> None:
    view = byol_views(32)[0]
    images = (photographs() / 255).requires_grad_()
    params = view.sample(images)
    plain = view.transform(images, params)
    assert not plain.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(view.transform(images, params), plain)
    assert not list(view.parameters())
    assert not view.state_dict()


def test_output_dtype_and_memory_format() -> None:
    view = ViewAugmentation(32, dtype=torch.bfloat16, channels_last=True)
    same = ViewAugmentation(32)
    params = view.sample(photographs())
    for path in PATHS:
        got = transform(view, path)(photographs(), params)
        assert got.dtype == torch.bfloat16
        assert got.is_contiguous(memory_format=torch.channels_last)
        expected = transform(same, path)(photographs(), params)
        assert expected.is_contiguous()
        assert torch.equal(got, expected.bfloat16())


def test_images_are_not_written_to() -> None:
    images = small_photographs(24, 24) / 255
    before = images.clone()
    ViewAugmentation(24, crop=False, grayscale=1.0, solarize=1.0)(images)
    assert torch.equal(images, before)


@pytest.mark.parametrize("preset", ["imagenet", "deepmind"])
def test_forward_traces_as_one_graph_and_never_again(preset: str) -> None:
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(byol_views(32, preset)[1], fullgraph=True, backend=graphs)
    images = small_photographs(40, 50)
    views = [compiled(images) for _ in range(3)]
    assert graphs.frame_count == 1
    assert views[0].shape == (4, 3, 32, 32)
    assert not torch.allclose(views[0], views[1])


@pytest.mark.slow
def test_compiled_batches_may_change_their_length() -> None:
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(byol_views(32)[1], fullgraph=True, backend=graphs)
    for length in (8, 7, 6, 5):
        assert len(compiled(small_photographs(40, 50).repeat(2, 1, 1, 1)[:length])) == length
    assert graphs.frame_count <= 2


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["imagenet", "deepmind"])
def test_compiled_views_equal_eager_ones(preset: str) -> None:
    view = byol_views(48, preset)[1]
    images = photographs().repeat(4, 1, 1, 1) / 255
    compiled = torch.compile(view.transform, fullgraph=True)
    for _ in range(3):
        params = view.sample(images)
        torch.testing.assert_close(
            compiled(images, params), view.transform(images, params), atol=1e-4, rtol=0
        )
    forward = torch.compile(view, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert not torch.allclose(forward(images), forward(images))


def test_peak_memory_stays_below_three_float_views() -> None:
    images = many(32, 256, 256).contiguous()
    view = byol_views(128)[0]
    view(images)
    with torch.profiler.profile(profile_memory=True) as profile:
        view(images)
    events = profile.profiler.kineto_results.events()
    changes = [
        e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if "[memory]" in e.name()
    ]
    peak = int(np.cumsum(changes).max())
    assert 1 <= peak / (32 * 3 * 128 * 128 * 4) < 3


# Other people's transforms, copies, errors


def test_a_torchvision_transform_draws_once_a_batch_and_per_image_mends_it() -> None:
    twice = photographs()[:1].expand(6, -1, -1, -1)
    crop = T.Compose([T.RandomResizedCrop(32), T.ToDtype(torch.float32, scale=True)])
    once = crop(twice)
    assert torch.equal(once[0], once[1])
    views = per_image(crop)(twice)
    assert views.shape == (6, 3, 32, 32)
    assert len(views.flatten(1).unique(dim=0)) == 6


def test_kornia_pipelines_draw_once_an_image() -> None:
    twice = photographs()[:1].expand(4, -1, -1, -1) / 255
    K = kornia.augmentation
    for container in (K.AugmentationSequential, K.ImageSequential):
        views = container(K.RandomResizedCrop((32, 32)), K.RandomHorizontalFlip())(twice)
        assert len(views.flatten(1).unique(dim=0)) == 4


def test_views_and_per_image_survive_copy_and_pickle() -> None:
    for original in (byol_views(32)[1], per_image(T.RandomHorizontalFlip())):
        for double in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
            torch.manual_seed(5)
            expected = original(photographs())
            torch.manual_seed(5)
            assert torch.equal(double(photographs()), expected)


def test_changes_hold_for_both_views() -> None:
    for view in byol_views(32, hue=0.05, crop=False, mean=(0.5,) * 3):
        assert (view.hue, view.crop, view.mean) == (0.05, False, (0.5, 0.5, 0.5))
    first, second = byol_views(32, "cifar", blur=0.5)
    assert (first.blur, second.blur, second.solarize) == (0.5, 0.5, 0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, "image_size=0.*positive int"),
        ({"image_size": 32.0}, "image_size=32.0"),
        ({"image_size": (32, 32, 3)}, "image_size=.*192, 256"),
        ({"image_size": True}, "image_size=True"),
        ({"flip": 1.5}, r"flip=1.5.*\[0, 1\]"),
        ({"blur": -0.1}, "blur=-0.1"),
        ({"jitter": math.nan}, "jitter=nan"),
        ({"hue": 0.6}, r"hue=0.6.*\[0, 0.5\]"),
        ({"contrast": -1}, "contrast=-1.*at least 0"),
        ({"scale": (0.5, 0.1)}, "scale=.*low <= high"),
        ({"ratio": (0.0, 1.0)}, "ratio=.*0 < low"),
        ({"sigma": (0.0, 2.0)}, "sigma="),
        ({"blur_kernel": 4}, "blur_kernel=4.*odd"),
        ({"blur_kernel": 65}, "blur_kernel=65.*63"),
        ({"std": (0.2, 0.0, 0.2)}, "std=.*positive"),
        ({"semantics": "pil"}, "semantics='pil'.*'torchvision', 'deepmind'"),
        ({"hue_mode": "lab"}, "hue_mode='lab'.*'hsv', 'yiq'"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViewAugmentation(**{"image_size": 32, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [
        (torch.zeros(3, 40, 40), {}, r"\(3, 40, 40\).*images\[None\]"),
        ([torch.zeros(3, 40, 40)], {}, "list.*tensor"),
        (torch.zeros(2, 3, 40, 40, dtype=torch.int32), {}, "int32.*65535"),
        (torch.zeros(2, 3, 40, 40, dtype=torch.bool), {}, "bool.*uint8"),
        (torch.zeros(2, 3, 40, 40), {"crop": False}, r"\(40, 40\).*crop=False.*\(32, 32\)"),
        (torch.zeros(2, 3, 40, 40), {"mean": (0.5,)}, "mean has 1 values.*3 channels"),
        (torch.zeros(2, 4, 40, 40), {"std": (1, 1, 1)}, "std has 3 values.*4 channels"),
    ],
)
def test_a_wrong_batch_is_named(images: Tensor, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        byol_views(32, **settings)[0](images)


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'imagnet'.*'imagenet', 'deepmind', 'cifar'"):
        byol_views(32, "imagnet")


def test_per_image_names_what_cannot_be_a_batch() -> None:
    with pytest.raises(TypeError, match=r"returned Image.*ToImage"):
        per_image(T.ToPILImage())(photographs())
    sizes = iter((20, 30, 40, 50))
    with pytest.raises(ValueError, match="one shape"):
        per_image(lambda image: image[:, : next(sizes)])(photographs())


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["imagenet", "deepmind"])
def test_forward_never_waits_for_the_device(preset: str) -> None:
    images = photographs().cuda()
    for view in byol_views(64, preset, rotate90=0.5):
        view(images)
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = view(images)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert got.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["imagenet", "deepmind"])
def test_forward_is_captured_in_a_cuda_graph(preset: str) -> None:
    images = photographs().cuda()
    view = byol_views(64, preset)[1]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            view(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = view(images)
    views = []
    for _ in range(2):
        graph.replay()
        views.append(got.clone())
    assert not torch.allclose(*views)
    assert views[1].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["imagenet", "deepmind"])
def test_a_gpus_views_are_a_cpus(preset: str) -> None:
    view = byol_views(64, preset, mean=None, std=None)[1]
    images = photographs().repeat(8, 1, 1, 1)
    params = drawn(view, images, solarize=False)
    expected = view.transform(images / 255, params)
    there = {name: value.cuda() for name, value in params.items()}
    compiled = torch.compile(view.transform, fullgraph=True)
    for apply in (view.transform, compiled):
        for batch in (images.cuda(), images.cuda() / 255):
            difference = apply(batch, there).cpu() - expected
            assert difference.abs().mean() < 5e-4
            assert difference.abs().max() < 0.02
