"""Checkpoints as folders in the format of torch.distributed.checkpoint (DCP): each process writes its own shards.

A folder holds the tensors of ``state_dict`` and of the optimizer's state under the names ``state_dict.NAME`` and
``optimizer.state.INDEX.NAME``, and all other entries, as ``torch.save`` writes them, in the uint8 tensor ``rest``. It
is written under a temporary name and renamed when it is complete.

DCP's ``.metadata`` is a pickle, and ``torch.distributed.checkpoint.load`` executes what it contains. :func:`read`
unpickles only the classes that DCP writes there, and refuses folders with entries other than tensors.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ..distributed import rank, world_size
from ..ops.checks import is_sharded
from ..runs.files import remove

_STATE, _OPTIMIZER, _REST = "state_dict.", "optimizer.state.", "rest"


class AsyncWriter:
    """Writes one checkpoint at a time in a thread, while training goes on. Every rank must make and use it.

    All ranks write to the same folder, so on several nodes it must be on a shared file system.
    """

    def __init__(self) -> None:
        # A group of its own, because its collectives run at the same time as those of training.
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None
        self._pending: tuple[Future[Any], Path] | None = None  # and the temporary folder

    def start(self, path: Path, content: Mapping[str, Any], then: Callable[[], object]) -> None:
        """Copy a checkpoint to the CPU, and start to write it to the folder ``path``.

        An existing folder is replaced. The earlier write must have ended, see :meth:`finish`.

        Args:
            content: a checkpoint in the official layout, whose tensors may be DTensors. Of other entries, rank 0's are
                written.
            then: called on rank 0 when the checkpoint is complete.
        """
        assert self._pending is None
        tensors = _flattened(content)
        if rank() > 0:
            tensors = {name: tensor for name, tensor in tensors.items() if is_sharded(tensor)}
        writer = _Writer(path, then)
        # In the thread that writes, where a context manager would change the filters of all threads.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        future = dcp.async_save(tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        assert isinstance(future, Future)
        self._pending = future, writer.temporary

    def finish(self, progress: Callable[[], object] = lambda: None) -> None:
        """Wait until the checkpoint that was started is complete.

        Args:
            progress: called every second.

        Raises:
            OSError: it could not be written, on any rank; the message is that of the first failure.
        """
        if self._pending is None:
            return
        (future, temporary), self._pending = self._pending, None
        while not wait([future], timeout=1).done:
            progress()
        try:
            future.result()
        except CheckpointException as error:  # not an Exception
            if rank() == 0:
                remove(temporary)
            failed, (reason, _) = min(error.failures.items())
            raise OSError(f"rank {failed}: {reason}") from None


class _Writer(dcp.FileSystemWriter):
    """Writes to a temporary folder, which becomes ``path`` when all ranks have written."""

    def __init__(self, path: Path, then: Callable[[], object]) -> None:
        # The same name on all ranks. The lock on the run directory excludes other writers.
        self.temporary = path.with_name(f".{path.name}.0.tmp")
        super().__init__(self.temporary)
        self._final, self._then = path, then

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:  # on rank 0, after all have written
        super().finish(metadata, results)
        _sync(self.temporary)
        remove(self._final)  # of a step that is computed again
        os.replace(self.temporary, self._final)
        _sync(self._final.parent)
        self._then()


def read(path: Path, shards: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """The checkpoint in a folder, on the CPU, in one piece. Each rank may read it alone.

    Args:
        shards: DTensors by name, or by the name without the last part, such as ``optimizer.state.0``. Tensors of their
            names and shapes are read as they are sharded and on their device: of each, only this rank's shard.

    Raises:
        ValueError: damaged, incomplete, or not a folder that :class:`AsyncWriter` has written.
    """
    try:
        reader = _Reader(path)
        found = reader.read_metadata()
        _check(path, found)
        tensors = {
            name: _empty(about, (shards or {}).get(name, (shards or {}).get(name.rpartition(".")[0])))
            for name, about in found.state_dict_metadata.items()
            if isinstance(about, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(tensors, storage_reader=reader, no_dist=True)
        return _joined(tensors)
    except (Exception, CheckpointException) as error:  # damage can take any form
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"checkpoint: {path} cannot be read (damaged, or not a checkpoint?): {reason}") from None


def _empty(about: TensorStorageMetadata, like: Tensor | None) -> Tensor:
    if like is None or like.shape != about.size:
        return torch.empty(about.size, dtype=about.properties.dtype)
    return torch.empty_like(like, dtype=about.properties.dtype, requires_grad=False)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            return _Unpickler(file).load()


class _Unpickler(pickle.Unpickler):
    """Unpickles the classes of DCP's metadata, nothing else."""

    ALLOWED = {  # noqa: RUF012
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties",
                "BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
            )
        ),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"its .metadata needs {module}.{name}")
        return super().find_class(module, name)


def _check(path: Path, found: Metadata) -> None:
    """Verify that there are only tensors, no larger than the files, and the checksum of every shard."""
    others = [name for name, about in found.state_dict_metadata.items() if not isinstance(about, TensorStorageMetadata)]
    if others:
        raise ValueError(f"expected only tensors, got {', '.join(others[:4])}")
    if _REST not in found.state_dict_metadata:
        raise ValueError(f"expected a tensor for {_REST}, got none")
    tensors = [about for about in found.state_dict_metadata.values() if isinstance(about, TensorStorageMetadata)]
    needed = sum(about.size.numel() * about.properties.dtype.itemsize for about in tensors)
    if needed > sum(file.stat().st_size for file in path.glob("*.distcp")):
        raise ValueError("expected tensors no larger than the files")
    for index, place in found.storage_data.items():
        if Path(place.relative_path).name != place.relative_path or place.transform_descriptors:
            raise ValueError(f"expected {index.fqn} in a file of the folder, got {place}")
        with open(path / place.relative_path, "rb") as file:
            file.seek(place.offset)
            shard = file.read(place.length)
        with zipfile.ZipFile(io.BytesIO(shard)) as archive:
            if archive.testzip() is not None:
                raise ValueError(f"the checksum of {index.fqn} does not match")


def _flattened(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors by their names in the folder, among them the rest, which has None in the places of the others."""
    tensors = {_STATE + name: tensor for name, tensor in content["state_dict"].items()}
    slots: dict[int, dict[str, Any]] = {}
    for index, slot in content["optimizer"]["state"].items():
        slots[index] = dict(slot)
        for name, value in slot.items():
            if isinstance(value, Tensor):
                tensors[f"{_OPTIMIZER}{index}.{name}"], slots[index][name] = value, None
    optimizer = {**content["optimizer"], "state": slots}
    file = io.BytesIO()
    torch.save({**content, "state_dict": dict.fromkeys(content["state_dict"]), "optimizer": optimizer}, file)
    return tensors | {_REST: torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8)}


def _joined(tensors: dict[str, Tensor]) -> dict[str, Any]:
    content = torch.load(io.BytesIO(tensors.pop(_REST).numpy().tobytes()), weights_only=True)
    for name, tensor in tensors.items():
        if name.startswith(_STATE):
            content["state_dict"][name.removeprefix(_STATE)] = tensor
        else:
            index, _, slot = name.removeprefix(_OPTIMIZER).partition(".")
            content["optimizer"]["state"][int(index)][slot] = tensor
    return content


def _sync(folder: Path) -> None:
    """Flush a folder to disk: the names of its files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
