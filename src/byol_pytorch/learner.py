"""BYOL as one module: two views, an online network, its EMA target and the loss between them.

Each part (representation, heads, target, loss, views) lives in a file of its own; optimizers, data
and loops are the user's.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from byol_pytorch.arguments import check_flags, check_local, check_sizes
from byol_pytorch.augment.views import (
    GLOBAL_SCALE,
    as_view,
    both_views,
    local_sides,
    local_view,
    normalisation_of,
    sides,
)
from byol_pytorch.backbone import (
    Pool,
    Representation,
    check_gradient,
    check_other_size,
    copy_for_target,
    drawing,
    evaluating,
    locate,
    probe_inputs,
)
from byol_pytorch.diagnostics import check_diagnosed, health
from byol_pytorch.heads import check_batch, mlp, simplicial_embedding, simsiam_mlp
from byol_pytorch.inputs import (
    Layout,
    check_local_count,
    check_same_batch,
    for_network,
    has_range,
    map_tensors,
    range_warning,
    scaled,
    tensors,
)
from byol_pytorch.loss import regression_loss
from byol_pytorch.parallel import uncompiled
from byol_pytorch.target import Target, check_decay, ema_decay

Augmentation = Callable[[Any], Any]
Stats = tuple[float, ...] | Literal["auto"] | None


class BYOL(nn.Module):
    """Bootstrap Your Own Latent (arXiv 2006.07733) around any backbone.

    Args:
        net: the backbone, trained in place. Construction runs one probe through it and leaves no
            trace: modes, buffers, gradients, requires_grad and state_dict stay bit-equal, and the
            global random state moves only by what initialising the heads draws.
        image_size: side, or (height, width), of the views and of the probe in pixels. May be None
            with `example_input`.
        hidden_layer: the layer whose output is the representation: a dotted name, an index into
            net.children(), -1 for the network's own output, or "auto" for the model's own pooled
            feature: what timm's forward_head(pre_logits=True) gives, what a Hugging Face model's
            classification head is fed, the input of a torchvision model's last Linear or
            convolution; of any other network the input of its last Linear where that Linear gives
            the network's output, else the output itself.
        projection_size, projection_hidden_size: 256 and 4096 (paper, section 3.3).
        augment_fn, augment_fn2: callables from (B, C, H, W) float in [0, 1] to a view. None for the
            paper's two distributions; augment_fn2 falls back to augment_fn where that is given. A
            torchvision transform draws once for a whole batch: wrap it in augment.per_image.
        moving_average_decay: EMA decay in [0, 1]; 0.996 is the paper's for 1000 ImageNet epochs,
            0.99 for 100 to 300; about 0.97 suits runs of some hundred steps.
        use_momentum: False makes the target the online network with stop-gradient and the projector
            SimSiam's (arXiv 2011.10566): no target copy, no update_moving_average.
        sync_batchnorm: whether the heads' batch statistics span all processes. None, the default,
            and True: whenever several processes train, decided at each training forward.
        use_simplicial_embeddings, sem_*: a softmax bottleneck before the projector
            (arXiv 2204.00616). Off, because the paper has none.
        total_steps: number of EMA updates over which the decay rises by a half cosine to 1 (paper,
            section 3.2). None: it stays at its base.
        pool: how the layer's output becomes (B, D): "auto", "mean", "cls", None for as it is, or a
            callable without parameters (a layer with some belongs into the network).
        example_input: an input that the network takes (a tensor, a tuple, or a mapping of keyword
            arguments, batch first), for networks that one image tensor does not fit.
        mean, std: normalisation after the default views, one value a channel; "auto" is ImageNet's
            for three channels and none for others; None is none.
        target_dropout: keep dropout and stochastic depth in the target (off as in the paper: its
            modules that draw from torch's random generators in training are in evaluation mode; a
            function that drops in evaluation too, or draws from elsewhere, stays on).
        concatenate_views: pass both views through the networks as one batch, which shares their
            batch statistics; off as in the paper.
        local_views: number of small views of each image beside the two; 0 as in the paper, 2 in
            MULAN (arXiv 2602.05845). A predictor of their own, `local_predictor`, maps each to the
            targets of both views, and the two are then of larger crops, scale (0.25, 1).
        local_size: side, or (height, width), of the local views in pixels. None: 3/7 of
            `image_size` to the nearest multiple of 16; 96 for 224.
        local_augment_fn: what makes a local view, as `augment_fn`. None: augment.local_views,
            normalised as the default views or those of byol_views are.
        check_finite: raise on images with NaN or inf. Costs a host-device synchronisation a call.

    Raises:
        TypeError, ValueError: bad arguments, a layer that is no representation, or a network that
            does not take the probe, each with how to mend it.

    Public parts: `net`, `projector`, `predictor`, `target` (`.net` and `.projector`, None without
    momentum); `image_size` (height, width) and `normalisation` (mean, std), of the default views,
    or None. Build the optimizer after BYOL, from `learner.parameters()`, or the heads will not
    train; parameters without a gradient are skipped by every torch optimizer.
    """

    def __init__(
        self,
        net: nn.Module,
        image_size: int | tuple[int, int] | None,
        hidden_layer: str | int = "auto",
        projection_size: int = 256,
        projection_hidden_size: int = 4096,
        augment_fn: Augmentation | None = None,
        augment_fn2: Augmentation | None = None,
        moving_average_decay: float = 0.996,
        use_momentum: bool = True,
        sync_batchnorm: bool | None = None,
        use_simplicial_embeddings: bool = False,
        sem_num_simplices: int = 32,
        sem_simplex_dim: int = 8,
        sem_temperature: float = 0.1,
        *,
        total_steps: int | None = None,
        pool: str | Pool | None = "auto",
        example_input: Any = None,
        mean: Stats = "auto",
        std: Stats = "auto",
        target_dropout: bool = False,
        concatenate_views: bool = False,
        check_finite: bool = False,
        local_views: int = 0,
        local_size: int | tuple[int, int] | None = None,
        local_augment_fn: Augmentation | None = None,
    ) -> None:
        super().__init__()
        check_decay(moving_average_decay, total_steps)
        sizes = {
            "projection_size": projection_size,
            "projection_hidden_size": projection_hidden_size,
            "sem_num_simplices": sem_num_simplices,
            "sem_simplex_dim": sem_simplex_dim,
        }
        check_sizes(sizes, sem_temperature)
        flags = {
            "use_momentum": use_momentum,
            "use_simplicial_embeddings": use_simplicial_embeddings,
            "target_dropout": target_dropout,
            "concatenate_views": concatenate_views,
            "check_finite": check_finite,
        }
        check_flags(flags, sync_batchnorm)
        check_local(local_views, local_size, local_augment_fn)
        size = None if image_size is None and example_input is not None else sides(image_size)
        inputs = probe_inputs(net, size, example_input)
        found = locate(net, inputs, hidden_layer, pool)
        self.net, self.image_size = net, size
        self._representation = Representation(net, found.place)
        self._unreached = found.unreached
        self._layout = Layout.of(inputs, size, example_input is not None)
        pictures = size if len(self._layout.shape or ()) == 4 else None
        channels, crops = self._layout.channels, {"scale": GLOBAL_SCALE} if local_views else {}
        self.augment_fn, self.augment_fn2 = both_views(
            augment_fn, augment_fn2, pictures, channels, mean, std, **crops
        )
        dim, hidden = found.probe.shape[1], projection_hidden_size
        self.local_views, self.local_augment_fn = int(local_views), local_augment_fn
        if local_views:
            small = local_sides(pictures, local_size)
            if small is not None:
                check_other_size(net, self._representation, inputs, small, dim)
            self._local_layout = replace(self._layout, size=small)
            self.local_augment_fn = local_view(local_augment_fn, self.augment_fn, small, channels)

        make = mlp if use_momentum else simsiam_mlp
        width = sem_num_simplices * sem_simplex_dim if use_simplicial_embeddings else dim
        projector = make(width, projection_size, hidden, sync_batchnorm)
        if use_simplicial_embeddings:
            shape = (sem_num_simplices, sem_simplex_dim)
            embedding = simplicial_embedding(dim, *shape, sem_temperature, sync_batchnorm)
            projector = nn.Sequential(embedding, projector)
        self.projector = projector.to(found.probe)
        predictor = mlp(projection_size, projection_size, hidden, sync_batchnorm)
        self.predictor = predictor.to(found.probe)
        if local_views:
            predictor = mlp(projection_size, projection_size, hidden, sync_batchnorm)
            self.local_predictor = predictor.to(found.probe)

        self.use_momentum, self.total_steps = use_momentum, total_steps
        self.target_dropout, self.concatenate_views = target_dropout, concatenate_views
        self.check_finite = check_finite
        draws = use_momentum and not target_dropout
        self._drawing = drawing(uncompiled(net), inputs) if draws else frozenset()
        self._base_decay, self._step = float(moving_average_decay), 0
        self._range_checked = False
        self.target: Target | None = None
        self.reset_moving_average()

    def forward(
        self,
        images: Any,
        view_two: Any = None,
        return_projection: bool = True,
        *,
        return_embedding: bool = False,
        local_views: Sequence[Any] | None = None,
    ) -> Any:
        """The loss, or with `return_embedding` what the online network makes of the images.

        Args:
            images: (B, C, H, W) uint8 in [0, 255] or float in [0, 1]; with `view_two`, the first
                of two views (float, as the network should see them: nothing is added).
            view_two: the second view. A bool here is read as return_embedding.
            local_views: ready local views beside two ready views, as many as the learner has.

        Returns:
            A float32 scalar in [0, 8]: the mean over the batch of 2 - 2 cos, summed over both
            directions (paper, equations 2 and 3). Local views add twice the mean over their pairs
            with the two targets: both parts weigh the same, in [0, 16].
            With return_embedding (projection (B, P), embedding (B, D)), or the embedding alone
            without return_projection, with gradient and in the current mode, normalised as in
            training.

        Raises TypeError or ValueError for images or views that do not fit, ValueError also for a
        batch of one whose heads would take batch statistics of it. The first batch of float images
        is looked at once in the learner's life, which waits for the device: it warns of values far
        outside [0, 1], as normalised images and those in [0, 255] have. Compiled code never looks.
        """
        if isinstance(view_two, bool):
            return_embedding, view_two = view_two, None
        if return_embedding:
            embedding = self.representation(images)
            if not return_projection:
                return embedding
            check_batch(embedding, (self.projector,))
            return self.projector(embedding), embedding
        local = () if local_views is None else tuple(local_views)
        if view_two is None and not local:
            views = self.views(images)
            self._layout.check_made(views, images)
        else:
            views = (images, view_two, *local)
            self._check_ready(views)
        check_batch(views[0], (self.projector, self.predictor))
        return self._loss(*views)

    @torch.no_grad()
    def views(self, images: Any) -> tuple[Any, ...]:
        """Two augmented views of `images` as the network is to see them, and the local views
        behind those, without gradient."""
        self._check_images(images)
        augmentations = [self.augment_fn, self.augment_fn2]
        augmentations += [self.local_augment_fn] * self.local_views
        missing = [augment is None for augment in augmentations]
        if any(missing[:2]):
            raise ValueError(
                "There are no default views without image_size or for inputs other than "
                "(B, C, H, W). Give augment_fn, or call learner(view_one, view_two)."
            )
        if any(missing):
            raise ValueError(
                "There are no default local views beside an augment_fn of your own. Give "
                "local_augment_fn, or call learner(view_one, view_two, local_views=[...])."
            )
        with torch.autocast(tensors(images)[0].device.type, enabled=False):
            # byol_views take uint8 as it is; other callables are given floats in [0, 1].
            made = [
                augment(scaled(images) if as_view(augment) is None else images)
                for augment in augmentations
            ]
        return tuple(made)

    def representation(self, images: Any, normalise: bool = True) -> Tensor:
        """(B, D) of `images` without augmentation, in the current mode, with gradient.

        uint8 is scaled to [0, 1]; with `normalise` the images are then normalised as the default
        views are, so that the network sees what it was trained on. Where augment_fn was given
        nothing more is done; give normalise=False after training on ready views that were not
        normalised.
        """
        return self._embed(self._as_seen(images, normalise))

    @torch.no_grad()
    def update_moving_average(self) -> None:
        """Move the target towards the online network: once after each optimizer step.

        Every call counts as one step of the decay's schedule, before any optimizer step too (the
        target then stays where it is); with gradient accumulation call it once per optimizer
        step. Raises RuntimeError without momentum.
        """
        if self.target is None:
            raise RuntimeError(
                "With use_momentum=False there is no target to move: leave out "
                "update_moving_average()."
            )
        self.target.update(uncompiled(self.net), self.projector, self.moving_average_decay)
        self._step += 1

    @property
    def moving_average_decay(self) -> float:
        """The decay that the next update will use."""
        return ema_decay(self._base_decay, self._step, self.total_steps)

    def reset_moving_average(self) -> None:
        """Make the target a fresh copy of the online network and projector, and the step 0."""
        self._step = 0
        if self.use_momentum:
            place = self._representation.place
            with torch.inference_mode(False):  # or no later update could change the copies
                net = copy_for_target(self.net, place)
                projector = copy.deepcopy(self.projector)
                self.target = Target(
                    net,
                    projector,
                    place,
                    dropout=self.target_dropout,
                    drawing=self._drawing,
                )

    @torch.no_grad()
    def diagnostics(self, images: Any) -> dict[str, float]:
        """Health of the run on (B, C, H, W) images: no augmentation, evaluation mode, no trace.

        Returns feature_std (0 in collapse, about 1 / sqrt(projection_size) in health),
        effective_rank (RankMe of the projections, 1 to min(B, projection_size)), agreement (mean
        cosine between prediction and target projection) and ema_decay. Costs two forward passes
        and the singular values of the projections, and waits for the device.
        """
        with evaluating(self):
            seen = self._as_seen(images)
            check_diagnosed(seen)
            projection = self.projector(self._embed(seen))
            target = projection if self.target is None else self.target(seen)
            figures = health(projection, self.predictor(projection), target)
        return figures | {"ema_decay": self.moving_average_decay}

    def ddp_ignored(self, prefix: str = "") -> list[str]:
        """Names of the parameters that do not reach the representation, with `prefix` in front.

        They get no gradient in training, so DDP must not wait for one. A parameter that only the
        evaluation forward uses is named, one that only the training forward uses is not, and one
        that is used at random or depending on the input (LayerDrop, experts) is not either: then
        give DDP find_unused_parameters=True. Where the training forward fails on the probe (it
        asks for labels), the evaluation forward decides. DDP(learner) reads the names itself; set
        `_ddp_params_and_buffers_to_ignore` of a module that wraps the learner to
        ddp_ignored("name.of.the.learner."). DDP does not broadcast them at its start either:
        `for p in ...: torch.distributed.broadcast(p.data, 0)` does, where ranks were initialised
        differently.
        """
        inner = "" if uncompiled(self.net) is self.net else "_orig_mod."
        names = [f"net.{inner}{name}" for name in sorted(self._unreached)]
        return [prefix + name for name in names]

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        return self.ddp_ignored() + self.ddp_ignored("_orig_mod.")

    def get_extra_state(self) -> Tensor:
        """The EMA step, so that a resumed run goes on with the same decay."""
        return torch.tensor(self._step, dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the EMA step."""
        self._step = int(state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copied or unpickled network comes without the hooks.
        self._representation = Representation(self.net, self._representation.place)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.endswith(("augment_fn", "augment_fn2")) and not isinstance(value, nn.Module):
            self.__dict__.get("_modules", {}).pop(name, None)  # torch refuses functions there
        super().__setattr__(name, value)

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """(mean, std) that the Normalize stage of the first view works with; None without one, or
        where augment_fn is not of byol_views."""
        return normalisation_of(self.augment_fn, self._layout.channels)

    def _check_images(self, images: Any, ranged: bool = True) -> None:
        self._layout.check(images, "The images", self.check_finite)
        looked = torch.compiler.is_compiling() or self._range_checked
        if looked or not ranged or not has_range(images):
            return
        self._range_checked = True
        if message := range_warning(images, clipped=as_view(self.augment_fn) is not None):
            warnings.warn(message, stacklevel=4)

    def _as_seen(self, images: Any, normalise: bool = True) -> Any:
        # Without normalisation they may be in any range.
        self._check_images(images, ranged=normalise)
        view = as_view(self.augment_fn) if normalise else None
        return self._in_dtype(scaled(images) if view is None else view.normalise(images))

    def _check_ready(self, views: Sequence[Any]) -> None:
        check_local_count(views, self.local_views)
        self._layout.check_views(views[:2], self.check_finite)
        if self.local_views:
            self._local_layout.check_views(views[2:], self.check_finite, local=True)
            check_same_batch(views[0], views[2])

    def _loss(self, one: Any, two: Any, *local: Any) -> Tensor:
        views = self._passes(one, two)
        goals = None
        if self.target is not None:
            # Before the online network, whose activations then are not there yet: at ResNet-50
            # and 256 images the peak of memory is 1.1 GiB lower.
            with torch.no_grad():
                goals = [self.target(view) for view in views]
        projections = [self.projector(self._embed(view)) for view in views]
        p_one, p_two = _parts([self.predictor(projection) for projection in projections], 2)
        z_one, z_two = _parts(projections if goals is None else goals, 2)
        z_one, z_two = z_one.detach(), z_two.detach()
        loss = regression_loss(p_one, z_two) + regression_loss(p_two, z_one)
        if not local:
            return loss
        projections = [self.projector(self._embed(view)) for view in self._passes(*local)]
        predictions = _parts([self.local_predictor(p) for p in projections], len(local))
        pairs = [regression_loss(p, z) for p in predictions for z in (z_one, z_two)]
        return loss + 2 * torch.stack(pairs).mean()

    def _passes(self, *views: Any) -> list[Any]:
        """What goes through the network one after the other: a view each, or all in one batch."""
        ready = [self._in_dtype(view) for view in views]
        joined = self.concatenate_views and len(ready) > 1
        return [map_tensors(lambda *xs: torch.cat(xs), *ready)] if joined else ready

    def _embed(self, view: Any) -> Tensor:
        representation = self._representation(self.net, view)
        check_gradient(representation, self.net, self._representation.place, self._unreached)
        return representation

    def _in_dtype(self, view: Any) -> Any:
        # A network cast to bfloat16 takes bfloat16.
        dtypes = (p.dtype for p in self.net.parameters() if p.is_floating_point())
        return for_network(view, next(dtypes))


def _parts(outputs: list[Tensor], count: int) -> Sequence[Tensor]:
    """One output a view, from those of `count` views or of one batch of all."""
    return outputs if len(outputs) == count else outputs[0].chunk(count)
