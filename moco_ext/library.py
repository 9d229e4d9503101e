"""Finds and loads the native libraries that define the operators of ops.py."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import torch

OPERATORS = (
    "info_nce_forward",
    "info_nce_backward",
    "enqueue_",
    "momentum_update_",
    "l2_normalize_forward",
)
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
    if torch.version.cuda and CUDA_LIBRARY.is_file():
        torch.ops.load_library(CUDA_LIBRARY)
    else:
        for name in OPERATORS:
            torch.library.impl(f"moco_ext::{name}", "cuda", missing_cuda_kernel)


def missing_cuda_kernel(*args: object) -> NoReturn:
    """What CUDA tensors reach where no CUDA library is loaded, instead of the dispatcher's table of backends."""
    if CUDA_LIBRARY.is_file():
        why = f"this torch ({torch.__version__}) has no CUDA"
    else:
        why = "this build is for the CPU only; reinstall with MOCO_EXT_CUDA=1 pip install --no-cache-dir ."
    raise RuntimeError(f"moco_ext: no CUDA kernels are loaded, tensors on a GPU cannot be used: {why}")
