"""What `make gpu` runs: build, test, sanitize and bench on a GPU machine. Each part takes minutes and writes JSON.

The machine needs an NVIDIA GPU, nvcc, and a python with torch, setuptools, cmake, ninja, pybind11, pytest and
pytest-benchmark, but no network. Results: OUT/gpu-PART.json, one record per command, and OUT/bench-gpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu-cmake"
BENCHES = ("info_nce", "momentum_update", "enqueue", "host", "step", "shuffle", "memory")  # most important first
TESTS = (ROOT / "csrc" / "tests").glob("test_*_cuda.cu")
OPS = sorted(path.stem.removeprefix("test_").removesuffix("_cuda") for path in TESTS)
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
TAIL = 6000  # characters of output kept in a record


class Part:
    """Runs commands, prints the end of their output, and records them."""

    def __init__(self, name: str, out: Path) -> None:
        self.records: list[dict] = []
        self.path = out / f"gpu-{name}.json"
        self.environment = os.environ | {"PYTHONUNBUFFERED": "1"}

    def run(self, name: str, command: list[str], minutes: float) -> bool:
        print(f"== {name}: {' '.join(command)}", flush=True)
        started = time.perf_counter()
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=self.environment,
                timeout=60 * minutes,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            output, status = done.stdout, done.returncode
        except subprocess.TimeoutExpired as expired:
            output, status = (expired.stdout or b"").decode(errors="replace"), 124
        except FileNotFoundError as missing:
            output, status = str(missing), 127
        seconds = round(time.perf_counter() - started, 1)
        counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", output[-2000:])
        self.records.append(
            {
                "name": name,
                "command": command,
                "seconds": seconds,
                "status": status,
                "counts": {word: int(number) for number, word in counts},
                "output": output[-TAIL:],
            }
        )
        print(output[-1500:], f"-- {name}: status {status} in {seconds} s", sep="\n", flush=True)
        self.path.write_text(json.dumps({"device": device(), "records": self.records}, indent=1))
        return status == 0

    def finish(self) -> int:
        for record in self.records:
            print(f"{record['name']:<34}status {record['status']:<4}{record['seconds']:>8} s  {record['counts']}")
        return int(any(record["status"] for record in self.records))


def device() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        raise SystemExit("make gpu: no NVIDIA GPU found (nvidia-smi failed)") from None


def build(part: Part, ops: list[str]) -> None:
    capability = device().rsplit(",", 1)[1].strip().splitlines()[0]
    part.environment |= {"MOCO_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": capability}
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--editable", "."]
    part.run("install", pip, 8)
    import torch  # not at the top: the other parts record a missing torch as a failed command

    arch = {"9.0": "90a"}.get(capability, capability.replace(".", ""))
    configure = ["cmake", "-S", ".", "-B", str(BUILD), "-G", "Ninja", "-DMOCO_EXT_TESTS=ON", "-DMOCO_EXT_CUDA=ON"]
    configure += ["-DMOCO_EXT_PYTHON=OFF", f"-DMOCO_EXT_CUDA_ARCHS={arch}-real"]
    configure += [f"-DTORCH_INCLUDE_DIR={torch.__path__[0]}/include"]
    part.run("configure kernel tests", configure, 2)
    part.run("build kernel tests", ["cmake", "--build", str(BUILD)], 8)


def test(part: Part, ops: list[str]) -> None:
    part.run("moco-ext info", [sys.executable, "-m", "moco_ext", "info", "--json"], 2)
    for op in ops:
        program = str(BUILD / "csrc" / "tests" / f"gpu_test_{op}")
        part.run(f"kernel {op}", [program], 3)
        if op.startswith("info_nce"):
            part.run(f"kernel {op}, Hopper kernel", ["env", "MOCO_EXT_SM90=1", program], 3)
    part.run("pytest", [sys.executable, "-m", "pytest", "python_tests", "-q", "--durations=10"], 9)


def sanitize(part: Part, ops: list[str]) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for op in ops:
        # The sanitizers are slow: fewer random cases of the same shapes and types.
        cases = ["20"] if op.startswith("info_nce") else []
        for tool in SANITIZERS:
            program = [str(BUILD / "csrc" / "tests" / f"gpu_test_{op}"), *cases]
            part.run(f"{tool} {op}", [sanitizer, "--tool", tool, "--error-exitcode", "9", *program], 4)


def bench(part: Part, ops: list[str]) -> None:
    """One process per file, so that a fault in one kernel does not lose the other results."""
    out, merged = part.path.parent, []
    for name in BENCHES:
        found = out / f"bench-{name}.json"
        found.unlink(missing_ok=True)
        # CUDA only: CPU results belong to another machine. 16 M keys fit on any GPU.
        options = ["-q", "-s", "-rs", "-k", "cuda", "--keys", str(2**24), f"--benchmark-json={found}"]
        part.run(f"bench {name}", [sys.executable, "-m", "pytest", f"bench/bench_{name}.py", *options], 6)
        if found.is_file() and (text := found.read_text()):  # empty if nothing was measured
            report = json.loads(text)
            merged += report["benchmarks"]
            (out / "bench-gpu.json").write_text(json.dumps(report | {"benchmarks": merged}, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["build", "test", "sanitize", "bench"])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--ops", nargs="*", default=OPS, choices=OPS, help="kernel tests to run or sanitize")
    arguments = parser.parse_args()
    device()
    arguments.out.mkdir(parents=True, exist_ok=True)
    part = Part(arguments.part, arguments.out)
    {"build": build, "test": test, "sanitize": sanitize, "bench": bench}[arguments.part](part, arguments.ops)
    return part.finish()


if __name__ == "__main__":
    sys.exit(main())
