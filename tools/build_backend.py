"""PEP 517 backend: setuptools, plus the two things a native build needs and pip cannot know.

* torch's headers. If the environment being installed into already has torch, its headers serve, and nothing is
  downloaded; otherwise the build asks for torch. Any torch >= 2.10 will do: the libraries use its stable ABI.
* nvcc. Found in the usual places it is used as it is. With an NVIDIA driver (or MOCO_EXT_CUDA=1) and no nvcc, the
  build asks for NVIDIA's compiler packages from PyPI. With neither, the build is for the CPU only.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)

# One minor version for all: a newer nvvm beside an older ptxas does not assemble.
NVCC_PACKAGES = ["nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-cuda-cccl"]
NVCC_VERSION = "13.0.*"


def site_packages() -> list[Path]:
    """Where packages of this interpreter lie: the environment installed into, then the isolated build environment."""
    import site
    import sys

    candidates = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path, *site.getsitepackages()]
    return list(dict.fromkeys(Path(path) for path in candidates if path))


def find_torch_headers() -> Path | None:
    """The include folder of a torch whose stable ABI headers are new enough (2.10), or None."""
    for folder in site_packages():
        include = folder / "torch" / "include"
        macros = include / "torch" / "csrc" / "stable" / "version.h"
        if macros.is_file() and "TORCH_VERSION_2_10_0" in macros.read_text():
            return include
    return None


def find_nvcc() -> Path | None:
    """nvcc from CUDACXX, CUDA_HOME, PATH, the usual folder, or NVIDIA's packages on PyPI; None if there is none."""
    named = os.environ.get("CUDACXX")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(named)] if named else []
    candidates += [Path(home) / "bin" / "nvcc" for home in homes if home]
    on_path = shutil.which("nvcc")
    candidates += [Path(on_path)] if on_path else []
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for folder in site_packages():
        candidates += sorted(folder.glob("nvidia/cu*/bin/nvcc"))
    return next((path for path in candidates if path.is_file()), None)


def has_nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def cuda_wanted() -> bool | None:
    """MOCO_EXT_CUDA: 1 demands CUDA, 0 switches it off, unset or "auto" builds it where nvcc is to be had (None)."""
    value = os.environ.get("MOCO_EXT_CUDA", "auto").lower()
    if value not in ("0", "1", "auto"):
        raise ValueError(f"MOCO_EXT_CUDA: expected 0, 1 or auto, got {value!r}")
    return {"0": False, "1": True, "auto": None}[value]


def extra_requirements() -> list[str]:
    requirements = []
    if find_torch_headers() is None:
        requirements.append("torch>=2.10")
    wanted = cuda_wanted()
    if wanted is not False and find_nvcc() is None and (wanted or has_nvidia_driver()):
        requirements += [f"{package}=={NVCC_VERSION}" for package in NVCC_PACKAGES]
    return requirements


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + extra_requirements()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + extra_requirements()
