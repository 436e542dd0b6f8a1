"""step.py and augmentation.py of examples/benchmarks at their smallest: what they print and leave.

The times themselves mean nothing here.
"""

import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"
BATCH = 4
CONTESTANTS = ["backbone alone (floor)", "byol_pytorch, ready views", "byol_pytorch"]
METHODS = [
    "byol_pytorch, eager", "kornia AugmentationSequential", "kornia nn.Sequential",
    "torchvision v2, per image", "torchvision v2, ONE draw a batch",
]  # fmt: skip


def figures_of(script: str, file: Path, *arguments: object) -> tuple[str, dict[str, Any]]:
    """What the script prints, and what it leaves in the file."""
    settings = ("--device", "cpu", "--threads", 1, "--json", file, *arguments)
    command = [sys.executable, str(BENCHMARKS / script), *map(str, settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(file.read_text())


def printed_rows(printed: str, names: list[str], width: int) -> list[list[float]]:
    """The numbers of the lines that start with the names, in the order in which they came."""
    lines = [line for line in printed.splitlines() if line[:width].strip() in names]
    return [[float(word) for word in line[width:].split()] for line in lines]


@pytest.mark.parametrize(
    "options",
    [
        (),
        pytest.param(("--compile",), marks=pytest.mark.slow),
        pytest.param(
            ("--dtype", "bfloat16", "--channels-last", "--clock", "cpu"), marks=pytest.mark.slow
        ),
    ],
)
def test_a_step_is_timed_against_the_floor(tmp_path: Path, options: tuple[str, ...]) -> None:
    tiny = ("--model", "test_resnet", "--image-size", 32, "--batch-size", BATCH, "--steps", 1)
    printed, figures = figures_of("step.py", tmp_path / "new" / "step.json", *tiny, *options)

    assert printed.splitlines()[0] == figures["setting"]
    assert ("compiled" in figures["setting"]) == figures["compile"] == ("--compile" in options)
    assert ("bfloat16, channels_last" in figures["setting"]) == ("--channels-last" in options)

    rows = figures["rows"][:3]
    assert [row["contestant"] for row in rows] == CONTESTANTS  # lightly may follow
    assert rows[0]["times_floor"] == 1
    for row, shown in zip(rows, printed_rows(printed, CONTESTANTS, 34), strict=True):
        milliseconds, images_per_second, times_floor, peak = shown
        assert milliseconds == pytest.approx(row["milliseconds"], abs=0.06)
        assert images_per_second == pytest.approx(BATCH * 1e3 / row["milliseconds"], abs=0.06)
        assert times_floor == pytest.approx(row["times_floor"], abs=6e-4)
        assert peak == pytest.approx(row["peak_mebibytes"], abs=0.6)
        assert peak > 100

    parts = figures["parts_milliseconds"]
    assert min(parts.values()) > 0
    for name in ("EMA", "SGD", "LARS"):
        assert f"{name} {parts[name]:.2f} ms" in printed
    assert f"LARS takes {parts['LARS'] / parts['SGD']:.2f} times torch's SGD" in printed


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
def test_the_views_are_timed_against_stock_ones(tmp_path: Path, compiled: bool) -> None:
    tiny = ("--sizes", 32, "--batch", BATCH, "--rounds", 1)
    skip = () if compiled else ("--skip-compiled",)
    printed, figures = figures_of("augmentation.py", tmp_path / "new" / "views.json", *tiny, *skip)

    methods = [METHODS[0], "byol_pytorch, compiled", *METHODS[1:]] if compiled else METHODS
    rows = [row for row in figures["rows"] if row["method"] in methods]  # lightly may be there
    of_rows = [(row["view"], row["method"]) for row in rows]
    assert of_rows == [(view, method) for view in (1, 2) for method in methods]
    for row, shown in zip(rows, printed_rows(printed, methods, 36), strict=True):
        assert shown[0] == pytest.approx(row["milliseconds"], abs=0.02)
        assert row["milliseconds"] * row["images_per_second"] == pytest.approx(BATCH * 1e3, rel=0.1)
        assert row["peak_memory"] >= 1  # the views themselves
        if row["method"] == METHODS[0]:
            assert row["times_ours"] == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--model", "resnet5"), "--model resnet5 is unknown to timm"),
        (("--steps", "0"), "--steps 0; expected a number of at least 1"),
        (("--peers", "nowhere"), "byol_pytorch.py is not there"),
        (("--workers", "2", "--clock", "cpu"), "--workers needs --clock wall"),
        (("--workers", "0"), "--workers 0; expected a number of at least 1"),
    ],
)
def test_the_step_refuses_before_it_starts(
    arguments: tuple[str, ...],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", ["step.py", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(BENCHMARKS / "step.py"), run_name="__main__")
    printed = capsys.readouterr()
    assert sentence in printed.err.splitlines()[-1]
    assert not printed.out


@pytest.mark.skipif(importlib.util.find_spec("lightly") is not None, reason="lightly is there")
def test_workers_are_refused_without_lightly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", ["step.py", "--device", "cpu", "--workers", "2"])
    with pytest.raises(SystemExit, match="--workers times lightly, which is not there"):
        runpy.run_path(str(BENCHMARKS / "step.py"), run_name="__main__")
