"""From a list of (image, seed) to a batch of views: what a loader's workers do."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .augment import Augmentation, augment_batch, file_crops, recolour
from .datasets import Split, TensorSplit
from .images import UnreadableImageError, read_image
from .seeds import hash_seeds

Request = list[tuple[int, int]]  # (position in the split, view's seed) of each row


class Views(NamedTuple):
    """What a worker hands over.

    Attributes:
        images: [rows, C, H, W] uint8, or float32 in [0, 1]; not standardised: bytes travel better.
        index: [rows] int64 position of the image that each row really shows.
        unreadable: positions whose files could not be decoded, each once.
        reason: why the first of them could not, or empty.
    """

    images: Tensor
    index: Tensor  # type: ignore[assignment]  # a tuple has a method of that name
    unreadable: list[int]
    reason: str


class ViewDataset(Dataset):
    """Views of a split's images, a whole batch at a time; an image is read once, however many rows show it.

    An unreadable file is replaced by another of ``members``, found by hashing its position: every process that meets
    it, for the query or for the key, takes the same one.

    Args:
        members: int64 [M] positions in the split that may take its place; None: all.
        colour: whether what follows the crop is done here too.
    """

    def __init__(self, split: Split, augmentation: Augmentation, colour: bool, members: Tensor | None = None) -> None:
        self.split, self.augmentation, self.colour, self.members = split, augmentation, colour, members

    def __getitems__(self, request: Request) -> Views | ValueError:
        """The views; or an error, to be raised where it can be read: out of a worker it would come as a traceback."""
        index, seeds = torch.tensor(request, dtype=torch.int64).unbind(1)
        if isinstance(self.split, TensorSplit):
            images = self.split.images[index]
            if self.colour:
                images = augment_batch(images, self.augmentation, seeds)
            return Views(images, index, [], "")
        try:
            return self._from_files(index, seeds)
        except ValueError as error:
            return error

    def _from_files(self, index: Tensor, seeds: Tensor) -> Views:
        rows_of: dict[int, list[int]] = {}
        for row, position in enumerate(index.tolist()):
            rows_of.setdefault(position, []).append(row)
        size = self.augmentation.size
        images = torch.empty(len(index), 3, size, size, dtype=torch.uint8)
        shown, reason = index.clone(), ""
        unreadable: list[int] = []
        for position, rows in rows_of.items():
            try:
                image = read_image(self._path(position))
            except UnreadableImageError as error:
                unreadable.append(position)
                reason = reason or str(error)
                if len(unreadable) > len(rows_of) / 2:
                    raise ValueError(
                        f"data: expected images, got a batch of {len(rows_of)} of which more than half are unreadable; "
                        f"the first: {reason}"
                    ) from None
                image, shown[rows] = self._substitute(position)
            for row, view in zip(rows, file_crops(image, self.augmentation, seeds[rows]), strict=True):
                images[row] = view
        if self.colour:
            images = recolour(images, self.augmentation, seeds)
        return Views(images, shown, unreadable, reason)

    def _substitute(self, position: int) -> tuple[Tensor, int]:
        candidates = len(self.split) if self.members is None else len(self.members)
        for attempt in range(100):  # half the files may be broken: 100 in a row are not, but for a broken disk
            place = int(hash_seeds(position, attempt)) % candidates
            other = place if self.members is None else int(self.members[place])
            try:
                return read_image(self._path(other)), other
            except UnreadableImageError as error:
                reason = error
        raise ValueError(f"data: expected images, got 100 unreadable files in a row; the last: {reason}")

    def _path(self, position: int) -> str:
        assert not isinstance(self.split, TensorSplit)
        return self.split.dataset.samples[position][0]
