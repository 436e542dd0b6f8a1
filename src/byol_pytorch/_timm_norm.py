"""timm's batch norm with an activation, over all processes. Apart, for timm is slow to import."""

from timm.layers import BatchNormAct2d
from torch import Tensor

from byol_pytorch.heads import Synchronised


class SyncBatchNormAct2d(Synchronised, BatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)  # timm's own, activation and all, where nothing is synchronised
        return self.act(self.drop(y)) if self.synchronises() else y
