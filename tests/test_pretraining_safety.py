"""examples/imagenet_ddp.py in real processes: stopped, killed, resumed, split up, starved."""

import io
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Container
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pretraining_helpers import (
    DEADLINE,
    EXAMPLES,
    NORM_FREE,
    TINY,
    Job,
    assert_same,
    flat,
    imagenet_ddp,
    log,
    notes,
    plan_of,
    resume,
    run_here,
    state,
    write_folder,
    write_npz,
)
from safetensors.torch import load_file

pytestmark = pytest.mark.xdist_group("pretraining safety")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_npz(tmp_path_factory.mktemp("npz"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """An uninterrupted run on the folder, and what it left."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    Job(output, "--data", folder, *TINY, "--accumulate", 2).ends_well()
    return output


@pytest.fixture(scope="module")
def norm_free(tmp_path_factory: pytest.TempPathFactory, npz: Path) -> Path:
    """An uninterrupted run of one process, whose result does not depend on their number."""
    output = tmp_path_factory.mktemp("runs") / "norm_free"
    Job(output, "--data", npz, *NORM_FREE).ends_well()
    return output


# Stopped and resumed ------------------------------------------------------------------------------


def test_a_run_leaves_its_state_its_log_a_picture_and_the_backbone(whole: Path) -> None:
    left = {path.name for path in whole.iterdir() if "tfevents" not in path.name}
    assert left == {".lock", "last.pt", "log.jsonl", "views.png", "backbone.safetensors"}
    figures = [line for line in log(whole) if "loss" in line]
    assert [line["step"] for line in figures] == list(range(1, 13))
    assert all(0 < line["loss"] < 8 for line in figures)
    parts = ("lr", "ema_decay", "grad_norm", "images_per_second", "memory_gib")
    clock = ("data_ms", "views_ms", "step_ms", "update_ms")
    assert all(line[name] >= 0 for line in figures for name in (*parts, *clock))
    health = [line for line in log(whole) if "feature_std" in line]
    assert [line["step"] for line in health] == [1, 4, 8, 12]
    assert all(line["effective_rank"] >= 1 for line in health)
    assert figures[0]["lr"] == 0  # warm-up starts from 0
    assert figures[3]["lr"] == pytest.approx(0.2)
    with Image.open(whole / "views.png") as picture:
        assert np.asarray(picture).std() > 10


def test_a_signal_in_mid_epoch_saves_and_the_resumed_run_equals_an_uninterrupted_one(
    whole: Path, folder: Path, tmp_path: Path
) -> None:
    command = ("--data", folder, *TINY, "--accumulate", 2, "--save-every", 100)
    for number, step, workers in ((signal.SIGTERM, 2, 2), (signal.SIGUSR1, 7, 1)):
        job = Job(tmp_path / "run", *command, "--workers", workers)
        job.until(step)
        job.signal(number, group=True)  # the data workers get it as well
        job.ends_well()
        assert "asked to stop: saved" in notes(tmp_path / "run")
        reached = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["progress"]["step"]
        assert step <= reached < 12
    Job(tmp_path / "run", *command).ends_well()
    assert_same(tmp_path / "run", whole)
    logged = [line["step"] for line in log(tmp_path / "run") if "loss" in line]
    assert logged == list(range(1, 13))


@pytest.mark.parametrize("group", [True, False], ids=["all", "trainer alone"])
def test_ctrl_c_saves_says_so_in_a_sentence_and_ends_with_130(
    group: bool, whole: Path, folder: Path, tmp_path: Path
) -> None:
    command = ("--data", folder, *TINY, "--accumulate", 2, "--save-every", 100)
    job = Job(tmp_path / "run", *command, "--workers", 2)
    job.until(3)
    job.signal(signal.SIGINT, group=group)
    assert job.end() == [130]
    assert "Traceback" not in job.text()
    assert "asked to stop: saved" in notes(tmp_path / "run")
    assert 3 <= torch.load(tmp_path / "run" / "last.pt")["progress"]["step"] < 12
    Job(tmp_path / "run", *command).ends_well()
    assert_same(tmp_path / "run", whole)


def hang_at(step: int) -> None:
    """Let the views of a step take forever."""
    draw = imagenet_ddp.Views.draw

    def hanging(self: Any, now: int) -> Any:
        while now == step:
            time.sleep(DEADLINE)
        return draw(self, now)

    imagenet_ddp.Views.draw = hanging


def test_a_second_ctrl_c_ends_a_run_that_hangs(npz: Path, tmp_path: Path) -> None:
    job = Job(tmp_path / "run", "--data", npz, *TINY, prepare=partial(hang_at, 2))
    job.until(2)
    job.signal(signal.SIGINT)
    job.processes[0].join(1.2)  # one that follows at once may be torchrun's, of the same key
    assert job.processes[0].is_alive()
    job.signal(signal.SIGINT)
    assert job.end(10) == [130]
    assert "Traceback" not in job.text()


@pytest.mark.slow
def test_ctrl_c_under_torchrun_saves(npz: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += [os.path.join(EXAMPLES, "imagenet_ddp.py"), "--data", npz, *TINY, "--steps", 10**6]
    command += ["--save-every", 10**6, "--output", tmp_path / "run"]
    process = subprocess.Popen(
        [*map(str, command)], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + DEADLINE
    while max((line["step"] for line in log(tmp_path / "run")), default=0) < 5:
        assert time.monotonic() < end
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    process.communicate(timeout=DEADLINE)
    assert "asked to stop: saved" in notes(tmp_path / "run")
    assert torch.load(tmp_path / "run" / "last.pt")["progress"]["step"] >= 5


def kill_repeatedly(times: int, folder: Path, output: Path, steps: int) -> None:
    command = ("--data", folder, *TINY, "--steps", steps)
    Job(output / "whole", *command).ends_well()
    draw = random.Random(0)
    for kill in range(times):
        job = Job(output / "killed", *command)
        job.until(max(1, (kill + 1) * steps // (times + 2)))
        time.sleep(draw.uniform(0, 0.1))
        job.signal(signal.SIGKILL)
        job.end()
        before = log(output / "killed")[-1]["step"]
        if (output / "killed" / "last.pt").exists():
            saved = torch.load(output / "killed" / "last.pt", weights_only=True)
            assert saved["progress"]["step"] >= before - 2  # --save-every
    Job(output / "killed", *command).ends_well()
    assert_same(output / "killed", output / "whole")
    assert not list((output / "killed").glob(".*.tmp"))


def test_killed_at_random_moments_it_ends_with_the_same_weights(
    folder: Path, tmp_path: Path
) -> None:
    kill_repeatedly(3, folder, tmp_path, steps=20)


@pytest.mark.slow
def test_killed_20_times_it_ends_with_the_same_weights(folder: Path, tmp_path: Path) -> None:
    kill_repeatedly(20, folder, tmp_path, steps=110)


def test_a_finished_run_is_left_as_it_is_also_where_its_data_moved(
    whole: Path, folder: Path, tmp_path: Path
) -> None:
    before = flat(state(whole))
    shutil.copytree(folder, tmp_path / "moved")
    run_here(whole, "--data", tmp_path / "moved", *TINY, "--accumulate", 2)
    after = flat(state(whole))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_changed_recipe_is_refused_with_the_difference(whole: Path, folder: Path) -> None:
    before = (whole / "last.pt").read_bytes()
    changed = ("--weight-decay", 0.5, "--seed", 3, "--accumulate", 2)
    with pytest.raises(SystemExit) as caught:
        run_here(whole, "--data", folder, *TINY, *changed)
    said = str(caught.value)
    assert "weight-decay: 1e-06 there, 0.5 now" in said
    assert "seed: 0 there, 3 now" in said
    assert "image-size" not in said
    assert (whole / "last.pt").read_bytes() == before


def test_a_flag_that_the_state_does_not_know_and_nobody_gave_is_no_difference(
    tmp_path: Path,
) -> None:
    torch.save({"identity": {"lr": "1"}, "step": 3}, tmp_path / "last.pt")
    state = resume.read_state(tmp_path / "last.pt", {"lr": "1", "max_value": "None"})
    assert state is not None and state["step"] == 3
    with pytest.raises(SystemExit, match="max-value: None there, 9 now"):
        resume.read_state(tmp_path / "last.pt", {"lr": "1", "max_value": "9"})


def test_other_images_are_refused(whole: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "data", count=25)
    with pytest.raises(SystemExit, match="images: 24 there, 25 now"):
        run_here(whole, "--data", tmp_path / "data", *TINY, "--accumulate", 2)


def test_a_second_run_in_the_same_folder_is_refused(npz: Path, tmp_path: Path) -> None:
    job = Job(tmp_path / "run", "--data", npz, *TINY, "--steps", 1000)
    job.until(1)
    second = Job(tmp_path / "run", "--data", npz, *TINY, "--steps", 1000)
    assert second.end() == [1]
    assert "another run is writing to" in second.text()
    job.signal(signal.SIGTERM)
    job.ends_well()


# Several processes --------------------------------------------------------------------------------


def test_two_ranks_under_torchrun_equal_one(norm_free: Path, npz: Path, tmp_path: Path) -> None:
    arguments = ("--data", npz, *NORM_FREE, "--output", tmp_path / "two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    script = os.path.join(EXAMPLES, "imagenet_ddp.py")
    done = subprocess.run(
        [*command, script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "two", norm_free, exactly=False)


def test_another_number_of_processes_goes_on_in_the_same_order_and_says_so(
    norm_free: Path, npz: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    first = Job(output, "--data", npz, *NORM_FREE, "--save-every", 100, world=2)
    first.until(4)
    first.signal(signal.SIGUSR1, rank=1)  # one rank is told, both stop at the same step
    first.ends_well()
    assert 4 <= torch.load(output / "last.pt", weights_only=True)["progress"]["step"] < 12
    Job(output, "--data", npz, *NORM_FREE, "--accumulate", 1).ends_well()
    assert "processes 1 instead of 2" in notes(output)
    assert "the same images in the same order" in notes(output)
    assert_same(output, norm_free, exactly=False)


def test_sharded_ranks_equal_one_and_resume_an_unsharded_run(
    norm_free: Path, npz: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    first = Job(output, "--data", npz, *NORM_FREE, "--save-every", 100)
    first.until(4)
    first.signal(signal.SIGTERM)
    first.ends_well()
    Job(output, "--data", npz, *NORM_FREE, "--fsdp", world=2).ends_well()
    assert_same(output, norm_free, exactly=False)
    backbones = [load_file(o / "backbone.safetensors") for o in (output, norm_free)]
    assert backbones[0].keys() == backbones[1].keys()


@pytest.mark.parametrize("how", [("--accumulate", 2), ("--fsdp", "--optimizer", "adamw")])
def test_two_ranks_that_were_stopped_equal_two_that_were_not(
    how: tuple[object, ...], npz: Path, tmp_path: Path
) -> None:
    command = ("--data", npz, *TINY, *how, "--lr", 0.01, "--save-every", 100)
    Job(tmp_path / "whole", *command, world=2).ends_well()
    job = Job(tmp_path / "stopped", *command, world=2)
    job.until(4)
    job.signal(signal.SIGTERM)
    job.ends_well()
    Job(tmp_path / "stopped", *command, world=2).ends_well()
    assert "goes on from last.pt" in notes(tmp_path / "stopped")
    assert_same(tmp_path / "stopped", tmp_path / "whole")


def views_of(rank: int, world: int, *arguments: object) -> Any:
    statistics = (0.5,) * 3, (0.25,) * 3
    return imagenet_ddp.Views(*plan_of(rank, world, *arguments), statistics)


def test_ranks_draw_different_views_that_do_not_depend_on_their_number(npz: Path) -> None:
    images = torch.randint(0, 255, (1, 3, 32, 32), dtype=torch.uint8).expand(8, 3, 32, 32)
    made = {}
    for world in (1, 2):
        for rank in range(world):
            views = views_of(rank, world, "--data", npz, *TINY)
            part = [images[: 8 // world]]
            made[world, rank] = torch.stack(views.make(part, views.draw(5), 0))
    assert not torch.equal(made[2, 0], made[2, 1])
    torch.testing.assert_close(torch.cat([made[2, 0], made[2, 1]], dim=1), made[1, 0])
    again = views_of(0, 1, "--data", npz, *TINY)
    assert not torch.equal(torch.stack(again.make([images], again.draw(6), 0)), made[1, 0])


# What goes wrong ----------------------------------------------------------------------------------


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(npz: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    job = Job(output, "--data", npz, *TINY, "--steps", 400, "--save-every", 5, "--log-every", 5)
    job.until(10)
    pid = job.processes[0].pid
    # No file may grow beyond 60 kB: the log is smaller, the state larger.
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
    end = time.monotonic() + DEADLINE
    while "NOT saved" not in notes(output):
        assert time.monotonic() < end, job.text()
        time.sleep(0.01)
    kept = torch.load(output / "last.pt", weights_only=True)["progress"]["step"]
    job.until(kept + 10)
    assert torch.load(output / "last.pt", weights_only=True)["progress"]["step"] == kept
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    job.signal(signal.SIGTERM)
    job.ends_well()
    assert torch.load(output / "last.pt", weights_only=True)["progress"]["step"] > kept
    assert not list(output.glob(".*.tmp"))


def poison(steps: Container[int], patch: Callable[..., None] = setattr) -> None:
    """Turn the views of these steps into NaN, of several ranks those of the last one."""
    make, draw, at = imagenet_ddp.Views.make, imagenet_ddp.Views.draw, []
    patch(imagenet_ddp.Views, "draw", lambda self, step: at.append(step) or draw(self, step))

    def poisoned(self: Any, *arguments: Any) -> list[torch.Tensor]:
        views = make(self, *arguments)
        here = at[-1] in steps and self.plan.rank == self.plan.world - 1
        return [view * math.nan for view in views] if here else views

    patch(imagenet_ddp.Views, "make", poisoned)


def poison_and_keep(steps: Container[int]) -> None:
    """The same, and every saved state stays, as `step.pt` beside the last one."""
    poison(steps)
    real = resume.checkpoint.save

    def save(saved: dict[str, Any], path: Path) -> None:
        real(saved, path)
        shutil.copy(path, path.with_name(f"{saved['progress']['step']}.pt"))

    resume.checkpoint.save = save


@pytest.mark.parametrize("optimizer", ["lars", "adamw", "sgd"])
def test_a_step_with_nan_is_skipped_counted_and_leaves_no_trace(
    optimizer: str, npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("--data", npz, *TINY, "--optimizer", optimizer, "--save-every", 1, "--lr", 0.01)
    poison((0, 3), monkeypatch.setattr)
    seen = {}
    real = resume.checkpoint.save
    monkeypatch.setattr(
        resume.checkpoint,
        "save",
        lambda s, path: (
            seen.update({s["progress"]["step"]: torch.load(io.BytesIO(dump(s)))}) or real(s, path)
        ),
    )
    run_here(tmp_path, *command, "--steps", 6)
    skipped = {line["step"]: line["skipped_steps"] for line in log(tmp_path) if "loss" in line}
    assert skipped == {1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2}
    before, after, later = (flat(seen[step]["learner"]) for step in (3, 4, 5))
    online = [n for n in before if before[n].is_floating_point() and not n.startswith(".target")]
    assert all(torch.equal(before[name], after[name]) for name in online)
    assert not all(torch.equal(after[name], later[name]) for name in online)
    states = [flat(seen[step]["optimizer"]["state"]) for step in (3, 4)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for values in (later, flat(seen[6]["optimizer"]["state"])):
        assert all(torch.isfinite(value).all() for value in values.values())


@pytest.mark.parametrize("how", [(), ("--fsdp",), ("--fsdp", "--optimizer", "adamw")])
def test_a_nan_of_one_rank_is_skipped_on_all_and_leaves_no_trace(
    how: tuple[object, ...], npz: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    command = ("--data", npz, *TINY, *how, "--lr", 0.01, "--save-every", 1, "--steps", 4)
    Job(output, *command, world=2, prepare=partial(poison_and_keep, (0, 2))).ends_well()
    skipped = [line["skipped_steps"] for line in log(output) if "loss" in line]
    assert skipped == [1, 1, 2, 2]
    saved = [flat(torch.load(output / f"{step}.pt", weights_only=True)) for step in range(1, 5)]
    kept = [n for n in saved[1] if n.startswith(".learner") or n.startswith(".optimizer.state")]
    for name in kept:
        if ".target" not in name and "extra_state" not in name:
            torch.testing.assert_close(saved[2][name], saved[1][name], rtol=0, atol=0, msg=name)
        assert torch.isfinite(torch.as_tensor(saved[3][name])).all(), name
    moved = ".learner.net.conv1.0.weight"
    assert not torch.equal(saved[0][moved], saved[1][moved])
    assert not torch.equal(saved[2][moved], saved[3][moved])


def dump(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_nan_without_end_stops_with_the_last_good_state_intact(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(range(3, 100), monkeypatch.setattr)
    command = ("--data", npz, *TINY, "--save-every", 100, "--max-skipped", 4)
    with pytest.raises(SystemExit, match="4 steps in a row were not finite, 4 steps in all"):
        run_here(tmp_path, *command)
    assert "not finite" in notes(tmp_path)
    assert max(line["step"] for line in log(tmp_path)) == 7


def test_fp16_scales_its_loss_and_resumes(npz: Path, tmp_path: Path) -> None:
    command = ("--data", npz, *TINY, "--amp", "fp16", "--steps", 4)
    run_here(tmp_path, *command)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert saved["scaler"]["scale"] > 0
    run_here(tmp_path, *command)


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_a_cuda_device_trains_and_resumes(amp: str, folder: Path, tmp_path: Path) -> None:
    command = ("--data", folder, *TINY, "--device", "cuda", "--amp", amp, "--workers", 2)
    job = Job(tmp_path / "run", *command, "--save-every", 100)
    job.until(4)
    job.signal(signal.SIGTERM)
    job.ends_well()
    Job(tmp_path / "run", *command).ends_well()
    losses = [line["loss"] for line in log(tmp_path / "run") if "loss" in line]
    assert len(losses) == 12 and all(0 < loss < 8 for loss in losses)
