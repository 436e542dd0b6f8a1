"""What the example scripts have OpenMP do while it waits, as it is when torch is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# ddp_minimal.py is for pasting, and imports no file beside it.
SCRIPTS = sorted(
    p.name
    for p in EXAMPLES.glob("*.py")
    if "__main__" in p.read_text() and p.name != "ddp_minimal.py"
)
# Runs a script until it first asks for a library that may load OpenMP.
UNTIL_TORCH = """
import os, runpy, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "sklearn", "timm"):
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
sys.path.insert(0, os.path.dirname(sys.argv[1]))
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def spins(script: str, **settings: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", UNTIL_TORCH, str(EXAMPLES / script)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=kept | settings, check=True, timeout=60
    )
    return done.stdout.strip()


def test_there_are_scripts():
    assert {"quickstart.py", "imagenet_ddp.py", "finetune_classification.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_waiting_threads_of_a_script_give_their_core_up_soon(script):
    assert spins(script) == "10000"


def test_settings_of_the_user_stay():
    assert spins("quickstart.py", GOMP_SPINCOUNT="7") == "7"
    assert spins("quickstart.py", OMP_WAIT_POLICY="active") == "None"
    assert spins("quickstart.py", OMP_NUM_THREADS="2") == "10000"


def test_the_suite_runs_so_too():
    assert os.environ["GOMP_SPINCOUNT"] or os.environ["OMP_WAIT_POLICY"]
