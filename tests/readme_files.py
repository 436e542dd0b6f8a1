"""Small files for the blocks of README and docs: images, scans, shards, a backbone."""

import io
import tarfile
from pathlib import Path

import numpy as np
import timm
from PIL import Image

from byol_pytorch import BYOL
from byol_pytorch.checkpoint import export_backbone


def write(folder: Path) -> None:
    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    (folder / "scans").mkdir()
    (folder / "shards").mkdir()
    for number in range(8):
        pixels = generator.integers(0, 256, (72 + number, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.jpg")
    deep = generator.integers(0, 65536, (72, 80), dtype=np.uint16)
    for name in ("a.png", "b.tif", "c.png"):
        Image.fromarray(deep).save(folder / "scans" / name)
    np.save(folder / "scans" / "d.npy", deep)
    for shard in range(2):
        with tarfile.open(folder / "shards" / f"train-{shard:06}.tar", "w") as tar:
            for number in range(4):
                file = io.BytesIO()
                Image.open(folder / "images" / f"{number}.jpg").save(file, "PNG")
                member = tarfile.TarInfo(f"{shard}-{number}.png")
                member.size = file.tell()
                file.seek(0)
                tar.addfile(member, file)
    learner = BYOL(timm.create_model("resnet10t"), 64, projection_hidden_size=16)
    export_backbone(learner, folder / "backbone.safetensors")
