"""byol_pytorch.evaluation.svm against scikit-learn, hand-made cases and references written here."""

import warnings
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import average_precision_score
from sklearn.model_selection import GridSearchCV
from sklearn.svm import LinearSVC

from byol_pytorch.evaluation.svm import (
    VOC07_COSTS,
    average_precision,
    low_shot_map,
    low_shot_sample,
    svm_map,
)

COSTS = (0.01, 0.1, 1.0)


def scenes(
    n: int, dimensions: int, classes: int = 3, seed: int = 0, noise: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Features that tell somewhat of several labels an image, 5 % of them ignored."""
    rng = np.random.default_rng((seed, n))
    directions = np.random.default_rng(9).normal(size=(classes, dimensions))
    labels = (rng.random((n, classes)) < 0.35).astype(np.int64)
    features = labels @ directions + noise * rng.normal(size=(n, dimensions)) + 0.5
    labels[rng.random((n, classes)) < 0.05] = -1
    return features, labels


def objects(
    n: int, dimensions: int = 6, classes: int = 3, seed: int = 0, noise: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Features of images with one class each."""
    rng = np.random.default_rng((seed, n))
    centres = 2 * np.random.default_rng(9).normal(size=(classes, dimensions))
    labels = np.arange(n) % classes
    return centres[labels] + noise * rng.normal(size=(n, dimensions)), labels


def published(cost: float, max_iter: int = 2000) -> LinearSVC:
    return LinearSVC(
        C=cost, class_weight={1: 2, -1: 1}, intercept_scaling=1.0, penalty="l2",
        loss="squared_hinge", tol=0.0001, dual=True, max_iter=max_iter, random_state=0,
    )  # fmt: skip


def normalised(features: np.ndarray) -> np.ndarray:
    return features / (np.linalg.norm(features, axis=1) + 1e-5)[:, None]


# Average precision ------------------------------------------------------------------------------

HAND_TARGETS = np.array([1, 0, 1, 1, 0])
HAND_SCORES = np.array([5.0, 4.0, 3.0, 2.0, 1.0])


@pytest.mark.parametrize(
    ("form", "value"),
    [("area", 29 / 36), ("voc10", 1 / 3 + 2 / 3 * 3 / 4), ("voc07", (4 + 7 * 3 / 4) / 11)],
)
def test_average_precision_of_a_case_computed_by_hand(form: Any, value: float) -> None:
    assert average_precision(HAND_TARGETS, HAND_SCORES, form) == pytest.approx(value, abs=1e-12)


def reference_precision(targets: np.ndarray, scores: np.ndarray, form: str) -> Fraction:
    """By thresholds, in fractions: no cumulative sums, no floats."""
    positives = int((targets == 1).sum())
    curve = []
    for threshold in sorted(set(scores.tolist()), reverse=True):
        above = targets[scores >= threshold]
        hits = int((above == 1).sum())
        curve.append((Fraction(hits, positives), Fraction(hits, len(above))))

    def best(recall: Fraction) -> Fraction:
        return max(p for r, p in curve if r >= recall)

    if form == "voc07":
        return sum((best(Fraction(i, 10)) for i in range(11)), Fraction(0)) / 11
    recalls = sorted({r for r, _ in curve} | {Fraction(0)})
    return sum(((b - a) * best(b) for a, b in pairwise(recalls)), Fraction(0))


@pytest.mark.parametrize("form", ["voc07", "voc10"])
@pytest.mark.parametrize("seed", range(20))
def test_pascals_forms_are_those_of_an_exact_reference(form: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(5, 60))
    scores = rng.integers(0, 12, n) if seed % 2 else rng.permutation(n)  # with ties and without
    targets = np.where(rng.random(n) < 0.4, 1, 0)
    targets[0] = 1
    expected = float(reference_precision(targets, scores, form))
    assert average_precision(targets, scores, form) == pytest.approx(expected, abs=1e-12)


def test_a_recall_of_exactly_three_tenths_counts_at_that_point() -> None:
    targets = np.array([1, 1, 1] + [0] * 7 + [1] * 7)
    expected = (4 * 1 + 7 * 10 / 17) / 11
    found = average_precision(targets, -np.arange(17), "voc07")
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_the_area_form_is_scikit_learns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    targets = (rng.random((80, 4)) < 0.3).astype(int)
    scores = rng.integers(0, 30, (80, 4)) if seed % 2 else rng.normal(size=(80, 4))
    found = average_precision(targets, scores, "area")
    expected = [average_precision_score(targets[:, c], scores[:, c]) for c in range(4)]
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("form", ["voc07", "voc10", "area"])
def test_ignored_samples_do_not_count(form: Any) -> None:
    rng = np.random.default_rng(0)
    targets, scores = rng.integers(-1, 2, 100), rng.normal(size=100)
    known = targets != -1
    expected = average_precision(targets[known], scores[known], form)
    assert average_precision(torch.tensor(targets), torch.tensor(scores), form) == expected


@pytest.mark.parametrize(
    ("targets", "scores", "form", "words"),
    [
        ([0, 0, -1], [1.0, 2, 3], "voc10", "Class 0 has 0 positive"),
        ([1, 2, 0], [1.0, 2, 3], "voc10", "values from 0 to 2"),
        ([1, 0], [1.0, 2, 3], "voc10", r"\(2,\), scores as \(3,\)"),
        ([1, 0], [1.0, np.nan], "voc10", "NaN"),
        ([1, 0], [1.0, 2.0], "11point", "'11point'; expected one of"),
    ],
)
def test_average_precision_refuses(targets: Any, scores: Any, form: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        average_precision(np.array(targets), np.array(scores), form)


# All samples ------------------------------------------------------------------------------------


# The second has fewer training samples than dimensions.
@pytest.mark.parametrize(("train_size", "dimensions"), [(120, 12), (60, 90)])
@pytest.mark.parametrize("metric", ["voc10", "voc07"])
def test_svm_map_is_the_published_pipeline_in_plain_scikit_learn(
    train_size: int, dimensions: int, metric: Any
) -> None:
    train, train_labels = scenes(train_size, dimensions, noise=2.0)
    test, test_labels = scenes(100, dimensions, noise=2.0)
    found = svm_map(train, train_labels, test, test_labels, costs=COSTS, metric=metric)

    for c in range(3):
        signs = np.where(train_labels[:, c] == 1, 1, -1)  # ignored ones are negatives
        search = GridSearchCV(published(1.0), {"C": COSTS}, scoring="average_precision", cv=3)
        search.fit(normalised(train), signs)
        assert found.costs[c] == search.best_params_["C"]
        means = search.cv_results_["mean_test_score"]
        np.testing.assert_allclose(found.validation_ap[c], means, atol=1e-9)
        known = test_labels[:, c] != -1
        scores = search.decision_function(normalised(test))[known]
        expected = reference_precision(test_labels[known, c], scores, metric)
        assert found.ap[c] == pytest.approx(float(expected), abs=1e-9)
    assert found.mean_ap == found.ap.mean()
    assert found.top1 is None


def test_the_costs_are_mmselfsups_in_their_order() -> None:
    assert len(VOC07_COSTS) == 19
    assert VOC07_COSTS[:4] == (1.0, 10.0, 100.0, 0.0625) and VOC07_COSTS[-1] == 2.0**-19


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_separable_classes_are_told_apart() -> None:
    train, test = objects(60, noise=0.05), objects(30, noise=0.05)
    found = svm_map(*train, *test)
    assert found.mean_ap == 1.0 and found.top1 == 1.0
    assert np.ptp(found.validation_ap) == 0 and found.costs.tolist() == [1.0] * 3  # the first
    few = low_shot_map(*train, *test, shots=(1, 4), samplings=2, costs=(1.0, 100.0))
    assert few.mean_ap.tolist() == [1.0, 1.0] and few.deviation.tolist() == [0.0, 0.0]
    assert few.top1 is not None and few.top1.tolist() == [1.0, 1.0]


def test_one_class_an_image_is_one_against_the_rest_and_has_an_accuracy() -> None:
    (train, labels), (test, test_labels) = objects(90, noise=3.0), objects(60, noise=3.0)
    found = svm_map(train, labels, test, test_labels, costs=COSTS)
    hot = svm_map(train, np.eye(3)[labels], test, np.eye(3)[test_labels], costs=COSTS)
    assert found.ap.tolist() == hot.ap.tolist() and hot.top1 is None
    scores = [
        published(found.costs[c])
        .fit(normalised(train), np.where(labels == c, 1, -1))
        .decision_function(normalised(test))
        for c in range(3)
    ]
    assert found.top1 == (np.argmax(scores, axis=0) == test_labels).mean()
    assert 0.4 < found.top1 < 1.0


def test_ignored_training_labels_can_be_left_out() -> None:
    train, labels = scenes(90, 8)
    test = scenes(60, 8)
    found = svm_map(train, labels, *test, costs=(1.0,), train_on_ignored=False)
    for c in range(3):
        known = labels[:, c] != -1
        svm = published(1.0).fit(normalised(train)[known], np.where(labels[known, c] == 1, 1, -1))
        scores = svm.decision_function(normalised(test[0]))
        expected = average_precision(test[1][:, c], scores)
        assert found.ap[c] == pytest.approx(float(expected), abs=1e-9)
        few = np.where(known, labels[:, c], 0)[:, None]
        alone = svm_map(train, few, test[0], test[1][:, c : c + 1], costs=(1.0,))
        assert alone.validation_ap[0, 0] != found.validation_ap[c, 0]


def test_the_length_of_a_feature_does_not_matter() -> None:
    (train, labels), test = scenes(90, 8), scenes(60, 8)
    lengths = np.random.default_rng(0).uniform(10, 1000, (90, 1))
    one = svm_map(train * 100, labels, *test, costs=(1.0,))
    other = svm_map(train * lengths, labels, *test, costs=(1.0,))
    np.testing.assert_allclose(one.ap, other.ap, atol=0.01)


def test_tensors_of_any_float_type_are_taken() -> None:
    train, test = objects(60), objects(30)
    expected = svm_map(*train, *test, costs=(1.0,))
    given = [torch.tensor(x) for x in (*train, *test)]
    assert svm_map(*given, costs=(1.0,)).ap.tolist() == expected.ap.tolist()
    given[0], given[2] = given[0].bfloat16().requires_grad_(), given[2].half()
    assert svm_map(*given, costs=(1.0,)).mean_ap == pytest.approx(expected.mean_ap, abs=0.05)


def test_the_input_is_left_as_it_was() -> None:
    (train, labels), (test, test_labels) = scenes(60, 8), scenes(40, 8)
    copies = [x.copy() for x in (train, labels, test, test_labels)]
    svm_map(train, labels, test, test_labels, costs=(1.0,))
    for given, copy in zip((train, labels, test, test_labels), copies, strict=True):
        np.testing.assert_array_equal(given, copy)


@pytest.mark.slow
def test_several_processes_give_the_same_result() -> None:
    train, test = scenes(40, 60), scenes(40, 60)
    one, two = (svm_map(*train, *test, costs=COSTS, n_jobs=n) for n in (1, 2))
    assert one.costs.tolist() == two.costs.tolist()
    np.testing.assert_allclose(one.validation_ap, two.validation_ap, atol=1e-9)
    np.testing.assert_allclose(one.ap, two.ap, atol=1e-9)


def test_fits_that_did_not_converge_are_counted_in_one_warning() -> None:
    train, test = scenes(60, 8), scenes(40, 8)
    with pytest.warns() as caught:
        found = svm_map(*train, *test, costs=(1.0, 100.0), max_iter=1)
    assert [w.category for w in caught] == [ConvergenceWarning]
    fits = 3 * 2 * 3 + 3
    assert found.unconverged == fits
    assert str(caught[0].message).startswith(f"{fits} of {fits} SVM fits")
    with pytest.warns(ConvergenceWarning, match="12 of 12"):
        few = low_shot_map(*train, *test, shots=(2, 4), samplings=1, costs=(1.0, 9.0), max_iter=1)
    assert few.unconverged == 12


def test_fewer_samples_of_a_sign_than_folds_give_a_warning_and_a_result() -> None:
    (train, labels), (test, test_labels) = scenes(60, 8), scenes(40, 8)
    labels = np.maximum(labels, 0)
    labels[:, 1] = 1
    labels[:2, 1] = 0
    with pytest.warns(UserWarning, match=r"1 classes, the first is 1, .* folds=3"):
        found = svm_map(train, labels, test, test_labels, costs=COSTS)
    assert np.isfinite(found.validation_ap).all() and 0 < found.mean_ap <= 1


def test_progress_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    train, test = objects(30), objects(30)
    svm_map(*train, *test, costs=(1.0,))
    assert capsys.readouterr().err == ""
    svm_map(*train, *test, costs=(1.0,), progress=True)
    assert "choosing costs" in capsys.readouterr().err


# A few samples of each class --------------------------------------------------------------------


def test_each_class_draws_its_positives_and_negatives() -> None:
    _, labels = scenes(200, 4, classes=4)
    sample = low_shot_sample(labels, 5, seed=3)
    assert sample.shape == labels.shape
    assert (sample == 1).sum(axis=0).tolist() == [5] * 4
    assert (sample == 0).sum(axis=0).tolist() == [15] * 4
    drawn = sample != -1
    assert (sample[drawn] == labels[drawn]).all()
    assert (drawn.sum(axis=1) < 4).any()  # each class for itself


def test_classes_of_single_images_share_the_draw() -> None:
    labels = np.arange(100) % 4
    sample = low_shot_sample(torch.tensor(labels), 5, seed=3)
    rows = np.flatnonzero((sample != -1).any(axis=1))
    assert np.bincount(labels[rows]).tolist() == [5] * 4
    np.testing.assert_array_equal(sample[rows], np.eye(4)[labels[rows]])


def test_the_seed_alone_decides_the_draw() -> None:
    _, labels = scenes(200, 4)
    first, again, other = (low_shot_sample(labels, 8, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_low_shot_map_is_the_published_pipeline_in_plain_scikit_learn() -> None:
    train, labels = scenes(150, 40, noise=3.0)
    test, test_labels = scenes(80, 40, noise=3.0)
    shots, samplings = (2, 10), 3
    found = low_shot_map(
        train, labels, test, test_labels, shots=shots, samplings=samplings, costs=COSTS, seed=7
    )

    def published_map(sample: np.ndarray, cost: float) -> float:
        precisions = []
        for c in range(3):
            rows, known = sample[:, c] != -1, test_labels[:, c] != -1
            svm = published(cost).fit(
                normalised(train[rows]), np.where(sample[rows, c] == 1, 1, -1)
            )
            scores = svm.decision_function(normalised(test[known]))
            precisions.append(reference_precision(test_labels[known, c], scores, "voc10"))
        return float(np.mean([float(p) for p in precisions]))

    for s, k in enumerate(shots):
        samples = [low_shot_sample(labels, k, seed=(7, r, k)) for r in range(samplings)]
        expected = np.array([[published_map(x, cost) for cost in COSTS] for x in samples])
        np.testing.assert_allclose(found.all_mean_ap[s], expected, atol=1e-9)
        best = expected.mean(axis=0).argmax()  # not the mean of each sampling's best
        assert found.costs[s] == COSTS[best]
        assert found.mean_ap[s] == pytest.approx(expected[:, best].mean())
        assert found.deviation[s] == pytest.approx(np.std(expected[:, best]))
    assert found.shots == shots and found.top1 is None


def test_the_low_shot_cost_is_the_best_on_average_not_at_its_luckiest() -> None:
    train, test = scenes(150, 8, noise=4.0), scenes(80, 8, noise=4.0)
    costs = (0.01, 0.1, 0.3, 1.0)
    found = low_shot_map(*train, *test, shots=(1, 2, 3), samplings=4, costs=costs)
    luckiest = found.all_mean_ap.max(axis=1).argmax(axis=1)
    best = found.all_mean_ap.mean(axis=1).argmax(axis=1)
    assert (best != luckiest).any()
    assert found.costs.tolist() == [costs[i] for i in best]


def test_low_shot_map_follows_its_seed() -> None:
    train, test = scenes(150, 8, noise=3.0), scenes(80, 8, noise=3.0)
    first, again, other = (
        low_shot_map(*train, *test, shots=(2,), samplings=2, costs=(1.0,), seed=s)
        for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.all_mean_ap, again.all_mean_ap)
    assert (first.all_mean_ap != other.all_mean_ap).all()
    assert first.all_mean_ap[0, 0, 0] != first.all_mean_ap[0, 1, 0]


def test_low_shot_accuracy_is_that_of_the_chosen_cost() -> None:
    train, test = objects(90, noise=3.0), objects(60, noise=3.0)
    found = low_shot_map(*train, *test, shots=(3,), samplings=2, costs=COSTS)
    correct = []
    for r in range(2):
        sample = low_shot_sample(train[1], 3, seed=(0, r, 3))
        rows = sample[:, 0] != -1
        scores = [
            published(found.costs[0])
            .fit(normalised(train[0][rows]), np.where(t == 1, 1, -1))
            .decision_function(normalised(test[0]))
            for t in sample[rows].T
        ]
        correct.append((np.argmax(scores, axis=0) == test[1]).mean())
    assert found.top1 is not None and found.top1[0] == pytest.approx(np.mean(correct))


# What is refused --------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]


def put(name: str, value: Any) -> Change:
    return lambda given: given.update({name: value})


def nan(given: dict[str, Any]) -> None:
    given["test_features"][3, 1] = np.nan


def none_of_class_two(given: dict[str, Any]) -> None:
    given["train_labels"][given["train_labels"] == 2] = 0


def untested_class(given: dict[str, Any]) -> None:
    given["test_labels"][given["test_labels"] == 1] = 0


REFUSED: list[tuple[Change, str]] = [
    (nan, r"test_features hold NaN or infinite values in 1 of 30 rows, the first is row 3"),
    (none_of_class_two, "expected numbers from 0 to 1, as in train"),
    (untested_class, "Class 1 has 0 positive samples in test"),
    (put("train_labels", np.zeros(60, int)), "class 0 alone; expected at least 2"),
    (put("train_labels", np.arange(60) - 1), "classes from -1 to 58"),
    (put("train_labels", np.zeros(60)), r"float64 \(60,\); expected classes \(N,\) as integers"),
    (put("train_labels", np.full((60, 3), 2)), "values from 2 to 2; expected 1 positive"),
    (put("train_labels", np.eye(3)[np.arange(60) % 3]), r"\(60, 3\), test_labels as \(30,\)"),
    (put("train_labels", np.arange(50) % 3), "hold 60 rows, train_labels 50"),
    (put("train_features", np.ones((60, 5))), "5 dimensions, test_features 6"),
    (put("train_features", np.ones((60, 6, 1, 1))), r"\(60, 6, 1, 1\); expected \(N, D\)"),
    (put("costs", ()), r"costs=\(\)"),
    (put("costs", (1.0, 0.0)), "expected positive numbers"),
    (put("metric", "map"), "'map'; expected one of"),
]


def given() -> dict[str, Any]:
    train, test = objects(60), objects(30)
    names = ("train_features", "train_labels", "test_features", "test_labels")
    return dict(zip(names, (*train, *test), strict=True))


@pytest.mark.parametrize("measure", [svm_map, low_shot_map])
@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_wrong_input_is_refused(measure: Any, change: Change, words: str) -> None:
    arguments = given()
    change(arguments)
    with pytest.raises(ValueError, match=words):
        measure(**arguments)


@pytest.mark.parametrize(
    ("measure", "options", "words"),
    [
        (svm_map, {"folds": 1}, "folds=1; expected an int of at least 2"),
        (svm_map, {"max_iter": 0}, "max_iter=0; expected positive"),
        (low_shot_map, {"tol": 0.0}, "tol=0.0"),
        (low_shot_map, {"positive_weight": -1.0}, "positive_weight=-1.0"),
        (low_shot_map, {"shots": (1, 64)}, "20 positive samples in train.*fewer shots than 64"),
        (low_shot_map, {"shots": ()}, "expected shots of at least 1"),
        (low_shot_map, {"shots": (0,)}, "expected shots of at least 1"),
        (low_shot_map, {"samplings": 0}, "samplings=0"),
    ],
)
def test_wrong_settings_are_refused(measure: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        measure(**given(), **options)


def test_classes_with_too_few_samples_of_a_sign_are_refused() -> None:
    labels = np.zeros((60, 2), int)
    labels[:50, 0], labels[0, 1] = 1, 1
    arguments = given() | {"train_labels": labels, "test_labels": np.eye(2)[np.arange(30) % 2]}
    with pytest.raises(ValueError, match=r"Class 1 has 1 positive samples in train; .* least 2"):
        svm_map(**arguments)
    with pytest.raises(ValueError, match="Class 0 has 0 positive samples in train, 1 more class"):
        svm_map(**arguments | {"train_labels": labels * 0})
    with pytest.raises(ValueError, match="Class 0 has 0 negative samples in train"):
        svm_map(**arguments | {"train_labels": labels * 0 + 1})
    with pytest.raises(ValueError, match="Class 1 has 0 positive samples in train"):
        svm_map(**given() | {"train_labels": np.arange(60) // 30 * 2})  # classes 0 and 2
    with pytest.raises(ValueError, match=r"Class 1 has 1 positive .* least 2\. Give fewer shots"):
        low_shot_map(**arguments, shots=(1, 2))
    with pytest.raises(ValueError, match=r"Class 0 has 10 negative .* least 11"):
        low_shot_sample(np.stack([labels[:, 0], 1 - labels[:, 0] // 2], axis=1), 11)


def test_too_many_shots_are_refused_before_any_fit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="fewer shots than 64"):
        low_shot_map(**given(), shots=(1, 64), progress=True)
    assert capsys.readouterr().err == ""


def test_one_column_has_no_negatives_to_draw() -> None:
    with pytest.raises(ValueError, match="labels have 1 class"):
        low_shot_sample(np.ones((5, 1), int), 1)


def test_nothing_else_warns() -> None:
    train, test = scenes(60, 8), scenes(40, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svm_map(*train, *test, costs=(1.0,))
