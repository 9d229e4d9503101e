"""Images in chunks that ``litdata.optimize`` has written, at random. LitData itself is not needed.

All numbers are little-endian. A chunk: uint32 N; uint32 [N + 1] offsets of the items, and of their end; the items. An
item: uint32 [L] sizes of its leaves; the leaves. ``index.json`` lists the chunks, the type of each leaf
(``data_format``), and the keys that lead to it (``data_spec``: a tree of torch's pytree, as JSON). Flat items of bytes,
numbers and text are rows of Arrow instead: then all offsets are equal, and after them are a file of Arrow, its size,
uint32, and a mark.
"""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .files import IMAGE_COLUMNS, LABEL_COLUMNS, whole_numbers
from .parquet_shards import column_of_images, column_of_labels, encode_labels
from .tar_shards import TarIndex, TarShards, index_of
from .urls import Stamp, is_url, read_file, read_range

_INDEX = "index.json"
_IMAGES = ("bytes", "file", "image", "jpeg", "pil")  # types of leaves; pil: not encoded
_LABELS = ("int", "str", "text")
_ARROW_MARK = b"LDARW01\0"


class ChunkShards(TarShards):
    """The images of chunks that have been indexed; ``pixels``: of each chunk, whether they are not encoded."""

    def __init__(
        self, urls: Sequence[str], stamps: Sequence[Stamp], indexes: Sequence[TarIndex], pixels: Sequence[bool]
    ) -> None:
        super().__init__(urls, stamps, indexes)
        self.pixels = list(pixels)

    def content(self, row: int) -> bytes:
        content = super().content(row)
        return _encoded(content) if self.pixels[self._shard(row)] else content

    def name(self, row: int) -> str:
        """``CHUNK/ITEM``."""
        shard = self._shard(row)
        return f"{self.urls[shard]}/{row - int(self.starts[shard])}"


def chunks_among(paths: Sequence[str]) -> list[str]:
    """The chunks that the ``index.json`` among a folder's files lists, in its order; none if there are no chunks.

    Raises:
        ValueError: chunks without an index.
    """
    for path in paths:
        folder, _, name = path.rpartition("/")
        if name == _INDEX and (index := _read_index(folder)):
            return [f"{folder}/{chunk['filename']}" for chunk in index["chunks"]]
    if chunk := next((path for path in paths if re.search(r"(^|/)chunk-\d+-\d+(\.\w+)*\.bin$", path)), None):
        raise ValueError(f"data: expected {_INDEX} next to {chunk}, got none; has litdata.optimize finished?")
    return []


class ItemFormat(NamedTuple):
    """The leaves of a folder's items: the last key that leads to each, empty in tuples and lists, and its type."""

    folder: str
    keys: list[str]
    types: list[str]

    def image(self) -> int:
        """Which leaf is the image. Raises a ValueError unless there is one."""
        images = [leaf for leaf, kind in enumerate(self.types) if kind in _IMAGES]
        if len(images) > 1:  # with masks, for example
            images = [leaf for leaf in images if self.keys[leaf].lower() in IMAGE_COLUMNS]
        if len(images) != 1:
            found = ", ".join(f"{key} {kind}".strip() for key, kind in zip(self.keys, self.types, strict=True))
            raise ValueError(f"data: expected one of {', '.join(_IMAGES)} in an item of {self.folder}, got {found}")
        return images[0]

    def label(self) -> int | None:
        """Which leaf is the label: by its key, or the second one of a pair."""
        if self.keys == ["", ""] and self.types[1] == "int":
            return 1
        labels = (leaf for leaf, kind in enumerate(self.types) if kind in _LABELS)
        return next((leaf for leaf in labels if self.keys[leaf].lower() in LABEL_COLUMNS), None)


def item_format(folder: str) -> ItemFormat:
    """Raises a ValueError if the chunks of a folder are compressed, encrypted, or not of trees of leaves."""
    config = (_read_index(folder) or {}).get("config", {})
    for name in ("compression", "ipc_compression", "encryption"):
        if config.get(name):
            raise ValueError(f"data: expected chunks without {name} in {folder}, got {config[name]!r}")
    loader = config.get("item_loader", "PyTreeLoader")
    if loader != "PyTreeLoader" or not (config.get("data_spec") and config.get("data_format")):
        raise ValueError(f"data: expected chunks for LitData's PyTreeLoader in {folder}, got some for {loader}")
    keys = list(_keys(json.loads(config["data_spec"])[1]))
    return ItemFormat(folder, keys, [str(kind).partition(":")[0] for kind in config["data_format"]])


def index_of_chunk(url: str, known: ItemFormat) -> tuple[Stamp, TarIndex, bool]:
    """The index of a chunk, as :func:`.tar_shards.index_of`; and whether its images are not encoded.

    Raises:
        ValueError: the chunk is damaged, its rows of Arrow are compressed, or an item has no image, or several.
    """

    def last_fits(url: str, index: TarIndex) -> bool:
        n = len(index.headers)
        return read_range(url, 0, 4) == _number(n) and read_range(url, 4 * n, 4 * n + 4) == _number(index.headers[-1])

    stamp, index = index_of(url, lambda file, url: _read_chunk(file, url, known), last_fits)
    return stamp, index, "pil" in known.types and known.types[known.image()] == "pil"


def _number(value: int | np.integer) -> bytes:
    return int(value).to_bytes(4, "little")


def _read_index(folder: str) -> dict[str, Any] | None:
    """``index.json``; None if there is none, or one of something else."""
    try:
        index = json.loads(read_file(f"{folder}/{_INDEX}") or b"")
    except ValueError:
        return None
    is_of_chunks = isinstance(index, dict) and isinstance(index.get("chunks"), list) and "config" in index
    return index if is_of_chunks else None


def _keys(node: dict[str, Any], key: str = "") -> Iterator[str]:
    """The last key that leads to each leaf of a tree; empty in tuples and lists."""
    if node["type"] is None:
        yield key
        return
    children = node["children_spec"]
    keys = json.loads(node["context"] or "null")
    named = isinstance(keys, list) and len(keys) == len(children)
    for place, child in enumerate(children):
        yield from _keys(child, str(keys[place]) if named else "")


def _read_chunk(file: BinaryIO, url: str, known: ItemFormat) -> TarIndex:
    def read(start: int, size: int) -> bytes:
        file.seek(start)
        content = file.read(size)
        if len(content) != size:
            raise ValueError(f"{len(content)} of {size} bytes at offset {start:,}")
        return content

    def read_items(edges: list[int]) -> Iterator[tuple[int, int, str | None]]:
        image, label, head = known.image(), known.label(), 4 * len(known.types)
        for start, end in itertools.pairwise(edges):
            sizes = np.frombuffer(read(start, head), "<u4").tolist()
            starts = list(itertools.accumulate(sizes, initial=start + head))
            if starts[-1] != end:
                raise ValueError(
                    f"an item of {end - start:,} bytes at offset {start:,} whose leaves end at {starts[-1]:,}"
                )
            text = None
            if label is not None:
                content = read(starts[label], sizes[label])
                number = known.types[label] == "int"
                text = str(int.from_bytes(content, "little", signed=True)) if number else content.decode()
            yield starts[image], sizes[image], text

    try:
        n = int.from_bytes(read(0, 4), "little")
        edges = np.frombuffer(read(4, 4 * n + 4), "<u4").astype(np.int64)
        if n and edges[0] == edges[-1]:
            offsets, sizes, labels, names = _arrow_rows(file, url)
        else:
            found, texts = [], []
            for offset, size, text in read_items(edges.tolist()):
                found.append((offset, size))
                texts.append(text)
            if n:
                read(int(edges[-1]) - 1, 1)  # which a chunk that is cut short lacks
            offsets, sizes = np.array(found, np.int64).reshape(-1, 2).T
            number_of = {text: number for number, text in enumerate(dict.fromkeys(filter(None, texts)))}
            labels = np.array([number_of[text] if text else -1 for text in texts], np.int32)
            names = list(number_of)
        if len(offsets) != n:
            raise ValueError(f"{len(offsets):,} images in {n:,} items")
    except ValueError as error:
        why = str(error).removeprefix("data: ")
        raise ValueError(f"data: expected a complete chunk of LitData with images, got {url}: {why}") from None
    return TarIndex(edges[:-1], offsets, sizes.astype(np.int32), labels, tuple(names))


def _arrow_rows(file: BinaryIO, url: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Offset and size of each image, each row's label, -1 without, and their names. Arrow stores images as they are."""
    try:
        import pyarrow as pa
    except ImportError:
        raise ValueError("rows of Arrow, which need pyarrow: pip install pyarrow") from None
    file.seek(0)
    whole = pa.py_buffer(file.read()) if is_url(url) else pa.memory_map(url).read_buffer()
    end = len(whole) - len(_ARROW_MARK) - 4
    tail = whole[max(end, 0) :].to_pybytes()
    size = int.from_bytes(tail[:4], "little")
    if tail[4:] != _ARROW_MARK or not 0 < size <= end:
        raise ValueError("neither items nor rows of Arrow")
    table = pa.ipc.open_file(whole[end - size : end]).read_all()
    column = column_of_images(table.schema, url)
    if column is None:
        raise ValueError(f"expected a column of images, got {', '.join(table.column_names)}")
    offsets, sizes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for part in table.flatten()[column].chunks:
        _, positions, content = part.buffers()
        position = np.int64 if pa.types.is_large_binary(part.type) else np.int32
        edges = np.frombuffer(positions, position)[part.offset : part.offset + len(part) + 1].astype(np.int64)
        first = 0 if content is None else content.address - whole.address
        if not 0 <= first < len(whole):
            raise ValueError("its rows are compressed")
        offsets.append(first + edges[:-1])
        sizes.append(np.diff(edges))
    name = column_of_labels(table.schema)
    if name is None:
        return np.concatenate(offsets), np.concatenate(sizes), np.full(len(table), -1, np.int32), []
    labels, values = encode_labels(whole_numbers(table[name]))
    return np.concatenate(offsets), np.concatenate(sizes), labels, [str(value) for value in values]


def _encoded(pixels: bytes) -> bytes:
    """An image of PIL, uint32 [3] width, height and length of its mode, mode, pixels, in a format that keeps them."""
    from PIL import Image

    width, height, length = np.frombuffer(pixels[:12], "<u4").tolist()
    mode = pixels[12 : 12 + length].decode()
    file = io.BytesIO()
    image = Image.frombytes(mode, (width, height), pixels[12 + length :])
    image.save(file, "PPM" if mode in ("L", "RGB") else "TIFF")
    return file.getvalue()
