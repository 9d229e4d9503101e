"""Runs the native build of CMakeLists.txt for setuptools; the metadata is in pyproject.toml.

Environment variables: MOCO_EXT_CUDA (auto, 0, 1), TORCH_CUDA_ARCH_LIST ("8.0 9.0a+PTX", all), MAX_JOBS, and
MOCO_EXT_CMAKE_ARGS (passed to CMake unchanged). See CONTRIBUTING.md. Messages show with `pip install -v`.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
from build_backend import (  # noqa: E402
    cuda_wanted,
    find_cmake,
    find_ninja,
    find_nvcc,
    find_torch_headers,
    gpu_capabilities,
)


def cmake_archs(torch_arch_list: str) -> str:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX") in CMake's notation ("80-real;90a")."""
    archs = []
    for entry in torch_arch_list.replace(" ", ";").split(";"):
        if entry:
            name = entry.removesuffix("+PTX").replace(".", "")
            name = "90a" if name == "90" else name  # the Hopper kernels need sm_90a's instructions (wgmma, setmaxnreg)
            archs.append(name if entry.endswith("+PTX") else f"{name}-real")
    return ";".join(archs)


def choose_archs(nvcc: Path) -> tuple[str, str]:
    """What to build for, and why: TORCH_CUDA_ARCH_LIST, else the GPUs in this machine, else "all".

    It is also "all" if nvcc or the kernels (8.0 or newer) do not support a GPU here: PTX covers GPUs newer than nvcc.
    """
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if chosen:
        return chosen, "TORCH_CUDA_ARCH_LIST"
    codes = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    supported = {int(code) for code in re.findall(r"sm_(\d+)\b", codes)} - set(range(80))
    gpus = gpu_capabilities()
    if gpus and all(int(gpu.replace(".", "")) in supported for gpu in gpus):
        return ";".join(gpus), "the GPUs in this machine"
    return "all", "this takes minutes; TORCH_CUDA_ARCH_LIST=8.0 builds for one GPU, MOCO_EXT_CUDA=0 for none"


def cuda_options() -> list[str]:
    wanted, nvcc = cuda_wanted(), find_nvcc()
    if wanted and nvcc is None:
        raise SystemExit(
            "moco_ext: MOCO_EXT_CUDA=1 needs nvcc, found none: set CUDACXX or CUDA_HOME, or build with build isolation"
        )
    if wanted is False or nvcc is None:
        disabled = "always on Windows" if sys.platform == "win32" else "MOCO_EXT_CUDA=0"
        why = disabled if wanted is False else "no nvcc and no NVIDIA driver found"
        print(f"moco_ext: building CPU kernels only ({why})", flush=True)
        return ["-DMOCO_EXT_CUDA=OFF"]
    archs, why = choose_archs(nvcc)
    print(f"moco_ext: building CPU and CUDA kernels with {nvcc}, compute capability {archs} ({why})", flush=True)
    options = ["-DMOCO_EXT_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    if nvcc.parent.parent.parent.name == "nvidia":  # NVIDIA's PyPI packages have their libraries in lib, not lib64
        options.append(f"-DCMAKE_CUDA_FLAGS=-L{nvcc.parent.parent / 'lib'}")
    # -U: an earlier build's choice is in CMake's cache.
    options.append("-UMOCO_EXT_CUDA_ARCHS" if archs == "all" else f"-DMOCO_EXT_CUDA_ARCHS={cmake_archs(archs)}")
    return options


def run(command: list[str]) -> None:
    if subprocess.run(command).returncode:
        raise SystemExit(f"moco_ext: failed, see above: {shlex.join(command)}")


class CMakeBuild(build_ext):
    """Libraries that need no Python, in place of an extension module."""

    def run(self) -> None:
        headers = find_torch_headers()
        if headers is None:
            raise SystemExit("moco_ext: torch: expected 2.10 or newer in this environment: pip install torch")
        at_least = re.search(r"cmake_minimum_required\(VERSION (\S+)\)", (ROOT / "CMakeLists.txt").read_text())[1]
        cmake = find_cmake(at_least)
        if sys.platform == "win32":
            os.environ.setdefault("CXX", "clang-cl")
        package = ROOT / "moco_ext" if self.editable_mode else Path(self.build_lib, "moco_ext").resolve()
        build = ROOT / "build" / "cmake"
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_ninja()}",
            f"-DTORCH_INCLUDE_DIR={headers.as_posix()}",
            *cuda_options(),
            *shlex.split(os.environ.get("MOCO_EXT_CMAKE_ARGS", "")),
        ]
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        run(configure)
        run([cmake, "--build", str(build), *jobs])
        shutil.rmtree(package / "lib", ignore_errors=True)  # may hold an earlier build's CUDA library
        run([cmake, "--install", str(build), "--prefix", str(package)])
        shutil.copyfile(build / "compile_commands.json", ROOT / "compile_commands.json")

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


# The extension only makes setuptools run build_ext and name the platform in the wheel.
setup(ext_modules=[Extension("moco_ext.lib", sources=[])], cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel})
