"""DeepMind's ResNet, v1, in numpy alone: NHWC, HWIO, SAME, moving averages, mean pool.

After google-deepmind/deepmind-research, byol/utils/networks.py, and google-deepmind/dm-haiku,
haiku/_src/nets/resnet.py, batch_norm.py and moving_averages.py.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

Arrays = dict[str, dict[str, Any]]
EPS = 1e-5  # byol/configs/byol.py
# Bottlenecks or not, blocks and channels of each group, and whether the group has a projection
BOTTLENECK = (True, (2, 1, 1, 1), (16, 32, 32, 32), (True, True, True, True))
BASIC = (False, (1, 2, 1, 1), (64, 128, 256, 512), (False, True, True, True))


class NumpyResNet:
    """Random weights under Haiku's names, `params` and `state`, and the network that they make."""

    def __init__(self, bottleneck: bool, blocks: Any, channels: Any, projects: Any) -> None:
        self.bottleneck, self.blocks, self.projects = bottleneck, blocks, projects
        self.rng = np.random.default_rng(0)
        self.params: Arrays = {}
        self.state: Arrays = {}
        self.add("initial", 7, 3, 64, conv="initial_conv", bn="initial_batchnorm")
        width = 64
        for group, (count, out) in enumerate(zip(blocks, channels, strict=True)):
            for block in range(count):
                at = f"block_group_{group}/~/block_{block}/~/"
                if block == 0 and projects[group]:
                    self.add(at, 1, width, out, conv="shortcut_conv", bn="shortcut_batchnorm")
                inner = out // 4 if bottleneck else out
                sizes = [(1, width, inner), (3, inner, inner), (1, inner, out)]
                sizes = sizes if bottleneck else [(3, width, out), (3, out, out)]
                for i, (kernel, before, after) in enumerate(sizes):
                    self.add(at, kernel, before, after, conv=f"conv_{i}", bn=f"batchnorm_{i}")
                width = out

    def add(self, at: str, kernel: int, before: int, after: int, conv: str, bn: str) -> None:
        def draw(*shape: int, low: float, high: float) -> np.ndarray:
            return self.rng.uniform(low, high, shape).astype(np.float32)

        at = "res_net50/~/" + ("" if at == "initial" else at)
        bound = (6 / (kernel * kernel * before)) ** 0.5
        self.params[at + conv] = {"w": draw(kernel, kernel, before, after, low=-bound, high=bound)}
        shape = (1, 1, 1, after)
        self.params[at + bn] = {"scale": draw(*shape, low=0.5, high=1.5),
                                "offset": draw(*shape, low=-0.5, high=0.5)}  # fmt: skip
        for kind, low, high in (("mean", -0.5, 0.5), ("var", 0.5, 1.5)):
            self.state[f"{at}{bn}/~/{kind}_ema"] = {
                "average": draw(*shape, low=low, high=high),
                "hidden": draw(*shape, low=8, high=9),  # before zero-debiasing: not to be used
                "counter": np.array(77, np.int32),
            }

    def conv(self, x: np.ndarray, at: str, stride: int = 1) -> np.ndarray:
        w = self.params[f"res_net50/~/{at}"]["w"]
        return sum(part @ w[i, j] for i, j, part in windows(x, w.shape[0], stride, 0.0))

    def bn(self, x: np.ndarray, at: str) -> np.ndarray:
        own = self.params[f"res_net50/~/{at}"]
        mean, var = (self.state[f"res_net50/~/{at}/~/{k}_ema"]["average"] for k in ("mean", "var"))
        return (x - mean) * own["scale"] / np.sqrt(var + EPS) + own["offset"]

    def block(self, x: np.ndarray, at: str, stride: int, project: bool) -> np.ndarray:
        shortcut, out = x, x
        if project:
            shortcut = self.bn(
                self.conv(x, at + "shortcut_conv", stride), at + "shortcut_batchnorm"
            )
        strided = 1 if self.bottleneck else 0
        for i in range(3 if self.bottleneck else 2):
            out = self.conv(np.maximum(out, 0) if i else out, f"{at}conv_{i}",
                            stride if i == strided else 1)  # fmt: skip
            out = self.bn(out, f"{at}batchnorm_{i}")
        return np.maximum(out + shortcut, 0)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        x = np.maximum(self.bn(self.conv(x, "initial_conv", 2), "initial_batchnorm"), 0)
        x = np.maximum.reduce([part for _, _, part in windows(x, 3, 2, -np.inf)])
        for group, count in enumerate(self.blocks):
            for i in range(count):
                stride = 2 if group and i == 0 else 1
                at = f"block_group_{group}/~/block_{i}/~/"
                x = self.block(x, at, stride, i == 0 and self.projects[group])
        return x.mean(axis=(1, 2))


def windows(
    x: np.ndarray, kernel: int, stride: int, fill: float
) -> Iterator[tuple[int, int, np.ndarray]]:
    """What each position of a kernel sees: TensorFlow's SAME has ceil(size / stride) outputs."""
    pads, counts = [(0, 0)], []
    for size in x.shape[1:3]:
        count = -(-size // stride)
        total = max((count - 1) * stride + kernel - size, 0)
        pads.append((total // 2, total - total // 2))
        counts.append(count)
    x = np.pad(x, [*pads, (0, 0)], constant_values=fill)
    for i in range(kernel):
        for j in range(kernel):
            rows = slice(i, i + (counts[0] - 1) * stride + 1, stride)
            yield i, j, x[:, rows, slice(j, j + (counts[1] - 1) * stride + 1, stride)]
