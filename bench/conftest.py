"""What all benches share: devices, paired timing, and the labels that make a JSON readable years later.

    pytest bench --benchmark-json=bench/results/cpu.json
    python bench/table.py bench/results/cpu.json

A bench is one function that measures several rows (ours, its competitors, the limit) in turn, a random order
each round: whatever else the machine does then hits all of them, and ratios are taken within rounds.
pytest-benchmark's own figure is the time of a whole round; the rows' raw samples are in extra_info.

On a GPU a row is captured in a CUDA graph, whose replay is timed by events, with L2 flushed before; a row that cannot
be captured (it synchronizes) is timed by events as it is. Beside it stands the wall clock of the call without a graph.
"""

import ctypes
import gc
import os
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "python_tests"))  # official.py

L2_FLUSH_BYTES = 256 * 2**20  # more than any GPU's L2


@dataclass
class Row:
    """One way to do the work.

    Attributes:
        name: as printed; a name that starts with "limit" sets the rate that other rows are held to.
        run: does it once; what it returns is ignored.
        flops: of the work, not of this way to do it.
        bytes: the least memory traffic of the work.
        value: gives the tensor to compare with `want`, before any time counts; None for limits.
        want: what it is to give, where that is not what all rows give.
        tolerance: the largest ||value - want|| / ||want|| at which the row may compete.
        calls: how many calls make one sample, for work shorter than the clock is good for.
    """

    name: str
    run: Callable[[], object]
    flops: float = 0
    bytes: float = 0
    value: Callable[[], Tensor] | None = None
    want: Tensor | None = None
    tolerance: float = 1e-5
    calls: int = 1


def pytest_addoption(parser):
    parser.addoption("--rounds", type=int, default=20, help="samples of each row")
    parser.addoption("--sweep", action="store_true", help="also bench_sweep.py: minutes")
    parser.addoption("--keys", type=int, default=2**20, help="most keys of bench_memory.py; 16777216 takes 4 GB")


@pytest.fixture(params=["cpu"] + (["cuda"] if torch.cuda.is_available() else []), scope="session")
def device(request) -> torch.device:
    torch.manual_seed(0)
    return torch.device(request.param)


@pytest.fixture
def compare(benchmark, device, request):
    """compare(group, rows, want): check every row against `want`, then time them all in turn.

    `skipped` says by name why others take no part; it is printed and kept.
    """

    def run(group: str, rows: list[Row], want: Tensor, skipped: dict[str, str] | None = None) -> None:
        benchmark.group = f"{group}, {device.type}"
        for name, why in (skipped or {}).items():
            print(f"{benchmark.group}: {name} skipped: {why}")
        records = {row.name: _checked(row, want if row.want is None else row.want) for row in rows}
        replays = {}
        for row in rows:
            row.run()  # compiles, fills caches
            records[row.name]["peak_bytes"] = peak_bytes(row.run, device)
            replays[row.name] = _captured(row) if device.type == "cuda" else None
            records[row.name]["graph"] = replays[row.name] is not None

        flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=device) if device.type == "cuda" else None
        order = random.Random(0)

        def one_round():
            for row in order.sample(rows, len(rows)):
                device_ms, wall_ms = _sample(row, replays[row.name], flush)
                records[row.name]["ms"].append(round(device_ms, 5))
                records[row.name]["wall_ms"].append(round(wall_ms, 5))

        benchmark.extra_info["rows"] = records
        benchmark.extra_info["skipped"] = skipped or {}
        benchmark.pedantic(one_round, rounds=request.config.getoption("rounds"), iterations=1)

    return run


def _checked(row: Row, want: Tensor) -> dict:
    record = {"flops": row.flops, "bytes": row.bytes, "error": None, "ms": [], "wall_ms": []}
    if row.value is not None:
        record["error"] = ((row.value().double() - want).norm() / want.norm()).item()
        assert record["error"] <= row.tolerance, f"{row.name}: relative error {record['error']:.1e}"
    return record


def _captured(row: Row) -> Callable[[], None] | None:
    """Replays the row's calls from a CUDA graph; None where they cannot be captured."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            for _ in range(2):
                row.run()
            torch.cuda.set_sync_debug_mode("error")  # a capture that fails would leave torch's generator unusable
            try:
                row.run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            for _ in range(row.calls):
                row.run()
    except RuntimeError as error:
        torch.cuda.synchronize()
        print(f"{row.name}: timed without a graph: {str(error).splitlines()[0]}")
        return None
    return graph.replay


def _sample(row: Row, replay: Callable[[], None] | None, flush: Tensor | None) -> tuple[float, float]:
    """(ms on the device, ms of wall clock) of one call; the same number twice on a CPU."""

    def wall_clock() -> float:
        start = time.perf_counter()
        for _ in range(row.calls):
            row.run()
        if flush is not None:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3 / row.calls

    if flush is None:
        wall = wall_clock()
        return wall, wall
    torch.cuda.synchronize()
    wall = wall_clock()
    flush.zero_()  # no input may wait in L2
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    if replay is not None:
        replay()
    else:
        for _ in range(row.calls):
            row.run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / row.calls, wall


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Most memory beyond what was there, at any moment of one call; None where it cannot be told."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None

    def resident(field: str) -> int:
        return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    ctypes.CDLL(None).malloc_trim(0)  # memory that malloc keeps would be reused unseen
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = resident("VmRSS")
    run()
    return max(resident("VmHWM") - before, 0)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cores"] = os.cpu_count()
    machine_info["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    machine_info["cuda"] = torch.version.cuda if torch.cuda.is_available() else None
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
