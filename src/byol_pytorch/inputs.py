"""What the learner takes: the layout of images and views, and every check of what a user gave.

Checks run once, at the public boundary; what is behind it trusts them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from byol_pytorch._arguments import is_count, is_number
from byol_pytorch.augment.views import sides
from byol_pytorch.heads import Synchronised
from byol_pytorch.parallel import REPLICATED, is_sharded, world_size
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
                "a tuple or a mapping of tensors. Build them as example_input is built."
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
                f"{what} have shape {came}, an empty batch; expected at least 1 image. Leave "
                "empty batches out: if not len(images): continue."
            )
        if self.shape is None:
            return
        if x.ndim != len(self.shape):
            hint = "Shape them so, or build BYOL with an example_input of their shape."
            if x.ndim == len(self.shape) - 1:
                hint = "A single image goes in as images[None]."
            elif x.ndim == len(self.shape) + 1:
                hint = "Several images a sample go in as images.flatten(0, 1), in one batch."
            raise ValueError(f"{what} have shape {came}; expected {self._expected()}. {hint}")
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

    def check_made(self, one: Any, two: Any, images: Any) -> None:
        """Raise where the views that two augmentations made of `images` do not fit the network.

        Of views that are tuples or mappings only the structure and the dtypes are known.
        """
        for view, name in ((one, "augment_fn"), (two, "augment_fn2")):
            if self.shape is None:
                self._check_made_structure(view, name)
            else:
                self._check_made_tensor(view, name, tensors(images)[0].shape[0])
        check_alike(one, two)

    def _check_made_structure(self, view: Any, name: str) -> None:
        held = tensors(view)
        if isinstance(view, Tensor) or not held:
            raise TypeError(
                f"{name} returned a {type(view).__name__}; expected the structure of "
                "example_input, a tuple or a mapping of tensors. Return a view built as its "
                "argument is."
            )

    def _check_made_tensor(self, view: Any, name: str, count: int) -> None:
        assert self.shape is not None
        if not isinstance(view, Tensor):
            found = "None" if view is None else f"a {type(view).__name__}"
            hints = {
                "NoneType": "Let it return the view; is its return statement missing?",
                "ndarray": "End it with torch.from_numpy, and keep the batch on its device.",
                "tuple": "Each augmentation gives one view: the second comes from augment_fn2.",
                "list": "Join the images with torch.stack; the second view comes from augment_fn2.",
            }
            hint = hints.get(type(view).__name__, "Let it return a tensor.")
            raise TypeError(f"{name} returned {found}; expected a view {self._expected()}. {hint}")
        came = tuple(view.shape)
        if not (view.is_floating_point() or self.integers):
            raise TypeError(
                f"{name} returned dtype {view.dtype}; expected float, as the network should see "
                "it. End it with view.float() / 255 (or by the largest value), then normalise."
            )
        if view.ndim != len(self.shape) or (view.ndim > 1 and view.shape[1] != self.channels):
            raise ValueError(
                f"{name} returned shape {came}; expected {self._expected()}. A transform for "
                "single images (C, H, W) goes through augment.per_image; keep the channels."
            )
        if view.ndim and view.shape[0] != count:
            raise ValueError(
                f"{name} returned {view.shape[0]} views for {count} images, shape {came}; "
                "expected one view an image. Several views an image are for a loop of your own: "
                "learner(view_one, view_two)."
            )

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


def check_diagnosed(images: Any) -> None:
    """Raise ValueError where `images` are too few for figures of a batch."""
    if tensors(images)[0].shape[0] < 2:
        raise ValueError(
            "diagnostics() got 1 image, and its figures say how the images of a batch differ; "
            "expected at least 2. Give it some hundred, which make feature_std and effective_rank "
            "comparable from call to call."
        )


def check_network(net: Any) -> None:
    """Raise TypeError, ValueError or RuntimeError unless `net` is a bare, trainable module."""
    if not isinstance(net, nn.Module):
        raise TypeError(
            f"net is a {type(net).__name__}; expected a torch.nn.Module, such as "
            'timm.create_model("resnet50") (the model, not its name or class).'
        )
    if isinstance(net, REPLICATED) or is_sharded(net):
        raise TypeError(
            f"net is already a {type(net).__name__}; expected the bare network. Build BYOL first, "
            "then wrap the learner: DDP(learner) or fully_shard(learner)."
        )
    if not any(p.is_floating_point() for p in net.parameters()):
        raise ValueError(
            f"net ({type(net).__name__}) has no floating-point parameters; expected a network "
            "with weights to train."
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "BYOL was called under torch.inference_mode(), where no layer that is made can train. "
            "Build it outside of it."
        )
    scripted = [name for name, m in net.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise TypeError(
            f"net is TorchScript{f' in its layer {scripted[0]!r}' if scripted[0] else ''}, whose "
            "layers cannot be observed; expected the plain nn.Module. Train that with BYOL, then "
            "torch.jit.script(net)."
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
    return sides(image_size)


def check_example(example: Any) -> None:
    """Raise TypeError for an example_input without tensors, ValueError for one without a batch."""
    if example is None:
        return
    held = tensors(example)
    if not held:
        raise TypeError(
            f"example_input is a {type(example).__name__} without tensors; expected a tensor, or "
            "a flat tuple or mapping of tensors, batch first. Convert arrays by torch.from_numpy."
        )
    if any(x.ndim == 0 or x.shape[0] == 0 for x in held):
        shapes = ", ".join(str(tuple(x.shape)) for x in held)
        raise ValueError(
            f"example_input has shape {shapes}; expected at least 1 sample in axis 0 of each "
            "tensor. Put a batch axis in front: x[None]."
        )


def check_decay(decay: Any, total_steps: Any) -> None:
    """Raise ValueError unless the decay is in [0, 1] and total_steps None or at least 1."""
    if not is_number(decay) or not 0 <= decay <= 1:
        raise ValueError(
            f"moving_average_decay={decay!r}; expected a number in [0, 1], for example 0.996."
        )
    if total_steps is not None and not is_count(total_steps):
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


def for_network(inputs: Any, dtype: torch.dtype) -> Any:
    """`inputs` in the network's `dtype`; under autocast as they are, for it casts by itself.

    All but float64, which autocast leaves alone, so that it would meet float32 weights.
    """
    held = tensors(inputs)
    casts = torch.is_autocast_enabled(held[0].device.type)
    if casts and not any(x.dtype == torch.float64 for x in held):
        return inputs
    return as_dtype(inputs, dtype)


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


def range_warning(images: Any, clipped: bool) -> str | None:
    """What is wrong with the range of float images, by one look at it that waits for the device.

    `clipped` says that the default views, which clip to [0, 1], will see them; without those
    normalised images are as welcome as others. Half a range on either side is let pass: a bicubic
    resize reaches from -0.45 to 1.45 at the most.
    """
    low, high = (float(x) for x in torch.stack(torch.aminmax(images.detach())).tolist())
    came = f"The images are floats from {low:.4g} to {high:.4g}; expected [0, 1]."
    if low < -0.5:
        return (
            f"{came} They look normalised already, but the default views normalise by themselves, "
            "and clip to [0, 1] before it. Leave the normalisation out of the data set (mean= and "
            "std= set that of the views); or make the views yourself, by augment_fn or "
            "learner(view_one, view_two), with representation(images, normalise=False)."
            if clipped
            else None
        )
    if high > 1.5:
        return (
            f"{came} Divide them by 255 (or by the largest value of your data), or pass 8-bit "
            "images as uint8."
        )
    return None


def has_range(images: Any) -> bool:
    """Whether the range of `images` can be known: of one float tensor with values to read.

    Of tuples and mappings nothing is known: what stands beside the images has its own range.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point() or not images.numel():
        return False
    if isinstance(images, FakeTensor):
        return False
    # To wait for the device would break the graph that is being captured.
    return not (images.is_cuda and torch.cuda.is_current_stream_capturing())
