"""Batches of images with a target of any kind (boxes, a mask), which are read from disk one at a time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from .sampler import EpochBatchSampler
from .workers import leave_signals_to_parent, sigterm_held

T = TypeVar("T")
Split = TypeVar("Split")


@dataclasses.dataclass(frozen=True)
class ItemData(Generic[Split]):
    """Training and test images of a task."""

    name: str
    layout: str
    classes: tuple[str, ...]
    train: Split
    test: Split


def training_items(
    view: Callable[[int, int], T],
    images: int,
    batch_size: int,
    *,
    start: int = 0,
    stop: int,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Iterator[list[T]]:
    """This rank's training batches of the 0-based iterations ``start`` to ``stop - 1``: each image once an epoch. The
    same for any ``start`` and number of workers.

    Args:
        view: the item of an image's position and the seed of its view; pickled for the workers.
        images: number of images.
    """
    sampler = EpochBatchSampler(images, batch_size, seed=seed, rank=rank, world=world, views=1, drop_last=True)

    def order() -> Iterator[list[tuple[int, int]]]:
        first = start
        while True:
            sampler.set_epoch(*divmod(first, sampler.steps_per_epoch))
            for micro in sampler:
                yield list(zip(micro.index.tolist(), micro.seeds.tolist(), strict=True))
                first += 1

    return _load(view, itertools.islice(order(), stop - start), workers)


def items(read: Callable[[int], T], positions: Iterable[int], workers: int = 0) -> Iterator[T]:
    """The items at these positions, in order."""
    return itertools.chain.from_iterable(_load(read, [[(position,)] for position in positions], workers))


def _load(read: Callable[..., T], order: Iterable[list[Any]], workers: int) -> Iterator[list[T]]:
    with sigterm_held():
        return iter(
            DataLoader(
                _Batches(read),
                batch_size=None,  # the sampler's items are batches
                sampler=order,
                num_workers=workers,
                collate_fn=_as_is,
                worker_init_fn=leave_signals_to_parent,
                generator=torch.Generator(),  # for the workers' seeds; the global one must not advance
            )
        )


class _Batches(Dataset):
    def __init__(self, read: Callable[..., Any]) -> None:
        self.read = read

    def __getitem__(self, batch: list[tuple[int, ...]]) -> list[Any]:
        return [self.read(*arguments) for arguments in batch]


def _as_is(batch: Any) -> Any:
    return batch
