"""From the bytes of an image to uint8 tensors: decoding, crops, central squares."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

CENTRE = 224 / 256  # the part of the short edge that an evaluation sees


def open_image(data: bytes, max_value: float | None = None) -> Image.Image:
    """The image, not decoded yet where it has 8 bits a channel.

    Others become 8 bits: `max_value` is white, by default what the file's bits can hold. So all
    images of a data set keep their brightness to each other.
    """
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:  # whose own words are of bytes at an address
        raise ValueError(f"no image that Pillow can read, {len(data)} bytes") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise ValueError(
            f"more than {limit:.0f} megapixels, Pillow's limit: cut it into tiles"
        ) from None
    if not image.mode.startswith(("I", "F")):
        return image
    white = max_value or (65535 if image.mode.startswith("I;16") else None)
    if white is None:
        raise ValueError(f"mode {image.mode}, which has no largest value: give --max-value")
    values = np.asarray(image, np.float32) * (255 / white)
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def pixels(image: Image.Image) -> Tensor:
    """(3, H, W) uint8; EXIF's orientation is ignored, as by torchvision's ImageFolder."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@dataclass(frozen=True)
class Crop:
    """Of random resized crops: the part of the area, width over height (paper, appendix B)."""

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)


PAPER_CROP = Crop()


def random_crops(
    image: Image.Image, wanted: Sequence[tuple[int, Crop]], rng: np.random.Generator
) -> list[Tensor]:
    """Random resized crops of one decoding: for each size and distribution a (3, size, size)."""
    width, height = image.size
    boxes = [(size, draw_box(rng, height, width, crop)) for size, crop in wanted]
    # A JPEG can be decoded smaller where all crops keep twice the pixels of their views a side:
    # the decoder's filter is another one, and then it leaves no trace.
    reduced(image, min(min(h, w) // (2 * size) for size, (_, _, h, w) in boxes))
    down, along = image.height / height, image.width / width
    crops = []
    for size, (top, left, h, w) in boxes:
        x, y = round(left * along), round(top * down)
        right = min(image.width, x + max(1, round(w * along)))
        bottom = min(image.height, y + max(1, round(h * down)))
        crops.append(resize(pixels(image.crop((x, y, right, bottom))), size))
    return crops


def central_square(image: Image.Image | Tensor, part: float, size: int) -> Tensor:
    """(3, size, size): the central square over `part` of the short edge."""
    if not isinstance(image, Tensor):
        reduced(image, int(part * min(image.size)) // (2 * size))
        image = pixels(image)
    height, width = image.shape[1:]
    side = max(1, round(part * min(height, width)))
    top, left = (height - side) // 2, (width - side) // 2
    return resize(image[:, top : top + side, left : left + side], size)


def reduced(image: Image.Image, factor: int) -> None:
    """Let the decoder divide both sides by the largest power of two up to `factor`, if it can."""
    scale = next(s for s in (8, 4, 2, 1) if s <= max(1, factor))
    if scale > 1:
        image.draft(image.mode, (image.width // scale, image.height // scale))


def resize(image: Tensor, size: int) -> Tensor:
    # torch's uint8 kernel: torchvision's and PIL's antialiased bicubic to a rounding.
    return F.interpolate(image[None], (size, size), mode="bicubic", antialias=True)[0].contiguous()


def draw_box(
    rng: np.random.Generator, height: int, width: int, crop: Crop = PAPER_CROP
) -> tuple[int, int, int, int]:
    """Top, left, height, width as torchvision's RandomResizedCrop draws them."""
    low, high = map(math.log, crop.ratio)
    for _ in range(10):
        area = height * width * rng.uniform(*crop.scale)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            return int(top), int(left), h, w
    w = min(width, max(1, round(height * crop.ratio[1])))
    h = min(height, max(1, round(width / crop.ratio[0])))
    return (height - h) // 2, (width - w) // 2, h, w
