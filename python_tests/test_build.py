"""What is decided before compiling: torch's headers, CMake, nvcc, architectures, and the torch that make installs."""

import importlib.util
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent


def load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def backend(monkeypatch):
    pytest.importorskip("setuptools", minversion="77.0.3")
    module = load("build_backend", ROOT / "tools" / "build_backend.py")
    monkeypatch.setitem(sys.modules, "build_backend", module)
    for name in ("MOCO_EXT_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.fixture
def setup_script(backend, monkeypatch):
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    return load("setup_script", ROOT / "setup.py")


def write_program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("8.0", "80-real"),
        ("8.0;8.6+PTX", "80-real;86"),
        ("9.0 12.0+PTX", "90a-real;120"),
        ("9.0a;10.0a;", "90a-real;100a-real"),
    ],
)
def test_torch_arch_list_in_cmake_notation(setup_script, given, expected):
    assert setup_script.cmake_archs(given) == expected


@pytest.mark.parametrize(
    ("variable", "nvcc", "driver", "fetched"),
    [
        (None, False, False, False),
        (None, False, True, True),
        (None, True, True, False),
        ("1", False, False, True),
        ("1", True, False, False),
        ("0", False, True, False),
    ],
)
def test_nvcc_is_downloaded_only_if_wanted_and_missing(backend, monkeypatch, variable, nvcc, driver, fetched):
    if variable:
        monkeypatch.setenv("MOCO_EXT_CUDA", variable)
    monkeypatch.setattr(backend, "find_nvcc", lambda: Path("nvcc") if nvcc else None)
    monkeypatch.setattr(backend, "has_nvidia_driver", lambda: driver)
    requirements = backend.extra_requirements()
    assert any(r.startswith("nvidia-cuda-nvcc==13.0") for r in requirements) == fetched
    assert len({r.partition("==")[2] for r in requirements if r.startswith("nvidia")}) <= 1


def test_windows_builds_for_the_cpu_only(backend, setup_script, monkeypatch, capsys):
    monkeypatch.setattr(backend, "find_nvcc", lambda: None)
    monkeypatch.setattr(backend, "has_nvidia_driver", lambda: True)
    assert any(requirement.startswith("nvidia") for requirement in backend.extra_requirements())
    monkeypatch.setattr(sys, "platform", "win32")
    assert not any(requirement.startswith("nvidia") for requirement in backend.extra_requirements())
    assert setup_script.cuda_options() == ["-DMOCO_EXT_CUDA=OFF"]
    assert "building CPU kernels only (always on Windows)" in capsys.readouterr().out
    monkeypatch.setenv("MOCO_EXT_CUDA", "1")
    with pytest.raises(ValueError, match="MOCO_EXT_CUDA: expected 0 or auto on Windows, got '1'"):
        backend.cuda_wanted()


def test_torch_is_a_build_requirement_only_without_headers(backend, monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "site_packages", lambda: [tmp_path])
    assert backend.find_torch_headers() is None
    assert "torch>=2.10" in backend.extra_requirements()
    version = tmp_path / "torch" / "include" / "torch" / "csrc" / "stable" / "version.h"
    version.parent.mkdir(parents=True)
    version.write_text("#define TORCH_VERSION_2_9_0 1\n")
    assert backend.find_torch_headers() is None
    version.write_text("#define TORCH_VERSION_2_9_0 1\n#define TORCH_VERSION_2_10_0 2\n")
    assert backend.find_torch_headers() == tmp_path / "torch" / "include"


def test_unknown_cuda_switch(backend, monkeypatch):
    monkeypatch.setenv("MOCO_EXT_CUDA", "perhaps")
    with pytest.raises(ValueError, match="MOCO_EXT_CUDA: expected 0, 1 or auto"):
        backend.cuda_wanted()


@pytest.mark.parametrize(
    ("gpus", "variable", "expected"),
    [
        ([], None, "all"),
        (["8.6", "9.0"], None, "8.6;9.0"),
        (["7.5"], None, "all"),  # older than the kernels support
        (["9.0", "13.0"], None, "all"),  # newer than nvcc, needs PTX
        (["9.0"], "8.0+PTX", "8.0+PTX"),
        (["9.0"], "all", "all"),
    ],
)
def test_cuda_is_built_for_the_gpus_present(setup_script, monkeypatch, tmp_path, capsys, gpus, variable, expected):
    nvcc = write_program(tmp_path / "nvcc", "printf 'sm_75\nsm_80\nsm_86\nsm_90\nsm_120\n'")
    monkeypatch.setattr(setup_script, "find_nvcc", lambda: nvcc)
    monkeypatch.setattr(setup_script, "gpu_capabilities", lambda: gpus)
    if variable:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", variable)
    options = setup_script.cuda_options()
    # "all" is the default in CMakeLists.txt; -U removes the choice of an earlier build from CMake's cache.
    in_cmake = {"8.6;9.0": "-DMOCO_EXT_CUDA_ARCHS=86-real;90a-real", "8.0+PTX": "-DMOCO_EXT_CUDA_ARCHS=80"}
    assert in_cmake.get(expected, "-UMOCO_EXT_CUDA_ARCHS") in options
    printed = capsys.readouterr().out
    assert f"compute capability {expected} (" in printed
    assert ("MOCO_EXT_CUDA=0 for none" in printed) == (expected == "all" and not variable)


def test_gpu_capabilities_are_those_of_nvidia_smi(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert backend.gpu_capabilities() == []
    smi = write_program(tmp_path / "nvidia-smi", "printf '12.0\n9.0\n12.0\n'")
    assert backend.gpu_capabilities() == ["9.0", "12.0"]
    write_program(smi, "echo No devices were found; exit 6")
    assert backend.gpu_capabilities() == []


def test_cmake_of_the_environment_is_preferred(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "system"))
    in_package = write_program(tmp_path / "package" / "cmake", "echo cmake version 3.31.6")
    monkeypatch.setitem(sys.modules, "cmake", None)  # no such package
    with pytest.raises(SystemExit, match=r"CMake: expected 3.25.2 or newer, got none: pip install cmake"):
        backend.find_cmake("3.25.2")
    in_path = write_program(tmp_path / "system" / "cmake", "echo cmake version 3.25.1")
    with pytest.raises(SystemExit, match=f"CMake: expected 3.25.2 or newer, got 3.25.1 in {in_path}: pip install"):
        backend.find_cmake("3.25.2")
    assert backend.find_cmake("3.25") == str(in_path)
    monkeypatch.setitem(sys.modules, "cmake", SimpleNamespace(CMAKE_BIN_DIR=str(in_package.parent)))
    assert backend.find_cmake("3.25.2") == str(in_package)


def test_ninja_of_an_environment_that_is_not_activated(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "system"))
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda name: str(tmp_path / name))
    with pytest.raises(SystemExit, match="pip install ninja"):
        backend.find_ninja()
    ninja = write_program(tmp_path / "scripts" / "ninja", "")
    assert backend.find_ninja() == str(ninja)


def test_old_setuptools_is_refused_with_what_to_do(backend, monkeypatch):
    import setuptools

    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit, match=r"setuptools: expected 77.0.3 or newer, got 65.5.0: pip install"):
        load("build_backend", ROOT / "tools" / "build_backend.py")


def test_requirements_for_a_build_without_isolation():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    requirements = project["build-system"]["requires"]
    assert project["dependency-groups"]["build"] == requirements
    cmake = re.search(r"cmake_minimum_required\(VERSION (\S+)\)", (ROOT / "CMakeLists.txt").read_text())[1]
    assert f"cmake>={cmake}" in requirements


def test_the_lowest_versions_are_the_bounds():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    bounds = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["train"]
    assert project["dependency-groups"]["lowest-versions"] == [bound.replace(">=", "==") for bound in bounds]


@pytest.mark.parametrize(
    ("versions", "variable", "options", "expected"),
    [
        ("2.13.0, 2.11.0+cpu, 2.11.0", "", "--extra-index-url INDEX ", "torch==2.11.0+cpu torchvision==0.26.0+cpu"),
        ("2.13.0+cpu, 2.11.0", "", "", "torch==2.11.0 torchvision==0.26.0"),  # the CPU index does not answer
        ("2.11.0+cpu", "TORCH=torch==2.10.0", "", "torch==2.10.0"),
        ("2.11.0+cpu", "NVIDIA_SMI=/usr/bin/nvidia-smi", "", "torch==2.11.0 torchvision==0.26.0"),
    ],
)
@pytest.mark.skipif(not shutil.which("make") or not sys.platform.startswith("linux"), reason="needs make on Linux")
def test_make_installs_a_cpu_build_of_torch_without_a_gpu(monkeypatch, tmp_path, versions, variable, options, expected):
    for name in ("TORCH", "MAKEFLAGS"):
        monkeypatch.delenv(name, raising=False)
    log = tmp_path / "log"
    answer = f'case "$*" in *"index versions"*) echo "Available versions: {versions}";; esac'
    write_program(tmp_path / "bin" / "python", f'echo "$@" >> {log}\n{answer}')
    command = ["make", "NVIDIA_SMI=", "CPU_INDEX=INDEX", f"VENV={tmp_path}", f"{tmp_path}/installed"]
    output = subprocess.run([*command, *variable.split()], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"Downloading {expected}: " in output
    commands = log.read_text().splitlines()
    assert f"-m pip install {options}{expected}" in commands
    assert "-m pip install --quiet --group build --editable .[train,test]" in commands


@pytest.mark.parametrize(
    ("kind", "unwanted"),
    [
        # With parts of two copies of libstdc++, formatting a number in an error message writes nothing, or crashes.
        ("--defined-only", r"_ZNSo\w+|_ZTISt13runtime_error"),
        ("--undefined-only", r"\b_?Py[A-Z_]\w+"),  # the wheel is for every version of Python
    ],
)
def test_the_libraries_hold_no_libstdcxx_and_need_no_python(kind, unwanted):
    from moco_ext.library import LIBRARY_FOLDER

    nm = shutil.which("nm")
    if nm is None or sys.platform != "linux":
        pytest.skip("needs nm")
    libraries = sorted(LIBRARY_FOLDER.glob("*.so"))
    assert libraries
    for library in libraries:
        symbols = subprocess.run([nm, "-D", kind, library], capture_output=True, text=True, check=True).stdout
        assert symbols, library
        assert not re.findall(unwanted, symbols), library


def test_the_wheel_is_for_every_python(setup_script):
    from setuptools import Distribution, Extension

    wheel = setup_script.Wheel(Distribution({"name": "moco_ext", "ext_modules": [Extension("moco_ext.lib", [])]}))
    wheel.ensure_finalized()
    python, abi, platform = wheel.get_tag()
    assert (python, abi) == ("py3", "none")
    assert platform != "any"


HUB_KERNEL = """
import sys, torch
from pathlib import Path
try:
    from kernels import get_local_kernel
except ImportError:  # the same, without the choice of the variant
    import importlib.util
    folder, = Path("hub/build").iterdir()
    spec = importlib.util.spec_from_file_location("another_name", folder / "__init__.py")
    module = sys.modules["another_name"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
else:
    module = get_local_kernel(Path("hub"), backend="cpu")
query = torch.randn(4, 8, requires_grad=True)
module.info_nce(query, torch.randn(4, 8), torch.randn(30, 8)).backward()
assert query.grad.isfinite().all()
assert "moco_ext" not in sys.modules
try:
    import moco_ext
except ImportError as error:
    print(error)
"""


def test_a_wheel_becomes_a_kernel_of_the_hub(monkeypatch, tmp_path):
    """Imported by another name, and refused a second time: torch would crash."""
    from moco_ext.library import LIBRARY_FOLDER

    package = LIBRARY_FOLDER.parent
    if not sys.platform.startswith("linux") or "x86_64" not in platform.machine():
        pytest.skip("for Linux on x86-64")
    wheel = tmp_path / "moco_ext-0.1.0-py3-none-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in [*package.rglob("*.py"), *LIBRARY_FOLDER.glob("libmoco_ext.so")]:
            archive.write(path, path.relative_to(package.parent))
    subprocess.run([sys.executable, ROOT / "tools" / "hub_kernel.py", wheel, "--out", tmp_path / "hub"], check=True)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    done = subprocess.run([sys.executable, "-c", HUB_KERNEL], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "can load only one copy" in done.stdout


def test_architectures_as_the_hub_writes_them():
    capability = load("hub_kernel", ROOT / "tools" / "hub_kernel.py").capability
    assert [capability(arch) for arch in ("80-real", "90a-real", "100", "120-real")] == [
        "8.0",
        "9.0a",
        "10.0+PTX",
        "12.0",
    ]
