"""Where the results of an evaluation go: a printed table, Markdown and JSON."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from byol_pytorch.checkpoint import replacing
from parts.backbone import Facts
from parts.processes import tell

Cell = str | float | None  # of a table: None is a figure that does not exist


def write_results(
    args: argparse.Namespace,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    facts: Facts | None = None,
    more: dict[str, Any] | None = None,
) -> None:
    """Print the table; write it to OUTPUT/results.md, and with the flags to the JSON file."""
    table = "\n".join([f"**{title}**", "", markdown(columns, rows)])
    flags = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    content = {"title": title, "columns": list(columns), "rows": [list(row) for row in rows]}
    content |= {"backbone": asdict(facts) if facts else None, "flags": flags, **(more or {})}
    write_whole(args.output / "results.md", table + "\n")
    write_whole(args.json or args.output / "results.json", json.dumps(content, indent=1) + "\n")
    tell(f"\n{table}\n")


def drawn(name: str, width: int = 18) -> str:
    """A name as matplotlib can draw it: cut with an ellipsis; what its font lacks is escaped."""
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    if len(name) > width:
        name = f"…{name[1 - width :]}"
    known = "".join(c if font.get_char_index(ord(c)) else ascii(c)[1:-1] for c in name)
    return known.replace("$", r"\$")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    def line(cells: Sequence[Cell]) -> str:
        shown = ("" if c is None else f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells)
        return f"| {' | '.join(shown)} |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, rows)])


def write_whole(path: Path, text: str) -> None:
    """Write `text` such that the old or the new file is there at every moment."""
    with replacing(path) as file:
        file.write(text.encode())
