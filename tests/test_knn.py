"""Nearest neighbours and their votes: against scikit-learn, by hand, in parts, and wrong inputs."""

import contextlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from byol_pytorch.evaluation.knn import knn_accuracy, knn_predict
from byol_pytorch.evaluation.neighbours import nearest_neighbours


def clusters(
    count: int, classes: int, dim: int, seed: int, spread: float = 1.0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (count,), generator=generator)
    noise = torch.randn(count, dim, generator=generator)
    lengths = 0.1 + 10 * torch.rand(count, 1, generator=generator)
    return lengths * (centres[labels] + spread * noise), labels


def reference(
    bank: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's class probabilities, and the classes that they belong to."""
    model = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / temperature)
    )
    model.fit(bank.double().numpy(), labels.numpy())
    return model.predict_proba(queries.double().numpy()), model.classes_


@given(
    count=st.integers(2, 80),
    classes=st.integers(2, 9),
    dim=st.integers(1, 40),
    part=st.floats(0.01, 1),
    temperature=st.sampled_from([0.02, 0.07, 0.5, 3.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_the_vote_is_scikit_learns(count, classes, dim, part, temperature, seed):
    bank, labels = clusters(count, classes, dim, seed)
    queries, _ = clusters(30, classes, dim, seed + 1)
    k = max(1, round(part * count))
    votes, names = reference(bank, labels, queries, k, temperature)
    # In one dimension cosines are 1 or -1, so that which ones are the k nearest is open.
    if dim == 1:
        return
    found = knn_predict(bank, labels, queries, k=k, temperature=temperature, top=3).numpy()
    order = np.argsort(-votes, axis=1, kind="stable")[:, :3]
    for row, (classes_found, expected) in enumerate(zip(found, order, strict=True)):
        for got, best in zip(classes_found, expected, strict=False):
            most = votes[row, best]
            if most < 1e-9:
                assert got == -1 or votes[row, names == got] == pytest.approx(most, abs=1e-6)
            else:  # another class only where the votes are equal but for rounding
                assert votes[row, names == got] == pytest.approx(most, rel=1e-4)


@pytest.mark.parametrize("top", [1, 5])
def test_accuracies_of_all_k_are_scikit_learns(top):
    bank, labels = clusters(600, 12, 16, seed=0, spread=1.5)
    queries, truth = clusters(200, 12, 16, seed=1, spread=1.5)
    found = knn_accuracy(bank, labels, queries, truth, k=(200, 10, 20, 100), top=top)
    assert list(found) == [200, 10, 20, 100]
    for k, accuracy in found.items():
        votes, names = reference(bank, labels, queries, k, 0.07)
        best = names[np.argsort(-votes, axis=1, kind="stable")[:, :top]]
        assert accuracy == pytest.approx((best == truth.numpy()[:, None]).any(1).mean(), abs=1e-9)
        assert 0.2 < accuracy < 1
        assert knn_accuracy(bank, labels, queries, truth, k=k, top=top) == accuracy


def test_leaving_one_out_is_a_bank_without_the_sample():
    bank, labels = clusters(60, 4, 8, seed=0, spread=2)
    expected = torch.cat(
        [
            knn_predict(bank[rest], labels[rest], bank[i : i + 1], k=7, top=2)
            for i in range(60)
            for rest in [torch.arange(60) != i]
        ]
    )
    assert torch.equal(knn_predict(bank, labels, k=7, top=2), expected)
    accuracy = knn_accuracy(bank, labels, k=7)
    assert accuracy == pytest.approx((expected[:, 0] == labels).double().mean().item())
    assert knn_accuracy(bank, labels, bank, labels, k=1) == 1.0 > knn_accuracy(bank, labels, k=1)


def test_leaving_one_out_may_ask_all_the_others():
    bank, _ = clusters(20, 2, 4, seed=0)
    _, numbers = nearest_neighbours(bank, k=19)
    for i, row in enumerate(numbers.tolist()):
        assert sorted([*row, i]) == list(range(20))


# One bank by hand: directions at these angles from the query at 0 degrees.
ANGLES = [10, 15, 20, 40, 180]
HAND_LABELS = torch.tensor([3, 1, 1, 0, 5])


def directions(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack((angles.cos(), angles.sin()), dim=1)


@pytest.mark.parametrize(
    ("k", "temperature", "ranking"),
    [
        (1, 0.07, [3, -1, -1, -1]),  # the others have no vote
        (2, 0.07, [3, 1, -1, -1]),
        (3, 0.07, [1, 3, -1, -1]),  # e^(.966 / .07) + e^(.940 / .07) > e^(.985 / .07)
        (3, 0.01, [3, 1, -1, -1]),  # the nearest outvotes both
        (4, 0.07, [1, 3, 0, -1]),
        (5, 0.07, [1, 3, 0, 5]),
        (5, 0.004, [3, 1, 0, 5]),  # e^(-500) is no float32, and a vote still
    ],
)
def test_a_vote_counted_by_hand(k, temperature, ranking):
    found = knn_predict(
        directions(*ANGLES), HAND_LABELS, directions(0), k=k, temperature=temperature, top=4
    )
    assert found.tolist() == [ranking]


def test_the_accuracy_is_the_part_of_right_votes():
    bank, labels = directions(0, 90), torch.tensor([0, 1])
    queries, truth = directions(10, 80, 100, 20), torch.tensor([0, 1, 0, 1])
    assert knn_accuracy(bank, labels, queries, truth, k=1) == 0.5
    assert knn_accuracy(bank, labels, queries, truth, k=(1, 2), top=2) == {1: 0.5, 2: 1.0}


def test_a_class_that_the_bank_lacks_is_never_right():
    bank, labels = clusters(40, 3, 8, seed=0, spread=0.1)
    queries, truth = bank[:10], labels[:10].clone()
    truth[:4] = 7
    assert knn_accuracy(bank, labels, queries, truth, k=3, top=5) == 0.6


def test_equal_votes_go_to_the_smaller_class_and_equal_cosines_to_the_first():
    bank = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 0.0], [4.0, 0.0], [-1.0, 0.0]])
    query = torch.tensor([[3.0, 0.0]])
    cosines, numbers = nearest_neighbours(bank, query, k=5)
    assert numbers.tolist() == [[1, 2, 3, 0, 4]]
    assert cosines.tolist() == [[1, 1, 1, 0, -1]]
    labels = torch.tensor([0, 9, 4, 4, 0])
    assert knn_predict(bank, labels, query, k=1).item() == 9
    assert knn_predict(bank, labels, query, k=2, top=2).tolist() == [[4, 9]]


@pytest.mark.parametrize("k", [1, 6, 50, 300])
def test_of_many_duplicates_the_first_are_the_nearest(k):
    bank = directions(0).repeat(300, 1)
    bank[100] = directions(90)
    _, numbers = nearest_neighbours(bank, bank[:3], k=k)
    expected = [i for i in range(300) if i != 100] + [100]
    assert numbers.tolist() == [expected[:k]] * 3


def exact_neighbours(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    cosines = torch.nn.functional.cosine_similarity(
        queries[:, None].double(), bank[None].double(), dim=2
    )
    order = cosines.argsort(dim=1, descending=True)[:, :k]
    return cosines.gather(1, order), order


def test_a_bank_and_queries_of_several_parts():
    bank, labels = clusters(66_000, 5, 6, seed=0, spread=2)  # 65536 are a part, and 256 queries
    queries = clusters(1_100, 5, 6, seed=1, spread=2)[0]
    bank[65_536:] = queries[:464]
    cosines, numbers = nearest_neighbours(bank, queries, k=500)  # more than the last part holds
    assert torch.equal(numbers[:464, 0], torch.arange(65_536, 66_000))
    asked = [*range(0, 1_100, 50), 255, 256, 1_099]
    expected, order = exact_neighbours(bank, queries[asked], 500)
    torch.testing.assert_close(cosines[asked].double(), expected, atol=1e-6, rtol=0)
    assert (numbers[asked] == order).double().mean() > 0.99
    found = knn_predict(bank, labels, queries, k=(3, 500), top=2)
    parts = [knn_predict(bank, labels, part, k=(3, 500), top=2) for part in queries.split(550)]
    for k, classes in found.items():
        assert (classes == torch.cat([part[k] for part in parts])).double().mean() > 0.999


@pytest.mark.slow
def test_leaving_one_out_of_a_bank_of_several_parts():
    bank, _ = clusters(66_000, 5, 6, seed=0, spread=2)
    bank[65_536:] = bank[:464]
    cosines, numbers = nearest_neighbours(bank, k=20)
    own = torch.arange(len(bank))
    assert not (numbers == own[:, None]).any()
    assert torch.equal(numbers[:464, 0], own[65_536:])
    assert torch.equal(numbers[65_536:, 0], own[:464])
    asked = torch.tensor([464, 511, 512, 30_000, 65_535])
    expected, order = exact_neighbours(bank, bank[asked], 21)
    torch.testing.assert_close(cosines[asked].double(), expected[:, 1:], atol=1e-6, rtol=0)
    assert (numbers[asked] == order[:, 1:]).double().mean() > 0.99


@pytest.mark.parametrize("k", [1, 2, 3, 10, 40, 1999])
@pytest.mark.parametrize("count", [2000, 2003])
def test_the_search_is_exact(k, count):
    bank = clusters(count, 30, 24, seed=0, spread=1.2)[0]
    queries = clusters(300, 30, 24, seed=1, spread=1.2)[0]
    cosines, numbers = nearest_neighbours(bank, queries, k=k)
    expected, order = exact_neighbours(bank, queries, k)
    torch.testing.assert_close(cosines.double(), expected, atol=1e-6, rtol=0)
    assert (numbers == order).double().mean() > 0.999  # but for cosines that float32 makes equal


@pytest.mark.parametrize("k", [1, 10, 200])
def test_the_search_is_exact_where_all_cosines_are_negative(k):
    bank, queries = torch.rand(1003, 8), -torch.rand(50, 8)
    cosines, numbers = nearest_neighbours(bank, queries, k=k)
    expected, order = exact_neighbours(bank, queries, k)
    torch.testing.assert_close(cosines.double(), expected, atol=1e-6, rtol=0)
    assert (numbers == order).double().mean() > 0.99 and (cosines < 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_worked_on_in_float32(dtype):
    bank, labels = clusters(200, 5, 16, seed=0)
    queries, truth = clusters(50, 5, 16, seed=1)
    bank, queries = bank.to(dtype), queries.to(dtype)
    expected = knn_predict(bank.float(), labels, queries.float(), k=20)
    assert torch.equal(knn_predict(bank, labels, queries, k=20), expected)
    assert math.isfinite(knn_accuracy(bank, labels, queries, truth, k=20))


@pytest.fixture
def precision():
    """What torch's two ways to allow less than float32 in products say."""

    def now() -> tuple[str, ...]:
        try:
            overall = torch.get_float32_matmul_precision()
        except RuntimeError:  # where one place differs from what was set for all
            overall = "mixed"
        places = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        return (overall, *(place.fp32_precision for place in places))

    yield now
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("how", ["high", "medium", "allow_tf32", "fp32_precision", "nothing"])
def test_products_are_of_full_float32_whatever_is_allowed_outside(
    how, fails, precision, monkeypatch
):
    if how in ("high", "medium"):
        torch.set_float32_matmul_precision(how)
    if how == "allow_tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
    if how == "fp32_precision":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    before, inside, mm = precision(), set(), torch.mm

    def watched(*arguments, **options):
        inside.add(precision())
        if fails:
            raise RuntimeError("as where memory is short")
        return mm(*arguments, **options)

    monkeypatch.setattr(torch, "mm", watched)
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        nearest_neighbours(torch.randn(20, 4), k=3)
    assert inside == {("highest", "ieee", "ieee")}
    assert precision() == before


def test_nothing_is_changed_and_no_gradient_kept():
    bank, labels = clusters(50, 3, 8, seed=0)
    bank.requires_grad_()
    before = bank.detach().clone()
    cosines, _ = nearest_neighbours(bank, k=3)
    assert not cosines.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_neighbours(bank, k=3)[0], cosines)
    assert torch.equal(bank, before) and labels.dtype == torch.int64


def test_a_zero_feature_is_far_from_everything_and_no_error():
    bank = torch.cat((torch.zeros(1, 2), directions(0, 90, 180)))
    cosines, numbers = nearest_neighbours(bank, directions(0), k=4)
    assert numbers.tolist() == [[1, 0, 2, 3]]
    assert cosines[0, 1] == 0


BANK, LABELS = clusters(30, 3, 4, seed=0)


def with_nan(number: int) -> Tensor:
    bank = BANK.clone()
    bank[number, 2] = math.nan
    return bank


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((BANK, LABELS, BANK, LABELS), {"k": 31}, "k=31; expected 1 to 30, .* 30 samples"),
        ((BANK, LABELS), {"k": (5, 30)}, "k=30; expected 1 to 29, .* 30 samples"),
        ((BANK, LABELS), {"k": 0}, "k=0"),
        ((BANK, LABELS), {"k": ()}, r"k=\(\); expected a number of neighbours"),
        ((with_nan(17), LABELS), {}, "bank holds NaN.* sample 17"),
        ((BANK, LABELS, with_nan(3), LABELS), {}, "queries holds NaN.* sample 3"),
        ((BANK / 0, LABELS), {}, "NaN or infinite"),
        ((BANK, LABELS[:-1]), {}, "29 labels and bank 30 samples"),
        ((BANK, LABELS, BANK, LABELS[:4]), {}, "query_labels holds 4 labels and queries 30"),
        ((BANK, LABELS, BANK[:, :2], LABELS), {}, r"queries is \(30, 2\)"),
        ((BANK, LABELS, BANK[:0], LABELS[:0]), {}, "at least one sample"),
        ((BANK, LABELS, BANK, None), {}, "come together"),
        ((BANK, LABELS, None, LABELS), {}, "come together"),
        ((BANK[0], LABELS[:1]), {}, r"expected float features \(N, D\)"),
        ((BANK.int(), LABELS), {}, "expected float features"),
        ((BANK, LABELS.float()), {}, "one integer a sample"),
        ((BANK, torch.eye(30, dtype=torch.int64)), {}, "one integer a sample.*svm_map"),
        ((BANK, LABELS - 1), {}, "bank_labels holds -1.*unlabelled"),
        ((BANK, torch.full((30,), 2)), {}, "label 2; expected two classes"),
        ((BANK, LABELS), {"temperature": 0.0}, "temperature=0"),
        ((BANK, LABELS), {"top": 0}, "top=0"),
    ],
)
def test_wrong_input_is_one_clear_error(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        knn_accuracy(*arguments, **({"k": 5} | options))


@pytest.mark.gpu
def test_a_gpu_gives_what_a_cpu_gives():
    bank, labels = clusters(3000, 20, 32, seed=0, spread=1.5)
    queries, truth = clusters(700, 20, 32, seed=1, spread=1.5)
    expected = knn_accuracy(bank, labels, queries, truth)
    for where in (bank, bank.cuda()):  # in parts from the host, or there already
        found = knn_accuracy(where, labels, queries, truth, device="cuda")
        assert found == pytest.approx(expected, abs=2 / 700)
    cosines, numbers = nearest_neighbours(bank, k=50, device="cuda")
    assert cosines.is_cuda and numbers.is_cuda
    torch.testing.assert_close(cosines.cpu(), nearest_neighbours(bank, k=50)[0])


@pytest.mark.slow
def test_the_memory_needed_does_not_grow_with_bank_times_queries():
    import resource

    bank = torch.randn(300_000, 64)
    labels = torch.arange(300_000) % 1000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    knn_accuracy(bank, labels, bank[:4096], labels[:4096])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 600 * 1024  # KiB; all similarities would be 4.7 GiB
