"""Read and write checkpoint files. Reading never executes code from the file."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..runs.files import write_atomically

_Value = TypeVar("_Value")
_OURS = "moco_ext"  # in the metadata of our files: the version
DDP_PREFIX = "module."  # of the names in a DistributedDataParallel's state dict, and so of the official checkpoints


class Inert:
    """Placeholder for an object of a class that is neither needed nor imported, such as a trainer's configuration."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read(path: Path) -> Any:
    """Content of a file, on the CPU: by suffix ``.safetensors``, detectron2's ``.pkl``, else a torch file or a folder.

    From a torch file only tensors and plain containers are unpickled (``weights_only=True``); objects of other classes
    become :class:`Inert` without importing or calling those classes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, of another kind, or a pickle that needs more than arrays.
    """
    if path.suffix not in (".safetensors", ".pkl"):
        return read_saved(path, inert=True)
    _check_exists(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_arrays(path)


def read_saved(
    path: str | Path, *, inert: bool = False, mmap: bool = False, shards: Mapping[str, Tensor] | None = None
) -> Any:
    """Content of a file that ``torch.save`` wrote, on the CPU. Only tensors and plain containers are unpickled.

    Of a folder that :class:`moco_ext.checkpoints.dcp.AsyncWriter` wrote, the whole checkpoint.

    Args:
        inert: replace objects of other classes by :class:`Inert`, instead of raising an error.
        mmap: read tensors when they are used, without a check of the file; only for a file that was read before.
        shards: of a folder, the DTensors of which only this rank's shard is needed; see
            :func:`moco_ext.checkpoints.dcp.read`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, damaged, or not such a file.
    """
    path = Path(path)
    if _is_folder(path):
        from . import dcp  # takes a second

        return dcp.read(path, shards)
    _check_exists(path)
    try:
        mmap = mmap and _is_archive(path)
        if not mmap:
            _check_archive(path)
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path) if inert and _is_archive(path) else []
        with torch.serialization.safe_globals([(Inert, name) for name in others]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # bytes of an arbitrary file are interpreted as instructions, which can fail in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"checkpoint: {path} cannot be read (damaged, or not a checkpoint?): {reason}") from None


def newest(path: Path) -> Path:
    """``checkpoint.pth`` of a run directory; any other path as it is."""
    return path / "checkpoint.pth" if path.is_dir() and not _is_folder(path) else path


def exists(path: Path) -> bool:
    """Whether there is a file, or a checkpoint in a folder (see :mod:`moco_ext.checkpoints.dcp`)."""
    return path.is_file() or _is_folder(path)


def _is_folder(path: Path) -> bool:
    return (path / ".metadata").is_file()


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no such file: {path}")


def _is_archive(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _check_archive(path: Path) -> None:
    """Verify the checksums of a torch file, which torch.load does not. Files from before torch 1.6 have none.

    Raises:
        ValueError, zipfile.BadZipFile: damaged, or compressed: torch.save never compresses, and a small compressed file
            can expand to any size.
    """
    if not _is_archive(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("expected uncompressed entries, got an archive that expands")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} does not match")


def with_prefix(prefix: str, named: Mapping[str, _Value]) -> dict[str, _Value]:
    """The same values under names that start with ``prefix``."""
    return {prefix + name: value for name, value in named.items()}


def without_prefix(prefix: str, named: Mapping[str, _Value]) -> dict[str, _Value]:
    """The same values with ``prefix`` removed from their names, if all of them start with it."""
    if not all(name.startswith(prefix) for name in named):
        return dict(named)
    return {name.removeprefix(prefix): value for name, value in named.items()}


def write(path: Path, content: Any, metadata: Mapping[str, str] | None = None) -> None:
    """Write a file in the format of its suffix, atomically; ``metadata`` goes into the header of ``.safetensors``."""
    if path.suffix == ".pkl":
        write_atomically(path, lambda file: pickle.dump(content, file))
    elif path.suffix == ".safetensors":
        from safetensors.torch import save

        whole = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in content.items()}
        write_atomically(path, lambda file: file.write(save(whole, {"format": "pt", **(metadata or {})})))
    else:
        write_atomically(path, lambda file: torch.save(content, file))


def to_array(name: str, tensor: Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        raise ValueError(f"{name}: expected a dtype that NumPy has for a .pkl file, got bfloat16")
    return tensor.numpy()


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"checkpoint: {path} cannot be read (damaged, or not safetensors?): {error}") from None


def read_metadata(path: Path) -> dict[str, Any]:
    """What the header of a ``.safetensors`` file of this package says of the encoder; empty for any other file."""
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError:  # what reads the weights says so
        return {}
    if _OURS not in metadata:
        return {}
    try:
        return {name: json.loads(metadata[name]) for name in ("arch", "transform")}
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"checkpoint: expected arch and transform as JSON in the metadata of {path}, got {error!r}"
        ) from None


class _Arrays(pickle.Unpickler):
    """Unpickles NumPy arrays and plain containers, nothing else."""

    ALLOWED = {  # noqa: RUF012
        ("collections", "OrderedDict"),
        ("_codecs", "encode"),  # bytes in old protocols
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it needs {module}.{name}")
        core = "numpy._core" if hasattr(np, "_core") else "numpy.core"  # _core since NumPy 2
        return super().find_class(re.sub(r"^numpy\._?core", core, module), name)


def _read_arrays(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            content = _Arrays(file, encoding="latin1").load()
    except Exception as error:  # as in read_saved
        raise ValueError(f"checkpoint: expected arrays in plain containers in {path}, got: {error}") from None
    return _with_tensors(content)


def _with_tensors(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _with_tensors(value) for name, value in content.items()}
    return torch.from_numpy(content) if isinstance(content, np.ndarray) and content.dtype.kind in "biuf" else content
