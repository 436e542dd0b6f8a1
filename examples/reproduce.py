"""The published tables, one by one: what each needs, and whether it is there before a long run.

    python examples/reproduce.py --table knn --data IMAGENET --checkpoint FILE --dry-run
    python examples/reproduce.py --table knn --data IMAGENET --checkpoint FILE

The first prints the table's data, command and expected figures, and checks the layout, the counts
of images and classes, and the checkpoint, as the program itself would open them. The second runs
the command after that. --page prints the tables of docs/reproduce.md.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from parts import openmp  # noqa: F401, before torch

# isort: split

import evaluate_linear
import evaluate_svm
import numpy as np
from parts import voc
from parts.backbone import fill_in_model, open_backbone
from parts.boxes import open_detection
from parts.flags import common_flags
from parts.labelled import Chosen, listed, open_images, open_tests
from parts.masks import open_masks
from parts.processes import fail
from parts.published import (
    COCO2017,
    IMAGENET,
    IMAGENET_PERCENT,
    PLACES205,
    VOC07,
    VOC0712,
    VOC12AUG,
    DataSet,
)

EXAMPLES = Path(__file__).parent
Counts = tuple[int, int, int]  # images to train on and to test on, classes


# How the programs open their data ---------------------------------------------------------------


def images(args: argparse.Namespace) -> Counts:
    train, test = open_images(args.data)
    return len(train[1]), len(test[1]), classes(train)


def test_images(args: argparse.Namespace) -> Counts:
    test = open_tests(args.data)
    return IMAGENET.train, len(test[1]), classes(test)  # nothing is trained


def listed_images(args: argparse.Namespace) -> Counts:
    train, test = open_images(args.data)
    if args.label_list is None:
        fail("this table needs --label-list, SimCLR's 1percent.txt or 10percent.txt.")
    return len(listed(train, args.label_list)), len(test[1]), classes(train)


def classes(part: Chosen) -> int:
    return len(np.unique(part[0].labels[part[1]]))


def voc07(args: argparse.Namespace) -> Counts:
    folder = voc.find_year(args.data, "VOC2007", "Main")
    if folder is None:
        fail(f"--data {args.data} holds no VOC2007 with ImageSets/Main.")
    parts = evaluate_svm.open_voc(
        folder, ("trainval", "test"), None, (None, None), 0, lambda whole: lambda image: image
    )
    for part in parts[:2]:
        for name in part.names[:: max(1, len(part) // 100)]:
            if not (path := folder / "JPEGImages" / f"{name}.jpg").is_file():
                fail(f"{path} is missing.")
    return len(parts[0]), len(parts[1]), len(parts[2])


def boxes(args: argparse.Namespace) -> Counts:
    train, test = open_detection(args.data, None, masks=False)
    return len(train.images), len(test.images), len(train.classes)


def boxes_and_masks(args: argparse.Namespace) -> Counts:
    train, test = open_detection(args.data, None, masks=True)
    return len(train.images), len(test.images), len(train.classes)


def segments(args: argparse.Namespace) -> Counts:
    train, test = open_masks(args.data, None, 255)
    return len(train.pairs), len(test.pairs), len(train.classes)


# The tables -------------------------------------------------------------------------------------

IMAGENET_TREE = """\
IMAGENET/
  train/n01440764/*.JPEG ...      1000 folders
  val/n01440764/*.JPEG ...        the same 1000; or flat, with
  meta/train.txt, meta/val.txt    lines of "path label" below train/ and val/"""
IMAGENET_FROM = "image-net.org, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar"
VOC_TREE = """\
VOCdevkit/
  VOC2007/JPEGImages/*.jpg  Annotations/*.xml  ImageSets/Main/{trainval,test}.txt"""
VOC_FROM = (
    "host.robots.ox.ac.uk/pascal/VOC, VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar"
)
MMSELFSUP = "MMSelfSup 0.x, configs/selfsup/byol/README.md"
OF_200 = "byol_resnet50_8xb32-accum16-coslr-200e_in1k_20220225-5c8b2c2e.pth"
OF_300 = "byol_resnet50_8xb32-accum16-coslr-300e_in1k_20220225-a0daa54a.pth"
OF_16XB256 = "byol_resnet50_16xb256-coslr-200e_in1k_20220527-b6f8eedd.pth"
OF_DEEPMIND = "pretrain_res50x1.pkl (storage.googleapis.com/deepmind-byol/checkpoints)"
LINEAR = "resnet50_linear-8xb512-coslr-90e_in1k_20220825-7596c6f5.pth"


@dataclass(frozen=True)
class Table:
    what: str
    expected: str
    source: str
    data: DataSet  # its counts; of training images there may be others, where `opened` says so
    origin: str
    tree: str
    opened: Callable[[argparse.Namespace], Counts]
    checkpoint: str
    recipe: str  # of imagenet_ddp.py, if it makes such a checkpoint
    command: str  # {data}, {checkpoint} and {label_list} are filled in
    processes: int = 8

    @property
    def sizes(self) -> list[DataSet]:
        return list(IMAGENET_PERCENT.values()) if self.opened is listed_images else [self.data]


ACCUM16, X16 = "mmselfsup-8xb32-accum16-200", "mmselfsup-16xb256-200 --accumulate 2"
TABLES = {
    "linear-released": Table(
        "ImageNet, a released linear checkpoint, scored", "71.8 top-1",
        "MMSelfSup 1.x, configs/selfsup/byol/metafile.yml", IMAGENET, IMAGENET_FROM,
        IMAGENET_TREE, test_images, LINEAR, "",
        "evaluate_linear.py --data {data} --protocol mmselfsup --test-only {checkpoint}", 1),
    "linear": Table(
        "ImageNet, one linear head, MMSelfSup's protocol",
        f"71.88 top-1 with {OF_16XB256}, 71.72 with {OF_200}, 72.93 with {OF_300}", MMSELFSUP,
        IMAGENET, IMAGENET_FROM, IMAGENET_TREE, images, OF_16XB256, X16,
        "evaluate_linear.py --data {data} --checkpoint {checkpoint} --protocol mmselfsup"),
    "linear-paper": Table(
        "ImageNet, one linear head, the paper's protocol",
        "74.3 top-1, 91.6 top-5; about 74.4 top-1 with the released file",
        "arXiv 2006.07733, table 1; deepmind-research, byol/README.md", IMAGENET, IMAGENET_FROM,
        IMAGENET_TREE, images, OF_DEEPMIND, "paper-1000 --accumulate 2",
        "evaluate_linear.py --data {data} --checkpoint {checkpoint} --padding same "
        "--protocol paper --base-lrs 0.4 0.3 0.2 0.1 0.05 --held-out 0.0078"),
    "multi-head": Table(
        "ImageNet, linear heads on feature1 to feature5",
        f"15.41 35.15 47.77 62.59 71.85 with {OF_16XB256}, 15.16 35.26 47.77 63.10 71.21 with "
        f"{OF_200}", MMSELFSUP, IMAGENET, IMAGENET_FROM, IMAGENET_TREE, images, OF_16XB256,
        X16,
        "evaluate_linear.py --data {data} --checkpoint {checkpoint} --protocol multi-head"),
    "places205": Table(
        "Places205, linear heads on feature1 to feature5",
        f"21.25 36.55 43.66 50.74 53.82 with {OF_200}, 21.18 36.68 43.42 51.04 54.06 with {OF_300}",
        MMSELFSUP, PLACES205, "places.csail.mit.edu/downloadData.html, resized images and lists",
        """\
PLACES205/
  data/vision/torralba/deeplearning/images256/a/abbey/*.jpg ...
  trainvalsplit_places205/train_places205.csv, val_places205.csv""",
        images, OF_200, ACCUM16,
        "evaluate_linear.py --data {data} --checkpoint {checkpoint} --protocol places205"),
    "knn": Table(
        "ImageNet, nearest neighbours, k = 10, 20, 100, 200",
        f"63.9 64.2 62.9 61.9 with {OF_200}, 66.1 66.3 65.2 64.4 with {OF_300}", MMSELFSUP,
        IMAGENET, IMAGENET_FROM, IMAGENET_TREE, images, OF_200, ACCUM16,
        "evaluate_knn.py --data {data} --checkpoint {checkpoint}"),
    "semi-supervised": Table(
        "ImageNet, fine-tuned on 1 % or 10 % of the labels, the paper's protocol",
        "1 %: 53.2 top-1, 78.4 top-5; 10 %: 68.8, 89.0", "arXiv 2006.07733, table 2", IMAGENET,
        f"{IMAGENET_FROM}; github.com/google-research/simclr, imagenet_subsets/1percent.txt and "
        "10percent.txt", IMAGENET_TREE, listed_images, OF_DEEPMIND, "paper-1000 --accumulate 2",
        "finetune_classification.py --data {data} --checkpoint {checkpoint} --padding same "
        "--label-list {label_list} --recipe paper --grid --held-out 0.0078", 4),
    "svm": Table(
        "VOC07, linear SVMs on feature5, all labels and k = 1, 2, 4, 8, 16, 32, 64, 96",
        "86.31 mAP; 45.37 56.83 68.47 74.12 78.30 81.53 83.56 84.73", MMSELFSUP, VOC07, VOC_FROM,
        VOC_TREE, voc07, OF_200, ACCUM16,
        "evaluate_svm.py --data {data} --checkpoint {checkpoint}", 1),
    "voc-detection": Table(
        "VOC07+12, Faster R-CNN R50-C4, 24k steps", "80.35 AP50", MMSELFSUP, VOC0712,
        f"{VOC_FROM}; VOCtrainval_11-May-2012.tar",
        VOC_TREE + "\n  VOC2012/JPEGImages/*.jpg  Annotations/*.xml  ImageSets/Main/trainval.txt",
        boxes, OF_200, ACCUM16,
        "finetune_detection.py --data {data} --checkpoint {checkpoint} --protocol voc-c4"),
    "coco": Table(
        "COCO, Mask R-CNN R50-FPN, 12 epochs",
        "box AP 40.9, AP50 61.0, AP75 44.6; mask AP 36.8, AP50 58.1, AP75 39.5", MMSELFSUP,
        COCO2017, "cocodataset.org, train2017.zip, val2017.zip, annotations_trainval2017.zip",
        """\
COCO/
  train2017/*.jpg  val2017/*.jpg
  annotations/instances_train2017.json, instances_val2017.json""",
        boxes_and_masks, OF_200, ACCUM16,
        "finetune_detection.py --data {data} --checkpoint {checkpoint} --protocol coco-mask-fpn"),
    "voc-segmentation": Table(
        "VOC12 with SBD's masks, FCN d8, 20k steps", "67.16 mIoU", MMSELFSUP, VOC12AUG,
        "host.robots.ox.ac.uk/pascal/VOC, VOCtrainval_11-May-2012.tar; SBD by "
        "torchvision.datasets.SBDataset and examples/convert_sbd.py",
        """\
VOCdevkit/VOC2012/
  JPEGImages/*.jpg  SegmentationClass/*.png  SegmentationClassAug/*.png
  ImageSets/Segmentation/train.txt, aug.txt, val.txt""",
        segments, OF_200, ACCUM16,
        "finetune_segmentation.py --data {data} --checkpoint {checkpoint} --protocol voc12aug", 4),
}  # fmt: skip


# What is printed and checked --------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.page:
        print(page(), end="")
        return
    table = TABLES[args.table]
    print(described(table))
    command = command_of(table, args.data, args.checkpoint, args.label_list)
    print(f"command:     {shlex.join(command)}\n")
    if not checked(table, args):
        raise SystemExit(1)
    if not args.dry_run:
        start = [sys.executable, *(["-m", "torch.distributed.run"] if table.processes > 1 else [])]
        raise SystemExit(subprocess.run([*start, *command[1:]]).returncode)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--table", choices=TABLES, help="which")
    add("--data", type=Path, help="the folder of its data")
    add("--checkpoint", help="the file of the backbone")
    add("--label-list", type=Path, help="for semi-supervised: SimCLR's 1percent.txt, 10percent.txt")
    add("--dry-run", action="store_true", help="print and check, and run nothing")
    add("--page", action="store_true", help="print the tables of docs/reproduce.md")
    args = parser.parse_args(argv)
    if not args.page and not (args.table and args.data and args.checkpoint):
        parser.error("give --table, --data and --checkpoint, or --page")
    return args


def command_of(table: Table, data: object, checkpoint: object, labels: object) -> list[str]:
    """The words of the command that makes the table."""
    values = {"data": data, "checkpoint": checkpoint, "label_list": labels}
    words = table.command
    if str(checkpoint).endswith(".safetensors"):  # our own export says how it pads
        words = words.replace(" --padding same", "")
    program, *flags = (word.format(**values) for word in words.split())
    start = ["torchrun", f"--nproc-per-node={table.processes}"]
    return [*(start if table.processes > 1 else ["python"]), f"{EXAMPLES}/{program}", *flags]


def described(table: Table) -> str:
    train, test, count = table.data
    trained = f"{train:,} images to train on"
    if table.opened is test_images:
        trained = "no images to train on"
    elif table.opened is listed_images:
        trained = " or ".join(f"{size.train:,}" for size in table.sizes) + " images to train on"
    made = (
        "or made by:  torchrun --nproc-per-node=8 examples/imagenet_ddp.py --data IMAGENET "
        f"--recipe {table.recipe}\n"
    )
    return (
        f"{table.what}\n"
        f"expected:    {table.expected}\n"
        f"source:      {table.source}\n"
        f"data:        {trained}, {test:,} to test on, {count:,} classes\n"
        f"from:        {table.origin}\n"
        f"checkpoint:  {table.checkpoint}\n{made if table.recipe else ''}{table.tree}"
    )


def checked(table: Table, args: argparse.Namespace) -> bool:
    """Whether the data and the checkpoint are the published ones; what is not is said."""
    right = True
    for name, check in (("data", check_data), ("checkpoint", check_checkpoint)):
        try:
            print(f"ok  {name}: {check(table, args)}")
        except SystemExit as error:
            right = False
            print(f"NO  {name}: {error}")
    return right


def check_data(table: Table, args: argparse.Namespace) -> str:
    found = table.opened(args)
    if found not in table.sizes:
        expected = " or ".join(str(tuple(size)) for size in table.sizes)
        fail(f"{found} images to train on, to test on and classes; expected {expected}.")
    return f"{found[0]:,} images to train on, {found[1]:,} to test on, {found[2]:,} classes"


def check_checkpoint(table: Table, args: argparse.Namespace) -> str:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    common_flags(parser)
    words = command_of(table, args.data, args.checkpoint, args.label_list)
    flags, _ = parser.parse_known_args(words)
    flags.checkpoint, flags.device = args.checkpoint, "cpu"
    fill_in_model(flags, args.checkpoint)
    _, facts = open_backbone(flags)
    if table.opened is test_images:
        head = evaluate_linear.released_head(evaluate_linear.read_weights(Path(args.checkpoint)))
        if head is None or len(head["weight"]) != table.data.classes:
            fail(f"{args.checkpoint} has no linear head of {table.data.classes} classes.")
    return f"{facts.start} fits {facts.model}"


def page() -> str:
    """The tables of docs/reproduce.md."""
    parts = []
    for name, table in TABLES.items():
        command = shlex.join(command_of(table, "DATA", "CHECKPOINT", "LIST"))
        command = command.replace(str(EXAMPLES), "examples")
        about = described(table).removesuffix(table.tree).split("\n", 1)[1].rstrip()
        parts.append(
            f"### {name}\n\n{table.what}.\n\n```text\n{about}\n\n{table.tree}\n```\n\n"
            f"```sh\npython examples/reproduce.py --dry-run --table {name} --data DATA "
            f"--checkpoint CHECKPOINT{' --label-list LIST' * (len(table.sizes) > 1)}\n"
            f"{command}\n```\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    main()
