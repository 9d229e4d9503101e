"""Images in tar files, WebDataset's format, at random: an index of each shard, and reads of byte ranges."""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from ..runs.files import write_atomically
from .files import IMAGES, LABEL_COLUMNS
from .urls import Stamp, is_url, open_file, read_file, read_range, stamp

_VERSION = 1  # of the index files; others are built again
# np.load parses headers with ast, whose recursion counter all threads share in CPython 3.11: a rare SystemError.
_PARSER = threading.Lock()
_OPEN_FILES = 128  # of a process
_BLOCK = 512  # of tar


class TarIndex(NamedTuple):
    """Where the n images of a shard are.

    Attributes:
        headers: int64 [n] offset of each image's first header.
        offsets: int64 [n] offset of its content.
        sizes: int32 [n] its size.
        labels: int32 [n] index into ``names``; -1 without a label.
        names: labels as they are in the shard, such as ``"7"``.
    """

    headers: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]


class TarShards:
    """The images of tar files that have been indexed. 16 bytes of memory an image; names are read when asked for."""

    def __init__(self, urls: Sequence[str], stamps: Sequence[Stamp], indexes: Sequence[TarIndex]) -> None:
        self.urls, self.stamps = list(urls), list(stamps)
        self.starts = np.cumsum([0, *(len(index.sizes) for index in indexes)])
        # Tensors, as torch shares their memory with workers that are not forked.
        self.offsets = torch.from_numpy(np.concatenate([index.offsets for index in indexes]))
        self.sizes = torch.from_numpy(np.concatenate([index.sizes for index in indexes]))
        headers = [(index.offsets - index.headers).astype(np.int32) for index in indexes]
        self.header_sizes = torch.from_numpy(np.concatenate(headers))
        self._file = functools.lru_cache(_OPEN_FILES)(self._open)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getstate__(self) -> dict:  # for workers that are not forked
        return {name: value for name, value in self.__dict__.items() if name != "_file"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._file = functools.lru_cache(_OPEN_FILES)(self._open)

    def content(self, row: int) -> bytes:
        """An encoded image.

        Raises:
            OSError: the shard cannot be read.
            ValueError: the shard has changed since it was indexed.
        """
        offset, size = int(self.offsets[row]), int(self.sizes[row])
        return self._read(self._shard(row), offset, size)

    def name(self, row: int) -> str:
        """``SHARD/MEMBER``; with the offset instead of the member if its header can no longer be read."""
        shard, offset, size = self._shard(row), int(self.offsets[row]), int(self.header_sizes[row])
        try:
            header = io.BytesIO(self._read(shard, offset - size, size))
            with tarfile.open(fileobj=header, mode="r:") as tar:
                member = tar.next()
            assert member is not None
            return f"{self.urls[shard]}/{member.name.removeprefix('./')}"
        except (OSError, ValueError, tarfile.TarError):
            return f"{self.urls[shard]}@{offset}"

    def _shard(self, row: int) -> int:
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        if is_url(self.urls[shard]):
            content = read_range(self.urls[shard], offset, offset + size)
        else:
            content = os.pread(self._file(shard).number, size, offset)
        if len(content) != size:
            raise ValueError(f"{len(content)} of {size} bytes at offset {offset}")
        return content

    def _open(self, shard: int) -> _OpenFile:
        file = _OpenFile(self.urls[shard])
        status = os.fstat(file.number)
        if (status.st_size, status.st_mtime_ns) != self.stamps[shard]:
            raise ValueError("the shard has changed since it was indexed")
        return file


class _OpenFile:
    """A descriptor that is closed when nothing uses it. ``pread`` moves no position, so forked workers may share it."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def index_of(
    url: str,
    read: Callable[[BinaryIO, str], TarIndex] | None = None,
    last_fits: Callable[[str, TarIndex], bool] | None = None,
) -> tuple[Stamp, TarIndex]:
    """The index of a shard: the one next to it if that fits, otherwise a new one, which is saved if it can be.

    An index fits if the shard has the size and the modification time that it had when it was indexed. At a URL, whose
    files have another time than their originals, it fits if the shard has the same size and its last image is where the
    index says. ``read`` makes a new one, and ``last_fits`` looks at the last image: of another format than tar.

    Raises:
        ValueError: no complete, uncompressed tar file.
        OSError: it cannot be read.
    """
    found = stamp(url)
    index = _saved(url, found, last_fits or _last_fits)
    if index is None:
        with open_file(url) as file:
            index = (read or _read_headers)(file, url)
        if is_url(url):
            read_range(url, 0, 1)  # or an error, before the training
        else:
            _save(url, found, index)
    return found, index


def index_path(url: str) -> str:
    return f"{url}.index.npz"


def _saved(url: str, found: Stamp, last_fits: Callable[[str, TarIndex], bool]) -> TarIndex | None:
    try:
        content = read_file(index_path(url))
        if content is None:
            return None
        with _PARSER, np.load(io.BytesIO(content)) as saved:
            version, size, mtime_ns = saved["stamp"].tolist()
            arrays = {name: saved[name] for name in TarIndex._fields}
            # Each of 10,000 shards may have most of 10,000 classes.
            index = TarIndex(**arrays | {"names": tuple(map(sys.intern, arrays["names"].tolist()))})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # damaged, or of another program
        return None
    if version != _VERSION or size != found.size:
        return None
    fits = last_fits(url, index) if is_url(url) else mtime_ns == found.mtime_ns
    return index if fits else None


def _last_fits(url: str, index: TarIndex) -> bool:
    if not len(index.sizes):
        return True
    header, offset = int(index.headers[-1]), int(index.offsets[-1])
    try:
        with tarfile.open(fileobj=io.BytesIO(read_range(url, header, offset)), mode="r:") as tar:
            member = tar.next()
        return member is not None and member.size == index.sizes[-1]
    except tarfile.TarError:
        return False


def _save(url: str, found: Stamp, index: TarIndex) -> None:
    arrays = dict(zip(TarIndex._fields[:-1], index[:-1], strict=True))
    arrays |= {"names": np.array(index.names, np.str_), "stamp": np.array([_VERSION, *found], np.int64)}
    try:
        write_atomically(index_path(url), lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
    except OSError:  # a folder that is read-only: the next run builds it again
        return


def _read_headers(file: BinaryIO, url: str) -> TarIndex:
    images: list[tuple[int, int, int]] = []
    labels: list[int] = []
    number_of: dict[str, int] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for _, group in itertools.groupby(_regular_files(tar), lambda member: _key_and_extension(member)[0]):
                sample = list(group)
                found = _images_of(sample)
                label = _label_of(tar, sample) if found else None
                images += [(member.offset, member.offset_data, member.size) for member in found]
                number = -1 if label is None else number_of.setdefault(label, len(number_of))
                labels += [number] * len(found)
            end = tar.offset
        file.seek(end)
        if file.read(_BLOCK) != bytes(_BLOCK):  # tarfile takes a damaged header for the end
            raise ValueError(f"no header and no end of archive at byte {end:,}: damaged, or cut short")
        table = np.array(images, np.int64).reshape(-1, 3)
        if len(table) and table[:, 2].max() >= 2**31:
            raise ValueError(f"an image of {table[:, 2].max():,} bytes")
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise ValueError(f"data: expected a complete, uncompressed tar file, got {url}: {error}") from None
    headers, offsets, sizes = table.T
    return TarIndex(headers, offsets, sizes.astype(np.int32), np.array(labels, np.int32), tuple(number_of))


def _regular_files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        tar.members.clear()  # type: ignore[attr-defined]  # all headers so far, a kilobyte each
        if member.isreg() and not member.issparse() and not os.path.basename(member.name).startswith("."):
            yield member


def _key_and_extension(member: tarfile.TarInfo) -> tuple[str, str]:
    """WebDataset's: the key ends at the first dot of the file's name."""
    folder, name = os.path.split(member.name)
    stem, _, extension = name.partition(".")
    return os.path.join(folder, stem), extension.lower()


def _images_of(sample: list[tarfile.TarInfo]) -> list[tarfile.TarInfo]:
    """The image of a sample: ``jpg``, rather than ``seg.png``. A folder's archive has ``a.1.jpg`` and ``a.2.jpg``."""
    plain = [member for member in sample if f".{_key_and_extension(member)[1]}" in IMAGES]
    return plain[:1] or [member for member in sample if member.name.lower().endswith(IMAGES)]


def _label_of(tar: tarfile.TarFile, sample: list[tarfile.TarInfo]) -> str | None:
    by_extension = {_key_and_extension(member)[1]: member for member in sample}
    for extension in ("cls", "json"):
        file = tar.extractfile(by_extension[extension]) if extension in by_extension else None
        if file is None:
            continue
        text = file.read().decode("utf-8", "surrogateescape").strip()
        if extension == "cls":
            return text or None
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{by_extension[extension].name} is not JSON: {error}") from None
        values = [found.get(name) for name in (*LABEL_COLUMNS, "cls")] if isinstance(found, dict) else []
        label = next((value for value in values if isinstance(value, (str, int))), None)
        return None if label in (None, "") else str(label)
    return None
