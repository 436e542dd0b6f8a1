"""Wraps every family of backbones in BYOL and writes the table of what holds, docs/backbones.md.

    python examples/benchmarks/backbones.py
    python examples/benchmarks/backbones.py --only timm/vision_transformer --output table.md

Which families there are, and each one's model, is in backbone_families.py. A family is checked in a
process of its own, and its result kept as a line of JSON: --resume goes on after the last one.
"""

import argparse
import copy
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from backbone_families import FAMILIES, BareForwardError, Subject, families, first_line, subject
from torch import Tensor, nn

from byol_pytorch import BYOL

ROOT = Path(__file__).parents[2]
PRELOAD = ["byol_pytorch", "timm", "torch._dynamo", "torchvision.models", "transformers"]
HEADS = {"projection_size": 32, "projection_hidden_size": 64}
RATES = (1.0, 0.1, 0.01, 0.001, 0.0001)  # of the one SGD step, largest first

# What the table's columns say, in their order.
CHECKS = {
    "wraps": 'BYOL(net, image_size) with hidden_layer="auto" is built',
    "feature": "the representation is the model's own pooled feature, to 1e-5",
    "varies": "it differs between images of noise, in training",
    "loss": "the loss in training is finite, of ready views and (of pictures) of the default ones",
    "gradient": "it reaches every parameter but `learner.ddp_ignored()`, and those are exactly the "
    "ones that the model's own feature does not depend on",
    "SGD": "one step of SGD on two fixed views, with the same dropout and the target at rest, "
    f"lowers the loss, at one of the rates {', '.join(f'{rate:g}' for rate in RATES)}",
    "copies": "a deepcopy gives the same loss, and a changed copy the same representation once it "
    "has loaded the learner's state_dict",
    "compiles": '`learner.compile(fullgraph=True, backend="eager")`, which proves that the step is '
    "captured as one graph, gives the same loss; - where the model alone is not captured so",
}


@dataclass
class Result:
    """What came of one family. A check is None where it does not apply."""

    family: str
    model: str = ""
    width: int = 0
    parameters: int = 0
    shape: tuple[int, ...] = ()
    checks: dict[str, bool | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)  # of what does not hold
    seconds: float = 0.0  # of CPU time
    mebibytes: float = 0.0  # the process's largest resident set

    @property
    def runs(self) -> bool:
        """Whether the model runs without BYOL."""
        return "forward" not in self.reasons

    @property
    def passes(self) -> bool:
        return list(self.checks) == list(CHECKS) and False not in self.checks.values()


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    names = [n for n in families() if args.only in n and args.library in (None, n.split("/")[0])]
    if not names:
        sys.exit(f"No family's name contains {args.only!r}; backbone_families.py has the names.")
    args.results.parent.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        args.results.unlink(missing_ok=True)
    known = {result.family: result for result in read(args.results)}
    missing = [name for name in names if name not in known]
    with ThreadPoolExecutor(args.jobs) as pool:
        for done in as_completed([pool.submit(isolated, name, args) for name in missing]):
            result = known[done.result().family] = done.result()
            with args.results.open("a") as lines:
                lines.write(json.dumps(asdict(result)) + "\n")
            print(one_line(result), flush=True)
    results = [known[name] for name in names]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(document(results))
    print(f"{summary(results)} {args.output} is written.")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, runs, docs = parser.add_argument, ROOT / "runs", ROOT / "docs"
    add("--only", default="", metavar="SUBSTRING", help="families whose name contains it")
    add("--library", choices=FAMILIES)
    add("--output", type=Path, default=docs / "backbones.md", help="default: %(default)s")
    add("--results", type=Path, default=runs / "backbones.jsonl", help="default: %(default)s")
    add("--resume", action="store_true", help="keep what --results has, and do the rest")
    add("--jobs", type=int, default=1, help="families at a time; default: %(default)s")
    add("--timeout", type=float, default=600, help="seconds a family; default: %(default)s")
    add("--memory", type=float, default=12, help="GiB a family may allocate; default: %(default)s")
    return parser.parse_args(argv)


# A process for each family ------------------------------------------------------------------------


def isolated(family: str, args: argparse.Namespace) -> Result:
    """The result of a family in a process of its own, whatever happens to that process."""
    here, there = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("forkserver")  # which imports once for all of them
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=answer, args=(there, family, args.memory))
    process.start()
    there.close()
    try:
        if here.poll(args.timeout):
            return here.recv()
        return Result(family, reasons={"process": f"not done after {args.timeout:.0f} s"})
    except EOFError:
        process.join()
        return Result(family, reasons={"process": f"ended with code {process.exitcode}"})
    finally:
        process.kill()
        process.join()


def answer(parent: Connection, family: str, memory: float) -> None:
    limit = int(memory * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    result = check(family)
    result.seconds, result.mebibytes = time.process_time(), peak_bytes() / 2**20
    parent.send(result)


def peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts the parent's memory too, until exec
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# The checks ---------------------------------------------------------------------------------------


def check(family: str) -> Result:
    """All checks of a family. One that fails says why, and those after it are still made."""
    result = Result(family)
    torch.manual_seed(0)
    try:
        found = subject(family)
    except BareForwardError as error:
        result.reasons["forward"] = str(error)
        return result
    result.model, result.shape = found.model, found.shape
    captured = captured_alone(found, result)
    torch.manual_seed(0)
    net = found.make()
    result.parameters = sum(p.numel() for p in net.parameters())
    with noted(result, "wraps"):
        learner = wrap(net, found)
    if not result.checks["wraps"]:
        return result
    with noted(result, "feature"):
        result.width = feature_is_the_models_own(learner, found)
    with noted(result, "varies"):
        feature_varies(learner, found)
    with noted(result, "loss"):
        loss = loss_is_finite(learner, found)
    if not result.checks["loss"]:
        return result
    with noted(result, "gradient"):
        gradient_reaches_all(learner, found)
    with noted(result, "SGD"):
        step_lowers_the_loss(learner, found, loss)
    learner.zero_grad()
    with noted(result, "copies"):
        copies_are_the_same(learner, found, loss)
    result.checks["compiles"] = None
    if captured:
        with noted(result, "compiles"):
            compiles_as_one_graph(learner, found, loss)
    return result


@contextmanager
def noted(result: Result, name: str) -> Iterator[None]:
    """Notes whether what it is around raises, and what."""
    try:
        yield
    except Exception as error:  # whatever a check finds
        result.checks[name] = False
        result.reasons[name] = first_line(error)
    else:
        result.checks[name] = True


def wrap(net: nn.Module, found: Subject) -> BYOL:
    if found.picture:
        return BYOL(net, (found.shape[1], found.shape[2]), **HEADS)
    return BYOL(net, None, example_input=found.images(0), **HEADS)


@torch.no_grad()
def feature_is_the_models_own(learner: BYOL, found: Subject) -> int:
    """Its width."""
    images = found.images(1)
    ours = learner.eval().representation(images, normalise=False)
    theirs = found.feature(learner.net.eval(), images)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    return ours.shape[1]


@torch.no_grad()
def feature_varies(learner: BYOL, found: Subject) -> None:
    """In training, because many a model that was never trained gives a constant in evaluation."""
    images, features = found.images(2), []
    for batch in (images, images.roll(1, 0)):  # the same dropout and batch statistics
        torch.manual_seed(0)
        features.append(learner.train().representation(batch, normalise=False))
    one, two = features
    change = float(((one - two).norm(dim=1) / one.norm(dim=1)).min())
    assert change > 1e-6, f"by {change:.1e} of its length"  # rounding is 1e-7


def loss_is_finite(learner: BYOL, found: Subject) -> float:
    """The loss of the fixed views; their gradient is left in the parameters."""
    loss = loss_of(learner, found)
    loss.backward()
    losses = [loss.item()]
    if found.picture:
        with torch.no_grad():
            losses.append(learner.train()(found.images(5)).item())
    assert all(0 <= x <= 8 for x in losses), f"it is {losses}"
    return losses[0]


def loss_of(learner: BYOL, found: Subject) -> Tensor:
    """Of fixed views, with the same dropout each time."""
    torch.manual_seed(0)
    loss: Tensor = learner.train()(found.images(3), found.images(4))
    return loss


def gradient_reaches_all(learner: BYOL, found: Subject) -> None:
    named = dict(learner.net.named_parameters())
    ignored = {name.removeprefix("net.") for name in learner.ddp_ignored()}
    without = {name for name, p in named.items() if p.grad is None}
    assert without == ignored, f"{some(without ^ ignored)} ignored, or without a gradient"
    assert all(bool(p.grad.isfinite().all()) for p in named.values() if p.grad is not None)
    feature = found.feature(learner.net.eval(), found.images(6))
    grads = torch.autograd.grad(feature.sum(), list(named.values()), allow_unused=True)
    aside = {name for name, grad in zip(named, grads, strict=True) if grad is None}
    assert ignored == aside, f"{some(ignored ^ aside)} ignored, or not in the feature"


def step_lowers_the_loss(learner: BYOL, found: Subject, before: float) -> None:
    trained = [p for p in learner.parameters() if p.grad is not None]
    touched = [*trained, *learner.buffers()]  # batch statistics too
    kept = [x.detach().clone() for x in touched]
    after = []
    for lr in RATES:
        torch.optim.SGD(trained, lr).step()
        with torch.no_grad():
            after.append(loss_of(learner, found).item())
            torch._foreach_copy_(touched, kept)
        if after[-1] < before - 1e-5:
            return
    raise AssertionError(f"from {before:.5f} to {after}")


@torch.no_grad()
def copies_are_the_same(learner: BYOL, found: Subject, loss: float) -> None:
    twin = copy.deepcopy(learner)
    copied = loss_of(twin, found).item()
    assert abs(copied - loss) < 1e-6, f"the deepcopy's loss is {copied} instead of {loss}"
    for value in twin.state_dict().values():
        if value.is_floating_point():
            value.add_(0.1)
    twin.load_state_dict(learner.state_dict())
    images = found.images(7)
    ours, theirs = (m.eval().representation(images, normalise=False) for m in (learner, twin))
    assert torch.equal(ours, theirs), "the representation after load_state_dict differs"


def captured_alone(found: Subject, result: Result) -> bool:
    """Whether the model without BYOL is captured as one graph."""
    torch._dynamo.reset()
    try:
        net: Any = torch.compile(found.make().train(), fullgraph=True, backend="eager")
        net(found.images(0))
    except Exception as error:  # whatever dynamo finds
        result.reasons["captured alone"] = first_line(error)
        return False
    finally:
        torch._dynamo.reset()
    return True


def compiles_as_one_graph(learner: BYOL, found: Subject, loss: float) -> None:
    learner.compile(fullgraph=True, backend="eager")
    compiled = loss_of(learner, found)
    compiled.backward()
    assert abs(compiled.item() - loss) < 1e-4, f"the loss is {compiled} instead of {loss}"


def some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (" and others are" if len(names) > 3 else " are")


# The table ----------------------------------------------------------------------------------------


def read(path: Path) -> list[Result]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [Result(**json.loads(line)) for line in lines]


def one_line(result: Result) -> str:
    marks = "".join(mark(result, name) for name in CHECKS)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in result.reasons.items())
    return (
        f"{result.family:36}{marks}  {result.seconds:6.1f} s {result.mebibytes:6.0f} MiB  {reasons}"
    )


def mark(result: Result, name: str) -> str:
    if name not in result.checks:
        return " "
    return {True: "✓", False: "✗", None: "-"}[result.checks[name]]


def summary(results: list[Result]) -> str:
    able = [result for result in results if result.runs]
    passed = sum(result.passes for result in able)
    unable = len(results) - len(able)
    aside = f"; {unable} more do not run by themselves" if unable else ""
    return f"{passed} of {len(able)} families pass{aside}."


def document(results: list[Result]) -> str:
    """The table as Markdown, with what its columns say and what did not hold."""
    columns = ["family", "model", "D", "parameters", "input", *CHECKS, "s", "MiB"]
    lines = [
        "# Backbones",
        "",
        f"**{summary(results)}** Written by `python examples/benchmarks/backbones.py`, in "
        f"{sum(r.seconds for r in results) / 60:.0f} minutes of CPU time: {setting()}.",
        "",
        "Of every family the smallest model, with random weights, at a small size of the images "
        "where it allows one: every module file of timm.models, every family of "
        "torchvision.models and of torchvision.models.video, vision models of transformers by "
        "small configurations, and two plain networks. In batches of 3, on one thread a family; s "
        "is its CPU time, MiB its process's largest resident set, of which "
        f"{min((r.mebibytes for r in results if r.mebibytes), default=0):.0f} at most are the "
        "imports. D is the width of the representation.",
        "",
        *(f"- **{name}**: {text}." for name, text in CHECKS.items()),
        "",
        f"| {' | '.join(columns)} |",
        f"|{' --- |' * len(columns)}",
        *(row(result) for result in results),
        "",
        *reasons(results, "Families that do not run by themselves", "forward"),
        *reasons(results, "What does not hold", *CHECKS, "process"),
        *reasons(results, "Models that are not one graph by themselves", "captured alone"),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def row(result: Result) -> str:
    cells = [result.family, result.model, str(result.width), f"{result.parameters / 1e6:.2f} M"]
    cells += [" x ".join(map(str, result.shape)), *(mark(result, name) for name in CHECKS)]
    cells += [f"{result.seconds:.0f}", f"{result.mebibytes:.0f}"]
    return f"| {' | '.join(cells)} |"


def reasons(results: list[Result], title: str, *names: str) -> list[str]:
    found = [
        f"- {result.family}: {name + ', ' if len(names) > 1 else ''}{result.reasons[name]}"
        for result in results
        for name in names
        if name in result.reasons
    ]
    return [f"## {title}", "", *found, ""] if found else []


def setting() -> str:
    packages = ("torch", "torchvision", "timm", "transformers")
    versions = [f"{name} {version(name)}" for name in packages]
    return ", ".join([cpu(), f"Python {platform.python_version()}", *versions])


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    name = names[0].split(":")[1].strip() if names else platform.machine()
    return f"{name} ({os.cpu_count()} cores)"


if __name__ == "__main__":
    main()
