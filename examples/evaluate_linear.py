"""Linear evaluation of a frozen backbone by the published protocols.

    torchrun --nproc-per-node=8 examples/evaluate_linear.py --data IMAGENET --checkpoint FILE
    python examples/evaluate_linear.py --data CIFAR --checkpoint FILE --protocol multi-head --cached

--protocol paper and mmselfsup train one head on the pooled feature, of any backbone; multi-head,
places205 and inaturalist one on each of a ResNet's five stages. Every epoch has new crops, unless
--cached takes the features once. Several --base-lrs cost little more than one. --test-only FILE
trains nothing: it scores a head that is there, such as a linear checkpoint of MMSelfSup's:

    python examples/evaluate_linear.py --data IMAGENET --protocol mmselfsup \\
        --test-only resnet50_linear-8xb512-coslr-90e_in1k_20220825-7596c6f5.pth
"""

import argparse
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from parts import openmp  # noqa: F401, before torch

# isort: split

import numpy as np
import torch
from parts.backbone import Facts, open_backbone
from parts.flags import common_flags, set_up
from parts.journal import Journal
from parts.labelled import (
    Labelled,
    Transform,
    Watched,
    balanced,
    open_images,
    open_tests,
    training_loader,
)
from parts.linear_views import VIEWS, views
from parts.machine import Machine
from parts.processes import fail, launch, leave_processes, rank, tell, world_size
from parts.published import IMAGENET, INATURALIST2018, DataSet
from parts.published import PLACES205 as PLACES205_DATA
from parts.resume import LastState, identity, the_only_run
from parts.tables import Cell, write_results
from torch import Tensor, nn

from byol_pytorch.checkpoint.pickles import read_torch
from byol_pytorch.evaluation.features import FeatureReader, resnet_stages
from byol_pytorch.evaluation.linear import LinearHeads, Probe, accuracy, linear_probe, train_epoch
from byol_pytorch.evaluation.protocols import (
    INATURALIST,
    MMSELFSUP_LINEAR,
    MULTI_HEAD,
    PAPER,
    PAPER_LRS,
    PLACES205,
    Protocol,
)

# Branch 0.x, which measured all figures of its configs/selfsup/byol/README.md but the 71.8.
MMSELFSUP = "MMSelfSup 0.x, configs/benchmarks/classification/"
PAGE = "MMSelfSup's BYOL, ResNet-50"


@dataclass(frozen=True)
class Evaluation:
    """A published linear evaluation and what came of it."""

    origin: str  # where it is published
    protocol: Protocol
    views: str  # of VIEWS
    stages: bool  # a head for each stage; else one for the pooled feature
    data: DataSet
    # In %: top-1 of the stages; top-1 and top-5 of one head. Shown where the data are `data`.
    published: dict[str, tuple[float, ...]]


EVALUATIONS = {
    "paper": Evaluation(
        "arXiv 2006.07733, appendix C.1, and DeepMind's byol/configs/eval.py",
        PAPER, "crop", False, IMAGENET,
        {"the paper's BYOL, ResNet-50, ImageNet, 1000 epochs": (74.3, 91.6)},
    ),
    "mmselfsup": Evaluation(
        f"{MMSELFSUP}imagenet/resnet50_linear-8xb512-coslr-90e_in1k",
        MMSELFSUP_LINEAR, "bilinear", False, IMAGENET,
        {f"{PAGE}, 1.x, 16xb256, 200 epochs": (71.8,),
         f"{PAGE}, 0.x, 16xb256, 200 epochs": (71.88,),
         f"{PAGE}, 0.x, 8xb32-accum16, 200 epochs": (71.72,),
         f"{PAGE}, 0.x, 8xb32-accum16, 300 epochs": (72.93,)},
    ),
    "multi-head": Evaluation(
        f"{MMSELFSUP}imagenet/resnet50_mhead_linear-8xb32-steplr-90e_in1k",
        MULTI_HEAD, "colour", True, IMAGENET,
        {f"{PAGE}, ImageNet, 16xb256, 200 epochs": (15.41, 35.15, 47.77, 62.59, 71.85),
         f"{PAGE}, ImageNet, 8xb32-accum16, 200 epochs": (15.16, 35.26, 47.77, 63.10, 71.21)},
    ),
    "places205": Evaluation(
        f"{MMSELFSUP}places205/resnet50_mhead_8xb32-steplr-28e_places205",
        PLACES205, "places", True, PLACES205_DATA,
        {f"{PAGE}, Places205, 200 epochs": (21.25, 36.55, 43.66, 50.74, 53.82),
         f"{PAGE}, Places205, 300 epochs": (21.18, 36.68, 43.42, 51.04, 54.06)},
    ),
    "inaturalist": Evaluation(
        f"{MMSELFSUP}inaturalist2018/resnet50_mhead_8xb32-steplr-84e_inat18",
        INATURALIST, "bilinear", True, INATURALIST2018, {},
    ),
}  # fmt: skip
HELP = {
    "epochs": "passes over the training images",
    "batch_size": "images of one step over all processes",
    "base_lrs": "learning rates to try, for 256 images and scaled linearly with the batch; the "
    f"paper chooses among {' '.join(map(str, PAPER_LRS))}",
    "optimizer": "sgd with Nesterov's momentum, or lars",
    "momentum": "of the optimizer",
    "weight_decay": "of weights and biases",
    "milestones": "epochs at which the rate falls to a tenth; none: half cosine to 0",
    "by_epoch": "the cosine moves once an epoch",
    "batch_norm": "without affine, before each head",
}
FLAG = {name: name for name in HELP} | {"batch_size": "total_batch"}


def main(argv: list[str] | None = None) -> None:
    args, protocol, machine = parse(argv)
    evaluation = EVALUATIONS[args.protocol]
    train, test = (
        (None, open_tests(args.data, args.max_value))
        if args.test_only
        else open_images(args.data, args.max_value)
    )
    net, facts = open_backbone(args)
    stages = stages_of(net, args.stages, args.protocol, args.model) if evaluation.stages else None
    view, look = views(args.views or evaluation.views, facts, whole=test[0].size is not None)
    testing = Labelled(test[0], look, test[1])
    tell(f"{len(testing)} images to test on; {args.protocol} is {evaluation.origin}")
    try:
        backbone = Backbone(net.eval(), stages, facts.image_size, machine)
        if train is None:
            probe = tested(backbone, testing, protocol, machine, args.test_only)
            comparable = (len(testing), probe.heads.num_classes) == evaluation.data[1:]
        else:
            training = Labelled(train[0], view, train[1])
            tell(f"{len(training)} images to train on")
            counts = len(training), len(testing), len(np.unique(training.labels))
            comparable = counts == evaluation.data
            probe = (cached if args.cached else online)(
                backbone, training, testing, protocol, machine, args
            )
    except ValueError as error:
        fail(str(error))
    if rank() == 0:
        report(probe, evaluation, comparable, facts, args)
    leave_processes()


def tested(
    backbone: "Backbone", testing: Labelled, protocol: Protocol, machine: Machine, path: Path
) -> Probe:
    """The accuracies of heads that are there: last.pt of an earlier run, or one released."""
    state = read_weights(path)
    released = released_head(state)
    if released is None and "weights.0" not in state.get("heads", {}):
        fail(f"--test-only {path} is neither OUTPUT/last.pt of this program nor a linear "
             "checkpoint of MMSelfSup or MMPretrain (head.fc_cls.* or head.fc.*).")  # fmt: skip
    if released:
        protocol = replace(protocol, base_lrs=protocol.base_lrs[:1], batch_norm=False)
        state = {"weights.0": released["weight"][None], "biases.0": released["bias"][None]}
    else:
        state = state["heads"]
    classes = state["weights.0"].shape[1]
    if testing.labels.max() >= classes:
        fail(f"--test-only {path} tells {classes} classes apart, and the test images have "
             f"{testing.labels.max() + 1}.")  # fmt: skip
    example = backbone(testing[0][0][None].to(machine.device))
    heads = LinearHeads(example, classes, protocol, dtype=machine.dtype)
    try:
        heads.load_state_dict(heads.state_dict() | state if released else state)
    except RuntimeError as error:
        fail(f"--test-only {path} does not fit this backbone and protocol: {error}")
    top1, top5 = accuracy(heads, backbone, machine.share_loader(testing))
    return Probe(heads.stages, protocol.lrs, top1, top5, None, heads)


def read_weights(path: Path) -> dict[str, Any]:
    """The state in a file, of whatever project; no code of it is run."""
    try:
        return read_torch(path, foreign=True)
    except (OSError, ValueError) as error:
        fail(f"--test-only {path} cannot be read: {error}")


def released_head(state: dict[str, Any]) -> dict[str, Tensor] | None:
    """Weight (C, D) and bias (C,) of a linear checkpoint: MMSelfSup 0.x's ClsHead (mmselfsup/
    models/heads/cls_head.py), or MMPretrain's LinearClsHead, which 1.x trains."""
    tensors = state.get("state_dict", state)
    for name in ("head.fc_cls", "head.fc"):
        if f"{name}.weight" in tensors:
            return {part: tensors[f"{name}.{part}"] for part in ("weight", "bias")}
    return None


def online(
    backbone: "Backbone", training: Labelled, testing: Labelled, protocol: Protocol,
    machine: Machine, args: argparse.Namespace,
) -> Probe:  # fmt: skip
    """The published evaluation: new crops in every epoch; goes on from OUTPUT/last.pt."""
    classes, held_out = int(training.labels.max()) + 1, None
    if args.held_out:
        training, held_out = apart(training, testing.transform, args.held_out, args.seed)
    protocol = replace(protocol, batch_size=min(protocol.batch_size, len(training)))
    example = backbone(testing[0][0][None].to(machine.device))
    heads = LinearHeads(example, classes, protocol, seed=args.seed, dtype=machine.dtype)
    loader = training_loader(training, protocol.batch_size, args.seed, machine)
    tests = machine.share_loader(testing)
    now = identity(vars(args), len(training))
    last = LastState(args.output / "last.pt", now, {"heads": heads})
    with the_only_run(args.output):
        state, done = last.restore(), 0
        if state:
            tell(f"goes on from {last.path}")
            done = state["epoch"]
        steps = len(loader)
        journal = Journal(args.output, rank() == 0, done * steps, protocol.epochs * steps,
                          protocol.batch_size)  # fmt: skip
        for epoch in range(done, protocol.epochs):
            loader.batch_sampler.only(epoch)
            losses = train_epoch(heads, backbone, Watched(loader, journal), epoch)
            figures = named("loss", losses, heads)
            if (epoch + 1) % args.eval_every == 0 and epoch + 1 < protocol.epochs:
                figures |= named("top1", accuracy(heads, backbone, tests)[0], heads)
            journal.figures((epoch + 1) * steps, {"epoch": epoch + 1, **figures})
            last.save(epoch=epoch + 1)
        top1, top5 = accuracy(heads, backbone, tests)
        chooses = None
        if held_out:
            chooses, _ = accuracy(heads, backbone, machine.share_loader(held_out))
        journal.figures(protocol.epochs * steps, named("top1", top1, heads))
        journal.close()
    return Probe(heads.stages, protocol.lrs, top1, top5, chooses, heads)


def cached(
    backbone: "Backbone", training: Labelled, testing: Labelled, protocol: Protocol,
    machine: Machine, args: argparse.Namespace,
) -> Probe:  # fmt: skip
    """Heads on the features of the test view of every image: minutes instead of epochs of crops."""
    both = []
    for images in (replace(training, transform=testing.transform), testing):
        features, labels = machine.features(backbone.net, images, stages=backbone.stages)
        both += [backbone.shaped(features), labels]
    return linear_probe(
        *both, protocol=protocol, held_out=args.held_out, seed=args.seed, device=machine.device,
        dtype=machine.dtype, progress=rank() == 0,
    )  # fmt: skip


def apart(
    training: Labelled, look: Transform, share: float, seed: int
) -> tuple[Labelled, Labelled]:
    """The training images without a share of each class, and that share as tests see it."""
    part = balanced(training.labels, 100 * share, seed)
    assert training.indices is not None
    kept = np.delete(training.indices, part)
    left = replace(training, transform=look, indices=training.indices[part])
    return replace(training, indices=kept), left


# The backbone -----------------------------------------------------------------------------------


class Backbone:
    """Images to the features that heads are trained on: (B, D), or (B, C, cells) by stage."""

    def __init__(
        self, net: nn.Module, stages: dict[str, str] | None, image_size: int, machine: Machine
    ) -> None:
        self.net, self.stages, self.size = net, stages, machine.batch_size
        self.channels: dict[str, int] = {}
        handles = []
        for name, layer in (stages or {}).items():

            def note(_m: Any, _a: Any, out: Tensor, name: str = name) -> None:
                self.channels[name] = out.shape[1]

            handles.append(net.get_submodule(layer).register_forward_hook(note))
        example = torch.zeros(2, 3, image_size, image_size, device=machine.device)
        with torch.no_grad():
            self.read = FeatureReader(net, example, stages)
            self.read(example)
        for handle in handles:
            handle.remove()

    def __call__(self, images: Tensor) -> Any:
        parts = [self.read(x) for x in images.split(self.size)]
        if self.stages is None:
            return torch.cat(parts)
        return self.shaped({name: torch.cat([p[name] for p in parts]) for name in self.stages})

    def shaped(self, features: Any) -> Any:
        """Flat maps with their channels apart, which batch norm is over."""
        if self.stages is None:
            return features
        return {n: features[n].unflatten(1, (self.channels[n], -1)) for n in self.stages}


def stages_of(
    net: nn.Module, wanted: list[str] | None, protocol: str, model: str
) -> dict[str, str]:
    """Layers by the names of the stages that get a head: the `wanted`, or all of a ResNet's."""
    try:
        known = resnet_stages(net)
    except ValueError:
        known = {}
    names = wanted or list(known)
    if not names:
        fail(f"--protocol {protocol} has a head for each stage of a ResNet, which --model "
             f"{model} is not. Name layers that give maps, --stages stages.2 stages.3, or "
             "take --protocol paper or mmselfsup, one head on the pooled feature.")  # fmt: skip
    layers = dict(net.named_modules())
    for name in names:
        if known.get(name, name) not in layers:
            fail(f"--stages {name}: {model} has {', '.join([*known, *list(layers)[1:12]])}, "
                 "...")  # fmt: skip
    return {name: known.get(name, name) for name in names}


# Flags and figures ------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Protocol, Machine]:
    parser = argparse.ArgumentParser(
        description="Linear evaluation of a frozen backbone. The same command goes on from the "
        "last epoch that an earlier one ended.",
    )
    common_flags(parser)
    add = parser.add_argument
    add("--protocol", choices=EVALUATIONS, default="paper", help="what the flags below default to")
    add("--cached", action="store_true",
        help="features of test views, taken once: fast, not the published protocol")  # fmt: skip
    add("--held-out", type=float, default=0.0,
        help="part of the training images that chooses among --base-lrs; test images never do. "
        "The paper: 10009 of 1281167")  # fmt: skip
    add("--test-only", type=Path, metavar="FILE",
        help="score these heads and train none: OUTPUT/last.pt, or a linear checkpoint of "
        "MMSelfSup or MMPretrain, with its backbone unless --checkpoint is given")  # fmt: skip
    add("--stages", nargs="+",
        help="which of feature1 to feature5 (default: all), or layers by name")  # fmt: skip
    add("--eval-every", type=int, default=10, help="epochs; the last is always evaluated")
    add("--views", choices=VIEWS,
        help=f"of the training images ({defaults(lambda e: e.views)})")  # fmt: skip
    group = parser.add_argument_group(
        "protocol", "; ".join(f"{name} is {e.origin}" for name, e in EVALUATIONS.items())
    )
    for field in fields(Protocol):
        name = field.name
        shown = defaults(lambda e, name=name: getattr(e.protocol, name))
        value = getattr(PAPER, name)
        how: dict[str, Any] = {"type": type(value)}
        if isinstance(value, bool):
            how = {"action": argparse.BooleanOptionalAction}
        elif isinstance(value, tuple):
            how = {"type": float if name == "base_lrs" else int, "nargs": "*"}
        elif name == "optimizer":
            how = {"choices": ("sgd", "lars")}
        group.add_argument(f"--{FLAG[name].replace('_', '-')}", default=None,
                           help=f"{HELP[name]} ({shown})", **how)  # fmt: skip
    args = parser.parse_args(argv)
    machine = set_up(args)
    if args.test_only and not args.checkpoint and released_head(read_weights(args.test_only)):
        args.checkpoint = str(args.test_only)
    if not 0 <= args.held_out < 1 or args.eval_every < 1:
        fail(f"--held-out {args.held_out}, --eval-every {args.eval_every}; expected a part in "
             "[0, 1), and at least 1.")  # fmt: skip
    given = {name: getattr(args, flag) for name, flag in FLAG.items()}
    given = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items() if v is not None}
    try:
        protocol = replace(EVALUATIONS[args.protocol].protocol, **given)
    except ValueError as error:
        fail(str(error))
    if protocol.batch_size < world_size():
        fail(f"--total-batch {protocol.batch_size} is less than {world_size()} processes.")
    return args, protocol, machine


def defaults(of: Any) -> str:
    """An option's default in each protocol, equal ones together."""
    names: dict[str, list[str]] = {}
    for name, evaluation in EVALUATIONS.items():
        value = of(evaluation)
        shown = " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
        names.setdefault(shown, []).append(name)
    if len(names) == 1:
        return f"default: {next(iter(names))}"
    return "default: " + ", ".join(f"{shown} of {' and '.join(n)}" for shown, n in names.items())


def named(what: str, values: Tensor, heads: LinearHeads) -> dict[str, float]:
    return {
        f"{what}/{stage}/lr {lr:g}": value
        for stage, row in zip(heads.stages, values.tolist(), strict=True)
        for lr, value in zip(heads.protocol.lrs, row, strict=True)
    }


def report(
    probe: Probe, evaluation: Evaluation, comparable: bool, facts: Facts, args: argparse.Namespace
) -> None:
    """The published table: a column for each stage, or for the top-1 and top-5 of one head;
    the published rows where the data are `comparable`."""
    top1, top5 = 100 * probe.top1, 100 * probe.top5
    lines: list[tuple[str, list[int]]]  # and which rate is shown for each stage
    if probe.chosen is not None:
        how = "" if probe.held_out is None else ", rate chosen on held-out training images"
        lines = [(how, list(probe.chosen.values()))]
    else:
        lines = [(f", lr {lr:g}", [i] * len(probe.stages)) for i, lr in enumerate(probe.lrs)]
    rows: list[list[Cell]] = []
    for what, rates in lines:
        first, five = ([x[s, r].item() for s, r in enumerate(rates)] for x in (top1, top5))
        this = f"{facts.model}, {facts.start}{what}"
        if evaluation.stages:
            rows += [[f"{this}: top-1", *first], [f"{this}: top-5", *five]]
        else:
            rows.append([this, first[0], five[0]])
    columns = ["", *(probe.stages if evaluation.stages else ("top-1", "top-5"))]
    for who, figures in evaluation.published.items() if comparable else ():
        cells: list[float | None] = [*figures]
        if evaluation.stages:
            by_stage = {f"feature{i}": figure for i, figure in enumerate(figures, 1)}
            cells = [by_stage.get(stage) for stage in probe.stages]
        rows.append([who, *cells, *[None] * (len(columns) - 1 - len(cells))])
    how = ", cached features" if args.cached else ", test only" if args.test_only else ""
    title = f"Linear evaluation, {args.protocol}{how}: "
    title += f"accuracy in % on {Path(args.data).name}"
    more = {
        "stages": probe.stages, "lrs": probe.lrs, "chosen": probe.chosen,
        "top1": probe.top1.tolist(), "top5": probe.top5.tolist(),
        "held_out": None if probe.held_out is None else probe.held_out.tolist(),
        "protocol": str(probe.heads.protocol), "source": evaluation.origin,
    }  # fmt: skip
    write_results(args, title, columns, rows, facts, more)


if __name__ == "__main__":
    launch(main)
