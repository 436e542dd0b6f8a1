"""What the heads of evaluate_linear.py are trained and tested on, by published evaluation."""

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from parts.backbone import Facts
from parts.decoding import CENTRE
from parts.labelled import INTERPOLATION, Transform, as_tensor

VIEWS = ("crop", "bilinear", "colour", "places")
# AlexNet's colour noise: eigenvalues and eigenvectors of ImageNet's RGB values in [0, 1]
# (Krizhevsky et al. 2012, section 4.1; the figures of fb.resnet.torch, which MMSelfSup 1.x's
# multi-head configuration has times 255 and in the order BGR).
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)


class Lighting(nn.Module):
    """Adds one colour to (3, H, W) in [0, 1], drawn along the principal components of RGB."""

    def __init__(self, std: float = 0.1) -> None:
        super().__init__()
        self.std = std

    def forward(self, image: Tensor) -> Tensor:
        along = torch.randn(3) * self.std * torch.tensor(EIGENVALUES)
        return image + (torch.tensor(EIGENVECTORS) @ along).view(3, 1, 1)


def views(kind: str, facts: Facts, whole: bool) -> tuple[Transform, Transform]:
    """What is trained on and what is tested on; images of one size are tested on as a whole.

    crop: random crop and flip, bicubic, the paper's. bilinear: the same, MMSelfSup's for one head
    and iNaturalist. colour: bilinear, with jitter 0.4 and lighting, its multi-head one for
    ImageNet. places: random crop of the central square and flip, bilinear, its one for Places205.
    MMSelfSup's are those of 0.x, torchvision's bilinear default (1.x: bicubic for several heads).
    """
    size, edge = facts.image_size, round(facts.image_size / CENTRE)
    mode = INTERPOLATION[kind != "crop"]
    to_image, to_float, normalise = as_tensor(facts)
    look = [v2.Resize(size if whole else edge, mode), v2.CenterCrop(size)]
    train = [v2.RandomResizedCrop(size, interpolation=mode)]
    if kind == "places":
        train = [v2.Resize(edge, mode), v2.CenterCrop(edge), v2.RandomCrop(size)]
    train.append(v2.RandomHorizontalFlip())
    noise = [Lighting()] if kind == "colour" else []
    if kind == "colour":
        train.append(v2.ColorJitter(0.4, 0.4, 0.4))
    return (
        v2.Compose([*train, to_image, to_float, *noise, normalise]),
        v2.Compose([*look, to_image, to_float, normalise]),
    )
