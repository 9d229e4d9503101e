"""Batches for training, epoch by epoch: two views of each image, or one view and its label."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .augment import Augmentation, augment_batch, recolour
from .datasets import ImageData, TensorSplit, stratified_split
from .sampler import EpochBatchSampler, MicroBatch
from .seeds import hash_seeds
from .views import Request, ViewDataset, Views
from .workers import leave_signals_to_parent

_CPU = torch.device("cpu")


class Batch(NamedTuple):
    """Two views of n images, and where they stand.

    Attributes:
        im_q: [n, 3, s, s] float32, standardised, on the loader's device; with P patches [n, P, 3, s', s'].
        im_k: the same of the key views: rows are the images of ``index``; with ``shuffled_keys``, those of
            ``key_order``'s slots rank * n .. (rank + 1) * n.
        index: [n] int64 positions in ``data.train`` of this rank's queries, on the CPU. An unreadable image keeps its
            position, whatever image takes its place.
        key_order: [world * n] int64 permutation of the global batch, on the CPU: slot i of the shuffled keys holds
            global row ``key_order[i]``; row r * n + i is rank r's row i.
        share: this micro-batch's share of its optimizer step's images.
        last: True for the micro-batch that completes an optimizer step.
    """

    im_q: Tensor
    im_k: Tensor
    index: Tensor  # type: ignore[assignment]  # a tuple has a method of that name
    key_order: Tensor
    share: float
    last: bool


class TrainLoader:
    """Two augmented views of each training image, in an order of each epoch's own.

    Everything random is a function of (seed, epoch, place in the epoch) alone. So results depend neither on the number
    of workers nor on where a run was interrupted, and ``world`` ranks with ``batch_size`` images each see together what
    one process sees with ``world * batch_size``, but for the last short batch, of which every rank gets as many.

    An image that cannot be decoded is replaced by another, warned of once and counted in ``skipped`` (each rank counts
    its queries).

    Args:
        data: whose ``train`` split is shown.
        augmentation: of both views.
        batch_size: images of one rank's micro-batch, at least 2.
        accumulate: micro-batches of an optimizer step.
        workers: loader processes; 0: the work is done in this one.
        drop_last: leave out an epoch's last optimizer step if it is short (the published trainer does).
        shuffled_keys: hand each rank key views of all ranks' images, permuted by ``key_order``: shuffling BN without
            sending an image.
        patches: P = g * g: each view becomes the P cells of a g x g grid, of side s' = s // g; 0: the whole view.
        augment_on: ``"loader"``, or ``"device"``: workers decode and crop, and the rest is done on the batch, on
            ``device``. Both give the same views, to rounding.
        device: of the views.
        channels_last: memory layout of the views.

    Raises:
        ValueError: an argument out of its range, or too few images for one step; later, a batch of which more than
            half cannot be decoded.
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
        patches: int = 0,
        augment_on: str = "loader",
        device: torch.device = _CPU,
        channels_last: bool = False,
    ) -> None:
        if augment_on not in ("loader", "device"):
            raise ValueError(f"augment_on: expected loader or device, got {augment_on!r}")
        self._grid = math.isqrt(max(patches, 0))
        if self._grid**2 != patches or self._grid > augmentation.size:
            raise ValueError(
                f"patches: expected 0 or a square number, of at most {augmentation.size}^2 patches, got {patches}"
            )
        self._plan = EpochBatchSampler(
            len(data.train),
            batch_size,
            accumulate=accumulate,
            seed=seed,
            rank=rank,
            world=world,
            drop_last=drop_last,
            shuffled_keys=shuffled_keys,
        )
        self._device_augmentation = augmentation if augment_on == "device" else None
        self._whole_images = isinstance(data.train, TensorSplit)  # which workers do not crop, if the device augments
        self._device, self._channels_last, self._standardise = device, channels_last, Standardise(data, device)
        dataset = ViewDataset(data.train, augmentation, colour=augment_on == "loader")
        self._loader = _ViewLoader(dataset, self._plan, two_views=True, workers=workers, pin=device.type == "cuda")
        self._epoch, self._step, self._resuming = 0, 0, False

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return self._plan.steps_per_epoch

    @property
    def skipped(self) -> int:
        """Images that could not be decoded so far."""
        return self._loader.skipped

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of 0-based ``epoch``; after ``load_state_dict``, those that are left of the state's epoch."""
        first_step = self._step if self._resuming and epoch == self._epoch else 0
        self._epoch, self._step, self._resuming = epoch, first_step, False
        for micro, views in self._loader.batches(epoch, first_step):
            seeds = torch.cat([micro.seeds, micro.key_seeds])
            im_q, im_k = self._finished(views.images, seeds).chunk(2)
            self._step += micro.last
            yield Batch(im_q, im_k, micro.index, micro.key_order, micro.share, micro.last)

    def state_dict(self) -> dict[str, int]:
        """Where the loader stands: after the last optimizer step whose last micro-batch was handed out.

        Plain numbers. Micro-batches of an unfinished step are shown again: their gradients are in no checkpoint.
        """
        return {"epoch": self._epoch, "step": self._step, "skipped": self.skipped} | self._identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there; the next ``epoch(state["epoch"])`` yields what is left of that epoch.

        Raises:
            ValueError: the state is of other data, another seed or another batch size, whose epochs differ.
        """
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise ValueError(f"state: expected {name} = {mine} as in this loader, got {state.get(name)}")
        self._epoch, self._step, self._resuming = state["epoch"], state["step"], True
        self._loader.skipped = state["skipped"]

    def _identity(self) -> dict[str, int]:
        plan = self._plan
        return {
            "seed": plan.seed,
            "images": plan.images,
            "global_batch_size": plan.world * plan.batch_size,
            "accumulate": plan.accumulate,
        }

    def _finished(self, images: Tensor, seeds: Tensor) -> Tensor:
        """Both views of a batch [2n, C, h, w] as the encoders take them."""
        images = images.to(self._device, non_blocking=True)
        if self._device_augmentation is not None:
            images = (augment_batch if self._whole_images else recolour)(images, self._device_augmentation, seeds)
        images = self._standardise(images)
        n, g = len(images), self._grid
        if g:
            side = images.shape[-1] // g
            cells = images[..., : g * side, : g * side].unflatten(3, (g, side)).unflatten(2, (g, side))
            images = cells.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)  # [2n * P, 3, s', s']
        images = images.contiguous(
            memory_format=torch.channels_last if self._channels_last else torch.contiguous_format
        )
        return images.unflatten(0, (n, g * g)) if g else images


class LabelledLoader:
    """One view (RandomResizedCrop and flip) of each training image, with its label: for linear probes and fine-tuning.

    Order and views are functions of (seed, epoch, place in the epoch), as in :class:`TrainLoader`, and unreadable
    images are replaced, with their labels, and counted.

    Args:
        data: whose ``train`` split is shown.
        batch_size: images of one rank's batch, at least 2.
        fraction: share of each class's images that is used, the same ones in every epoch; at least one a class.
        crop_min: smallest share of an image's area that a view shows.

    Raises:
        ValueError: an argument out of its range, or fewer than two images a rank.
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
        device: torch.device = _CPU,
        fraction: float = 1.0,
        crop_min: float = 0.08,
    ) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction: expected a share of the labels in (0, 1], got {fraction}")
        if not 0 < crop_min <= 1:
            raise ValueError(f"crop_min: expected a share of the area in (0, 1], got {crop_min}")
        members = None
        if fraction < 1:
            members = stratified_split(data.train.labels, fraction, int(hash_seeds(seed)), at_least=1)[1]
        images = len(data.train) if members is None else len(members)
        self._plan = EpochBatchSampler(images, batch_size, seed=seed, rank=rank, world=world, members=members)
        self._labels, self._device, self._standardise = data.train.labels, device, Standardise(data, device)
        augmentation = Augmentation.supervised(data.size, crop_min=crop_min, flip_p=0.5 if data.flip else 0.0)
        dataset = ViewDataset(data.train, augmentation, colour=True, members=members)
        self._loader = _ViewLoader(dataset, self._plan, two_views=False, workers=workers, pin=device.type == "cuda")

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch."""
        return self._plan.steps_per_epoch

    @property
    def skipped(self) -> int:
        """Images that could not be decoded so far."""
        return self._loader.skipped

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Of 0-based ``epoch``: images float32 [n, 3, s, s], standardised, and labels int64 [n], both on the device."""
        for _, views in self._loader.batches(epoch, 0):
            images = self._standardise(views.images.to(self._device, non_blocking=True))
            labels = self._labels[views.index]
            yield images.contiguous(), labels.to(self._device, non_blocking=True)


class Standardise:
    """uint8, or float32 in [0, 1], [N, C, H, W] -> float32 [N, 3, H, W], standardised as ``data`` says.

    Its constants wait on the device: made from numbers at every step, they would make the GPU wait.
    """

    def __init__(self, data: ImageData, device: torch.device) -> None:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (data.mean, data.std))
        self.shift, self.scale = (-mean / std).to(device), (1 / std).to(device)
        self.byte_scale = self.scale / 255

    def __call__(self, images: Tensor) -> Tensor:
        scale = self.byte_scale if images.dtype == torch.uint8 else self.scale
        return torch.addcmul(self.shift, images.float(), scale).expand(-1, 3, -1, -1)


class _ViewLoader:
    """torch's DataLoader over a plan's batches; counts the images that could not be read.

    A plan's position is two numbers, so resuming needs no state of the loader's own (as torchdata's loader keeps, which
    a run with another number of workers cannot load): the sampler starts there.
    """

    def __init__(
        self, dataset: ViewDataset, plan: EpochBatchSampler, *, two_views: bool, workers: int, pin: bool
    ) -> None:
        if workers < 0:
            raise ValueError(f"workers: expected 0 or more processes, got {workers}")
        self.skipped, self._warned = 0, False
        self._requests = _Requests(plan, two_views)
        self._loader = DataLoader(
            dataset,
            batch_sampler=self._requests,
            collate_fn=_as_it_is,
            num_workers=workers,
            worker_init_fn=leave_signals_to_parent,
            persistent_workers=workers > 0,
            pin_memory=pin,
            generator=torch.Generator(),  # the workers' seeds, which nothing here uses; else the global one would move
        )

    def batches(self, epoch: int, first_step: int) -> Iterator[tuple[MicroBatch, Views]]:
        self._requests.epoch, self._requests.first_step = epoch, first_step
        micro_batches = self._requests.plan.micro_batches(epoch, first_step)
        for micro, views in zip(micro_batches, self._loader, strict=True):
            if isinstance(views, ValueError):
                raise views
            if views.unreadable and not self._warned:
                self._warned = True
                warnings.warn(
                    f"data: {views.reason}; another image takes its place (further ones are counted, not named)",
                    stacklevel=3,
                )
            self.skipped += len(set(views.unreadable) & set(micro.index.tolist()))  # keys are another rank's queries
            yield micro, views


class _Requests:
    """A batch sampler: what the workers are to make, batch by batch."""

    def __init__(self, plan: EpochBatchSampler, two_views: bool) -> None:
        self.plan, self.two_views, self.epoch, self.first_step = plan, two_views, 0, 0

    def __iter__(self) -> Iterator[Request]:
        for micro in self.plan.micro_batches(self.epoch, self.first_step):
            rows = [(micro.index, micro.seeds), (micro.key_index, micro.key_seeds)][: 1 + self.two_views]
            yield [pair for index, seeds in rows for pair in zip(index.tolist(), seeds.tolist(), strict=True)]


def _as_it_is(views: Any) -> Any:
    return views
