"""Put SBD's masks into a VOC2012 folder, for finetune_segmentation.py --protocol voc12aug.

    python examples/convert_sbd.py --sbd benchmark_RELEASE/dataset --data VOCdevkit/VOC2012

Makes VOC2012/SegmentationClassAug, a PNG of each cls/*.mat, and ImageSets/Segmentation/aug.txt, the
images of SBD that VOC's own train.txt and val.txt do not name. Both are those of MMSegmentation's
tools/convert_datasets/voc_aug.py. torchvision.datasets.SBDataset downloads SBD.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from parts import openmp, voc  # noqa: F401, the first before torch
from parts.processes import fail
from parts.published import VOC12AUG
from PIL import Image
from scipy.io import loadmat
from tqdm import tqdm


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--sbd", type=Path, required=True, help="the folder of SBD's cls, train.txt and val.txt")
    add("--data", type=Path, required=True, help="VOC2012, or a folder that it lies in")
    args = parser.parse_args(argv)
    folder = voc.find_year(args.data, "VOC2012", "Segmentation")
    if not folder:
        fail(f"--data {args.data} holds no VOC2012 with ImageSets/Segmentation.")
    lists, missing = folder / "ImageSets" / "Segmentation", "missing."
    of_sbd, of_voc = (
        {stem for part in ("train", "val") for stem in voc.read_list(at / f"{part}.txt", missing)}
        for at in (args.sbd, lists)
    )
    names = sorted(of_sbd - of_voc)
    masks = {name: args.sbd / "cls" / f"{name}.mat" for name in names}
    absent = [str(path) for path in masks.values() if not path.is_file()]
    absent += [name for name in names if not (folder / "JPEGImages" / f"{name}.jpg").is_file()]
    if absent or not names:
        fail(f"{len(names)} images of SBD are not VOC's own; {len(absent)} of their masks in "
             f"{args.sbd}/cls and images in {folder}/JPEGImages are missing, such as "
             f"{next(iter(absent), 'all')}.")  # fmt: skip
    target = folder / "SegmentationClassAug"
    target.mkdir(exist_ok=True)
    with ThreadPoolExecutor() as pool:
        jobs = pool.map(lambda name: convert(masks[name], target / f"{name}.png"), names)
        for _ in tqdm(jobs, "masks", len(names)):
            pass
    # Last, because it is what the training script looks for.
    (lists / "aug.txt").write_text("".join(f"{name}\n" for name in names))
    total = len(names) + len(voc.read_list(lists / "train.txt", missing))
    print(f"{lists / 'aug.txt'}: {len(names)} images, with train.txt {total} to train on; the "
          f"published figures have {VOC12AUG.train}")  # fmt: skip


def convert(mat: Path, png: Path) -> None:
    mask = loadmat(str(mat))["GTcls"][0]["Segmentation"][0].astype(np.uint8)
    Image.fromarray(mask).save(png)


if __name__ == "__main__":
    main()
