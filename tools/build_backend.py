"""PEP 517 build backend: setuptools, plus two build requirements that depend on the machine.

* torch's headers. If the environment that moco_ext is installed into has torch >= 2.10, its headers are used and
  nothing is downloaded. Otherwise torch becomes a build requirement; any version will do, because of the stable ABI.
* nvcc. With an NVIDIA driver (or MOCO_EXT_CUDA=1) but no nvcc, NVIDIA's compiler packages on PyPI become build
  requirements. With neither driver nor nvcc, only the CPU kernels are built.

setup.py imports the functions that find the build tools.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)

# One minor version for all: a newer nvvm with an older ptxas does not assemble.
NVCC_PACKAGES = ["nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-cuda-cccl"]
NVCC_VERSION = "13.0.*"


def parse_version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


# pip does not check build requirements without build isolation, and older versions reject the name of the license.
# Below 82, because some versions of torch require that.
if parse_version(setuptools.__version__) < (77, 0, 3):
    raise SystemExit(
        f"moco_ext: setuptools: expected 77.0.3 or newer, got {setuptools.__version__}: "
        'pip install "setuptools>=77.0.3,<82"'
    )


def site_packages() -> list[Path]:
    """Package folders: first the environment that moco_ext is installed into, then the isolated build environment."""
    candidates = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path, *site.getsitepackages()]
    return list(dict.fromkeys(Path(path) for path in candidates if path))


def find_torch_headers() -> Path | None:
    """The include folder of a torch that has the stable ABI of 2.10, or None."""
    for folder in site_packages():
        include = folder / "torch" / "include"
        macros = include / "torch" / "csrc" / "stable" / "version.h"
        if macros.is_file() and "TORCH_VERSION_2_10_0" in macros.read_text():
            return include
    return None


def find_cmake(at_least: str) -> str:
    """CMake from the environment's ``cmake`` package, else from PATH; an error if it is missing or too old."""
    try:
        from cmake import CMAKE_BIN_DIR

        cmake = str(Path(CMAKE_BIN_DIR) / "cmake")
    except ImportError:
        cmake = shutil.which("cmake")
    version = "none"
    if cmake:
        version = subprocess.run([cmake, "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
    if parse_version(version) < parse_version(at_least):
        where = f" in {cmake}" if cmake else ""
        raise SystemExit(f"moco_ext: CMake: expected {at_least} or newer, got {version}{where}: pip install cmake")
    return cmake


def find_ninja() -> str:
    """Ninja from PATH or from the environment, which need not be activated."""
    ninja = shutil.which("ninja", path=os.pathsep.join([os.environ["PATH"], sysconfig.get_path("scripts")]))
    if ninja is None:
        raise SystemExit("moco_ext: Ninja: not found: pip install ninja")
    return ninja


def find_nvcc() -> Path | None:
    """nvcc from CUDACXX, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda or NVIDIA's PyPI packages, or None."""
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


def gpu_capabilities() -> list[str]:
    """Compute capabilities of the GPUs in this machine, such as ["8.0", "9.0"]."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return sorted(set(answer.split()), key=parse_version)


def cuda_wanted() -> bool | None:
    """MOCO_EXT_CUDA: True for 1 (an error without nvcc), False for 0 or Windows, None for "auto" (if there is nvcc)."""
    value = os.environ.get("MOCO_EXT_CUDA", "auto").lower()
    if value not in ("0", "1", "auto"):
        raise ValueError(f"MOCO_EXT_CUDA: expected 0, 1 or auto, got {value!r}")
    if sys.platform == "win32":  # nvcc needs MSVC, which cannot compile the CPU kernels
        if value == "1":
            raise ValueError("MOCO_EXT_CUDA: expected 0 or auto on Windows, got '1'")
        return False
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
