"""Finds and loads the native libraries that define the operators of ops.py."""

from __future__ import annotations

from pathlib import Path

import torch

LIBRARY_FOLDER = Path(__file__).parent / "lib"
CUDA_LIBRARY = LIBRARY_FOLDER / "libmoco_ext_cuda.so"


def load_libraries() -> None:
    cpu = LIBRARY_FOLDER / "libmoco_ext.so"
    if not cpu.is_file():
        raise ImportError(
            f"moco_ext: the native library is missing, expected {cpu}. In a source checkout, run "
            "`pip install -e .` (or import from another folder if you meant the installed package)."
        )
    torch.ops.load_library(cpu)
    if has_cuda_kernels():
        torch.ops.load_library(CUDA_LIBRARY)


def has_cuda_kernels() -> bool:
    """Whether this build has CUDA kernels, and this torch can use them. Otherwise see tiled.py."""
    return torch.version.cuda is not None and CUDA_LIBRARY.is_file()
