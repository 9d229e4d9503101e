"""Finds and loads the native libraries that define the operators of ops/."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

LIBRARY_FOLDER = Path(__file__).parent / "lib"
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
CPU_LIBRARY = LIBRARY_FOLDER / f"libmoco_ext{SUFFIX}"
CUDA_LIBRARY = LIBRARY_FOLDER / f"libmoco_ext_cuda{SUFFIX}"


def load_libraries() -> None:
    if not CPU_LIBRARY.is_file():
        raise ImportError(
            f"moco_ext: the native library is missing, expected {CPU_LIBRARY}. In a source checkout, run "
            "`pip install -e .` (or import from another folder if you meant the installed package)."
        )
    # torch would crash: an operator is defined once in a process.
    for other in torch.ops.loaded_libraries:
        if Path(other).name == CPU_LIBRARY.name and Path(other) != CPU_LIBRARY.resolve():
            raise ImportError(f"moco_ext: a process can load only one copy of it, and has already loaded {other}")
    torch.ops.load_library(CPU_LIBRARY)
    if has_cuda_kernels():
        torch.ops.load_library(CUDA_LIBRARY)


def has_cuda_kernels() -> bool:
    """Whether this build has CUDA kernels, and this torch can use them. Otherwise see tiled.py."""
    return torch.version.cuda is not None and CUDA_LIBRARY.is_file()


def build_info() -> dict[str, str]:
    """How the native libraries were built, and the CPU instruction set in use. See csrc/build_info.cpp."""
    function = ctypes.CDLL(str(CPU_LIBRARY)).moco_ext_build_info
    function.restype = ctypes.c_char_p
    return dict(line.split("=", 1) for line in function().decode().splitlines())
