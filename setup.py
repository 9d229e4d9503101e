"""Thin driver: metadata is in pyproject.toml, the native build in CMakeLists.txt; this runs the one for the other.

Environment variables: MOCO_EXT_CUDA (auto, 0, 1), TORCH_CUDA_ARCH_LIST (e.g. "8.0 9.0a+PTX"), MAX_JOBS,
MOCO_EXT_CMAKE_ARGS (passed on as they are). See CONTRIBUTING.md.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
from build_backend import cuda_wanted, find_nvcc, find_torch_headers  # noqa: E402


def cmake_archs(torch_arch_list: str) -> str:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX") in CMake's notation ("80-real;90a")."""
    archs = []
    for entry in torch_arch_list.replace(" ", ";").split(";"):
        if entry:
            name = entry.removesuffix("+PTX").replace(".", "")
            name = "90a" if name == "90" else name  # Hopper's own instructions (wgmma, setmaxnreg) are sm_90a's
            archs.append(name if entry.endswith("+PTX") else f"{name}-real")
    return ";".join(archs)


def cuda_options() -> list[str]:
    wanted, nvcc = cuda_wanted(), find_nvcc()
    if wanted and nvcc is None:
        raise SystemExit("MOCO_EXT_CUDA=1, but no nvcc: set CUDACXX or CUDA_HOME, or build with build isolation")
    if wanted is False or nvcc is None:
        why = "MOCO_EXT_CUDA=0" if wanted is False else "no nvcc and no NVIDIA driver found"
        print(f"moco_ext: building for the CPU only ({why})", flush=True)
        return ["-DMOCO_EXT_CUDA=OFF"]
    print(f"moco_ext: building for CPU and CUDA with {nvcc}", flush=True)
    options = ["-DMOCO_EXT_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    if nvcc.parent.parent.parent.name == "nvidia":  # NVIDIA's packages keep their libraries in lib, not lib64
        options.append(f"-DCMAKE_CUDA_FLAGS=-L{nvcc.parent.parent / 'lib'}")
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        options.append(f"-DMOCO_EXT_CUDA_ARCHS={cmake_archs(os.environ['TORCH_CUDA_ARCH_LIST'])}")
    return options


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        headers = find_torch_headers()
        if headers is None:
            raise SystemExit("moco_ext needs the headers of torch >= 2.10 to build; install torch first")
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"cmake-cp{sys.version_info.major}{sys.version_info.minor}"
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DCMAKE_INSTALL_PREFIX={package}",
            f"-DTORCH_INCLUDE_DIR={headers}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMOCO_EXT_VERSION={self.distribution.get_version()}",
            *cuda_options(),
            *shlex.split(os.environ.get("MOCO_EXT_CMAKE_ARGS", "")),
        ]
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), *jobs], check=True)
        subprocess.run(["cmake", "--install", str(build)], check=True)
        if self.editable_mode:  # setuptools itself brings only the module into the source folder, not the libraries
            shutil.rmtree(ROOT / "moco_ext" / "lib", ignore_errors=True)  # a CUDA library of an earlier build
            subprocess.run(["cmake", "--install", str(build), "--prefix", str(ROOT / "moco_ext")], check=True)
        shutil.copyfile(build / "compile_commands.json", ROOT / "compile_commands.json")


setup(ext_modules=[Extension("moco_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
