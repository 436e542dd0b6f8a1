"""PASCAL VOC's folders: where a year lies, its lists of images, and its annotations."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from parts.processes import fail

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip


def find_year(data: Path, year: str, task: str) -> Path | None:
    """`data`, or the folder of that year below it, whichever has lists for this task."""
    places = (data, data / year, data / "VOCdevkit" / year)
    return next((place for place in places if (place / "ImageSets" / task).is_dir()), None)


def read_list(path: Path, missing: str) -> list[str]:
    """The first word of each line; where there is no such file, `missing` ends the sentence."""
    if not path.is_file():
        fail(f"{path} is {missing}")
    return first_words(path)


def first_words(path: Path) -> list[str]:
    return [line.split()[0] for line in path.read_text().splitlines() if line.strip()]


def read_annotation(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        fail(f"{path} cannot be read as an annotation of VOC's: {error}.")


def objects_of(root: ElementTree.Element) -> list[tuple[str, bool, ElementTree.Element]]:
    """The class of each object of an annotation, whether it is difficult, and all else of it."""
    return [
        (t.findtext("name", "").strip(), t.findtext("difficult", "").strip() == "1", t)
        for t in root.findall("object")
    ]


def size_of(root: ElementTree.Element) -> dict[str, int]:
    """The image's width and height in pixels, where the annotation has both."""
    found = {side: root.findtext(f"size/{side}", "") for side in ("width", "height")}
    known = all(text.isdigit() and int(text) for text in found.values())
    return {side: int(text) for side, text in found.items()} if known else {}
