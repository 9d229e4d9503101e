"""Checks the machine code (SASS) of the CUDA library for the instructions that make the kernels fast.

    python tools/check_sass.py [LIBRARY]    # needs cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm

For each architecture: tensor-core kernels multiply with HMMA, read operands with LDSM and load key tiles with 16-byte
LDGSTS; the Hopper kernels use HGMMA, without a wait after each, on tiles loaded by UTMALDG; the momentum update loads
and stores 16 bytes per instruction. No kernel uses local memory.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from build_backend import site_packages

# Pattern of kernels' names -> instructions each must contain, instructions none may contain. estimate.py compares the
# list of InfoNCE kernels with a committed one.
LOCAL_MEMORY = (r"\bLDL\b", r"\bSTL\b")
RULES = {
    "info_nce_mma_kernel": ((r"\bHMMA\.", r"\bLDSM\.", r"\bLDGSTS\.E\.BYPASS\S*\.128\b"), LOCAL_MEMORY),
    "momentum_update_kernel": ((r"\bLDG\.E\.128\b", r"\bSTG\.E\.128\b"), LOCAL_MEMORY),
}
HOPPER_RULES = {
    r"info_nce_sm90_(wide_)?kernel": ((r"\bHGMMA\.", r"\bUSETMAXREG\b"), LOCAL_MEMORY),
    r"info_nce_sm90_(wide_)?kernelI(13__nv_bfloat16|6__half)": ((r"\bUTMALDG\.2D\b",), ()),
}


def find_cuobjdump() -> str:
    candidates = [shutil.which("cuobjdump"), "/usr/local/cuda/bin/cuobjdump"]
    candidates += [str(path) for folder in site_packages() for path in folder.glob("nvidia/*/bin/cuobjdump")]
    found = next((path for path in candidates if path and Path(path).is_file()), None)
    if found is None:
        raise SystemExit("check_sass: cuobjdump not found: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return found


def cuobjdump(binary: str, *options: str) -> str:
    return subprocess.run([find_cuobjdump(), *options, binary], capture_output=True, text=True, check=True).stdout


def find_architectures(library: str) -> list[str]:
    return sorted(set(re.findall(r"\.(sm_\w+)\.cubin", cuobjdump(library, "--list-elf"))))


def split_functions(sass: str) -> dict[str, str]:
    return dict(re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", sass, re.S))


def check(architecture: str, sass: str) -> list[str]:
    problems = []
    functions = split_functions(sass)
    rules = RULES | (HOPPER_RULES if architecture == "sm_90a" else {})
    for pattern, (wanted, unwanted) in rules.items():
        kernels = {name: code for name, code in functions.items() if re.search(pattern, name)}
        if not kernels:
            problems.append(f"{architecture}: no {pattern}")
        for name, code in kernels.items():
            problems += [f"{architecture}: no {text} in {name}" for text in wanted if not re.search(text, code)]
            problems += [f"{architecture}: {text} in {name}" for text in unwanted if re.search(text, code)]
            # ptxas serializes products whose registers other instructions write meanwhile, and only says so with -v.
            if 0 < code.count("HGMMA.") < 2 * code.count("WARPGROUP.DEPBAR"):
                problems.append(f"{architecture}: waits after every HGMMA in {name}")
    return problems


def main() -> int:
    default = Path(__file__).parent.parent / "moco_ext" / "lib" / "libmoco_ext_cuda.so"
    library = sys.argv[1] if len(sys.argv) > 1 else str(default)
    architectures = find_architectures(library)
    problems = [] if architectures else [f"no machine code in {library}"]
    for architecture in architectures:
        problems += check(architecture, cuobjdump(library, "--dump-sass", "-arch", architecture))
    print(*problems, sep="\n")
    print(f"{'wrong' if problems else 'as expected'}: {', '.join(architectures)}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
