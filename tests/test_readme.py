"""The README's Python runs as it stands, in order, on a smaller network and size."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


def smaller(code: str) -> str:
    return (
        code.replace('"resnet50"', '"resnet10t"')
        .replace("224", "64")
        .replace("vit_tiny_patch16_64", "vit_tiny_patch16_224")
        .replace("fullgraph=True", 'fullgraph=True, backend="aot_eager"')
    )


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.chdir(tmp_path)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"),
                        ("MASTER_PORT", "0")):  # fmt: skip
        monkeypatch.setenv(name, value)
    images = torch.randint(0, 256, (4, 3, 72, 80), dtype=torch.uint8)
    labelled = [(images, torch.tensor([0, 1, 0, 1]))] * 6
    loader = torch.utils.data.DataLoader(list(images) * 2, batch_size=4)  # type: ignore[arg-type]
    names: dict[str, object] = {"loader": loader, "images": images, "labelled": labelled}
    found = blocks("python")
    assert len(found) >= 8
    for code in found:
        exec(compile(smaller(code), "README.md", "exec"), names)
    assert (tmp_path / "backbone.pt").exists()
    for chain in ("multispectral", "video"):
        learner = names[chain]
        shape = (2, 13, 64, 64) if chain == "multispectral" else (2, 3, 8, 32, 32)
        assert learner(torch.rand(shape)).isfinite()


def test_exactly_two_commands_stand_on_the_first_screen():
    first_screen = "".join(README.read_text().splitlines(keepends=True)[:40])
    commands = re.findall(r"```sh\n(.*?)```", first_screen, flags=re.DOTALL)
    assert len(commands) == 2
    assert "examples/quickstart.py" in commands[0]
    assert "pytest" in commands[1]


def test_usage_is_at_most_ten_lines():
    lines = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(lines) <= 10


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"examples/[\w/]+\.py", README.read_text())))
)
def test_every_script_that_is_named_exists(path):
    assert (README.parent / path).exists()
