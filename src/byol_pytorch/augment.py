"""BYOL's two view distributions, drawn and applied for a whole batch on the images' own device.

Here: the presets, what is drawn, and the order of the stages. The arithmetic is in _resample.py
(crop, flip, blur) and _colour.py (jitter, gray, solarize).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from byol_pytorch import _colour, _resample
from byol_pytorch import _view_checks as check
from byol_pytorch._colour import HueMode, Planes, Semantics, change_some
from byol_pytorch._view_checks import Statistics

Params = dict[str, Tensor]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# What differs from ViewAugmentation's defaults, for the first and the second view. BYOL's paper
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

# An eager pass works on so many output values at a time that its temporaries stay in the cache, and
# that they add little to the peak memory.
_CHUNK = {"cpu": 2**18}
_CHUNK_ELSEWHERE = 2**23


def byol_views(
    image_size: int | tuple[int, int],
    preset: str = "imagenet",
    *,
    mean: Statistics = "auto",
    std: Statistics = "auto",
    **changes: Any,
) -> tuple["ViewAugmentation", "ViewAugmentation"]:
    """The first and the second view distribution of BYOL.

    Presets: "imagenet" (the paper's strengths, torchvision's and kornia's operations), "deepmind"
    (DeepMind's published code to the letter; `semantics` of ViewAugmentation lists what differs)
    and "cifar" (32 px: no blur). `changes` are keyword arguments of ViewAugmentation, for both
    views. Raises ValueError on an unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(
            f"preset={preset!r} is not known. Expected one of {', '.join(map(repr, PRESETS))}; "
            "other strengths are keyword arguments, for example byol_views(96, hue=0.05)."
        )
    first, second = ({**view, "mean": mean, "std": std, **changes} for view in PRESETS[preset])
    return ViewAugmentation(image_size, **first), ViewAugmentation(image_size, **second)


class ViewAugmentation(nn.Module):
    """One view distribution: images (B, C, H, W), uint8 in [0, 255] or float in [0, 1], become
    views (B, C, *image_size).

    Every image has draws of its own. In this order: random resized crop (bicubic), flips, quarter
    turns, colour jitter in a random order, grayscale, Gaussian blur, solarize, clip to [0, 1],
    normalisation. Saturation, hue and grayscale need RGB and are left out for channel counts other
    than 3; contrast then goes around the mean of all channels. Floats outside [0, 1] are clipped.

    Without gradient, in float32 also under autocast, on the images' device, and without reading a
    value back from it: forward can be captured in a CUDA graph and compiles with fullgraph=True.

    Args:
        image_size: side or (height, width) of the view.
        scale, ratio: the crop's part of the image's area, and its width over height.
        flip, vertical_flip, rotate90: probabilities. A rotation is by 90, 180 or 270 degrees, each
            as likely as the others; where the view is not square, by 180.
        jitter: probability of the colour jitter.
        brightness, contrast, saturation: factors are uniform in [1 - strength, 1 + strength].
        hue: shifts are uniform in [-hue, hue] parts of the colour circle.
        grayscale, blur, solarize: probabilities.
        blur_kernel: odd number of taps; "auto": about a tenth of the shorter side, 23 at 224.
        sigma: range of the blur's standard deviation in pixels.
        solarize_threshold: values from it on are inverted.
        mean, std: of the normalisation, one value a channel. "auto": ImageNet's for three channels,
            none for others. None: none.
        crop: False for images that are views' crops already, of the size `image_size`.
        semantics: whose operations carry those names. "torchvision" (kornia's are the same): ten
            tries for a crop that fits, antialiased; multiplicative brightness; contrast around the
            mean of the gray image; saturation blends with the gray image; blur reflects at the
            border. "deepmind": one try, cut to the image, not antialiased (tf.image.resize);
            brightness adds a value in [-strength, strength]; contrast around each channel's mean;
            saturation scales HSV's S; blur pads with zeros. Either clips after each operation.
        hue_mode: "hsv" is exact; "yiq" rotates in YIQ: linear and cheaper, but on photographs at
            the default strengths 0.016 of mean absolute difference away, as much as hue itself.
        dtype, channels_last: of the view.
    """

    def __init__(
        self,
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
        semantics: Semantics = "torchvision",
        hue_mode: HueMode = "hsv",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.image_size = check.size(image_size)
        self.scale = check.range("scale", scale)
        self.ratio = check.range("ratio", ratio)
        self.flip = check.within("flip", flip, 1)
        self.vertical_flip = check.within("vertical_flip", vertical_flip, 1)
        self.rotate90 = check.within("rotate90", rotate90, 1)
        self.jitter = check.within("jitter", jitter, 1)
        self.brightness = check.within("brightness", brightness)
        self.contrast = check.within("contrast", contrast)
        self.saturation = check.within("saturation", saturation)
        self.hue = check.within("hue", hue, 0.5)
        self.grayscale = check.within("grayscale", grayscale, 1)
        self.blur = check.within("blur", blur, 1)
        self.blur_kernel = check.kernel(blur_kernel, self.image_size)
        self.sigma = check.range("sigma", sigma)
        self.solarize = check.within("solarize", solarize, 1)
        self.solarize_threshold = check.within("solarize_threshold", solarize_threshold, 1)
        self.mean = check.statistics("mean", mean)
        self.std = check.statistics("std", std)
        self.crop = crop
        self.semantics = check.one_of("semantics", semantics, ("torchvision", "deepmind"))
        self.hue_mode = check.one_of("hue_mode", hue_mode, ("hsv", "yiq"))
        self.dtype = dtype
        self.channels_last = channels_last

    def forward(self, images: Tensor) -> Tensor:
        """`transform(images, sample(images))`."""
        return self.transform(images, self.sample(images))

    def sample(self, images: Tensor, generator: torch.Generator | None = None) -> Params:
        """All draws for a batch, on its device: a dict of (B, ...) tensors.

        `generator` makes them reproducible; one on another device than the images costs a copy.
        Of the samples that draw the blur, the `blur_limit` with the smallest draws keep it: that is
        4 standard deviations above their mean number, so about one batch in 10,000 loses one.
        """
        check.images(images, None if self.crop else self.image_size)
        batch, _, height, width = images.shape
        on = images.device if generator is None else generator.device
        parts = [_resample.TRIES, _resample.TRIES, 2, 7, 6, 4]
        draws = torch.empty(batch, sum(parts), device=on, dtype=torch.float32)
        draws.uniform_(generator=generator)
        areas, ratios, corners, coins, amounts, ranks = torch.split(
            draws.to(images.device), parts, dim=1
        )
        flip, vertical_flip, rotate, jitter, grayscale, blur, solarize = coins.unbind(1)
        brightness, contrast, saturation, hue, sigma, turns = amounts.unbind(1)
        # The quarter turns of a rectangle do not fit it: there every rotation is by 180 degrees.
        square = self.image_size[0] == self.image_size[1]
        turns = 1 + (turns * 3).long() if square else torch.full_like(turns, 2).long()
        params = {
            "flip": flip < self.flip,
            "vertical_flip": vertical_flip < self.vertical_flip,
            "quarter_turns": turns * (rotate < self.rotate90),
            "jitter": jitter < self.jitter,
            "order": ranks.argsort(dim=1),
            "brightness": self._factor(brightness, self.brightness),
            "contrast": self._factor(contrast, self.contrast),
            "saturation": self._factor(saturation, self.saturation),
            "hue": (2 * hue - 1) * self.hue,
            "grayscale": grayscale < self.grayscale,
            "blur": (blur < self.blur) & (blur.argsort().argsort() < self.blur_limit(batch)),
            "sigma": self.sigma[0] + sigma * (self.sigma[1] - self.sigma[0]),
            "solarize": solarize < self.solarize,
        }
        if self.semantics == "deepmind":
            params["brightness"] = (2 * brightness - 1) * self.brightness
        if self.crop:
            low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
            params["box"] = _resample.draw_boxes(
                self.scale[0] + areas * (self.scale[1] - self.scale[0]),
                torch.exp(low + ratios * (high - low)),
                corners,
                (height, width),
                self.ratio,
                retry=self.semantics == "torchvision",
            )
        return params

    def transform(self, images: Tensor, params: Params) -> Tensor:
        """The views (B, C, *image_size) of `images` with the draws `params` of `sample`.

        A compiled and an eager view differ by rounding: on a CPU an eager crop of uint8 is rounded
        to uint8, as torchvision's is.
        """
        check.images(images, None if self.crop else self.image_size)
        batch, channels = images.shape[:2]
        limit = self.blur_limit(batch)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            if torch.compiler.is_compiling():
                planes = self._finish(self._planes(images, params, limit), ())
                view = torch.stack(planes, dim=1).to(self.dtype)
                return view.contiguous(memory_format=self._memory_format())
            height, width = self.image_size
            view = torch.empty(
                (batch, channels, height, width),
                dtype=self.dtype,
                device=images.device,
                memory_format=self._memory_format(),
            )
            values = _CHUNK.get(images.device.type, _CHUNK_ELSEWHERE)
            chunk = max(1, values // (channels * height * width))
            parts = [torch.split(t, chunk) for t in (view, images, *params.values())]
            for out, some, *draws in zip(*parts, strict=True):
                planes = self._planes(some, dict(zip(params, draws, strict=True)), limit)
                self._finish(planes, out.unbind(1))
            return view

    def normalise(self, images: Tensor) -> Tensor:
        """Images of any size as the views are, but not augmented: clipped to [0, 1], normalised.

        Float32 (B, C, H, W). Raises ValueError where mean or std have not one value a channel.
        """
        check.images(images, None)
        with torch.autocast(images.device.type, enabled=False):
            unit, statistics = _resample.to_unit(images), self.statistics(images.shape[1])
            if statistics is None:
                return unit
            mean, std = statistics
            planes = zip(unit.unbind(1), mean, std, strict=True)
            return torch.stack([(plane - m) / s for plane, m, s in planes], dim=1)

    def blur_limit(self, batch: int) -> int:
        """How many samples of a batch can be blurred: K of `sample`."""
        deviation = math.sqrt(self.blur * (1 - self.blur) * batch)
        return min(batch, math.ceil(self.blur * batch + 4 * deviation))

    def extra_repr(self) -> str:
        shown = ("image_size", "semantics", "crop", "jitter", "grayscale", "blur", "solarize")
        return ", ".join(f"{name}={getattr(self, name)}" for name in shown)

    def _factor(self, draw: Tensor, strength: float) -> Tensor:
        low = 1 - strength
        if self.semantics == "torchvision":
            low = max(0.0, low)
        return low + draw * (1 + strength - low)

    def _planes(self, images: Tensor, params: Params, blur_limit: int) -> Planes:
        planes = self._geometry(images, params)
        planes = self._colour(planes, params)
        if self.blur > 0 and self.blur_kernel > 1:
            planes = _resample.blur_some(
                planes,
                params["blur"],
                params["sigma"],
                radius=self.blur_kernel // 2,
                reflect=self.semantics == "torchvision",
                at_most=blur_limit,
            )
        if self.solarize > 0:
            invert = partial(_colour.solarize, threshold=self.solarize_threshold)
            planes = change_some(planes, params["solarize"], invert)
        return planes

    def _finish(self, planes: Planes, out: Sequence[Tensor]) -> Planes:
        """The planes clipped and normalised, in float32 also where `out` is narrower."""
        mean, std = self.statistics(len(planes)) or (None, None)
        finished = []
        for i, plane in enumerate(planes):
            in_place = out and out[i].dtype == plane.dtype
            clipped = torch.clamp(plane, 0, 1, out=out[i]) if in_place else plane.clamp(0, 1)
            if mean is not None and std is not None:
                clipped.sub_(mean[i]).div_(std[i])
            finished.append(clipped if in_place or not out else out[i].copy_(clipped))
        return finished

    def statistics(self, channels: int) -> tuple[Sequence[float], Sequence[float]] | None:
        """(mean, std) that images of so many channels are normalised with; None: they are not.

        Raises ValueError where mean or std have another length.
        """
        none = (None,) if channels == 3 else (None, "auto")
        if self.mean in none and self.std in none:
            return None
        return (
            check.per_channel("mean", self.mean, IMAGENET_MEAN, channels, 0.0),
            check.per_channel("std", self.std, IMAGENET_STD, channels, 1.0),
        )

    def _geometry(self, images: Tensor, params: Params) -> Planes:
        flip, vertical_flip = params["flip"], params["vertical_flip"]
        if self.crop:
            antialias = self.semantics == "torchvision"
            planes = _resample.resized_crop(
                images, params["box"], self.image_size, flip, vertical_flip, antialias
            )
        else:
            planes = list(_resample.to_unit(images).unbind(1))
            planes = change_some(planes, flip, partial(_resample.mirror, axis=2))
            planes = change_some(planes, vertical_flip, partial(_resample.mirror, axis=1))
        if self.rotate90 > 0:
            square = self.image_size[0] == self.image_size[1]
            for turns in (1, 2, 3) if square else (2,):
                chosen = params["quarter_turns"] == turns
                planes = change_some(planes, chosen, partial(_resample.rotate, turns=turns))
        return planes

    def _colour(self, planes: Planes, params: Params) -> Planes:
        names = ("brightness", "contrast", "saturation", "hue")  # in the order of the numbers
        operations = {
            number: operation
            for number, operation in _colour.operations(self.semantics, self.hue_mode).items()
            if getattr(self, names[number]) > 0 and (number < 2 or len(planes) == 3)
        }
        if self.jitter > 0 and operations:
            factors = [params[name] for name in names]
            planes = _colour.jitter(planes, params["jitter"], params["order"], factors, operations)
        if self.grayscale > 0 and len(planes) == 3:
            planes = change_some(planes, params["grayscale"], _colour.to_gray)
        return planes

    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


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
