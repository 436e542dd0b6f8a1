"""examples/ddp_minimal.py in one and in two processes: what it leaves, and that it goes on."""

import multiprocessing as mp
import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

EXAMPLES = str(Path(__file__).parents[1] / "examples")
sys.path.insert(0, EXAMPLES)

import ddp_minimal  # noqa: E402

from byol_pytorch import BYOL  # noqa: E402
from byol_pytorch.checkpoint import export_backbone, load  # noqa: E402

# One process runs this file, so that the uninterrupted run is done once.
pytestmark = pytest.mark.xdist_group("ddp_minimal")

# Forked from a server that has imported the script, so that each process starts at once.
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ddp_minimal", "test_ddp_minimal"])
STEPS = 3  # an epoch of 26 images, 8 a step
DEADLINE = 60.0


def nothing() -> None:
    pass


def die_in_the_second_epoch() -> None:
    rate = ddp_minimal.warmup_cosine

    def warmup_cosine(step: int, *others: Any) -> float:
        if step == STEPS + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return rate(step, *others)

    ddp_minimal.warmup_cosine = warmup_cosine


def work(
    rank: int, world: int, port: int, arguments: list[str], prepare: Callable[[], None]
) -> None:
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank))
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    output = Path(arguments[-1])
    sys.argv = ["ddp_minimal.py", *arguments]
    sys.stdout = open(output.parent / f"{output.name}-{rank}.txt", "a")  # noqa: SIM115
    ddp_minimal.IMAGE_SIZE, ddp_minimal.DECODED_SIZE = 32, 40
    ddp_minimal.LOG_EVERY, ddp_minimal.WORKERS = 1, 1
    mp.set_start_method("fork", force=True)  # of the worker
    seen: list[tuple[float, ...]] = []  # a number for each image of each step

    def small_learner(*args: Any, **kwargs: Any) -> BYOL:
        learner = BYOL(*args, **kwargs, projection_size=8, projection_hidden_size=16)
        learner.register_forward_pre_hook(
            lambda _, given: seen.append(tuple(given[0].float().mean((1, 2, 3)).tolist()))
        )
        return learner

    def export_and_keep(learner: BYOL, path: Path) -> None:
        export_backbone(learner, path)
        kept = {"learner": learner.state_dict(), "seen": seen}
        torch.save(kept, output.parent / f"{output.name}-{rank}.pt")

    ddp_minimal.BYOL = small_learner
    ddp_minimal.checkpoint.export_backbone = export_and_keep
    prepare()
    ddp_minimal.main()


def run(
    data: Path, output: Path, *, world: int, epochs: int, prepare: Callable[[], None] = nothing
) -> list[int | None]:
    """The exit codes of the script's processes."""
    given = {"--data": data, "--model": "test_resnet", "--epochs": epochs, "--batch": 8}
    arguments = [str(part) for flag in (given | {"--output": output}).items() for part in flag]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        CONTEXT.Process(target=work, args=(rank, world, port, arguments, prepare))
        for rank in range(world)
    ]
    with pytest.MonkeyPatch.context() as patch:  # for the server, which starts once
        patch.setenv("PYTHONPATH", f"{EXAMPLES}{os.pathsep}{Path(__file__).parent}", os.pathsep)
        for process in processes:
            process.start()
    for process in processes:
        process.join(DEADLINE)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(26):
        height, width = rng.integers(36, 90, 2)
        path = folder / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs in two processes, uninterrupted."""
    output = tmp_path_factory.mktemp("straight") / "run"
    assert run(data, output, world=2, epochs=2) == [0, 0]
    return output


def assert_equal(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def momenta(state: dict[str, Any]) -> dict[int, torch.Tensor]:
    return {index: of["momentum_buffer"] for index, of in state["optimizer"]["state"].items()}


def kept(output: Path, rank: int) -> dict[str, Any]:
    return torch.load(output.with_name(f"{output.name}-{rank}.pt"), weights_only=True)


def logged(output: Path, rank: int = 0) -> str:
    return output.with_name(f"{output.name}-{rank}.txt").read_text()


def test_two_processes_log_once_and_end_with_the_same_learner(straight):
    lines = re.findall(r"step (\d)/6  loss (\S+)  lr (\S+)  \d+ images/s", logged(straight))
    assert [int(step) for step, _, _ in lines] == [1, 2, 3, 4, 5, 6]
    assert all(0 < float(loss) < 8 for _, loss, _ in lines)
    assert re.findall(r"epoch (\d)/2 saved  feature_std \d", logged(straight)) == ["1", "2"]
    assert logged(straight, rank=1) == ""
    first, second = (kept(straight, rank)["learner"] for rank in range(2))
    assert_equal(first, second)
    assert_equal(first, load(straight / "last.pt")["learner"])


def test_two_processes_share_each_epoch_out_in_an_order_of_its_own(straight):
    seen = [kept(straight, rank)["seen"] for rank in range(2)]
    assert all(len(images) == 4 for steps in seen for images in steps)
    epochs = [
        [image for steps in seen for step in steps[i : i + 3] for image in step] for i in (0, 3)
    ]
    assert all(len(set(epoch)) == 24 for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_the_backbone_that_is_left_is_the_trained_one_and_timm_takes_it(straight):
    weights = load_file(straight / "backbone.safetensors")
    learner = load(straight / "last.pt")["learner"]
    assert_equal(weights, {name: learner[f"net.{name}"] for name in weights})
    net = timm.create_model(
        "test_resnet", num_classes=0, checkpoint_path=str(straight / "backbone.safetensors")
    )
    assert_equal(dict(net.state_dict()), weights)
    torch.manual_seed(0)
    untrained = timm.create_model("test_resnet", num_classes=0).state_dict()
    assert not torch.equal(weights["conv1.0.weight"], untrained["conv1.0.weight"])


def test_a_killed_run_goes_on_to_the_same_weights(data, straight, tmp_path):
    output = tmp_path / "run"
    codes = run(data, output, world=2, epochs=2, prepare=die_in_the_second_epoch)
    assert codes == [-signal.SIGKILL] * 2
    assert load(output / "last.pt")["epochs"] == 1
    assert not (output / "backbone.safetensors").exists()
    assert run(data, output, world=2, epochs=2) == [0, 0]
    one, two = (load(folder / "last.pt") for folder in (output, straight))
    assert_equal(one["learner"], two["learner"])
    assert_equal(momenta(one), momenta(two))
    one, two = (load_file(folder / "backbone.safetensors") for folder in (output, straight))
    assert_equal(one, two)
    steps = re.findall(r"step (\d)/6", logged(output))
    assert steps == ["1", "2", "3", "4", "4", "5", "6"]


def test_one_process_needs_no_torchrun(data, tmp_path):
    assert run(data, tmp_path / "run", world=1, epochs=1) == [0]
    assert "step 3/3" in logged(tmp_path / "run")
    assert load_file(tmp_path / "run" / "backbone.safetensors")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--epochs", "3"), "'epochs': 2, .*'epochs': 3, .*give another --output"),
        (("--batch", "27"), "27 with 1 processes and 26 images; expected"),
    ],
)
def test_it_refuses_what_cannot_go_on(data, straight, monkeypatch, changed, message):
    given = ("--data", str(data), "--model", "test_resnet", "--epochs", "2", "--batch", "8")
    monkeypatch.setattr(sys, "argv", ["", *given, "--output", str(straight), *changed])
    with pytest.raises(SystemExit, match=message):
        ddp_minimal.main()


def test_it_is_short_and_stands_alone():
    text = Path(ddp_minimal.__file__).read_text()
    assert len(text.splitlines()) <= 130
    siblings = {path.stem for path in Path(EXAMPLES).glob("*.py")}
    assert not siblings & set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
