"""The scaling calculator: its table is the arithmetic that it states, its inputs are measured."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "benchmarks" / "scaling.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_table_is_what_its_assumptions_give(tmp_path: Path) -> None:
    step = {"setting": "a GPU", "rows": [{"contestant": "byol_pytorch", "images_per_second": 800}]}
    (tmp_path / "step.json").write_text(json.dumps(step))
    done = run(
        "--step", tmp_path / "step.json", "--decode-rate", 40, "--cores", 16, "--model", "resnet18",
        "--images", 409_600, "--price", 3, "--network", 2, "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "out.json").read_text())
    backbone = sum(p.numel() for p in timm.create_model("resnet18", num_classes=0).parameters())
    projector = 512 * 4096 + 4096 + 2 * 4096 + 4096 * 256
    predictor = 256 * 4096 + 4096 + 2 * 4096 + 4096 * 256
    # Each of four head forwards shares the sums and the squares of 4096 features.
    size = 4 * (backbone + projector + predictor + 4 * 2 * 2 * 4096)
    assert table["bytes"] == size
    rows = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["rows"]}
    one, many = rows["1"], rows["128"]
    # One GPU: 100 steps an epoch of 4096 / 800 s, against 4096 / (16 x 40) s of decoding.
    assert (one["step ms"], one["data ms"], one["limit"]) == ("5120", "6400", "data")
    assert float(one["300 epochs, hours"]) == pytest.approx(300 * 100 * 6.4 / 3600, abs=0.05)
    assert one["300 epochs, cost"] == f"{300 * 100 * 6.4 / 3600 * 3:,.0f}"
    reduction = 2 * 127 / 128 * size / 2e9
    assert many["all-reduce ms"] == f"{1e3 * reduction:.0f}"
    seconds = 4096 / 128 / 800 + reduction
    assert many["limit"] == "all-reduce"
    assert float(many["1000 epochs, hours"]) == pytest.approx(1e5 * seconds / 3600, abs=0.05)
    assert "below 20.0 CPU cores a GPU" in done.stdout


def test_decoding_is_timed_on_the_data(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (12, 80, 100, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.jpg")
    done = run(
        "--rate", 500, "--data", tmp_path / "images", "--seconds", 0.3, "--model", "resnet18",
        "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["decode_rate"] > 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--decode-rate", 5), "give either --step"),
        (("--rate", 5), "give either --data"),
        (("--rate", -5, "--decode-rate", 5), "--rate -5.0; expected above 0"),
        (("--step", "absent.json", "--decode-rate", 5), "is not what step.py --json writes"),
    ],
)
def test_wrong_inputs_are_named(arguments: tuple[object, ...], sentence: str) -> None:
    done = run(*arguments)
    assert done.returncode and sentence in done.stderr
