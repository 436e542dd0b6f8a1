"""Linear heads against separate ones under torch's optimizers, convex solvers, two processes."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from byol_pytorch.evaluation import linear
from byol_pytorch.evaluation.linear import LinearHeads, accuracy, linear_probe, train_epoch
from byol_pytorch.evaluation.protocols import (
    INATURALIST,
    MMSELFSUP_LINEAR,
    MULTI_HEAD,
    PAPER,
    PAPER_LRS,
    PLACES205,
    Protocol,
)
from byol_pytorch.optim import LARS

CLASSES, BATCH = 7, 16
FACTORS = (1.0, 0.8, 0.3, 0.3, 0.01)  # of the learning rate, step by step


def maps(seed: int, count: int = BATCH) -> tuple[dict[str, Tensor], Tensor]:
    """A flat stage and one of maps, and labels."""
    generator = torch.Generator().manual_seed(seed)
    features = {
        "flat": 2 + 3 * torch.randn(count, 10, generator=generator),
        "maps": 1 + torch.randn(count, 4, 3, 2, generator=generator),
    }
    return features, torch.randint(CLASSES, (count,), generator=generator)


def blobs(
    count: int = 120, width: int = 6, classes: int = 3, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Classes that overlap."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    return centres[labels] + torch.randn(count, width, generator=generator), labels


class Separate(nn.Module):
    """One head as a user would write it: MMSelfSup's norm on the map, then a Linear."""

    def __init__(self, shape: torch.Size, batch_norm: bool, weight: Tensor) -> None:
        super().__init__()
        self.norm: nn.Module = nn.Identity()
        if batch_norm:
            self.norm = (nn.BatchNorm1d if len(shape) == 1 else nn.BatchNorm2d)(
                shape[0], affine=False
            )
        self.linear = nn.Linear(math.prod(shape), CLASSES)
        with torch.no_grad():
            self.linear.weight.copy_(weight)
            self.linear.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x).flatten(1))


# Against separate heads -------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_every_step_is_that_of_a_separate_head_and_optimizer(
    optimizer: str, batch_norm: bool, weight_decay: float
) -> None:
    protocol = Protocol(
        1, 256, (0.01, 0.3, 2.0), optimizer=optimizer, weight_decay=weight_decay,
        batch_norm=batch_norm,
    )  # fmt: skip
    heads = LinearHeads(maps(0)[0], CLASSES, protocol)
    references = {}
    for stage, x in maps(0)[0].items():
        for number, lr in enumerate(protocol.base_lrs):
            head = Separate(x.shape[1:], batch_norm, heads.classifier(stage, number).weight)
            if batch_norm:  # what is folded at the start is 1 / sqrt(1 + eps)
                with torch.no_grad():
                    head.linear.weight.mul_(math.sqrt(1 + 1e-5))
            kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
                "sgd": lambda p, r: torch.optim.SGD(
                    p, r, momentum=0.9, weight_decay=weight_decay, nesterov=True
                ),
                "lars": lambda p, r: LARS(p, r, weight_decay=weight_decay),
            }
            references[stage, number] = head, kinds[optimizer](head.linear.parameters(), lr), lr
    for step, factor in enumerate(FACTORS):
        features, labels = maps(step + 1)
        losses = heads.step(features, labels, factor)
        for (stage, number), (head, opt, lr) in references.items():
            for group in opt.param_groups:
                group["lr"] = lr * factor
            loss = F.cross_entropy(head(features[stage]), labels)
            opt.zero_grad()
            loss.backward()
            opt.step()
            at = heads.stages.index(stage)
            torch.testing.assert_close(losses[at, number], loss.detach())
            torch.testing.assert_close(heads.weights[at][number], head.linear.weight)
            torch.testing.assert_close(heads.biases[at][number], head.linear.bias)
    features, _ = maps(100)
    heads.eval()
    logits = dict(zip(heads.stages, heads(features), strict=True))
    for (stage, number), (head, _, _) in references.items():
        expected = head.eval()(features[stage])
        torch.testing.assert_close(logits[stage][:, number], expected)
        alone = heads.classifier(stage, number)(features[stage].flatten(1))
        torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("base", [PAPER, MULTI_HEAD, MMSELFSUP_LINEAR])
def test_sixteen_rates_at_once_equal_sixteen_runs(base: Protocol) -> None:
    rates = tuple(float(r) for r in np.geomspace(1e-3, 10, 16))
    protocol = replace(base, epochs=3, batch_size=32, base_lrs=rates, milestones=())
    data = (*blobs(90), *blobs(45, seed=1))
    together = linear_probe(*data, protocol=protocol)
    assert together.top1.shape == (1, 16)
    for number, rate in enumerate(rates):
        alone = linear_probe(*data, protocol=replace(protocol, base_lrs=(rate,)))
        one, two = (p.heads.classifier("pooled", i) for p, i in ((together, number), (alone, 0)))
        torch.testing.assert_close(one.weight, two.weight, atol=1e-5, rtol=1e-4)
        assert together.top1[0, number] == alone.top1[0, 0]


def test_a_rate_that_diverges_disturbs_no_other() -> None:
    data = (*blobs(), *blobs(seed=1))
    protocol = replace(PAPER, epochs=3, batch_size=32)
    wild = linear_probe(*data, protocol=replace(protocol, base_lrs=(0.2, 1e39)))
    calm = linear_probe(*data, protocol=protocol)
    assert not wild.heads.weights[0][1].isfinite().all()
    torch.testing.assert_close(wild.heads.weights[0][0], calm.heads.weights[0][0])


def test_stages_do_not_disturb_each_other() -> None:
    protocol = replace(MULTI_HEAD, epochs=2, batch_size=8)
    train, test = maps(0, 40), maps(1, 20)
    train[1][:CLASSES] = torch.arange(CLASSES)
    both = linear_probe(*train, *test, protocol=protocol)
    alone = linear_probe(
        {"flat": train[0]["flat"]}, train[1], {"flat": test[0]["flat"]}, test[1], protocol=protocol
    )
    assert both.stages == ("flat", "maps")
    torch.testing.assert_close(both.heads.weights[0], alone.heads.weights[0])


# Against convex solvers -------------------------------------------------------------------------


def test_training_to_the_end_is_logistic_regression() -> None:
    features, labels = blobs(300)
    full = Protocol(1500, len(labels), (0.5, 1.0))
    heads = linear_probe(features, labels, features, labels, protocol=full).heads
    exact = LogisticRegression(C=np.inf, tol=1e-8, max_iter=2000).fit(
        features.numpy(), labels.numpy()
    )
    best = -np.log(exact.predict_proba(features.numpy())[np.arange(300), labels.numpy()]).mean()
    for number in range(2):
        logits = heads.classifier("pooled", number)(features)
        assert F.cross_entropy(logits, labels).item() == pytest.approx(best, abs=2e-5)


def test_training_with_decay_to_the_end_is_the_regularised_optimum() -> None:
    features, labels = blobs(200)
    decay = 0.02
    linear = nn.Linear(6, 3, dtype=torch.float64)
    lbfgs = torch.optim.LBFGS(linear.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        lbfgs.zero_grad()
        penalty = sum(p.square().sum() for p in linear.parameters())
        value = F.cross_entropy(linear(features.double()), labels) + decay / 2 * penalty
        value.backward()
        return value

    lbfgs.step(objective)
    protocol = Protocol(800, 200, (0.3,), weight_decay=decay)
    found = linear_probe(features, labels, features, labels, protocol=protocol)
    torch.testing.assert_close(
        found.heads.classifier("pooled").weight, linear.weight.float(), atol=1e-3, rtol=1e-3
    )


# Protocols --------------------------------------------------------------------------------------


def test_protocols_have_the_published_rates() -> None:
    assert PAPER.lrs == (0.8,)  # 0.2 x 1024 / 256
    assert PAPER_LRS == (0.4, 0.3, 0.2, 0.1, 0.05)
    assert MMSELFSUP_LINEAR.lrs == (1.6,)
    assert MULTI_HEAD.lrs == PLACES205.lrs == INATURALIST.lrs == (0.01,)
    assert replace(PAPER, batch_size=256).lrs == (0.2,)


@pytest.mark.parametrize(
    ("protocol", "epoch", "factor"),
    [
        (PAPER, 0, 1.0),
        (PAPER, 40, 0.5),
        (PAPER, 20.5, 0.5 + 0.5 * math.cos(math.pi * 20.5 / 80)),
        (MMSELFSUP_LINEAR, 45.9, 0.5),
        (MULTI_HEAD, 29.99, 1.0),
        (MULTI_HEAD, 30, 0.1),
        (MULTI_HEAD, 89.5, 0.01),
        (PLACES205, 27.5, 0.001),
        (INATURALIST, 48, 0.01),
    ],
)
def test_the_rate_follows_the_protocol(protocol: Protocol, epoch: float, factor: float) -> None:
    assert protocol.factor(epoch) == pytest.approx(factor)


def test_an_epoch_moves_the_rate_from_step_to_step() -> None:
    seen: list[float] = []
    heads = LinearHeads(maps(0)[0], CLASSES, replace(PAPER, epochs=2))
    step = heads.step

    def watched(features: Tensor, labels: Tensor, factor: float) -> Tensor:
        seen.append(factor)
        return step(features, labels, factor)

    heads.step = watched  # type: ignore[method-assign]
    batches = [(torch.zeros(4), maps(0, 4)[1])] * 4
    train_epoch(heads, lambda _: maps(0, 4)[0], batches, 1)
    assert seen == pytest.approx(
        [0.5 + 0.5 * math.cos(math.pi * (1 + i / 4) / 2) for i in range(4)]
    )


@pytest.mark.parametrize(
    "change",
    [{"epochs": 0}, {"batch_size": 0}, {"base_lrs": ()}, {"base_lrs": (-1.0,)},
     {"base_lrs": (math.nan,)}, {"momentum": 1.0}, {"weight_decay": -1e-4}],
)  # fmt: skip
def test_a_protocol_out_of_range_is_refused(change: dict) -> None:
    with pytest.raises(ValueError, match="expected 1 or more epochs"):
        replace(PAPER, **change)


# What is reported -------------------------------------------------------------------------------


def test_accuracies_count_the_first_and_the_first_five() -> None:
    heads = LinearHeads(torch.zeros(1, CLASSES), CLASSES, PAPER)
    with torch.no_grad():
        heads.weights[0].copy_(torch.eye(CLASSES)[None])
    scores = torch.tensor([7.0, 6, 5, 4, 3, 2, 1]).repeat(CLASSES, 1)  # class 0 first, 6 last
    batches = [(scores[:3], torch.arange(3)), (scores[3:], torch.arange(3, CLASSES))]
    top1, top5 = accuracy(heads, lambda x: x, batches)
    assert top1.item() == pytest.approx(1 / 7)
    assert top5.item() == pytest.approx(5 / 7)


def test_the_rate_is_chosen_on_held_out_training_images_alone() -> None:
    rates = tuple(float(r) for r in np.geomspace(1e-4, 3, 8))
    protocol = replace(PAPER, epochs=3, batch_size=64, base_lrs=rates)
    features, labels = blobs(240)
    test, truth = blobs(60, seed=1)
    probe = linear_probe(features, labels, test, truth, protocol=protocol, held_out=0.25)
    wrong = linear_probe(features, labels, test, (truth + 1) % 3, protocol=protocol, held_out=0.25)
    assert probe.held_out is not None
    assert probe.chosen == wrong.chosen == {"pooled": int(probe.held_out[0].argmax())}
    assert not torch.equal(probe.top1, wrong.top1)


def test_without_held_out_images_nothing_is_chosen() -> None:
    data = (*blobs(), *blobs(seed=1))
    protocol = replace(PAPER, epochs=1, base_lrs=(0.1, 0.2))
    assert linear_probe(*data, protocol=protocol).chosen is None
    assert linear_probe(*data, protocol=replace(PAPER, epochs=1)).chosen == {"pooled": 0}


def test_held_out_images_are_of_every_class_and_never_trained_on() -> None:
    labels = torch.arange(60) % 3
    everyone = torch.eye(60)  # each image has a weight of its own
    protocol = replace(PAPER, epochs=2, batch_size=16)
    heads = linear_probe(everyone, labels, everyone, labels, protocol=protocol, held_out=0.2).heads
    start = LinearHeads(everyone, 3, protocol, seed=0)
    untouched = (heads.weights[0][0] == start.weights[0][0]).all(0)
    assert labels[untouched].bincount().tolist() == [4, 4, 4]


def test_fewer_images_than_a_batch_scale_the_rate() -> None:
    probe = linear_probe(*blobs(128), *blobs(seed=1), protocol=replace(PAPER, epochs=1))
    assert probe.lrs == (0.1,)  # 0.2 x 128 / 256


def test_every_epoch_has_an_order_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = []
    epoch = linear.train_epoch

    def watched(heads: LinearHeads, extract: Any, batches: list, number: int) -> Tensor:
        orders.append(torch.cat([numbers for numbers, _ in batches]))
        return epoch(heads, extract, batches, number)

    monkeypatch.setattr(linear, "train_epoch", watched)
    protocol = replace(PAPER, epochs=2, batch_size=50)
    linear_probe(*blobs(), *blobs(seed=1), protocol=protocol)
    assert all(torch.equal(order.sort().values, torch.arange(120)) for order in orders)
    assert not torch.equal(*orders)


def test_the_same_seed_gives_the_same_heads() -> None:
    def heads(seed: int) -> Tensor:
        protocol = replace(PAPER, epochs=1, batch_size=32)
        return linear_probe(*blobs(), *blobs(seed=1), protocol=protocol, seed=seed).heads.weights[0]

    assert torch.equal(heads(3), heads(3))
    assert not torch.equal(heads(3), heads(4))


def test_features_may_lie_in_a_mapped_file(tmp_path: Path) -> None:
    features, labels = blobs()
    mapped = np.lib.format.open_memmap(
        tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=tuple(features.shape)
    )
    mapped[:] = features.numpy()
    protocol = replace(PAPER, epochs=2, batch_size=32)
    one = linear_probe(mapped, labels, mapped, labels, protocol=protocol)
    two = linear_probe(features, labels, features, labels, protocol=protocol)
    assert torch.equal(one.heads.weights[0], two.heads.weights[0])


def test_bfloat16_is_close_to_float32_and_keeps_float32_weights() -> None:
    data, protocol = (*blobs(300), *blobs(seed=1)), replace(PAPER, epochs=10, batch_size=64)
    half = linear_probe(*data, protocol=protocol, dtype=torch.bfloat16)
    full = linear_probe(*data, protocol=protocol)
    assert half.heads.weights[0].dtype == torch.float32
    assert not torch.equal(half.heads.weights[0], full.heads.weights[0])
    torch.testing.assert_close(half.heads.weights[0], full.heads.weights[0], atol=0.03, rtol=0.03)


# Online -----------------------------------------------------------------------------------------


def backbone() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.5))


def images(count: int = 3, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.rand(size, 3, 6, 6, generator=generator), torch.arange(size) % CLASSES)
        for _ in range(count)
    ]


def test_the_backbone_stays_as_it_is() -> None:
    net = backbone().train()
    before = copy.deepcopy(net.state_dict())
    protocol = replace(MULTI_HEAD, epochs=1, batch_size=8)
    heads = LinearHeads(net(images()[0][0]), CLASSES, protocol)
    after = copy.deepcopy(net.state_dict())
    assert not heads.features(net, images()[0][0]).requires_grad  # no graph is kept
    train_epoch(heads, net, images(), 0)
    accuracy(heads, net, images())
    assert all(module.training for module in net.modules())
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, after[k]) for k, v in net.state_dict().items())
    assert not torch.equal(before["1.running_mean"], after["1.running_mean"])  # the call above


def test_online_training_is_training_on_the_features() -> None:
    net, protocol = backbone(), replace(MULTI_HEAD, epochs=2, batch_size=8)
    stored = [(net.eval()(x).detach(), y) for x, y in images()]
    one, two = (LinearHeads(stored[0][0], CLASSES, protocol) for _ in range(2))
    for epoch in range(2):
        losses = train_epoch(one, net.train(), images(), epoch)
        assert torch.equal(losses, train_epoch(two, lambda x: x, stored, epoch))
    assert torch.equal(one.weights[0], two.weights[0])
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            accuracy(one, net, images()), accuracy(two, lambda x: x, stored), strict=True
        )
    )


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_training_goes_on_exactly_from_the_state(optimizer: str, tmp_path: Path) -> None:
    protocol = replace(MULTI_HEAD, optimizer=optimizer, epochs=3, base_lrs=(0.1, 1.0))
    features, labels = maps(0)

    def new() -> LinearHeads:
        return LinearHeads(features, CLASSES, protocol)

    def train(heads: LinearHeads, epochs: range) -> None:
        for epoch in epochs:
            batches = [(torch.tensor(float(epoch)), labels)] * 2
            train_epoch(heads, lambda e: maps(int(e))[0], batches, epoch)

    whole, first, second = new(), new(), new()
    train(whole, range(3))
    train(first, range(2))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(second, range(2, 3))
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


# Wrong inputs -----------------------------------------------------------------------------------


def bad(**changes: Tensor | dict) -> dict:
    features, labels = blobs(30)
    good = {
        "train_features": features,
        "train_labels": labels,
        "test_features": features[:9],
        "test_labels": labels[:9],
    }
    return good | changes


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        (bad(train_labels=torch.arange(29) % 3), "train: 29 labels .* 30"),
        (bad(test_labels=torch.arange(8) % 3), "test: 8 labels .* 9"),
        (bad(test_features=torch.zeros(0, 6), test_labels=torch.zeros(0).long()), "test: 0 labels"),
        (bad(train_labels=torch.rand(30)), "train labels are torch.float32"),
        (bad(train_labels=torch.zeros(30).long(), test_labels=torch.zeros(9).long()), "same class"),
        (bad(test_labels=torch.arange(9) % 5), r"no training image of classes \[3, 4\]"),
        (bad(train_labels=torch.arange(30) % 3 - 1), "labels from -1 to 1"),
        (bad(num_classes=2), "labels from 0 to 2"),
        (bad(train_features=torch.full((30, 6), torch.nan)), "'pooled' of train are not finite"),
        (bad(test_features=torch.full((9, 6), torch.inf)), "'pooled' of test are not finite"),
        (bad(test_features=torch.zeros(9, 5)), "expected the same"),
        (bad(test_features={"feature1": torch.zeros(9, 6)}), "expected the same"),
        (bad(held_out=1.5), r"held_out=1\.5; expected the part"),
    ],
)
def test_wrong_features_and_labels_are_refused(inputs: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        linear_probe(**inputs)


def test_online_labels_out_of_range_are_refused() -> None:
    heads = LinearHeads(torch.zeros(1, 4), 3, PAPER)
    with pytest.raises(ValueError, match="labels from 0 to 3"):
        train_epoch(heads, lambda x: x, [(torch.zeros(4, 4), torch.arange(4))], 0)


def test_a_backbone_that_gives_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="of the backbone are not finite"):
        LinearHeads({"feature5": torch.full((1, 4), torch.nan)}, 3, PAPER)


# Two processes ----------------------------------------------------------------------------------

SHARES = ((0, 9), (9, 16))  # of a batch; the ranks need not have as many images


def train_jointly(rank: int | None) -> dict[str, Tensor]:
    protocol = replace(MULTI_HEAD, epochs=2, base_lrs=(0.1, 1.0))
    heads = LinearHeads(maps(0)[0], CLASSES, protocol)
    mine = slice(*SHARES[rank]) if rank is not None else slice(None)

    def share(step: Tensor) -> dict[str, Tensor]:
        return {name: x[mine] for name, x in maps(int(step))[0].items()}

    batches = [(torch.tensor(i), maps(i)[1][mine]) for i in range(3)]
    for epoch in range(2):
        losses = train_epoch(heads, share, batches, epoch)
    top1, top5 = accuracy(heads, share, batches)
    return {**heads.state_dict(), "losses": losses, "top1": top1, "top5": top5}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    result = train_jointly(rank)
    # Features that are the same on all ranks are trained on without communication.
    if rank == 0:
        probe = linear_probe(*blobs(), *blobs(seed=1), protocol=replace(PAPER, epochs=1))
        result["alone"] = probe.top1
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    mp.get_context("forkserver").set_forkserver_preload(["byol_pytorch.evaluation.linear"])
    mp.start_processes(work, (str(tmp_path),), nprocs=2, start_method="forkserver")
    alone = train_jointly(None)
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in alone.items():
            if name == "losses":  # the mean of the ranks' means
                continue
            torch.testing.assert_close(result[name], value, atol=1e-5, rtol=1e-4, msg=name)
