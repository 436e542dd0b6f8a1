"""Fits of linear SVMs, in processes of their own, and the space that they are done in."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from joblib import Parallel
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import cross_validate
from sklearn.svm import LinearSVC

from byol_pytorch.evaluation.svm_input import Array, Floats


class SVMs(NamedTuple):
    """Hyperplanes of one class, one a cost: coef (K, D), intercept (K,)."""

    coef: Floats
    intercept: Floats
    unconverged: int

    def decide(self, features: Floats) -> Floats:
        """(N, K) decision values."""
        return features @ self.coef.T + self.intercept


def fit(features: Floats, target: Array, costs: list[float], options: dict[str, Any]) -> SVMs:
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
    """The mean AP over the folds, and how many fits did not converge."""
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
    results = Parallel(n_jobs=n_jobs, return_as="generator")(tasks)
    if progress:
        from tqdm import tqdm

        results = tqdm(results, text, total)
    yield from results


def _basis(samples: Floats) -> tuple[Floats, Floats | None]:
    """Fewer samples than dimensions in an orthonormal basis (D, N) of their span: (N, N).

    An SVM knows its samples by their inner products alone, and these stay: it is the same one,
    iteration by iteration, for as many times less work. More samples are left as they are.
    """
    if len(samples) >= samples.shape[1]:
        return samples, None
    basis, triangle = np.linalg.qr(samples.T)
    return np.ascontiguousarray(triangle.T), basis


def in_span(train: Floats, test: Floats) -> tuple[Floats, Floats]:
    train, basis = _basis(train)
    return train, test if basis is None else test @ basis
