"""Crop boxes, resized crops and Gaussian blur: the separable linear maps of the views.

Each is a pair of small matrices a sample, `rows @ plane @ columns.mT`: a batch is a few batched
matrix products, without a data-dependent shape. Eager CPUs take shorter ways to the same values.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from byol_pytorch._colour import Planes, change_some, eager_on_cpu

TRIES = 10  # torchvision's RandomResizedCrop.get_params


def draw_boxes(
    areas: Tensor,
    ratios: Tensor,
    corners: Tensor,
    size: tuple[int, int],
    ratio: tuple[float, float],
    retry: bool,
) -> Tensor:
    """Integer crop boxes (B, 4) as top, left, height, width, in images of `size`.

    `areas` (B, TRIES) are parts of the image's area, `ratios` widths over heights, `corners` (B, 2)
    uniform in [0, 1). With `retry` the first candidate inside the image counts, else the central
    box of the nearest allowed ratio (torchvision); without, the first one, cut to the image.
    """
    height, width = size
    heights = (areas / ratios * (height * width)).sqrt().round()
    widths = (areas * ratios * (height * width)).sqrt().round()
    if not retry:
        h, w = heights[:, 0].clamp(1, height), widths[:, 0].clamp(1, width)
        return torch.stack((*_corner(corners, height - h, width - w), h, w), dim=1).long()
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    first = fits.int().argmax(dim=1, keepdim=True)
    h, w = heights.gather(1, first)[:, 0], widths.gather(1, first)[:, 0]
    drawn = torch.stack((*_corner(corners, height - h, width - w), h, w), dim=1)
    h_central = min(height, max(1, round(width / ratio[0])))
    w_central = min(width, max(1, round(height * ratio[1])))
    central = ((height - h_central) // 2, (width - w_central) // 2, h_central, w_central)
    any_fits = fits.any(dim=1)
    columns = [torch.where(any_fits, d, c) for d, c in zip(drawn.unbind(1), central, strict=True)]
    return torch.stack(columns, dim=1).long()


def resized_crop(
    images: Tensor,
    box: Tensor,
    size: tuple[int, int],
    flip: Tensor,
    vertical_flip: Tensor,
    antialias: bool,
) -> Planes:
    """The boxes of `images` (B, C, H, W) by bicubic interpolation to `size`, flipped where asked,
    as planes in [0, 1]. The antialias filter is torchvision's; without it, TensorFlow's."""
    if eager_on_cpu(images) and antialias:
        draws = zip(box.tolist(), flip.tolist(), vertical_flip.tolist(), strict=True)
        views = [_crop_one(images[i : i + 1], *draw, size) for i, draw in enumerate(draws)]
        return list(to_unit(torch.cat(views)).unbind(1))
    # For tensor cores. uint8 is exact in float16, and rounding weights and products to its 11 bits
    # moves a result by 0.03 of an 8-bit level in the mean, 0.3 at most (bfloat16: 0.3 and 2.5).
    exact = torch.float16 if images.device.type == "cuda" else torch.float32
    top, left, height, width = box.unbind(1)
    rows = bicubic_matrix(top, height, vertical_flip, images.shape[2], size[0], antialias)
    columns = bicubic_matrix(left, width, flip, images.shape[3], size[1], antialias)
    rows, columns = rows.to(exact), columns.to(exact).mT
    full = 255.0 if images.dtype == torch.uint8 else 1.0
    planes = [plane if full > 1 else plane.clamp(0, 1) for plane in images.unbind(1)]
    return [((rows @ p.to(exact) @ columns).float() / full).clamp_(0, 1) for p in planes]


def to_unit(images: Tensor) -> Tensor:
    """float32 in [0, 1]."""
    if images.dtype == torch.uint8:
        return images / 255
    return images.float().clamp(0, 1)


def bicubic_matrix(
    start: Tensor, length: Tensor, flip: Tensor, size: int, out: int, antialias: bool
) -> Tensor:
    """Weights (B, out, size) that resample the pixels [start, start + length) of an axis.

    Keys' cubic with a = -0.5 and half-pixel centres, widened to the step where that is longer than
    a pixel and `antialias` is on; what lies outside the box gets no weight, as in PIL, torchvision
    (antialias) and tf.image.resize.
    """
    start, length = start[:, None, None], length[:, None, None]
    step = length / out
    stretch = step.clamp_min(1) if antialias else 1.0
    target = torch.arange(out, device=start.device)[:, None]
    centre = start + (torch.where(flip[:, None, None], out - 1 - target, target) + 0.5) * step
    source = torch.arange(size, device=start.device) + 0.5
    x = ((source - centre) / stretch).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weights = weights * ((source > start) & (source < start + length))
    return weights / weights.sum(dim=2, keepdim=True)


def mirror(planes: Planes, axis: int) -> Planes:
    return [plane.flip(axis) for plane in planes]


def rotate(planes: Planes, turns: int) -> Planes:
    return [plane.rot90(turns, (1, 2)) for plane in planes]


def blur_some(
    planes: Planes, chosen: Tensor, sigma: Tensor, radius: int, reflect: bool, at_most: int
) -> Planes:
    """Gaussian blur of the chosen samples, at most `at_most` of them: 2 * radius + 1 taps an axis,
    and beyond the border the pixels mirrored at the outermost one (`reflect`: torchvision, kornia)
    or zeros (DeepMind's "SAME" padding).

    The bound fixes the number of samples computed, so that no shape depends on the draw; those
    computed and not chosen keep their values.
    """
    if eager_on_cpu(chosen):
        blur = partial(_blur_by_taps, radius=radius, reflect=reflect)
        return change_some(planes, chosen, blur, sigma)
    rows = torch.arange(len(chosen), device=chosen.device)
    if at_most < len(chosen):
        rows = chosen.int().topk(at_most).indices
    exact = torch.float16 if chosen.device.type == "cuda" else torch.float32
    taps = gaussian_taps(sigma[rows], radius)
    height, width = planes[0].shape[1:]
    down = gaussian_matrix(taps, height, reflect).to(exact)
    along = gaussian_matrix(taps, width, reflect).to(exact).mT
    result = []
    for plane in planes:
        sharp = plane[rows]
        blurred = (down @ sharp.to(exact) @ along).float()
        kept = torch.where(chosen[rows, None, None], blurred, sharp)
        result.append(plane.index_copy(0, rows, kept))
    return result


def gaussian_taps(sigma: Tensor, radius: int) -> Tensor:
    """Weights (B, 2 * radius + 1) of sum 1."""
    distance = torch.arange(-radius, radius + 1, device=sigma.device)
    weights = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)
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


def _blur_by_taps(planes: Planes, sigma: Tensor, *, radius: int, reflect: bool) -> Planes:
    """The same blur as sums of shifted copies: on a CPU a third of the matrix products' time."""
    x = torch.stack(planes, dim=1)
    height, width = x.shape[2:]
    x = F.pad(x, (radius,) * 4, mode="reflect" if reflect else "constant")
    taps = gaussian_taps(sigma[:, 0, 0], radius)
    seen = [shift for shift, tap in enumerate(taps.amax(dim=0).tolist()) if tap > 0]
    sides = [(s, taps[:, s, None, None, None]) for s in seen if s != radius]
    centre = taps[:, radius, None, None, None]
    for axis, size in ((3, width), (2, height)):
        total = x.narrow(axis, radius, size) * centre
        for shift, tap in sides:
            total.addcmul_(x.narrow(axis, shift, size), tap)
        x = total
    return list(x.unbind(1))


def _corner(corners: Tensor, free_rows: Tensor, free_columns: Tensor) -> tuple[Tensor, Tensor]:
    """Top and left, each integer that fits equally likely (a product may round up to the bound)."""
    top = torch.minimum((corners[:, 0] * (free_rows + 1)).floor(), free_rows)
    left = torch.minimum((corners[:, 1] * (free_columns + 1)).floor(), free_columns)
    return top, left


def _crop_one(
    image: Tensor, box: list[int], flip: bool, vertical_flip: bool, size: tuple[int, int]
) -> Tensor:
    """torch's own kernel: it skips the pixels that have no weight, and takes uint8 as it is."""
    top, left, height, width = box
    crop = image[..., top : top + height, left : left + width]
    if crop.dtype != torch.uint8:
        crop = crop.float().clamp(0, 1)
    view = F.interpolate(crop, size, mode="bicubic", antialias=True)
    axes = [axis for axis, asked in ((-1, flip), (-2, vertical_flip)) if asked]
    return view.flip(axes) if axes else view
