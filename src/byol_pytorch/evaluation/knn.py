"""The classes for which the nearest neighbours of frozen features vote.

The protocol is InstDisc's (arXiv 1805.01978, section 3.4), as MMSelfSup runs it: the k nearest rows
of a labelled bank vote for their class with weight exp(cosine / temperature). The search is in
neighbours.py.
"""

from collections.abc import Iterable, Sequence
from typing import overload

import torch
from torch import Tensor

from byol_pytorch.arguments import is_count, is_number
from byol_pytorch.evaluation.neighbours import Device, check_features, check_k, search

K = (10, 20, 100, 200)  # MMSelfSup's kNN benchmark
TEMPERATURE = 0.07  # arXiv 1805.01978, section 3.4

_ROWS = 1024  # queries whose votes are counted at once
_ONE_VOTE = 2.0**40  # the nearest one's; votes are integers, whose sum has no order


@overload
def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor | None = None,
    query_labels: Tensor | None = None, *, k: Sequence[int] = K,
    temperature: float = TEMPERATURE, top: int = 1, device: Device = None,
) -> dict[int, float]: ...  # fmt: skip
@overload
def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor | None = None,
    query_labels: Tensor | None = None, *, k: int,
    temperature: float = TEMPERATURE, top: int = 1, device: Device = None,
) -> float: ...  # fmt: skip
@torch.no_grad()
def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor | None = None,
    query_labels: Tensor | None = None, *, k: int | Sequence[int] = K,
    temperature: float = TEMPERATURE, top: int = 1, device: Device = None,
) -> float | dict[int, float]:  # fmt: skip
    """The part of the queries whose label is among the `top` classes of the vote, in [0, 1].

    Arguments are those of knn_predict; `query_labels` (Nq,) are integers. Gives a float for one k,
    else a dict with a float for each k. A query whose class the bank lacks counts as wrong.

    Raises:
        ValueError as knn_predict, and where the whole bank is of one class: the accuracy would be
        right for every query of that class and say nothing.
    """
    if (queries is None) != (query_labels is None):
        raise ValueError(
            "queries and query_labels come together; expected both, or neither to leave each "
            "sample of the bank out in turn."
        )
    ks = _checked(bank, bank_labels, queries, k, temperature, top)
    truth = bank_labels
    if queries is not None and query_labels is not None:
        truth = query_labels
        _check_labels(query_labels, queries, "query_labels", "queries")
    if bool((bank_labels == bank_labels[0]).all()):
        raise ValueError(
            f"All {len(bank)} samples of the bank have label {int(bank_labels[0])}; expected two "
            "classes or more, for an accuracy over one says nothing. Look at how labels are read."
        )
    ranked = _vote(bank, bank_labels, queries, ks, temperature, top, device)
    found = {
        each: int((classes == truth.to(classes)[:, None]).any(1).sum()) / len(truth)
        for each, classes in ranked.items()
    }
    return found if isinstance(k, Iterable) else found[k]


@overload
def knn_predict(
    bank: Tensor, bank_labels: Tensor, queries: Tensor | None = None, *, k: Sequence[int] = K,
    temperature: float = TEMPERATURE, top: int = 1, device: Device = None,
) -> dict[int, Tensor]: ...  # fmt: skip
@overload
def knn_predict(
    bank: Tensor, bank_labels: Tensor, queries: Tensor | None = None, *, k: int,
    temperature: float = TEMPERATURE, top: int = 1, device: Device = None,
) -> Tensor: ...  # fmt: skip
@torch.no_grad()
def knn_predict(
    bank: Tensor, bank_labels: Tensor, queries: Tensor | None = None, *,
    k: int | Sequence[int] = K, temperature: float = TEMPERATURE, top: int = 1,
    device: Device = None,
) -> Tensor | dict[int, Tensor]:  # fmt: skip
    """The classes for which the k nearest of the bank vote, weighted exp(cosine / temperature).

    Args:
        bank, bank_labels: (N, D) features of any float dtype and length, and (N,) integers of at
            least 0. The bank may be larger than the device's memory, or lie in a file: it is read
            in parts.
        queries: (Nq, D). None: the neighbours of each row of the bank among all the others.
        k: the number of neighbours that vote. Several cost little more than the largest one.
        top: the number of classes to return.
        device: where to work, in float32; None: where the bank is.

    Returns:
        (Nq, top) int64 on that device for one k, else a dict with as much for each k. The class
        with the most votes comes first; -1 stands where fewer classes have a vote. The smaller
        class wins equal votes, and of equal cosines the first row of the bank is nearer.

    Raises:
        ValueError for features or labels that do not go together, for NaN, and for a k that the
        bank is too small for.
    """
    ks = _checked(bank, bank_labels, queries, k, temperature, top)
    ranked = _vote(bank, bank_labels, queries, ks, temperature, top, device)
    return ranked if isinstance(k, Iterable) else ranked[k]


# The vote ---------------------------------------------------------------------------------------


def _vote(
    bank: Tensor, bank_labels: Tensor, queries: Tensor | None, ks: tuple[int, ...],
    temperature: float, top: int, device: Device,
) -> dict[int, Tensor]:  # fmt: skip
    """The classes (Nq, top) for each of `ks`, in their order."""
    cosines, numbers = search(bank, queries, max(ks), device)
    names, labels = bank_labels.to(cosines.device, torch.int64).unique(return_inverse=True)
    names = torch.cat((names, names.new_tensor([-1])))
    ranked: dict[int, list[Tensor]] = {k: [] for k in ks}
    for cosine, number in zip(cosines.split(_ROWS), numbers.split(_ROWS), strict=True):
        weights = ((cosine - cosine[:, :1]) / temperature).exp()
        weights = (weights * _ONE_VOTE).long().clamp_(min=1)
        voted = labels[number]
        votes = weights.new_zeros(len(number), len(names))
        counted = 0
        for k in sorted(set(ks)):
            votes.scatter_add_(1, voted[:, counted:k], weights[:, counted:k])
            ranked[k].append(_ranked(votes, names, top))
            counted = k
    return {k: torch.cat(ranked[k]) for k in ks}


def _ranked(votes: Tensor, names: Tensor, top: int) -> Tensor:
    """The classes (B, top) with the most votes; the last of `names` where no votes are left."""
    left, found = votes.clone(), []
    for _ in range(top):
        most, best = left.max(dim=1)  # max keeps the first of ties
        found.append(torch.where(most > 0, best, len(names) - 1))
        left.scatter_(1, best[:, None], 0)
    return names[torch.stack(found, dim=1)]


# Checks -----------------------------------------------------------------------------------------


def _checked(
    bank: Tensor, bank_labels: Tensor, queries: Tensor | None, k: int | Sequence[int],
    temperature: float, top: int,
) -> tuple[int, ...]:  # fmt: skip
    """The numbers of neighbours as a tuple; raises for arguments of knn_predict that are wrong."""
    ks = tuple(k) if isinstance(k, Iterable) and not isinstance(k, str) else (k,)
    if not ks or not all(map(is_count, ks)):
        raise ValueError(
            f"k={k!r}; expected a number of neighbours of at least 1, or several. Give k=20, or "
            f"k={K}."
        )
    if not is_number(temperature) or not temperature > 0 or not is_count(top):
        raise ValueError(
            f"temperature={temperature!r} and top={top!r}; expected a temperature above 0, such as "
            f"{TEMPERATURE}, and at least 1 class. Leave both out for the protocol's."
        )
    check_features(bank, queries)
    for each in ks:
        check_k(each, bank, queries)
    _check_labels(bank_labels, bank, "bank_labels", "bank")
    return ks


def _check_labels(labels: Tensor, rows: Tensor, name: str, of: str) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"{name} is a {type(labels).__name__}; expected a tensor of integers (N,). Give "
            f"torch.as_tensor({name})."
        )
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"{name} is {tuple(labels.shape)} {labels.dtype}; expected one integer a sample, (N,). "
            "Several labels a sample are for svm_map."
        )
    if len(labels) != len(rows):
        raise ValueError(
            f"{name} holds {len(labels)} labels and {of} {len(rows)} samples; expected as many. "
            "Give those that extract_features returned together."
        )
    if int(labels.min()) < 0:
        number = int((labels < 0).int().argmax())
        raise ValueError(
            f"{name} holds {int(labels[number])}, first of sample {number}; expected labels of at "
            "least 0. Leave unlabelled samples out: keep = labels >= 0."
        )
