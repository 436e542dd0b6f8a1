"""kornia's stages where kornia's own are too slow for a training step, or do something else.

Each carries kornia's name and draws under kornia's names, so that it works in any kornia pipeline
and its draws replay there. Draws are made in float32 on the stage's device; kornia's generators,
which read ranges back, register buffers and follow a cast to bfloat16, are dropped for it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from kornia.constants import Resample
from torch import Tensor

Params = dict[str, Tensor]
Semantics = Literal["torchvision", "deepmind"]

GRAY = (0.299, 0.587, 0.114)  # kornia's; torchvision and DeepMind round the first to 0.2989


def eager_on_cpu(x: Tensor) -> bool:
    """Whether looking at values is free here: no device to wait for, no graph to break."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def to_unit(images: Tensor) -> Tensor:
    """A copy in float32, in [0, 1]."""
    return images / 255.0 if images.dtype == torch.uint8 else images.float().clamp(0, 1)


def uniform(stage: Any, batch: int, count: int) -> Tensor:
    """(B, count) numbers in [0, 1); one row for all images where the stage has same_on_batch."""
    rows = 1 if stage.same_on_batch else batch
    drawn = torch.rand(rows, count, device=stage.device, dtype=torch.float32)
    return drawn.expand(batch, count)


def between(ends: tuple[float, float], draw: Tensor) -> Tensor:
    return ends[0] + draw * (ends[1] - ends[0])


class RandomResizedCrop(K.RandomResizedCrop):
    """Bicubic crops of uint8 or float images (B, C, H, W), as float32 in [0, 1].

    Boxes are torchvision's: the first of `tries` draws that fits, else the central box of the
    nearest allowed ratio (kornia places that at random). With one try it is cut to the image, as in
    DeepMind's code. `antialias` is torchvision's and PIL's filter, without it tf.image.resize's.
    """

    def __init__(
        self,
        size: tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        same_on_batch: bool = False,
        keepdim: bool = False,
        *,
        antialias: bool = True,
        tries: int = 10,
    ) -> None:
        super().__init__(
            size, scale, ratio, "bicubic", same_on_batch, align_corners=False, keepdim=keepdim
        )
        self._param_generator = None
        self.flags |= {"scale": scale, "ratio": ratio, "antialias": antialias, "tries": tries}

    def transform_tensor(self, input: Tensor, **how: Any) -> Tensor:
        plain = input.dtype == torch.uint8 and input.ndim == 4 and not how
        return input if plain else super().transform_tensor(input, **how)

    def validate_tensor(self, input: Tensor) -> None:
        if input.dtype != torch.uint8:
            super().validate_tensor(input)

    def generate_parameters(self, batch_shape: Sequence[int]) -> Params:
        batch, *_, height, width = batch_shape
        (out_h, out_w), scale, ratio, tries = map(
            self.flags.get, ("size", "scale", "ratio", "tries")
        )
        draws = uniform(self, batch, 2 * tries + 2)
        areas, ratios, corners = draws.split((tries, tries, 2), dim=1)
        ratios = between((math.log(ratio[0]), math.log(ratio[1])), ratios).exp()
        top, left, h, w = draw_boxes(
            between(scale, areas), ratios, corners, (height, width), ratio, retry=tries > 1
        )
        zero = torch.zeros_like(left)
        return {
            "src": _corners(left, top, left + w - 1, top + h - 1),
            "dst": _corners(zero, zero, zero + (out_w - 1), zero + (out_h - 1)),
            "input_size": torch.stack((zero + height, zero + width), dim=1).long(),
            "output_size": torch.stack((zero + out_h, zero + out_w), dim=1).long(),
        }

    def apply_transform(
        self, input: Tensor, params: Params, flags: dict[str, Any], transform: Any = None
    ) -> Tensor:
        if flags["resample"] != Resample.BICUBIC:  # masks
            return super().apply_transform(input, params, flags, transform)
        size, antialias = flags["size"], flags["antialias"]
        if not len(input):
            return torch.empty((0, input.shape[1], *size), device=input.device)
        corners = params["src"].to(input.device)[:, ::2].round()  # the first and the last
        x, y = (corners[..., axis].clamp(0, input.shape[3 - axis] - 1) for axis in (0, 1))
        if eager_on_cpu(input) and antialias:
            boxes = torch.cat((x, y), dim=1).int().tolist()
            views = [_crop_one(i, box, size) for i, box in zip(input.split(1), boxes, strict=True)]
            view = torch.cat(views) if len(views) > 1 else views[0]
            return view / 255.0 if view.dtype == torch.uint8 else view.clamp_(0, 1)
        columns, rows = (
            bicubic_matrix(first, last - first + 1, pixels, out, antialias)
            for (first, last), pixels, out in (
                (x.unbind(1), input.shape[3], size[1]),
                (y.unbind(1), input.shape[2], size[0]),
            )
        )
        full = 255.0 if input.dtype == torch.uint8 else 1.0
        image = input if full > 1 else input.clamp(0, 1)
        return separable(image, rows, columns).div_(full).clamp_(0, 1)


def _crop_one(image: Tensor, box: list[int], size: tuple[int, int]) -> Tensor:
    """torch's own kernel: it skips the pixels that have no weight, and takes uint8 as it is."""
    left, right, top, bottom = box
    crop = image[..., top : bottom + 1, left : right + 1]
    if crop.dtype != torch.uint8:
        crop = crop.float().clamp(0, 1)
    return F.interpolate(crop, size, mode="bicubic", antialias=True)


def draw_boxes(
    areas: Tensor,
    ratios: Tensor,
    corners: Tensor,
    size: tuple[int, int],
    ratio: tuple[float, float],
    retry: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whole numbers top, left, height and width, (B,) each, of crops of images of `size`.

    `areas` (B, tries) are parts of the image's area, `ratios` widths over heights, `corners` (B, 2)
    uniform in [0, 1).
    """
    height, width = size
    heights = (areas / ratios * (height * width)).sqrt().round()
    widths = (areas * ratios * (height * width)).sqrt().round()
    if not retry:
        h, w = heights[:, 0].clamp(1, height), widths[:, 0].clamp(1, width)
        return *_place(corners, height - h, width - w), h, w
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    first = fits.int().argmax(dim=1, keepdim=True)
    h, w = heights.gather(1, first)[:, 0], widths.gather(1, first)[:, 0]
    top, left = _place(corners, height - h, width - w)
    h_central = min(height, max(1, round(width / ratio[0])))
    w_central = min(width, max(1, round(height * ratio[1])))
    central = ((height - h_central) // 2, (width - w_central) // 2, h_central, w_central)
    found = fits.any(dim=1)
    top, left, h, w = (
        torch.where(found, d, float(c)) for d, c in zip((top, left, h, w), central, strict=True)
    )
    return top, left, h, w


def _place(corners: Tensor, free_rows: Tensor, free_columns: Tensor) -> tuple[Tensor, Tensor]:
    """Top and left, each place that fits equally likely (a product may round up to the bound)."""
    top = torch.minimum((corners[:, 0] * (free_rows + 1)).floor(), free_rows)
    left = torch.minimum((corners[:, 1] * (free_columns + 1)).floor(), free_columns)
    return top, left


def _corners(x0: Tensor, y0: Tensor, x1: Tensor, y1: Tensor) -> Tensor:
    """kornia's corners (B, 4, 2), clockwise from the top left; the last pixel belongs to the box"""
    return torch.stack((x0, y0, x1, y0, x1, y1, x0, y1), dim=1).unflatten(1, (4, 2))


def bicubic_matrix(start: Tensor, length: Tensor, size: int, out: int, antialias: bool) -> Tensor:
    """Weights (B, out, size) that resample the pixels [start, start + length) of an axis.

    Keys' cubic with a = -0.5 and half-pixel centres, widened to the step where that is longer than
    a pixel and `antialias` is on; what lies outside the box gets no weight, as in PIL, torchvision
    (antialias) and tf.image.resize.
    """
    start, length = start[:, None, None], length[:, None, None]
    step = length / out
    stretch = step.clamp_min(1) if antialias else 1.0
    centre = start + (torch.arange(out, device=start.device)[:, None] + 0.5) * step
    source = torch.arange(size, device=start.device) + 0.5
    x = ((source - centre) / stretch).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weights = weights * ((source > start) & (source < start + length))
    return weights / weights.sum(dim=2, keepdim=True)


def separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ plane @ columns.mT for every plane of (B, C, H, W), in float32.

    On a GPU for tensor cores: uint8 is exact in float16, and rounding weights and products to its
    11 bits moves a result by 0.03 of an 8-bit level in the mean, 0.3 at most (bfloat16: 0.3, 2.5).
    """
    exact = torch.float16 if images.device.type == "cuda" else torch.float32
    # With the height in front both products are one batched product an image, without a copy.
    x = images.permute(0, 2, 1, 3).to(exact).contiguous()  # (B, H, C, W)
    x = x.flatten(1, 2) @ columns.to(exact).mT
    x = rows.to(exact) @ x.view(len(x), images.shape[2], -1)
    return x.float().unflatten(2, (images.shape[1], -1)).transpose(1, 2)


class RandomRotation90(K.RandomRotation90):
    """Quarter turns as exact permutations of the pixels, each of the whole numbers from times[0] to
    times[1] equally likely. kornia interpolates, and rounds a uniform draw."""

    def __init__(
        self,
        times: tuple[int, int],
        same_on_batch: bool = False,
        p: float = 0.5,
        keepdim: bool = False,
    ) -> None:
        super().__init__(times, same_on_batch=same_on_batch, p=p, keepdim=keepdim)
        self._param_generator = None
        self.flags["times"] = times

    def generate_parameters(self, batch_shape: Sequence[int]) -> Params:
        low, high = self.flags["times"]
        draw = uniform(self, batch_shape[0], 1)[:, 0]
        return {"times": between((low, high + 1), draw).floor().clamp(max=high)}

    def apply_transform(
        self, input: Tensor, params: Params, flags: dict[str, Any], transform: Any = None
    ) -> Tensor:
        turns = params["times"].to(input.device).round().view(-1, 1, 1, 1) % 4
        square, (low, high) = input.shape[2] == input.shape[3], flags["times"]
        if not square and (low != high or low % 2):
            raise ValueError(
                f"times={(low, high)} on images of {tuple(input.shape[2:])}: a quarter turn does "
                "not fit there. Expected square images, or times=(2, 2)."
            )
        for turn in (1, 2, 3) if square else (2,):
            input = torch.where(turns == turn, input.rot90(turn, (2, 3)), input)
        return input


class Image(NamedTuple):
    """What a step of the jitter looks at: the three channels of images in [0, 1], (B, 1, H, W)
    each, or as many as there are, and where the changed values stand on the circle of hues."""

    channels: Sequence[Tensor]
    own_hue: Any  # 0, 2 and 4 for red, green and blue


Step = Callable[[Tensor, Image, Tensor], Tensor]  # changes some or all channels by (B, 1, 1, 1)


class ColorJitter(K.ColorJitter):
    """kornia's and torchvision's jitter, with an order of its own for each image.

    `orders` (B, 4) holds in column s the number of the step that is done s-th: 0 brightness,
    1 contrast, 2 saturation, 3 hue. Where it is absent kornia's `order` (4,) serves for all.
    Saturation and hue need RGB and are left out for other channel counts. `semantics="deepmind"`:
    brightness adds its factor less 1, contrast goes around each channel's mean, saturation scales
    HSV's S.
    """

    def __init__(
        self,
        brightness: float | tuple[float, float] = 0.0,
        contrast: float | tuple[float, float] = 0.0,
        saturation: float | tuple[float, float] = 0.0,
        hue: float | tuple[float, float] = 0.0,
        same_on_batch: bool = False,
        p: float = 1.0,
        keepdim: bool = False,
        *,
        semantics: Semantics = "torchvision",
    ) -> None:
        super().__init__(brightness, contrast, saturation, hue, same_on_batch, p, keepdim)
        kornias: Any = self  # checks the strengths and makes ranges of them
        samplers = {name: getattr(kornias._param_generator, f"{name}_sampler") for name in STEPS}
        self._param_generator = None
        self.flags: dict[str, Any] = {n: (float(s.low), float(s.high)) for n, s in samplers.items()}
        self.flags["semantics"] = semantics

    def generate_parameters(self, batch_shape: Sequence[int]) -> Params:
        draws = uniform(self, batch_shape[0], 8)
        orders = draws[:, 4:].argsort(dim=1)
        factors = {
            f"{name}_factor": between(self.flags[name], draws[:, i]) for i, name in enumerate(STEPS)
        }
        return {**factors, "orders": orders, "order": orders[:1].flatten()}

    def apply_transform(
        self, input: Tensor, params: Params, flags: dict[str, Any], transform: Any = None
    ) -> Tensor:
        orders = params["orders"] if "orders" in params else params["order"].expand(len(input), -1)
        steps = DEEPMIND_STEPS if flags["semantics"] == "deepmind" else TORCHVISION_STEPS
        if input.shape[1] != 3:
            steps = steps[:2]
        factors = [params[f"{name}_factor"] for name in STEPS]
        if eager_on_cpu(input) and not (input.requires_grad and torch.is_grad_enabled()):
            return _jitter_rows(input, orders, factors, steps)
        orders, *factors = (x.to(input.device) for x in (orders, *factors))
        drawn = self._gate(params).to(input.device)
        return _jitter_all(input, orders, factors, steps, drawn)


def _jitter_rows(
    images: Tensor, orders: Tensor, factors: list[Tensor], steps: Sequence[Step]
) -> Tensor:
    """Each step for the images whose turn it is, which are brought next to each other for it."""
    owns = torch.arange(0.0, 2 * images.shape[1], 2)[:, None, None]
    idle = [set(f.tolist()) == {0.0 if n == HUE else 1.0} for n, f in enumerate(factors)]

    def change(some: Tensor, number: int, factor: Tensor) -> Tensor:
        if number >= len(steps) or idle[number]:
            return some
        return steps[number](some, Image(some.split(1, dim=1), owns), factor.view(-1, 1, 1, 1))

    if len(images) == 1:
        for number in orders[0].tolist():
            images = change(images, number, factors[number])
        return images
    place = torch.arange(len(images))  # in the batch, of the images as they lie now
    for turn in orders.T:
        numbers, sorting = turn[place].sort()
        place, images = place[sorting], images.index_select(0, sorting)
        counts = numbers.bincount(minlength=len(factors)).tolist()
        groups = zip(images.split(counts), place.split(counts), strict=True)
        for number, (some, rows) in enumerate(groups):
            if len(rows):
                some.copy_(change(some, number, factors[number][rows]))
    return images.index_select(0, place.argsort())


def _jitter_all(
    images: Tensor, orders: Tensor, factors: list[Tensor], steps: Sequence[Step], drawn: Tensor
) -> Tensor:
    """Every step for all images; those are taken that drew the jitter and whose turn it is.

    Contrast needs a mean over the image. Everything before it, then it, then everything after is
    two passes over memory, where four steps that may each be contrast would be four.
    """
    parts: list[Tensor] = [images]
    owns: list[Any] = [torch.arange(0, 6, 2, device=images.device)[:, None, None]]
    if torch.compiler.is_compiling() and len(steps) == 4:
        # One plane a channel: a compiler then keeps a pixel in registers from step to step.
        parts, owns = list(images.split(1, dim=1)), [0, 2, 4]
    contrast_at = (orders == CONTRAST).int().argmax(dim=1)

    def change(parts: list[Tensor], number: int, chosen: Tensor) -> list[Tensor]:
        channels = parts if len(parts) > 1 else parts[0].split(1, dim=1)
        factor, mask = (x.view(-1, 1, 1, 1) for x in (factors[number], chosen & drawn))
        changed = [
            steps[number](part, Image(channels, own), factor)
            for part, own in zip(parts, owns, strict=True)
        ]
        return [torch.where(mask, new, old) for new, old in zip(changed, parts, strict=True)]

    pointwise = [number for number in range(len(steps)) if number != CONTRAST]
    for turn in range(3):
        for number in pointwise:
            parts = change(parts, number, (orders[:, turn] == number) & (turn < contrast_at))
    parts = change(parts, CONTRAST, drawn)
    for turn in range(1, 4):
        for number in pointwise:
            parts = change(parts, number, (orders[:, turn] == number) & (turn > contrast_at))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def gray(channels: Sequence[Tensor]) -> Tensor:
    """Luma of three channels, the plain mean of any other number."""
    if len(channels) != 3:
        return torch.cat(tuple(channels), dim=1).mean(dim=1, keepdim=True)
    red, green, blue = channels
    return torch.add(red * GRAY[0], green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])


def scale_brightness(x: Tensor, image: Image, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


def add_brightness(x: Tensor, image: Image, factor: Tensor) -> Tensor:
    return (x + (factor - 1)).clamp_(0, 1)


def scale_contrast(x: Tensor, image: Image, factor: Tensor) -> Tensor:
    """Away from or towards the mean of the gray image."""
    return _away_from(gray(image.channels).mean(dim=(2, 3), keepdim=True), x, factor)


def scale_channel_contrast(x: Tensor, image: Image, factor: Tensor) -> Tensor:
    """Away from or towards each channel's own mean."""
    return _away_from(x.mean(dim=(2, 3), keepdim=True), x, factor)


def scale_saturation(x: Tensor, image: Image, factor: Tensor) -> Tensor:
    """Away from or towards the gray image."""
    return _away_from(gray(image.channels), x, factor)


def scale_hsv_saturation(x: Tensor, image: Image, factor: Tensor) -> Tensor:
    """HSV's S times factor, S clipped to [0, 1]: hue and value keep still, so each channel moves
    along its distance to the maximum."""
    value, minimum = _extremes(image.channels)
    factor = torch.minimum(factor, value / (value - minimum).clamp_min(1e-12))
    return (value - (value - x) * factor).clamp_(0, 1)


def shift_hue(x: Tensor, image: Image, turns: Tensor) -> Tensor:
    """HSV's H moved by a part of the colour circle: exact, without a division or a branch.

    With maximum v, minimum m and chroma c = v - m, sixths of the circle as the unit, and D the
    distance of the hue from a channel's own (red 0, green 2, blue 4), the channel is v + c - D * c
    clipped to [m, v]. Red's D * c is v - 2m - r + g + b, on green's side where g > b; a distance x
    on a circle of 6c is 3c - ||x| - 3c|.
    """
    red, green, blue = image.channels
    value, minimum = _extremes(image.channels)
    chroma = value - minimum
    distance = torch.sub(value, minimum, alpha=2).sub_(red).add_(green).add_(blue)
    hue = torch.copysign(distance, green - blue)
    offset = 6 * (turns - turns.round()) - image.own_hue  # in [-7, 3]: wrapped to [-3, 3]
    offset = torch.where(offset < -3, offset + 6, offset)
    around = (chroma * offset).add_(hue).abs_().sub_(chroma, alpha=3).abs_()
    return torch.clamp(around.add_(torch.sub(value, chroma, alpha=2)), minimum, value)


def _away_from(other: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).add_(other * (1 - factor)).clamp_(0, 1)


def _extremes(channels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    red, green, blue = channels
    maximum = torch.maximum(torch.maximum(red, green), blue)
    return maximum, torch.minimum(torch.minimum(red, green), blue)


STEPS = ("brightness", "contrast", "saturation", "hue")  # by torchvision's and kornia's numbers
CONTRAST, HUE = 1, 3
TORCHVISION_STEPS: Sequence[Step] = (scale_brightness, scale_contrast, scale_saturation, shift_hue)
DEEPMIND_STEPS: Sequence[Step] = (
    add_brightness, scale_channel_contrast, scale_hsv_saturation, shift_hue,
)  # fmt: skip


class RandomGaussianBlur(K.RandomGaussianBlur):
    """kornia's blur: on a CPU as sums of shifted copies, a third of a convolution's time, elsewhere
    as matrix products. Kernels that are not square, and borders other than "reflect" and "constant"
    (zeros), are kornia's own."""

    def __init__(
        self,
        kernel_size: tuple[int, int],
        sigma: tuple[float, float],
        border_type: str = "reflect",
        separable: bool = True,
        same_on_batch: bool = False,
        p: float = 0.5,
        keepdim: bool = False,
    ) -> None:
        super().__init__(kernel_size, sigma, border_type, separable, same_on_batch, p, keepdim)
        self._param_generator = None
        self.flags["sigma"] = sigma

    def generate_parameters(self, batch_shape: Sequence[int]) -> Params:
        return {"sigma": between(self.flags["sigma"], uniform(self, batch_shape[0], 1)[:, 0])}

    def apply_transform(
        self, input: Tensor, params: Params, flags: dict[str, Any], transform: Any = None
    ) -> Tensor:
        size, border = flags["kernel_size"], flags["border_type"].name
        size = (size, size) if isinstance(size, int) else size
        if size[0] != size[1] or border not in ("REFLECT", "CONSTANT"):
            return super().apply_transform(input, params, flags, transform)
        reflect = border == "REFLECT"
        taps = gaussian_taps(params["sigma"].to(input.device), size[0] // 2)
        if eager_on_cpu(input):
            return _blur_by_taps(input, taps, reflect)
        down = gaussian_matrix(taps, input.shape[2], reflect)
        return separable(input, down, gaussian_matrix(taps, input.shape[3], reflect))


def gaussian_taps(sigma: Tensor, radius: int) -> Tensor:
    """Weights (B, 2 * radius + 1) of sum 1."""
    distance = torch.arange(-radius, radius + 1, device=sigma.device)
    weights = torch.exp(-0.5 * (distance / sigma[:, None].clamp_min(1e-6)) ** 2)
    # Beyond 5 standard deviations lies half a millionth of the sum: without those taps a CPU has
    # fewer to add, and is not slowed by denormal numbers.
    weights = torch.where(weights > 3e-6, weights, 0.0)
    return weights / weights.sum(dim=1, keepdim=True)


def gaussian_matrix(taps: Tensor, size: int, reflect: bool) -> Tensor:
    """The blur of an axis of `size` pixels as a matrix (B, size, size)."""
    radius = taps.shape[1] // 2
    one_sided = F.pad(taps[:, radius:], (0, 1))  # by distance, a zero for all that are too far
    target = torch.arange(size, device=taps.device)[:, None]
    source = torch.arange(size, device=taps.device)
    matrix = one_sided[:, (target - source).abs().clamp_max(radius + 1)]
    if reflect:
        far, last = radius + 1, size - 1
        first_side = torch.where(source > 0, target + source, far).clamp_max(far)
        last_side = torch.where(source < last, 2 * last - target - source, far).clamp_max(far)
        matrix = matrix + one_sided[:, first_side] + one_sided[:, last_side]
    return matrix


def _blur_by_taps(images: Tensor, taps: Tensor, reflect: bool) -> Tensor:
    height, width = images.shape[2:]
    radius = taps.shape[1] // 2
    x = F.pad(images, (radius,) * 4, mode="reflect" if reflect else "constant")
    seen = [shift for shift, tap in enumerate(taps.amax(dim=0).tolist()) if tap > 0]
    sides = [(s, taps[:, s, None, None, None]) for s in seen if s != radius]
    centre = taps[:, radius, None, None, None]
    for axis, size in ((3, width), (2, height)):
        total = x.narrow(axis, radius, size) * centre
        for shift, tap in sides:
            total.addcmul_(x.narrow(axis, shift, size), tap)
        x = total
    return x


class RandomSolarize(K.RandomSolarize):
    """kornia's, with draws on the stage's device and without its two buffers."""

    def __init__(
        self,
        thresholds: float | tuple[float, float] = 0.1,
        additions: float | tuple[float, float] = 0.1,
        same_on_batch: bool = False,
        p: float = 0.5,
        keepdim: bool = False,
    ) -> None:
        super().__init__(thresholds, additions, same_on_batch, p, keepdim)
        self._param_generator = None
        self.flags["thresholds"] = _around(0.5, thresholds, (0.0, 1.0))
        self.flags["additions"] = _around(0.0, additions, (-0.5, 0.5))

    def generate_parameters(self, batch_shape: Sequence[int]) -> Params:
        draws = uniform(self, batch_shape[0], 2).unbind(dim=1)
        drawn = {"thresholds": between(self.flags["thresholds"], draws[0])}
        if self.flags["additions"] != (0.0, 0.0):
            drawn["additions"] = between(self.flags["additions"], draws[1])
        return drawn

    def apply_transform(
        self, input: Tensor, params: Params, flags: dict[str, Any], transform: Any = None
    ) -> Tensor:
        input = input.clamp(0, 1)
        if "additions" in params:
            input = (input + params["additions"].to(input).view(-1, 1, 1, 1)).clamp(0, 1)
        threshold = params["thresholds"].to(input).view(-1, 1, 1, 1)
        return torch.where(input < threshold, input, 1 - input)


def _around(
    centre: float, given: float | tuple[float, float], bounds: tuple[float, float]
) -> tuple[float, float]:
    """kornia's reading of a magnitude: as much to both sides, within bounds; a range as it is."""
    if isinstance(given, int | float):
        return max(bounds[0], centre - given), min(bounds[1], centre + given)
    return float(given[0]), float(given[1])
