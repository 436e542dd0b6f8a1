"""The README of an exported backbone, in the form that model hubs read."""

from collections.abc import Mapping
from typing import Any


def model_card(file: str, facts: Mapping[str, Any], trained: str) -> str:
    """A model card for the file named `file`: its header, how to load it, what it expects.

    `facts` are those of the file's metadata; `trained` says in the caller's words how and on what
    it was trained. The licence is left to the caller, as a comment of the header.
    """
    architecture = facts.get("architecture")
    args = facts.get("model_args") or {"num_classes": 0}
    given = ", ".join(f"{name}={value!r}" for name, value in args.items())
    build = f'timm.create_model("{architecture}", {given})' if architecture else "..."
    padding = ', padding="same"' if facts.get("padding") == "same" else ""
    size = facts.get("image_size")
    expects = ["RGB images in [0, 1]" if len(facts.get("mean") or ()) == 3 else "Images"]
    if size:
        expects.append(f"{size[0]} x {size[1]} pixels")
    if facts.get("mean"):
        expects.append(f"normalised by mean {facts['mean']} and std {facts['std']}")
    lines = [
        "---",
        *(["library_name: timm"] if architecture else []),
        "pipeline_tag: image-feature-extraction",
        "tags:",
        *[f"- {tag}" for tag in ("byol", "self-supervised-learning", "image-feature-extraction")],
        "# license: (yours to choose, for example mit)",
        "---",
        "",
        f"# {architecture or 'A backbone'} pre-trained with BYOL",
        "",
        f"{trained}".strip(),
        "",
        "```python",
        *(["import timm"] if architecture else []),
        "from byol_pytorch.checkpoint import load_backbone",
        "",
        f"net = {build}" + ("" if architecture else "  # the network that was trained"),
        f'load_backbone("{file}", net{padding})',
        "```",
        "",
        f"Input: {', '.join(expects)}. Method: BYOL "
        f"([arXiv 2006.07733](https://arxiv.org/abs/2006.07733)), with byol_pytorch "
        f"{facts['byol_pytorch']}.",
    ]
    return "\n".join(lines) + "\n"
