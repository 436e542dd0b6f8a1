"""BYOL's two view distributions as kornia pipelines: presets and strengths.

The stages that are not kornia's own stand in stages.py, the container in pipeline.py.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from byol_pytorch.arguments import is_number
from byol_pytorch.parallel import uncompiled

if TYPE_CHECKING:  # kornia is imported by the first call: it takes a tenth of torch's time
    from byol_pytorch.augment.pipeline import ViewSequential

Statistics = Literal["auto"] | Sequence[float] | None

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Parts of the image's area that crops have where small ones come beside the two views: MULAN's
# (github.com/pfdp0/mulan, main.py), in the paper's two views (0.08, 1).
GLOBAL_SCALE, LOCAL_SCALE = (0.25, 1.0), (0.08, 0.25)

# What differs from the defaults of `_view`, for the first and the second view. BYOL's paper
# (arXiv 2006.07733), appendix B and table 6, has the strengths and probabilities.
PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # The paper's figures, each operation as torchvision and kornia define it.
    "imagenet": ({}, {"blur": 0.1, "solarize": 0.2}),
    # github.com/google-deepmind/deepmind-research, byol/utils/augmentations.py and dataset.py.
    "deepmind": (
        {"semantics": "deepmind"},
        {"semantics": "deepmind", "blur": 0.1, "solarize": 0.2},
    ),
    # 32 px: no blur. solo-learn, scripts/pretrain/cifar/augmentations/asymmetric.yaml (the one its
    # byol.yaml names); lightly's CIFAR-10 benchmark switches the blur off as well.
    "cifar": ({"blur": 0.0}, {"blur": 0.0, "solarize": 0.2}),
}


def byol_views(
    image_size: int | tuple[int, int],
    preset: str = "imagenet",
    *,
    mean: Statistics = "auto",
    std: Statistics = "auto",
    **changes: Any,
) -> tuple["ViewSequential", "ViewSequential"]:
    """The first and the second view distribution of BYOL, each a kornia pipeline.

    Every image has draws of its own. In this order: random resized crop (bicubic), flips, quarter
    turns, colour jitter in a random order, grayscale, Gaussian blur, solarize, normalisation; what
    has the probability 0 is no stage. Saturation, hue and grayscale need RGB and are left out for
    channel counts other than 3; contrast then goes around the mean of all channels.

    Presets: "imagenet" (the paper's strengths, torchvision's and kornia's operations), "deepmind"
    (DeepMind's published code to the letter; `semantics` says what differs) and "cifar" (32 px: no
    blur).

    Args:
        image_size: side or (height, width) of the views.
        mean, std: of the normalisation, one value a channel. "auto": ImageNet's for three channels,
            none for others. None: none; both None leave the stage out.
        changes: for both views, with the defaults of the preset "imagenet":

            scale=(0.08, 1.0), ratio=(3/4, 4/3): the crop's part of the image's area, and its width
            over height. crop=True: False for images that are views' crops already.

            flip=0.5, vertical_flip=0.0, rotate90=0.0: probabilities. A rotation is by 90, 180 or
            270 degrees, each as likely as the others; where the view is not square, by 180.

            jitter=0.8: probability of the colour jitter. brightness=0.4, contrast=0.4,
            saturation=0.2: factors are uniform in [1 - strength, 1 + strength]. hue=0.1: shifts are
            uniform in [-hue, hue] parts of the colour circle.

            grayscale=0.2, blur=1.0 (second view 0.1), solarize=0.0 (second view 0.2):
            probabilities. blur_kernel="auto": odd number of taps, about a tenth of the shorter
            side, 23 at 224. sigma=(0.1, 2.0): range of the blur's standard deviation in pixels.
            solarize_threshold=0.5: values from it on are inverted.

            semantics="torchvision": ten tries for a crop that fits, antialiased; multiplicative
            brightness; contrast around the mean of the gray image; saturation blends with the gray
            image; blur reflects at the border; gray weights are kornia's (0.299 for red where
            torchvision has 0.2989). "deepmind": one try, cut to the image, not antialiased
            (tf.image.resize); brightness adds a value in [-strength, strength]; contrast around
            each channel's mean; saturation scales HSV's S; blur pads with zeros; 0.2989.

            dtype=torch.float32, channels_last=False: of the views.

            compile=None: whether torch.compile fuses the stages at the first call; None: on CUDA.

    Raises ValueError or TypeError on an unknown preset, an unknown name or a value out of range.
    """
    first, second = _known(preset, changes, "byol_views")
    shared = {"mean": mean, "std": std, **changes}
    return _view(image_size, **{**first, **shared}), _view(image_size, **{**second, **shared})


def local_views(
    size: int | tuple[int, int],
    preset: str = "imagenet",
    *,
    mean: Statistics = "auto",
    std: Statistics = "auto",
    **changes: Any,
) -> "ViewSequential":
    """The distribution of small local views: each call draws one of every image.

    As the first view of `byol_views`, with its arguments, presets and errors, except for the crop,
    scale=(0.08, 0.25) of the image's area, and the blur, of half of the views (of none with the
    preset "cifar"). Source: MULAN (arXiv 2602.05845; github.com/pfdp0/mulan, augmentations.py and
    main.py), whose views are of 96 px; it blurs those with the 23 taps of the large ones.
    """
    first, _ = _known(preset, changes, "local_views")
    local = {"scale": LOCAL_SCALE, "blur": 0.5 if first.get("blur", 1.0) else 0.0}
    return _view(size, mean=mean, std=std, **{**first, **local, **changes})


def _known(preset: str, changes: dict[str, Any], caller: str) -> tuple[dict[str, Any], ...]:
    if preset not in PRESETS:
        raise ValueError(
            f"preset={preset!r} is not known. Expected one of {', '.join(map(repr, PRESETS))}; "
            f"other strengths are keyword arguments, for example {caller}(96, hue=0.05)."
        )
    if unknown := sorted(changes.keys() - signature(_view).parameters.keys()):
        raise TypeError(
            f"{caller} knows no {', '.join(unknown)}; expected the names in the docstring of "
            "byol_views, such as scale, hue or blur."
        )
    return PRESETS[preset]


def _view(
    image_size: int | tuple[int, int],
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    vertical_flip: float = 0.0,
    rotate90: float = 0.0,
    jitter: float = 0.8,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.2,
    hue: float = 0.1,
    grayscale: float = 0.2,
    blur: float = 1.0,
    blur_kernel: int | Literal["auto"] | None = "auto",
    sigma: tuple[float, float] = (0.1, 2.0),
    solarize: float = 0.0,
    solarize_threshold: float = 0.5,
    mean: Statistics = "auto",
    std: Statistics = "auto",
    crop: bool = True,
    semantics: Literal["torchvision", "deepmind"] = "torchvision",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    compile: bool | None = None,
) -> "ViewSequential":
    import kornia.augmentation as K

    from byol_pytorch.augment import stages as ours
    from byol_pytorch.augment.pipeline import ViewSequential

    size = sides(image_size)
    for name, chance in (
        ("flip", flip), ("vertical_flip", vertical_flip), ("rotate90", rotate90),
        ("jitter", jitter), ("grayscale", grayscale), ("blur", blur), ("solarize", solarize),
        ("solarize_threshold", solarize_threshold),
    ):  # fmt: skip
        _check_chance(name, chance)
    for name, pair in (("scale", scale), ("ratio", ratio), ("sigma", sigma)):
        _check_range(name, pair)
    if semantics not in ("torchvision", "deepmind"):
        raise ValueError(
            f"semantics={semantics!r}. Expected 'torchvision' or 'deepmind'; the docstring of "
            "byol_views says what they mean."
        )
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype={dtype!r}. Expected a float type such as torch.float32.")
    kernel = _kernel(blur_kernel, size)
    deepmind = semantics == "deepmind"

    stages: list[Any] = []
    if crop:
        tries = 1 if deepmind else 10
        stages.append(
            ours.RandomResizedCrop(size, scale, ratio, antialias=not deepmind, tries=tries)
        )
    if flip:
        stages.append(K.RandomHorizontalFlip(p=flip))
    if vertical_flip:
        stages.append(K.RandomVerticalFlip(p=vertical_flip))
    if rotate90:
        turns = (1, 3) if size[0] == size[1] else (2, 2)  # a quarter turn of a rectangle fits not
        stages.append(ours.RandomRotation90(turns, p=rotate90))
    if jitter and any((brightness, contrast, saturation, hue)):
        stages.append(
            ours.ColorJitter(brightness, contrast, saturation, hue, p=jitter, semantics=semantics)
        )
    if grayscale:
        weights = torch.tensor((0.2989, 0.5870, 0.1140), device="cpu") if deepmind else None
        stages.append(_for_rgb(K.RandomGrayscale(weights, p=grayscale)))
    if blur and kernel > 1:
        border = "constant" if deepmind else "reflect"
        stages.append(ours.RandomGaussianBlur((kernel, kernel), sigma, border, p=blur))
    if solarize:
        threshold = (solarize_threshold, solarize_threshold)
        stages.append(ours.RandomSolarize(threshold, (0.0, 0.0), p=solarize))
    stages += _normalisation(mean, std)
    return ViewSequential(
        *stages, image_size=size, dtype=dtype, channels_last=channels_last, compile=compile
    )


def as_view(augment_fn: Any) -> "ViewSequential | None":
    """`augment_fn`, compiled or not, where it is a pipeline of byol_views, else None."""
    if augment_fn is None:
        return None
    from byol_pytorch.augment.pipeline import ViewSequential

    augment_fn = uncompiled(augment_fn)
    return augment_fn if isinstance(augment_fn, ViewSequential) else None


def both_views(
    augment_fn: Any, augment_fn2: Any, size: tuple[int, int] | None, channels: int | None,
    mean: Statistics, std: Statistics, **changes: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """A learner's two augmentations: those given, else BYOL's of `size`, None where that is None.

    `changes` are byol_views' for the latter.

    Raises TypeError for what cannot be called; ValueError for a mean or std of no default views,
    and where the two views are normalised differently.
    """
    for name, value in (("augment_fn", augment_fn), ("augment_fn2", augment_fn2)):
        if value is not None and not callable(value):
            raise TypeError(
                f"{name} is a {type(value).__name__}; expected a callable from (B, C, H, W) to a "
                "view, or None. A pair of them, as byol_views gives, goes in as augment_fn=first, "
                "augment_fn2=second."
            )
    ours = None
    if augment_fn is None and size is not None:
        ours = byol_views(size, mean=mean, std=std, **changes)
    elif mean not in ("auto", None) or std not in ("auto", None):
        raise ValueError(
            "mean and std normalise after the default views, and augment_fn replaces those: "
            "normalise in augment_fn, and leave mean and std out."
        )
    first, fallback = ours or (augment_fn, augment_fn)
    second = fallback if augment_fn2 is None else augment_fn2
    one, two = normalisation_of(first, channels), normalisation_of(second, channels)
    known = as_view(second) is not None
    if one != two and as_view(first) is not None and (known or ours):
        raise ValueError(
            f"The first view is normalised by {one}, the second by "
            f"{two if known else 'what augment_fn2 does'}; expected the same of both. Give "
            "byol_views(image_size, mean=..., std=...)[0] as augment_fn, with mean=None and "
            "std=None where augment_fn2 does not normalise."
        )
    return first, second


def local_view(
    local_augment_fn: Any, augment_fn: Any, size: tuple[int, int] | None, channels: int | None
) -> Any:
    """A learner's augmentation of local views: the one given, else that of `size` pixels.

    It is normalised as `augment_fn`; None where that is no pipeline of byol_views, or without size.
    Raises TypeError for what cannot be called, ValueError for another normalisation.
    """
    known = as_view(augment_fn) is not None
    mean, std = normalisation_of(augment_fn, channels) or (None, None)
    if local_augment_fn is None:
        return local_views(size, mean=mean, std=std) if known and size is not None else None
    if not callable(local_augment_fn):
        raise TypeError(
            f"local_augment_fn is a {type(local_augment_fn).__name__}; expected a callable from "
            "(B, C, H, W) to a view, such as augment.local_views(96), or None."
        )
    own = normalisation_of(local_augment_fn, channels) or (None, None)
    if known and as_view(local_augment_fn) is not None and own != (mean, std):
        raise ValueError(
            f"The two views are normalised by {(mean, std)}, the local ones by {own}; expected the "
            "same of all. Give local_views(size, mean=..., std=...) those of augment_fn."
        )
    return local_augment_fn


def local_sides(size: tuple[int, int] | None, given: Any) -> tuple[int, int] | None:
    """(height, width) of local views: those given, else 3/7 of `size` as MULAN's 96 of 224.

    To the nearest multiple of 16, the usual patch. None where no size of images is known. Raises
    ValueError for an invalid size, and for one given where the images have none.
    """
    if size is None:
        if given is not None:
            raise ValueError(
                f"local_size={given!r} came where the images have no size; expected image_size= "
                "as well, for (B, C, H, W) images. Leave it out: local views then may have any."
            )
        return None
    if given is not None:
        return sides(given, "local_size")
    height, width = (max(16, 16 * round(side * 3 / 7 / 16)) for side in size)
    return height, width


def normalisation_of(augment_fn: Any, channels: int | None) -> Any:
    """(mean, std) of a pipeline of byol_views, one value a channel; None of others and without."""
    view = as_view(augment_fn)
    found = None if view is None else view.statistics(channels or 0)
    # float32 holds 7 digits: those that were given.
    return found and tuple(tuple(float(f"{x:.7g}") for x in v.tolist()) for v in found)


def _normalisation(mean: Statistics, std: Statistics) -> list[Any]:
    """The Normalize stage, or none."""
    import kornia.augmentation as K

    mean, std = _numbers("mean", mean), _numbers("std", std)
    if mean is None and std is None:
        return []
    given = [len(x) for x in (mean, std) if isinstance(x, tuple)]
    channels = given[0] if given else 3
    if "auto" in (mean, std) and channels == 3:
        mean = IMAGENET_MEAN if mean == "auto" else mean
        std = IMAGENET_STD if std == "auto" else std
    values = (
        x if isinstance(x, tuple) else (neutral,) * channels
        for x, neutral in ((mean, 0.0), (std, 1.0))
    )
    stage = K.Normalize(*(torch.tensor(x, dtype=torch.float32, device="cpu") for x in values))
    return [stage if given else _for_rgb(stage)]


def _for_rgb(stage: Any) -> Any:
    """`stage`, marked to be left out for other channel counts than 3."""
    stage.rgb_only = True
    return stage


def sides(size: Any, name: str = "image_size") -> tuple[int, int]:
    """(height, width) of a valid size, the argument `name`. Raises ValueError for others."""
    pair = (size, size) if isinstance(size, int) else size
    if (
        not isinstance(pair, Sequence)
        or len(pair) != 2
        or any(not isinstance(side, int) or isinstance(side, bool) or side < 1 for side in pair)
    ):
        raise ValueError(
            f"{name}={size!r}. Expected a positive int or (height, width) of two; "
            "for example 224 or (192, 256)."
        )
    return (pair[0], pair[1])


def _check_chance(name: str, value: Any) -> None:
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r}. Expected a number in [0, 1]; 0 switches it off.")


def _check_range(name: str, pair: Any) -> None:
    fits = isinstance(pair, Sequence) and len(pair) == 2 and all(map(is_number, pair))
    if not fits or not 0 < pair[0] <= pair[1] < math.inf:
        raise ValueError(
            f"{name}={pair!r}. Expected (low, high) with 0 < low <= high; "
            f"for one fixed value give it twice, {name}=(1.0, 1.0)."
        )


def _kernel(blur_kernel: Any, size: tuple[int, int]) -> int:
    side = min(size)
    if blur_kernel is None or blur_kernel == "auto":
        return 2 * int(side / 20) + 1  # DeepMind's: a radius of int(side / 10 / 2)
    if not isinstance(blur_kernel, int) or blur_kernel % 2 != 1 or not 0 < blur_kernel < 2 * side:
        raise ValueError(
            f"blur_kernel={blur_kernel!r} for views of {size}. Expected an odd int from 1 to "
            f"{2 * side - 1}; 'auto' takes a tenth of the shorter side, blur=0 switches it off."
        )
    return blur_kernel


def _numbers(name: str, value: Any) -> Any:
    """None, "auto", or a tuple of floats."""
    if value is None or (isinstance(value, str) and value == "auto"):
        return value
    numbers = value.tolist() if hasattr(value, "tolist") else value  # of torch or numpy
    if (
        not isinstance(numbers, Sequence)
        or not numbers
        or not all(is_number(n) and math.isfinite(n) for n in numbers)
        or (name == "std" and min(numbers) <= 0)
    ):
        kind = "positive" if name == "std" else "finite"
        raise ValueError(
            f"{name}={value!r}. Expected {kind} numbers, one a channel, for images in [0, 1]; "
            "'auto', or None for no normalisation."
        )
    return tuple(map(float, numbers))


def per_image(transform: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`transform` applied to each image (C, H, W) of a batch by itself: (B, C, H, W) -> (B, ...).

    A torchvision transform draws ONCE a call: given a batch, it crops and colours every image of it
    alike, which weakens the views without a word. `per_image(transform)` gives each its own draw:

        BYOL(net, 224, augment_fn=per_image(torchvision.transforms.v2.Compose([...])))

    kornia's augmentations draw once an image already and go in as they are. Raises TypeError or
    ValueError where the results are not tensors of one shape.
    """
    return partial(_map_images, transform)


def _map_images(transform: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    views = [transform(image) for image in images]
    for view in views:
        if not isinstance(view, Tensor):
            raise TypeError(
                f"the transform of per_image returned {type(view).__name__}. Expected a tensor "
                "(C, H, W); end it with torchvision.transforms.v2.ToImage()."
            )
        if view.shape != views[0].shape:
            raise ValueError(
                f"the transform of per_image returned {tuple(views[0].shape)} for one image and "
                f"{tuple(view.shape)} for another. Expected one shape; end it with a resize."
            )
    return torch.stack(views)
