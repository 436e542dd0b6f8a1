"""Linear SVMs on frozen features: VOC07 classification and low-shot classification.

The protocol is Goyal et al., arXiv 1905.01235; its details are those of the code that made the
published tables, facebookresearch/fair_self_supervision_benchmark (tools/svm, extra_scripts) and
MMSelfSup's copy of it (tools/benchmarks/classification/svm_voc07). The data and the fits are in
svm_fits.py, targets and average precision in average_precision.py.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from joblib import delayed
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from byol_pytorch.arguments import is_count, is_number
from byol_pytorch.evaluation.average_precision import (
    Array,
    Floats,
    Form,
    as_targets,
    average_precision,
    check_counts,
    check_form,
)
from byol_pytorch.evaluation.svm_fits import SVMs, fit, in_span, open_task, run, validate

__all__ = [
    "VOC07_COSTS",
    "VOC07_SHOTS",
    "Form",
    "LowShotResult",
    "SVMResult",
    "average_precision",
    "low_shot_map",
    "low_shot_sample",
    "svm_map",
]

# MMSelfSup's scripts pass 1, 10 and 100 (tools/eval_svm_full.sh, eval_svm_lowshot.sh), and their
# parse_cost_list adds the powers of a half, in this order. Of equally good costs the first wins.
# FAIR's commands add 1e-7 to 0.1 by tens (GETTING_STARTED.md).
VOC07_COSTS = (1.0, 10.0, 100.0, *(0.5**n for n in range(4, 20)))
VOC07_SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)


@dataclass(frozen=True)
class SVMResult:
    """What svm_map finds for C classes and K costs. APs and accuracies are in [0, 1]."""

    mean_ap: float
    ap: Floats  # (C,) on the test set
    costs: Floats  # (C,) the chosen ones
    validation_ap: Floats  # (C, K) means over the folds, which chose the costs
    top1: float | None  # by the largest decision value; None where images have several labels
    unconverged: int  # number of fits that max_iter ended


@dataclass(frozen=True)
class LowShotResult:
    """What low_shot_map finds for S shots, R samplings and K costs. APs are in [0, 1]."""

    shots: tuple[int, ...]
    mean_ap: Floats  # (S,) the mean over the samplings at the best cost
    deviation: Floats  # (S,) the standard deviation with divisor R, as the original reports it
    costs: Floats  # (S,) the best ones
    all_mean_ap: Floats  # (S, R, K)
    top1: Floats | None  # (S,) mean accuracy at these costs; None where images have several labels
    unconverged: int


def svm_map(
    train_features: Tensor | Array, train_labels: Tensor | Array,
    test_features: Tensor | Array, test_labels: Tensor | Array, *,
    costs: Sequence[float] = VOC07_COSTS, folds: int = 3, metric: Form = "voc10",
    train_on_ignored: bool = True, positive_weight: float = 2.0, tol: float = 1e-4,
    max_iter: int = 2000, seed: int = 0, n_jobs: int = 1, progress: bool = False,
) -> SVMResult:  # fmt: skip
    """The mean average precision of one linear SVM a class, each with the cost of its own.

    Features are (N, D); each row is divided by its norm + 1e-5. Labels are (N, C) of 1 positive,
    0 negative and -1 ignored (PASCAL's files have another code: 1, -1 and 0 for "difficult"). Or
    they are classes (N,), one an image; each class is then told from all others.

    Each SVM is liblinear's with squared hinge, dual, and positives that weigh twice. Its cost is
    the one whose AP (scikit-learn's) has the highest mean over stratified folds of the training
    set. In training ignored labels count as negatives, as in the original, or with
    `train_on_ignored=False` not at all. In testing they never count. `metric` is the form of
    average_precision.

    `n_jobs` processes (-1: one a core) fit at once; each holds a copy of the features, 16 bytes x
    N x min(N, D). The result depends on their number by rounding alone.

    Raises ValueError for input that is not as above, is not finite or differs in length, and for a
    class without two positives and two negatives to train on and one of each to test on. One
    ConvergenceWarning counts the fits that `max_iter` ended.
    """
    options = _options(costs, metric, positive_weight, tol, max_iter, seed)
    if not is_count(folds) or folds < 2:
        raise ValueError(f"folds={folds!r}; expected an int of at least 2. The protocol's are 3.")
    task = open_task(train_features, train_labels, test_features, test_labels)
    targets = task.train_targets
    if train_on_ignored:
        targets = np.maximum(targets, 0)
    check_counts(targets, "train", 2, 2)
    _warn_of_few(targets, folds)
    train, test = in_span(task.train, task.test)
    classes = range(targets.shape[1])

    validations = (
        delayed(validate)(train, targets[:, c], cost, folds, options)
        for c in classes
        for cost in costs
    )
    total = len(classes) * len(costs)
    found = list(run(validations, total, n_jobs, progress, "choosing costs"))
    validation = np.array([ap for ap, _ in found]).reshape(len(classes), len(costs))
    chosen = np.asarray(costs, dtype=np.float64)[validation.argmax(axis=1)]

    fits = (delayed(fit)(train, targets[:, c], [chosen[c]], options) for c in classes)
    svms: list[SVMs] = list(run(fits, len(classes), n_jobs, progress, "fitting"))
    scores = np.hstack([svm.decide(test) for svm in svms])  # (N, C)
    unconverged = sum(n for _, n in found) + sum(svm.unconverged for svm in svms)
    _warn_of_unconverged(unconverged, total * folds + len(classes), max_iter)
    ap = average_precision(task.test_targets, scores, metric)
    top1 = None if task.test_classes is None else _accuracy(scores, task.test_classes)
    return SVMResult(float(ap.mean()), ap, chosen, validation, top1, unconverged)


def low_shot_map(
    train_features: Tensor | Array, train_labels: Tensor | Array,
    test_features: Tensor | Array, test_labels: Tensor | Array, *,
    shots: Sequence[int] = VOC07_SHOTS, samplings: int = 5,
    costs: Sequence[float] = VOC07_COSTS, metric: Form = "voc10", positive_weight: float = 2.0,
    tol: float = 1e-4, max_iter: int = 2000, seed: int = 0, n_jobs: int = 1, progress: bool = False,
) -> LowShotResult:  # fmt: skip
    """svm_map from few samples a class, which low_shot_sample draws `samplings` times.

    For each number of shots all classes have one cost: the one whose mAP on the test set has the
    highest mean over the samplings. So it is published; these figures do not estimate what new
    images would give.

    Takes and raises what svm_map does, and ValueError where a class has fewer samples than shots.
    """
    options = _options(costs, metric, positive_weight, tol, max_iter, seed)
    if not len(shots) or not all(map(is_count, (*shots, samplings))):
        raise ValueError(
            f"shots={tuple(shots)}, samplings={samplings!r}; expected shots of at least 1 and at "
            f"least one sampling. The protocol's are {VOC07_SHOTS} and 5."
        )
    task = open_task(train_features, train_labels, test_features, test_labels)
    labels = task.train_targets if task.train_classes is None else task.train_classes
    _check_shots(task.train_targets, max(shots), task.train_classes is not None)
    train, test = in_span(task.train, task.test)
    classes = task.train_targets.shape[1]

    def fits() -> Iterator[Any]:
        for k in shots:
            for r in range(samplings):
                sample = low_shot_sample(labels, k, seed=(seed, r, k))
                yield from (delayed(fit)(train, t, list(costs), options) for t in sample.T)

    all_map = np.empty((len(shots), samplings, len(costs)))
    all_top1 = np.empty_like(all_map)
    total = len(shots) * samplings * classes
    fitted, unconverged = run(fits(), total, n_jobs, progress, "low-shot fits"), 0
    for place in np.ndindex(len(shots), samplings):
        svms: list[SVMs] = [next(fitted) for _ in range(classes)]
        unconverged += sum(svm.unconverged for svm in svms)
        scores = np.stack([svm.decide(test) for svm in svms], axis=1)  # (N, C, K)
        for i in range(len(costs)):
            ap = average_precision(task.test_targets, scores[..., i], metric)
            all_map[(*place, i)] = ap.mean()
            if task.test_classes is not None:
                all_top1[(*place, i)] = _accuracy(scores[..., i], task.test_classes)
    _warn_of_unconverged(unconverged, total * len(costs), max_iter)

    best = all_map.mean(axis=1).argmax(axis=1)  # (S,)
    at_best = all_map[np.arange(len(shots)), :, best]  # (S, R)
    top1 = all_top1[np.arange(len(shots)), :, best].mean(axis=1)
    return LowShotResult(
        tuple(shots),
        at_best.mean(axis=1),
        at_best.std(axis=1),
        np.asarray(costs, dtype=np.float64)[best],
        all_map,
        None if task.test_classes is None else top1,
        unconverged,
    )


def low_shot_sample(
    labels: Tensor | Array, shots: int, *, seed: int | Sequence[int] = 0
) -> npt.NDArray[np.int8]:
    """(N, C) int8: 1 or 0 for the labels that were drawn, -1 elsewhere. The seed decides the draw.

    From labels (N, C) each class draws `shots` positives and (C - 1) * `shots` negatives for
    itself, none of them ignored (create_voc_low_shot_samples.py). From classes (N,) each draws
    `shots` images, and all classes share them (create_places_low_shot_samples.py).

    Raises ValueError where a class has too few samples.
    """
    targets, classes = as_targets(labels, "labels")
    _check_shots(targets, shots, classes is not None)
    rng = np.random.default_rng(seed)

    def draw(column: int, value: int, count: int) -> Array:
        return rng.choice(np.flatnonzero(targets[:, column] == value), count, replace=False)

    sample = np.full_like(targets, -1)
    for c in range(targets.shape[1]):
        rows = draw(c, 1, shots)
        if classes is not None:
            sample[rows] = targets[rows]
        else:
            sample[rows, c] = 1
            sample[draw(c, 0, (targets.shape[1] - 1) * shots), c] = 0
    return sample


def _check_shots(targets: Array, shots: int, one_label: bool) -> None:
    others = targets.shape[1] - 1
    if not others:
        raise ValueError(
            "labels have 1 class; expected at least 2, for low-shot sampling draws negatives from "
            "the others. Give labels of more classes."
        )
    negatives = 0 if one_label else others * shots
    check_counts(targets, "train", shots, negatives, f"Give fewer shots than {shots}, or leave")


def _options(
    costs: Sequence[float], metric: str, positive_weight: float, tol: float, max_iter: int,
    seed: int,
) -> dict[str, Any]:  # fmt: skip
    """The options of LinearSVC, as in train_svm_kfold.py."""
    check_form(metric)
    numbers = (*costs, positive_weight, tol, max_iter)
    if not len(costs) or not all(is_number(x) and 0 < x < np.inf for x in numbers):
        raise ValueError(
            f"costs={tuple(costs)}, positive_weight={positive_weight}, tol={tol}, max_iter="
            f"{max_iter}; expected positive numbers, and at least one cost. Leave them out for the "
            "protocol's."
        )
    return {
        "penalty": "l2",
        "loss": "squared_hinge",
        "dual": True,
        "class_weight": {1: positive_weight, -1: 1.0},
        "intercept_scaling": 1.0,
        "tol": tol,
        "max_iter": max_iter,
        "random_state": seed,
    }


def _accuracy(scores: Floats, classes: Array) -> float:
    return float((scores.argmax(axis=1) == classes).mean())


def _warn_of_few(targets: Array, folds: int) -> None:
    counts = np.minimum((targets == 1).sum(axis=0), (targets == 0).sum(axis=0))
    few = np.flatnonzero(counts < folds)
    if len(few):
        warnings.warn(
            f"{len(few)} classes, the first is {few[0]}, have fewer positive or negative samples "
            f"than folds={folds}: the folds that lack them say nothing of these classes' costs.",
            stacklevel=3,
        )


def _warn_of_unconverged(unconverged: int, fits: int, max_iter: int) -> None:
    if unconverged:
        warnings.warn(
            f"{unconverged} of {fits} SVM fits were ended by max_iter={max_iter} before they "
            "converged, as the protocol has it; give more, or leave the highest costs out.",
            ConvergenceWarning,
            stacklevel=3,
        )
