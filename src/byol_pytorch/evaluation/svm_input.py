"""What svm.py takes: features and labels in one form, and one sentence for what is refused."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


class Task(NamedTuple):
    """Normalised features (N, D), targets (N, C), and classes (N,) of images that have one each."""

    train: Floats
    test: Floats
    train_targets: npt.NDArray[np.int8]
    test_targets: npt.NDArray[np.int8]
    train_classes: npt.NDArray[np.int64] | None
    test_classes: npt.NDArray[np.int64] | None


def open_task(
    train_features: Tensor | Array,
    train_labels: Tensor | Array,
    test_features: Tensor | Array,
    test_labels: Tensor | Array,
) -> Task:
    train, test = normalised(train_features, "train"), normalised(test_features, "test")
    if train.shape[1] != test.shape[1]:
        raise ValueError(
            f"train_features have {train.shape[1]} dimensions, test_features {test.shape[1]}; "
            "expected the same. Extract both with one network."
        )
    train_targets, train_classes = as_targets(train_labels, "train_labels")
    known = None if train_classes is None else train_targets.shape[1]
    test_targets, test_classes = as_targets(test_labels, "test_labels", known)
    alike = (train_classes is None) == (test_classes is None)
    if not alike or train_targets.shape[1] != test_targets.shape[1]:
        raise ValueError(
            f"train_labels came as {tuple(train_labels.shape)}, test_labels as "
            f"{tuple(test_labels.shape)}; expected both (N, C), or both classes (N,)."
        )
    for name, features, targets in (("train", train, train_targets), ("test", test, test_targets)):
        if len(features) != len(targets):
            raise ValueError(
                f"{name}_features hold {len(features)} rows, {name}_labels {len(targets)}; "
                "expected one label row a feature row. Give those that extract_features returned "
                "together."
            )
    check_counts(test_targets, "test", 1, 1)
    return Task(train, test, train_targets, test_targets, train_classes, test_classes)


def as_array(value: Tensor | Array) -> Array:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype is torch.bfloat16 else value).numpy()
    return np.asarray(value)


def normalised(value: Tensor | Array, name: str) -> Floats:
    features = as_array(value)
    if features.ndim != 2 or not features.size:
        raise ValueError(
            f"{name}_features came as {features.shape}; expected (N, D). Pool or flatten maps."
        )
    features = features.astype(np.float64)
    norms = np.sqrt(np.einsum("nd,nd->n", features, features))
    bad = np.flatnonzero(~np.isfinite(norms))
    if len(bad):
        raise ValueError(
            f"{name}_features hold NaN or infinite values in {len(bad)} of {len(features)} rows, "
            f"the first is row {bad[0]}; expected finite ones. Look at these images, or extract in "
            "float32."
        )
    features /= norms[:, None] + 1e-5  # as svm_helper.py
    return features


def as_targets(
    value: Tensor | Array, name: str, count: int | None = None
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int64] | None]:
    """(N, C) of 1, 0 and -1; and of labels (N,) the classes, `count` of them where it is given."""
    labels = as_array(value)
    if labels.ndim == 2 and labels.size:
        if not np.isin(labels, (1, 0, -1)).all():
            found = np.unique(labels)
            raise ValueError(
                f"{name} (N, C) hold values from {found[0]} to {found[-1]}; expected 1 positive, "
                "0 negative and -1 ignored. Give one class an image as integers (N,)."
            )
        return labels.astype(np.int8), None
    if labels.ndim != 1 or not labels.size or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{name} came as {labels.dtype} {labels.shape}; expected classes (N,) as integers, or "
            "(N, C) of 1 positive, 0 negative and -1 ignored."
        )
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= (count or most + 1):
        bound = f"from 0 to {count - 1}, as in train" if count else "of at least 0"
        raise ValueError(f"{name} hold classes from {least} to {most}; expected numbers {bound}.")
    if least == most and count is None:
        raise ValueError(
            f"{name} hold the class {least} alone; expected at least 2 classes. "
            "Look at how the labels are read."
        )
    classes = labels.astype(np.int64)
    return (classes[:, None] == np.arange(count or most + 1)).astype(np.int8), classes


def check_counts(
    targets: Array, part: str, positives: int, negatives: int, mend: str = "Leave"
) -> None:
    for value, sign, least in ((1, "positive", positives), (0, "negative", negatives)):
        counts = (targets == value).sum(axis=0)
        lacking = np.flatnonzero(counts < least)
        if len(lacking):
            others = f", {len(lacking) - 1} more classes too few" if len(lacking) > 1 else ""
            raise ValueError(
                f"Class {lacking[0]} has {counts[lacking[0]]} {sign} samples in {part}{others}; "
                f"expected at least {least}. {mend} such classes out."
            )


def check_shots(targets: Array, shots: int, one_label: bool) -> None:
    others = targets.shape[1] - 1
    if not others:
        raise ValueError(
            "labels have 1 class; expected at least 2, for low-shot sampling draws negatives from "
            "the others. Give labels of more classes."
        )
    negatives = 0 if one_label else others * shots
    check_counts(targets, "train", shots, negatives, f"Give fewer shots than {shots}, or leave")
