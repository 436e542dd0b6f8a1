"""Arguments, ranges of images and views of foreign augmentations: refused or reported at once."""

import math
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from byol_pytorch import BYOL

MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def small(channels: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


def wrap(**kwargs: Any) -> BYOL:
    settings = {"image_size": 16, "projection_size": 4, "projection_hidden_size": 8, **kwargs}
    return BYOL(small(), **settings)


def pictures(batch: int = 4) -> Tensor:
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


# ---- the constructor -----------------------------------------------------------------------------

SIZES = ("projection_size", "projection_hidden_size", "sem_num_simplices", "sem_simplex_dim")
FLAGS = (
    "use_momentum", "use_simplicial_embeddings", "target_dropout", "concatenate_views",
    "check_finite",
)  # fmt: skip


@pytest.mark.parametrize("value", [0, -1, True, 8.0, "8", None, math.nan])
@pytest.mark.parametrize("name", SIZES)
def test_a_width_that_is_no_count_is_an_error(name, value):
    with pytest.raises(ValueError, match=rf"{name}={value!r}; expected an int of at least 1"):
        wrap(use_simplicial_embeddings=True, **{name: value})


@pytest.mark.parametrize("value", [0, 0.0, -0.1, math.nan, math.inf, True, "0.1", None])
def test_a_temperature_that_divides_by_nothing_is_an_error(value):
    message = rf"sem_temperature={re.escape(repr(value))}; expected a finite number above 0"
    with pytest.raises(ValueError, match=message):
        wrap(use_simplicial_embeddings=True, sem_temperature=value)


@pytest.mark.parametrize("value", ["False", "no", None, 2, 0.5, []])
@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_that_is_no_bool_is_an_error(name, value):
    with pytest.raises(TypeError, match=rf"{name}=.*; expected a bool\. Give {name}=True or"):
        wrap(**{name: value})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sync_batchnorm": "auto"}, r"sync_batchnorm='auto'; expected a bool or None"),
        ({"moving_average_decay": True}, r"moving_average_decay=True; expected a number"),
        ({"hidden_layer": True}, r"hidden_layer=True; expected a layer's dotted name"),
        ({"hidden_layer": 1.0}, r"hidden_layer=1\.0; expected a layer's dotted name"),
        ({"hidden_layer": None}, r"hidden_layer=None; expected a layer's dotted name"),
        ({"augment_fn": "imagenet"}, r"augment_fn is a str; expected a callable"),
        ({"augment_fn": (nn.Identity(),) * 2}, r"a tuple; .*augment_fn=first, augment_fn2=second"),
        ({"augment_fn2": 3}, r"augment_fn2 is a int; expected a callable"),
        ({"example_input": np.zeros((1, 3, 16, 16))}, r"a ndarray without tensors; .*from_numpy"),
        ({"example_input": ()}, r"example_input is a tuple without tensors"),
        ({"example_input": torch.zeros(0, 3, 16, 16)}, r"\(0, 3, 16, 16\); expected at least 1"),
    ],
)
def test_an_argument_of_a_wrong_kind_is_an_error(given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        wrap(**given)


def test_numbers_of_numpy_are_numbers():
    learner = wrap(
        projection_size=np.int64(4), moving_average_decay=np.float32(0.5), total_steps=np.int64(10),
        sem_temperature=np.float64(0.1), use_momentum=np.bool_(True), concatenate_views=0,
    )  # fmt: skip
    learner(pictures(), pictures()).backward()
    learner.update_moving_average()
    assert type(learner.moving_average_decay) is float


# ---- the range of images -------------------------------------------------------------------------


def normalised(images: Tensor) -> Tensor:
    return (images - MEAN) / STD


def test_normalised_images_before_the_default_views_warn_and_name_the_remedy():
    message = r"floats from -2\.\d+ to 2\.\d+; expected \[0, 1\]\. They look normalised already.*"
    with pytest.warns(UserWarning, match=message + r"Leave the normalisation out.*augment_fn"):
        wrap()(normalised(pictures()))


@pytest.mark.parametrize(
    ("low", "high", "remedy"),
    [(-0.42, 2.82, "Leave the normalisation out"), (-55.0, 301.0, "Divide them by 255")],
    ids=["normalised as MNIST is", "bytes after a bicubic resize"],
)
def test_a_range_on_both_sides_is_read_by_its_width(low, high, remedy):
    images = torch.linspace(low, high, 4 * 3 * 16 * 16).view(4, 3, 16, 16)
    with pytest.warns(UserWarning, match=remedy):
        wrap()(images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_floats_up_to_255_warn_and_name_the_remedy(dtype):
    with pytest.warns(UserWarning, match=r"to 25\d.*; expected \[0, 1\]\. Divide them by 255"):
        wrap().diagnostics((pictures() * 255).to(dtype))


def test_a_batch_of_uint8_does_not_switch_the_look_at_floats_off():
    learner = wrap()
    learner((pictures() * 255).byte())
    with pytest.warns(UserWarning, match=r"Divide them by 255"):
        learner(pictures() * 255)


def test_images_are_looked_at_once(monkeypatch):
    looks = []
    look = torch.aminmax
    monkeypatch.setattr(torch, "aminmax", lambda x: looks.append(x) or look(x))
    learner = wrap()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            learner(pictures())
            learner.representation(pictures())
    assert len(looks) == 1


@pytest.mark.parametrize(
    "use",
    [
        lambda x: wrap()(x.clamp(-0.05, 1.05) * 1.1 - 0.05),  # as bicubic resizing overshoots
        lambda x: wrap()(torch.where(x > 0.5, 1.44, -0.44)),  # as it does at the most
        lambda x: wrap()(torch.full_like(x, math.nan)),
        lambda x: wrap(augment_fn=nn.Identity())(normalised(x)),  # nothing would clip them
        lambda x: wrap().representation(normalised(x), normalise=False),
        lambda x: wrap()(normalised(x), normalised(x)),
    ],
    ids=["overshoot", "most", "nan", "own", "raw", "views"],
)
def test_a_range_that_is_right_does_not_warn(use):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use(pictures())


def test_images_without_values_to_read_are_not_looked_at():
    learner = wrap(augment_fn=nn.Identity())
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert learner(torch.rand(4, 3, 16, 16)).shape == ()


def test_a_compiled_learner_does_not_look():
    learner = wrap(augment_fn=nn.Identity())
    learner.compile(fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The images")
        learner(pictures() * 255)


@pytest.mark.gpu
def test_floats_on_a_gpu_warn_with_one_synchronisation_in_a_run():
    learner = wrap().cuda()
    images = pictures().cuda()
    with pytest.warns(UserWarning, match=r"Divide them by 255"):
        learner(images * 255)
    torch.cuda.set_sync_debug_mode("error")
    try:
        learner(images * 255)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- what augmentations return -------------------------------------------------------------------

VIEWS = [
    (lambda x: None, TypeError, r"returned None; expected a view \(B, 3, H, W\).*return statement"),
    (lambda x: x.numpy(), TypeError, r"returned a ndarray; expected .*torch\.from_numpy"),
    (lambda x: (x, x), TypeError, r"returned a tuple; expected .*second comes from augment_fn2"),
    (lambda x: list(x), TypeError, r"returned a list; expected .*torch\.stack"),
    (lambda x: {"image": x}, TypeError, r"returned a dict; expected .*Let it return a tensor"),
    (lambda x: (x * 255).byte(), TypeError, r"returned dtype torch\.uint8; expected float.*/ 255"),
    (lambda x: x > 0.5, TypeError, r"returned dtype torch\.bool; expected float"),
    (lambda x: x[:, :1], ValueError, r"returned shape \(4, 1, 16, 16\); expected \(B, 3, H, W\)"),
    (lambda x: x.permute(0, 2, 3, 1), ValueError, r"returned shape \(4, 16, 16, 3\); expected"),
    (lambda x: x[0], ValueError, r"returned shape \(3, 16, 16\); expected .*augment\.per_image"),
    (lambda x: x[:2], ValueError, r"returned 2 views for 4 images, .*expected one view an image"),
    (lambda x: torch.cat((x, x)), ValueError, r"returned 8 views for 4 images"),
]


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize(("augment", "error", "message"), VIEWS)
def test_a_view_that_does_not_fit_is_an_error_that_names_the_augmentation(
    augment, error, message, second
):
    name = "augment_fn2" if second else "augment_fn"
    given = {"augment_fn": nn.Identity(), name: augment}
    with pytest.raises(error, match=f"^{name} {message}"):
        wrap(**given)(pictures())


def test_a_view_that_has_not_the_structure_of_the_example_is_an_error():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small()

        def forward(self, images, shift):
            return self.net(images + shift[:, None, None, None])

    batch = (pictures(), torch.zeros(4))
    settings = {"projection_size": 4, "projection_hidden_size": 8, "example_input": batch}
    message = r"augment_fn returned a Tensor; expected the structure of example_input"
    with pytest.raises(TypeError, match=message):
        BYOL(Two(), None, augment_fn=lambda x: x[0], **settings)(batch)
    assert BYOL(Two(), None, augment_fn=lambda x: x, **settings)(batch).isfinite()


@pytest.mark.parametrize("images", [pictures(), pictures().double()])
def test_float64_views_and_images_train_under_autocast(images):
    learner = wrap(augment_fn=lambda x: x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = learner(images)
        assert learner.representation(images.double()).shape == (4, 6)
        learner(images.double(), images.double())
    loss.backward()
    assert loss.dtype == torch.float32 and learner.net[0].weight.grad.isfinite().all()
