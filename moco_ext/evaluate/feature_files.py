"""Files of features: a row per image, its path and perhaps its label, and how the features were computed."""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..runs.files import read_json, write_atomically, write_json

SUFFIXES = (".parquet", ".npy", ".npz", ".safetensors")
DTYPES = ("float32", "float16")
_ROW_GROUP = 4096  # rows; with 2048 features, 32 MB
_KEY = "moco_ext"  # of the metadata


class Table(NamedTuple):
    """What a file of features holds.

    Attributes:
        blocks: the features in order, float32 or float16 [n, D] each, N in all.
        shape: (N, D).
        dtype: of the features.
        paths: of the N images.
        labels: class of each image, or None.
        metadata: how the features were computed.
    """

    blocks: Iterable[np.ndarray]
    shape: tuple[int, int]
    dtype: str
    paths: Sequence[str]
    labels: Sequence[str] | None
    metadata: dict[str, Any]


def check_output(path: Path) -> None:
    """Raise unless ``path`` has a known suffix and a folder, and the package that writes it is installed."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"output: expected a name that ends in one of {', '.join(SUFFIXES)}, got {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"output: no such folder: {path.parent}")
    if path.suffix == ".parquet":
        import pyarrow.parquet  # noqa: F401  # before hours of work


def write_table(path: Path, table: Table) -> None:
    """Write a file of features in the format of its suffix, a block at a time and atomically."""
    write: Callable[[BinaryIO, Table], None] = {
        ".parquet": _write_parquet,
        ".npy": _write_npy,
        ".npz": _write_npz,
        ".safetensors": _write_safetensors,
    }[path.suffix]
    write_atomically(path, lambda file: write(file, table))
    if path.suffix == ".npy":  # it has no place for anything else
        more = {"paths": list(table.paths), "labels": table.labels, "crc32": _crc32(np.load(path, mmap_mode="r"))}
        write_json(_sidecar(path), table.metadata | more)


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _crc32(features: np.ndarray) -> int:
    """Of the first rows: tells whether two files are of the same features."""
    return zlib.crc32(features[:100].tobytes())


def _write_parquet(file: BinaryIO, table: Table) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    number = pa.float16() if table.dtype == "float16" else pa.float32()
    fields = [("path", pa.string()), ("features", pa.list_(number, table.shape[1]))]
    if table.labels is not None:
        fields.insert(1, ("label", pa.string()))
    schema = pa.schema(fields, metadata={_KEY: json.dumps(table.metadata)})
    # Features do not compress.
    compression = {name: "none" if name == "features" else "zstd" for name in schema.names}
    start = 0
    with parquet.ParquetWriter(file, schema, compression=compression, use_dictionary=["label"]) as writer:
        for block in _of_rows(table.blocks, _ROW_GROUP):
            rows = slice(start, start + len(block))
            columns = {
                "path": pa.array(table.paths[rows], pa.string()),
                "features": pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1), number), table.shape[1]),
            }
            if table.labels is not None:
                columns["label"] = pa.array(table.labels[rows], pa.string())
            writer.write_table(pa.table([columns[name] for name in schema.names], schema=schema))
            start += len(block)


def _of_rows(blocks: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """The same rows in blocks of this size."""
    held: list[np.ndarray] = []
    for block in blocks:
        held.append(block)
        if sum(map(len, held)) >= rows:
            joined = np.concatenate(held)
            whole = len(joined) // rows * rows
            yield from (joined[start : start + rows] for start in range(0, whole, rows))
            held = [joined[whole:]]
    rest = np.concatenate(held)
    if len(rest):
        yield rest


def _write_npy(file: BinaryIO, table: Table) -> None:
    _write_array(file, table.blocks, table.shape, np.dtype(table.dtype))


def _write_array(file: Any, blocks: Iterable[np.ndarray], shape: tuple[int, ...], dtype: np.dtype) -> None:
    """An array in the format of ``np.save``, a block at a time."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(file, header)
    for block in blocks:
        file.write(np.ascontiguousarray(block, dtype).tobytes())


def _write_npz(file: BinaryIO, table: Table) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open("features.npy", "w", force_zip64=True) as entry:
            _write_array(entry, table.blocks, table.shape, np.dtype(table.dtype))
        texts = {"paths": table.paths, "metadata": [json.dumps(table.metadata)]}
        if table.labels is not None:
            texts["labels"] = table.labels
        for name, values in texts.items():
            dtype = np.dtype(f"<U{max(map(len, values), default=1) or 1}")
            blocks = (np.array(values[i : i + _ROW_GROUP], dtype) for i in range(0, len(values), _ROW_GROUP))
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                _write_array(entry, blocks, (len(values),), dtype)


def _write_safetensors(file: BinaryIO, table: Table) -> None:
    """By hand, as the safetensors package wants all values at once. Texts are UTF-8 JSON in tensors of bytes."""
    dtype = np.dtype(table.dtype)
    texts = {"paths": json.dumps(list(table.paths)).encode()}
    if table.labels is not None:
        texts["labels"] = json.dumps(list(table.labels)).encode()
    size = table.shape[0] * table.shape[1] * dtype.itemsize
    kind = "F16" if table.dtype == "float16" else "F32"
    header: dict[str, Any] = {"__metadata__": {_KEY: json.dumps(table.metadata)}}
    header["features"] = {"dtype": kind, "shape": table.shape, "data_offsets": [0, size]}
    for name, text in texts.items():
        header[name] = {"dtype": "U8", "shape": [len(text)], "data_offsets": [size, size + len(text)]}
        size += len(text)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(struct.pack("<Q", len(encoded)) + encoded)
    for block in table.blocks:
        file.write(np.ascontiguousarray(block, dtype).tobytes())
    for text in texts.values():
        file.write(text)


class FeatureFile:
    """A file of features that :func:`moco_ext.embed` has written.

    Attributes:
        path: the file.
        metadata: how the features were computed: weights, arch, fingerprint, head, normalized, transform, data.
        paths: of the N images.
        labels: class of each image, or None.
        dim: D.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of features, or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"features: no such file: {path}")
        if self.path.suffix not in SUFFIXES:
            raise ValueError(f"features: expected a file that ends in one of {', '.join(SUFFIXES)}, got {path}")
        read = {".parquet": _read_parquet, ".npy": _read_npy, ".npz": _read_npz, ".safetensors": _read_safetensors}
        try:
            self.metadata, self.paths, self.labels, self._blocks = read[self.path.suffix](self.path)
            self.dim = int(self.metadata["dim"])
            if len(self.paths) != self.metadata["images"]:
                raise ValueError(f"{len(self.paths)} paths of {self.metadata['images']} images")
        except ModuleNotFoundError:
            raise
        except Exception as error:  # readers raise anything on damaged files
            raise ValueError(
                f"features: expected a file of moco-ext embed, got {path}: {type(error).__name__}: {error}"
            ) from None

    def __len__(self) -> int:
        return len(self.paths)

    def blocks(self, rows: int = _ROW_GROUP) -> Iterator[Tensor]:
        """The features in order, float32 [<= rows, D] each."""
        for block in self._blocks(rows):
            yield torch.from_numpy(np.array(block, np.float32))


_Read = tuple[dict[str, Any], list[str], "list[str] | None", Callable[[int], Iterator[np.ndarray]]]


def _read_parquet(path: Path) -> _Read:
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    metadata = json.loads(file.schema_arrow.metadata[_KEY.encode()])
    columns = [name for name in ("path", "label") if name in file.schema_arrow.names]
    texts = file.read(columns=columns).to_pydict()

    def blocks(rows: int) -> Iterator[np.ndarray]:
        for batch in parquet.ParquetFile(path, pre_buffer=False).iter_batches(rows, columns=["features"]):
            values = batch.column(0)
            yield values.flatten().to_numpy(zero_copy_only=False).reshape(len(values), -1)

    return metadata, texts["path"], texts.get("label"), blocks


def _read_npy(path: Path) -> _Read:
    metadata = read_json(_sidecar(path))
    paths, labels = metadata.pop("paths"), metadata.pop("labels")
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.shape != (len(paths), metadata["dim"]) or _crc32(array) != metadata.pop("crc32"):
        raise ValueError(f"other features than {_sidecar(path)} describes")
    return metadata, paths, labels, lambda rows: (array[i : i + rows] for i in range(0, len(array), rows))


def _read_npz(path: Path) -> _Read:
    with np.load(path, allow_pickle=False) as archive:
        metadata = json.loads(str(archive["metadata"][0]))
        paths = archive["paths"].tolist()
        labels = archive["labels"].tolist() if "labels" in archive else None

    def blocks(rows: int) -> Iterator[np.ndarray]:
        with zipfile.ZipFile(path) as zipped, zipped.open("features.npy") as entry:
            np.lib.format.read_magic(entry)
            (count, dim), _, dtype = np.lib.format.read_array_header_2_0(entry)
            for start in range(0, count, rows):
                n = min(rows, count - start)
                yield np.frombuffer(entry.read(n * dim * dtype.itemsize), dtype).reshape(n, dim)

    return metadata, paths, labels, blocks


def _read_safetensors(path: Path) -> _Read:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        metadata = json.loads(file.metadata()[_KEY])
        texts = {name: json.loads(file.get_tensor(name).tobytes()) for name in file.keys() if name != "features"}  # noqa: SIM118

    def blocks(rows: int) -> Iterator[np.ndarray]:
        with safe_open(path, "np") as file:
            features = file.get_slice("features")
            count = len(texts["paths"])
            for start in range(0, count, rows):
                yield features[start : min(start + rows, count)]

    return metadata, texts["paths"], texts.get("labels"), blocks
