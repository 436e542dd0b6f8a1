"""gpu_day.py from start to end on a CPU, at toy size: nothing may stumble when a GPU is at hand."""

import importlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "examples" / "benchmarks" / "gpu_day.py"
STEPS = [
    "environment", "tests", "step, 224 px", "GradScaler", "views, 224 px", "CUDA graph",
    "processes", "step, 224 px, compiled", "step, 96 px", "step, 32 px",
    "views of kornia compiled, 224 px", "CIFAR-10 recipe",
]  # fmt: skip


def gpu_day(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=3000)


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """Noise in the layout of CIFAR-10's files."""
    folder = tmp_path / "cifar"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, count in (("train", 32), ("test", 16)):
        files = []
        for pixels in generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG")
            files.append(file.getvalue())
        data = np.frombuffer(b"".join(files), np.uint8)
        offsets = np.cumsum([0, *map(len, files)])
        np.savez(folder / f"{name}.npz", jpeg=data, offsets=offsets, labels=np.arange(count) % 4)
    return folder


def test_the_data_are_packed_where_git_does_not_see_them(cifar: Path, tmp_path: Path) -> None:
    done = gpu_day("--cifar", cifar, "--pack", tmp_path / "new" / "packed")
    assert done.returncode == 0, done.stderr
    for name in ("train.npz", "test.npz"):
        assert (tmp_path / "new/packed" / name).read_bytes() == (cifar / name).read_bytes()

    seen = SCRIPT.parent / "packed"
    done = gpu_day("--cifar", cifar, "--pack", seen)
    assert "is not ignored by git" in done.stderr
    assert not seen.exists()


def test_three_calls_are_enough_where_every_step_takes_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    day = importlib.import_module("gpu_day")
    file, clock = tmp_path / "day.jsonl", [0.0]

    def finish(command: list[str], limit: float) -> tuple[float, str]:
        clock[0] += limit
        return limit, "too slow"

    monkeypatch.setattr(day.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(day, "finish", finish)
    monkeypatch.setattr("sys.argv", ["gpu_day.py", "--results", str(file)])
    for _ in range(3):
        start = clock[0]
        day.main()
        assert clock[0] - start <= 540
    measured = {json.loads(line)["step"] for line in file.read_text().splitlines()}
    assert measured >= set(STEPS) - {"CIFAR-10 recipe"}


@pytest.mark.slow
def test_a_call_goes_on_from_the_results_and_a_failure_is_a_row(tmp_path: Path) -> None:
    file = tmp_path / "day.jsonl"
    rows = [["loss", "1.5"]]
    done = [step for step in STEPS if step not in ("environment", "step, 96 px")]
    line = {"card": "A100", "seconds": 1.0, "rows": rows}
    file.write_text("".join(json.dumps({"step": step, **line}) + "\n" for step in done))
    # step.py finds no peer in this folder.
    common = ("--device", "cpu", "--toy", "--results", file, "--peers", tmp_path)
    called = gpu_day(*common, "--budget", 89)
    assert called.returncode == 0, called.stderr
    assert "Still to come" not in called.stdout

    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines[len(done) :]] == ["environment", "step, 96 px"]
    what, value = lines[-1]["rows"][0]
    assert what == "failed"
    assert "byol_pytorch.py is not there" in value
    assert "| tests | A100 | loss | 1.5 |" in called.stdout.splitlines()
    assert "| step, 96 px | CPU | failed | " in called.stdout

    called = gpu_day(*common, "--budget", 0.01)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()[len(lines) :]] == [
        "environment"
    ]
    assert "| environment | unknown | failed | not done after 0 s" in called.stdout


@pytest.mark.slow
def test_the_whole_day_runs_on_a_cpu(cifar: Path, tmp_path: Path) -> None:
    file = tmp_path / "day.jsonl"
    called = gpu_day(
        "--device", "cpu", "--toy", "--results", file, "--data", cifar, "--budget", 2800
    )  # fmt: skip
    assert called.returncode == 0, called.stderr
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == STEPS
    found = {line["step"]: dict(line["rows"]) for line in lines}
    for step, rows in found.items():
        assert "failed" not in rows, (step, rows)
        assert not [value for value in rows.values() if "FAILED" in value], (step, rows)
    assert found["CIFAR-10 recipe"]["step"] == "2"
    assert "ms" in found["step, 96 px"]["byol_pytorch"]
    assert called.stdout.count("\n| ") >= 50
