"""Images in shards: tar files (WebDataset), Parquet files and chunks of LitData, on disk or at URLs, read at random."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..distributed import rank, world_size
from .files import IMAGES
from .images import decode
from .litdata_chunks import ChunkShards, chunks_among, index_of_chunk, item_format
from .parquet_shards import ParquetShards, image_column, read_footer
from .tar_shards import TarShards, index_of
from .urls import expand, files_in, is_url, read_file

MANIFEST = "shards.json"  # next to the shards that moco-ext shard writes
_FORMATS = (".tar", ".parquet")
_TEST = ("val", "valid", "validation")
_THREADS = 16  # that open shards: at a URL each takes several requests


@dataclasses.dataclass(frozen=True, eq=False)
class ShardSplit:
    """Images in shards.

    Attributes:
        shards: where the images are.
        labels: int64 [N], -1 where there are no classes.
        rows: int64 [N] the images' positions in ``shards``, ascending; None: all of them.
    """

    shards: TarShards | ParquetShards
    labels: Tensor
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def starts(self) -> np.ndarray:
        """Position of the first image of each shard (Parquet: row group), and N: int64 [S + 1]."""
        return self.shards.starts if self.rows is None else np.searchsorted(self.rows.numpy(), self.shards.starts)

    def name(self, position: int) -> str:
        """The shard and the image in it, as a path."""
        return self.shards.name(self._row(position))

    def open(self, position: int) -> BinaryIO:
        """The encoded image."""
        return io.BytesIO(self.shards.content(self._row(position)))

    def read(self, position: int) -> Tensor:
        """Decode an image: uint8 [3, H, W]. Raises an :class:`UnreadableImageError` if it cannot be."""
        return decode(lambda: self.open(position), lambda: self.name(position))

    def take(self, rows: Tensor) -> ShardSplit:
        """The images at the positions ``rows``, int64 [M]; ascending, unless ``starts`` is not used."""
        return ShardSplit(self.shards, self.labels[rows], rows if self.rows is None else self.rows[rows])

    def _row(self, position: int) -> int:
        return position if self.rows is None else int(self.rows[position])


class OpenShards(NamedTuple):
    """Shards, with the label of each image (index into ``names``, or -1).

    Attributes:
        labels: int32 [N].
        names: class names; empty unless every image has a label.
    """

    shards: TarShards | ParquetShards
    labels: np.ndarray
    names: tuple[str, ...]

    def split(self, classes: Sequence[str]) -> ShardSplit:
        """All images, with their labels as indexes into ``classes``; without classes the labels take no memory."""
        if not (classes and self.names):
            return ShardSplit(self.shards, torch.tensor([-1]).expand(len(self.labels)))
        number_of = {name: label for label, name in enumerate(classes)}
        lookup = np.array([number_of[name] for name in self.names], np.int64)
        return ShardSplit(self.shards, torch.from_numpy(lookup[self.labels]))


def find_shards(source: str) -> tuple[list[str], list[str]] | None:
    """The shards that a path, a URL or a pattern names, of training and of test images; None if it names none.

    A folder is one of shards if it has shards, and neither images nor folders, or LitData's ``index.json``. Test images
    are in ``val/``, ``valid/`` or ``validation/``, next to ``train/``, or in shards named like that: ``train-0.tar``,
    ``val-0.tar``.

    Raises:
        ValueError: a pattern without files, tar files next to Parquet files, or shards that are not complete.
    """
    paths = expand(source)
    if all(path.lower().endswith(_FORMATS) and (is_url(path) or not os.path.isdir(path)) for path in paths):
        return (paths, []) if _are_shards(paths) else None
    if len(paths) != 1:
        return None
    folder = paths[0].rstrip("/")
    if train := _shards_in(f"{folder}/train"):
        return train, next((found for name in _TEST if (found := _shards_in(f"{folder}/{name}"))), [])
    found = _shards_in(folder)
    parts = {path: re.match(r"(train|test|val|valid|validation)[-_.]", os.path.basename(path)) for path in found}
    if any(part and part[1] == "train" for part in parts.values()):
        test = [path for path, part in parts.items() if part and part[1] in _TEST]
        return [path for path, part in parts.items() if part and part[1] == "train"], test
    return (found, []) if found else None


def open_shards(urls: Sequence[str]) -> OpenShards:
    """Open shards, building the indexes that are missing.

    Raises:
        ValueError: a shard does not exist, is damaged, or they hold no images.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        suffix = os.path.splitext(urls[0].lower())[1]
        folders = [url.rpartition("/")[0] for url in urls]
        formats = {folder: item_format(folder) for folder in set(folders) if suffix == ".bin"}
        read: dict[str, Callable[[str], Any]] = {
            ".parquet": read_footer,
            ".bin": lambda url: index_of_chunk(url, formats[url.rpartition("/")[0]]),
        }
        # Each process of a group begins elsewhere: later it finds the indexes that the others have saved.
        first = rank() * len(urls) // world_size()
        parts = list(pool.map(_existing(read.get(suffix, index_of)), [*urls[first:], *urls[:first]]))
        parts = parts[len(urls) - first :] + parts[: len(urls) - first]
    manifest = {folder: _classes_in(folder) for folder in set(folders)}
    shards: TarShards | ParquetShards
    labels: list[np.ndarray] = []
    named: list[Sequence[str]] = []
    if suffix == ".parquet":
        columns, row_groups, labels, named = (list(part) for part in zip(*parts, strict=True))
        shards = ParquetShards(urls, columns, row_groups)
    else:
        stamps, indexes, *pixels = (list(part) for part in zip(*parts, strict=True))
        shards = ChunkShards(urls, stamps, indexes, *pixels) if pixels else TarShards(urls, stamps, indexes)
        labels, named = [index.labels for index in indexes], [index.names for index in indexes]
    if not len(shards):
        raise ValueError(f"data: expected images in {urls[0]}{' and others' if len(urls) > 1 else ''}, got none")
    named = [_translated(names, manifest[url.rpartition("/")[0]], url) for url, names in zip(urls, named, strict=True)]
    names = sorted_names({name for some in named for name in some})
    number_of = {name: number for number, name in enumerate(names)}
    lookups = [np.array([*(number_of[name] for name in some), -1], np.int32) for some in named]  # -1 stays -1
    merged = np.concatenate([lookup[own] for lookup, own in zip(lookups, labels, strict=True)])
    return OpenShards(shards, merged, names if merged.min() >= 0 else ())


def sorted_names(names: set[str]) -> tuple[str, ...]:
    """Class names in order: numbers by value, other names like a folder's."""
    return tuple(sorted(names, key=int if all(name.isdecimal() for name in names) else None))


def _existing(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def checked(url: str) -> Any:
        try:
            return read(url)
        except FileNotFoundError:
            raise ValueError(f"data: expected a shard {url}, got no such file") from None

    return checked


def _translated(names: Sequence[str], classes: Sequence[str], url: str) -> Sequence[str]:
    """The labels of a shard as class names: with a manifest they are indexes into its classes."""
    if not classes:
        return names
    by_number = dict(enumerate(classes))  # in a list, -1 would be the last class
    try:
        return [by_number[int(name)] for name in names]
    except (ValueError, KeyError):
        raise ValueError(f"data: expected labels 0 to {len(classes) - 1} of {MANIFEST} in {url}, got {names}") from None


def _classes_in(folder: str) -> list[str]:
    content = read_file(f"{folder}/{MANIFEST}" if folder else MANIFEST)
    return [] if content is None else list(_manifest(content, folder).get("classes", []))


def _manifest(content: bytes, folder: str) -> dict:
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError):
        raise ValueError(f"data: expected a JSON object in {folder}/{MANIFEST}, got something else") from None


def _shards_in(folder: str) -> list[str]:
    """The shards of a folder of shards; of any other folder none."""
    paths = files_in(folder)
    if chunks := chunks_among(paths):
        return chunks
    found = [path for path in paths if path.lower().endswith(_FORMATS)]
    if not found or any(path.lower().endswith(IMAGES) for path in paths):
        return []
    if not is_url(folder) and any(os.path.isdir(path) for path in paths):
        return []
    if not _are_shards(found):
        return []
    content = read_file(f"{folder}/{MANIFEST}")
    expected = len(found) if content is None else _manifest(content, folder).get("shards", len(found))
    if len(found) != expected:
        raise ValueError(
            f"data: expected {expected} shards in {folder}, got {len(found)}; moco-ext shard has not finished"
        )
    return found


def _are_shards(paths: Sequence[str]) -> bool:
    """Whether the files are shards, and not lists of paths in Parquet."""
    formats = {os.path.splitext(path.lower())[1] for path in paths}
    if len(formats) > 1:
        raise ValueError(f"data: expected tar files or Parquet files, got both, such as {paths[0]} and {paths[-1]}")
    if formats == {".tar"}:
        return True
    return (is_url(paths[0]) or os.path.exists(paths[0])) and image_column(paths[0]) is not None
