"""From images to a file of features: :func:`embed`."""

from __future__ import annotations

import glob
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from torch.nn.functional import normalize as unit_rows
from torch.utils.data import BatchSampler, DataLoader, Dataset

from .. import __version__
from ..data import EvalTransform, FolderSplit, ImageData, Normalize, TensorSplit, UnreadableImageError, load
from ..data.urls import is_url
from ..data.workers import leave_signals_to_parent, sigterm_held
from ..distributed import rank, wait_for_all, world_size
from ..encoders import autocast, restored_modes
from ..runs.console import ImageProgress
from ..runs.files import remove_temporaries, write_atomically
from .encoder import Encoder, load_encoder
from .feature_files import DTYPES, Table, check_output, write_table
from .features import check_finite, to_device

_READ_ROWS = 4096  # of a shard at a time


class Embedded(NamedTuple):
    """The result of :func:`embed`: the file, its rows and their width, and the files that could not be decoded."""

    output: Path
    images: int
    dim: int
    unreadable: list[str]
    seconds: float


def embed(
    weights: str | Path | Encoder,
    data: str | Path | ImageData,
    output: str | Path,
    *,
    arch: str | None = None,
    head: bool = False,
    normalize: bool = False,
    dtype: str = "float32",
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    workers: int = 0,
    precision: str = "fp32",
    data_root: str | Path = "data",
    overwrite: bool = False,
    console: Console | None = None,
) -> Embedded:
    """Write the features of all images of ``data`` to a file, in the order of the images.

    The features are written as they are computed: only the list of paths is in memory. The file appears under its name
    when it is complete. In a process group every rank must call this with the same arguments; each encodes a contiguous
    share of the images, and rank 0 writes the file. The ranks must share the folder of ``output``.

    Files that cannot be decoded have no row. They are listed in ``OUTPUT.unreadable.txt``.

    Args:
        weights: for :func:`load_encoder`, with ``arch`` and ``head``; or an encoder.
        data: a folder, a list or a built-in name, as for :func:`moco_ext.data.load`, or loaded data; training and test
            images. An image of a built-in set has the path NAME/SPLIT/ROW.
        output: ``.parquet`` with columns ``path``, ``features`` and, if there are classes, ``label``; ``.npy`` with the
            paths in ``OUTPUT.json``; ``.npz`` with arrays ``features``, ``paths``, ``labels``; or ``.safetensors`` with
            a tensor ``features`` and UTF-8 JSON in the tensors ``paths`` and ``labels``.
        normalize: divide each row by its L2 norm.
        dtype: of the file, ``"float32"`` or ``"float16"``.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``: the encoder runs under autocast.
        overwrite: replace an existing output.
        console: where progress is shown; None: nowhere.

    Raises:
        FileNotFoundError, FileExistsError: no weights or no folder for the output, or an existing output.
        FloatingPointError: features are not finite.
        ValueError: an argument out of range, or none of the images can be decoded. Nothing is written.
    """
    output = Path(output)
    check_output(output)
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    autocast(device, precision)  # raises for an unknown precision
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if output.exists() and not overwrite:
        raise FileExistsError(f"output: {output} exists; overwrite (--overwrite) replaces it")
    encoder = weights if isinstance(weights, Encoder) else load_encoder(weights, arch, head=head)[0]
    data = data if isinstance(data, ImageData) else load(str(data), data_root)
    images = _Everything(data)
    if output.suffix == ".parquet" and (path := images.find_no_text()) is not None:  # before hours of work
        raise ValueError(
            f"output: expected paths and classes in UTF-8 for .parquet, got {path!r}; .npz, .npy and .safetensors take "
            "any bytes"
        )
    started = time.monotonic()
    if rank() == 0:
        name = glob.escape(output.name)
        remove_temporaries(output.parent, name, f"{name}.*")
    if world_size() > 1:
        dist.barrier()
    shard = output.with_name(f".{output.name}.rank{rank()}.{os.getpid()}.tmp")
    size = -(-len(images) // world_size())
    mine = range(min(rank() * size, len(images)), min((rank() + 1) * size, len(images)))
    try:
        with open(shard, "wb") as file:
            kept, unreadable, dim = _write_shard(
                file,
                encoder.to(device),
                images,
                mine,
                ImageProgress(console if rank() == 0 else None, len(mine)),
                normalize=normalize,
                dtype=np.dtype(dtype),
                batch_size=batch_size,
                device=torch.device(device),
                workers=workers,
                precision=precision,
            )
        parts: list[Any] = [(shard, kept, unreadable, dim)]
        if world_size() > 1:
            wait_for_all()
            parts = [None] * world_size()
            dist.all_gather_object(parts, (shard, kept, unreadable, dim))
        rows = np.concatenate([part[1] for part in parts])
        unreadable = [path for part in parts for path in part[2]]
        dim = max(part[3] for part in parts)
        if not len(rows):
            raise ValueError(f"data: expected images that can be decoded, got none of {len(images):,}: {unreadable[0]}")
        if rank() == 0:
            metadata = {
                "moco_ext": __version__,
                "weights": _resolved(encoder.source),
                "arch": encoder.arch,
                "fingerprint": encoder.fingerprint(),
                "head": encoder.head,
                "precision": precision,
                "normalized": normalize,
                "transform": encoder.transform.as_dict(),
                "data": data.name,
                "images": len(rows),
                "dim": dim,
            }
            blocks = _read_shards([part[0] for part in parts], dim, np.dtype(dtype))
            labels = [data.classes[label] for label in images.labels[rows].tolist()] if data.classes else None
            paths = [images.name(row) for row in rows.tolist()]
            write_table(output, Table(blocks, (len(rows), dim), dtype, paths, labels, metadata))
            _list_unreadable(output, unreadable)
        wait_for_all()  # rank 0 has read the shards
    finally:
        shard.unlink(missing_ok=True)
    return Embedded(output, len(rows), dim, unreadable, time.monotonic() - started)


def _resolved(source: str) -> str:
    return str(Path(source).resolve()) if source and Path(source).exists() else source


class _Everything:
    """The training and the test images of a data set, one after the other."""

    def __init__(self, data: ImageData) -> None:
        self.splits = [(name, split) for name, split in (("train", data.train), ("test", data.test)) if split]
        self.labels = torch.cat([split.labels for _, split in self.splits])
        self._data, self._classes = data.name, data.classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> Tensor:
        """uint8 [C, H, W]. Raises an UnreadableImageError if it cannot be decoded."""
        _, split, row = self._find(row)
        return split.images[row] if isinstance(split, TensorSplit) else split.read(row)

    def name(self, row: int) -> str:
        name, split, row = self._find(row)
        if isinstance(split, TensorSplit):
            return f"{self._data}/{name}/{row}"
        path = split.name(row)
        return path if is_url(path) else os.path.abspath(path)

    def find_no_text(self) -> str | None:
        """The first path of a file, or class, that is not UTF-8, as names of files may be any bytes."""
        paths = (path for _, split in self.splits if isinstance(split, FolderSplit) for path in split.paths)
        texts = itertools.chain(self._classes, paths)
        return next((text for text in texts if not text.isascii() and not _is_utf8(text)), None)

    def _find(self, row: int) -> tuple[str, Any, int]:
        for name, split in self.splits:
            if row < len(split):
                return name, split, row
            row -= len(split)
        raise IndexError(row)


def _is_utf8(text: str) -> bool:
    return text.encode(errors="ignore").decode() == text


class ViewBatches(Dataset):
    """Batches of images before normalization: the rows that could be read, [n, C, size, size], and the others."""

    def __init__(self, images: Sequence[str] | _Everything, transform: EvalTransform) -> None:
        self.images, self.transform = images, transform

    def __getitem__(self, rows: list[int]) -> tuple[list[int], Tensor | None, list[int]]:
        views, unreadable = {}, []
        for row in rows:
            try:
                views[row] = self.transform.view(self.images[row])
            except UnreadableImageError:
                unreadable.append(row)
        found = list(views.values())
        if len({view.dtype for view in found}) > 1:  # some had to be resized in floating point
            found = [view.float() / 255 if view.dtype == torch.uint8 else view for view in found]
        return list(views), torch.stack(found) if found else None, unreadable


def encoded_batches(
    encoder: Encoder,
    images: Sequence[str] | _Everything,
    rows: range,
    *,
    batch_size: int,
    device: torch.device,
    workers: int,
    precision: str = "fp32",
) -> Iterator[tuple[list[int], Tensor | None, list[int]]]:
    """The rows of ``images`` in order: those that could be read, their features float32 [n, D], and the others."""
    normalize = Normalize(encoder.transform, device)
    batches = BatchSampler(rows, batch_size, drop_last=False)
    pinned = device.type == "cuda"
    with sigterm_held():
        loader = iter(
            DataLoader(
                ViewBatches(images, encoder.transform),
                None,
                sampler=batches,
                num_workers=workers,
                worker_init_fn=leave_signals_to_parent,
                pin_memory=pinned,
            )
        )
    with torch.inference_mode(), restored_modes(encoder):
        encoder.eval()
        for kept, views, unreadable in loader:
            features = None
            if views is not None:
                inputs = to_device(normalize(views.to(device, non_blocking=True)), device)
                with autocast(device, precision):
                    features = encoder(inputs).float()
            yield kept, features, unreadable


def _write_shard(
    file: BinaryIO,
    encoder: Encoder,
    images: _Everything,
    rows: range,
    progress: ImageProgress,
    *,
    normalize: bool,
    dtype: np.dtype,
    **loading: Any,
) -> tuple[np.ndarray, list[str], int]:
    """Write the raw features of these rows; (rows that could be read, paths of the others, D)."""
    kept, unreadable, dim = [], [], 0
    with progress:
        for readable, features, others in encoded_batches(encoder, images, rows, **loading):
            unreadable += [images.name(row) for row in others]
            kept.append(np.array(readable, np.int64))
            if features is not None:
                features = unit_rows(features, dim=1) if normalize else features
                block = features.cpu().to(torch.float16 if dtype == np.float16 else torch.float32)
                check_finite(f"features ({dtype})", block, FloatingPointError)
                file.write(block.contiguous().numpy().tobytes())
                dim = block.shape[1]
            progress.advance(len(readable) + len(others))
    return np.concatenate([*kept, np.empty(0, np.int64)]), unreadable, dim


def _read_shards(shards: Sequence[Path], dim: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    for shard in shards:
        with open(shard, "rb") as file:
            while raw := file.read(_READ_ROWS * dim * dtype.itemsize):
                yield np.frombuffer(raw, dtype).reshape(-1, dim)


def _list_unreadable(output: Path, unreadable: list[str]) -> None:
    path = output.with_name(f"{output.name}.unreadable.txt")
    if unreadable:
        write_atomically(path, lambda file: file.writelines(os.fsencode(line) + b"\n" for line in unreadable))
    else:
        path.unlink(missing_ok=True)  # of the output that was replaced
