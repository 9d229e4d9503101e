"""Training batches: two views of each image, or one view and its label."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .augment import Augmentation, augment_batch, color_transform, of_each_view
from .datasets import ImageData, Normalize, TensorSplit, labeled_subset
from .images import check_readable
from .sampler import EpochBatchSampler
from .shards import ShardSplit
from .views import ViewDataset, Views
from .workers import leave_signals_to_parent, sigterm_held

_ENOUGH = 64  # images, to judge by: a small batch may be unreadable by chance


class Batch(NamedTuple):
    """Two views of n images.

    Attributes:
        im_q: [n, 3, s, s] float32, normalized, on the loader's device; with P patches [n, P, 3, s', s'].
        im_k: the same for the key views, of the images of ``index``; with ``shuffled_keys``, of those in slots
            rank * n to (rank + 1) * n - 1 of ``key_order``.
        index: [n] int64 positions of the queries in ``data.train``, on the CPU. An unreadable image keeps its position,
            whatever image replaces it.
        key_order: [world * n] int64 permutation of the global batch, on the CPU: slot i of the shuffled keys holds
            global row ``key_order[i]``; row r * n + i is row i of rank r.
        share: this micro-batch's share of the images of its optimizer step.
        last: True for the last micro-batch of an optimizer step.
    """

    im_q: Tensor
    im_k: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple has a method of that name
    key_order: Tensor
    share: float
    last: bool


class TrainLoader:
    """Two augmented views of each training image, in a new order every epoch.

    Everything random is a function of (seed, epoch, position in the epoch). So the views depend neither on the number
    of workers nor on where a run was interrupted, and ``world`` ranks with ``batch_size`` images each see together what
    one process sees with ``world * batch_size``. Only an epoch's last batch differs: every rank gets the same number of
    images.

    An image that cannot be decoded is replaced by another and added to ``data.unreadable``, with one warning for the
    first.

    Args:
        data: the dataset; its ``train`` split is used.
        augmentation: for both views; its ``second``, if there is one, for the key view.
        batch_size: images of one rank's micro-batch, at least 2.
        accumulate: micro-batches of an optimizer step.
        seed: of the order and the views.
        rank: this process, 0 to ``world - 1``.
        world: number of processes.
        workers: loader processes; 0 loads in this process.
        drop_last: drop an epoch's last optimizer step if it is short, as the official training code does.
        shuffled_keys: give each rank key views of all ranks' images, permuted by ``key_order``: shuffling BN without
            sending images.
        shard_window: shuffle the images of so many shards at a time (:class:`EpochBatchSampler`); 0: all images.
        patches: P = g * g splits each view into a g x g grid of patches with side s' = s // g; 0 keeps it whole.
        augment_on: ``"loader"``, or ``"device"``: workers only decode and crop, and the rest runs on ``device``, a
            batch at a time. Both give the same views up to rounding.
        device: of the views.
        channels_last: use the channels-last memory layout.

    Raises:
        ValueError: an argument out of range, or too few images for one step.
        UnreadableImageError: while iterating, more than half of the images cannot be decoded.
    """

    def __init__(
        self,
        data: ImageData,
        augmentation: Augmentation,
        batch_size: int,
        *,
        accumulate: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        drop_last: bool = False,
        shuffled_keys: bool = False,
        shard_window: int = 0,
        patches: int = 0,
        augment_on: str = "loader",
        device: torch.device | str = "cpu",
        channels_last: bool = False,
    ) -> None:
        if augment_on not in ("loader", "device"):
            raise ValueError(f"augment_on: expected loader or device, got {augment_on!r}")
        self._grid = math.isqrt(max(patches, 0))
        if self._grid**2 != patches or self._grid > augmentation.size:
            raise ValueError(
                f"patches: expected 0 or a square number, of at most {augmentation.size}^2 patches, got {patches}"
            )
        shards = data.train.starts if isinstance(data.train, ShardSplit) else None
        if shard_window < 0 or (shard_window and shards is None):
            raise ValueError(f"shard_window: expected 0, or with shards a number of them, got {shard_window}")
        self._sampler = EpochBatchSampler(
            len(data.train),
            batch_size,
            accumulate=accumulate,
            seed=seed,
            rank=rank,
            world=world,
            drop_last=drop_last,
            shuffled_keys=shuffled_keys,
            shards=shards,
            window=shard_window,
        )
        device = torch.device(device)
        self._device_augmentation = augmentation if augment_on == "device" else None
        self._whole_images = isinstance(data.train, TensorSplit)  # workers crop files only, if the device augments
        self._device, self._channels_last, self._normalize = device, channels_last, Normalize(data, device)
        dataset = ViewDataset(data.train, augmentation, color=augment_on == "loader")
        self._loader = _ViewLoader(data, dataset, self._sampler, workers, device)
        self._epoch, self._step, self._resuming = 0, 0, False

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps in an epoch."""
        return self._sampler.steps_per_epoch

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Iterate over the batches of 0-based ``epoch``; after ``load_state_dict``, over the rest of its epoch."""
        first_step = self._step if self._resuming and epoch == self._epoch else 0
        self._epoch, self._step, self._resuming = epoch, first_step, False
        for views in self._loader.epoch(epoch, first_step):
            micro = views.micro
            im_q, im_k = self._finish(views).chunk(2)
            self._step += micro.last
            index, key_order = torch.from_numpy(micro.index), torch.from_numpy(micro.key_order)
            yield Batch(im_q, im_k, index, key_order, micro.share, micro.last)

    def state_dict(self) -> dict[str, int]:
        """Position after the last complete optimizer step, as plain integers.

        Micro-batches of an unfinished step are yielded again after resuming: no checkpoint has their gradients.
        """
        return {"epoch": self._epoch, "step": self._step} | self._identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from ``state``: ``epoch(state["epoch"])`` yields the rest of that epoch.

        Raises:
            ValueError: the state has other data, another seed or another batch size, and so other epochs; or its
                position is not one.
        """
        state = {"shard_window": 0} | state  # older checkpoints
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise ValueError(f"state: expected {name} = {mine} as in this loader, got {state.get(name)}")
        for name in ("epoch", "step"):
            if not isinstance(state.get(name), int) or state[name] < 0:
                raise ValueError(f"state: expected {name} as an integer of at least 0, got {state.get(name)}")
        if state["step"] > self.steps_per_epoch:
            raise ValueError(f"state: expected step of at most {self.steps_per_epoch}, got {state['step']}")
        self._epoch, self._step, self._resuming = state["epoch"], state["step"], True

    def _identity(self) -> dict[str, int]:
        sampler = self._sampler
        return {
            "seed": sampler.seed,
            "images": sampler.images,
            "global_batch_size": sampler.world * sampler.batch_size,
            "accumulate": sampler.accumulate,
            "shard_window": sampler.window,
        }

    def _finish(self, views: Views) -> Tensor:
        """Both views of a batch, [2n, ...], on the device, as the encoders take them."""
        images = views.images.to(self._device, non_blocking=True)
        if self._device_augmentation is not None:
            seeds = torch.from_numpy(np.concatenate([views.micro.seeds, views.micro.key_seeds]))
            transform = augment_batch if self._whole_images else color_transform
            images = of_each_view(transform, images, self._device_augmentation, seeds)
        images = self._normalize(images)
        n, g = len(images), self._grid
        if g:
            side = images.shape[-1] // g
            cells = images[..., : g * side, : g * side].unflatten(3, (g, side)).unflatten(2, (g, side))
            images = cells.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)  # [2n * P, 3, s', s']
        images = images.contiguous(
            memory_format=torch.channels_last if self._channels_last else torch.contiguous_format
        )
        return images.unflatten(0, (n, g * g)) if g else images


class SupervisedLoader:
    """One view (random crop and flip) of each training image with its label, for linear probes and fine-tuning.

    Order, views and unreadable images are as in :class:`TrainLoader`; the image that replaces another keeps its own
    label.

    Args:
        data: the dataset; its ``train`` split is used.
        batch_size: images of one rank's batch, at least 2.
        seed: of the order, the views and the labeled subset.
        rank: this process, 0 to ``world - 1``.
        world: number of processes.
        workers: loader processes; 0 loads in this process.
        device: of the batches.
        fraction: share of each class's images to use, at least one; the same in every epoch.
        labels_per_class: number of images of each class to use, instead of ``fraction``.
        crop_min: smallest share of an image's area in a crop.

    Raises:
        ValueError: an argument out of range, or fewer than two images a rank.
        UnreadableImageError: while iterating, more than half of the images cannot be decoded.
    """

    def __init__(
        self,
        data: ImageData,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        device: torch.device | str = "cpu",
        fraction: float = 1.0,
        labels_per_class: int | None = None,
        crop_min: float = 0.08,
    ) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction: expected a share of the labels in (0, 1], got {fraction}")
        if not 0 < crop_min <= 1:
            raise ValueError(f"crop_min: expected a share of the area in (0, 1], got {crop_min}")
        device, members = torch.device(device), None
        if fraction < 1 or labels_per_class is not None:
            members = labeled_subset(data.train.labels, fraction=fraction, per_class=labels_per_class, seed=seed)
        images = len(data.train) if members is None else len(members)
        self._sampler = EpochBatchSampler(
            images, batch_size, seed=seed, rank=rank, world=world, views=1, members=members
        )
        self._labels, self._device, self._normalize = data.train.labels, device, Normalize(data, device)
        augmentation = Augmentation.supervised(data.size, crop_min=crop_min, flip_p=0.5 if data.flip else 0.0)
        dataset = ViewDataset(data.train, augmentation, color=True, members=members)
        self._loader = _ViewLoader(data, dataset, self._sampler, workers, device)

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch."""
        return self._sampler.steps_per_epoch

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over 0-based ``epoch``: normalized images float32 [n, 3, s, s], labels int64 [n], on the device."""
        for views in self._loader.epoch(epoch):
            images = self._normalize(views.images.to(self._device, non_blocking=True))
            labels = self._labels[views.index]
            yield images.contiguous(), labels.to(self._device, non_blocking=True)


class _ViewLoader:
    """A DataLoader of the sampler's micro-batches that notes the images that could not be read.

    Two numbers say where the sampler is, so resuming needs no loader state (torchdata's StatefulDataLoader cannot load
    its own with another number of workers).
    """

    def __init__(
        self, data: ImageData, dataset: ViewDataset, sampler: EpochBatchSampler, workers: int, device: torch.device
    ) -> None:
        if workers < 0:
            raise ValueError(f"workers: expected 0 or more processes, got {workers}")
        self._data, self._sampler = data, sampler
        self._loader = DataLoader(
            dataset,
            batch_size=None,  # the sampler's items are batches
            sampler=sampler,
            collate_fn=_as_is,
            num_workers=workers,
            worker_init_fn=leave_signals_to_parent,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # for the workers' seeds, which are not used; the global one must not advance
        )

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Views]:
        self._sampler.set_epoch(epoch, first_step)
        with sigterm_held():
            batches = iter(self._loader)
        seen = unread = 0
        for views in batches:
            self._data.skip(views.unreadable)
            queries = views.micro.index
            seen += len(queries)
            unread += int((views.index[: len(queries)].numpy() != queries).sum())
            if seen >= _ENOUGH:
                check_readable(unread, seen)
            yield views
        check_readable(unread, seen)


def _as_is(batch: Any) -> Any:
    return batch
