"""The contestants of step.py: each a function without arguments that takes one training step.

The settings are step.py's arguments.
"""

import argparse
import contextlib
import copy
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from byol_pytorch import BYOL
from byol_pytorch.augment import byol_views
from byol_pytorch.optim import param_groups

Step = Callable[[], object]
FLOOR, OURS, OURS_READY = "backbone alone (floor)", "byol_pytorch", "byol_pytorch, ready views"
OURS_JOINT = "byol_pytorch, ready, as one batch"  # as 0.9.1 does, departing from the paper
PEER, PEER_READY = "byol-pytorch 0.9.1", "byol-pytorch 0.9.1, ready views"
LIGHTLY_READY = "lightly's parts, ready views"


def build(name: str, args: argparse.Namespace) -> Step:
    """One step of the contestant, as a function without arguments."""
    net = backbone(args)
    one, two = (laid_out(torch.randn(views_shape(args), device=args.device), args) for _ in "12")
    if name == FLOOR:
        return floor(net, one, two, args)
    if name in (OURS, OURS_READY):
        return ours(net, (one, two) if name == OURS_READY else (uint8_images(args),), args)
    if name == OURS_JOINT:
        return ours(net, (one, two), args, as_one_batch=True)
    if name in (PEER, PEER_READY):
        return peer(net, (one, two) if name == PEER_READY else None, args)
    return lightly(net, lambda: (one, two), args)


def floor(net: nn.Module, one: Tensor, two: Tensor, args: argparse.Namespace) -> Step:
    target = copy.deepcopy(net).requires_grad_(False)
    optimizer = sgd(net.parameters())
    if args.compile:
        net.compile()
        target.compile()

    def loss() -> Tensor:
        outputs = net(one), net(two)
        with torch.no_grad():
            target(one), target(two)
        return outputs[0].float().mean() + outputs[1].float().mean()

    return lambda: optimize(loss, optimizer, args)


def ours(
    net: nn.Module,
    inputs: tuple[Tensor, ...],
    args: argparse.Namespace,
    *,
    as_one_batch: bool = False,
) -> Step:
    first, second = byol_views(args.image_size, args.views, channels_last=args.channels_last)
    learner = BYOL(
        net, args.image_size, augment_fn=first, augment_fn2=second, concatenate_views=as_one_batch
    ).to(args.device)
    optimizer = sgd(param_groups(learner, weight_decay=1e-6))
    if args.compile:
        learner.compile(fullgraph=True)

    def step() -> None:
        optimize(lambda: learner(*inputs), optimizer, args)
        learner.update_moving_average()

    return step


def peer(net: nn.Module, ready: tuple[Tensor, Tensor] | None, args: argparse.Namespace) -> Step:
    augment = [lambda _, view=view: view for view in ready] if ready else [None, None]
    learner = peer_class(args)(
        net, args.image_size, hidden_layer=-1, augment_fn=augment[0], augment_fn2=augment[1],
        moving_average_decay=0.996, use_simplicial_embeddings=False,
    )  # fmt: skip
    optimizer = sgd(p for p in learner.parameters() if p.requires_grad)
    if args.compile:
        net.compile()
        learner.target_encoder.net.compile()
    images = ready[0] if ready else uint8_images(args)

    def step() -> None:
        given = images if ready else laid_out(images / 255, args)
        optimize(lambda: learner(given), optimizer, args)
        learner.update_moving_average()

    return step


def lightly(
    net: nn.Module, views: Callable[[], tuple[Tensor, Tensor]], args: argparse.Namespace
) -> Step:
    parts = LightlyBYOL(net, 4096, 256)
    optimizer = sgd(parts.parameters)
    if args.compile:
        net.compile()
        parts.target_net.compile()

    def step() -> None:
        parts.move(0.996)
        optimize(lambda: parts.loss(*views()), optimizer, args)

    return step


class LightlyBYOL:
    """BYOL as lightly's documentation builds it from its heads, loss and EMA."""

    def __init__(self, net: Any, hidden: int, out: int) -> None:
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        device = next(net.parameters()).device
        self.net, self.criterion = net, NegativeCosineSimilarity()
        self.projector = BYOLProjectionHead(net.num_features, hidden, out).to(device)
        self.predictor = BYOLPredictionHead(out, hidden, out).to(device)
        self.target_net, self.target_projector = copy.deepcopy(net), copy.deepcopy(self.projector)
        deactivate_requires_grad(self.target_net)
        deactivate_requires_grad(self.target_projector)
        online = (net, self.projector, self.predictor)
        self.parameters = [p for module in online for p in module.parameters()]

    def loss(self, one: Tensor, two: Tensor) -> Tensor:
        """In [-1, 1]: a quarter of the paper's, less 1."""
        p_one, p_two = (self.predictor(self.projector(self.net(view))) for view in (one, two))
        with torch.no_grad():
            z_one, z_two = (self.target_projector(self.target_net(view)) for view in (one, two))
        loss: Tensor = 0.5 * (self.criterion(p_one, z_two) + self.criterion(p_two, z_one))
        return loss

    def move(self, decay: float) -> None:
        from lightly.models.utils import update_momentum

        update_momentum(self.net, self.target_net, m=decay)
        update_momentum(self.projector, self.target_projector, m=decay)


def lightly_views(image_size: int, preset: str) -> Callable[[Image.Image], list[Tensor]]:
    """Both of its views; its CIFAR-10 benchmark has no blur."""
    from lightly.transforms.byol_transform import (
        BYOLTransform,
        BYOLView1Transform,
        BYOLView2Transform,
    )

    blur = {"gaussian_blur": 0.0} if preset == "cifar" else {}
    transform: Callable[[Image.Image], list[Tensor]] = BYOLTransform(
        BYOLView1Transform(input_size=image_size, **blur),
        BYOLView2Transform(input_size=image_size, **blur),
    )
    return transform


class Pictures(Dataset[list[Tensor]]):
    """Decoded pictures, endlessly many, as the views that lightly's transform makes of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.transform = lightly_views(args.image_size, args.views)
        of_host = argparse.Namespace(**vars(args) | {"device": "cpu", "channels_last": False})
        self.pixels = uint8_images(of_host).permute(0, 2, 3, 1).numpy()

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(Image.fromarray(self.pixels[index % len(self.pixels)]))


def lightly_batches(args: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Views on the device out of a DataLoader's workers, as lightly's documentation has it."""
    loader = DataLoader(
        Pictures(args), args.batch_size, num_workers=args.workers, drop_last=True,
        pin_memory=args.device.startswith("cuda"),
    )  # fmt: skip
    for views in loader:
        one, two = (laid_out(view.to(args.device, non_blocking=True), args) for view in views)
        yield one, two


def optimize(
    loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, args: argparse.Namespace
) -> None:
    optimizer.zero_grad()
    autocast = contextlib.nullcontext()
    if args.dtype == "bfloat16":
        autocast = torch.autocast(torch.device(args.device).type, torch.bfloat16)
    with autocast:
        value = loss()
    value.backward()
    optimizer.step()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, weight_decay=1e-6)


def backbone(args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    fixed = timm.get_pretrained_cfg(args.model)
    size = {"img_size": args.image_size} if fixed and fixed.fixed_input_size else {}
    return laid_out(timm.create_model(args.model, num_classes=0, **size).to(args.device), args)


def laid_out(x: Any, args: argparse.Namespace) -> Any:
    return x.to(memory_format=torch.channels_last) if args.channels_last else x


def views_shape(args: argparse.Namespace) -> tuple[int, ...]:
    return args.batch_size, 3, args.image_size, args.image_size


def uint8_images(args: argparse.Namespace) -> Tensor:
    side = args.image_size if args.views == "cifar" else round(args.image_size * 256 / 224)
    shape = (args.batch_size, 3, side, side)
    return laid_out(torch.randint(0, 256, shape, dtype=torch.uint8).to(args.device), args)


def peer_file(args: argparse.Namespace) -> Path:
    return args.peers / "byol_pytorch" / "byol_pytorch.py"


def peer_class(args: argparse.Namespace) -> Any:
    """0.9.1's BYOL, by its path: the package has this one's import name, and needs others."""
    spec = importlib.util.spec_from_file_location("peer", peer_file(args))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.BYOL
