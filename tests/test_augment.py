"""The two view distributions: what is drawn, whole views against stock kornia, the container."""

import copy
import math
import pickle
import subprocess
import sys
import warnings

import kornia
import kornia.augmentation as K
import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
from augment_helpers import (
    BARE,
    JITTER,
    PATHS,
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
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from byol_pytorch import BYOL
from byol_pytorch.augment import IMAGENET_MEAN, IMAGENET_STD, byol_views, per_image, pipeline


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
    params = view.forward_parameters(many())
    kinds = [item.name.split("_")[0] for item in params]
    asked = {"RandomGaussianBlur": blur, "RandomSolarize": solarize}
    assert kinds == [
        "RandomResizedCrop", "RandomHorizontalFlip", "ColorJitter", "RandomGrayscale",
        *(kind for kind, rate in asked.items() if rate), "Normalize",
    ]  # fmt: skip
    assert close(drew(params, "RandomHorizontalFlip"), 0.5)
    assert close(drew(params, "ColorJitter"), 0.8)
    assert close(drew(params, "RandomGrayscale"), 0.2)
    for kind, rate in asked.items():
        assert not rate or close(drew(params, kind), rate)
    jitter = of(params, "ColorJitter")
    drawn = {name: jitter[f"{name}_factor"] for name in JITTER}
    ranges = [("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.8, 1.2)]
    ranges += [("hue", -0.1, 0.1)]
    if blur:
        drawn["sigma"] = of(params, "RandomGaussianBlur")["sigma"]
        ranges += [("sigma", 0.1, 2.0)]
    for name, low, high in ranges:
        # Uniform: the quantiles lie on the straight line between the bounds.
        quantiles = drawn[name].quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
        expected = torch.linspace(low, high, 5)
        torch.testing.assert_close(quantiles, expected, atol=0.015 * (high - low), rtol=0)
        assert low - 1e-6 <= drawn[name].min() <= drawn[name].max() <= high + 1e-6
    orders, counts = jitter["orders"].unique(dim=0, return_counts=True)
    assert len(orders) == 24
    assert (counts / 20_000 - 1 / 24).abs().max() < 0.007


@pytest.mark.parametrize("size", [(240, 300), (100, 500), (300, 100)])
def test_crop_boxes_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    height, width = size
    drawn = boxes(one_view(224).forward_parameters(many(6000, *size)))
    picture = torch.zeros(1, height, width)
    crop = T.RandomResizedCrop(224)
    values = [crop.make_params([picture]) for _ in range(6000)]
    expected = torch.tensor([[v["top"], v["left"], v["height"], v["width"]] for v in values])
    top, left, h, w = drawn.unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    for figure in (
        lambda b: (b[:, 2] * b[:, 3]) / (height * width),
        lambda b: (b[:, 3] / b[:, 2]).log(),
        lambda b: b[:, 0].float(),
        lambda b: b[:, 1].float(),
        lambda b: b[:, 0] / (height - b[:, 2]).clamp(min=1),
    ):
        assert (
            kolmogorov_smirnov(figure(drawn), figure(expected)) < 0.035
        )  # its 99.9 % point is 0.0356


def kolmogorov_smirnov(a: Tensor, b: Tensor) -> float:
    at = torch.cat([a, b]).sort().values
    below = [torch.searchsorted(x.sort().values, at, right=True) / len(x) for x in (a, b)]
    return (below[0] - below[1]).abs().max().item()


def test_deepmind_boxes_are_one_draw_cut_to_the_image() -> None:
    view = one_view(224, "deepmind")
    _, _, height, width = boxes(view.forward_parameters(many(20_000, 100, 500))).unbind(1)
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
    params = byol_views(32)[1].forward_parameters(many(512))
    for kind in (
        "RandomHorizontalFlip", "ColorJitter", "RandomGrayscale", "RandomGaussianBlur",
        "RandomSolarize",
    ):  # fmt: skip
        assert 0 < drew(params, kind).sum() < 512
    for name in JITTER:
        assert len(of(params, "ColorJitter")[f"{name}_factor"].unique()) > 500
    assert len(of(params, "RandomGaussianBlur")["sigma"].unique()) > 500
    assert len(boxes(params).unique(dim=0)) > 500


def test_different_draws_are_independent() -> None:
    params = byol_views(32)[1].forward_parameters(many())
    columns = [drew(params, item.name).float() for item in params[1:-1]]
    columns += [of(params, "ColorJitter")[f"{name}_factor"] for name in JITTER]
    columns += [of(params, "RandomGaussianBlur")["sigma"]]
    count = len(columns)
    columns += list(boxes(params).float()[:, :3].T)
    correlation = torch.corrcoef(torch.stack(columns)) - torch.eye(len(columns))
    correlation[count:, count:] = 0  # a box's sides and place belong together
    assert correlation.abs().max() < 0.035


def test_a_forked_seeded_state_reproduces_draws_and_leaves_the_global_one_alone() -> None:
    view = byol_views(32)[1]
    state, drawn = torch.get_rng_state(), []
    for seed in (1, 1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            drawn.append(view.forward_parameters(photographs().shape))
    assert torch.equal(torch.get_rng_state(), state)
    one, two, other = (view(photographs(), params=params) for params in drawn)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_draws_of_a_global_batch_are_cut_for_its_parts() -> None:
    view = byol_views(32)[1]
    images = photographs().repeat(3, 1, 1, 1)
    params = view.forward_parameters(images.shape)
    whole = view(images, params=params)
    parts = [view(images[s], params=view.take(params, s)) for s in (slice(0, 5), slice(5, 12))]
    assert torch.equal(torch.cat(parts), whole)
    numbers = torch.tensor([7, 2])
    assert torch.equal(view(images[numbers], params=view.take(params, numbers)), whole[numbers])
    with pytest.raises(ValueError, match=r"drawn for 12 images, and 5 came.*view\.take"):
        view(images[:5], params=params)
    del view[2]
    with pytest.raises(ValueError, match=r"draws of ColorJitter_2.*Draw anew"):
        view(images, params=params)
    for stage in (K.RandomMixUpV2(p=1.0), K.RandomChannelDropout(p=0.5)):
        view[2] = stage
        with pytest.raises(ValueError, match="cannot be cut"):
            view.take(view.forward_parameters(images.shape), slice(0, 5))


def test_draws_do_not_follow_a_cast_to_a_narrow_type() -> None:
    view = byol_views(32)[1].to(torch.bfloat16)
    params = view.forward_parameters(many(2000))
    for draws in (
        of(params, "ColorJitter")["hue_factor"],
        of(params, "RandomGaussianBlur")["sigma"],
    ):
        assert draws.dtype == torch.float32
        assert len(draws.unique()) > 1900
    assert view(photographs()).dtype == torch.float32


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
    for view in byol_views(64, preset, mean=None, std=None, solarize=0.0):  # no jump
        from_uint8 = view(photographs())
        for dtype in (torch.float32, torch.float64, torch.float16):
            as_float = view((photographs() / 255).to(dtype), params=view._params)
            assert (as_float - from_uint8).abs().mean() < 0.003


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("preset", ["imagenet", "deepmind"])
def test_floats_outside_the_unit_range_never_give_nan(preset: str, path: str) -> None:
    images = torch.randn(8, 3, 40, 40)
    images[1] = 0
    images[2] *= 1e30
    images[3, :, ::2] = torch.inf
    view = byol_views(32, preset, mean=None, std=None)[1]
    others = (images.clamp(-60000, 60000).half(), images.bfloat16()) if path == "eager" else ()
    for batch in (images, *others):
        got = by(view, path)(batch)
        assert got.dtype == torch.float32
        assert got.isfinite().all()
        assert got.min() >= 0
        assert got.max() <= 1


def test_views_carry_no_gradient_and_ignore_autocast() -> None:
    view = one_view(32)
    images = (photographs() / 255).requires_grad_()
    plain = view(images)
    assert not plain.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(view(images, params=view._params), plain)


def test_a_pipeline_adds_nothing_to_a_learners_state() -> None:
    for view in byol_views(32, rotate90=0.5, vertical_flip=0.5):
        assert not list(view.parameters())
        assert not list(view.buffers())
        assert not view.state_dict()


def test_constants_survive_the_meta_device() -> None:
    view = one_view(32, "deepmind")
    view.to("meta").to_empty(device="cpu")
    assert [round(x, 3) for x in view.statistics(3)[0].tolist()] == list(IMAGENET_MEAN)
    assert view(photographs()).isfinite().all()


def test_output_dtype_and_memory_format() -> None:
    view = one_view(32, dtype=torch.bfloat16, channels_last=True)
    same = one_view(32)
    params = view.forward_parameters(photographs().shape)
    for path in PATHS:
        got = by(view, path)(photographs(), params=params)
        assert got.dtype == torch.bfloat16
        assert got.is_contiguous(memory_format=torch.channels_last)
        expected = by(same, path)(photographs(), params=params)
        assert expected.is_contiguous()
        assert torch.equal(got, expected.bfloat16())


def test_images_are_not_written_to() -> None:
    images = small_photographs(24, 24) / 255
    before = images.clone()
    for view in byol_views(24, crop=False, grayscale=1.0, solarize=1.0):
        view(images)
    one_view(24, **{**BARE, "crop": False})(images)
    one_view(24, **BARE)(images)
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
    view = byol_views(48, preset, compile=False)[1]
    compiled = copy.deepcopy(view)
    compiled.compiles = True
    images = photographs().repeat(4, 1, 1, 1) / 255
    for length in (16, 16, 11, 7):
        expected = view(images[:length])
        got = compiled(images[:length], params=view._params)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert compiled.compiles
    assert not torch.allclose(compiled(images), compiled(images))
    drawn = compiled(images)
    assert torch.equal(compiled(images, params=compiled._params), drawn)
    double = pickle.loads(pickle.dumps(compiled))
    torch.testing.assert_close(double(images, params=compiled._params), drawn, atol=1e-4, rtol=0)


def test_a_view_that_cannot_be_compiled_goes_on_without_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda f: broken)
    view = one_view(32, compile=True)
    with pytest.warns(UserWarning, match=r"uncompiled.*no compiler here.*compile=False"):
        assert view(photographs()).shape == (4, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        view(photographs())


def test_peak_memory_stays_below_three_views() -> None:
    for side, source, batch in ((224, 256, 8), (96, 112, 32), (32, 32, 256)):
        images = torch.randint(0, 256, (batch, 3, source, source), dtype=torch.uint8)
        view = one_view(side)
        view(images)
        with torch.profiler.profile(profile_memory=True) as profile:
            view(images)
        events = profile.profiler.kineto_results.events()
        changes = [
            e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if "[memory]" in e.name()
        ]
        assert 1 <= int(np.cumsum(changes).max()) / (batch * 3 * side * side * 4) < 3


# The pipeline in the hands of who knows kornia


@pytest.mark.parametrize("index", [0, 1])
def test_the_pipeline_is_its_stages_one_by_one_in_kornias_own_loop(index: int) -> None:
    view = byol_views(64, rotate90=0.3)[index]
    loop = K.ImageSequential(*view.children())
    for images in (photographs().repeat(8, 1, 1, 1), photographs() / 255):
        got = view(images)
        torch.testing.assert_close(loop(images, params=view._params), got, atol=1e-6, rtol=0)
        step = images
        for item in view._params:
            step = view.get_submodule(item.name)(step, params=item.data)
        torch.testing.assert_close(step, got, atol=1e-6, rtol=0)


def test_draws_replay_to_the_bit_and_can_be_edited() -> None:
    view = byol_views(48)[1]
    images = photographs().repeat(8, 1, 1, 1)
    got = view(images)
    params = view._params
    assert torch.equal(view(images, params=params), got)
    still = fix(copy.deepcopy(params), "RandomSolarize", batch_prob=0.0)
    fix(params, "RandomSolarize", batch_prob=0.0)
    all_blurred = fix(params, "RandomGaussianBlur", batch_prob=1.0, sigma=2.0)
    for path in PATHS:
        view_by = by(view, path)
        difference = (view_by(images, params=all_blurred) - view_by(images, params=still)).abs()
        changed = difference.flatten(1).amax(1) > 0.01
        assert changed.sum() >= 30  # of 32: those already blurred at 2.0 and none lost


def test_kornias_switch_for_one_draw_a_batch_works() -> None:
    view = byol_views(32, blur=0.5)[0]
    view.same_on_batch = True
    twice = photographs()[:1].expand(6, -1, -1, -1)
    for _ in range(3):
        views = view(twice)
        assert torch.allclose(views, views[:1].expand_as(views), atol=1e-6)


def test_stages_are_swapped_inserted_and_deleted_by_their_place() -> None:
    view = byol_views(32)[1]
    view[5] = K.RandomErasing(p=1.0)
    view.insert(1, K.RandomAffine(10.0, p=0.5))
    view.append(nn.Identity())
    del view[2]
    kinds = [type(stage).__name__ for stage in view]
    assert kinds == [
        "RandomResizedCrop", "RandomAffine", "ColorJitter", "RandomGrayscale",
        "RandomGaussianBlur", "RandomErasing", "Normalize", "Identity",
    ]  # fmt: skip
    assert [name for name, _ in view.named_children()] == [f"{k}_{i}" for i, k in enumerate(kinds)]
    images = photographs().repeat(2, 1, 1, 1)
    got = view(images)
    assert got.shape == (8, 3, 32, 32)
    assert torch.equal(view(images, params=view._params), got)
    colour = view[2:5]
    assert isinstance(colour, pipeline.ViewSequential)
    assert len(colour) == 3
    assert colour(photographs()[..., :32, :32]).shape == (4, 3, 32, 32)


@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_users_stage_sees_what_it_would_in_kornias_loop(at: int) -> None:
    images = photographs().repeat(16, 1, 1, 1) / 255  # more than a chunk of 2**18 values
    for stage in (
        K.RandomErasing(p=0.5),
        K.RandomAffine(20.0, p=0.5),
        K.RandomMixUpV2(p=1.0),
        K.RandomMotionBlur((3, 7), 30.0, 0.5, p=0.5),
        K.RandomChannelDropout(p=0.5),
        K.ImageSequential(K.RandomInvert(p=0.5), K.RandomHorizontalFlip(p=0.5)),
        kornia.enhance.Invert(),
    ):
        view = byol_views(96)[1]
        view.insert(at, stage)
        got = view(images)
        expected = K.ImageSequential(*view.children())(images.clone(), params=view._params)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_a_stage_that_keeps_its_output_is_not_written_to() -> None:
    class Keep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.kept, self.value = x, x.clone()
            return x

    keep = Keep()
    view = one_view(32, jitter=0.5)
    view.insert(1, keep)
    view(photographs())
    assert torch.equal(keep.kept, keep.value)


def test_hooks_on_a_stage_run() -> None:
    view, seen = one_view(32, jitter=1.0), []
    view[2].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    view(photographs())
    assert seen == [(4, 3, 32, 32)]


def test_a_pipeline_prints_its_stages() -> None:
    text = repr(byol_views(224)[1])
    for part in ("RandomResizedCrop(", "scale=(0.08, 1.0)", "kernel_size=(23, 23)", "p=0.2"):
        assert part in text


def test_kornia_is_imported_by_the_first_use_only() -> None:
    code = "import sys, byol_pytorch, byol_pytorch.augment; assert 'kornia' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Views given by hand to a learner


class Mean(nn.Module):
    """Its feature is the mean of what it sees, a channel each."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean(dim=(2, 3)))


def learner(**settings: object) -> BYOL:
    return BYOL(Mean(), 16, projection_size=4, projection_hidden_size=8, **settings)


@torch.no_grad()
def test_byol_views_given_by_hand_are_treated_as_the_default_ones() -> None:
    images = small_photographs(16, 16)
    expected = learner().representation(images)
    first, second = byol_views(16)
    for augmentations in ((first, second), (first, None), (torch.compile(first), None)):
        given = learner(augment_fn=augmentations[0], augment_fn2=augmentations[1])
        torch.testing.assert_close(given.representation(images), expected)
        assert given.normalisation == (IMAGENET_MEAN, IMAGENET_STD)
    own = learner(augment_fn=byol_views(16, mean=(0.1, 0.2, 0.3), std=None)[0])
    assert own.normalisation == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    plain = learner(augment_fn=byol_views(16, mean=None, std=None)[0])
    assert plain.normalisation is None
    torch.testing.assert_close(plain.representation(images), (images / 255).mean(dim=(2, 3)))


@torch.no_grad()
def test_the_normalisation_is_read_off_the_views_own_stage() -> None:
    byol = learner()
    images = small_photographs(16, 16) / 255
    half, quarter = torch.full((3,), 0.5), torch.full((3,), 0.25)
    for stage in (
        K.Normalize(half, quarter),
        kornia.enhance.Normalize(half, quarter),
        K.ImageSequential(K.Normalize(half, quarter)),
    ):
        byol.augment_fn[-1] = stage
        expected = ((images - 0.5) / 0.25).mean(dim=(2, 3))
        torch.testing.assert_close(byol.representation(images), expected)
        assert byol.normalisation == ((0.5,) * 3, (0.25,) * 3)
    byol.augment_fn = lambda x: x  # a function in a module's place
    assert byol.normalisation is None


def test_views_that_are_not_normalised_alike_are_refused() -> None:
    with pytest.raises(ValueError, match=r"first view is normalised by .*0\.485.*augment_fn2 does"):
        learner(augment_fn2=nn.Identity())
    first, second = byol_views(16)[0], byol_views(16, mean=None, std=None)[1]
    with pytest.raises(ValueError, match=r"normalised by .*0\.485.*None"):
        learner(augment_fn=first, augment_fn2=second)
    with pytest.raises(ValueError, match="mean and std have 2 values, the images have 3 channels"):
        learner(mean=(0.1, 0.2))
    learner(augment_fn2=nn.Identity(), mean=None, std=None)
    learner(augment_fn=first, augment_fn2=nn.Identity())  # by hand: taken at their word


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


def test_copies_carry_no_draws() -> None:
    view = byol_views(32)[1]
    small = len(pickle.dumps(view))
    view(photographs().repeat(64, 1, 1, 1))
    assert len(pickle.dumps(view)) == small
    assert copy.deepcopy(view)._params is None


def test_changes_hold_for_both_views() -> None:
    for view in byol_views(32, hue=0.05, crop=False, mean=(0.5,) * 3):
        assert view[1].flags["hue"] == pytest.approx((-0.05, 0.05))
        assert view[-1].flags["mean"].tolist() == [0.5] * 3
    first, second = byol_views(32, "cifar", blur=0.5)
    assert (first[4].p, second[4].p, second[5].p) == (0.5, 0.5, 0.2)


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
        ({"hue": 0.6}, r"hue out of bounds.*0.6"),
        ({"contrast": -1}, "contrast.*non negative.*-1"),
        ({"scale": (0.5, 0.1)}, "scale=.*low <= high"),
        ({"ratio": (0.0, 1.0)}, "ratio=.*0 < low"),
        ({"sigma": (0.0, 2.0)}, "sigma="),
        ({"blur_kernel": 4}, "blur_kernel=4.*odd"),
        ({"blur_kernel": 65}, "blur_kernel=65.*63"),
        ({"std": (0.2, 0.0, 0.2)}, "std=.*positive"),
        ({"semantics": "pil"}, "semantics='pil'.*'torchvision' or 'deepmind'"),
        ({"scale": 0.5}, "scale=0.5.*give it twice"),
        ({"flip": "0.5"}, "flip='0.5'.*a number"),
        ({"mean": "imagenet"}, "mean='imagenet'.*numbers"),
        ({"dtype": "float16"}, "dtype='float16'.*torch.float32"),
        ({"hue_mode": "yiq"}, "byol_views knows no hue_mode"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        byol_views(**{"image_size": 32, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [
        (torch.zeros(3, 40, 40), {}, r"\(3, 40, 40\).*images\[None\]"),
        ([torch.zeros(3, 40, 40)], {}, "list.*tensor"),
        (torch.zeros(2, 3, 40, 40, dtype=torch.int32), {}, "int32.*65535"),
        (torch.zeros(2, 3, 40, 40, dtype=torch.bool), {}, "bool.*uint8"),
        (torch.zeros(2, 3, 40, 40), {"crop": False}, r"\(40, 40\).*\(32, 32\).*crop=True"),
        (torch.zeros(2, 4, 40, 40), {"std": (1, 1, 1)}, "number of channels do not match"),
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
    view = byol_views(64, preset, mean=None, std=None, solarize=0.0)[1]
    images = photographs().repeat(8, 1, 1, 1)
    expected = view(images / 255)
    params = view._params  # drawn on the CPU
    for compiles in (False, True):
        view.compiles = compiles
        for batch in (images.cuda(), images.cuda() / 255):
            difference = view(batch, params=params).cpu() - expected
            assert difference.abs().mean() < 5e-4
            assert difference.abs().max() < 0.02
