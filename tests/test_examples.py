"""examples/quickstart.py as its user runs it: what it prints and leaves, and its refusals."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from byol_pytorch.checkpoint import load_backbone

# One process runs this file, so that the default run is done once.
pytestmark = pytest.mark.xdist_group("examples")

SCRIPT = Path(__file__).parents[1] / "examples" / "quickstart.py"
Arrange = Callable[[Path], list[str]]
FEATURES = ("raw pixels", "untrained backbone", "trained backbone")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def run_well(*arguments: object) -> str:
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_images(folder: Path, count: int, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        height, width = rng.integers(40, 60, 2)
        pixels = rng.integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def assert_not_blank(path: Path) -> None:
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) > 500
    for part in (*np.array_split(pixels, 4), *np.array_split(pixels, 3, axis=1)):
        assert part.std() > 5
    assert len(np.unique(pixels.reshape(-1, 3)[::7], axis=0)) > 100


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("quickstart") / "new" / "folder"
    few = ("--steps", 3, "--batch-size", 16, "--seeds", 2)
    return folder, run_well("--output", folder, "--json", folder / "json" / "figures.json", *few)


def test_the_default_run_reports_the_accuracies_of_all_seeds(default_run: tuple[Path, str]) -> None:
    folder, printed = default_run
    figures = json.loads((folder / "json" / "figures.json").read_text())
    assert (figures["train_images"], figures["test_images"]) == (4000, 1000)
    assert len(figures["classes"]) == 20
    assert [seed["seed"] for seed in figures["seeds"]] == [0, 1]
    for name in FEATURES:
        assert name in printed
        for column in ("few", "all"):
            each = [seed["knn"][name][column] for seed in figures["seeds"]]
            assert figures["knn"][name][column] == pytest.approx(sum(each) / 2)
            assert f"{figures['knn'][name][column]:.1f} ±" in printed
            assert all(10 < value < 100 for value in each)
    for seed in figures["seeds"]:
        assert len(seed["losses"]) == seed["steps"] == 3
        assert all(0 < loss < 8 for loss in seed["losses"])
        assert all(entry["feature_std"] > 0 for entry in seed["health"])


def test_the_default_run_draws_a_picture(default_run: tuple[Path, str]) -> None:
    assert_not_blank(default_run[0] / "report.png")


def test_the_printed_lines_load_the_backbone_into_timm(default_run: tuple[Path, str]) -> None:
    folder, printed = default_run
    lines = [line.strip() for line in printed.splitlines() if line.startswith("    net")]
    names = {"timm": timm, "safetensors": safetensors}
    exec("\n".join(lines), names)
    net = names["net"].eval()
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 128)
    report = load_backbone(folder / "backbone.safetensors", names["net"])
    assert report.architecture == "resnet10t"
    assert report.image_size == (32, 32)
    assert report.mean == (0.485, 0.456, 0.406)


def test_a_run_leaves_no_other_files(default_run: tuple[Path, str]) -> None:
    left = sorted(str(p.relative_to(default_run[0])) for p in default_run[0].rglob("*.*"))
    assert left == ["backbone.safetensors", "json/figures.json", "report.png"]


def test_class_subfolders_are_labels_and_broken_files_are_named(
    tmp_path: Path, default_run: tuple[Path, str]
) -> None:
    data, output = tmp_path / "data", tmp_path / "out"
    write_images(data / "noise", 12)
    write_images(data / "gray" / "deeper", 10, seed=2)
    write_images(data / "alone", 1)
    write_images(data, 2)
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16).save(
        data / "gray" / "16bit.png"
    )
    (data / "noise" / "broken.jpg").write_bytes(b"no image")
    whole = (data / "noise" / "0.png").read_bytes()
    (data / "gray" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (data / "notes.txt").write_text("no image either")
    backbone = default_run[0] / "backbone.safetensors"
    printed = run_well(
        *("--data", data, "--output", output, "--json", output / "f.json", "--steps", 2),
        *("--batch-size", 4, "--image-size", 32, "--init-from", backbone),
    )
    figures = json.loads((output / "f.json").read_text())
    assert figures["classes"] == ["alone", "gray", "noise"]
    assert "1 of 3 class folders holds one image, such as alone" in printed
    assert "2 images lie outside of the class folders" in printed
    assert "left out: 1 .txt" in printed
    assert "4 test images cannot tell" in printed
    assert figures["train_images"] + figures["test_images"] == 26
    assert figures["test_images"] == 4  # a fifth of 12 and of 11
    assert len(figures["unreadable"]) == 2
    ending = printed[printed.index("2 files could not be read") :]
    assert "broken.jpg" in ending
    assert "cut.png" in ending
    assert f"loaded {len(load_file(backbone))} tensors" in printed
    follow = [shlex.split(x, comments=True) for x in printed.splitlines() if "embed.py" in x]
    command = [sys.executable, *follow[0][1:], "--workers", "0", "--output", str(output / "looks")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert np.load(output / "looks" / "embeddings.npy").shape == (26, 128)
    assert set(figures["knn"]) == {"raw pixels", "initial backbone", "trained backbone"}
    assert_not_blank(output / "report.png")


def test_without_labels_a_vision_transformer_trains_until_the_minutes_are_over(
    tmp_path: Path,
) -> None:
    data, output = tmp_path / "data", tmp_path / "out"
    write_images(data, 9)
    write_images(data / "only", 9, seed=1)
    printed = run_well(
        *("--data", data, "--output", output, "--json", output / "f.json"),
        *("--batch-size", 4, "--image-size", 32, "--model", "vit_tiny_patch16_224"),
        *("--minutes", 0.0001),
    )
    assert "no accuracies" in printed
    figures = json.loads((output / "f.json").read_text())
    assert f"stopped after {figures['seeds'][0]['steps']} steps" in printed
    assert figures["seeds"][0]["steps"] < 20
    assert figures["knn"] is None
    assert figures["options"] == {"num_classes": 0, "img_size": 32}
    net = timm.create_model(figures["model"], **figures["options"])
    net.load_state_dict(load_file(output / "backbone.safetensors"))
    assert_not_blank(output / "report.png")


def test_images_to_test_on_are_not_trained_on(tmp_path: Path) -> None:
    for split, count in (("train", 8), ("val", 3)):
        for seed, name in enumerate(("one", "two")):
            write_images(tmp_path / "data" / split / name, count, seed)
    run_well(
        *("--data", tmp_path / "data", "--output", tmp_path, "--json", tmp_path / "f.json"),
        *("--steps", 1, "--batch-size", 4, "--image-size", 32, "--view-args", '{"hue": 0}'),
    )
    figures = json.loads((tmp_path / "f.json").read_text())
    assert (figures["train_images"], figures["test_images"]) == (16, 6)


def test_ctrl_c_saves_the_backbone_and_ends_with_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path), "--batch-size", "16"]
    command += ["--steps", "100000"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TQDM_MININTERVAL": "0.1"},
    )  # fmt: skip
    assert process.stderr is not None
    while "3/100000" not in (read := process.stderr.readline()):
        assert read, "it ended before its third step"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "steps: saved" in out and "Traceback" not in err
    assert load_file(tmp_path / "backbone.safetensors")


def report_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from parts import report

    return report


@pytest.mark.parametrize(
    ("few", "count", "std", "said"),
    [
        ((20, 57, 72), 6, 0.06, ["6 test images cannot tell 57 % from 72 %"]),
        ((20, 57, 72), 1000, 0.06, []),
        ((20, 57, 42), 1000, 0.06, ["made the features worse"]),
        ((80, 57, 72), 1000, 0.06, ["raw pixels do better"]),
        ((20, 57, 72), 1000, 0.024, ["narrow: their spread is 0.0240, healthy is 0.0625"]),
        ((20, 57, 72), 1000, 0.001, ["collapsed"]),
    ],
)
def test_the_verdicts_say_what_the_figures_do_not_show(
    few: tuple[float, ...], count: int, std: float, said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    report = report_module(monkeypatch)
    accuracy = dict(zip(FEATURES, ({"few": value, "all": value} for value in few), strict=True))
    history = SimpleNamespace(health=[{"feature_std": std}], ideal_std=0.0625)
    pictures = SimpleNamespace(test=torch.zeros(count), classes=["a", "b"])
    found = report.verdicts([{"knn": accuracy, "history": history}], pictures)
    assert len(found) == len(said)
    assert all(part in sentence for part, sentence in zip(said, found, strict=True))
    title = report.headline(accuracy, count)
    error = (few[1] * (100 - few[1]) / count) ** 0.5
    assert f"of {count} unseen images {few[1]} ± {error:.0f} %" in title


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a_very_long_name_of_an_image.png", "…e_of_an_image.png"),
        ("細胞.png", r"\u7d30\u80de.png"),
        ("$x$", r"\$x\$"),
        ("größe", "größe"),
    ],
)
def test_names_are_cut_and_what_the_font_lacks_is_escaped(
    name: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from parts.tables import drawn

    assert drawn(name) == shown


def test_a_refusal_is_one_sentence_without_a_traceback(tmp_path: Path) -> None:
    done = run("--data", tmp_path / "missing", "--output", tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        f"quickstart: --data {tmp_path / 'missing'} is not a folder."
    ]


def empty(folder: Path) -> list[str]:
    return ["--data", str(folder)]


def few_images(folder: Path) -> list[str]:
    write_images(folder, 3)
    return ["--data", str(folder), "--batch-size", "4"]


def few_readable(folder: Path) -> list[str]:
    write_images(folder, 3)
    (folder / "broken.png").write_bytes(b"")
    return ["--data", str(folder), "--batch-size", "4"]


def few_left_for_training(folder: Path) -> list[str]:
    write_images(folder, 10)
    return ["--data", str(folder), "--batch-size", "10"]


def one_image_a_class(folder: Path) -> list[str]:
    for name in ("cat", "dog"):
        write_images(folder / name, 1)
    return ["--data", str(folder), "--batch-size", "2"]


def many_images(folder: Path) -> list[str]:
    write_images(folder, 401)
    return ["--data", str(folder), "--image-size", "2000"]


def other_weights(folder: Path) -> list[str]:
    torch.save({"state_dict": {"something.weight": torch.zeros(2)}}, folder / "weights.pt")
    return ["--init-from", str(folder / "weights.pt")]


def pickled_code(folder: Path) -> list[str]:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(folder / "ran"),)

    torch.save({"weight": Evil()}, folder / "weights.pt")
    return ["--init-from", str(folder / "weights.pt")]


def text_as_weights(folder: Path) -> list[str]:
    (folder / "weights.safetensors").write_text("text")
    return ["--init-from", str(folder / "weights.safetensors")]


def file_as_output(folder: Path) -> list[str]:
    (folder / "file").write_text("")
    return ["--output", str(folder / "file")]


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (empty, "holds no image files"),
        (few_images, "3 images in .* do not fill a batch of 4: give --batch-size 3"),
        (few_readable, "3 readable images in .* do not fill a batch of 4"),
        (few_left_for_training, "8 images that are not held out .* give --batch-size 8"),
        (
            many_images,
            "401 images .* take 5.9 GiB, and the limit is 4: give a smaller --image-size",
        ),
        (other_weights, "weights.pt does not fit ResNet.*Expected the weights of the same"),
        (pickled_code, r"weights.pt holds posix\.mkdir.*can run code"),
        (text_as_weights, "weights.safetensors .* is damaged, cut short or no safetensors file"),
        (file_as_output, "cannot write to the folder .*file"),
        (lambda _: ["--init-from", "missing.pt"], "missing.pt is no file"),
        (lambda _: ["--model", "resnet51"], "not a model of timm. Near names: .*resnet50"),
        (lambda _: ["--model", "vit_tiny_patch16_224", "--image-size", "7"], "7 px"),
        (lambda _: ["--batch-size", "1"], "needs 2 images or more"),
        (lambda _: ["--batch-size", "4001"], "4000 training windows do not fill a batch of 4001"),
        (lambda _: ["--minutes", "0"], "expected more than 0"),
        (lambda _: ["--max-value", "-1"], "--max-value is -1; expected more than 0"),
        (lambda _: ["--view-args", '{"blurr": 1}'], "makes no views: .*blurr"),
    ],
)
def test_bad_input_is_refused_in_one_sentence_before_training(
    arrange: Arrange, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import quickstart

    def never(*_: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(quickstart, "train", never)
    monkeypatch.setattr(
        sys, "argv", ["quickstart.py", "--output", str(tmp_path / "out"), *arrange(tmp_path)]
    )
    with pytest.raises(SystemExit, match=message) as caught:
        quickstart.main()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("argument", ["--steps=0", "--seeds=-1", "--batch-size=many"])
def test_numbers_below_one_are_usage_errors(
    argument: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import quickstart

    monkeypatch.setattr(sys, "argv", ["quickstart.py", argument])
    with pytest.raises(SystemExit):
        quickstart.main()
    assert argument.split("=")[0] in capsys.readouterr().err


@pytest.mark.slow
def test_training_lifts_the_features_by_the_required_margins(tmp_path: Path) -> None:
    run_well("--seeds", 3, "--output", tmp_path, "--json", tmp_path / "figures.json")
    knn = json.loads((tmp_path / "figures.json").read_text())["knn"]
    pixels, untrained, trained = (knn[name]["few"] for name in FEATURES)
    assert trained >= untrained + 20
    assert trained >= pixels + 30
