"""Turns wheels into a kernel repository for Hugging Face's `kernels` package: OUT/build/VARIANT for CPUs and CUDA.

    python tools/hub_kernel.py dist/*.whl --out build/hub-kernel
    python -c "import kernels; print(kernels.get_local_kernel('build/hub-kernel').info_nce)"

A variant is the whole package with a metadata file. It works with all versions of torch from 2.10 on.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

CARD = """---
library_name: kernels
license: bsd-3-clause
tags: [kernel]
---
# moco_ext

Fused operators for momentum contrast (MoCo). `help(moco_ext.info_nce)` documents the loss.

```python
from kernels import get_kernel

moco_ext = get_kernel("OWNER/moco-ext", version=1, trust_remote_code=True)
loss = moco_ext.info_nce(query, key, queue, temperature=0.07)
```
"""
ABI_VERSION = 1  # of the public names; get_kernel(version=1)


def build_info(library: Path) -> dict[str, str]:
    """The strings of csrc/build_info.cpp. The library is not loaded, because it may be for another processor."""
    text = re.search(rb"compiler=[^\0]*", library.read_bytes())
    if text is None:
        sys.exit(f"{library}: expected the library of moco_ext, found no build information")
    return dict(line.split("=", 1) for line in text[0].decode().splitlines())


def capability(arch: str) -> str:
    """CMake's "90a-real" or "100" in the notation of `kernels`: "9.0a", "10.0+PTX"."""
    digits, suffix, real = re.fullmatch(r"(\d+)([af]?)(-real)?", arch).groups()
    return f"{digits[:-1]}.{digits[-1]}{suffix}{'' if real else '+PTX'}"


def add_variants(wheel: Path, out: Path) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        package = Path(folder, "moco_ext")
        info = build_info(package / "lib" / "libmoco_ext.so")
        version = re.search(r'__version__ = "(.+)"', (package / "__init__.py").read_text())[1]
        platform = re.search(r"linux_(?:[0-9]+_[0-9]+_)?(x86_64|aarch64)\.whl", wheel.name)
        if platform is None:
            sys.exit(f"wheel: expected one for Linux on x86_64 or aarch64, got {wheel.name}")
        backends = {"cpu": {"type": "cpu"}}
        if info["cuda_compiler"]:
            major, minor = re.search(r"(\d+)\.(\d+)", info["cuda_compiler"]).groups()
            archs = [capability(arch) for arch in info["cuda_archs"].split()]
            backends[f"cu{major}{minor}"] = {"type": "cuda", "archs": archs}
        names = []
        for backend, described in backends.items():
            abi = info["torch_target"].replace(".", "")
            name = f"torch-stable-abi{abi}-{backend}-{platform[1]}-linux"
            shutil.rmtree(out / "build" / name, ignore_errors=True)
            left_out = shutil.ignore_patterns("libmoco_ext_cuda.so") if backend == "cpu" else None
            shutil.copytree(package, out / "build" / name, ignore=left_out)
            metadata = {
                "name": "moco-ext",
                "id": re.sub(r"\W", "_", f"moco_ext_{version}_{backend}"),
                "version": ABI_VERSION,
                "license": "BSD-3-Clause",
                "python-depends": [],
                "backend": described,
            }
            (out / "build" / name / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
            names.append(name)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/hub-kernel"))
    args = parser.parse_args()
    for wheel in args.wheels:
        print(*add_variants(wheel, args.out), sep="\n")
    (args.out / "README.md").write_text(CARD)


if __name__ == "__main__":
    main()
