"""Linear classifiers on a frozen backbone: every stage and learning rate at once, by protocol.

On stored features: `linear_probe`. On new crops in each epoch, as the published protocols do it:

    heads = LinearHeads(backbone(images), 1000, PAPER)   # backbone: to (B, D), or a dict of stages
    for epoch in range(PAPER.epochs):
        train_epoch(heads, backbone, loader, epoch)      # loader: (images, labels), augmented
    top1, top5 = accuracy(heads, backbone, test_loader)
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

from byol_pytorch.arguments import is_count, is_number
from byol_pytorch.backbone import evaluating
from byol_pytorch.evaluation.protocols import PAPER, Protocol
from byol_pytorch.evaluation.stages import POOLED, Features
from byol_pytorch.heads import BatchNorm
from byol_pytorch.parallel import world_size

Extract = Callable[[Tensor], Features]  # images to (B, D) or (B, C, ...), or several such by stage
INITIAL_STD = 0.01  # of the weights, biases start at 0: MMSelfSup's heads, as MoCo's and SimSiam's


@dataclass(frozen=True)
class Probe:
    """What trained heads of S stages and L learning rates reach; accuracies are float64 (S, L)."""

    stages: tuple[str, ...]
    lrs: tuple[float, ...]
    top1: Tensor  # on the test images
    top5: Tensor
    held_out: Tensor | None  # top-1 on held-out training images
    heads: "LinearHeads"

    @property
    def chosen(self) -> dict[str, int] | None:
        """The number of each stage's learning rate that was best on the held-out images.

        None where several rates were tried and nothing was held out: test images never choose.
        """
        if self.held_out is not None:
            return dict(zip(self.stages, self.held_out.argmax(1).tolist(), strict=True))
        return dict.fromkeys(self.stages, 0) if len(self.lrs) == 1 else None


def linear_probe(
    train_features: Features, train_labels: Tensor, test_features: Features, test_labels: Tensor, *,
    protocol: Protocol = PAPER, num_classes: int | None = None, held_out: float = 0.0,
    seed: int = 0, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> Probe:  # fmt: skip
    """Train heads on features that were extracted once, and test them.

    The sizes of batches differ by one image at most and are no larger than `protocol.batch_size`;
    with fewer training images than that, the learning rates are scaled to what there is. Processes
    do not communicate.

    Args:
        train_features: (N, D), (N, C, ...), or a dict of such by stage; they may lie in files.
        train_labels: (N,) integers in [0, num_classes).
        num_classes: None: the largest training label plus 1.
        held_out: this part of each class of the training images is not trained on. It chooses the
            learning rate (`Probe.chosen`); the test images never do.
        device: where the heads are trained; None: where the features are.

    Raises ValueError for lengths, widths or stages that do not go together, for labels out of
    range or in the test images alone, for a single class, and for features that are not finite.
    """
    if not is_number(held_out) or not 0 <= held_out < 1:
        raise ValueError(
            f"held_out={held_out!r}; expected the part of the training images that chooses the "
            "learning rate, in [0, 1). Give held_out=0.1, or 0 for none."
        )
    train, test = _by_stage(train_features), _by_stage(test_features)
    labels, test_labels = (torch.as_tensor(x, device="cpu") for x in (train_labels, test_labels))
    num_classes = _check(train, labels, test, test_labels, num_classes)
    kept = left = torch.arange(len(labels), device="cpu")
    if held_out:
        numbers, truth = kept.numpy(), labels.numpy()
        split = train_test_split(numbers, test_size=held_out, stratify=truth, random_state=seed)
        kept, left = map(torch.from_numpy, split)
    protocol = replace(protocol, batch_size=min(protocol.batch_size, len(kept)))
    example = {name: x[:1].to(device or x.device) for name, x in train.items()}
    heads = LinearHeads(example, num_classes, protocol, distributed=False, seed=seed, dtype=dtype)

    def rows(features: dict[str, Tensor]) -> Extract:
        return lambda i: {k: x[i.to(x.device)].to(heads.device) for k, x in features.items()}

    def batches(order: Tensor, truth: Tensor) -> list[tuple[Tensor, Tensor]]:
        parts = order.tensor_split(math.ceil(len(order) / protocol.batch_size))
        return [(numbers, truth[numbers]) for numbers in parts]

    generator = torch.Generator("cpu").manual_seed(seed)
    for epoch in tqdm(range(protocol.epochs), "linear heads", disable=not progress):
        order = kept[torch.randperm(len(kept), generator=generator, device="cpu")]
        train_epoch(heads, rows(train), batches(order, labels), epoch)
    top1, top5 = accuracy(
        heads, rows(test), batches(torch.arange(len(test_labels), device="cpu"), test_labels)
    )
    chooses = accuracy(heads, rows(train), batches(left, labels))[0] if held_out else None
    return Probe(heads.stages, protocol.lrs, top1, top5, chooses, heads)


def train_epoch(heads: "LinearHeads", extract: Extract, batches: Any, epoch: int) -> Tensor:
    """Train for epoch number 0, 1, ... on `batches` (images, labels); the mean losses (S, L).

    `batches` have a length. `extract` runs without gradients, a module in evaluation mode. Several
    processes each give images of their own, in equally many batches. Raises ValueError for labels
    out of range.
    """
    total = heads.weights[0].new_zeros(len(heads.stages), len(heads.protocol.lrs))
    for number, (images, labels) in enumerate(batches):
        if labels.device.type == "cpu":  # elsewhere it would wait for the device
            _check_range(labels, heads.num_classes)
        factor = heads.protocol.factor(epoch + number / len(batches))
        labels = labels.to(total.device, non_blocking=True)
        total += heads.step(heads.features(extract, images), labels, factor)
    total /= len(batches) * (world_size() if heads.distributed else 1)
    heads.add_up(total)
    return total


@torch.no_grad()
def accuracy(
    heads: "LinearHeads", extract: Extract, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Top-1 and top-5 over the images of all processes: (S, L) float64 in [0, 1] on the CPU."""
    shape = (2, len(heads.stages), len(heads.protocol.lrs))
    right = torch.zeros(shape, dtype=torch.float64, device=heads.device)
    count = right.new_zeros(())
    heads.eval()
    for images, labels in batches:
        logits = torch.stack(heads(heads.features(extract, images)))
        first = logits.topk(min(5, heads.num_classes)).indices
        hits = first == labels.to(first.device, non_blocking=True).view(-1, 1, 1)
        right += torch.stack([hits[..., 0], hits.any(-1)]).sum(2)
        count += len(labels)
    heads.add_up(right, count)
    top1, top5 = (right / count).cpu()
    return top1, top5


class LinearHeads(nn.Module):
    """A linear classifier for each stage and learning rate, and how they are trained.

    The heads of a stage are one weight (L, C, D): one product trains all L learning rates, and none
    disturbs another, not even one that diverges. All start equal, by `seed`. The state_dict holds
    weights, momenta and statistics, so training goes on from it exactly.

    Args:
        example: features of an image or more, on the device, as `step` will get them.
        distributed: whether gradients, batch norm and accuracies span all processes.
        dtype: of the products; weights, statistics and losses are float32.

    Raises ValueError for an example that is not finite.
    """

    def __init__(
        self, example: Features, num_classes: int, protocol: Protocol, *,
        distributed: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        named, rates = _by_stage(example), len(protocol.lrs)
        _check_finite(named, "the backbone")
        self.stages, self.num_classes = tuple(named), num_classes
        self.protocol, self.dtype = protocol, dtype
        self.distributed = distributed and world_size() > 1
        generator = torch.Generator().manual_seed(seed)
        born: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
        starts = [torch.empty(num_classes, x[0].numel(), **born) for x in named.values()]
        starts = [x.normal_(0, INITIAL_STD, generator=generator) for x in starts]
        self.weights = nn.ParameterList(x.repeat(rates, 1, 1) for x in starts)
        self.biases = nn.ParameterList(torch.zeros(rates, num_classes, **born) for _ in starts)
        zeros = [torch.zeros_like(x) for x in (*self.weights, *self.biases)]
        self.momenta = nn.ParameterList(zeros).requires_grad_(False)
        self.norms = nn.ModuleList()  # without parameters, so that one serves all learning rates
        for x in named.values() if protocol.batch_norm else ():
            self.norms.append(BatchNorm(x.shape[1], sync=self.distributed, affine=False))
        self.to(next(iter(named.values())).device)

    @property
    def device(self) -> torch.device:
        """Where the heads are."""
        return self.weights[0].device

    def features(self, extract: Extract, images: Tensor) -> Features:
        """What `extract` makes of images, without gradients and in evaluation mode."""
        net = extract if isinstance(extract, nn.Module) else nn.Identity()
        with torch.no_grad(), evaluating(net), self._autocast():
            return extract(images.to(self.device, non_blocking=True))

    def forward(self, features: Features) -> list[Tensor]:
        """Logits (B, L, C) float32 of each stage."""
        values = list(_by_stage(features).values())
        if self.norms:
            values = [_batch_normed(norm, x) for norm, x in zip(self.norms, values, strict=True)]
        with self._autocast():
            return [
                F.linear(x.flatten(1).to(w.dtype), w.flatten(0, 1), b.flatten())
                .float().unflatten(1, b.shape)
                for x, w, b in zip(values, self.weights, self.biases, strict=True)
            ]  # fmt: skip

    def step(self, features: Features, labels: Tensor, factor: float = 1.0) -> Tensor:
        """One optimizer step at `factor` times each learning rate; the mean losses (S, L)."""
        self.train()
        rates, trained = len(self.protocol.lrs), [*self.weights, *self.biases]
        targets = labels.repeat_interleave(rates)
        # Sums, divided after the backward pass: a large batch's means underflow in half precision.
        losses = torch.stack([
            F.cross_entropy(logits.flatten(0, 1), targets, reduction="none").view(-1, rates).sum(0)
            for logits in self(features)
        ])  # fmt: skip
        gradients = list(torch.autograd.grad(losses.sum(), trained))
        count = losses.new_full((), len(labels))
        self.add_up(*gradients, count)
        torch._foreach_div_(gradients, count)
        self._update(trained, gradients, factor)
        return losses.detach() / len(labels)

    @torch.no_grad()
    def _update(self, trained: list[Tensor], gradients: list[Tensor], factor: float) -> None:
        """A step of an optimizer with one parameter group for each learning rate."""
        # It is made anew each time, over slices of what this module holds: so the module can be
        # moved, copied and loaded as any other.
        groups: list[dict[str, Any]] = [
            {"params": [], "lr": lr * factor} for lr in self.protocol.lrs
        ]
        state: dict[Tensor, dict[str, Tensor]] = {}
        for whole in zip(trained, gradients, self.momenta, strict=True):
            for group, w, u, m in zip(groups, *(x.detach().unbind() for x in whole), strict=True):
                w.grad, state[w] = u, {"momentum_buffer": m}
                group["params"].append(w)
        optimizer = self.protocol.new_optimizer(groups)
        optimizer.state.update(state)
        optimizer.step()

    def classifier(self, stage: str, number: int = 0) -> nn.Linear:
        """The head of a stage and a learning rate, on flattened features; it holds the norm too."""
        at = self.stages.index(stage)
        weight, bias = (x[at][number].detach().clone() for x in (self.weights, self.biases))
        if self.norms:
            norm = cast(Any, self.norms[at])
            cells = weight.shape[1] // norm.num_features
            weight *= (norm.running_var + norm.eps).rsqrt().repeat_interleave(cells)
            bias -= weight @ norm.running_mean.repeat_interleave(cells)
        linear = nn.Linear(
            weight.shape[1], self.num_classes, device=weight.device, dtype=weight.dtype
        )
        linear.load_state_dict({"weight": weight, "bias": bias})
        return linear

    def add_up(self, *values: Tensor) -> None:
        """Sum each of `values` in place over the processes that train together."""
        for x in values if self.distributed else ():
            dist.all_reduce(x)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32)


def _batch_normed(norm: nn.Module, x: Tensor) -> Tensor:
    """Each channel over images and positions, as by MMSelfSup's BatchNorm2d."""
    x = x.flatten(2).transpose(1, 2) if x.ndim > 2 else x.unsqueeze(1)
    return norm(x.flatten(0, 1).float()).view(x.shape).transpose(1, 2)


def _by_stage(features: Features) -> dict[str, Tensor]:
    named = features if isinstance(features, Mapping) else {POOLED: features}
    # as_tensor moves tensors too, where `with torch.device(...)` says so.
    return {
        name: x if isinstance(x, Tensor) else torch.as_tensor(x, device="cpu")
        for name, x in named.items()
    }


def _check(train: Any, labels: Tensor, test: Any, test_labels: Tensor, count: int | None) -> int:
    """The number of classes; raises ValueError where training could not work."""
    for part, features, truth in (("train", train, labels), ("test", test, test_labels)):
        counts = {name: len(x) for name, x in features.items()}
        if not len(truth) or set(counts.values()) != {len(truth)}:
            raise ValueError(
                f"{part}: {len(truth)} labels of {counts} features; expected as many. Give those "
                "that extract_features returned together."
            )
        if truth.ndim != 1 or truth.is_floating_point():
            raise ValueError(
                f"{part} labels are {truth.dtype} {tuple(truth.shape)}; expected integers (N,), "
                "one class an image. Several labels an image are for svm_map."
            )
        _check_finite(features, part)
    shapes, others = ({name: tuple(x.shape[1:]) for name, x in f.items()} for f in (train, test))
    if shapes != others:
        raise ValueError(
            f"train has features {shapes}, test {others}; expected the same. Extract both with one "
            "network and the same stages."
        )
    if count is not None and not is_count(count):
        raise ValueError(
            f"num_classes={count!r}; expected an int of at least 1. Leave it out for the largest "
            "training label plus 1."
        )
    count = int(labels.max()) + 1 if count is None else count
    _check_range(labels, count)
    unseen = sorted(set(test_labels.tolist()) - set(labels.tolist()))
    if unseen:
        raise ValueError(
            f"no training image of classes {unseen[:5]}, which test has; expected each of its "
            "classes. Add some, or leave those test images out."
        )
    if len(labels.unique()) == 1:
        raise ValueError(
            f"all training labels are the same class, {int(labels[0])}; expected two classes or "
            "more. Look at how the labels are read."
        )
    return count


def _check_range(labels: Tensor, count: int) -> None:
    low, high = labels.min(), labels.max()
    if not 0 <= low <= high < count:
        raise ValueError(
            f"labels from {low} to {high}; expected integers in [0, {count}). Number the classes "
            "from 0, or give their number as num_classes."
        )


def _check_finite(features: Mapping[str, Tensor], where: str) -> None:
    for name, x in features.items():
        if not all(part.isfinite().all() for part in x.split(4096)):
            raise ValueError(
                f"values of the features {name!r} of {where} are not finite; expected finite ones. "
                "Look for a damaged checkpoint, or take the features in float32."
            )
