"""Which images look alike by their embeddings: a table and a picture."""

from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import ImageOps
from torch import Tensor

from byol_pytorch.checkpoint import replacing
from byol_pytorch.evaluation.neighbours import nearest_neighbours
from parts.sources import Source, picture
from parts.tables import Cell, drawn

TILE = 112  # pixels of an image in the picture


@dataclass
class Answer:
    """A table, and rows of images with their captions."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    groups: list[list[int]]  # rows of the embeddings
    captions: list[list[str]]


def nearest(found: Tensor, names: list[str], queries: list[int], k: int) -> Answer:
    """The k nearest others of each query."""
    k = min(k, len(names) - 1)
    cosines, numbers = nearest_neighbours(found, found[queries], k=k + 1)
    others = numbers != torch.tensor(queries)[:, None]
    # Where more than k others are its equal, the query may be missing: then the last one goes.
    others[others.all(1), -1] = False
    closest = numbers[others].view(-1, k).tolist()
    near = cosines[others].view(-1, k).tolist()
    rows: list[list[Cell]] = [
        [names[q], *(f"{names[j]} ({c:.3f})" for j, c in zip(js, cs, strict=True))]
        for q, js, cs in zip(queries, closest, near, strict=True)
    ]
    return Answer(
        f"Nearest of {len(names)} images, and their cosine",
        ["query", *(f"{i + 1}." for i in range(k))],
        rows,
        [[q, *js] for q, js in zip(queries, closest, strict=True)],
        [["query", *(f"{c:.3f}" for c in cs)] for cs in near],
    )


def draw(path: Path, source: Source, kept: list[int], answer: Answer) -> None:
    """One row a group, its images from left to right with their captions; `kept` are the numbers of
    the embeddings' images."""
    columns = max(map(len, answer.groups))
    figure = Figure((1.3 * columns, 1.55 * len(answer.groups)), layout="constrained")
    axes = figure.subplots(len(answer.groups), columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for row, group, captions in zip(axes, answer.groups, answer.captions, strict=True):
        for ax, number, caption in zip(row, group, captions, strict=False):
            ax.imshow(ImageOps.fit(picture(source, kept[number]), (TILE, TILE)))
            name = drawn(Path(source.name(kept[number])).name)
            ax.set_title(f"{caption}\n{name}".strip(), fontsize=6)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=150)
