"""examples/evaluate_svm.py on tiny data in PASCAL's layout and in folders: tables and refusals."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = str(Path(__file__).parents[1] / "examples")
sys.path.insert(0, EXAMPLES)

import evaluate_svm  # noqa: E402
from parts import machine, voc  # noqa: E402
from parts.backbone import Facts  # noqa: E402

SPLITS, ALL = ("trainval", "test"), (None, None)


def small(whole: bool) -> Any:
    """The view of images of 32 px."""
    return evaluate_svm.transform("whole", Facts("", "", image_size=32), whole)


pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

LAYERS = [f"feature{i}" for i in range(1, 6)]
TINY = (
    *("--model", "resnet10t", "--model-args", '{"channels": [8, 8, 16, 16]}', "--image-size", "32"),
    *("--batch-size", "16", "--workers", "0", "--device", "cpu", "--jobs", "1"),
    *("--costs", "1", "100", "--shots", "1", "2", "--samplings", "2"),
)
# What each image shows: an object of a class, a difficult one, or none.
SHOWN = {"aeroplane": "+-+-?+-+-+-+", "tvmonitor": "++--+?--++--"}
LABEL = {"+": 1, "-": 0, "?": -1}


def write_image(path: Path, colours: list[tuple[int, int, int]], seed: int) -> None:
    """A patch a colour on noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 60, (40, 56, 3), np.uint8)
    for i, colour in enumerate(colours):
        pixels[10:30, 28 * i : 28 * i + 24] = colour
    Image.fromarray(pixels).save(path)


def write_voc(folder: Path, lists: bool) -> Path:
    place = folder / "VOCdevkit" / "VOC2007"
    sets = place / "ImageSets" / "Main"
    sets.mkdir(parents=True)
    (place / "Annotations").mkdir()
    for number, split in enumerate(("trainval", "test")):
        names = [f"{number}_{i:02d}" for i in range(2 * 12)]
        (sets / f"{split}.txt").write_text("\n".join(names) + "\n")
        for i, name in enumerate(names):
            marks = {c: shown[i % 12] for c, shown in SHOWN.items()}
            colours = {"aeroplane": (255, 40, 0), "tvmonitor": (0, 80, 255)}
            there = [colours[c] if m != "-" else (0, 0, 0) for c, m in marks.items()]
            write_image(place / "JPEGImages" / f"{name}.jpg", there, i)
            # Beside a clear object there are difficult ones, before it and after.
            objects = [f"<object><name>{c}</name><difficult>{difficult}</difficult></object>"
                       for c, m in marks.items() if m != "-"
                       for difficult in ((1, 0, 1) if m == "+" else (1, 1))]  # fmt: skip
            xml = f"<annotation>{''.join(objects)}</annotation>"
            (place / "Annotations" / f"{name}.xml").write_text(xml)
        for c, shown in SHOWN.items() if lists else ():
            pascal = {"+": " 1", "-": "-1", "?": " 0"}
            lines = [f"{name} {pascal[shown[i % 12]]}" for i, name in enumerate(names)]
            (sets / f"{c}_{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


def write_classes(folder: Path) -> Path:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    for split, count in (("train", 6), ("val", 4)):
        for c, colour in enumerate(colours):
            for i in range(count):
                write_image(folder / split / f"class{c}" / f"{i}.png", [colour], i)
    return folder


def run(capsys: pytest.CaptureFixture[str], output: Path, *flags: Any) -> tuple[str, Any]:
    evaluate_svm.main([*TINY, "--output", str(output), *map(str, flags)])
    return capsys.readouterr().out, json.loads((output / "results.json").read_text())


def refusal(output: Path, *flags: Any) -> str:
    with pytest.raises(SystemExit) as ended:
        evaluate_svm.main([*TINY, "--output", str(output), *map(str, flags)])
    return str(ended.value)


def test_voc_gives_both_tables_beside_the_published_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MMSelfSup 0.x, configs/selfsup/byol/README.md, "VOC SVM / Low-shot SVM"."""
    data = write_voc(tmp_path / "data", lists=True)
    _, other = run(capsys, tmp_path / "other", "--data", data, "--low-shot", "none")
    assert other["rows"][-1][0] == "chance"  # it is not VOC07
    assert evaluate_svm.VOC07 == (5011, 4952, 20)
    monkeypatch.setattr(evaluate_svm, "VOC07", (24, 24, 2))
    monkeypatch.setattr(evaluate_svm.voc, "CLASSES", tuple(SHOWN))
    printed, results = run(capsys, tmp_path / "out", "--data", data)

    assert results["columns"] == ["layer", "SVM", "k=1", "k=2"]
    assert [row[0].strip("*") for row in results["rows"][:5]] == LAYERS
    published = results["rows"][-1]
    assert "MMSelfSup" in published[0] and published[1:] == [86.31, 45.37, 56.83]
    assert results["classes"] == ["aeroplane", "tvmonitor"]
    assert results["chance"] == pytest.approx((6 / 11 + 5 / 11) / 2)

    best = max(LAYERS, key=lambda layer: results["svm"][layer]["mean_ap"])
    assert results["best"] == best and list(results["low_shot"]) == [best]
    assert results["svm"][best]["mean_ap"] > 0.9
    for row, layer in zip(results["rows"][:5], LAYERS, strict=True):
        shown = f"{100 * results['svm'][layer]['mean_ap']:.2f}"
        few = results["low_shot"].get(layer)
        assert row[:2] == ([f"**{layer}**", f"**{shown}**"] if few else [layer, shown])
        assert row[2] == (f"{100 * few['mean_ap'][0]:.2f} ± {100 * few['deviation'][0]:.2f}"
                          if few else None)  # fmt: skip
    assert (tmp_path / "out" / "results.md").read_text() in printed
    assert results["flags"]["folds"] == 3 and results["flags"]["metric"] == "voc10"


@pytest.mark.parametrize("lists", [True, False])
@pytest.mark.parametrize("below", ["", "VOCdevkit", "VOCdevkit/VOC2007"])
def test_lists_and_annotations_say_the_same(tmp_path: Path, lists: bool, below: str) -> None:
    data = write_voc(tmp_path, lists) / below
    folder = voc.find_year(data, "VOC2007", "Main")
    assert folder is not None
    train, test, classes = evaluate_svm.open_voc(folder, SPLITS, None, ALL, 0, small)
    assert classes == ["aeroplane", "tvmonitor"]
    expected = [[LABEL[SHOWN[c][i % 12]] for c in classes] for i in range(24)]
    for part in (train, test):
        assert len(part) == 24
        assert [part[i][1].tolist() for i in range(24)] == expected


def test_classes_can_be_chosen(tmp_path: Path) -> None:
    data = write_voc(tmp_path, lists=False)
    folder = data / "VOCdevkit" / "VOC2007"
    train, _, classes = evaluate_svm.open_voc(folder, SPLITS, ["tvmonitor"], ALL, 0, small)
    assert classes == ["tvmonitor"]
    assert [train[i][1].item() for i in range(12)] == [LABEL[m] for m in SHOWN["tvmonitor"]]


def test_folders_of_classes_give_an_accuracy_and_no_published_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_classes(tmp_path / "data")
    _, results = run(
        capsys, tmp_path / "out", "--data", data, "--layers", "feature5", "pooled",
        "--low-shot", "all", "--metric", "voc07",
    )  # fmt: skip
    assert results["columns"] == ["layer", "SVM", "top-1", "k=1", "k=2"]
    assert [row[0].strip("*") for row in results["rows"]] == ["feature5", "pooled", "chance"]
    assert results["svm"]["pooled"]["top1"] > 0.6 and results["svm"]["pooled"]["mean_ap"] > 0.7
    assert list(results["low_shot"]) == ["feature5", "pooled"]
    assert results["low_shot"]["pooled"]["top1"][1] > 0.5
    assert np.shape(results["low_shot"]["pooled"]["all_mean_ap"]) == (2, 2, 2)


def test_the_flags_and_both_parts_reach_the_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[int], dict[str, Any]]] = []

    def spy(name: str) -> None:
        measure = getattr(evaluate_svm, name)

        def spied(*data: torch.Tensor, **options: Any) -> Any:
            asked.append(([len(x) for x in data], options))
            return measure(*data, **options)

        monkeypatch.setattr(evaluate_svm, name, spied)

    spy("svm_map")
    spy("low_shot_map")
    data = write_voc(tmp_path / "data", lists=True)
    flags = ("--layers", "feature5", "--test-images", 20, "--metric", "area", "--max-iter", 50)
    flags += ("--tol", 1e-3, "--positive-weight", 3, "--seed", 4, "--folds", 2, "--drop-difficult")
    evaluate_svm.main([*TINY, *map(str, flags), "--data", str(data), "--output", str(tmp_path)])

    common = {"costs": [1.0, 100.0], "metric": "area", "max_iter": 50, "tol": 1e-3}
    common |= {"positive_weight": 3.0, "seed": 4, "n_jobs": 1, "progress": True}
    own = ({"folds": 2, "train_on_ignored": False}, {"shots": [1, 2], "samplings": 2})
    assert asked == [([24, 24, 20, 20], common | options) for options in own]


def test_a_network_without_stages_has_its_pooled_feature(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_classes(tmp_path / "data")
    vit = '{"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 8}'
    _, results = run(
        capsys, tmp_path / "out", "--data", data, "--model", "vit_tiny_patch16_224",
        "--model-args", vit, "--low-shot", "none", "--train-images", 15, "--test-images", 11,
    )  # fmt: skip
    assert list(results["svm"]) == ["pooled"] and results["low_shot"] == {}
    assert results["columns"] == ["layer", "SVM", "top-1"]


def test_a_draw_of_images_follows_the_seed(tmp_path: Path) -> None:
    data = write_classes(tmp_path)

    def draw(seed: int) -> list[int]:
        train, test, _ = evaluate_svm.open_classes(
            evaluate_svm.open_images(data), (9, None), seed, small
        )
        assert len(train) == 9 and len(test) == 12
        assert [label for _, label in train] == train.labels.tolist()
        return train.indices.tolist()

    assert draw(1) == draw(1) != draw(2)


def test_the_published_framing_shows_the_whole_image() -> None:
    pixels = np.zeros((60, 120, 3), np.uint8)
    pixels[:, :12] = 255
    facts = Facts("", "", (0.0,) * 3, (1.0,) * 3, image_size=56)
    image = Image.fromarray(pixels)
    whole = evaluate_svm.transform("whole", facts, whole=False)(image)
    centre = evaluate_svm.transform("centre", facts, whole=False)(image)
    assert whole.shape == centre.shape == torch.Size([3, 56, 56])
    assert whole[:, :, :4].min() > 0.9 and whole[:, :, 8:].max() < 0.1
    assert centre.max() == 0.0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--test-split", "val"), "val.txt is not there; the splits are test, trainval"),
        (("--classes", "cat"), "no class cat .* it has aeroplane, tvmonitor"),
        (("--layers", "layer4"), "layer4: resnet10t has feature1, .* pooled"),
        (("--low-shot", "feature6"), "expected best, all, none or one of feature1"),
        (("--shots", "1", "96"), "Class 0 has 12 positive samples .* fewer shots than 96"),
        (("--train-images", "0"), "--train-images 0; expected positive numbers"),
        (("--costs", "1", "0"), "--costs 0.0; expected positive numbers"),
        (("--folds", "1"), "--folds 1 .* expected at least 2 folds"),
        (("--classes", "aeroplane"), "labels have 1 class"),
    ],
)
def test_wrong_flags_end_in_one_sentence_before_images_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], words: str
) -> None:
    monkeypatch.setattr(machine, "extract_features", None)
    data = write_voc(tmp_path / "data", lists=True)
    sentence = refusal(tmp_path / "out", "--data", data, *flags)
    assert re.search(words, sentence) and "\n" not in sentence
    assert not (tmp_path / "out" / "results.json").exists()


def test_images_without_labels_are_refused(tmp_path: Path) -> None:
    for i in range(3):
        write_image(tmp_path / "data" / f"{i}.png", [], i)
    assert "have no label" in refusal(tmp_path / "out", "--data", tmp_path / "data")


def test_a_damaged_list_is_named(tmp_path: Path) -> None:
    data = write_voc(tmp_path / "data", lists=True)
    path = data / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / "aeroplane_test.txt"
    path.write_text("1_00 2\n")
    assert "aeroplane_test.txt has lines other than" in refusal(tmp_path, "--data", data)
