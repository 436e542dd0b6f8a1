"""Which images each process reads in each step, and the seeds of what is drawn by chance."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from torch.utils.data import Sampler

from parts.processes import rank, world_size

SHARD_WINDOW = 2**16  # images of neighbouring shards that are shuffled together


def seed_of(*numbers: int) -> int:
    """A seed of its own for these numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def epoch_order(images: int, seed: int, epoch: int, shard: np.ndarray | None = None) -> np.ndarray:
    """A random order of all images; of shards a random order of them, mixed over a window.

    `shard` (N,) says which images lie together.
    """
    rng = np.random.default_rng((seed, epoch))
    if shard is None:
        return rng.permutation(images)
    place = rng.permutation(shard.max() + 1)
    order = np.argsort(place[shard], kind="stable")
    for first in range(0, len(order), SHARD_WINDOW):
        rng.shuffle(order[first : first + SHARD_WINDOW])
    return order


def in_pairs(order: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """`order` with both images of each two in a row of one kind; the odd one of a kind finds its
    partner at the start. (MMDetection's GroupSampler, with two images a GPU.)"""
    pairs = []
    for kind in np.unique(kinds):
        places = np.flatnonzero(kinds[order] == kind)
        pairs.append(np.append(places, places[: len(places) % 2]).reshape(-1, 2))
    both = np.concatenate(pairs)
    return order[both[np.argsort(both[:, 0])]].ravel()


@dataclass
class Order(Sampler[np.ndarray]):
    """This process's images in the steps from `start` up to `stop`: (n, 2), epoch and image.

    The batch of a step depends on the seed and the step alone. The processes take consecutive parts
    of it, equal to one image, and each goes through its part in `passes` pieces: so what a step
    sees depends neither on the number of processes nor on where a run was stopped.

    `rest` says what becomes of the images beyond the last whole batch of an epoch: "drop" leaves
    them out of it, "join" fills their batch from the next epoch, "spread" makes one batch more and
    all of them equal to one image.

    With `kinds` (N,), see in_pairs, an epoch has one image more for each kind of odd number.
    """

    images: int
    size: int  # of a step's batch, over all processes; with "spread" at most
    seed: int
    stop: int
    start: int = 0
    rest: Literal["drop", "join", "spread"] = "drop"
    passes: int = 1
    shard: np.ndarray | None = None
    kinds: np.ndarray | None = None
    rank: int = field(default_factory=rank)
    world: int = field(default_factory=world_size)
    _order: tuple[int, np.ndarray] = (-1, np.empty(0, int))

    def __post_init__(self) -> None:
        if self.kinds is not None:
            self.images += int((np.unique(self.kinds, return_counts=True)[1] % 2).sum())

    @property
    def epoch_steps(self) -> int:
        """Of an epoch without the images that are dropped."""
        return -(-self.images // self.size) if self.rest == "spread" else self.images // self.size

    def only(self, epoch: int) -> None:
        """Read the steps of this epoch."""
        self.start, self.stop = epoch * self.epoch_steps, (epoch + 1) * self.epoch_steps

    def __len__(self) -> int:
        return (self.stop - self.start) * self.passes

    def __iter__(self) -> Iterator[np.ndarray]:
        for step in range(self.start, self.stop):
            mine = np.array_split(self._batch(step), self.world)[self.rank]
            yield from np.array_split(mine, self.passes)

    def _batch(self, step: int) -> np.ndarray:
        if self.rest == "join":
            epochs, places = np.divmod(np.arange(self.size) + step * self.size, self.images)
            found = [self._epoch(e)[places[epochs == e]] for e in np.unique(epochs).tolist()]
            return np.column_stack((epochs, np.concatenate(found)))
        epoch, number = divmod(step, self.epoch_steps)
        order = self._epoch(epoch)
        if self.rest == "spread":
            chosen = np.array_split(order, self.epoch_steps)[number]
        else:
            chosen = order[number * self.size :][: self.size]
        return np.column_stack((np.full(len(chosen), epoch), chosen))

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            if self.kinds is None:
                order = epoch_order(self.images, self.seed, epoch, self.shard)
            else:
                order = in_pairs(epoch_order(len(self.kinds), self.seed, epoch), self.kinds)
            self._order = epoch, order
        return self._order[1]
