"""What networks take: a tensor, or a tuple or mapping of some; how it is walked, and its layout.

The checks of a network, of its heads and of the views' size live with those.
"""

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor


def tensors(inputs: Any) -> list[Tensor]:
    """The tensors of an input or output that is one, or a flat tuple, list or mapping of some."""
    if isinstance(inputs, Tensor):
        return [inputs]
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    held = isinstance(inputs, (Mapping, tuple, list))
    return [x for x in values if isinstance(x, Tensor)] if held else []


def map_tensors(function: Callable[..., Any], *inputs: Any) -> Any:
    """What `function` makes of each tensor of an input, in the structure of the input.

    An input is a tensor, or a tuple, list or mapping of inputs; what else is in it stays. Of
    several inputs of one structure `function` takes a tensor each. Gives tuples and dicts.
    """
    first = inputs[0]
    if isinstance(first, Tensor):
        return function(*inputs)
    if isinstance(first, Mapping):
        return {key: map_tensors(function, *[x[key] for x in inputs]) for key in first}
    if isinstance(first, (tuple, list)):
        return tuple([map_tensors(function, *parts) for parts in zip(*inputs, strict=True)])
    return first


def call(net: nn.Module, inputs: Any) -> Any:
    """net(tensor), net(*tuple) or net(**mapping)."""
    if isinstance(inputs, Mapping):
        return net(**inputs)
    return net(*inputs) if isinstance(inputs, (tuple, list)) else net(inputs)


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a layer works on: its first argument, or what a keyword call has in its place."""
    if args or "input" in kwargs:
        return args[0] if args else kwargs["input"]
    return next(iter(tensors(kwargs)), None)


def fresh(inputs: Any) -> Any:
    """`inputs` with copies of its tensors, for a network that works on them in place."""
    return map_tensors(torch.clone, inputs)


def copied(value: Any) -> Any:
    """A copy of what a layer gave, containers and tensors: a later layer may work in place."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, MutableMapping):
        twin = copy.copy(value)  # a ModelOutput stays one
        for key, part in value.items():
            twin[key] = copied(part)
        return twin
    if isinstance(value, (tuple, list)):
        parts = [copied(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def scaled(images: Any) -> Any:
    """uint8 to float32 in [0, 1]; everything else as it is."""
    return map_tensors(lambda x: x.float() / 255 if x.dtype == torch.uint8 else x, images)


def for_network(inputs: Any, dtype: torch.dtype) -> Any:
    """`inputs` in the network's `dtype`; under autocast as they are, for it casts by itself.

    All but float64, which autocast leaves alone, so that it would meet float32 weights.
    """
    held = tensors(inputs)
    casts = torch.is_autocast_enabled(held[0].device.type)
    if casts and not any(x.dtype == torch.float64 for x in held):
        return inputs
    return map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)


@dataclass(frozen=True)
class Layout:
    """The axes that inputs must have: those of the probe that the network was seen to take."""

    shape: tuple[int, ...] | None  # of the one tensor; None for tuples and mappings
    size: tuple[int, int] | None  # of a ready view
    integers: bool  # the network takes integers, so any integer dtype passes

    @classmethod
    def of(cls, probe: Any, size: tuple[int, int] | None, given: bool) -> "Layout":
        """The layout of the probe; `given` says that it is the user's example_input."""
        one = isinstance(probe, Tensor)
        integers = given and any(not x.is_floating_point() for x in tensors(probe))
        return cls(tuple(probe.shape) if one else None, size, integers)

    @property
    def channels(self) -> int | None:
        return self.shape[1] if self.shape is not None and len(self.shape) > 1 else None

    def check(self, images: Any, what: str, finite: bool) -> None:
        """Raise TypeError or ValueError where `images` are not such as the network takes."""
        if isinstance(images, Tensor) != (self.shape is not None) or not tensors(images):
            expected = (
                "the structure of example_input, a tuple or a mapping of tensors. Build them as "
                "example_input is built."
                if self.shape is None
                else f"a tensor {self._expected()}. Stack them with torch.stack."
            )
            raise TypeError(f"{what} are a {type(images).__name__}; expected {expected}")
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

    def check_views(self, views: Sequence[Any], finite: bool, local: bool = False) -> None:
        """Raise where ready views are not alike float tensors of the learner's size."""
        what, size_name = ("local views", "local_size") if local else ("views", "image_size")
        for view in views:
            self.check(view, f"The {what}", finite)
            for x in tensors(view):
                if x.dtype == torch.uint8 and not self.integers:
                    raise TypeError(
                        f"The {what} have dtype torch.uint8; ready views are float, as the network "
                        "should see them. Scale them (view.float() / 255, then normalise), or call "
                        "learner(images) to have views made."
                    )
                if self.size is not None and x.ndim == 4 and tuple(x.shape[2:]) != self.size:
                    raise ValueError(
                        f"The {what} are {tuple(x.shape[2:])} pixels, this learner was built for "
                        f"{size_name}={self.size}. Resize them, or build BYOL with their size."
                    )
        check_alike(*views)

    def check_made(self, views: Sequence[Any], images: Any) -> None:
        """Raise where the views that augmentations made of `images` do not fit the network.

        The first two are augment_fn's and augment_fn2's, what follows local_augment_fn's. Of views
        that are tuples or mappings only the structure and the dtypes are known.
        """
        names = ("augment_fn", "augment_fn2", *["local_augment_fn"] * (len(views) - 2))
        for view, name in zip(views, names, strict=True):
            if self.shape is not None:
                self._check_made_tensor(view, name, tensors(images)[0].shape[0])
            elif isinstance(view, Tensor) or not tensors(view):
                raise TypeError(
                    f"{name} returned a {type(view).__name__}; expected the structure of "
                    "example_input, a tuple or a mapping of tensors. Return a view built as its "
                    "argument is."
                )
        check_alike(*views[:2])
        check_alike(*views[2:])

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


def check_alike(*views: Any) -> None:
    """Raise ValueError unless all views have the same shapes."""
    shapes = [[tuple(x.shape) for x in tensors(view)] for view in views]
    for other in shapes[1:]:
        if other != shapes[0]:
            raise ValueError(
                f"The two views have different shapes, {shapes[0]} and {other}; expected the same. "
                "Make both augmentations give one size."
            )


def check_local_count(views: Sequence[Any], count: int) -> None:
    """Raise ValueError unless the ready views are two and `count` local ones."""
    two = views[1] is not None
    if len(views) != 2 + count or not two:
        raise ValueError(
            f"{len(views) - 2} local views came{'' if two else ' without a second ready view'}; "
            f"this learner was built for local_views={count}. Call learner(images), or "
            "learner(view_one, view_two, local_views=[...]) with as many."
        )


def check_same_batch(view: Any, local: Any) -> None:
    """Raise ValueError unless both are of as many images."""
    counts = [tensors(x)[0].shape[0] for x in (view, local)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"The local views are of {counts[1]} images, the two views of {counts[0]}; expected "
            "views of the same images. Cut all from one batch."
        )


def range_warning(images: Any, clipped: bool) -> str | None:
    """What is wrong with the range of float images, by one look at it that waits for the device.

    `clipped` says that the default views, which clip to [0, 1], will see them; without those
    normalised images are as welcome as others. Half a range on either side is let pass: a bicubic
    resize reaches from -0.45 to 1.45 at the most.
    """
    low, high = (float(x) for x in torch.stack(torch.aminmax(images.detach())).tolist())
    came = f"The images are floats from {low:.4g} to {high:.4g}; expected [0, 1]."
    if high <= 20 and (low < -0.5 or (low < 0 and high > 1.5)):
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
