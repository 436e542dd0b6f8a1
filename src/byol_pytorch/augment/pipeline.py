"""The container of a view's stages: kornia's ImageSequential at the speed of a training step."""

import warnings
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import kornia
import kornia.augmentation as K
import torch
from kornia.augmentation.base import _BasicAugmentationBase
from kornia.augmentation.container.image import _get_new_batch_shape
from kornia.augmentation.container.ops import InputSequentialOps
from kornia.augmentation.container.params import ParamItem
from torch import Tensor, nn

from byol_pytorch.augment import stages as ours
from byol_pytorch.augment.stages import eager_on_cpu, to_unit

SHARED = ("order", "forward_input_shape", "data_keys")  # draws that are not one an image

# So many values are computed at a time: on a CPU what stays in the cache, elsewhere what bounds the
# memory of an eager pass.
CHUNK = {"cpu": 2**18}
CHUNK_ELSEWHERE = 2**26

# What these do to an image is their apply_transform alone, which needs no matrix of the geometry
# and may be called for some images of a batch. All others are called on the whole, as by kornia.
DIRECT = (
    ours.RandomResizedCrop, K.RandomHorizontalFlip, K.RandomVerticalFlip, ours.RandomRotation90,
    ours.ColorJitter, K.RandomGrayscale, ours.RandomGaussianBlur, ours.RandomSolarize, K.Normalize,
)  # fmt: skip


class ViewSequential(K.ImageSequential):
    """One view distribution: images (B, C, H, W), uint8 in [0, 255] or float (clipped to [0, 1]),
    become views in `dtype`, without gradient, in float32 also under autocast.

    A kornia pipeline. `view(images, params=view._params)` replays the last draws, `view.take` cuts
    them, `view.forward_parameters(shape)` draws without images; stages can be swapped, inserted and
    deleted by their place. All draws are made on the images' device from torch's global random
    state, and no value is read back from it; compiled and eager draws differ for one seed.

    An eager CPU computes only the images that drew a stage; elsewhere, and under a compiler, all
    are computed and selected from, so that no shape depends on a draw.

    Args:
        stages: kornia augmentations, containers, or any module on (B, C, H, W). Where a stage has
            an attribute `rgb_only` that is true, it is left out for other channel counts than 3.
        image_size: (height, width) that the views must have; None: any.
        dtype, channels_last: of the views.
        compile: whether torch.compile fuses the stages at the first call; None: on CUDA only. It
            makes a graph for the first batch size and one for all others. Where it fails, the view
            goes on without, after one warning.
    """

    def __init__(
        self,
        *stages: nn.Module,
        image_size: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        compile: bool | None = None,
    ) -> None:
        super().__init__(*stages, disable_sequential_features=True)
        self.image_size, self.dtype, self.compiles = image_size, dtype, compile
        self.channels_last = channels_last
        self._compiled: Any = None

    def forward(
        self, input: Tensor, params: list[ParamItem] | None = None, extra_args: Any = None
    ) -> Tensor:
        """The views of a batch, with new draws or with `params`."""
        check_images(input)
        self._follow(input.device)
        with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
            view, self._params = self._fastest(input)(input, params, extra_args)
        if self.image_size not in (None, tuple(view.shape[2:])):
            raise ValueError(
                f"The views came out as {tuple(view.shape[2:])} pixels, expected image_size="
                f"{self.image_size}. Resize the images, or crop them in the view with crop=True."
            )
        return view

    def forward_parameters(self, batch_shape: Sequence[int]) -> list[ParamItem]:
        """The draws for images of `batch_shape`, an entry a stage, on the device of the stages."""
        params = []
        shape = torch.Size(batch_shape)
        for name, stage in self.get_forward_sequence():
            draw: Any = getattr(stage, "forward_parameters", lambda shape: None)
            draws = draw(shape)
            if isinstance(draws, dict) and torch.compiler.is_compiling():
                del draws["forward_input_shape"]  # a kernel on the CPU for each number of it
            params.append(ParamItem(name, draws))
            if isinstance(stage, ours.RandomResizedCrop):  # kornia would read its size back
                shape = torch.Size((*shape[:-2], *stage.flags["size"]))
            else:
                shape = _get_new_batch_shape(params[-1], shape, stage)
        return params

    def take(self, params: list[ParamItem], rows: slice | Tensor) -> list[ParamItem]:
        """The draws of some images of a batch: those of a slice, or with the numbers `rows`.

        So the draws of a global batch are made once and cut for each process, and views do not
        depend on how many there are:

            with torch.random.fork_rng():
                torch.manual_seed(step)
                params = view.forward_parameters((256, 3, 224, 224))
            view(images, params=view.take(params, slice(first, first + len(images))))
        """
        for item in params:
            stage = self._stage(item.name)
            names = item.data if isinstance(item.data, dict) else ()
            mixes = isinstance(stage, K.MixAugmentationBaseV2 | K.PatchSequential)
            if mixes or "batch_idx" in names or "idx" in names:
                raise ValueError(
                    f"The draws of {item.name} name images of their batch, and cannot be cut. "
                    "Put the stage behind the view, on the parts of the batch."
                )
        return [ParamItem(item.name, _take(item.data, rows)) for item in params]

    def transform_inputs(
        self, input: Tensor, params: list[ParamItem], extra_args: Any = None
    ) -> Tensor:
        """The images through the stages with the draws `params`."""
        steps = [self._drawn(item, len(input)) for item in params]
        if input.shape[1] != 3:
            steps = [step for step in steps if not getattr(step.stage, "rgb_only", False)]
        if not steps or type(steps[0].stage) is not ours.RandomResizedCrop:
            input = to_unit(input)
        groups = groupby(steps, key=lambda step: _is_direct(step.stage, extra_args))
        for direct, group in [(direct, list(group)) for direct, group in groups]:
            if direct:
                last = group[-1] is steps[-1]
                input = self._in_chunks(input, group, self.dtype if last else torch.float32)
            else:
                input = _by_kornia(input, group, extra_args)
        return input.to(self.dtype, memory_format=self._format())

    def _format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def _in_chunks(self, images: Tensor, steps: list["Drawn"], dtype: torch.dtype) -> Tensor:
        """Direct stages on so many images at a time as stay in the cache."""
        height, width = self.image_size or images.shape[2:]
        values = CHUNK.get(images.device.type, CHUNK_ELSEWHERE)
        count = max(1, values // (images.shape[1] * height * width))
        if count >= len(images) or torch.compiler.is_compiling():
            return _run(images, steps, slice(0, len(images)))
        view: Any = None
        for start in range(0, len(images), count):
            rows = slice(start, start + count)
            some = _run(images[rows], steps, rows)
            if view is None:
                shape, where = (len(images), *some.shape[1:]), some.device
                view = torch.empty(shape, dtype=dtype, device=where, memory_format=self._format())
            view[rows] = some
        return view

    def statistics(self, channels: int) -> tuple[Tensor, Tensor] | None:
        """Mean and std, one value a channel, that the Normalize stages (kornia.augmentation's and
        kornia.enhance's) take from the views and divide them by; None without one. Raises
        ValueError for another channel count."""
        found: tuple[Tensor, Tensor] | None = None
        for stage in self.modules():
            if not isinstance(stage, K.Normalize | kornia.enhance.Normalize):
                continue
            if channels != 3 and getattr(stage, "rgb_only", False):
                continue
            held: Any = (
                stage.flags if isinstance(stage, K.Normalize) else dict(stage.named_buffers())
            )
            values = {name: held[name].detach().flatten() for name in ("mean", "std")}
            mean, std = values.values()
            if {len(mean), len(std)} != {channels}:
                raise ValueError(
                    f"mean and std have {max(len(mean), len(std))} values, the images have "
                    f"{channels} channels; expected one value a channel. Give as many, or None "
                    "for both."
                )
            found = (mean, std) if found is None else (found[0] + found[1] * mean, found[1] * std)
        return found

    def normalise(self, images: Tensor) -> Tensor:
        """Images of any size as the views are, but not augmented: float32, clipped to [0, 1] and
        normalised by the Normalize stages."""
        check_images(images)
        self._follow(images.device)
        with torch.autocast(images.device.type, enabled=False):
            statistics, images = self.statistics(images.shape[1]), to_unit(images)
            if statistics is None:
                return images
            mean, std = (x.to(images.device).view(-1, 1, 1) for x in statistics)
            return (images - mean) / std

    # nn.Sequential's ways to change a list, which kornia's names of the stages break.

    def __getitem__(self, index: Any) -> Any:
        found = list(self)[index]
        if not isinstance(index, slice):
            return found
        return ViewSequential(
            *found,
            image_size=self.image_size,
            dtype=self.dtype,
            channels_last=self.channels_last,
            compile=self.compiles,
        )

    def __setitem__(self, index: int, stage: nn.Module) -> None:
        stages = list(self)
        stages[index] = stage
        self._restack(stages)

    def __delitem__(self, index: int | slice) -> None:
        stages = list(self)
        del stages[index]
        self._restack(stages)

    def insert(self, index: int, module: nn.Module) -> "ViewSequential":
        stages = list(self)
        stages.insert(index, module)
        return self._restack(stages)

    def append(self, module: nn.Module) -> "ViewSequential":
        return self.insert(len(self), module)

    def _restack(self, stages: list[nn.Module]) -> "ViewSequential":
        self._modules = dict(K.ImageSequential(*stages)._modules)
        self._params, self._compiled = None, None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_params": None, "_compiled": None}

    def _follow(self, device: torch.device) -> None:
        """The draws and the constants on the images' device, the draws in float32: `.to(bfloat16)`
        would make kornia's as coarse."""
        for stage in self.modules():
            if not isinstance(stage, _BasicAugmentationBase):
                continue
            if stage.device != device or stage.dtype != torch.float32:
                stage.set_rng_device_and_dtype(device, torch.float32)
            if device.type == "meta":  # which would lose the values
                continue
            for held in (stage.flags, vars(stage)):
                for name in ("mean", "std", "rgb_weights"):
                    if isinstance(held.get(name), Tensor) and held[name].device != device:
                        held[name] = _on(device, held[name])

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._follow(fn(torch.zeros(())).device)
        return self

    def _stage(self, name: str) -> Any:
        if name not in self._modules:
            raise ValueError(
                f"The params hold draws of {name}, and the stages are "
                f"{', '.join(self._modules)}. Draw anew after a change of the stages."
            )
        return self._modules[name]

    def _drawn(self, item: ParamItem, count: int) -> "Drawn":
        stage = self._stage(item.name)
        drawn_for = len(item.data["batch_prob"]) if isinstance(item.data, dict) else count
        if drawn_for != count:
            raise ValueError(
                f"The params were drawn for {drawn_for} images, and {count} came. Draw for as many "
                "as come, or cut the params with view.take(params, rows)."
            )
        return Drawn(stage, item.data)

    def _fastest(self, input: Tensor) -> Any:
        wanted = input.device.type == "cuda" if self.compiles is None else self.compiles
        if not wanted or torch.compiler.is_compiling():
            return self._draw_and_run
        if self._compiled is None:
            self._compiled = torch.compile(self._draw_and_run)
        return self._try_compiled

    def _try_compiled(self, *args: Any) -> Any:
        try:
            return self._compiled(*args)
        except Exception as error:
            result = self._draw_and_run(*args)  # raises by itself what is not the compiler's fault
            warnings.warn(
                f"The views go on uncompiled, slower on a GPU: torch.compile failed with "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}. "
                "byol_views(..., compile=False) does without from the start.",
                stacklevel=4,
            )
            self.compiles, self._compiled = False, None
            return result

    def _draw_and_run(
        self, input: Tensor, params: list[ParamItem] | None, extra_args: Any
    ) -> tuple[Tensor, list[ParamItem]]:
        params = self.forward_parameters(input.shape) if params is None else params
        return self.transform_inputs(input, params, extra_args), params


class Drawn(NamedTuple):
    """A stage and its draws."""

    stage: Any
    draws: Any


def _run(images: Tensor, steps: list[Drawn], rows: slice) -> Tensor:
    """Some images of a batch, those of `rows`, through direct stages."""
    apply = _apply_to_drawn if eager_on_cpu(images) else _apply_to_all
    for step in steps:
        images = apply(images, step, rows)
    return images


def _apply_to_drawn(images: Tensor, step: Drawn, rows: slice) -> Tensor:
    """On a CPU: the stage computed for the images that drew it."""
    stage, draws = step
    chosen = list(range(len(images)))
    if not _always(stage):
        gate = draws["batch_prob"][rows].tolist()
        chosen = [row for row, drawn in enumerate(gate) if drawn > 0.5]
    if not chosen:
        return images
    if len(chosen) == len(images):
        changed: Tensor = stage.apply_transform(images, _take(draws, rows), stage.flags)
        return changed
    at = torch.tensor(chosen)
    some = images.index_select(0, at)
    changed = stage.apply_transform(some, _take(draws, at + rows.start), stage.flags)
    return images.index_copy_(0, at, changed)


def _apply_to_all(images: Tensor, step: Drawn, rows: slice) -> Tensor:
    """On a GPU or under a compiler: the stage computed for all images, and selected from."""
    stage, draws = step.stage, _take(step.draws, rows)
    changed: Tensor = stage.apply_transform(images, draws, stage.flags)
    if _always(stage) or type(stage) is ours.ColorJitter:  # which selects as it goes
        return changed
    gate = draws["batch_prob"].to(images.device).view(-1, 1, 1, 1) > 0.5
    return torch.where(gate, changed, images)


def _by_kornia(images: Tensor, steps: Iterable[Drawn], extra_args: Any) -> Tensor:
    """Any other stages, as kornia calls them: on the whole batch."""
    for stage, draws in steps:
        images = InputSequentialOps.transform(images, stage, ParamItem("", draws), extra_args)
    return images.clone()  # it may be memory that a stage keeps, and what follows writes to it


def _is_direct(stage: Any, extra_args: Any) -> bool:
    hooked = stage._forward_hooks or stage._forward_pre_hooks
    return type(stage) in DIRECT and not hooked and not extra_args


def _always(stage: Any) -> bool:
    # As kornia: a gate is not looked at where nothing is left to chance.
    return bool(stage.p == 1 and stage.p_batch == 1)


def _on(device: torch.device, values: Tensor) -> Tensor:
    if values.device.type != "cpu" or values.ndim != 1 or torch.compiler.is_compiling():
        return values.to(device)
    # Filled in there: a copy from the CPU waits for the device.
    each = [torch.full((), v, dtype=values.dtype, device=device) for v in values.tolist()]
    return torch.stack(each)


def _take(draws: Any, rows: slice | Tensor) -> Any:
    if isinstance(draws, list):  # of a container
        return [ParamItem(item.name, _take(item.data, rows)) for item in draws]
    if draws is None:
        return None
    return {
        name: value if name in SHARED or len(value) == 1 else value[rows]
        for name, value in draws.items()
    }


def check_images(images: Any) -> None:
    """Raise ValueError unless `images` are (B, C, H, W), uint8 or float."""
    if not isinstance(images, Tensor) or images.ndim != 4:
        came = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"images came as {came}. Expected a tensor (B, C, H, W); "
            "stack single images with torch.stack, or add the batch axis with images[None]."
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(
            f"images came as {images.dtype}. Expected uint8 in [0, 255] or float in [0, 1]; "
            "scale others to float, for 16 bits: images = images.float() / 65535."
        )
