"""The most memory beyond its inputs that one loss with its gradient needs, by each way, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

WAYS = ["ours", "official, eager", "official, torch.compile", "Lightly", "flash attention, V = K"]

# Prints {"mb": ...}, or {"why": ...} where the way cannot be gone.
CODE = """
import ctypes, json, os, re, resource, sys
sys.path[:0] = sys.argv[3:5]
import torch
import moco_ext, peers
from bench_info_nce import PEERS, problem_of

way, keys = sys.argv[1], int(sys.argv[2])
most = int(0.9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
resource.setrlimit(resource.RLIMIT_AS, (most, most))  # an error here, rather than the kernel's choice of a victim

def resident(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

def gradient_of(problem):
    if way == "ours":
        return lambda: problem.gradient(moco_ext.info_nce(problem.query, problem.key, problem.queue, problem.T))
    return PEERS[way][0](problem)

try:
    gradient_of(problem_of(256, 4096, 128, torch.bfloat16, torch.device("cpu")))()  # libraries, threads
    problem = problem_of(256, keys, 128, torch.bfloat16, torch.device("cpu"))
    run = gradient_of(problem)
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
    before = resident("VmRSS")
    run()
    print(json.dumps({"mb": resident("VmHWM") - before}))
except (RuntimeError, MemoryError) as error:
    why = str(error).splitlines()[0]
    print(json.dumps({"why": "out of memory" if "allocate memory" in why else why[:200]}))
"""


@pytest.mark.parametrize("keys", [2**16, 2**20, 2**24])
def bench_memory(benchmark, request, keys):
    if sys.platform != "linux":
        pytest.skip("reads the peak from /proc")
    if keys > request.config.getoption("--keys"):
        pytest.skip(f"--keys {keys}")
    here = Path(__file__).parent
    peaks = {}

    def measure():
        for way in WAYS:
            command = [sys.executable, "-c", CODE, way, str(keys), str(here), str(here.parent / "python_tests")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = done.stdout.splitlines()
            peaks[way] = json.loads(lines[-1]) if lines else {"why": f"ended with {done.returncode}"}  # out of memory

    benchmark.group = f"memory N=256 K={keys} C=128 bfloat16 queue, cpu"
    benchmark.extra_info["peaks"] = peaks
    benchmark.pedantic(measure, rounds=1, iterations=1)
