"""Average precision of a ranking, in PASCAL VOC's forms and scikit-learn's."""

from typing import Literal, get_args

import numpy as np
from torch import Tensor

from byol_pytorch.evaluation.svm_input import Array, Floats, as_array, as_targets, check_counts

Form = Literal["voc10", "voc07", "area"]


def average_precision(
    targets: Tensor | Array, scores: Tensor | Array, form: Form = "voc10"
) -> Floats:
    """Float64 in [0, 1], of shape () for targets and scores (N,), (C,) for (N, C).

    Targets are 1 positive, 0 negative and -1 ignored. Precision and recall are taken at every
    distinct score. The forms are
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
