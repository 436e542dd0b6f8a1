"""examples/evaluate_knn.py on small pictures: its table, its parts, two processes, refusals."""

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torchvision import transforms as v1

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import evaluate_knn
from parts.backbone import open_backbone
from parts.labelled import evaluation_images
from parts.sources import open_data

TINY = (
    *("--model", "resnet10t", "--model-args", '{"channels": [8, 16, 32, 64]}', "--image-size", 32),
    *("--workers", 0, "--device", "cpu", "--batch-size", 8),
)
CLASSES, TRAIN, TEST = 6, 5, 3


def write_image(path: Path, label: int, number: int) -> None:
    """A class is a mean colour, not quite told apart by noise."""
    rng = np.random.default_rng((label, number))
    colour = np.random.default_rng(label).integers(0, 120, 3) + rng.integers(0, 60, 3)
    pixels = rng.integers(0, 70, (36, 40, 3)) + colour
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("knn")
    for part, count, first in (("train", TRAIN, 0), ("val", TEST, TRAIN)):
        for label in range(CLASSES):
            for i in range(first, first + count):
                write_image(folder / part / f"class{label}" / f"{i}.png", label, i)
    return folder


def run(data: Path, output: Path, *flags: object) -> dict[str, Any]:
    given = (*TINY, "--data", data, "--output", output, *flags)
    evaluate_knn.main([str(x) for x in given])
    return json.loads((output / "results.json").read_text())


def refusal(data: Path, output: Path, *flags: object) -> str:
    with pytest.raises(SystemExit) as ended:
        run(data, output, *flags)
    return str(ended.value)


def test_the_table_is_scikit_learns_vote_on_the_backbones_features(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run(data, tmp_path, "--k", 1, 7, "--temperature", 0.05)
    args = evaluate_knn.parse([str(x) for x in (*TINY, "--data", data)])
    net, facts = open_backbone(args)
    net.eval()
    parts = []
    for source in open_data(data):
        images = evaluation_images((source, np.arange(len(source))), facts, bilinear=True)
        with torch.no_grad():
            found = net(torch.stack([images[i][0] for i in range(len(images))]))
        parts.append((found.double().numpy(), images.labels))
    (bank, labels), (queries, truth) = parts
    for column, k in ((1, 1), (2, 7)):
        model = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.05)
        )
        votes = model.fit(bank, labels).predict_proba(queries)
        best = np.argsort(-votes, axis=1)[:, :5]
        voted = np.take_along_axis(votes, best, axis=1) > 0
        hits = (best == truth[:, None]) & voted
        assert results["rows"][0][column] == pytest.approx(100 * hits[:, 0].mean())
        assert results["rows"][1][column] == pytest.approx(100 * hits.any(1).mean())
    assert results["columns"] == ["kNN accuracy, %", "k=1", "k=7"]
    assert results["train_images"] == CLASSES * TRAIN and results["test_images"] == CLASSES * TEST
    assert results["classes"] == CLASSES
    assert (tmp_path / "results.md").read_text() in capsys.readouterr().out


def test_the_published_k_are_the_default(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run(data, tmp_path)
    assert results["columns"][1:] == ["k=10", "k=20"]
    assert "left out: k = 100, 200, as only 30 vote" in capsys.readouterr().out
    assert results["flags"]["temperature"] == 0.07


def test_published_rows_stand_beside_imagenet_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MMSelfSup 0.x, configs/selfsup/byol/README.md, "ImageNet Nearest-Neighbor Classification"."""
    assert evaluate_knn.IMAGENET == (1_281_167, 50_000, 1000)
    assert len(run(data, tmp_path / "other")["rows"]) == 2
    monkeypatch.setattr(evaluate_knn, "IMAGENET", (CLASSES * TRAIN, CLASSES * TEST, CLASSES))
    rows = run(data, tmp_path / "own")["rows"][2:]
    assert [row[1:] for row in rows] == [[63.9, 64.2], [66.1, 66.3]]
    assert "200 epochs" in rows[0][0] and "300 epochs" in rows[1][0]
    assert list(evaluate_knn.PUBLISHED.values()) == [
        {10: 63.9, 20: 64.2, 100: 62.9, 200: 61.9}, {10: 66.1, 20: 66.3, 100: 65.2, 200: 64.4},
    ]  # fmt: skip
    less = run(data, tmp_path / "less", "--train-images", CLASSES * TRAIN - 1)
    assert len(less["rows"]) == 2


def test_images_are_made_smaller_bilinearly(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MMSelfSup 0.x, configs/benchmarks/classification/knn_imagenet.py: Resize(256), CenterCrop(
    224), of torchvision, with its default interpolation."""
    seen: list[Any] = []
    images = evaluation_images

    def kept(*args: Any, **how: Any) -> Any:
        seen.append(images(*args, **how))
        return seen[-1]

    monkeypatch.setattr(evaluate_knn, "evaluation_images", kept)
    run(data, tmp_path)
    for part in seen:
        picture = Image.open(part.source.folder / part.source.name(0)).convert("RGB")
        small = v1.Compose([v1.Resize(round(32 * 256 / 224)), v1.CenterCrop(32), v1.ToTensor()])
        expected = v1.functional.normalize(
            small(picture), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        )
        torch.testing.assert_close(part[0][0].as_subclass(torch.Tensor), expected)


def test_a_draw_of_the_images_and_features_in_files(data: Path, tmp_path: Path) -> None:
    flags = ("--train-images", 20, "--test-images", 10, "--k", 3)
    drawn = run(data, tmp_path / "memory", *flags)
    assert drawn["train_images"] == 20 and drawn["test_images"] == 10
    stored = run(data, tmp_path / "files", *flags, "--memmap", tmp_path / "features")
    assert stored["rows"] == drawn["rows"]
    assert np.load(tmp_path / "features" / "train" / "pooled.npy").shape == (20, 64)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--k", 50), "--k 50; only 30 training images can vote"),
        (("--k", 0), "at least 1"),
        (("--temperature", 0), "--temperature is above 0"),
        (("--data", "nowhere"), "nowhere"),
    ],
)
def test_wrong_flags_are_one_sentence(data: Path, tmp_path: Path, flags: Any, message: str) -> None:
    assert message in refusal(data, tmp_path, *flags)


def process(rank: int, port: int, data: Path, output: Path) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank),
        LOCAL_RANK=str(rank),
    )  # fmt: skip
    torch.set_num_threads(1)
    # Not run, which reads the file that rank 0 may be writing still.
    evaluate_knn.main([str(x) for x in (*TINY, "--data", data, "--output", output, "--k", 3, 7)])


@pytest.mark.slow
def test_two_processes_give_what_one_gives(data: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(process, (port, data, tmp_path / "two"), nprocs=2)
    together = json.loads((tmp_path / "two" / "results.json").read_text())
    assert together["rows"] == run(data, tmp_path / "one", "--k", 3, 7)["rows"]
    assert together["train_images"] == CLASSES * TRAIN
