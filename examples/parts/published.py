"""The data sets of the published figures, by their sizes: a published row stands beside a result
only where the data are exactly its own."""

from typing import NamedTuple


class DataSet(NamedTuple):
    """How many images there are to train and to test on, and of how many classes."""

    train: int
    test: int
    classes: int


# arXiv 1409.0575, table 2; places.csail.mit.edu; github.com/visipedia/inat_comp/tree/master/2018.
IMAGENET = DataSet(1_281_167, 50_000, 1000)
PLACES205 = DataSet(2_448_873, 20_500, 205)
INATURALIST2018 = DataSet(437_513, 24_426, 8142)
# VOC's development kits: trainval and test of 2007; with trainval of 2012; MMSegmentation's
# tools/convert_datasets/voc_aug.py (AUG_LEN) and val.txt.
VOC07 = DataSet(5011, 4952, 20)
VOC0712 = DataSet(5011 + 11_540, 4952, 20)
VOC12AUG = DataSet(10_582, 1449, 21)
COCO2017 = DataSet(118_287, 5000, 80)
CITYSCAPES = DataSet(2975, 500, 19)
# SimCLR's lists, imagenet_subsets/{1,10}percent.txt of github.com/google-research/simclr.
IMAGENET_PERCENT = {1: IMAGENET._replace(train=12_811), 10: IMAGENET._replace(train=128_116)}
