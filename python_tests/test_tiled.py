"""The operators in plain torch, which devices without kernels use, pass the tests of the kernels on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moco_ext import library, tiled

TESTS = Path(__file__).parent
# What only the kernels promise: 16 MB of memory, float64 neighbors.
KERNELS_ONLY = "not peak_memory and not (nearest_keys and float64)"


def run(*command, **environment):
    environment = os.environ | {"MOCO_EXT_TILED": "1", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize(
    "names",
    [
        ["info_nce", "info_nce_options"],
        ["soft_labels", "nearest_keys", "clip", "errors", "freed_storage"],
        ["enqueue", "queue", "momentum_update", "l2_normalize", "moco"],
    ],
    ids=" ".join,
)
@pytest.mark.slow
def test_passes_the_tests_of_the_kernels(names):
    files = [str(TESTS / f"test_{name}.py") for name in names]
    skipped = f"{KERNELS_ONLY} and not compile and not graph_break"  # registered like the kernels, and slow to compile
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", skipped, *files)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "Plain torch operations take their place" in done.stdout


PROBE = """
import warnings, torch, moco_ext
query, key, queue = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8), torch.randn(30, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        moco_ext.info_nce(query, key, queue).backward()
    moco_ext.enqueue_(queue, torch.zeros(1, dtype=torch.int64), key)
print([str(warning.message) for warning in caught if "moco_ext" in str(warning.message)])
"""


def test_warns_once_for_each_device():
    done = run("-c", PROBE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("moco_ext on cpu: no kernels for this device. Plain torch operations") == 1


def test_no_warning_with_kernels():
    done = run("-c", PROBE, MOCO_EXT_TILED="0")
    assert done.stdout.strip() == "[]", done.stderr


def test_cuda_without_kernels_says_why(monkeypatch, tmp_path):
    for path, why in (
        (tmp_path / "absent.so", "this build is for the CPU only; reinstall with MOCO_EXT_CUDA=1"),
        (library.LIBRARY_FOLDER / "libmoco_ext.so", "has no CUDA"),
    ):
        monkeypatch.setattr(tiled, "CUDA_LIBRARY", path)
        tiled._warn.cache_clear()
        with pytest.warns(UserWarning, match=why):
            tiled._warn("cuda")
    tiled._warn.cache_clear()


@pytest.mark.parametrize("key", ["CUDA", "MPS", "XPU", "PrivateUse1"])
@pytest.mark.parametrize("op", tiled.KERNELS)
def test_every_operator_is_registered(op, key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"moco_ext::{op}", key)


MEMORY = """
import re, sys, torch, moco_ext
from moco_ext import reference

def peak(function):
    open("/proc/self/clear_refs", "w").write("5")
    before = int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
    function()
    return (int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) - before) / 1024

query, key = (torch.randn(256, 128) for _ in range(2))
query.requires_grad_()
queue = torch.nn.functional.normalize(torch.randn(65536, 128), dim=1)
for function in (moco_ext.info_nce, reference.info_nce):
    function(query, key, queue[:1000].contiguous()).backward()
print(*[peak(lambda: function(query, key, queue).backward()) for function in (moco_ext.info_nce, reference.info_nce)])
"""


@pytest.mark.parametrize("scale", [1.0, 2.0**80, 2.0**-80])
def test_rows_whose_squares_leave_the_range(scale):
    x, queues = torch.randn(5, 16) * scale, (torch.zeros(5, 16), torch.zeros(5, 16))
    results = [ops.l2_normalize_forward(x, 1e-30) for ops in (tiled, torch.ops.moco_ext)]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    for queue, ops in zip(queues, (tiled, torch.ops.moco_ext), strict=True):
        ops.enqueue_(queue, torch.zeros(1, dtype=torch.int64), x, True)
    torch.testing.assert_close(*queues, rtol=1e-6, atol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_is_bounded():
    done = run("-c", MEMORY)
    assert done.returncode == 0, done.stderr
    tiles, eager = map(float, done.stdout.split())
    assert tiles < eager / 10, (tiles, eager)
