"""README and docs: their Python runs, their links lead somewhere, their commands exist."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pydicom
import pytest
import readme_files
import timm
import torch

from byol_pytorch import BYOL

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
RUN_ELSEWHERE = ("docs/deploy.md",)  # by test_deploy.py, which compares the features too


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


# Python -----------------------------------------------------------------------------------------


def smaller(code: str) -> str:
    return (
        code.replace('"resnet50"', '"resnet10t"')
        .replace("224", "64")
        .replace("vit_tiny_patch16_64", "vit_tiny_patch16_224")
        .replace("fullgraph=True", 'fullgraph=True, backend="eager"')
    )


WITH_PYTHON = [p for p in PAGES if blocks(p, "python") and named(p) not in RUN_ELSEWHERE]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=named)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.chdir(tmp_path)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"),
                        ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):  # fmt: skip
        monkeypatch.setenv(name, value)
    images = torch.randint(0, 256, (4, 3, 72, 80), dtype=torch.uint8)
    labelled = [(images, torch.tensor([0, 1, 0, 1]))] * 6
    loader = torch.utils.data.DataLoader(list(images) * 2, batch_size=4)  # type: ignore[arg-type]
    views = [[torch.rand(4, 3, 64, 64)] * 2, torch.zeros(4), ["name"] * 4]
    names = {"loader": loader, "images": images, "labelled": labelled, "lightly_loader": [views]}
    if page.name == "data.md":
        readme_files.write(tmp_path)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        names["learner"] = BYOL(timm.create_model("resnet10t"), 64, projection_hidden_size=16)
    try:
        for number, code in enumerate(blocks(page, "python")):
            exec(compile(smaller(code), f"{named(page)}, block {number}", "exec"), names)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    for video, shape in (("multispectral", (2, 13, 64, 64)), ("video", (2, 3, 8, 32, 32))):
        if video in names:
            assert names[video](torch.rand(shape)).isfinite()
    if "read_dicom" in names:
        scan = names["read_dicom"](pydicom.data.get_testdata_file("CT_small.dcm"))
        assert scan.shape == (1, 128, 128)
        assert (scan.min(), scan.max()) == (0, 1)


def test_every_name_of_the_tables_is_there():
    learner = BYOL(timm.create_model("resnet10t"), 32)
    found = 0
    for page in (README, ROOT / "docs" / "learner.md"):
        table = re.search(r"\n\| name \| .*?\n\n", page.read_text(), flags=re.DOTALL)[0]
        for cell in (line.split(" | ")[0] for line in table.splitlines() if line.strip()):
            for name in re.findall(r"`([a-z_]+)\.(\w+)", cell):
                home = name[0] == "learner" or importlib.import_module(f"byol_pytorch.{name[0]}")
                assert hasattr(learner if home is True else home, name[1]), f"{named(page)}: {name}"
                found += 1
    assert found > 30


# What a reader meets first ----------------------------------------------------------------------


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 200


def test_exactly_two_commands_stand_on_the_first_screen():
    first_screen = "".join(README.read_text().splitlines(keepends=True)[:40])
    commands = re.findall(r"```sh\n(.*?)```", first_screen, flags=re.DOTALL)
    assert len(commands) == 2
    assert "examples/quickstart.py" in commands[0]
    assert "pytest" in commands[1]


def test_usage_is_at_most_ten_lines():
    lines = [line for line in blocks(README, "python")[0].splitlines() if line.strip()]
    assert len(lines) <= 10


# Links ------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The names that a forge gives to the headings of a page."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_and_images_lead_to_files_and_headings(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    assert len(targets) == prose(page).count("](")
    for target in targets:
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        assert file.is_file(), f"{named(page)}: {target} is no file"
        assert not heading or heading in anchors(file), f"{named(page)}: {target} is no heading"


# Commands ---------------------------------------------------------------------------------------

# Prints the flags of each program that is named in argv, as the "usage" of its --help has them.
FLAGS = """
import contextlib, io, json, re, runpy, sys
found = {}
for path in sys.argv[1:]:
    sys.argv, sys.path[0], text = [path, "--help"], path.rpartition("/")[0], io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        runpy.run_path(path, run_name="__main__")
    found[path] = re.findall(r"--[a-z][\\w-]*", text.getvalue().split("\\n\\n")[0]) + ["--help"]
print(json.dumps(found))
"""


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """Every program of examples/ that the page runs, with its arguments."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`([^`]+)`", prose(page).replace("\n", " "))
    parts = [part.split("#")[0] for line in lines for part in line.split("&&")]
    runs = (re.search(r"\b(?:python|torchrun)\b.*?(\S+\.py)\b(.*)", part) for part in parts)
    return [(run[1], run[2].split()) for run in runs if run and run[1] != "train.py"]


def test_commands_name_programs_and_their_flags():
    found = [(page, *command) for page in PAGES for command in commands(page)]
    programs = sorted({program for _, program, _ in found})
    assert len(programs) > 15 and len(found) > 40
    for page, program, _ in found:
        assert (ROOT / program).is_file(), f"{named(page)}: there is no {program}"
    known = json.loads(
        subprocess.run(
            [sys.executable, "-c", FLAGS, *programs], cwd=ROOT, capture_output=True, text=True,
            check=True, timeout=600,
        ).stdout
    )  # fmt: skip
    for page, program, arguments in found:
        flags = known[program]
        if "--finetune" in arguments:  # what follows it goes to that program
            flags = flags + known["examples/finetune_classification.py"]
        given = [argument.split("=")[0] for argument in arguments if argument.startswith("--")]
        unknown = [flag for flag in given if flag not in flags]
        assert not unknown, f"{named(page)}: {program} has no {', '.join(unknown)}"
    everywhere = {flag for flags in known.values() for flag in flags}
    for page in PAGES:
        for flag in re.findall(r"`(--[a-z][\w-]*)[ `]", prose(page)):
            assert flag in everywhere, f"{named(page)}: no program has {flag}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_program_that_is_named_exists(page):
    for path in re.findall(r"\b(?:examples|tests)/[\w/]+\.py", page.read_text()):
        assert (ROOT / path).is_file(), f"{named(page)}: there is no {path}"
