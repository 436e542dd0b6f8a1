"""What the learner takes: the layout of images and views, and every check of what a user gave.

Checks run once, at the public boundary; what is behind it trusts them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from byol_pytorch import _view_checks
from byol_pytorch.heads import Synchronised, world_size
from byol_pytorch.probe import tensors


@dataclass(frozen=True)
class Layout:
    """The axes that inputs must have: those of the probe that the network was seen to take."""

    shape: tuple[int, ...] | None  # of the one tensor; None for tuples and mappings
    size: tuple[int, int] | None  # of a ready view
    integers: bool  # the network takes integers, so any integer dtype passes

    @classmethod
    def of(cls, probe: Any, size: tuple[int, int] | None, given: bool) -> "Layout":
        """Of the probe; `given` says that it is the user's example_input."""
        one = isinstance(probe, Tensor)
        integers = given and any(not x.is_floating_point() for x in tensors(probe))
        return cls(tuple(probe.shape) if one else None, size, integers)

    @property
    def channels(self) -> int | None:
        return self.shape[1] if self.shape is not None and len(self.shape) > 1 else None

    def check(self, images: Any, what: str, finite: bool) -> None:
        """Raise TypeError or ValueError where `images` are not such as the network takes."""
        if self.shape is not None and not isinstance(images, Tensor):
            raise TypeError(
                f"{what} are a {type(images).__name__}; expected a tensor {self._expected()}. "
                "Stack them with torch.stack."
            )
        if self.shape is None and (isinstance(images, Tensor) or not tensors(images)):
            raise TypeError(
                f"{what} are a {type(images).__name__}; expected the structure of example_input, "
                "a tuple or a mapping of tensors."
            )
        for x in tensors(images):
            self._check_tensor(x, what)
            if finite and x.is_floating_point() and not bool(torch.isfinite(x).all()):
                raise ValueError(
                    f"{what} hold NaN or infinite values; expected finite ones. Find the files "
                    "they come from, or torch.nan_to_num(images)."
                )

    def _check_tensor(self, x: Tensor, what: str) -> None:
        came = tuple(x.shape)
        if x.dtype != torch.uint8 and not x.is_floating_point() and not self.integers:
            raise TypeError(
                f"{what} have dtype {x.dtype}; expected uint8 in [0, 255] or float in [0, 1]. "
                "Scale them: images = images.float() / 255 (or by the largest value of your data)."
            )
        if x.ndim and x.shape[0] == 0:
            raise ValueError(
                f"{what} have shape {came}, an empty batch; expected at least 1 image."
            )
        if self.shape is None:
            return
        if x.ndim != len(self.shape):
            hint = (
                " A single image goes in as images[None]." if x.ndim == len(self.shape) - 1 else ""
            )
            raise ValueError(f"{what} have shape {came}; expected {self._expected()}.{hint}")
        if x.ndim > 1 and x.shape[1] != self.channels:
            last = x.ndim == 4 and x.shape[-1] == self.channels
            hint = (
                "Put the channels first: images.permute(0, 3, 1, 2)."
                if last
                else "Build BYOL on a network with as many input channels, or give example_input."
            )
            raise ValueError(
                f"{what} have shape {came}, {x.shape[1]} channels in axis 1; the network takes "
                f"{self.channels}: expected {self._expected()}. {hint}"
            )

    def check_views(self, one: Any, two: Any, finite: bool) -> None:
        """Raise where ready views are not two alike float tensors of the learner's size."""
        for view in (one, two):
            self.check(view, "The views", finite)
            for x in tensors(view):
                if x.dtype == torch.uint8 and not self.integers:
                    raise TypeError(
                        "The views have dtype torch.uint8; ready views are float, as the network "
                        "should see them. Scale them (view.float() / 255, then normalise), or call "
                        "learner(images) to have views made."
                    )
                if self.size is not None and x.ndim == 4 and tuple(x.shape[2:]) != self.size:
                    raise ValueError(
                        f"The views are {tuple(x.shape[2:])} pixels, this learner was built for "
                        f"image_size={self.size}. Resize them, or build BYOL with their size."
                    )
        check_alike(one, two)

    def _expected(self) -> str:
        assert self.shape is not None
        names = ("B", str(self.channels), "H", "W")
        if len(self.shape) == 4:
            return f"({', '.join(names)})"
        return "(" + ", ".join(["B", *map(str, self.shape[1:])]) + "), as example_input"


def check_alike(one: Any, two: Any) -> None:
    """Raise ValueError unless both views have the same shapes."""
    shapes = [[tuple(x.shape) for x in tensors(v)] for v in (one, two)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"The two views have different shapes, {shapes[0]} and {shapes[1]}; expected the same. "
            "Make both augmentations give one size."
        )


def check_batch(view: Any, heads: tuple[nn.Module, ...]) -> None:
    """Raise ValueError where training heads would normalise over a single image."""
    if tensors(view)[0].shape[0] > 1:
        return
    norms = [m for h in heads for m in h.modules() if isinstance(m, nn.BatchNorm1d) and m.training]
    if any(not (isinstance(m, Synchronised) and m.synchronises()) for m in norms):
        raise ValueError(
            "The batch holds 1 image, and the heads' batch normalisation needs at least 2 in "
            "training (over all processes where it is synchronised; "
            f"{world_size()} process(es) now). Give larger batches (DataLoader(drop_last=True)), "
            "or call learner.eval() for embeddings."
        )


def check_network(net: Any) -> None:
    """Raise TypeError or ValueError unless `net` is a bare, trainable module."""
    if not isinstance(net, nn.Module):
        raise TypeError(
            f"net is a {type(net).__name__}; expected a torch.nn.Module, such as "
            'timm.create_model("resnet50") (the model, not its name or class).'
        )
    if isinstance(net, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or hasattr(
        net, "unshard"
    ):
        raise TypeError(
            f"net is already a {type(net).__name__}; expected the bare network. Build BYOL first, "
            "then wrap the learner: DDP(learner) or fully_shard(learner)."
        )
    if not any(p.is_floating_point() for p in net.parameters()):
        raise ValueError(
            f"net ({type(net).__name__}) has no floating-point parameters; expected a network "
            "with weights to train."
        )
    quantised = [type(module).__name__ for module in net.modules() if _quantises(module)]
    if quantised:
        raise TypeError(
            f"net is quantised or prepared for it: it holds {len(quantised)} modules such as a "
            f"{quantised[0]}; expected the plain float network. Train it with BYOL first, then "
            "prepare and quantise net."
        )


def _quantises(module: nn.Module) -> bool:
    # By name: torchao, whose classes are meant too, need not be there.
    return any(
        base.__name__.startswith("FakeQuantize")
        or base.__name__ in ("ObserverBase", "WeightedQuantizedModule")
        for base in type(module).__mro__
    )


def check_image_size(image_size: Any, example_input: Any) -> tuple[int, int] | None:
    """(height, width) of a valid image_size; None where example_input stands for it."""
    if image_size is None and example_input is not None:
        return None
    return _view_checks.size(image_size)


def check_decay(decay: float, total_steps: int | None) -> None:
    """Raise ValueError unless the decay is in [0, 1] and total_steps None or at least 1."""
    if not isinstance(decay, (int, float)) or not 0 <= decay <= 1:
        raise ValueError(
            f"moving_average_decay={decay!r}; expected a number in [0, 1], for example 0.996."
        )
    if total_steps is not None and (
        isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1
    ):
        raise ValueError(
            f"total_steps={total_steps!r}; expected the number of optimizer steps of the whole "
            "run, at least 1, or None for a constant decay."
        )


def scaled(images: Any) -> Any:
    """uint8 to float32 in [0, 1]; everything else as it is."""
    if isinstance(images, Tensor):
        return images.float() / 255 if images.dtype == torch.uint8 else images
    if isinstance(images, Mapping):
        return {key: scaled(x) for key, x in images.items()}
    return tuple(map(scaled, images)) if isinstance(images, (tuple, list)) else images


def as_dtype(inputs: Any, dtype: torch.dtype) -> Any:
    """The floating-point tensors of `inputs` in `dtype`."""
    if isinstance(inputs, Tensor):
        return inputs.to(dtype) if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping):
        return {key: as_dtype(x, dtype) for key, x in inputs.items()}
    return (
        tuple(as_dtype(x, dtype) for x in inputs) if isinstance(inputs, (tuple, list)) else inputs
    )


def concatenated(one: Any, two: Any) -> Any:
    """Both views as one batch."""
    if isinstance(one, Tensor):
        return torch.cat((one, two))
    if isinstance(one, Mapping):
        return {key: concatenated(x, two[key]) for key, x in one.items()}
    return tuple(concatenated(x, y) for x, y in zip(one, two, strict=True))


def looks_unscaled(images: Any) -> bool:
    """Whether float images on a CPU reach beyond 2, as those in [0, 255] do.

    Of tuples and mappings nothing is known: what stands beside the images has its own range.
    """
    return (
        isinstance(images, Tensor)
        and images.is_floating_point()
        and images.device.type == "cpu"
        and images.numel() > 0
        and float(images.max()) > 2
    )
