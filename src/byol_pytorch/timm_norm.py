"""timm's batch norm with an activation, over all processes. Apart, for timm is slow to import."""

from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from byol_pytorch.norms import Synchronised


class SyncBatchNormAct2d(Synchronised, BatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)  # timm's own, activation and all, where nothing is synchronised
        return self.act(self.drop(y)) if self.synchronises() else y


TIMM: dict[type[nn.Module], type[Synchronised]] = {BatchNormAct2d: SyncBatchNormAct2d}
