"""The peak memory of one loss with its gradient, beyond its inputs. Each implementation runs in its own process."""

import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from bench_info_nce import PEERS, T, problem_of
from conftest import peak_bytes

import moco_ext

PEERS_OF_CPU = ["official, eager", "official, torch.compile", "Lightly", "flash attention, V = K"]


@pytest.mark.parametrize("keys", [2**16, 2**20, 2**24])
def bench_memory(benchmark, device, request, keys):
    if sys.platform != "linux":
        pytest.skip("reads the peak from /proc")
    if keys > request.config.getoption("--keys"):
        pytest.skip(f"--keys {keys}")
    peaks = {}

    def measure():
        paths = os.pathsep.join(sys.path)  # conftest's additions
        for way in ["ours", *(PEERS if device.type == "cuda" else PEERS_OF_CPU)]:
            command = [sys.executable, __file__, way, str(keys), device.type]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
            lines = done.stdout.splitlines()
            peaks[way] = json.loads(lines[-1]) if lines else {"why": f"ended with {done.returncode}"}

    benchmark.group = f"memory N=256 K={keys} C=128 bfloat16 queue, {device.type}"
    benchmark.extra_info["peaks"] = peaks
    benchmark.pedantic(measure, rounds=1, iterations=1)


def gradient_of(way: str, keys: int, device: torch.device):
    p = problem_of(256, keys, 128, torch.bfloat16, device)
    if way == "ours":
        return lambda: p.gradient(moco_ext.info_nce(p.query, p.key, p.queue, T))
    return PEERS[way][0](p)


def main(way: str, keys: int, device: torch.device) -> dict:
    """{"mb": ...}, or {"why": ...} where the way cannot be gone."""
    if device.type == "cpu":
        most = int(0.9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        resource.setrlimit(resource.RLIMIT_AS, (most, most))  # an error, rather than the kernel's choice of a victim
    try:
        run = gradient_of(way, keys, device)
        run()  # loads libraries, compiles
        return {"mb": peak_bytes(run, device) / 2**20}
    except (RuntimeError, MemoryError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        return {"why": "out of memory" if "allocate memory" in why or "out of memory" in why else why[:200]}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), torch.device(sys.argv[3]))))
