"""The nearest neighbours of features by cosine: exact, in float32, in parts that fit the device."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from byol_pytorch.arguments import is_count

Device = torch.device | str | None

# Rows of the bank and of the queries that are on the device at once: 512 MiB at 2048 values, and
# 64 MiB of similarities.
_BANK_ROWS, _QUERY_ROWS = 65536, 256
_IN_CACHE = 2**18  # values of the bank that one core of a CPU keeps at hand: 1 MiB


@torch.no_grad()
def nearest_neighbours(
    bank: Tensor, queries: Tensor | None = None, *, k: int, device: Device = None
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of the bank for each query: their cosines and their numbers, both (Nq, k).

    Cosines are float32, numbers int64. The nearest comes first, and of equal cosines the first row.

    Args:
        bank: (N, D) features of any float dtype and length. It may be larger than the device's
            memory, or lie in a file: it is read in parts.
        queries: (Nq, D). None: the neighbours of each row of the bank among all the others.
        k: 1 to N, to N - 1 without queries.
        device: where to work; None: where the bank is.

    Raises ValueError for features that do not go together or hold NaN, and for a k out of range.
    """
    check_features(bank, queries)
    check_k(k, bank, queries)
    return search(bank, queries, k, device)


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """Full float32 in products, whatever torch.set_float32_matmul_precision says outside."""
    backends: Any = torch.backends
    places = (backends.cuda.matmul, backends.mkldnn.matmul)
    each = [place.fp32_precision for place in places]
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set for one of the places alone
        overall = "highest"
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(overall)
        for place, precision in zip(places, each, strict=True):
            place.fp32_precision = precision


@_full_float32()
def search(
    bank: Tensor, queries: Tensor | None, k: int, device: Device = None
) -> tuple[Tensor, Tensor]:
    """What nearest_neighbours gives, without its checks."""
    where = bank.device if device is None else torch.device(device)
    asked = bank if queries is None else queries
    most = min(len(bank), _BANK_ROWS)
    size = max(1, math.isqrt(most // k))
    room = torch.empty((most + size) * _QUERY_ROWS, device=where, dtype=torch.float32)
    step = max(1, torch.get_num_threads() * _IN_CACHE // bank.shape[1])
    step = step if where.type == "cpu" else most
    nearest: list[Tensor] = []
    for first, chunk in _unit_rows(bank, _BANK_ROWS, where):
        n = len(chunk)
        for start, rows in _unit_rows(asked, _QUERY_ROWS, where):
            similarity = room[: (n + -n % size) * len(rows)].view(-1, len(rows))
            for some, out in zip(chunk.split(step), similarity[:n].split(step), strict=True):
                torch.mm(some, rows.T, out=out)
            similarity[n:] = -torch.inf
            if queries is None and -n < first - start < len(rows):
                # No row is a neighbour of its own.
                similarity[:n].diagonal(first - start).fill_(-torch.inf)
            best = _best(similarity, size, min(k, n), first)
            if first:
                number = start // _QUERY_ROWS
                both = torch.cat((nearest[number], best), dim=1)
                nearest[number] = both.topk(min(k, both.shape[1])).values
            else:
                nearest.append(best)
    return _decoded(torch.cat(nearest))


def _best(similarity: Tensor, size: int, k: int, first: int) -> Tensor:
    """The keys (B, k) of the k largest values of each column, sorted; rows count from `first`.

    Two small searches are exact: the k best lie in the k blocks of `size` rows that have the
    largest maxima, the first blocks where maxima are equal.
    """
    blocks = len(similarity) // size
    maxima = similarity.view(blocks, size, -1).amax(1).T
    numbers = torch.arange(blocks, device=similarity.device)
    keys = _keys(maxima, numbers).topk(min(k, blocks), sorted=False).values
    within = torch.arange(size, device=similarity.device)
    rows = (_decoded(keys)[1][:, :, None] * size + within).flatten(1)
    return _keys(similarity.T.gather(1, rows), rows + first).topk(k).values


def _keys(similarity: Tensor, numbers: Tensor) -> Tensor:
    """int64 keys in the order of the float32 similarities; of equal ones the first has the larger.

    The bits of floats order as those of integers once the bits of negative ones are flipped.
    """
    bits = (similarity + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    return bits.long().bitwise_left_shift_(32).sub_(numbers).add_(0xFFFFFFFF)


def _decoded(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The similarity and the row number that each key was made of."""
    bits = (keys >> 32).int()
    similarity = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return similarity, 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def _unit_rows(rows: Tensor, size: int, where: torch.device) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(rows), size):
        part = rows[start : start + size].to(where, torch.float32)
        yield start, F.normalize(part)


def check_k(k: int, bank: Tensor, queries: Tensor | None) -> None:
    most = len(bank) - (queries is None)
    if not is_count(k) or k > most:
        others = "" if queries is not None else ", of which a sample has itself as no neighbour"
        raise ValueError(
            f"k={k!r}; expected 1 to {most}, for the bank holds {len(bank)} samples{others}. Leave "
            "out the larger k."
        )


def check_features(bank: Tensor, queries: Tensor | None) -> None:
    named = {"bank": bank} if queries is None else {"bank": bank, "queries": queries}
    for name, rows in named.items():
        if not isinstance(rows, Tensor):
            raise TypeError(
                f"{name} is a {type(rows).__name__}; expected a float tensor (N, D). Give "
                f"torch.as_tensor({name})."
            )
        if rows.ndim != 2 or not rows.is_floating_point():
            raise ValueError(
                f"{name} is {tuple(rows.shape)} {rows.dtype}; expected float features (N, D). "
                "Pool or flatten maps, and scale integers to floats."
            )
        if not len(rows) or rows.shape[1] != bank.shape[1]:
            raise ValueError(
                f"{name} is {tuple(rows.shape)} and bank {tuple(bank.shape)}; expected at least "
                "one sample each, and as many values a sample in both. Extract them with one "
                "network."
            )
        for start, part in enumerate(rows.split(_BANK_ROWS)):
            # A norm is not finite where one of its values is not.
            bad = ~torch.linalg.vector_norm(part.float(), dim=1).isfinite()
            if bool(bad.any()):
                number = start * _BANK_ROWS + int(bad.int().argmax())
                raise ValueError(
                    f"{name} holds NaN or infinite values, first in sample {number}; expected "
                    "finite features. Leave the sample out, or extract in float32."
                )
