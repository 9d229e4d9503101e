"""From a micro-batch of the sampler to its views: what the loader's workers do."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .augment import Augmentation, augment_batch, color_transform, file_crops, of_each_view
from .datasets import FileSplit, Split, TensorSplit
from .images import UnreadableImageError
from .sampler import MicroBatch
from .seeds import hash_seeds


class Views(NamedTuple):
    """The views of a micro-batch.

    Attributes:
        micro: the sampler's micro-batch of n images.
        images: [n or 2n, C, H, W] views of the queries, then of the keys: uint8, or float32 in [0, 1]; not normalized,
            since bytes are cheaper to transfer.
        index: [n or 2n] int64 position of the image that each row shows.
        unreadable: the files that could not be decoded, in whose place others are shown: why, by path.
    """

    micro: MicroBatch
    images: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple has a method of that name
    unreadable: dict[str, str]


class ViewDataset(Dataset):
    """Views of a split's images, indexed by micro-batch. A file is decoded once, however many rows show it.

    An unreadable file is replaced by another of ``members``, chosen by a hash of its position: every process that
    meets it, for the query or for the key, takes the same one.

    Args:
        color: apply all of the augmentation; otherwise only the crop, and to images in memory nothing.
        members: int64 [M] positions in the split that may replace an unreadable image; None: all.
    """

    def __init__(self, split: Split, augmentation: Augmentation, color: bool, members: Tensor | None = None) -> None:
        self.split, self.augmentation, self.color, self.members = split, augmentation, color, members

    def __getitem__(self, micro: MicroBatch) -> Views:
        """Make the views.

        Raises:
            UnreadableImageError: 100 files in a row.
        """
        index = torch.from_numpy(np.concatenate([micro.index, micro.key_index]))
        seeds = torch.from_numpy(np.concatenate([micro.seeds, micro.key_seeds]))
        if isinstance(self.split, TensorSplit):
            images = self.split.images[index]
            if self.color:
                images = of_each_view(augment_batch, images, self.augmentation, seeds)
            return Views(micro, images, index, {})
        images, index, unreadable = self._crops(self.split, index, seeds)
        if self.color:
            images = of_each_view(color_transform, images, self.augmentation, seeds)
        return Views(micro, images, index, unreadable)

    def _crops(self, split: FileSplit, index: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor, dict[str, str]]:
        rows_of: dict[int, list[int]] = {}
        for row, position in enumerate(index.tolist()):
            rows_of.setdefault(position, []).append(row)
        size = self.augmentation.size
        images = torch.empty(len(index), 3, size, size, dtype=torch.uint8)
        shown = index.clone()
        unreadable: dict[str, str] = {}
        for position, rows in rows_of.items():
            try:
                image = split.read(position)
            except UnreadableImageError as error:
                unreadable[split.name(position)] = str(error)
                image, shown[rows] = self._replacement(split, position)
            for row, view in zip(rows, file_crops(image, self.augmentation, seeds[rows]), strict=True):
                images[row] = view
        return images, shown, unreadable

    def _replacement(self, split: FileSplit, position: int) -> tuple[Tensor, int]:
        members = range(len(split)) if self.members is None else self.members
        for attempt in range(100):  # even if half of the files are damaged, 100 in a row mean a failing disk
            other = int(members[int(hash_seeds(position, attempt)) % len(members)])
            try:
                return split.read(other), other
            except UnreadableImageError as error:
                reason = error
        raise UnreadableImageError(f"data: expected images, got 100 unreadable files in a row; the last: {reason}")
