"""Which images each process sees in each batch of each epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from .seeds import hash_seeds

_ORDER, _VIEW, _KEYS = range(3)  # what a hash is for


class MicroBatch(NamedTuple):
    """One rank's images of a micro-batch of world * n images, and the seeds of their views.

    NumPy arrays, which are pickled to the loader's workers and back; tensors would each take a file descriptor.

    Attributes:
        index: [n] int64 positions of the queries in the dataset.
        seeds: [n] int64 of the query views.
        key_index: [n], or empty with one view.
        key_seeds: [n], or empty.
        key_order: [world * n] as in :class:`moco_ext.data.Batch`.
        share: as in :class:`moco_ext.data.Batch`.
        last: as in :class:`moco_ext.data.Batch`.
    """

    index: np.ndarray  # type: ignore[assignment]  # tuple has a method of that name
    seeds: np.ndarray
    key_index: np.ndarray
    key_seeds: np.ndarray
    key_order: np.ndarray
    share: float
    last: bool


class EpochBatchSampler(Sampler[MicroBatch]):
    """Cut each epoch's permutation of the images into optimizer steps of ``accumulate`` micro-batches.

    Everything is a function of (seed, epoch, position in the epoch). Row r * n + i of a global batch is row i of rank
    r, so ``world`` ranks with batches of b see what one process sees with batches of ``world * b``.

    The last step of an epoch may be short: fewer micro-batches, the last of them with fewer images, the same number on
    every rank and at least two, which BatchNorm needs. Fewer than two images a rank are left out; ``drop_last`` leaves
    out the whole short step.

    Args:
        images: number of images in the dataset, or in ``members``.
        batch_size: images of one rank's micro-batch, at least 2.
        accumulate: micro-batches of an optimizer step.
        views: 2 for queries and keys, or 1.
        shuffled_keys: permute the keys across ranks by ``key_order``.
        members: int64 [images] positions of the images to use; None: all.
        shards: int64 [S + 1] first image of each shard, and the number of images; used with ``window``.
        window: 0 permutes all images. Otherwise the shards are permuted, and then the images of each ``window``
            successive ones, so that images read at about the same time are in few shards.
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
        views: int = 2,
        shuffled_keys: bool = False,
        members: Tensor | None = None,
        shards: np.ndarray | None = None,
        window: int = 0,
    ) -> None:
        if batch_size < 2:
            raise ValueError(f"batch_size: expected at least 2 (BatchNorm needs two samples), got {batch_size}")
        if accumulate < 1:
            raise ValueError(f"accumulate: expected at least 1, got {accumulate}")
        if not 0 <= rank < world:
            raise ValueError(f"rank: expected one of world = {world} ranks, got {rank}")
        self.images, self.batch_size, self.accumulate, self.seed = images, batch_size, accumulate, seed
        self.rank, self.world, self.views, self.shuffled_keys, self.members = rank, world, views, shuffled_keys, members
        if window < 0 or (window and shards is None):
            raise ValueError(f"window: expected 0 or, of images in shards, a number of shards, got {window}")
        self.shards, self.window = shards, window
        full, rest = divmod(images, world * batch_size)
        self.tail = 0 if drop_last or rest // world < 2 else rest // world  # images a rank of the last micro-batch
        self.full = full // accumulate * accumulate if drop_last else full
        self.micro_batches_per_epoch = self.full + (self.tail > 0)
        if self.micro_batches_per_epoch == 0:
            least = world * (batch_size * accumulate if drop_last else 2)
            raise ValueError(f"data: expected at least {least} images for one step, got {images}")
        self.steps_per_epoch = -(-self.micro_batches_per_epoch // accumulate)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Set the 0-based epoch to iterate over next, and the optimizer step to start at."""
        self.epoch, self.first_step = epoch, first_step

    def __iter__(self) -> Iterator[MicroBatch]:
        epoch = self.epoch
        generator = torch.Generator().manual_seed(int(hash_seeds(self.seed, epoch, _ORDER)))
        permutation = self._permutation(generator)  # 8 bytes an image
        order = (permutation if self.members is None else self.members[permutation]).numpy()
        for number in range(self.first_step * self.accumulate, self.micro_batches_per_epoch):
            yield self._micro_batch(order, epoch, number)

    def _permutation(self, generator: torch.Generator) -> Tensor:
        if self.shards is None or not self.window:
            return torch.randperm(self.images, generator=generator)
        ranges = np.stack([self.shards[:-1], self.shards[1:]], 1)
        ranges = ranges[torch.randperm(len(ranges), generator=generator).numpy()]
        parts = []
        for start in range(0, len(ranges), self.window):
            images = torch.cat([torch.arange(*span) for span in ranges[start : start + self.window].tolist()])
            parts.append(images[torch.randperm(len(images), generator=generator)])
        return torch.cat(parts)

    def _micro_batch(self, order: np.ndarray, epoch: int, number: int) -> MicroBatch:
        start = number * self.world * self.batch_size
        n = self._size(number)
        generator = torch.Generator().manual_seed(int(hash_seeds(self.seed, epoch, _KEYS, start)))
        key_order = torch.randperm(self.world * n, generator=generator).numpy()
        mine = np.arange(self.rank * n, (self.rank + 1) * n)
        queries = start + mine
        keys = start + (key_order[mine] if self.shuffled_keys else mine) if self.views == 2 else mine[:0]
        seeds, key_seeds = (
            hash_seeds(self.seed, epoch, _VIEW, rows, view) for view, rows in enumerate((queries, keys))
        )
        step = number // self.accumulate * self.accumulate
        end = min(step + self.accumulate, self.micro_batches_per_epoch)
        share = n / sum(self._size(other) for other in range(step, end))
        return MicroBatch(order[queries], seeds, order[keys], key_seeds, key_order, share, number == end - 1)

    def _size(self, number: int) -> int:
        return self.batch_size if number < self.full else self.tail
