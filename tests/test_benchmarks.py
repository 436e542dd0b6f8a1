"""step.py and augmentation.py of examples/benchmarks at their smallest: what they print and leave.

The times themselves mean nothing here.
"""

import importlib.util
import json
import runpy
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from itertools import product
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


def printed_rows(
    printed: str, names: list[str], width: int, *, words: int = 0
) -> list[list[float]]:
    """The numbers of the lines that start with the names, in the order in which they came; behind
    the names stand so many words."""
    lines = [line for line in printed.splitlines() if line[:width].strip() in names]
    return [[float(word) for word in line[width:].split()[words:]] for line in lines]


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
    tiny = ("--sizes", 32, "--batch", BATCH, "--rounds", 1, "--float", "--clock", "cpu")
    skip = () if compiled else ("--skip-compiled",)
    printed, figures = figures_of("augmentation.py", tmp_path / "new" / "views.json", *tiny, *skip)

    methods = [METHODS[0], "byol_pytorch, compiled", *METHODS[1:]] if compiled else METHODS
    rows = [row for row in figures["rows"] if row["method"] in methods]  # peers may be there
    of_rows = [(row["view"], row["images"], row["method"]) for row in rows]
    assert of_rows == list(product((1, 2, "both"), ("uint8", "float"), methods))
    for row, shown in zip(rows, printed_rows(printed, methods, 34, words=1), strict=True):
        assert shown[0] == pytest.approx(row["milliseconds"], abs=0.02)
        assert shown[-2:] == pytest.approx([row["times_ours"], row["times_ours_float"]], abs=0.02)
        assert row["milliseconds"] * row["images_per_second"] == pytest.approx(BATCH * 1e3, rel=0.1)
        assert row["peak_memory"] >= 1  # the views themselves

    by_row = dict(zip(of_rows, rows, strict=True))
    for (view, images, method), row in by_row.items():
        uint8, floats = (by_row[view, kind, METHODS[0]] for kind in ("uint8", "float"))
        for base, ratio in ((uint8, row["times_ours"]), (floats, row["times_ours_float"])):
            assert ratio == pytest.approx(row["milliseconds"] / base["milliseconds"], rel=0.02)
        if view == "both":
            parts = [by_row[part, images, method]["milliseconds"] for part in (1, 2)]
            assert row["milliseconds"] == pytest.approx(sum(parts), abs=0.01)


@pytest.mark.parametrize("module", ["torchtransform", "lightly"])
def test_a_peer_of_the_views_that_is_missing_is_named_and_left_out(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from augmentation_methods import available

    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    builders = available(Namespace(peers=None, skip_compiled=True, compile_kornia=False))
    assert [name for name in builders if name.startswith(module)] == []
    assert list(builders)[: len(METHODS)] == METHODS
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(module)]
    assert len(lines) == 1
    assert "is left out: " in lines[0] and "--peers FOLDER" in lines[0]


def test_ratios_of_views_are_taken_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from augmentation import median_ratio

    ours = [1.0, 10.0, 2.0]  # of a machine that was ten times as slow in the second round
    other = [3.0, 30.0, 20.0]  # and, here, in the third; the ratio of the medians is 10
    assert median_ratio(other, ours) == 3


@pytest.fixture
def refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The last line that a script ends with, where it prints nothing else before."""

    def run(script: str, *arguments: str) -> str:
        monkeypatch.syspath_prepend(BENCHMARKS)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit, match="2"):
            runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        printed = capsys.readouterr()
        assert not printed.out
        return printed.err.splitlines()[-1]

    return run


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--rounds", "0"), "--rounds 0; expected a number of at least 1"),
        (("--peers", "nowhere"), "--peers nowhere is no folder"),
        (("--device", "cuda", "--clock", "cpu"), "--clock cpu does not see what cuda does"),
    ],
)
def test_the_views_refuse_before_they_start(
    arguments: tuple[str, ...], sentence: str, refusal: Callable[..., str]
) -> None:
    assert sentence in refusal("augmentation.py", *arguments)


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
    arguments: tuple[str, ...], sentence: str, refusal: Callable[..., str]
) -> None:
    assert sentence in refusal("step.py", "--device", "cpu", *arguments)


@pytest.mark.skipif(importlib.util.find_spec("lightly") is not None, reason="lightly is there")
def test_workers_are_refused_without_lightly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", ["step.py", "--device", "cpu", "--workers", "2"])
    with pytest.raises(SystemExit, match="--workers times lightly, which is not there"):
        runpy.run_path(str(BENCHMARKS / "step.py"), run_name="__main__")
