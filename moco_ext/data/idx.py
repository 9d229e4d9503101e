"""IDX, the array format of MNIST and its relatives."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | Path) -> Tensor:
    """The array in an IDX file, plain or gzip (by suffix ``.gz``).

    Layout: two zero bytes, a type code, the number of dimensions, each dimension as a big-endian uint32, then
    the values, big-endian, last dimension fastest.

    Raises:
        ValueError: the file is not IDX, or holds more or fewer values than its header says.
    """
    path = Path(path)
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _DTYPES:
        raise ValueError(f"{path}: expected an IDX header (00 00 type dims), got {raw[:4].hex(' ') or 'nothing'}")
    dtype, dims = np.dtype(_DTYPES[raw[2]]), raw[3]
    offset = 4 + 4 * dims
    if len(raw) < offset:
        raise ValueError(f"{path}: expected {dims} dimensions in the IDX header, got a file of {len(raw)} bytes")
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", dims, 4))
    if len(raw) - offset != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{path}: expected {math.prod(shape) * dtype.itemsize} bytes for shape {list(shape)}, "
            f"got {len(raw) - offset}"
        )
    values = np.frombuffer(raw, dtype, offset=offset).reshape(shape)
    return torch.from_numpy(values.astype(dtype.newbyteorder("=")))
