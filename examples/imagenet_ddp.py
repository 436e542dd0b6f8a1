"""Pre-train a backbone with BYOL for real: one device, or many under torchrun.

    torchrun --nproc-per-node=8 examples/imagenet_ddp.py --data imagenet --output runs/byol

Everything that a run leaves is in --output; the same command started again goes on from there,
wherever it was stopped. parts/sources.py has the images, parts/watch.py the figures and the alarms.
"""

import argparse
import json
import math
import os
import shlex
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from parts import openmp  # noqa: F401, before torch

# isort: split

import timm
import torch
import torch.distributed as dist
from parts.amount import by_amount
from parts.backbone import shrink_stem, timm_model, what_next
from parts.decoding import Crop
from parts.flags import MAX_VALUE_HELP, WithDefaults, flag, json_object, with_flags
from parts.journal import Journal
from parts.order import seed_of
from parts.processes import (
    asked_to_stop,
    fail,
    join_processes,
    launch,
    leave_after,
    leave_processes,
    parallel,
    rank,
    synchronised,
    world_size,
)
from parts.resume import Run, read_state, the_only_run, what_changed
from parts.sources import Files, Source, hold_out, open_data
from parts.undo import Undo, Verdicts
from parts.views import Views, pipelines
from parts.watch import Watch, Watching, describe
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from byol_pytorch import BYOL, checkpoint
from byol_pytorch.augment import IMAGENET_MEAN, IMAGENET_STD, PRESETS
from byol_pytorch.augment.views import GLOBAL_SCALE, LOCAL_SCALE, local_sides
from byol_pytorch.heads import sync_batchnorm
from byol_pytorch.optim import LARS, param_groups, scaled_decay, scaled_lr, warmup_cosine


@dataclass(frozen=True)
class Recipe:
    """What is learned from which batches. Every field is a flag; a resumed run must not differ."""

    epochs: int = flag("passes over the images")
    base_lr: float = flag("peak learning rate for 256 images, scaled linearly with the batch")
    weight_decay: float = flag("of weights; biases and norms have none")
    base_decay: float = flag("of the target's moving average, at the start")
    constant_decay: bool = flag("instead of rising to 1 by a half cosine", default=False)
    warmup_epochs: float = flag("in which the learning rate rises", default=10)
    layer_decay: float = flag("of the rate, from each layer to the one below it", default=1.0)
    optimizer: str = flag("lars, adamw or sgd", default="lars")
    batch_size: int = flag("images of one step, over all devices and accumulated", default=4096)
    accumulate: int = flag("backward passes of one step", default=1)
    model: str = flag("timm's name", default="resnet50")
    model_args: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "JSON, for timm.create_model"}
    )
    small_stem: bool = flag(
        "a ResNet's first layers for 32 px: 3x3, stride 1, no pool", default=False
    )
    same_padding: bool = flag("pad as TensorFlow does, for DeepMind's weights", default=False)
    freeze: str = flag("a module that does not train", default="")
    freeze_bn: bool = flag("keep the statistics of existing weights", default=False)
    image_size: int = flag("side of the views, pixels", default=224)
    views: str = flag(f"preset of the views: {', '.join(PRESETS)}", default="imagenet")
    view_args: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "JSON, what differs from it: arguments of augment.byol_views"},
    )
    local_views: int = flag("small views of each image beside the two; MULAN has 2", default=0)
    local_size: int = flag("their side, pixels; 0: 3/7 of --image-size", default=0)
    projection_size: int = flag("outputs of projector and predictor", default=256)
    projection_hidden_size: int = flag("their hidden width", default=4096)
    loss_scale: float = flag("factor of the loss, which matters to SGD", default=1.0)

    @property
    def view_options(self) -> dict[str, Any]:
        return ({"scale": GLOBAL_SCALE} if self.local_views else {}) | self.view_args

    @property
    def local_side(self) -> int:
        return local_sides((self.image_size, self.image_size), self.local_size or None)[0]

    @property
    def crops(self) -> list[tuple[int, Crop]]:
        """Size and distribution of each view's crop."""
        given = {k: v for k, v in self.view_options.items() if k in ("scale", "ratio")}
        local = (self.local_side, Crop(LOCAL_SCALE))
        return [(self.image_size, Crop(**given))] * 2 + [local] * self.local_views


# arXiv 2006.07733, section 3.3, and for all three lengths byol/configs/byol.py of DeepMind's code
# (github.com/google-deepmind/deepmind-research). Its residual branches begin at zero, as timm's; by
# its README the paper's own runs began at one, and a ResNet-50 came out the same.
PAPER_1000 = Recipe(epochs=1000, base_lr=0.2, weight_decay=1.5e-6, base_decay=0.996)
PAPER_300 = Recipe(epochs=300, base_lr=0.3, weight_decay=1e-6, base_decay=0.99)
PAPER_100 = Recipe(epochs=100, base_lr=0.45, weight_decay=1e-6, base_decay=0.99)
# github.com/open-mmlab/mmselfsup, branch 0.x, byol_resnet50_16xb256-coslr-200e: lr 4.8 at 4096
# images; its ResNet has zero_init_residual=False. All published figures but the linear 71.8 are of
# 0.x; under accumulation 1.x moves the target 16 times a step, 0.99^16 = 0.851.
MMSELFSUP = Recipe(
    epochs=200, base_lr=0.3, weight_decay=1e-6, base_decay=0.99,
    model_args={"zero_init_last": False},
)  # fmt: skip
RECIPES = {
    "paper-1000": PAPER_1000,
    "paper-300": PAPER_300,
    "paper-100": PAPER_100,
    "mmselfsup-16xb256-200": MMSELFSUP,
    # byol_resnet50_8xb32-accum16-coslr-{200,300}e: the same, but batch norm sees 256 images.
    "mmselfsup-8xb32-accum16-200": replace(MMSELFSUP, accumulate=16),
    "mmselfsup-8xb32-accum16-300": replace(MMSELFSUP, accumulate=16, epochs=300),
    # MULAN (arXiv 2602.05845; main.py and CONFIG.md of github.com/pfdp0/mulan), without its cutout
    # view. There the heads' first Linear has no bias and the last one has, batch norm of the target
    # does not span processes, local views are blurred with 23 taps, and the rate ends at a
    # thousandth.
    "mulan-200": Recipe(
        epochs=200, base_lr=0.4, weight_decay=1.5e-6, base_decay=0.996, batch_size=1024,
        local_views=2, local_size=96,
    ),
    # MoCo v3 (arXiv 2104.02057; CONFIG.md of github.com/facebookresearch/moco-v3): AdamW, 40 epochs
    # of warm-up, patch projection frozen. It decays biases and norms too, this does not.
    "vit": Recipe(
        epochs=300, base_lr=1.5e-4, weight_decay=0.1, base_decay=0.99, warmup_epochs=40,
        optimizer="adamw", model="vit_base_patch16_224", freeze="patch_embed",
    ),
    # DeepMind's settings for 100 epochs at lightly's batch of 256 (its ImageNet benchmark); epochs,
    # batch and decay then follow the number of images.
    "own": replace(PAPER_100, batch_size=256),
    # lightly's CIFAR-10 benchmark (docs.lightly.ai, benchmarks): lr 0.06 at 128 images; its loss is
    # a quarter of this one. It decays biases and norms too, this does not.
    "small": Recipe(
        epochs=200, base_lr=0.12, weight_decay=5e-4, base_decay=0.99, constant_decay=True,
        warmup_epochs=0, optimizer="sgd", batch_size=512, model="resnet18", small_stem=True,
        image_size=32, views="cifar", projection_hidden_size=1024, loss_scale=0.25,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The recipe, what follows from it for these data and processes, and all other flags."""

    recipe: Recipe
    device: torch.device
    rank: int
    world: int
    images: int  # of one forward pass of one device
    epoch_steps: int
    steps: int
    warmup_steps: int
    lr: float
    usual_lr: float  # the recipe's own for this batch, before --lr and --base-lr
    decay: float
    amp: str
    identity: dict[str, Any]  # what a resumed run must have in common
    watching: Watching
    data: Path
    output: Path
    seed: int
    init_from: str | None
    decode_size: int | None
    workers: int
    save_every: int  # steps
    stop_at: float  # of time.monotonic()
    fsdp: bool
    compile: bool
    channels_last: bool
    sync_bn: bool

    def autocast(self) -> AbstractContextManager[Any]:
        dtype = torch.float16 if self.amp == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.amp != "none")

    def setup(self) -> dict[str, Any]:
        """What may change from one start to the next."""
        known = {"processes": self.world, "passes a step": self.recipe.accumulate}
        switches = ("compile", "fsdp", "channels_last", "sync_bn")
        known |= {name: getattr(self, name) for name in switches}
        return known | {"device": self.device.type}


def main(argv: list[str] | None = None) -> None:
    recipe, args = parse_arguments(argv)
    device = join_processes(args.device)
    if args.fsdp and not dist.is_initialized():
        fail("--fsdp shards over processes: start with torchrun --nproc-per-node=N.")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    source, test = open_data(args.data, args.max_value, args.max_bad)
    check_output(args.output, source)
    if args.held_out is not None:
        source, test = hold_out(source, args.held_out)
        if not (test.labels >= 0).any():
            fail(f"--held-out {args.held_out}: they have no labels to ask for, so leave it out.")
    if args.recipe == "own":
        recipe = for_own_images(recipe, args, len(source))
    plan = make_plan(recipe, args, source, device, rank(), world_size())
    came = [] if args.dry_run else pretrain(plan, source, test)
    leave_processes()
    leave_after(came)
    if args.dry_run and plan.rank == 0:  # alone, on the whole learner
        shards = plan.world if plan.fsdp else 1
        plan = replace(plan, fsdp=False, compile=False)
        describe(build_learner(plan), plan, source, shards)


def pretrain(plan: Plan, source: Source, test: Source | None) -> list[int]:
    """The signals by which the run was stopped before its end."""
    last, stop = plan.output / "last.pt", asked_to_stop()
    with the_only_run(plan.output):
        state = read_state(last, plan.identity, " (from these weights: --init-from)")
        learner = build_learner(plan, state)
        scaler = torch.amp.GradScaler(plan.device.type, enabled=plan.amp == "fp16")
        run = Run(learner, build_optimizer(learner, plan), scaler)
        if state:
            run.restore(state)
        step, size = run.progress.step, plan.recipe.batch_size
        journal = Journal(plan.output, plan.rank == 0, step, plan.steps, size)
        if state:
            journal.note(step, what_changed(state["layout"], plan.setup()))
        watch = Watch(plan, run, journal, source, test)
        finished = train(run, Views(plan, source, learner.normalisation), watch, plan, stop)
        if finished:
            export(learner, journal, plan, source)
            watch.show_neighbours()
        journal.close()
    return [] if finished else stop


def train(run: Run, views: Views, watch: Watch, plan: Plan, stop: list[int]) -> bool:
    """The whole of BYOL's training loop; whether it came to its end."""
    recipe, progress, clock = plan.recipe, run.progress, watch.clock
    learner, optimizer, scaler = run.learner, run.optimizer, run.scaler
    model = in_parallel(learner, plan)
    verdicts, undo = Verdicts(plan.device, plan.world), Undo(learner, optimizer)
    batches = views.batches(progress.step)
    while progress.step < plan.steps:
        step = progress.step
        lr = warmup_cosine(step, plan.steps, plan.warmup_steps, plan.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        draws = views.draw(step)
        undo.remember()
        optimizer.zero_grad()
        for part in range(recipe.accumulate):
            with clock("data"):
                images, bad = next(batches)
            with clock("views"):
                one, two, *local = views.make(images, draws, part)
            watch.before(bad, one, two)
            # Dropout and its like: drawn anew here, so that no other use of randomness moves them.
            torch.manual_seed(seed_of(plan.seed, 1, plan.rank, step, part))
            last = part == recipe.accumulate - 1
            with clock("step"), synchronised(model, last), plan.autocast():
                loss = model(one, two, local_views=local)
                scaler.scale(loss * recipe.loss_scale / recipe.accumulate).backward()
            watch.after(loss)
        with clock("update"):
            scaler.unscale_(optimizer)
            norm = gradient_norm(optimizer)
            over = time.monotonic() > plan.stop_at
            keep = verdicts.agree(norm, stop=over or bool(stop))
            optimizer.step()
            undo.unless(keep)
            scaler.update()
            learner.update_moving_average()
        progress.step += 1

        due = progress.step % plan.save_every == 0 or progress.step == plan.steps
        asked = verdicts.count(progress, all_of_them=due)
        watch.look(norm, lr, everything=due or asked)
        watch.stop_if_skipping()
        if due or asked or watch.too_many_bad():
            error = run.save(plan.output / "last.pt", plan.identity, plan.setup())
            watch.say_saved(error, asked)
        watch.stop_if_bad()
        if asked and progress.step < plan.steps:
            return False
    return True


# Arguments and what follows from them -----------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> tuple[Recipe, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description="Pre-train a timm backbone with BYOL. The same command goes on where an "
        "earlier one was stopped.",
        formatter_class=WithDefaults,
    )
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--data", type=Path, required=True, help="image folder, CIFAR, STL-10, .npz or tar shards")
    add("--output", type=Path, default=Path("runs/pretrain"), help="folder of the run")
    add("--recipe", choices=RECIPES, default="paper-100", help="what the flags below default to")
    hints = get_type_hints(Recipe)
    group = parser.add_argument_group("recipe", "each defaults to what --recipe has")
    for f in fields(Recipe):
        name = "--" + f.name.replace("_", "-")
        kind = partial(json_object, name) if f.default_factory is dict else hints[f.name]
        how = {"action": switch} if kind is bool else {"type": kind}
        group.add_argument(name, default=None, help=f.metadata["help"], **how)
    add("--lr", type=float, help="peak learning rate itself, instead of --base-lr")
    add("--steps", type=int, help="optimizer steps, instead of --epochs; warm-up keeps its share")
    add("--scale-decay", action="store_true", help="--base-decay for the recipe's batch, to yours")
    add("--seed", type=int, default=0, help="of weights, order, crops and views")
    add("--held-out", type=int, help="images of --data to test on instead of its own test images")
    add("--max-minutes", type=float, help="then save and stop, between two steps; go on as always")
    add("--decode-size", type=int, help="fast mode: crops on the device from squares of this side")
    add("--init-from", help="a file of weights, or 'timm' for timm's own")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch's name")
    add(
        "--workers",
        type=int,
        default=min(12, os.cpu_count() or 1),
        help="that decode, for each process",
    )
    add("--amp", choices=["auto", "none", "bf16", "fp16"], default="auto",
        help="precision of the passes; auto is bf16 on CUDA, none elsewhere")  # fmt: skip
    add("--compile", action="store_true", help="the learner and its views, by torch.compile")
    add("--fsdp", action="store_true", help="shard weights and optimizer over the processes")
    add("--channels-last", action=switch, default=True, help="memory format of weights and views")
    add("--sync-bn", action=switch, default=True, help="the backbone's, over all processes")
    add("--save-every", type=int, default=500, help="steps between states in last.pt")
    add("--log-every", type=int, default=10, help="steps between lines of figures")
    add("--health-every", type=int, default=500, help="steps between looks for collapse")
    add("--knn-every", type=int, default=10, help="epochs between kNN accuracies, 0 for none")
    add("--knn-images", type=int, default=20_000, help="at most so many, a fifth of them asked")
    add("--knn-neighbours", type=int, default=20, help="that vote, or all where there are fewer")
    add("--knn-temperature", type=float, default=0.07, help="a vote counts exp(cosine / it)")
    add("--max-value", type=float, help=MAX_VALUE_HELP)
    add("--max-bad", type=float, default=0.01, help="part of the images that may be unreadable")
    add("--max-skipped", type=int, default=20, help="non-finite steps in a row before stopping")
    add("--dry-run", action="store_true", help="print what would run")
    args = parser.parse_args(argv)
    args.stop_at = math.inf
    if args.max_minutes is not None:
        args.stop_at = time.monotonic() + 60 * args.max_minutes
    recipe = with_flags(RECIPES[args.recipe], args)
    if args.model_args is None and recipe.model != RECIPES[args.recipe].model:
        recipe = replace(recipe, model_args={})  # the recipe's are for its own model
    check(recipe, args)
    return recipe, args


def for_own_images(recipe: Recipe, args: argparse.Namespace, images: int) -> Recipe:
    """--recipe own for so many images: what is not given as a flag follows from their number."""
    settings = by_amount(images)
    if args.init_from:  # a tenth leaves trained weights near where they are
        settings["base_lr"] = recipe.base_lr / 10
    return with_flags(replace(recipe, **settings), args)


def check(recipe: Recipe, args: argparse.Namespace) -> None:
    """Refuse what cannot work, as far as it shows without data and devices."""
    for name, allowed in (("optimizer", ("lars", "adamw", "sgd")), ("views", tuple(PRESETS))):
        if getattr(recipe, name) not in allowed:
            fail(f"--{name} {getattr(recipe, name)} is none of {', '.join(allowed)}.")
    if not timm.is_model(recipe.model):
        near = ", ".join(timm.list_models(f"*{recipe.model[:6]}*")[:4])
        fail(f"--model {recipe.model} is not a model of timm. Near names: {near or 'none'}.")
    if recipe.model_args.get("in_chans", 3) != 3:
        fail("--model-args has in_chans, and images are read as RGB: leave it out.")
    if args.init_from == "timm" and recipe.small_stem:
        fail("timm has no weights for --small-stem: give --no-small-stem, or --init-from FILE.")
    given = asdict(recipe) | {k: v for k, v in vars(args).items() if v is not None}
    counts = ("epochs", "batch_size", "accumulate", "image_size", "projection_size")
    counts += ("projection_hidden_size", "steps", "save_every", "log_every", "health_every")
    counts += ("knn_neighbours", "max_skipped", "decode_size")
    numbers = ("seed", "workers", "lr", "base_lr", "loss_scale", "weight_decay", "max_bad")
    numbers += ("knn_every", "max_minutes", "local_views", "local_size")
    for names, least in ((counts, 1), (numbers, 0)):
        low = [name for name in names if not least <= given.get(name, least) < math.inf]
        if low:
            fail(f"--{low[0].replace('_', '-')} must be {least} or more.")
    if args.knn_images < 5:
        fail(f"--knn-images {args.knn_images} asks for a fifth of them, which is none: give 5.")
    for name in ("knn_temperature", "max_value"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            fail(f"--{name.replace('_', '-')} {value} is not above 0.")
    if not 0 <= recipe.base_decay <= 1:
        fail(f"--base-decay {recipe.base_decay} is not in [0, 1].")
    if not 0 < recipe.layer_decay <= 1:
        fail(f"--layer-decay {recipe.layer_decay} is not in (0, 1]: 0.75 is usual, 1 is none.")
    for name in ("image_size", "preset", "mean", "std", "crop", "dtype", "channels_last"):
        if name in recipe.view_args:
            fail(f"--view-args has {name}, which the run sets itself: leave it out.")
    try:
        pipelines(recipe)
    except (ValueError, TypeError) as error:
        fail(f"--view-args {json.dumps(recipe.view_args)} makes no views: {error}")
    if args.fsdp and args.amp == "fp16":
        fail("--fsdp needs --amp bf16 or none: fp16's loss scale is not shared between shards.")


def check_output(output: Path, source: Source) -> None:
    """The picture that a run leaves would be one image more for the run that goes on."""
    if isinstance(source, Files) and output.resolve().is_relative_to(source.folder.resolve()):
        fail(f"--output {output} is among the images of --data {source.folder}: give another.")


def make_plan(
    recipe: Recipe, args: argparse.Namespace, source: Source, device: torch.device, rank: int,
    world: int,
) -> Plan:  # fmt: skip
    parts = world * recipe.accumulate
    if recipe.batch_size % parts:
        fail(
            f"--batch-size {recipe.batch_size} does not divide by {world} processes times "
            f"--accumulate {recipe.accumulate}."
        )
    if recipe.batch_size // recipe.accumulate < 2:
        fail("Batch norm needs 2 images or more in a pass: raise --batch-size.")
    epoch_steps = len(source) // recipe.batch_size
    if not epoch_steps:
        fail(
            f"{len(source)} images do not fill a batch of {recipe.batch_size}: lower --batch-size."
        )
    if not 0 <= recipe.warmup_epochs <= recipe.epochs:
        fail(
            f"--warmup-epochs {recipe.warmup_epochs:g} is not within {recipe.epochs} epochs: lower "
            "it, or raise --epochs."
        )
    steps = args.steps or recipe.epochs * epoch_steps
    lr = scaled_lr(recipe.base_lr, recipe.batch_size) if args.lr is None else args.lr
    usual = RECIPES[args.recipe]
    decay, amp = recipe.base_decay, args.amp
    if args.scale_decay:
        decay = scaled_decay(decay, recipe.batch_size / usual.batch_size)
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" else "none"
    identity = asdict(recipe) | {"lr": lr, "steps": steps, "base_decay": decay, "amp": amp}
    identity |= {
        name: getattr(args, name)
        for name in ("seed", "decode_size", "init_from", "held_out", "max_value")
    }
    identity |= {"images": len(source), "names of the images": source.fingerprint()}
    del identity["accumulate"]  # with other devices another one may be needed
    as_given = (
        "data",
        "output",
        "seed",
        "init_from",
        "decode_size",
        "workers",
        "save_every",
        "stop_at",
    )
    as_given += ("fsdp", "compile", "channels_last", "sync_bn")
    return Plan(
        recipe, device, rank, world, recipe.batch_size // parts, epoch_steps, steps,
        round(steps * recipe.warmup_epochs / recipe.epochs), lr,
        scaled_lr(usual.base_lr, recipe.batch_size), decay, amp, identity,
        Watching(**{f.name: getattr(args, f.name) for f in fields(Watching)}),
        **{name: getattr(args, name) for name in as_given},
    )  # fmt: skip


# The parts of a run -----------------------------------------------------------------------------


def build_learner(plan: Plan, state: dict[str, Any] | None = None) -> BYOL:
    """The learner; of a resumed run with the normalisation, without the weights of `state`."""
    recipe = plan.recipe
    torch.manual_seed(plan.seed)  # the same weights on every rank
    try:
        net = make_net(recipe, pretrained=plan.init_from == "timm" and not state)
        mean, std = state["normalisation"] if state else initialise(net, plan)
        if recipe.freeze:
            frozen(net, recipe.freeze).requires_grad_(False)
        if plan.world > 1 and plan.sync_bn and not recipe.freeze_bn:
            net = sync_batchnorm(net)
        learner = BYOL(
            net,
            recipe.image_size,
            projection_size=recipe.projection_size,
            projection_hidden_size=recipe.projection_hidden_size,
            moving_average_decay=plan.decay,
            mean=mean,
            std=std,
            total_steps=None if recipe.constant_decay else plan.steps,
            local_views=recipe.local_views,
            local_size=recipe.local_side if recipe.local_views else None,
        )
    except (ValueError, TypeError, RuntimeError, AttributeError, AssertionError, OSError) as error:
        fail(f"{recipe.model} cannot be built as asked: {error}")
    # FSDP2 shards contiguous parameters alone.
    channels_last = plan.channels_last and not plan.fsdp
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    learner.to(plan.device, memory_format=memory_format).train()
    if recipe.freeze_bn:
        for module in learner.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    if plan.fsdp:
        # A compiled learner has to be one unit (README, "In your loop").
        for part in () if plan.compile else (learner.net, learner.target.net):
            fully_shard(part)
        fully_shard(learner)
        for method in ("representation", "diagnostics"):
            register_fsdp_forward_method(learner, method)
    if plan.compile:
        learner.compile(fullgraph=True)
    return learner


def frozen(net: nn.Module, name: str) -> nn.Module:
    try:
        return net.get_submodule(name)
    except AttributeError:
        raise ValueError(f"--freeze {name} is no module of it; --freeze '' freezes none") from None


def make_net(recipe: Recipe, pretrained: bool) -> nn.Module:
    net, _ = timm_model(recipe.model, recipe.image_size, recipe.model_args, pretrained)
    if recipe.small_stem:
        try:
            shrink_stem(net)
        except ValueError as error:
            raise ValueError(f"{error}; --no-small-stem where the recipe has it") from None
    return checkpoint.same_padding(net) if recipe.same_padding else net


def initialise(net: Any, plan: Plan) -> tuple[Any, Any]:
    """Load the weights of --init-from; mean and std of the images that they were trained on."""
    mean = std = None
    if plan.init_from == "timm":
        mean, std = net.pretrained_cfg["mean"], net.pretrained_cfg["std"]
    elif plan.init_from:
        report = checkpoint.load_backbone(plan.init_from, net)
        mean, std = report.mean, report.std
        if plan.rank == 0:
            print(f"{plan.init_from}: loaded {len(report.loaded)} tensors")
    return (mean, std) if mean else (IMAGENET_MEAN, IMAGENET_STD)


def build_optimizer(learner: BYOL, plan: Plan) -> torch.optim.Optimizer:
    recipe = plan.recipe
    groups = param_groups(learner, recipe.weight_decay)
    if recipe.layer_decay < 1:
        groups = by_layer(groups, learner.net, recipe.layer_decay)
    if recipe.optimizer == "lars":
        return LARS(groups, plan.lr)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, plan.lr, fused=True)  # its step count on the device
    return torch.optim.SGD(groups, plan.lr, momentum=0.9)


def by_layer(groups: list[dict[str, Any]], net: nn.Module, decay: float) -> list[dict[str, Any]]:
    """The groups split by timm's layers of `net`, each with its `lr_scale`: the heads' is 1, that
    of the last layer below them `decay`."""
    layers = param_groups_layer_decay(net, layer_decay=decay)
    scales = {p: layer["lr_scale"] for layer in layers for p in layer["params"]}
    last = max(scales.get(p, 0.0) for group in groups for p in group["params"])  # no classifier
    scales = {p: decay * scale / last for p, scale in scales.items()}
    split = []
    for group in groups:
        parts: dict[float, list[Tensor]] = {}
        for p in group["params"]:
            parts.setdefault(scales.get(p, 1.0), []).append(p)
        split += [{**group, "params": part, "lr_scale": scale} for scale, part in parts.items()]
    return split


def in_parallel(learner: BYOL, plan: Plan) -> nn.Module:
    """The learner under DDP, or itself where it is alone or sharded."""
    if plan.world == 1 or plan.fsdp:
        return learner
    for name in learner.ddp_ignored():  # DDP leaves these alone, at the start too
        dist.broadcast(learner.get_parameter(name).data, src=0)
    # Statistics are the same on all ranks, unless the backbone's are each rank's own.
    differ = not (plan.sync_bn or plan.recipe.freeze_bn)
    return parallel(learner, plan.device, broadcast_buffers=differ)


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def export(learner: BYOL, journal: Journal, plan: Plan, source: Source) -> None:
    """Write the backbone, with what builds it, and say what can be done with it."""
    recipe, path = plan.recipe, plan.output / "backbone.safetensors"
    _, built_with = timm_model(recipe.model, recipe.image_size, recipe.model_args)
    try:
        # A stem that timm has not cannot be built by arguments.
        args = None if recipe.small_stem else built_with
        checkpoint.export_backbone(learner, path, model_args=args)
    except OSError as error:
        fail(f"{path} cannot be written: {error}. Start again to write it from last.pt.")
    journal.note(journal.step, f"done, the backbone is in {path}")
    flags = " --small-stem" if recipe.small_stem else ""
    if source.max_value is not None:
        flags += f" --max-value {source.max_value:g}"
    labelled = bool((source.labels >= 0).any())
    journal.tell(what_next(path, shlex.quote(str(plan.data)), labelled, flags))


if __name__ == "__main__":
    launch(main)
