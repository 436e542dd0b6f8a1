"""gpu_model.py counts what is known, and the views keep to what it modelled of them.

In processes of their own: torch and Triton remember what GPU they were told of.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch was built without CUDA"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is missing"),
]
KNOWN = """
import json, sys
sys.path.insert(0, sys.argv[1])
import gpu_model, torch
from torch._subclasses.fake_tensor import FakeTensorMode

def work():
    with FakeTensorMode(), torch.no_grad():
        x, y = (torch.empty(1024, 512, device="cuda:0") for _ in "12")
        function = lambda x, y: (x * 2 + y).relu().sigmoid() @ y.T
        torch.compile(function, backend=gpu_model.recorder, fullgraph=True)(x, y)

(model,) = gpu_model.model_of("known", work)
print(json.dumps([model.triton, model.extern, model.gigabytes, model.milliseconds["H100"],
                  [[k.registers, k.spilled] for k in model.kernels]]))
"""


def output_of(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_known_work_is_counted() -> None:
    triton, extern, gigabytes, milliseconds, kernels = json.loads(
        output_of("-c", KNOWN, str(BENCHMARKS)).splitlines()[-1]
    )
    assert (triton, extern) == (1, 1)  # all that goes by element is one kernel
    rows, columns = 1024, 512
    # x and y read, their function written; it and y read, the product written.
    expected = 4 * (3 * rows * columns + 2 * rows * columns + rows * rows) / 1e9
    assert gigabytes == pytest.approx(expected, rel=1e-6)
    assert milliseconds == pytest.approx(expected / 3350 * 1e3, rel=1e-6)
    ((registers, spilled),) = kernels
    assert 8 <= registers <= 64
    assert spilled == 0


@pytest.mark.parametrize("view", ["view 1", "view 2"])
def test_the_views_are_few_kernels_without_spills(view: str, tmp_path: Path) -> None:
    file, batch = tmp_path / "model.json", 8  # the number of kernels does not depend on it
    script = str(BENCHMARKS / "gpu_model.py")
    output_of(script, "--parts", view, "--batch-size", str(batch), "--json", str(file))
    (model,) = json.loads(file.read_text())["models"]
    assert model["launches"] == model["triton"] + model["extern"] <= 25
    assert 1 <= model["gigabytes"] * 256 / batch <= 3.3  # images in, views out: 0.2
    assert {kernel["spilled"] for kernel in model["kernels"]} == {0}
