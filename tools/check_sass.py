"""Checks the machine code (SASS) of the CUDA library for the instructions that make the kernels fast.

    python tools/check_sass.py [LIBRARY]    # needs cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm

For each architecture: tensor-core kernels multiply with HMMA, read operands with LDSM and fetch key tiles with 16-byte
LDGSTS; the Hopper kernel uses HGMMA on tiles that UTMALDG loads; the momentum update loads and stores 16 bytes per
instruction. No kernel uses local memory.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from build_backend import site_packages

# Part of a kernel's name -> number of such kernels, instructions each must contain, instructions none may contain.
LOCAL_MEMORY = (r"\bLDL\b", r"\bSTL\b")
RULES = {
    # C in (64, 128, 256, 512, 768, 1024) x (bfloat16, float16, 1 to 3 terms of float32, each with and without gradient and
    # masks, + 4 for the gradient of keys); 4 kernels have no variant without masks
    "info_nce_mma_kernel": (140, (r"\bHMMA\.", r"\bLDSM\.", r"\bLDGSTS\.E\.BYPASS\S*\.128\b"), LOCAL_MEMORY),
    # tables of 1, 64 and 1,000 tensors, and of 1 and 800 with low-precision copies
    "momentum_update_kernel": (5, (r"\bLDG\.E\.128\b", r"\bSTG\.E\.128\b"), LOCAL_MEMORY),
}
# C in (64, 128, 256) x two types x with and without gradient
HOPPER_RULES = {"info_nce_sm90_kernel": (12, (r"\bHGMMA\.", r"\bUTMALDG\.2D\b", r"\bUSETMAXREG\b"), LOCAL_MEMORY)}


def find_cuobjdump() -> str:
    candidates = [shutil.which("cuobjdump"), "/usr/local/cuda/bin/cuobjdump"]
    candidates += [str(path) for folder in site_packages() for path in folder.glob("nvidia/*/bin/cuobjdump")]
    found = next((path for path in candidates if path and Path(path).is_file()), None)
    if found is None:
        raise SystemExit("check_sass: cuobjdump not found: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return found


def check(architecture: str, sass: str) -> list[str]:
    problems = []
    functions = {
        name.strip(): code for name, code in re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", sass, re.S)
    }
    rules = RULES | (HOPPER_RULES if architecture == "sm_90a" else {})
    for part, (count, wanted, unwanted) in rules.items():
        kernels = {name: code for name, code in functions.items() if part in name}
        if len(kernels) != count:
            problems.append(f"{architecture}: expected {count} of {part}, found {len(kernels)}")
        for name, code in kernels.items():
            problems += [
                f"{architecture}: no {pattern} in {name}" for pattern in wanted if not re.search(pattern, code)
            ]
            problems += [f"{architecture}: {pattern} in {name}" for pattern in unwanted if re.search(pattern, code)]
    return problems


def main() -> int:
    default = Path(__file__).parent.parent / "moco_ext" / "lib" / "libmoco_ext_cuda.so"
    library = sys.argv[1] if len(sys.argv) > 1 else str(default)
    cuobjdump = find_cuobjdump()

    def run(*options: str) -> str:
        return subprocess.run([cuobjdump, *options, library], capture_output=True, text=True, check=True).stdout

    architectures = sorted(set(re.findall(r"\.(sm_\w+)\.cubin", run("--list-elf"))))
    problems = [] if architectures else [f"no machine code in {library}"]
    for architecture in architectures:
        problems += check(architecture, run("--dump-sass", "-arch", architecture))
    print(*problems, sep="\n")
    print(f"{'wrong' if problems else 'as expected'}: {', '.join(architectures)}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
