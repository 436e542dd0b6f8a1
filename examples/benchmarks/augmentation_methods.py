"""The methods of augmentation.py: each makes views of one of BYOL's two distributions.

A builder takes the side of the views, the view's index (0 or 1), the kind of images that will come
("uint8" or "float" in [0, 1]) and their device.
"""

import argparse
import importlib
import sys
from collections.abc import Callable

import kornia.augmentation as K
import torch
import torchvision.transforms.v2 as T
from torch import Tensor, nn

from byol_pytorch.augment import IMAGENET_MEAN, IMAGENET_STD, byol_views, per_image

BLUR = (1.0, 0.1)  # of the first and the second view
SOLARIZE = (0.0, 0.2)
OURS, OURS_COMPILED = "byol_pytorch, eager", "byol_pytorch, compiled"
Method = Callable[[Tensor], Tensor]
Builder = Callable[[int, int, str, torch.device], Method]


def available(args: argparse.Namespace) -> dict[str, Builder]:
    """Each method's name and what builds it; prints which peers are not there."""
    builders: dict[str, Builder] = {OURS: our_view}
    if not args.skip_compiled:
        builders[OURS_COMPILED] = our_compiled_view
    builders |= {
        "kornia AugmentationSequential": kornia_container,
        "kornia nn.Sequential": kornia_sequential,
        "torchvision v2, per image": torchvision_per_image,
        "torchvision v2, ONE draw a batch": torchvision_transform,
    }
    if args.compile_kornia:
        builders["kornia nn.Sequential, compiled"] = kornia_compiled
    peers = {
        "torchtransform": ("torchtransform", torchtransform_view),
        "lightly BYOL transform, per image": ("lightly.transforms.byol_transform", lightly_view),
    }
    if args.peers:
        sys.path.append(str(args.peers))  # last: it may hold another byol_pytorch
    for name, (module, build) in peers.items():
        try:
            importlib.import_module(module)
            builders[name] = build
        except ImportError as error:
            print(f"{name} is left out: {error}; --peers FOLDER says where it is")
    return builders


def our_view(size: int, index: int, kind: str, device: torch.device) -> Method:
    return byol_views(size, compile=False)[index]


def our_compiled_view(size: int, index: int, kind: str, device: torch.device) -> Method:
    return byol_views(size, compile=True)[index]


def kornia_container(size: int, index: int, kind: str, device: torch.device) -> Method:
    operations = kornia_operations(size, index, device)
    return from_float(K.AugmentationSequential(*operations, data_keys=["input"]), kind)


def kornia_sequential(size: int, index: int, kind: str, device: torch.device) -> Method:
    return from_float(nn.Sequential(*kornia_operations(size, index, device)), kind)


def kornia_compiled(size: int, index: int, kind: str, device: torch.device) -> Method:
    """In several graphs: what kornia reads back breaks them."""
    view = torch.compile(nn.Sequential(*kornia_operations(size, index, device)))
    return from_float(view, kind)


def kornia_operations(size: int, index: int, device: torch.device) -> list[nn.Module]:
    mean, std = (torch.tensor(values, device=device) for values in (IMAGENET_MEAN, IMAGENET_STD))
    kernel = 2 * int(size / 20) + 1
    operations = [
        K.RandomResizedCrop((size, size), (0.08, 1.0), (3 / 4, 4 / 3), resample="bicubic"),
        K.RandomHorizontalFlip(0.5),
        K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=BLUR[index]),
        K.Normalize(mean, std),
    ]
    if SOLARIZE[index]:
        solarize = K.RandomSolarize((0.5, 0.5), (0.0, 0.0), p=SOLARIZE[index])
        operations.insert(-1, solarize)
    return operations


def torchvision_per_image(size: int, index: int, kind: str, device: torch.device) -> Method:
    return per_image(torchvision_transform(size, index, kind, device))


def torchvision_transform(size: int, index: int, kind: str, device: torch.device) -> Method:
    blur = T.GaussianBlur(2 * int(size / 20) + 1, (0.1, 2.0))
    return T.Compose(
        [
            T.RandomResizedCrop(size, interpolation=T.InterpolationMode.BICUBIC, antialias=True),
            T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            T.RandomGrayscale(0.2),
            T.RandomApply([blur], p=BLUR[index]),
            T.RandomSolarize(128 if kind == "uint8" else 0.5, p=SOLARIZE[index]),
            T.ToDtype(torch.float32, scale=True),
            T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def torchtransform_view(size: int, index: int, kind: str, device: torch.device) -> Method:
    """Its nearest: it has every stage, some of them approximate.

    The crop is antialiased from where it halves an image, and cut to it where torchvision draws
    again; hue is one matrix, no turn in HSV; colours are clipped once, after the last of them; the
    blur ends at two sigma, 9 taps at most where ours has 23 at 224 px. From uint8 images it would
    make uint8 views, to be normalised in one more pass, so it gets float ones as kornia does.
    """
    import torchtransform as tt

    view = tt.Compose(
        tt.RandomResizedCrop(size, (0.08, 1.0), (3 / 4, 4 / 3)),
        tt.HorizontalFlip(0.5),
        tt.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
        tt.Grayscale(p=0.2),
        tt.GaussianBlur((0.1, 2.0), p=BLUR[index]),
        tt.Solarize(0.5, p=SOLARIZE[index]),
        tt.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    )
    return from_float(lambda x: view(tt.Image(x, mode="bicubic", padding="border")), kind)


def lightly_view(size: int, index: int, kind: str, device: torch.device) -> Method:
    """On PIL images, as lightly's loaders give them; turning tensors into those is part of it."""
    from lightly.transforms import byol_transform

    view = (byol_transform.BYOLView1Transform, byol_transform.BYOLView2Transform)[index]
    return per_image(T.Compose([T.ToPILImage(), view(input_size=size)]))


def from_float(view: Method, kind: str) -> Method:
    return view if kind == "float" else lambda x: view(x / 255)
