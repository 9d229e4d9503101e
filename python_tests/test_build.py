"""What the build decides before it compiles: torch's headers, nvcc, architectures."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def backend(monkeypatch):
    pytest.importorskip("setuptools")
    module = load("build_backend", ROOT / "tools" / "build_backend.py")
    monkeypatch.setitem(sys.modules, "build_backend", module)
    for name in ("MOCO_EXT_CUDA", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.fixture
def setup_script(backend, monkeypatch):
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    return load("setup_script", ROOT / "setup.py")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("8.0", "80-real"),
        ("8.0;8.6+PTX", "80-real;86"),
        ("9.0 12.0+PTX", "90a-real;120"),
        ("9.0a;10.0a;", "90a-real;100a-real"),
    ],
)
def test_torchs_notation_of_architectures(setup_script, given, expected):
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
def test_nvcc_comes_from_pypi_only_where_it_is_wanted_and_missing(
    backend, monkeypatch, variable, nvcc, driver, fetched
):
    if variable:
        monkeypatch.setenv("MOCO_EXT_CUDA", variable)
    monkeypatch.setattr(backend, "find_nvcc", lambda: Path("nvcc") if nvcc else None)
    monkeypatch.setattr(backend, "has_nvidia_driver", lambda: driver)
    requirements = backend.extra_requirements()
    assert any(r.startswith("nvidia-cuda-nvcc==13.0") for r in requirements) == fetched
    assert len({r.partition("==")[2] for r in requirements if r.startswith("nvidia")}) <= 1


def test_torch_is_asked_for_only_where_no_headers_are_found(backend, monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "site_packages", lambda: [tmp_path])
    assert backend.find_torch_headers() is None
    assert "torch>=2.10" in backend.extra_requirements()
    version = tmp_path / "torch" / "include" / "torch" / "csrc" / "stable" / "version.h"
    version.parent.mkdir(parents=True)
    version.write_text("#define TORCH_VERSION_2_9_0 1\n")
    assert backend.find_torch_headers() is None
    version.write_text("#define TORCH_VERSION_2_9_0 1\n#define TORCH_VERSION_2_10_0 2\n")
    assert backend.find_torch_headers() == tmp_path / "torch" / "include"


def test_an_unknown_switch_is_refused(backend, monkeypatch):
    monkeypatch.setenv("MOCO_EXT_CUDA", "perhaps")
    with pytest.raises(ValueError, match="MOCO_EXT_CUDA: expected 0, 1 or auto"):
        backend.cuda_wanted()
