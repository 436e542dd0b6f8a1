"""examples/imagenet_ddp.py: its recipes and flags, what it starts from and shows, and refusals."""

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pretraining_helpers import (
    NORM_FREE,
    TINY,
    Job,
    amount,
    assert_same,
    batches,
    decoding,
    imagenet_ddp,
    journal,
    log,
    notes,
    parts_views,
    plan_of,
    run_here,
    sources,
    state,
    watch,
    write_folder,
    write_npz,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from byol_pytorch import BYOL
from byol_pytorch.checkpoint import export_backbone, same_padding

pytestmark = pytest.mark.xdist_group("pretraining")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_npz(tmp_path_factory.mktemp("npz"))


@pytest.mark.parametrize(
    ("recipe", "lr", "decay", "steps", "warmup"),
    [
        ("paper-1000", 3.2, 0.996, 312_000, 3120),
        ("paper-300", 4.8, 0.99, 93_600, 3120),
        ("paper-100", 7.2, 0.99, 31_200, 3120),
        ("mmselfsup-16xb256-200", 4.8, 0.99, 62_400, 3120),
        ("mmselfsup-8xb32-accum16-200", 4.8, 0.99, 62_400, 3120),
        ("mmselfsup-8xb32-accum16-300", 4.8, 0.99, 93_600, 3120),
        ("vit", 2.4e-3, 0.99, 93_600, 12_480),
        ("small", 0.24, 0.99, 500_400, 0),
    ],
)
def test_a_recipe_on_imagenet_is_the_published_one(
    recipe: str, lr: float, decay: float, steps: int, warmup: int
) -> None:
    labels = np.zeros(1_281_167, np.int64)
    source = sources.Arrays(labels, np.zeros((1, 3, 8, 8), np.uint8))
    chosen, args = imagenet_ddp.parse_arguments(["--data", ".", "--recipe", recipe])
    plan = imagenet_ddp.make_plan(chosen, args, source, torch.device("cpu"), 0, 1)
    assert plan.lr == pytest.approx(lr)
    assert (plan.decay, plan.steps, plan.warmup_steps) == (decay, steps, warmup)


@pytest.mark.parametrize("recipe", imagenet_ddp.RECIPES)
def test_only_mmselfsups_residual_branches_do_not_begin_at_zero(recipe: str) -> None:
    """MMSelfSup 0.x, mmselfsup/models/backbones/resnet.py: zero_init_residual=False by default,
    and configs/selfsup/_base_/models/byol.py leaves it; deepmind-research, byol/README.md: the
    released code's last batch norm of a block begins at 0."""
    chosen, _ = imagenet_ddp.parse_arguments(["--data", ".", "--recipe", recipe])
    if chosen.model.startswith("resnet"):
        net = timm.create_model(chosen.model, **chosen.model_args)
        last = [m.get_submodule("bn3" if hasattr(m, "bn3") else "bn2").weight
                for m in net.modules() if hasattr(m, "conv2")]  # fmt: skip
        assert len(last) >= 8
        assert all(bool(w.any()) == recipe.startswith("mmselfsup") for w in last)
    other = ("--model", "vit_tiny_patch16_224")
    chosen, _ = imagenet_ddp.parse_arguments(["--data", ".", "--recipe", recipe, *other])
    assert chosen.model_args == {}
    timm.create_model(chosen.model, **chosen.model_args)


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("vit", ("--model-args", '{"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 8}')),
        ("small", ("--model-args", '{"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}')),
        ("mmselfsup-8xb32-accum16-200", ("--model-args", '{"channels": [8, 8, 16, 16]}')),
    ],
)
def test_a_recipe_trains(
    recipe: str, changes: tuple[str, str], folder: Path, tmp_path: Path
) -> None:
    smaller = ("--image-size", 32, "--projection-size", 8, "--projection-hidden-size", 16)
    command = ("--data", folder, "--recipe", recipe, *changes, *smaller, "--device", "cpu")
    size = ("--batch-size", 16, "--steps", 3, "--workers", 0, "--log-every", 1)
    if "accum16" in recipe:
        size += ("--accumulate", 4)
    run_here(tmp_path, *command, *size)
    assert [line["step"] for line in log(tmp_path) if "loss" in line] == [1, 2, 3]
    weights = load_file(tmp_path / "backbone.safetensors")
    if recipe == "small":
        assert weights["conv1.weight"].shape[2:] == (3, 3)  # 7 x 7 otherwise
    if recipe == "vit":  # its patch projection is as it was initialised
        again = tmp_path / "again"
        run_here(again, *command, *size, "--lr", 0.0)
        still = load_file(again / "backbone.safetensors")
        same = {name for name in still if torch.equal(still[name], weights[name])}
        assert {name for name in same if name.startswith("patch_embed")}
        assert "blocks.0.attn.qkv.weight" not in same


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_layer_decay_slows_each_layer_by_its_distance_from_the_heads(
    optimizer: str, npz: Path, tmp_path: Path
) -> None:
    flags = ("--optimizer", optimizer, "--steps", 1, "--warmup-epochs", 0, "--weight-decay", 0)
    flags += ("--model-args", '{"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 8}')
    weights = {}
    for name, changes in {
        "start": ("--lr", 0),
        "alike": ("--lr", 0.1),
        "decayed": ("--lr", 0.1, "--layer-decay", 0.5),
    }.items():
        run_here(tmp_path / name, "--data", npz, *NORM_FREE, *flags, *changes)
        weights[name] = state(tmp_path / name)["learner"]
    scales = {"net.patch_embed.": 0.125, "net.cls_token": 0.125, "net.pos_embed": 0.125}
    scales |= {"net.blocks.0.": 0.25, "net.blocks.1.": 0.5, "net.norm.": 0.5}
    scales |= {"projector.": 1.0, "predictor.": 1.0}
    for name, start in weights["start"].items():
        scale = next((s for beginning, s in scales.items() if name.startswith(beginning)), None)
        if scale and "running" not in name and "tracked" not in name:
            alike, decayed = (weights[run][name] - start for run in ("alike", "decayed"))
            assert bool(alike.any()), name
            torch.testing.assert_close(decayed, scale * alike, atol=1e-7, rtol=1e-3, msg=name)


def test_the_views_take_other_strengths(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strengths = {"rotate90": 1.0, "jitter": 0, "scale": [0.5, 0.5], "ratio": [1, 1]}
    flags = ("--view-args", json.dumps(strengths), "--steps", 1)
    run_here(tmp_path / "run", "--data", folder, *TINY, *flags)
    recipe, args = imagenet_ddp.parse_arguments(["--data", str(folder), *map(str, (*TINY, *flags))])
    source, _ = sources.open_data(folder)
    plan = imagenet_ddp.make_plan(recipe, args, source, torch.device("cpu"), 0, 1)
    views = imagenet_ddp.Views(plan, source, ((0.5,) * 3, (0.5,) * 3))
    for draws in views.draw(0):
        turns = next(item.data for item in draws if item.name.startswith("RandomRotation90"))
        assert bool((turns["batch_prob"] > 0.5).all())
        assert not any(item.name.startswith("ColorJitter") for item in draws)
    boxes, draw = [], decoding.draw_box
    monkeypatch.setattr(
        decoding, "draw_box", lambda *a: boxes.append((*a[1:3], *draw(*a))) or boxes[-1][2:]
    )
    views.data[np.column_stack((np.zeros(9, int), np.arange(9)))]  # as the workers draw them
    assert len(boxes) == 18
    for height, width, _, _, *box in boxes:
        whole = min(height, width)
        assert box == [round((height * width / 2) ** 0.5)] * 2 or whole**2 < height * width / 2


def test_images_kept_on_the_device_train_as_those_that_workers_read(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, read = tmp_path / "kept", tmp_path / "read"
    with monkeypatch.context() as patch:
        patch.setattr("parts.views.make_loader", None)
        run_here(kept, "--data", npz, *TINY)
    monkeypatch.setattr(batches, "RESIDENT", 24 * 3 * 32 * 32 - 1)
    run_here(read, "--data", npz, *TINY)
    assert_same(kept, read)


def test_the_printed_commands_take_the_backbone_that_the_run_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_folder(tmp_path / "my images")
    run_here(tmp_path / "run", "--data", data, *TINY, "--steps", 1)
    printed = [
        shlex.split(line, comments=True)
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("    python ")
    ]
    assert [Path(words[1]).name for words in printed] == [
        "embed.py", "evaluate_knn.py", "evaluate_linear.py", "finetune_classification.py"
    ]  # fmt: skip
    for words in printed[:2]:
        command = [sys.executable, *words[1:], "--workers", "0", "--output", str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "--model resnet10t, as " in done.stdout


@pytest.mark.parametrize("world", [1, 2])
def test_without_labels_a_run_ends_with_a_page_of_neighbours_and_its_health(
    world: int, tmp_path: Path
) -> None:
    data, output = write_folder(tmp_path / "data", classes=1), tmp_path / "run"
    command = ("--data", data, *TINY, "--steps", 1, "--knn-every", 1)
    job = Job(output, *command, world=world).ends_well()
    assert "no labels, so no kNN accuracy" in job.text()
    assert re.search(r"feature std 0\.\d+ \(healthy: near 0.354\), effective rank", job.text())
    with Image.open(output / "neighbours.png") as picture:
        assert np.asarray(picture).std() > 10


def test_a_dry_run_has_the_epochs_of_its_steps_and_the_row_for_its_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_folder(tmp_path / "data")
    run_here(tmp_path / "out", "--data", data, *TINY, "--steps", 6, "--dry-run")
    printed = capsys.readouterr().out
    assert re.search(r"^epochs +2$", printed, re.MULTILINE)
    assert "names-of-the-images" not in printed
    assert "usual for 24 images of your own: --batch-size 4 --epochs 800" in printed
    assert "here: --batch-size 8 --epochs 4 --warmup-epochs 1\n" in printed


def test_the_recipe_for_own_images_follows_their_number_and_the_flags(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", 40)
    small = ("--model", "resnet10t", "--image-size", 32, "--device", "cpu", "--workers", 0)
    for flags, batch, lr in (
        ((), 8, 0.45),
        (("--batch-size", 20, "--init-from", "x"), 20, 0.045),
    ):
        recipe, args = imagenet_ddp.parse_arguments(
            [*map(str, ("--data", data, "--recipe", "own", *small, *flags))]
        )
        own = imagenet_ddp.for_own_images(recipe, args, 40)
        assert (own.batch_size, own.base_lr) == (batch, lr)
        assert (own.epochs, own.base_decay, own.model) == (800, 0.99, "resnet10t")


@pytest.mark.parametrize(
    ("images", "batch", "epochs", "decay"),
    [
        (500, 64, 800, 0.99),
        (2_000, 256, 800, 0.99),
        (10_000, 256, 513, 0.99),
        (50_000, 256, 103, 0.99),
        (1_281_167, 256, 100, 0.996),
    ],
)
def test_the_settings_by_amount_are_those_of_the_documented_table(
    images: int, batch: int, epochs: int, decay: float
) -> None:
    found = amount.by_amount(images)
    assert (found["batch_size"], found["epochs"], found["base_decay"]) == (batch, epochs, decay)
    table = (Path(__file__).parents[1] / "docs" / "pretraining.md").read_text()
    assert f"| {images:,} | {batch} | {epochs} | " in table


def test_the_help_says_every_flag_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        imagenet_ddp.parse_arguments(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for flag, text in (
        ("--save-every SAVE_EVERY", "steps between states in last.pt (default: 500)"),
        ("--seed SEED", "(default: 0)"),
        ("--amp {auto,none,bf16,fp16}", "none elsewhere (default: auto)"),
    ):
        assert text in said[said.index(f" {flag} ", said.index("options:")) :][:200]
    assert "default: None" not in said


def test_a_run_in_slices_of_time_equals_a_whole_one(npz: Path, tmp_path: Path) -> None:
    whole, sliced = tmp_path / "whole", tmp_path / "sliced"
    command = ("--data", npz, *TINY, "--steps", 3)
    run_here(whole, *command)
    for _ in range(3):  # each is over after its first step
        assert not (sliced / "backbone.safetensors").exists()
        run_here(sliced, *command, "--max-minutes", 0)
    assert_same(whole, sliced)


def test_held_out_images_are_tested_on_and_never_trained_on(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = sources.open_data(npz)
    kept, left = sources.hold_out(source, 8)
    names = [{part.name(i) for i in range(len(part))} for part in (kept, left)]
    assert (len(names[0]), len(names[1])) == (16, 8)
    assert names[0] | names[1] == {source.name(i) for i in range(24)}
    numbers = [int(left.name(i).removeprefix("image ")) for i in range(8)]
    assert [left.read(i) for i in range(8)] == [source.read(number) for number in numbers]
    assert left.labels.tolist() == source.labels[numbers].tolist()

    asked = []

    class Recorded(watch.Neighbours):
        def accuracy(self, *arguments: Any) -> float:
            (source, numbers), (test, queries) = self.bank, self.queries
            asked.extend([{source.name(i) for i in numbers}, {test.name(i) for i in queries}])
            return super().accuracy(*arguments)

    def trained_on(data: Any, device: torch.device) -> None:
        asked.append({data.source.name(i) for i in range(len(data.source))})

    monkeypatch.setattr(watch, "Neighbours", Recorded)
    monkeypatch.setattr(parts_views, "resident", trained_on)
    flags = ("--held-out", 8, "--knn-every", 1, "--knn-neighbours", 3, "--steps", 2)
    run_here(tmp_path, "--data", npz, *TINY, *flags)
    assert asked == [*names, names[0], *names]  # before, the training itself, and after
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert saved["identity"]["images"] == 16


def test_the_decay_follows_the_batch_where_asked(npz: Path) -> None:
    arguments = ("--data", npz, "--recipe", "small", "--batch-size", 16, "--scale-decay")
    plan, _ = plan_of(0, 1, *arguments)
    assert plan.decay == pytest.approx(0.99 ** (16 / 512))


def test_a_dry_run_prints_what_would_run_and_leaves_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(tmp_path / "out", "--data", folder, *TINY, "--accumulate", 2, "--dry-run")
    printed = capsys.readouterr().out
    for part in (
        "model                    resnet10t",
        "global batch 8: 1 processes x 2 passes x 4 images",
        "batch norm of the backbone spans 4 images",
        "autocast: none (the published runs: none)",
        "24 images, 3 steps an epoch, 12 steps",
        "learning rate 0.2 after 3 steps of warm-up, EMA decay 0.99 rising to 1",
        "% of the views are enlarged",
        "memory: about",
    ):
        assert part in printed
    assert not (tmp_path / "out").exists()


def test_fast_mode_trains_and_its_share_of_enlarged_views_is_higher(
    folder: Path, tmp_path: Path
) -> None:
    run_here(tmp_path, "--data", folder, *TINY, "--decode-size", 36, "--steps", 2)
    source, _ = sources.open_data(folder)
    faithful, fast = (watch.upsampled_share(source, 32, size) for size in (None, 36))
    assert 0.2 < faithful < fast < 1


@pytest.mark.parametrize("how", [(), ("--fsdp",)])
def test_a_dry_run_of_several_processes_waits_for_none(
    how: tuple[str, ...], npz: Path, tmp_path: Path
) -> None:
    job = Job(tmp_path / "out", "--data", npz, *TINY, *how, "--dry-run", world=2).ends_well()
    assert "global batch 8: 2 processes x 1 passes x 4 images" in job.text()
    spans = 4 if "--no-sync-bn" in how else 8
    assert f"batch norm of the backbone spans {spans} images" in job.text()
    assert job.text().count("memory: about") == 1
    assert not (tmp_path / "out").exists()


def test_a_dry_run_compiles_nothing(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "compile", None)
    run_here(tmp_path, "--data", npz, *TINY, "--compile", "--dry-run")
    assert "memory: about" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "steps", "warmup"),
    [
        (("--steps", 3), 3, 1),  # a quarter of the run, as of 4 epochs
        (("--steps", 1), 1, 0),
        (("--steps", 3, "--warmup-epochs", 4), 3, 3),
        (("--warmup-epochs", 0), 12, 0),
        (("--warmup-epochs", 0.5), 12, 2),
    ],
)
def test_warm_up_keeps_its_share_of_a_shorter_run(
    changes: tuple[object, ...], steps: int, warmup: int, npz: Path, tmp_path: Path
) -> None:
    plan, _ = plan_of(0, 1, "--data", npz, *TINY, *changes)
    assert (plan.steps, plan.warmup_steps) == (steps, warmup)
    run_here(tmp_path, "--data", npz, *TINY, *changes)
    rates = [line["lr"] for line in log(tmp_path) if "lr" in line]
    assert len(rates) == steps and all(0 <= rate <= 0.2 for rate in rates)
    assert [rate == 0 for rate in rates] == [bool(warmup)] + [False] * (steps - 1)


# Compiled ---------------------------------------------------------------------------------------


def through(backend: str) -> Callable[..., Any]:
    """torch.compile by another backend than its own."""
    compiler = torch.compile

    def compile_as_asked(*arguments: Any, fullgraph: bool = False) -> Any:
        return compiler(*arguments, fullgraph=fullgraph, backend=backend)

    return compile_as_asked


def compile_cheaply() -> None:
    torch.compile = through("aot_eager")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_run_equals_an_eager_one_and_compiles_once(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Crops from files: torch's own uint8 crop, which only eager views use, rounds in between.
    folder = write_folder(tmp_path / "images")
    command = ("--data", folder, *NORM_FREE, "--accumulate", 2, "--steps", 6, "--lr", 0.001)
    command += ("--health-every", 1, "--knn-every", 1)
    run_here(tmp_path / "eager", *command)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", through(backend))
    run_here(tmp_path / "compiled", *command, "--compile")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # a step, and two views
    assert_same(tmp_path / "compiled", tmp_path / "eager", exactly=False)


@pytest.mark.slow
def test_a_compiled_run_of_two_ranks_resumes_an_eager_one(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images")
    command = ("--data", folder, *NORM_FREE, "--save-every", 100)
    Job(tmp_path / "whole", *command).ends_well()
    job = Job(tmp_path / "run", *command)
    job.until(4)
    job.signal(signal.SIGTERM)
    job.ends_well()
    Job(tmp_path / "run", *command, "--compile", world=2, prepare=compile_cheaply).ends_well()
    assert "processes 2 instead of 1" in notes(tmp_path / "run")
    assert "compile True instead of False" in notes(tmp_path / "run")
    assert_same(tmp_path / "run", tmp_path / "whole", exactly=False)


@pytest.mark.parametrize("how", [(), pytest.param(("--compile",), marks=pytest.mark.slow)])
def test_batch_norms_of_two_ranks_see_what_those_of_one_process_see(
    how: tuple[str, ...], tmp_path: Path
) -> None:
    # From files: compiled views of them are the same.
    folder = write_folder(tmp_path / "images")
    command = ("--data", folder, *TINY, "--model-args", '{"channels": [4, 4, 8, 8]}')
    command += ("--batch-size", 24, "--epochs", 3, "--lr", 0.002)
    Job(tmp_path / "one", *command).ends_well()
    job = Job(tmp_path / "two", *command, *how, world=2, prepare=compile_cheaply)
    job.ends_well(deadline=300)
    assert_same(tmp_path / "two", tmp_path / "one", exactly=False)


# Starting weights -------------------------------------------------------------------------------


def trained(**options: Any) -> Any:
    """A network as after training: no tensor of it is as it was initialised."""
    net = timm.create_model("resnet10t", channels=[8, 8, 16, 16], **options)
    generator = torch.Generator().manual_seed(3)
    for value in net.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.rand(value.shape, generator=generator) * 0.1)
    return net


def learner_of(net: nn.Module) -> BYOL:
    return BYOL(net, 32, projection_size=8, projection_hidden_size=16)


def exported(net: nn.Module, folder: Path) -> Path:
    export_backbone(net, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def saved(kind: str, folder: Path) -> tuple[nn.Module, Path]:
    net = trained(num_classes=5 if kind == "with a classifier" else 0)
    if kind == "exported":
        return net, exported(learner_of(net), folder)
    states: dict[str, Callable[[], dict[str, Any]]] = {
        "network": net.state_dict,
        "with a classifier": net.state_dict,
        "of DDP": lambda: {f"module.{name}": v for name, v in net.state_dict().items()},
        "compiled": torch.compile(net).state_dict,
        "learner": lambda: learner_of(net).state_dict(),
        "training state": lambda: {"epoch": 3, "learner": dict(learner_of(net).state_dict())},
    }
    torch.save(states[kind](), folder / "weights.pt")
    return net, folder / "weights.pt"


def assert_starts_from(net: nn.Module, npz: Path, output: Path, *arguments: object) -> None:
    """With a learning rate of 0 and its batch norm frozen, a run ends where it started."""
    command = ("--data", npz, *TINY, "--freeze-bn", "--lr", 0.0, "--steps", 1)
    run_here(output, *command, "--health-every", 9, *arguments)
    after, before = load_file(output / "backbone.safetensors"), net.state_dict()
    assert after.keys() <= before.keys()
    assert all(torch.equal(before[name], after[name]) for name in after)


@pytest.mark.parametrize(
    "kind",
    [
        "exported",
        "network",
        "with a classifier",
        "of DDP",
        "compiled",
        "learner",
        "training state",
    ],
)
def test_training_goes_on_from_weights_of_every_kind(kind: str, npz: Path, tmp_path: Path) -> None:
    net, file = saved(kind, tmp_path)
    assert_starts_from(net, npz, tmp_path / "run", "--init-from", file)


def test_training_goes_on_from_the_state_and_the_backbone_of_another_run(
    npz: Path, tmp_path: Path
) -> None:
    run_here(tmp_path / "first", "--data", npz, *TINY, "--steps", 2)
    for name in ("last.pt", "backbone.safetensors"):
        file, output = tmp_path / "first" / name, tmp_path / name.partition(".")[0]
        command = ("--data", npz, *TINY, "--freeze-bn", "--lr", 0.0, "--steps", 1)
        run_here(output, *command, "--init-from", file)
        before, after = (
            load_file(o / "backbone.safetensors") for o in (tmp_path / "first", output)
        )
        assert all(torch.equal(before[name], after[name]) for name in before)


def overlay(file: Path, **facts: object) -> tuple[str, str]:
    """timm's pretrained weights are this file."""
    arguments = {"channels": [8, 8, 16, 16], "pretrained_cfg_overlay": {"file": str(file), **facts}}
    return "--model-args", json.dumps(arguments)


def test_training_goes_on_from_timms_weights(npz: Path, tmp_path: Path) -> None:
    net = trained(num_classes=10)
    torch.save(net.state_dict(), tmp_path / "timm.pt")
    facts = overlay(tmp_path / "timm.pt", num_classes=10)
    assert_starts_from(net, npz, tmp_path / "run", *facts, "--init-from", "timm")
    facts_of_run = metadata(tmp_path / "run" / "backbone.safetensors")
    assert json.loads(facts_of_run["mean"]) == pytest.approx([0.485, 0.456, 0.406])


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize("origin", ["timm", "file"])
def test_images_are_normalised_as_those_of_the_starting_weights_were_also_after_a_stop(
    origin: str, npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mean, std = [0.25, 0.5, 0.75], [0.125, 0.25, 0.5]
    file = tmp_path / "weights.safetensors"
    net = trained(num_classes=0)
    if origin == "file":
        export_backbone(net, file, mean=mean, std=std)
        how = ("--init-from", file)
    else:
        save_file(net.state_dict(), file)
        how = (*overlay(file, num_classes=0, mean=mean, std=std), "--init-from", "timm")
    command = ("--data", npz, *TINY, *how, "--steps", 4, "--save-every", 2)
    run_here(tmp_path / "whole", *command)

    seen, draw = [], imagenet_ddp.Views.draw

    def stop_at_3(self: Any, step: int) -> Any:
        seen.append(self)
        if step == 3 and len(seen) == 4:
            raise KeyboardInterrupt
        return draw(self, step)

    monkeypatch.setattr(imagenet_ddp.Views, "draw", stop_at_3)
    with pytest.raises(KeyboardInterrupt):
        run_here(tmp_path / "stopped", *command)
    file.unlink()
    run_here(tmp_path / "stopped", *command)
    assert_same(tmp_path / "stopped", tmp_path / "whole")
    facts = metadata(tmp_path / "stopped" / "backbone.safetensors")
    assert (json.loads(facts["mean"]), json.loads(facts["std"])) == (mean, std)
    for view in seen[-1].pipelines:
        assert [list(values) for values in view.statistics(3)] == [mean, std]


def test_weights_of_a_network_with_tensorflows_padding_want_it(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = same_padding(trained(num_classes=0))
    file = exported(net, tmp_path)
    with pytest.raises(SystemExit, match="padding='same'"):
        assert_starts_from(net, npz, tmp_path / "no", "--init-from", file)
    assert_starts_from(net, npz, tmp_path / "run", "--init-from", file, "--same-padding")
    assert "padding" in metadata(tmp_path / "run" / "backbone.safetensors")


# Watching -----------------------------------------------------------------------------------------


def test_nearest_neighbours_are_asked_before_each_epoch_and_at_the_end(
    npz: Path, tmp_path: Path
) -> None:
    run_here(tmp_path, "--data", npz, *TINY, "--knn-every", 2)
    asked = {
        line["epoch"]: line["knn_accuracy"] for line in log(tmp_path) if "knn_accuracy" in line
    }
    assert list(asked) == [0, 2, 4]
    assert all(0 <= accuracy <= 100 for accuracy in asked.values())


def test_watching_changes_nothing(npz: Path, tmp_path: Path) -> None:
    for name, health in (("watched", 1), ("unwatched", 100)):
        knn = int(name == "watched")
        command = ("--data", npz, *TINY, "--health-every", health, "--knn-every", knn)
        run_here(tmp_path / name, *command, "--save-every", 1 + 50 * (1 - knn))
    assert_same(tmp_path / "watched", tmp_path / "unwatched")


def test_tensorboard_gets_the_curves_and_the_picture(npz: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_here(tmp_path, "--data", npz, *TINY, "--steps", 3)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert {"lr", "ema_decay", "grad_norm", "feature_std"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["views"]


def test_collapse_is_told_with_its_likely_cause() -> None:
    assert watch.has_collapsed(0.01, 0.1, 64)
    assert not watch.has_collapsed(0.1, 0.12, 64)
    assert not watch.has_collapsed(0.01, 0.012, 64)  # it was never better
    well = {"bn_batch": 256, "decay": 0.99, "lr_ratio": 1.0, "weight_decay": 1e-6, "skipped": 0}
    for change, hint in (
        ({"lr_ratio": 9.0}, "9.0 times the recipe's: lower --lr"),
        ({"decay": 0.5}, "raise --base-decay"),
        ({"bn_batch": 4}, "only 4 images"),
        ({"weight_decay": 0.5}, "lower --weight-decay"),
        ({"skipped": 3}, "3 steps had non-finite"),
        ({}, "--warmup-epochs"),
    ):
        assert hint in watch.likely_cause(**{**well, **change})


def test_a_fallen_feature_std_is_noted_in_the_log(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stds = iter([0.3, 0.3, 0.001, 0.001])
    healthy = imagenet_ddp.BYOL.diagnostics
    monkeypatch.setattr(
        imagenet_ddp.BYOL,
        "diagnostics",
        lambda self, images: healthy(self, images) | {"feature_std": next(stds)},
    )
    run_here(tmp_path, "--data", npz, *TINY)
    alarms = [line for line in log(tmp_path) if line.get("collapse")]
    assert [line["step"] for line in alarms] == [8]
    assert "the learning rate is 14.2 times the recipe's" in alarms[0]["note"]


def test_projections_that_are_not_finite_are_noted_and_do_not_end_the_run(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise torch.linalg.LinAlgError("the input matrix contained non-finite values")

    monkeypatch.setattr(imagenet_ddp.BYOL, "diagnostics", fails)
    run_here(tmp_path, "--data", npz, *TINY, "--steps", 4)
    noted = [line["step"] for line in log(tmp_path) if "not finite" in line.get("note", "")]
    assert noted == [1, 4]
    assert (tmp_path / "backbone.safetensors").exists()


def test_a_log_that_cannot_be_written_costs_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = journal.Journal(tmp_path / "missing", True, 0, 10, 8)
    lost.figures(1, {"loss": 1.0})
    lost.note(2, "something")
    lost.close()
    assert capsys.readouterr().err.count("the log cannot be written") == 1


def test_a_killed_run_leaves_no_lines_beyond_its_checkpoint(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step}) for step in (0, 1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')
    journal.Journal(tmp_path, True, 2, 10, 8).close()
    assert [line["step"] for line in log(tmp_path)] == [0, 1, 2]


# Bad input ----------------------------------------------------------------------------------------


def no_folder(place: Path) -> list[object]:
    return ["--data", place / "missing"]


def empty(place: Path) -> list[object]:
    (place / "empty").mkdir()
    return ["--data", place / "empty"]


def output_among_the_images(place: Path) -> list[object]:
    return ["--data", write_folder(place)]


def floats(place: Path) -> list[object]:
    (place / "floats").mkdir()
    for i in range(8):
        Image.fromarray(np.zeros((40, 40), np.float32)).save(place / "floats" / f"{i}.tif")
    return ["--data", place / "floats"]


def every_tenth_torn(place: Path) -> list[object]:
    for file in list(write_folder(place / "torn").rglob("*[05].jpg")):
        file.write_bytes(b"torn")
    return ["--data", place / "torn"]


def torn_npz(place: Path) -> list[object]:
    whole = (write_npz(place) / "train.npz").read_bytes()
    (place / "train.npz").write_bytes(whole[: len(whole) // 2])
    return ["--data", place]


def one_label_less(place: Path) -> list[object]:
    arrays = dict(np.load(write_npz(place) / "train.npz"))
    np.savez(place / "train.npz", **{**arrays, "labels": arrays["labels"][1:]})
    return ["--data", place]


def few(place: Path) -> list[object]:
    return ["--data", write_folder(place / "few", count=3)]


def other_arrays(place: Path) -> list[object]:
    np.savez(place / "train.npz", x=np.zeros(3))
    return ["--data", place]


def unlabelled(place: Path) -> list[object]:
    return ["--data", write_folder(place / "flat", classes=1), "--held-out", 8]


def damaged_cifar(place: Path) -> list[object]:
    (place / "cifar-10-batches-py").mkdir()
    return ["--data", place]


def no_tar(place: Path) -> list[object]:
    (place / "0.tar").write_bytes(b"no tar file" * 100)
    return ["--data", place]


def torn_state(place: Path) -> list[object]:
    (place / "out").mkdir()
    (place / "out" / "last.pt").write_bytes(b"torn")
    return []


def other_weights(place: Path) -> list[object]:
    torch.save({"x.weight": torch.zeros(2)}, place / "w.pt")
    return ["--init-from", place / "w.pt"]


def file_for_folder(place: Path) -> list[object]:
    (place / "out").write_text("")
    return []


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (no_folder, "missing is not a folder"),
        (empty, "holds no image files"),
        (few, "3 images do not fill a batch of 8"),
        (other_arrays, "holds x; expected jpeg, offsets and labels"),
        (damaged_cifar, "not found or corrupted"),
        (no_tar, "cannot be read as an uncompressed tar file"),
        (torn_state, "damaged.* start anew with another --output"),
        (other_weights, "does not fit|cannot be built"),
        (file_for_folder, "cannot be written to"),
        (output_among_the_images, "--output .* is among the images of --data"),
        (floats, "no image of --data .* can be read .*, such as 0.tif: .*give --max-value"),
        (every_tenth_torn, r"5 of 24 images of --data .* cannot be read \(--max-bad is 0.01\)"),
        (lambda _: ["--max-value", 0], "--max-value 0.0 is not above 0"),
        (torn_npz, "cannot be read as a .npz file"),
        (one_label_less, "23 labels and 25 offsets"),
        (lambda _: ["--device", "gpu"], "--device gpu is no device of torch"),
        (lambda _: ["--lr", "nan"], "--lr must be 0 or more"),
        (lambda _: ["--base-lr", "inf"], "--base-lr must be 0 or more"),
        (lambda _: ["--model-args", "{channels: 4}"], "channels: 4} is no JSON object"),
        (lambda _: ["--model-args", '{"in_chans": 1}'], "images are read as RGB"),
        (lambda _: ["--init-from", "timm", "--small-stem"], "timm has no weights for --small-stem"),
        (
            lambda _: ["--init-from", "timm", "--model", "botnet50ts_256", "--model-args", "{}"],
            "No pretrained weights exist",
        ),
        (lambda _: ["--epochs", 0], "--epochs must be 1 or more"),
        (lambda _: ["--batch-size", 48, "--accumulate", 24], "24 images do not fill a batch of 48"),
        (lambda _: ["--init-from", "missing.pt"], "missing.pt is no file"),
        (lambda _: ["--model", "resnet51"], "not a model of timm. Near names: .*resnet"),
        (lambda _: ["--model-args", '{"nonsense": 1}'], "cannot be built as asked: .*nonsense"),
        (lambda _: ["--model-args", "3"], "no JSON object"),
        (lambda _: ["--view-args", "blur"], "--view-args blur is no JSON object"),
        (lambda _: ["--view-args", '{"blurr": 1}'], "makes no views: .*blurr"),
        (lambda _: ["--view-args", '{"blur": 2}'], "makes no views: blur=2"),
        (lambda _: ["--view-args", '{"mean": [0]}'], "has mean, which the run sets itself"),
        (unlabelled, "--held-out 8: they have no labels"),
        (lambda _: ["--knn-images", 4], "--knn-images 4 asks for a fifth of them"),
        (lambda _: ["--view-args", '{"image_size": 9}'], "has image_size, which the run sets"),
        (lambda _: ["--small-stem", "--model", "resnet18d"], "conv1; --no-small-stem where"),
        (lambda _: ["--held-out", 0], "0 must be above 0 and below the 24 images"),
        (lambda _: ["--held-out", 24], "24 must be above 0 and below the 24 images"),
        (lambda _: ["--max-minutes", -1], "--max-minutes must be 0 or more"),
        (lambda _: ["--knn-temperature", 0], "--knn-temperature 0.0 is not above 0"),
        (lambda _: ["--layer-decay", 0], "--layer-decay 0.0 is not in"),
        (lambda _: ["--layer-decay", 1.1], "--layer-decay 1.1 is not in"),
        (lambda _: ["--freeze", "nothing"], "--freeze nothing is no module of it"),
        (lambda _: ["--optimizer", "adam"], "--optimizer adam is none of lars"),
        (lambda _: ["--views", "mine"], "--views mine is none of"),
        (lambda _: ["--batch-size", 0], "--batch-size must be 1 or more"),
        (lambda _: ["--batch-size", 9, "--accumulate", 2], "9 does not divide by 1 processes"),
        (lambda _: ["--accumulate", 8], "needs 2 images or more in a pass"),
        (lambda _: ["--steps", 0], "--steps must be 1 or more"),
        (lambda _: ["--decode-size", 0], "--decode-size must be 1 or more"),
        (lambda _: ["--seed", -1], "--seed must be 0 or more"),
        (lambda _: ["--lr", -1], "--lr must be 0 or more"),
        (lambda _: ["--projection-size", 0], "--projection-size must be 1 or more"),
        (lambda _: ["--warmup-epochs", 5], "5 is not within 4 epochs"),
        (lambda _: ["--base-decay", 1.5], "1.5 is not in"),
        (lambda _: ["--fsdp"], "start with torchrun"),
        (lambda _: ["--fsdp", "--amp", "fp16"], "--fsdp needs --amp bf16"),
        (lambda _: [*NORM_FREE, "--small-stem"], "conv1"),
        pytest.param(
            lambda _: ["--device", "cuda"],
            "sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_sentence_before_training(
    arrange: Callable[[Path], list[object]],
    message: str,
    npz: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(imagenet_ddp, "train", never)
    with pytest.raises(SystemExit, match=message):
        run_here(tmp_path / "out", "--data", npz, *TINY, *arrange(tmp_path))
