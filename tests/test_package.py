import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import byol_pytorch

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    return done.stdout


def test_importing_the_library_imports_neither_kornia_nor_timm():
    out = python(
        "import sys, byol_pytorch; print([m for m in ('kornia', 'timm', 'transformers')"
        " if m in sys.modules])"
    )
    assert out.strip() == "[]"


def test_the_learner_works_without_timm():
    out = python(
        "import sys; sys.modules['timm'] = None\n"
        "import torch, torchvision\nfrom byol_pytorch import BYOL\n"
        "learner = BYOL(torchvision.models.resnet18(), 32)\n"
        "print(learner(torch.rand(2, 3, 32, 32)).isfinite().item())"
    )
    assert out.strip() == "True"


@pytest.mark.parametrize("name", ["BYOLTrainer", "MockDataset"])
def test_what_0_9_1_had_beside_the_learner_points_to_the_example(name):
    with pytest.raises(ImportError, match=f"{name}.*examples/quickstart.py"):
        getattr(byol_pytorch, name)


def test_the_module_path_of_0_9_1_points_to_the_package():
    with pytest.raises(ImportError, match="Write `from byol_pytorch import BYOL`"):
        exec("from byol_pytorch.byol_pytorch import BYOL")


def test_other_missing_names_are_attribute_errors():
    assert not hasattr(byol_pytorch, "nothing")


def test_version_is_at_least_one():
    assert int(byol_pytorch.__version__.split(".")[0]) >= 1


def test_changelog_and_citation_name_this_version():
    version = byol_pytorch.__version__
    assert PROJECT["version"] == version
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def requirements(*extras: str) -> set[str]:
    """The names of what the package needs with these extras."""
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][e] for e in extras)]
    return {re.match(r"[\w-]+", text)[0] for part in lists for text in part}


def imported(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names}


def with_their_parts(files: list[Path]) -> set[Path]:
    """The programs, and the files of examples/parts that they import, whether directly or not."""
    found: set[Path] = set()
    while files:
        file = files.pop()
        found.add(file)
        names = re.findall(r"^ *from parts(?:\.| import )(\w+)", file.read_text(), re.M)
        files += {ROOT / "examples" / "parts" / f"{name}.py" for name in names} - found
    return found


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("examples/quickstart.py", ("quickstart", "eval")),
        ("examples/ddp_minimal.py", ()),
        ("examples/*.py", ("examples", "quickstart", "eval")),
    ],
)
def test_extras_hold_what_their_programs_import(folder, extras):
    files = with_their_parts(sorted(ROOT.glob(folder)))
    modules = set().union(*map(imported, files)) - set(sys.stdlib_module_names)
    modules -= {"byol_pytorch", "parts", *(path.stem for path in (ROOT / "examples").glob("*.py"))}
    given = requirements(*extras) | {"pillow"}  # which torchvision needs
    owners = importlib.metadata.packages_distributions()
    missing = {m for m in modules if not given & {name.lower() for name in owners.get(m, ())}}
    assert files and not missing
