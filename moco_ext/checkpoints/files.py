"""Files to named tensors and back. Reading runs no code from the file, whatever it holds."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runs.files import write_atomically


class Inert:
    """Stands for an object of a class that a file names and nobody needs (a trainer's configuration, say)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read(path: Path) -> Any:
    """What a file holds, on the CPU: by its suffix ``.safetensors``, detectron2's ``.pkl``, or torch's.

    Of a torch file only tensors and plain containers are unpickled (``weights_only=True``); objects of other classes
    become :class:`Inert`, without those classes being imported or called.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, of another kind, or a pickle that asks for more than arrays.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no such file: {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".pkl":
        return _read_arrays(path)
    try:
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # of a file that is not torch's; reading it says so better
        others = []
    with torch.serialization.safe_globals([(Inert, name) for name in others]):
        return read_saved(path)


def read_saved(path: str | Path) -> Any:
    """What ``torch.save`` wrote to a file, on the CPU. Only tensors and plain containers are unpickled.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, or not such a file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint: no such file: {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the bytes of a foreign file are read as instructions, and may fail in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"checkpoint: {path} cannot be read (truncated, or no checkpoint?): {reason}") from None


def write(path: Path, content: Any) -> None:
    """Write content as the path's suffix says, whole or not at all."""
    if path.suffix == ".pkl":
        write_atomically(path, lambda file: pickle.dump(content, file))
    elif path.suffix == ".safetensors":
        from safetensors.torch import save

        whole = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in content.items()}
        write_atomically(path, lambda file: file.write(save(whole, {"format": "pt"})))
    else:
        write_atomically(path, lambda file: torch.save(content, file))


def to_array(name: str, tensor: Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        raise ValueError(f"{name}: expected a type that NumPy knows for a .pkl file, got bfloat16")
    return tensor.numpy()


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"checkpoint: {path} cannot be read (truncated, or no safetensors?): {error}") from None


class _Arrays(pickle.Unpickler):
    """Builds NumPy arrays and plain containers, and nothing else."""

    ALLOWED = {  # noqa: RUF012
        ("collections", "OrderedDict"),
        ("_codecs", "encode"),  # how old protocols spell bytes
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read_arrays(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            content = _Arrays(file, encoding="latin1").load()
    except Exception as error:  # the bytes of a foreign file are read as instructions, and may fail in any way
        raise ValueError(
            f"checkpoint: expected arrays in plain containers in {path}, got a file where {error}"
        ) from None
    return _with_tensors(content)


def _with_tensors(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _with_tensors(value) for name, value in content.items()}
    return torch.from_numpy(content) if isinstance(content, np.ndarray) and content.dtype.kind in "biuf" else content
