"""The families of backbones that backbones.py goes through: each one's smallest model, what it
takes, and its own pooled feature, found without byol_pytorch. Weights are random everywhere.
"""

import copy
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

SIDES = (64, 96, 128, 160)  # tried in this order before a model's own
IMAGES = 3  # of a batch: the heads' batch norm leaves two of them without a gradient
LARGE = 50e6  # parameters from which on a model is built with two blocks, where it takes a depth

Images = Any
Feature = Callable[[nn.Module, Images], Tensor]


@dataclass(frozen=True)
class Subject:
    """One family's model: `feature(net, images)` is its own pooled feature in evaluation mode."""

    model: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of one image
    feature: Feature

    @property
    def picture(self) -> bool:
        return len(self.shape) == 3

    def images(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(IMAGES, *self.shape, generator=generator)


class BareForwardError(Exception):
    """The model does not run by itself, so there is nothing to wrap."""


def families() -> list[str]:
    """The names of all families, "library/family"."""
    return [f"{library}/{name}" for library, found in FAMILIES.items() for name in found()]


def subject(family: str) -> Subject:
    """The model of a family. Raises BareForwardError where it does not run by itself."""
    library, name = family.split("/")
    return BUILDERS[library](name)


# timm: every module file ------------------------------------------------------------------------


def timm_families() -> list[str]:
    return sorted(
        {timm.models.model_entrypoint(m).__module__.split(".")[-1] for m in timm_models()}
    )


def timm_models(module: str = "") -> list[str]:
    return timm.list_models(module=module)


def timm_subject(module: str) -> Subject:
    name = smallest(timm_models(module), timm.create_model)
    options = {"depth": 2} if size_of(name, timm.create_model) > LARGE else {}
    try:
        size_of(name, timm.create_model, **options)
    except TypeError:  # it takes no depth
        options = {}
    given = timm.get_pretrained_cfg(name)
    sides = {*SIDES, (given.min_input_size or given.input_size)[-1]}
    own = given.input_size
    shapes = [*((own[0], side, side) for side in sorted(sides) if side < own[-1]), own]
    trouble: Exception | None = None
    for shape in shapes:
        for size in ({"img_size": shape[1:]}, {}):
            every = options | size
            found = Subject(
                label(name, options), partial(timm.create_model, name, **every), shape, timm_feature
            )
            try:
                run_bare(found)
            except Exception as error:  # whatever a size that it was not made for raises
                trouble = error
            else:
                return found
    raise BareForwardError(first_line(trouble))


def timm_feature(net: Any, images: Tensor) -> Tensor:
    """By timm's public interface; of a model without forward_head, its output without a head."""
    if hasattr(net, "forward_head"):
        return over_positions(net.forward_head(net.forward_features(images), pre_logits=True))
    headless = copy.deepcopy(net)
    headless.reset_classifier(0)
    return over_positions(headless(images))


# torchvision: classification and video ------------------------------------------------------------


def torchvision_families() -> list[str]:
    return sorted(torchvision_modules())


def torchvision_modules() -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for module, prefix in ((torchvision.models, ""), (torchvision.models.video, "video.")):
        for name in torchvision.models.list_models(module=module):
            builder = torchvision.models.get_model_builder(name)
            found[prefix + builder.__module__.split(".")[-1]].append(name)
    return found


def torchvision_subject(family: str) -> Subject:
    def create(model: str, **options: Any) -> nn.Module:
        if model in ("googlenet", "inception_v3"):
            options["init_weights"] = False  # minutes of scipy otherwise
        return torchvision.models.get_model(model, weights=None, **options)

    name = smallest(torchvision_modules()[family], create)
    trouble: Exception | None = None
    video = family.startswith("video.")
    for side in (*SIDES, 224, 299):
        shape = (3, 16, side, side) if video else (3, side, side)
        of_size = {"spatial_size": (side, side)} if video else {"image_size": side}
        for options in (of_size, {}):
            found = Subject(name, partial(create, name, **options), shape, input_of_last_head)
            try:
                run_bare(found)
            except Exception as error:  # whatever a size that it was not made for raises
                trouble = error
            else:
                return found
    raise BareForwardError(first_line(trouble))


def input_of_last_head(net: nn.Module, images: Tensor) -> Tensor:
    """What the last Linear or convolution that runs is given."""
    seen: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for module in net.modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    ]
    net(images)
    for handle in handles:
        handle.remove()
    return over_positions(seen[-1])


# transformers: small configurations of its vision models ------------------------------------------

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT |= {"intermediate_size": 64, "image_size": 64, "patch_size": 8}
STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1]}
FOUR = {"hidden_sizes": [16, 16, 32, 32], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}
NECK = {"neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 64], "hidden_sizes": [16, 24, 32]}
WINDOWS = {"patch_size": 4, "embed_dim": 16, "num_heads": [1, 2], "depths": [1, 1]}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "ViT": VIT,
    "DeiT": VIT,
    "Dinov2": VIT | {"mlp_ratio": 2},
    "Dinov2WithRegisters": VIT | {"mlp_ratio": 2},
    "Swin": WINDOWS | {"image_size": 64, "window_size": 4},
    "Swinv2": WINDOWS | {"image_size": 64, "window_size": 4},
    "ConvNext": STAGES | {"num_stages": 2},
    "ConvNextV2": STAGES | {"num_stages": 2},
    "Beit": VIT,
    "ResNet": STAGES | {"embedding_size": 16, "layer_type": "basic"},
    "RegNet": STAGES | {"embedding_size": 16, "groups_width": 8},
    "MobileViT": NECK | {"num_attention_heads": 2},
    "MobileNetV2": {"depth_multiplier": 0.25},
    "TextNet": {"hidden_sizes": [16, 16, 16, 32, 32], "stem_out_channels": 16},
    "Bit": STAGES | {"embedding_size": 16, "num_groups": 4},
    "FocalNet": {"image_size": 64, "embed_dim": 16, "depths": [1, 1]},
    "Levit": {
        "image_size": 64,
        "hidden_sizes": [16, 32, 48],
        "num_attention_heads": [1, 2, 3],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
    },
    "Hiera": {"image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 1, 1]},
    "ViTMSN": VIT,
    "Pvt": FOUR | {"image_size": 64},
    "PvtV2": FOUR | {"image_size": 64},
    "Segformer": FOUR | {"decoder_hidden_size": 16},
    "PoolFormer": {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
    "SwiftFormer": {"embed_dims": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
    "CLIP": {"vision_config": VIT},
    "Siglip": {"vision_config": VIT},
}


def transformers_subject(family: str) -> Subject:
    config = getattr(transformers, f"{family}Config")(num_labels=3, **TRANSFORMERS[family])
    two_towers = "vision_config" in TRANSFORMERS[family]
    name = f"{family}VisionModel" if two_towers else f"{family}Model"
    base = getattr(transformers, name)
    classifier = getattr(transformers, f"{family}ForImageClassification")

    def as_classified(net: nn.Module, images: Tensor) -> Tensor:
        """What the classification model's classifier is given, on the same weights."""
        classifies = classifier(config).eval()
        inner = classifies.vision_model if two_towers else classifies.base_model
        # Not copies of the weights but they themselves, so that a gradient finds its way to them.
        lost = inner.load_state_dict(net.state_dict(keep_vars=True), strict=False, assign=True)
        if any(
            not key.startswith("pooler.") for key in (*lost.missing_keys, *lost.unexpected_keys)
        ):
            raise RuntimeError(f"{family}: the classification model has other weights, {lost}")
        return input_of_last_head(classifies, images)

    found = Subject(
        name, lambda: base(config.vision_config if two_towers else config), (3, 64, 64),
        as_classified,
    )  # fmt: skip
    try:
        run_bare(found)
    except Exception as error:
        raise BareForwardError(first_line(error)) from error
    return found


# networks that one writes oneself -----------------------------------------------------------------


def block(convolution: type[nn.Module], norm: type[nn.Module], i: int, o: int) -> list[nn.Module]:
    return [convolution(i, o, 3, stride=2, padding=1), norm(o), nn.ReLU(inplace=True)]


def audio() -> nn.Sequential:
    layers = [*block(nn.Conv1d, nn.BatchNorm1d, 1, 16), *block(nn.Conv1d, nn.BatchNorm1d, 16, 32)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 10))


def sequential() -> nn.Sequential:
    layers = [*block(nn.Conv2d, nn.BatchNorm2d, 3, 16), *block(nn.Conv2d, nn.BatchNorm2d, 16, 32)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


OTHER = {"audio CNN": (audio, (1, 4000)), "nn.Sequential": (sequential, (3, 64, 64))}


def other_subject(name: str) -> Subject:
    make, shape = OTHER[name]
    return Subject(name, make, shape, input_of_last_head)


FAMILIES: dict[str, Callable[[], list[str]]] = {
    "timm": timm_families,
    "torchvision": torchvision_families,
    "transformers": lambda: list(TRANSFORMERS),
    "other": lambda: list(OTHER),
}
BUILDERS: dict[str, Callable[[str], Subject]] = {
    "timm": timm_subject,
    "torchvision": torchvision_subject,
    "transformers": transformers_subject,
    "other": other_subject,
}


# What they share ----------------------------------------------------------------------------------


def smallest(names: list[str], create: Callable[..., nn.Module]) -> str:
    return min(names, key=lambda name: size_of(name, create))


def size_of(name: str, create: Callable[..., nn.Module], **options: Any) -> int:
    try:
        with torch.device("meta"):
            net = create(name, **options)
    except NotImplementedError:  # it reads numbers off tensors while it is built
        net = create(name, **options)
    return sum(p.numel() for p in net.parameters())


def run_bare(found: Subject) -> None:
    """The model by itself, with a gradient in training and without one in evaluation mode."""
    net, images = found.make(), found.images(0)
    net.train()(images)
    with torch.no_grad():
        found.feature(net.eval(), images)


def over_positions(x: Tensor) -> Tensor:
    """(B, D, ...) averaged over all positions."""
    return x if x.ndim == 2 else x.flatten(2).mean(2)


def label(name: str, options: dict[str, Any]) -> str:
    return ", ".join([name, *(f"{key}={value}" for key, value in options.items())])


def first_line(error: Exception | None) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]
