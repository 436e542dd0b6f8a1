"""examples/benchmarks/accuracy.py: its rungs' images, what its table says, and that it goes on."""

import argparse
import io
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
sys.path.insert(0, str(BENCHMARKS.parent))

import accuracy  # noqa: E402
import accuracy_parts  # noqa: E402
from accuracy import METHODS, OURS, Outcome, Run  # noqa: E402

PEER, LIGHTLY = METHODS[-2:]


def colour(kind: int) -> tuple[int, int, int]:
    return ((250, 0, 0), (0, 250, 0), (0, 0, 250))[kind]


@pytest.fixture
def bccd(tmp_path: Path) -> Path:
    """Photographs of 200 x 160 px with a square of 96 px for each of three kinds of cell."""
    root = tmp_path / "bccd"
    for folder in ("ImageSets/Main", "JPEGImages", "Annotations"):
        (root / folder).mkdir(parents=True)
    kinds = ("Platelets", "RBC", "WBC")
    for split, names in {"trainval": "abcdefg", "test": "h"}.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
        for name in names:
            pixels = np.full((160, 200, 3), 128, np.uint8)
            things = ""
            for number, (left, top) in enumerate(((0, 0), (104, 0), (60, 64))):
                pixels[top : top + 96, left : left + 96] = colour(number)
                box = f"<xmin>{left}</xmin><ymin>{top}</ymin>"
                box += f"<xmax>{left + 96}</xmax><ymax>{top + 96}</ymax>"
                things += f"<object><name>{kinds[number]}</name><bndbox>{box}</bndbox></object>"
            Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
            (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{things}</annotation>")
    return root


def test_a_cell_is_in_the_middle_of_its_window(bccd: Path) -> None:
    rung = accuracy_parts.cells(argparse.Namespace(bccd=bccd), a_photograph=4)
    assert rung.train.shape == (7 * 4, 3, 32, 32)
    assert (rung.bank.shape, rung.test.shape) == ((21, 3, 32, 32), (3, 3, 32, 32))
    for images, labels in ((rung.bank, rung.bank_labels), (rung.test, rung.test_labels)):
        for image, label in zip(images, labels.tolist(), strict=True):
            middle = image[:, 14:18, 14:18].float().mean((1, 2))
            assert (middle - torch.tensor(colour(label))).abs().max() < 40


def test_cifar10_is_read_from_jpeg_files_end_to_end(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("train", "test"):
        pictures = [Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)) for _ in range(7)]
        files = []
        for picture in pictures:
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG")
            files.append(buffer.getvalue())
        ends, labels = np.cumsum([0, *map(len, files)]), np.arange(7)
        jpeg = np.frombuffer(b"".join(files), np.uint8)
        np.savez(tmp_path / f"{name}.npz", jpeg=jpeg, offsets=ends, labels=labels)
    rung = accuracy_parts.cifar10(argparse.Namespace(cifar=tmp_path), train=5, test=7)
    assert (len(rung.train), len(rung.test)) == (5, 7)
    last = np.asarray(Image.open(io.BytesIO(files[6])))
    assert (rung.test[6].permute(1, 2, 0).numpy() == last).all()
    assert rung.test_labels.tolist() == list(range(7))


def test_a_search_never_sees_the_test_images(bccd: Path) -> None:
    rung = accuracy_parts.cells(argparse.Namespace(bccd=bccd), a_photograph=4)
    searching = rung.tuning()
    assert torch.equal(searching.test, rung.bank[4::5])
    assert len(searching.bank) + len(searching.test) == len(rung.bank)
    assert torch.equal(searching.train, rung.train)


def outcomes(values: dict[str, list[float]]) -> tuple[list[Run], dict[Run, Outcome]]:
    runs = {
        Run("cells", method, seed, 10, 1e-3): Outcome(value, value, 1.0, 0.0)
        for method, each in values.items()
        for seed, value in enumerate(each)
    }
    return list(runs), runs


def test_a_lead_is_more_than_two_standard_errors() -> None:
    # Deviations 1 and 1: the error of the difference is sqrt(2 / 3), twice that 1.63.
    ours = [50.0, 51.0, 52.0]
    runs, done = outcomes({OURS: ours, PEER: [48.3, 49.3, 50.3], LIGHTLY: [48.4, 50.4, 49.4]})
    said = accuracy.verdict("cells", "few", runs, done, [OURS, PEER, LIGHTLY])
    assert said == (
        f"few labels: leads {PEER} "
        "(+1.7, two standard errors 1.6, p 0.11, paired 0.00; by seed +1.7, +1.7, +1.7); "
        f"no clear difference from {LIGHTLY} "
        "(+1.6, two standard errors 1.6, p 0.12, paired 0.11; by seed +1.6, +0.6, +2.6)"
    )
    runs, done = outcomes({OURS: ours, PEER: [60.0, 60.1, 59.9], LIGHTLY: ours})
    said = accuracy.verdict("cells", "all", runs, done, [OURS, PEER, LIGHTLY])
    trails = f"trails {PEER} (-9.0, two standard errors 1.2, p 0.00, paired 0.00; by seed -10.0, "
    assert f"{trails}-9.1, -7.9)" in said


def test_one_seed_decides_nothing() -> None:
    runs, done = outcomes({OURS: [50.0], PEER: [10.0], LIGHTLY: [90.0]})
    said = accuracy.verdict("cells", "few", runs, done, [OURS, PEER, LIGHTLY])
    assert said.count("no clear difference from") == 2


def test_what_was_cut_short_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (Run("cells", OURS, seed, 10, 1e-3) for seed in (0, 1))
    outcome = Outcome(1.0, 2.0, 3.0, 4.0)
    line = json.dumps({"run": vars(one), "outcome": vars(outcome)})
    (tmp_path / "runs.jsonl").write_text(f"{line}\n{line[: line.index('}') + 1]}")
    args = argparse.Namespace(output=tmp_path, jobs=1)
    done = accuracy.finished(args)
    assert done == {one: outcome}
    monkeypatch.setattr(accuracy, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    monkeypatch.setattr(accuracy, "carry_out_one", lambda run, _: Outcome(run.seed, 0, 0, 0))
    accuracy.carry_out([one, two], done, args)
    assert accuracy.finished(args) == {one: outcome, two: Outcome(1, 0, 0, 0)}


def test_a_run_moves_the_backbone_and_is_repeatable(
    bccd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "BATCH", 8)
    args = argparse.Namespace(bccd=bccd, peers=tmp_path)
    evaluated: list[tuple[dict[str, torch.Tensor], accuracy_parts.Rung]] = []

    def accuracies(net: Any, rung: accuracy_parts.Rung) -> tuple[float, float]:
        evaluated.append(({name: p.clone() for name, p in net.named_parameters()}, rung))
        return 0.0, 0.0

    monkeypatch.setattr(accuracy, "accuracies", accuracies)
    untrained = accuracy.carry_out_one(Run("cells", "untrained", 0, 0, 0.0), args)
    assert math.isnan(untrained.loss)
    one, two = (accuracy.carry_out_one(Run("cells", OURS, 0, 2, 1e-3), args) for _ in range(2))
    assert 0 < one.loss == two.loss < 8
    assert one.seconds > 0
    (before, rung), (after, _), (again, _) = evaluated
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(after[name], again[name]) for name in after)

    accuracy.carry_out_one(Run("cells", OURS, 0, 1, 1e-3, tuning=True), args)
    assert torch.equal(evaluated[-1][1].test, rung.bank[4::5])


@pytest.mark.slow
def test_the_table_is_written_and_a_second_start_runs_nothing(
    bccd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "METHODS", (OURS,))
    for package in ("byol_pytorch", "lightly"):
        (tmp_path / package).mkdir()
    flags = ["--peers", tmp_path, "--bccd", bccd, "--steps", 2, "--seeds", 2]
    monkeypatch.setattr(sys, "argv", [*map(str, ["x", *flags, "--output", tmp_path / "out"])])
    accuracy.main()
    lines = (tmp_path / "out" / "table.md").read_text()
    assert lines.count(f"| {OURS} |") == 2  # photographs and cells
    monkeypatch.setattr(accuracy, "carry_out_one", None)
    accuracy.main()
    assert (tmp_path / "out" / "table.md").read_text() == lines
