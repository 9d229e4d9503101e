"""Which images each process sees in each batch of each epoch: arithmetic, without an image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .seeds import hash_seeds

_ORDER, _VIEW, _KEYS = range(3)  # what a hash is for


class MicroBatch(NamedTuple):
    """This process's part of a batch of world * n images: its queries and its keys, and where they stand in a step.

    ``key_order``, ``share`` and ``last`` are those of :class:`moco_ext.data.Batch`.
    """

    index: Tensor  # type: ignore[assignment]  # [n] int64 positions in the data set
    seeds: Tensor  # [n] int64 of the query views
    key_index: Tensor  # [n]
    key_seeds: Tensor  # [n]
    key_order: Tensor  # [world * n]
    share: float
    last: bool


class EpochBatchSampler:
    """Cuts each epoch's permutation of ``images`` images into optimizer steps of ``accumulate`` micro-batches.

    All of it is a function of (seed, epoch, place in the epoch): row r * n + i of a batch is rank r's row i, so that w
    ranks with batches of b see what one process sees with batches of w * b. The last step of an epoch may be short:
    fewer micro-batches, the last of them with fewer images, as many on every rank, and at least two, since batch
    normalisation needs company. What is left then, less than two a rank, is left out; ``drop_last`` leaves out all of a
    short step.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        *,
        accumulate: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        shuffled_keys: bool = False,
        members: Tensor | None = None,
    ) -> None:
        if batch_size < 2:
            raise ValueError(f"batch_size: expected at least 2 (batch normalisation needs company), got {batch_size}")
        if accumulate < 1:
            raise ValueError(f"accumulate: expected at least 1, got {accumulate}")
        if not 0 <= rank < world:
            raise ValueError(f"rank: expected one of world = {world} ranks, got {rank}")
        self.images, self.batch_size, self.accumulate, self.seed = images, batch_size, accumulate, seed
        self.rank, self.world, self.shuffled_keys, self.members = rank, world, shuffled_keys, members
        full, rest = divmod(images, world * batch_size)
        self.tail = 0 if drop_last or rest // world < 2 else rest // world  # images a rank of the last micro-batch
        self.full = full // accumulate * accumulate if drop_last else full
        self.micro_batches_per_epoch = self.full + (self.tail > 0)
        if self.micro_batches_per_epoch == 0:
            least = world * (batch_size * accumulate if drop_last else 2)
            raise ValueError(f"data: expected at least {least} images for one step, got {images}")
        self.steps_per_epoch = -(-self.micro_batches_per_epoch // accumulate)
        self._order: tuple[int, Tensor] | None = None

    def micro_batches(self, epoch: int, first_step: int = 0) -> Iterator[MicroBatch]:
        """Those of an epoch, in order, from an optimizer step on."""
        order = self._order_of(epoch)
        for number in range(first_step * self.accumulate, self.micro_batches_per_epoch):
            yield self._micro_batch(order, epoch, number)

    def _order_of(self, epoch: int) -> Tensor:
        # 8 bytes an image: the one thing here whose size is that of the data set. Kept, as sampler and consumer ask.
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(int(hash_seeds(self.seed, epoch, _ORDER)))
            order = torch.randperm(self.images, generator=generator)
            self._order = epoch, order if self.members is None else self.members[order]
        return self._order[1]

    def _micro_batch(self, order: Tensor, epoch: int, number: int) -> MicroBatch:
        start = number * self.world * self.batch_size
        n = self._size(number)
        generator = torch.Generator().manual_seed(int(hash_seeds(self.seed, epoch, _KEYS, start)))
        key_order = torch.randperm(self.world * n, generator=generator)
        mine = torch.arange(self.rank * n, (self.rank + 1) * n)
        keys = start + (key_order[mine] if self.shuffled_keys else mine)
        queries = start + mine
        seeds, key_seeds = (
            torch.from_numpy(hash_seeds(self.seed, epoch, _VIEW, rows, view))
            for view, rows in enumerate((queries, keys))
        )
        step = number // self.accumulate * self.accumulate
        end = min(step + self.accumulate, self.micro_batches_per_epoch)
        share = n / sum(self._size(other) for other in range(step, end))
        return MicroBatch(order[queries], seeds, order[keys], key_seeds, key_order, share, number == end - 1)

    def _size(self, number: int) -> int:
        return self.batch_size if number < self.full else self.tail
