"""On what device, and in what portions, images go through a network."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from byol_pytorch.evaluation.features import extract_features, shard


@dataclass(frozen=True)
class Machine:
    """Where and how fast a program computes. But for rounding, no result depends on it."""

    device: torch.device
    dtype: torch.dtype  # of a forward pass: float32, or what autocast takes
    batch_size: int  # images of a forward pass
    workers: int  # processes that decode

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)

    def loader(self, images: Dataset[Any], batch_size: int | None = 1, **options: Any) -> Any:
        """A DataLoader with this machine's workers."""
        return DataLoader(
            images,
            batch_size,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            **options,
        )

    def share_loader(self, images: Dataset[Any]) -> DataLoader[Any]:
        """Batches of this process's share of the images, none of them twice."""
        return self.loader(shard(images), self.batch_size, persistent_workers=self.workers > 0)

    def features(self, net: nn.Module, images: Dataset[Any], **options: Any) -> tuple[Any, Tensor]:
        """The features and labels of all images, worked out by all processes together."""
        found, labels = extract_features(
            net, self.share_loader(images), device=self.device, dtype=self.dtype, progress=True,
            **options,
        )  # fmt: skip
        assert labels is not None
        return found, labels
