"""Embeddings of a folder of images, and which of them look alike.

    python examples/embed.py --data FOLDER --model resnet50 --checkpoint timm
    python examples/embed.py --data FOLDER --checkpoint FILE --query a.jpg b.jpg
    python examples/embed.py --data FOLDER --checkpoint FILE --duplicates 0.95

Nothing is trained. Leaves in OUTPUT: embeddings.npy (N, D) float32 and paths.txt, line by line the
images of its rows; a table (results.md, results.json) and a picture (neighbours.png) of the nearest
neighbours of the queries, by default of some images drawn by --seed, or of the pairs that are
nearly the same.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from parts import openmp  # noqa: F401, before torch

# isort: split

import numpy as np
import torch
from parts.backbone import Facts, open_backbone
from parts.flags import common_flags, set_up
from parts.labelled import Transform, evaluation_transform
from parts.machine import Machine
from parts.neighbours import Answer, draw, nearest
from parts.processes import fail, launch, tell
from parts.sources import Source, open_data, picture
from parts.tables import write_results, write_whole
from torch import Tensor
from torch.utils.data import Dataset

from byol_pytorch.checkpoint import replacing
from byol_pytorch.evaluation.neighbours import nearest_neighbours

QUERIES = 6  # drawn where none is given
SHOWN_PAIRS, LISTED = 12, 200  # at most, in the picture and in the table


@dataclass
class Readable(Dataset[tuple[Tensor, int]]):
    """Every image as `transform` makes it, and 1; zeros and 0 where it cannot be read."""

    source: Source
    transform: Transform
    size: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            return self.transform(picture(self.source, index)), 1
        except Exception:  # PIL's readers raise of every kind on a broken file
            return torch.zeros(3, self.size, self.size), 0


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    machine = set_up(args, join=False)
    source = open_data(args.data, args.max_value)[0]
    queries = query_numbers(args.query or [], source, args.data)
    if not args.query:
        order = np.random.default_rng(args.seed).permutation(len(source))
        queries = order[:QUERIES].tolist()
    net, facts = open_backbone(args)
    found, kept = embed(net, source, facts, machine)
    if len(kept) < 2:
        fail(f"only {len(kept)} of {len(source)} images in {args.data} can be read.")
    names = [source.name(i) for i in kept]
    with replacing(args.output / "embeddings.npy") as file:
        np.save(file, found.numpy())
    write_whole(args.output / "paths.txt", "".join(f"{name}\n" for name in names))
    if args.duplicates:
        answer = alike(found, names, args.duplicates)
    else:
        row = {number: i for i, number in enumerate(kept)}
        unreadable = [source.name(q) for q in queries if q not in row]
        if args.query and unreadable:
            fail(f"--query {unreadable[0]} cannot be read as an image.")
        answer = nearest(found, names, [row[q] for q in queries if q in row], args.k)
    write_results(args, answer.title, answer.columns, answer.rows, facts)
    if answer.groups:
        draw(args.output / "neighbours.png", source, kept, answer)
    drawn = ", and the picture" if answer.groups else ""
    tell(f"{len(names)} embeddings of {found.shape[1]} values{drawn} are in {args.output}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common_flags(parser, batch_size=64)
    add = parser.add_argument
    add("--query", nargs="+", metavar="FILE", help="images of the folder whose like is looked for")
    add("--k", type=int, default=7, help="neighbours of each query (default: %(default)s)")
    add("--duplicates", type=float, metavar="COSINE",
        help="list the pairs at such a cosine or a greater one instead, such as 0.95")  # fmt: skip
    args = parser.parse_args(argv)
    if args.k < 1:
        fail(f"--k {args.k}; expected 1 or more.")
    if args.duplicates is not None and not 0 < args.duplicates <= 1:
        fail(f"--duplicates {args.duplicates:g}; expected a cosine above 0 and up to 1.")
    if args.query and args.duplicates:
        fail("--query and --duplicates ask different questions: give one of them.")
    return args


def query_numbers(queries: list[str], source: Source, data: Path) -> list[int]:
    """The numbers of the query images in `source`."""
    by_name = {source.name(i): i for i in range(len(source))}
    found = []
    for query in queries:
        inside = Path(query).resolve()
        known = inside.is_relative_to(data.resolve())
        name = str(inside.relative_to(data.resolve())) if known else query
        if query not in by_name and name not in by_name:
            fail(f"--query {query} is not among the {len(by_name)} images of {data}. Give a "
                 f"path in that folder, such as {next(iter(by_name))}.")  # fmt: skip
        found.append(by_name.get(query, by_name.get(name, -1)))
    return found


def embed(
    net: torch.nn.Module, source: Source, facts: Facts, machine: Machine
) -> tuple[Tensor, list[int]]:
    """Embeddings (N, D) of the images that can be read, and their numbers."""
    transform = evaluation_transform(facts, whole=source.size is not None)
    try:
        found, readable = machine.features(net, Readable(source, transform, facts.image_size))
    except (ValueError, RuntimeError) as error:
        fail(str(error))
    bad = (readable == 0).nonzero().flatten().tolist()
    if bad:
        tell(f"{len(bad)} of {len(source)} images cannot be read and are left out, the first is "
             f"{source.name(bad[0])}")  # fmt: skip
    kept = (readable == 1).nonzero().flatten()
    return found[kept], kept.tolist()


def alike(found: Tensor, names: list[str], least: float) -> Answer:
    """The pairs at that cosine or a greater one, the most alike first."""
    pairs = near_duplicates(found, least)
    title = f"{len(pairs)} pairs of {len(names)} images at a cosine of {least:g} or more"
    if len(pairs) > LISTED:
        title += f", the first {LISTED}"
        closest = nearest_neighbours(found, k=1)[0].flatten()
        tell(
            "that is much for duplicates: one image in 100 has another at a cosine of "
            f"{closest.quantile(0.99):.4f} or more, which --duplicates could begin with"
        )
    return Answer(
        title,
        ["image", "its like", "cosine"],
        [[names[a], names[b], f"{cosine:.4f}"] for a, b, cosine in pairs[:LISTED]],
        [[a, b] for a, b, _ in pairs[:SHOWN_PAIRS]],
        [["", f"{cosine:.3f}"] for *_, cosine in pairs[:SHOWN_PAIRS]],
    )


def near_duplicates(found: Tensor, least: float, k: int = 20) -> list[tuple[int, int, float]]:
    """Pairs of rows at that cosine or more, the most alike first; up to k pairs of each row."""
    cosines, numbers = nearest_neighbours(found, k=min(k, len(found) - 1))
    first, place = (cosines >= least).nonzero(as_tuple=True)
    second, cosine = numbers[first, place], cosines[first, place]
    found_pairs = {
        (min(a, b), max(a, b)): c
        for a, b, c in zip(first.tolist(), second.tolist(), cosine.tolist(), strict=True)
    }
    pairs = [(a, b, c) for (a, b), c in found_pairs.items()]
    return sorted(pairs, key=lambda pair: (-pair[2], *pair[:2]))


if __name__ == "__main__":
    launch(main)
