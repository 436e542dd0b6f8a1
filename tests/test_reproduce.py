"""examples/reproduce.py: its page, its commands and figures, and its checks on made data in the
layouts of the published ones."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

pytest.importorskip("pycocotools")

import evaluate_knn  # noqa: E402
import evaluate_linear  # noqa: E402
import evaluate_svm  # noqa: E402
import finetune_classification  # noqa: E402
import finetune_detection  # noqa: E402
import finetune_segmentation  # noqa: E402
import imagenet_ddp  # noqa: E402
import reproduce  # noqa: E402
import test_evaluate_linear as linear  # noqa: E402
import test_evaluate_svm as svm  # noqa: E402
import test_finetune_detection as detection  # noqa: E402
import test_finetune_segmentation as segmentation  # noqa: E402
from parts.published import DataSet  # noqa: E402

from byol_pytorch.checkpoint import export_backbone  # noqa: E402

pytestmark = pytest.mark.xdist_group("reproduce")

PARSERS: dict[str, Callable[[list[str]], Any]] = {
    "evaluate_linear.py": evaluate_linear.parse,
    "evaluate_knn.py": evaluate_knn.parse,
    "evaluate_svm.py": evaluate_svm.parse,
    "finetune_classification.py": finetune_classification.parse,
    "finetune_detection.py": finetune_detection.parse_arguments,
    "finetune_segmentation.py": finetune_segmentation.parse_arguments,
}


def test_the_page_has_the_tables_that_the_program_checks(capsys: Any) -> None:
    reproduce.main(["--page"])
    text = (ROOT / "docs" / "reproduce.md").read_text()
    assert text.split("## The tables\n\n")[1] == capsys.readouterr().out


@pytest.mark.parametrize("name", reproduce.TABLES)
def test_a_tables_command_is_one_that_its_program_takes(name: str, tmp_path: Path) -> None:
    table = reproduce.TABLES[name]
    torch.save({"state_dict": {}}, tmp_path / "x.pth")
    words = reproduce.command_of(table, tmp_path, tmp_path / "x.pth", tmp_path / "list.txt")
    start = (
        ["python"] if table.processes == 1 else ["torchrun", f"--nproc-per-node={table.processes}"]
    )
    assert words[: len(start)] == start
    program, flags = words[len(start)], words[len(start) + 1 :]
    assert Path(program).is_file()
    PARSERS[Path(program).name]([*flags, "--device", "cpu", "--output", str(tmp_path / "run")])
    if table.recipe:
        recipe = table.recipe.split()
        chosen, _ = imagenet_ddp.parse_arguments(["--data", ".", "--recipe", *recipe])
        assert 4096 % (8 * chosen.accumulate) == 0


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"\b\d+\.\d+\b", text)]


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("linear", [71.88, 71.72, 72.93]),
        ("linear-paper", [74.3, 91.6, 74.4]),
        ("linear-released", [71.8]),
        ("multi-head", [15.41, 35.15, 47.77, 62.59, 71.85, 15.16, 35.26, 47.77, 63.10, 71.21]),
        ("places205", [21.25, 36.55, 43.66, 50.74, 53.82, 21.18, 36.68, 43.42, 51.04, 54.06]),
        ("knn", [63.9, 64.2, 62.9, 61.9, 66.1, 66.3, 65.2, 64.4]),
        ("semi-supervised", [53.2, 78.4, 68.8, 89.0]),
        ("svm", [86.31, 45.37, 56.83, 68.47, 74.12, 78.30, 81.53, 83.56, 84.73]),
        ("voc-detection", [80.35]),
        ("coco", [40.9, 61.0, 44.6, 36.8, 58.1, 39.5]),
        ("voc-segmentation", [67.16]),
    ],
)
def test_the_expected_figures_are_the_published_ones(name: str, figures: list[float]) -> None:
    """MMSelfSup 0.x, configs/selfsup/byol/README.md and metafile.yml (the files' names); main, the
    same metafile (71.8); arXiv 2006.07733, tables 1 and 2; deepmind-research, byol/README.md."""
    table = reproduce.TABLES[name]
    assert numbers(re.sub(r"byol_\S+\.pth", "", table.expected)) == figures
    assert len(reproduce.TABLES) == 11


# Checks -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    export_backbone(timm.create_model("resnet50", num_classes=0), path)
    return path


def write_labelled(folder: Path) -> None:
    linear.write_folder(folder, train=2, test=1)
    names = [f"class{label}/0.png" for label in range(3)]
    (folder.parent / "list.txt").write_text("\n".join(names))


LAYOUTS: dict[str, tuple[Callable[[Path], Any], DataSet]] = {
    "knn": (write_labelled, DataSet(6, 3, 3)),
    "semi-supervised": (write_labelled, DataSet(3, 3, 3)),
    "places205": (linear.write_places205, DataSet(2, 2, 2)),
    "svm": (lambda folder: svm.write_voc(folder, lists=True), DataSet(24, 24, 2)),
    "voc-detection": (
        lambda folder: [
            detection.make_voc(folder / "VOCdevkit" / year, lists, ("cat", "dog"))
            for year, lists in
            (("VOC2007", {"trainval": 3, "test": 2}), ("VOC2012", {"trainval": 4}))
        ],
        DataSet(7, 2, 20),
    ),
    "coco": (detection.make_coco, DataSet(3, 2, 2)),
    "voc-segmentation": (
        lambda folder: segmentation.make_voc(folder / "VOCdevkit" / "VOC2012"), DataSet(5, 2, 21),
    ),
}  # fmt: skip


def sized(name: str, data: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let data of that size be the published ones."""
    monkeypatch.setitem(reproduce.TABLES, name, replace(reproduce.TABLES[name], data=data))
    monkeypatch.setattr(reproduce, "IMAGENET_PERCENT", {1: data})


@pytest.mark.parametrize("name", LAYOUTS)
def test_made_data_in_the_layout_pass_the_checks_and_others_do_not(
    name: str, tmp_path: Path, checkpoint: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, size = LAYOUTS[name]
    write(tmp_path / "data")
    given = ["--table", name, "--data", str(tmp_path / "data"), "--checkpoint", str(checkpoint)]
    given += ["--label-list", str(tmp_path / "list.txt"), "--dry-run"]
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(SystemExit):
        reproduce.main(given)
    said = capsys.readouterr().out
    assert re.search(rf"NO  data: .*\({size.train}, {size.test}, {size.classes}\) images to", said)
    assert "ok  checkpoint: backbone.safetensors fits resnet50" in said
    sized(name, size, monkeypatch)
    reproduce.main(given)
    said = capsys.readouterr().out
    assert "ok  data:" in said and "NO" not in said
    assert reproduce.TABLES[name].tree in said and reproduce.TABLES[name].expected in said


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path, capsys: Any) -> None:
    linear.write_folder(tmp_path / "data")
    (tmp_path / "cut.pth").write_bytes(b"PK")
    given = ["--table", "knn", "--data", str(tmp_path / "data")]
    with pytest.raises(SystemExit, match="1"):
        reproduce.main([*given, "--checkpoint", str(tmp_path / "cut.pth")])
    said = capsys.readouterr().out
    assert said.count("NO ") == 2 and "cut.pth" in said


def test_a_released_linear_checkpoint_needs_the_validation_images_alone(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear.write_folder(tmp_path / "data", train=0)
    net = timm.create_model("resnet50", num_classes=3)
    state = {("head." if n.startswith("fc.") else "backbone.") + n: v
             for n, v in net.state_dict().items()}  # fmt: skip
    torch.save({"state_dict": state}, tmp_path / "linear.pth")
    table = reproduce.TABLES["linear-released"]
    changed = replace(table, data=DataSet(1_281_167, 6, 3))
    monkeypatch.setitem(reproduce.TABLES, "linear-released", changed)
    given = ["--table", "linear-released", "--data", str(tmp_path / "data"), "--dry-run"]
    reproduce.main([*given, "--checkpoint", str(tmp_path / "linear.pth")])
    assert "NO" not in capsys.readouterr().out
    state.pop("head.fc.weight")
    torch.save({"state_dict": state}, tmp_path / "linear.pth")
    with pytest.raises(SystemExit):
        reproduce.main([*given, "--checkpoint", str(tmp_path / "linear.pth")])
    assert "NO  checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize("processes", [1, 8])
def test_after_the_checks_the_command_runs(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    write_labelled(tmp_path / "data")
    sized("knn", DataSet(6, 3, 3), monkeypatch)
    table = replace(reproduce.TABLES["knn"], processes=processes)
    monkeypatch.setitem(reproduce.TABLES, "knn", table)
    ran: list[list[str]] = []

    def ran_with(words: list[str]) -> Any:
        ran.append(words)
        return subprocess.CompletedProcess(words, 7)

    monkeypatch.setattr(subprocess, "run", ran_with)
    with pytest.raises(SystemExit, match="7"):
        reproduce.main(["--table", "knn", "--data", str(tmp_path / "data"),
                        "--checkpoint", str(checkpoint)])  # fmt: skip
    start = ["-m", "torch.distributed.run", "--nproc-per-node=8"] if processes == 8 else []
    program = str(ROOT / "examples" / "evaluate_knn.py")
    assert ran[0][: 2 + len(start)] == [sys.executable, *start, program]


@pytest.mark.slow
def test_the_command_of_a_table_makes_it(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_labelled(tmp_path / "data")
    sized("knn", DataSet(6, 3, 3), monkeypatch)
    own = f" --output {tmp_path}/run --k 1 --device cpu"
    table = reproduce.TABLES["knn"]
    table = replace(table, processes=2, command=table.command + own)
    monkeypatch.setitem(reproduce.TABLES, "knn", table)
    with pytest.raises(SystemExit) as ended:
        reproduce.main(["--table", "knn", "--data", str(tmp_path / "data"),
                        "--checkpoint", str(checkpoint)])  # fmt: skip
    assert ended.value.code == 0 and "k=1" in (tmp_path / "run" / "results.md").read_text()
