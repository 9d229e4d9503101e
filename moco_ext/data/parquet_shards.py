"""Images in a column of Parquet files, such as data sets of the Hugging Face hub. Needs pyarrow."""

from __future__ import annotations

import collections
import functools
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from .files import IMAGE_COLUMNS, LABEL_COLUMNS, whole_numbers
from .urls import open_file

_CACHE_BYTES = 256 * 2**20  # decompressed row groups of a process
_OPEN_FILES = 16


class ParquetShards:
    """The images of Parquet files. Reading one decompresses its row group's column of images.

    A process keeps the row groups that it has read last, up to 256 MiB. So reading in order is fast, and at random it
    costs a row group an image.
    """

    def __init__(self, urls: Sequence[str], columns: Sequence[str], row_groups: Sequence[Sequence[int]]) -> None:
        """``columns`` and ``row_groups``: of each file, the column of the images and the rows of each row group."""
        self.urls, self.columns = list(urls), list(columns)
        self.groups = [(file, number) for file, sizes in enumerate(row_groups) for number in range(len(sizes))]
        self.starts = np.cumsum([0, *(rows for sizes in row_groups for rows in sizes)])
        self.file_starts = np.cumsum([0, *(sum(sizes) for sizes in row_groups)])
        self._start_caches()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict:  # for workers that are not forked
        return {name: value for name, value in self.__dict__.items() if name not in ("_file", "_cache")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._start_caches()

    def _start_caches(self) -> None:
        self._file = functools.lru_cache(_OPEN_FILES)(self._open)
        self._cache: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def content(self, row: int) -> bytes:
        """An encoded image. Raises an OSError if the file cannot be read, a ValueError without an image in this row."""
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        content = self._images(group)[row - int(self.starts[group])].as_py()
        if content is None:
            raise ValueError("no bytes in this row")
        return content

    def name(self, row: int) -> str:
        """``FILE/ROW``."""
        file = int(np.searchsorted(self.file_starts, row, side="right")) - 1
        return f"{self.urls[file]}/{row - int(self.file_starts[file])}"

    def _images(self, group: int) -> Any:
        """The encoded images of a row group."""
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        file, number = self.groups[group]
        # The process is part of the key: after a fork, files share a position, and file systems do not work.
        table = self._file(file, os.getpid()).read_row_group(number, columns=[self.columns[file]], use_threads=False)
        self._cache[group] = table.flatten().column(0)
        while len(self._cache) > 1 and sum(kept.nbytes for kept in self._cache.values()) > _CACHE_BYTES:
            self._cache.popitem(last=False)
        return self._cache[group]

    def _open(self, file: int, process: int) -> Any:
        import pyarrow.parquet as parquet

        return parquet.ParquetFile(open_file(self.urls[file]))


def image_column(url: str) -> str | None:
    """The column of encoded images of a Parquet file; None if it has none, as a list of paths.

    Raises:
        ValueError: pyarrow is not installed, the file is not Parquet, or several columns hold bytes and
            their names do not tell which are the images.
    """
    return column_of_images(_open_parquet(url).schema_arrow, url)


def column_of_images(schema: Any, url: str) -> str | None:
    """The same of a schema of Arrow."""
    found = [column for field in schema if (column := _bytes_of(field)) is not None]
    if len(found) > 1:  # with masks, for example
        found = [column for column in found if column.partition(".")[0].lower() in IMAGE_COLUMNS] or found
    if len(found) > 1:
        raise ValueError(f"data: expected one column of images in {url}, got {', '.join(found)}")
    return found[0] if found else None


def _bytes_of(field: Any) -> str | None:
    """The column of bytes in a field: itself, or ``NAME.bytes`` of a Hugging Face image."""
    import pyarrow as pa

    if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
        return field.name
    if pa.types.is_struct(field.type):
        inner = field.type.get_field_index("bytes")
        if inner >= 0 and _bytes_of(field.type.field(inner)) is not None:
            return f"{field.name}.bytes"
    return None


def read_footer(url: str) -> tuple[str, list[int], np.ndarray, list[str]]:
    """(column of images, rows of each row group, label of each row or -1, names of the labels) of a Parquet file."""
    column = image_column(url)
    if column is None:
        raise ValueError(f"data: expected a column of encoded images in {url}, got none")
    file = _open_parquet(url)
    rows = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    name = column_of_labels(file.schema_arrow)
    if name is None:
        return column, rows, np.full(sum(rows), -1, np.int32), []
    found = whole_numbers(file.read(columns=[name], use_threads=False).column(0))
    known = _class_names(file.schema_arrow, name)
    labels, values = encode_labels(_without_minus_1(found) if known else found)
    unknown = [value for value in values if not (isinstance(value, int) and 0 <= value < len(known))]
    if known and unknown:
        raise ValueError(f"data: expected labels 0 to {len(known) - 1} or -1 in {name} of {url}, got {unknown[0]!r}")
    return column, rows, labels, [known[value] if known else str(value) for value in values]


def column_of_labels(schema: Any) -> str | None:
    return next((field.name for field in schema if field.name.lower() in LABEL_COLUMNS), None)


def encode_labels(column: Any) -> tuple[np.ndarray, list]:
    """Each row's number in the list of values, or -1: int32 [N]; the values."""
    encoded = column.combine_chunks().dictionary_encode()
    return np.asarray(encoded.indices.fill_null(-1)).astype(np.int32), encoded.dictionary.to_pylist()


def _without_minus_1(column: Any) -> Any:
    """Null in place of -1, which Hugging Face's ``ClassLabel`` has for images without a label."""
    import pyarrow as pa
    import pyarrow.compute as compute

    if not pa.types.is_integer(column.type):
        return column
    return compute.if_else(compute.equal(column, -1), pa.scalar(None, column.type), column)


def _class_names(schema: Any, column: str) -> list[str]:
    """The names of a Hugging Face ``ClassLabel``."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return list(features[column]["names"])
    except (KeyError, TypeError, ValueError):
        return []


def _open_parquet(url: str) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"data: reading {url} needs pyarrow: pip install pyarrow") from None
    try:
        return parquet.ParquetFile(open_file(url))
    except pa.ArrowInvalid as error:
        raise ValueError(f"data: expected a Parquet file, got {url}: {error}") from None
