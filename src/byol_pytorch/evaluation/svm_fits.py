"""The data that linear SVMs are fitted to, in one form, and the fits, in processes of their own."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from joblib import Parallel
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import cross_validate
from sklearn.svm import LinearSVC
from torch import Tensor
from tqdm import tqdm

from byol_pytorch.evaluation.average_precision import (
    Array,
    Floats,
    as_array,
    as_targets,
    check_counts,
)


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
    train, test = _unit_rows(train_features, "train"), _unit_rows(test_features, "test")
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


def _unit_rows(value: Tensor | Array, name: str) -> Floats:
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


class SVMs(NamedTuple):
    """Hyperplanes of one class, one a cost: coef (K, D), intercept (K,)."""

    coef: Floats
    intercept: Floats
    unconverged: int

    def decide(self, features: Floats) -> Floats:
        """(N, K) decision values."""
        return features @ self.coef.T + self.intercept


def fit(features: Floats, target: Array, costs: list[float], options: dict[str, Any]) -> SVMs:
    """One SVM for each cost, on the samples whose target is not -1."""
    used = np.flatnonzero(target != -1)
    samples, basis = _basis(features[used])
    signs = np.where(target[used] == 1, 1, -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # they are counted
        svms = [LinearSVC(C=cost, **options).fit(samples, signs) for cost in costs]
    coef = np.vstack([svm.coef_ for svm in svms])
    return SVMs(
        coef if basis is None else coef @ basis.T,
        np.concatenate([svm.intercept_ for svm in svms]),
        sum(svm.n_iter_ >= options["max_iter"] for svm in svms),
    )


def validate(
    features: Floats, target: Array, cost: float, folds: int, options: dict[str, Any]
) -> tuple[float, int]:
    """The mean AP over the folds, and the number of fits that did not converge."""
    used = np.flatnonzero(target != -1)
    signs = np.where(target[used] == 1, 1, -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of few samples are given once, before
        found = cross_validate(
            LinearSVC(C=cost, **options),
            features if len(used) == len(features) else features[used],
            signs,
            cv=folds,
            scoring="average_precision",
            return_estimator=True,
            error_score="raise",
        )
    unconverged = sum(svm.n_iter_ >= options["max_iter"] for svm in found["estimator"])
    return float(found["test_score"].mean()), unconverged


def run(tasks: Iterable[Any], total: int, n_jobs: int, progress: bool, text: str) -> Iterator[Any]:
    """The results of joblib's tasks, in their order, as they come."""
    results = Parallel(n_jobs=n_jobs, return_as="generator")(tasks)
    yield from tqdm(results, text, total, disable=not progress)


def _basis(samples: Floats) -> tuple[Floats, Floats | None]:
    """Samples (N, D), N < D, as (N, N) in an orthonormal basis (D, N) of their span.

    An SVM knows its samples by their inner products alone, and these stay: it is the same SVM,
    iteration by iteration, for D / N times less work. Where N >= D they stay as they are.
    """
    if len(samples) >= samples.shape[1]:
        return samples, None
    basis, triangle = np.linalg.qr(samples.T)
    return np.ascontiguousarray(triangle.T), basis


def in_span(train: Floats, test: Floats) -> tuple[Floats, Floats]:
    """Both in the basis that _basis finds for the training samples."""
    train, basis = _basis(train)
    return train, test if basis is None else test @ basis
