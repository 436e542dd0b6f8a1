"""Times weighted kNN classification against lightly's and scikit-learn's on the same features.

    pip install --target peers --no-deps lightly lightly_utils
    python examples/benchmarks/knn.py --peers peers --threads 1

Each contestant predicts the class of every query, with the same k and temperature; for several k
(`--k 10 20 100 200`, MMSelfSup's table) the others are called once for each. lightly is given the
queries in batches, as its own benchmark gives them. Each lives in a process of its own, and they
take turns, so that a busy machine slows all of them alike.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from byol_pytorch.evaluation.knn import TEMPERATURE, knn_predict

OURS, LIGHTLY, SKLEARN = "byol_pytorch", "lightly", "scikit-learn"


@dataclass(frozen=True)
class Row:
    contestant: str
    seconds: float  # median
    times_ours: float  # median over the rounds
    peak_mebibytes: float  # above what the features take
    same_class: float  # part of the queries for which it predicts what ours does


def main() -> None:
    args = parse_arguments()
    print(describe(args))
    tables = {classes: compare(classes, args) for classes in args.classes}
    for classes, rows in tables.items():
        print_table(classes, rows)
    if args.json:
        flags = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        rows_of = {classes: [asdict(row) for row in rows] for classes, rows in tables.items()}
        content = {**flags, "setting": describe(args), "rows": rows_of}
        args.json.write_text(json.dumps(content, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--bank", type=int, default=50_000, help="features that vote; default: %(default)s")
    add("--queries", type=int, default=10_000, help="default: %(default)s")
    add("--dim", type=int, default=512, help="values of a feature; default: %(default)s")
    add("--classes", type=int, nargs="+", default=[10, 1000], help="default: %(default)s")
    add("--k", type=int, nargs="+", default=[200], help="default: %(default)s")
    add("--rounds", type=int, default=5, help="of each; default: %(default)s")
    add("--batch", type=int, default=256, help="queries of a call to lightly; default: %(default)s")
    add(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: the processes' CPU time, for busy machines without GPU; default: %(default)s",
    )
    add("--threads", type=int, default=torch.get_num_threads(), help="of a CPU")
    add("--without", nargs="*", default=[], choices=[LIGHTLY, SKLEARN], help="contestants")
    add("--peers", type=Path, metavar="FOLDER", help="where lightly is installed")
    add("--json", type=Path, metavar="FILE", help="write the figures there as well")
    args = parser.parse_args()
    if args.peers and not (args.peers / "lightly").is_dir():
        parser.error(f"{args.peers / 'lightly'} is not there; see the first line of --help")
    if torch.device(args.device).type != "cpu":
        args.without.append(SKLEARN)
    if not args.peers:
        args.without.append(LIGHTLY)
    return args


def compare(classes: int, args: argparse.Namespace) -> list[Row]:
    names = [name for name in (OURS, LIGHTLY, SKLEARN) if name not in args.without]
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name in names:
        pipes[name], theirs = context.Pipe()
        context.Process(target=work, args=(name, classes, args, theirs), daemon=True).start()
        pipes[name].recv()
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name, pipe in pipes.items():
            pipe.send("go")
            times[name].append(pipe.recv())
    found, peaks = {}, {}
    for name, pipe in pipes.items():
        pipe.send("end")
        found[name], peaks[name] = pipe.recv()
    return [
        Row(
            name,
            statistics.median(times[name]),
            statistics.median(a / b for a, b in zip(times[name], times[OURS], strict=True)),
            peaks[name],
            statistics.fmean(a == b for a, b in zip(found[name], found[OURS], strict=True)),
        )
        for name in names
    ]


def work(name: str, classes: int, args: argparse.Namespace, pipe: Connection) -> None:
    torch.set_num_threads(args.threads)
    predict = contestant(name, classes, args)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    before, found = resident(args), torch.empty(0)
    pipe.send("ready")
    while pipe.recv() == "go":
        start = clock()
        found = predict()
        if torch.device(args.device).type == "cuda":
            torch.cuda.synchronize()
        pipe.send(clock() - start)
    pipe.send((found.tolist(), peak(args) - before))


def contestant(name: str, classes: int, args: argparse.Namespace) -> Callable[[], Tensor]:
    """A function that predicts the class (Nq, ks) of each query."""
    bank, labels, queries = (x.to(args.device) for x in features(classes, args))
    if name == OURS:
        return lambda: torch.cat(list(knn_predict(bank, labels, queries, k=args.k).values()), 1)
    if name == LIGHTLY:
        sys.path.append(str(args.peers))
        from lightly.utils.benchmarking.knn import knn_predict as lightly_predict

        turned = bank.T.contiguous()

        def of_lightly(k: int) -> Tensor:
            parts = queries.split(args.batch)
            found = [lightly_predict(x, turned, labels, classes, k, TEMPERATURE) for x in parts]
            return torch.cat([classes[:, 0] for classes in found])

        return lambda: torch.stack([of_lightly(k) for k in args.k], dim=1)
    import numpy as np
    from sklearn.neighbors import KNeighborsClassifier
    from threadpoolctl import threadpool_limits

    threadpool_limits(args.threads)
    model = KNeighborsClassifier(
        metric="cosine", algorithm="brute",
        weights=lambda distances: np.exp((1 - distances) / TEMPERATURE),
    ).fit(bank.numpy(), labels.numpy())  # fmt: skip

    def of_sklearn(k: int) -> Tensor:
        return torch.from_numpy(model.set_params(n_neighbors=k).predict(queries.numpy()))

    return lambda: torch.stack([of_sklearn(k) for k in args.k], dim=1)


def features(classes: int, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised, around one centre a class, and as hard to tell apart as trained features are."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, args.dim, generator=generator)
    labels = torch.randint(classes, (args.bank + args.queries,), generator=generator)
    noise = torch.randn(len(labels), args.dim, generator=generator)
    rows = F.normalize(centres[labels] + 3 * noise)
    return rows[: args.bank], labels[: args.bank], rows[args.bank :]


def resident(args: argparse.Namespace) -> float:
    """MiB that the features take. The peak is counted anew from here on, where that is possible."""
    if torch.device(args.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif (path := Path("/proc/self/clear_refs")).exists():
        path.write_text("5")
    return peak(args)


def peak(args: argparse.Namespace) -> float:
    """MiB: allocated on the GPU, or of a CPU the process's largest resident set."""
    if torch.device(args.device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts the parent's memory too, until exec
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on a Mac


def describe(args: argparse.Namespace) -> str:
    cuda = torch.device(args.device).type == "cuda"
    where = torch.cuda.get_device_name() if cuda else f"{args.threads} threads of a CPU"
    clock = "CPU time" if args.clock == "cpu" else "wall time"
    return (
        f"{args.bank} x {args.dim} bank, {args.queries} queries, k = {args.k}, float32, {where}, "
        f"{clock}, torch {torch.__version__}, median of {args.rounds}"
    )


def print_table(classes: int, rows: list[Row]) -> None:
    print(f"\n| {classes} classes | seconds | times ours | peak MiB more | same class |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        figures = f"{row.seconds:.2f} | {row.times_ours:.2f} | {row.peak_mebibytes:.0f}"
        print(f"| {row.contestant} | {figures} | {row.same_class:.4f} |")


if __name__ == "__main__":
    main()
