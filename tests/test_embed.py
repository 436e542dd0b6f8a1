"""embed.py and label_efficiency.py on small folders: what they leave, and what they refuse."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.transforms import v2

from byol_pytorch.checkpoint import export_backbone

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = ("--model", "resnet10t", "--model-args", '{"channels": [8, 8, 8, 8]}',
         "--image-size", 32, "--workers", 0)  # fmt: skip


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images and a copy of one of them, unlabelled."""
    rng = np.random.default_rng(0)
    place = tmp_path / "images"
    place.mkdir()
    for i in range(10):
        small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        small.resize((40 + i, 40)).save(place / f"{i}.png")
    (place / "copy.png").write_bytes((place / "3.png").read_bytes())
    return place


def test_rows_are_the_models_features_in_the_order_of_the_paths(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "broken.png").write_text("no image")
    out = tmp_path / "out"
    done = run("embed.py", "--data", folder, *SMALL, "--output", out, "--seed", 3)
    assert done.returncode == 0, done.stderr
    assert "1 of 12 images cannot be read and are left out, the first is broken.png" in done.stdout
    embeddings = np.load(out / "embeddings.npy")
    paths = (out / "paths.txt").read_text().splitlines()
    assert embeddings.shape == (11, 8) and embeddings.dtype == np.float32
    assert sorted(paths) == sorted([*(f"{i}.png" for i in range(10)), "copy.png"])

    torch.manual_seed(3)
    net = timm.create_model("resnet10t", num_classes=0, channels=[8, 8, 8, 8]).eval()
    resize = v2.Resize(round(32 * 256 / 224), interpolation=v2.InterpolationMode.BICUBIC)
    crop = v2.CenterCrop(32)
    mean, std = (np.array(v) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    image = crop(resize(Image.open(folder / paths[4]).convert("RGB")))
    pixels = (np.asarray(image) / 255 - mean) / std
    with torch.no_grad():
        expected = net(torch.from_numpy(pixels).permute(2, 0, 1)[None].float())[0]
    torch.testing.assert_close(torch.from_numpy(embeddings[4]), expected, rtol=1e-4, atol=1e-5)


def test_a_querys_copy_is_its_nearest_neighbour(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("embed.py", "--data", folder, *SMALL, "--output", out, "--k", 3,
               "--query", folder / "3.png", "copy.png")  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row[:2] for row in rows] == [
        ["3.png", "copy.png (1.000)"],
        ["copy.png", "3.png (1.000)"],
    ]
    assert all(len(row) == 4 and row[0] not in [c.split(" ")[0] for c in row[1:]] for row in rows)
    assert Image.open(out / "neighbours.png").size[0] > 100


def test_copies_are_listed_as_duplicates(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("embed.py", "--data", folder, *SMALL, "--output", out, "--duplicates", 0.99999)
    assert done.returncode == 0, done.stderr
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [sorted(row[:2]) for row in rows] == [["3.png", "copy.png"]]


def test_many_pairs_are_cut_and_a_cosine_that_fits_is_named(folder: Path, tmp_path: Path) -> None:
    for i in range(25):
        (folder / f"again{i}.png").write_bytes((folder / "3.png").read_bytes())
    out = tmp_path / "out"
    done = run("embed.py", "--data", folder, *SMALL, "--output", out, "--duplicates", 0.5)
    assert done.returncode == 0, done.stderr
    assert "one image in 100 has another at a cosine of 1.0000 or more" in done.stdout
    results = json.loads((out / "results.json").read_text())
    assert len(results["rows"]) == 200 and "the first 200" in results["title"]


def test_no_picture_is_promised_where_no_pair_is_alike(folder: Path, tmp_path: Path) -> None:
    (folder / "copy.png").unlink()
    done = run("embed.py", "--data", folder, *SMALL, "--output", tmp_path, "--duplicates", 1)
    assert done.returncode == 0, done.stderr
    assert "10 embeddings of 8 values are in" in done.stdout and "the picture" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--query", "absent.png"), "--query absent.png is not among the 11 images"),
        (("--duplicates", 2), "--duplicates 2; expected a cosine above 0 and up to 1"),
        (("--k", 0), "--k 0; expected 1 or more"),
    ],
)
def test_wrong_questions_are_refused(
    folder: Path, tmp_path: Path, arguments: tuple[object, ...], sentence: str
) -> None:
    done = run("embed.py", "--data", folder, *SMALL, "--output", tmp_path / "out", *arguments)
    assert done.returncode and sentence in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "embeddings.npy").exists()


def write_classes(place: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 4)):
        for name, colour in (("red", 0), ("blue", 2)):
            (place / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                pixels[..., colour] += 120
                Image.fromarray(pixels).save(place / split / name / f"{i}.png")


def write_backbone(path: Path) -> None:
    """As the pre-training leaves one: the file says how it is built, and for which size."""
    torch.manual_seed(7)
    options = {"num_classes": 0, "channels": [8, 8, 8, 8]}
    net = timm.create_model("resnet10t", **options)
    export_backbone(net, path, mean=(0.5,) * 3, std=(0.5,) * 3, image_size=32, model_args=options)


def test_the_checkpoints_own_model_is_the_default(folder: Path, tmp_path: Path) -> None:
    write_backbone(tmp_path / "mine.safetensors")
    out, given = tmp_path / "out", ("--checkpoint", tmp_path / "mine.safetensors")
    done = run("embed.py", "--data", folder, *given, "--output", out, "--workers", 0)
    assert done.returncode == 0, done.stderr
    assert f"--model resnet10t, as {tmp_path / 'mine.safetensors'} says" in done.stdout
    assert "resnet10t with mine.safetensors, 32 px" in done.stdout
    assert np.load(out / "embeddings.npy").shape == (11, 8)


def test_all_starts_see_images_of_the_files_size(tmp_path: Path) -> None:
    write_classes(tmp_path / "data")
    write_backbone(tmp_path / "mine.safetensors")
    out = tmp_path / "out"
    done = run(
        "label_efficiency.py", "--data", tmp_path / "data", "--workers", 0, "--output", out,
        "--starts", "random", tmp_path / "mine.safetensors", "--labels", 100,
        "--linear-epochs", 1, "--finetune", "--epochs", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "resnet10t, 32 px, data" in json.loads((out / "results.json").read_text())["title"]
    opened = [line for line in done.stdout.splitlines() if line.startswith("resnet10t with")]
    assert len(opened) == 4 and all(line.endswith(", 32 px") for line in opened)


def test_the_label_curve_has_every_start_and_part(tmp_path: Path) -> None:
    write_classes(tmp_path / "data")
    torch.manual_seed(5)
    net = timm.create_model("resnet10t", num_classes=0, channels=[8, 8, 8, 8])
    torch.save(net.state_dict(), tmp_path / "mine.pt")
    out = tmp_path / "out"
    done = run(
        "label_efficiency.py", "--data", tmp_path / "data", *SMALL, "--output", out,
        "--starts", tmp_path / "mine.pt", "random", "--labels", 10, 100, "--linear-epochs", 30,
        "--finetune", "--epochs", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    assert results["columns"][2:] == ["10 % (2 images)", "100 % (20 images)"]
    table = {tuple(row[:2]): row[2:] for row in results["rows"]}
    assert list(table) == [(m, s) for m in ("kNN", "linear", "fine-tuned")
                           for s in ("mine.pt", "random")]  # fmt: skip
    assert all(0 <= value <= 100 for row in table.values() for value in row)
    assert (results["test images"], results["chance"]) == (8, 50)
    # The colours tell the classes apart, also through random weights.
    assert table["kNN", "mine.pt"][1] == table["linear", "random"][1] == 100
    assert Image.open(out / "label_efficiency.png").size[0] > 300


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--starts", "absent.pt"), "--starts absent.pt is no file"),
        (("--starts", "random", "--labels", 0), "expected percentages above 0"),
    ],
)
def test_wrong_starts_and_parts_are_refused(
    folder: Path, arguments: tuple[object, ...], sentence: str
) -> None:
    done = run("label_efficiency.py", "--data", folder, *SMALL, *arguments)
    assert done.returncode and sentence in done.stderr and "Traceback" not in done.stderr
