"""Average precision of a ranking, in PASCAL VOC's forms and scikit-learn's, and its targets."""

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Form = Literal["voc10", "voc07", "area"]


def average_precision(
    targets: Tensor | Array, scores: Tensor | Array, form: Form = "voc10"
) -> Floats:
    """The average precision in [0, 1]: shape () for targets and scores (N,), (C,) for (N, C).

    Targets are 1 for positive, 0 for negative and -1 for ignored samples. Precision and recall are
    taken at every distinct score. The forms are
    "voc10": the area below precision made non-increasing (PASCAL VOC's from 2010 on). FAIR's and
        MMSelfSup's figures on VOC07 are of this form;
    "voc07": the mean of that precision at recalls 0, 0.1, ... 1 (PASCAL VOC's until 2009);
    "area": the sum of precision times the step in recall, scikit-learn's average_precision_score.

    Raises ValueError for mismatched shapes, other targets, NaN, and a class without positives.
    """
    check_form(form)
    marks, values = as_array(targets), as_array(scores)
    if marks.shape != values.shape or marks.ndim not in (1, 2):
        raise ValueError(
            f"targets came as {marks.shape}, scores as {values.shape}; expected both (N,) or (N, C)"
            " alike. Give one score for each target."
        )
    columns, _ = as_targets(marks.reshape(len(marks), -1), "targets")
    values = values.reshape(columns.shape)
    if np.isnan(values).any():
        raise ValueError(
            "scores hold NaN; expected numbers to rank by. Look at the images they are of."
        )
    check_counts(columns, "targets", 1, 0)
    pairs = [(values[t != -1, c], t[t != -1] == 1) for c, t in enumerate(columns.T)]
    return np.array([_average_precision(*pair, form) for pair in pairs]).reshape(marks.shape[1:])


def _average_precision(scores: Array, positive: Array, form: Form) -> float:
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # of runs of equal scores
    hits = np.cumsum(positive[order])[ends]
    precision = hits / (ends + 1)
    if form != "area":
        precision = np.maximum.accumulate(precision[::-1])[::-1]
    if form == "voc07":  # recall >= i / 10, in integers: as floats 3 / 10 falls short of 0.3
        return float(precision[np.searchsorted(10 * hits, np.arange(11) * hits[-1])].mean())
    return float(np.diff(hits, prepend=0) @ precision / hits[-1])


def check_form(form: str) -> None:
    if form not in get_args(Form):
        raise ValueError(
            f"The form of average precision came as {form!r}; expected one of {get_args(Form)}."
        )


# Targets ----------------------------------------------------------------------------------------


def as_array(value: Tensor | Array) -> Array:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype is torch.bfloat16 else value).numpy()
    return np.asarray(value)


def as_targets(
    value: Tensor | Array, name: str, count: int | None = None
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int64] | None]:
    """Targets (N, C) of 1, 0 and -1, and the classes (N,) where each image came with one.

    `count` is the number of classes where it is known.
    """
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
    """Raise ValueError for a class with fewer positive or negative samples than these."""
    for value, sign, least in ((1, "positive", positives), (0, "negative", negatives)):
        counts = (targets == value).sum(axis=0)
        lacking = np.flatnonzero(counts < least)
        if len(lacking):
            others = f", {len(lacking) - 1} more classes too few" if len(lacking) > 1 else ""
            raise ValueError(
                f"Class {lacking[0]} has {counts[lacking[0]]} {sign} samples in {part}{others}; "
                f"expected at least {least}. {mend} such classes out."
            )
