"""Batches of (query view, key view), float32 [B, 3, size, size] each, epoch by epoch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .augment import Augmentation, TwoCropsTransform, augment_batch, image_transform
from .datasets import ImageData, TensorSplit, TransformedImages, normalize


def two_crop_batches(
    data: ImageData,
    augmentation: Augmentation,
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled ``(im_q, im_k)``; the last batch may be short, never of one image.

    Order and augmentations depend on ``(seed, epoch)`` alone, so that a resumed run sees what the
    uninterrupted one would have seen. Batch normalisation cannot train on a single image: a last batch of one
    is dropped.
    """
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
    order = torch.randperm(len(data.train), generator=generator)
    batches = [part for part in order.split(batch_size) if len(part) > 1 or batch_size == 1]
    if isinstance(data.train, TensorSplit):
        for indices in batches:
            images = data.train.images[indices]
            views = (augment_batch(images, augmentation, generator) for _ in range(2))
            im_q, im_k = (normalize(view, data.mean, data.std) for view in views)
            yield im_q, im_k
        return
    two_crops = TwoCropsTransform(image_transform(augmentation, data.mean, data.std))
    loader = DataLoader(
        TransformedImages(data.train.dataset, two_crops),
        batch_sampler=[part.tolist() for part in batches],
        num_workers=workers,
        generator=generator,
        pin_memory=torch.cuda.is_available(),
    )
    for (im_q, im_k), _ in loader:
        yield im_q, im_k


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed of its own for every epoch of every run, so that neighbouring seeds share no epoch."""
    return (seed * 1_000_003 + epoch) % 2**63
