"""Frozen features of a whole data set in one pass: the representation, and maps of the stages.

Loaders, images and labels are the caller's. What is read of one batch is in stages.py, how rows are
kept and gathered in rows.py.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from torch.utils.data.distributed import DistributedSampler
from tqdm import tqdm

from byol_pytorch.backbone import evaluating
from byol_pytorch.evaluation.rows import Rows, agree, joined
from byol_pytorch.evaluation.stages import (
    POOLED,
    FeatureReader,
    Model,
    resnet_stages,
    stage_pool,
)
from byol_pytorch.inputs import map_tensors, tensors
from byol_pytorch.parallel import process, unreplicated

__all__ = ["FeatureReader", "extract_features", "resnet_stages", "shard", "stage_pool"]

_FLUSH = 2**26  # bytes of features that wait on the device, so that not every batch synchronises


@overload
def extract_features(
    model: Model, loader: Iterable[Any], *, stages: None = None,
    device: torch.device | str | None = None, dtype: torch.dtype = torch.float32,
    memmap: str | Path | None = None, progress: bool = False,
) -> tuple[Tensor, Tensor | None]: ...  # fmt: skip
@overload
def extract_features(
    model: Model, loader: Iterable[Any], *,
    stages: Mapping[str, str], device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32, memmap: str | Path | None = None, progress: bool = False,
) -> tuple[dict[str, Tensor], Tensor | None]: ...  # fmt: skip
@torch.no_grad()
def extract_features(
    model: Model, loader: Iterable[Any], *, stages: Mapping[str, str] | None = None,
    device: torch.device | str | None = None, dtype: torch.dtype = torch.float32,
    memmap: str | Path | None = None, progress: bool = False,
) -> tuple[Tensor | dict[str, Tensor], Tensor | None]:  # fmt: skip
    """The features of all images of `loader`, in its order, and their labels.

    Args:
        model: a BYOL learner, which scales and normalises as in training; any other network, of
            which it is what BYOL(net, hidden_layer="auto") would train, found on the first batch,
            whose images must be as the network should see them; or a callable that gives (B, D).
            Networks run in evaluation mode, and every module is in its own mode afterwards.
        loader: gives (images, labels), or images alone. Labels are integers (B,) or one column a
            class (B, C).
        stages: layers to read as well: a mapping from the names that their features shall have to
            dotted names in the network (the learner's `net`), such as resnet_stages(net).
        device: where the images go; None: where the network is.
        dtype: of the forward pass: float32, or bfloat16 or float16 by autocast.
        memmap: a folder that only this call writes to, for features that memory is too small for.
            They are written to NAME.npy there and come back as tensors on these files. A file has
            its name once it is whole. Several processes write the same files, on a shared disk.
        progress: show a bar.

    Returns:
        (features, labels): float32 (N, D) on the CPU, or with `stages` a dict of them: "pooled",
        the representation, and each stage as stage_pool makes it; labels (N,) int64 or (N, C) as
        the loader gave them, on the CPU, None where it gave none.

    Under torch.distributed every process calls this, with a loader over shard(dataset), and gets
    the features of all images, each once and in the data set's order.

    Raises:
        ValueError for a loader that gives nothing, for labels that do not go with the images, for
        features with NaN, and for a network whose representation or stages cannot be found.
    """
    model = unreplicated(model)
    where = _device(model, device)
    _check(loader, dtype)
    show = progress and process()[0] == 0
    rows = {name: Rows(name, memmap) for name in (POOLED, *(stages or {}))}
    reader: FeatureReader | None = None
    labels: list[Tensor] = []
    count = 0
    modes: AbstractContextManager[None] = nullcontext()
    if isinstance(model, nn.Module):
        modes = evaluating(model)
    with modes:
        for batch in tqdm(loader, "features", unit=" batches", disable=not show):
            images, truth = _split(batch)
            if where is not None:
                images = map_tensors(lambda x: x.to(where, non_blocking=True), images)
            reader = reader or FeatureReader(model, images, stages)
            kind = tensors(images)[0].device.type
            with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
                found = reader(images)
            by_name = found if isinstance(found, dict) else {POOLED: found}
            labels += _labels(truth, len(by_name[POOLED]), count, bool(labels))
            count += len(by_name[POOLED])
            for name, x in by_name.items():
                rows[name].waiting.append(x.float())
            if sum(x.nbytes for each in rows.values() for x in each.waiting) > _FLUSH:
                for each in rows.values():
                    each.flush()
    for each in rows.values():
        each.flush()
    counts = agree(count, next((each.wrong for each in rows.values() if each.wrong), ""))
    features = {name: each.finish(counts) for name, each in rows.items()}
    known = joined(labels, counts) if labels else None
    return (features[POOLED] if stages is None else features), known


def shard(dataset: Dataset[Any]) -> Dataset[Any]:
    """This process's part of a data set: of n processes each takes every n-th sample.

    DistributedSampler repeats samples to make all parts equal, which would count them twice. In a
    single process it is the data set itself.
    """
    rank, world = process()
    size = len(dataset)  # type: ignore[arg-type]
    return dataset if world == 1 else Subset(dataset, range(rank, size, world))


# Batches ----------------------------------------------------------------------------------------


def _device(model: Any, device: torch.device | str | None) -> torch.device | None:
    """Where images go; None: they stay where they are."""
    own = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if own is None:
        return None if device is None else torch.device(device)
    if device is not None and own.device.type != torch.device(device).type:
        raise ValueError(
            f"device is {device} and the network on {own.device}; expected the same. Move it: "
            f"net.to({str(device)!r})."
        )
    return own.device


def _check(loader: Iterable[Any], dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"dtype={dtype}; expected torch.float32, bfloat16 or float16. Cast what comes back for "
            "others: features.double()."
        )
    if process()[1] > 1 and isinstance(getattr(loader, "sampler", None), DistributedSampler):
        raise ValueError(
            "The loader has a DistributedSampler, which repeats some samples; expected each once. "
            "Give DataLoader(shard(dataset), ...), of byol_pytorch.evaluation.features."
        )


def _split(batch: Any) -> tuple[Any, Any]:
    """The images and the labels of a batch; None where it has no labels."""
    if not isinstance(batch, (tuple, list)):
        return batch, None
    if len(batch) not in (1, 2):
        raise ValueError(
            f"The loader gives {len(batch)} things at once; expected (images, labels), or images. "
            "Leave the rest out by its collate_fn."
        )
    return batch[0], batch[1] if len(batch) == 2 else None


def _labels(truth: Any, count: int, start: int, before: bool) -> list[Tensor]:
    """The labels of one batch; `before` says whether the batches before it had some."""
    if start and before != (truth is not None):
        raise ValueError(
            f"The loader gives labels with some batches only: the one from sample {start} on is "
            "the first to differ. Expected labels with all, or with none."
        )
    if truth is None:
        return []
    labels = torch.as_tensor(truth, device="cpu")
    if len(labels) != count or labels.ndim not in (1, 2):
        raise ValueError(
            f"The batch from sample {start} on has labels {tuple(labels.shape)} and {count} "
            "features; expected one label, or one row, for each. Look at the data set's "
            "__getitem__, or the loader's collate_fn."
        )
    return [labels.long() if labels.ndim == 1 and not labels.is_floating_point() else labels]
