"""Shared by all benchmarks: devices, paired timing, and the metadata of the results.

    pytest bench --benchmark-json=bench/results/cpu.json
    python bench/table.py bench/results/cpu.json

A benchmark is one function that measures several rows (ours, the baselines, the limit), in random order in each round.
Other load on the machine then affects all rows alike, and ratios are taken within rounds. pytest-benchmark's own number
is the time of a whole round; the raw samples of the rows are in extra_info.

On a GPU, the calls of a row are captured in a CUDA graph, each after a read of a buffer larger than L2, which leaves no
input and no dirty line in the cache. A second graph has only the reads. The difference of their times, divided by the
number of calls, is the time of a call. It excludes the start of a graph, which takes as long as a short kernel. A row
that cannot be captured (because it synchronizes) is timed by events. Wall clock is the call without a graph.
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

FLUSH_BYTES = 256 * 2**20  # more than any GPU's L2
GRAPH_BYTES = 4 * 2**30  # a graph keeps its memory: rows that need more are long, and timed without one


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
        captured: whether to time it in a CUDA graph; not if it replays graphs of its own, which a capture refuses.
    """

    name: str
    run: Callable[[], object]
    flops: float = 0
    bytes: float = 0
    value: Callable[[], Tensor] | None = None
    want: Tensor | None = None
    tolerance: float = 1e-5
    calls: int = 1
    captured: bool = True


def pytest_addoption(parser):
    parser.addoption("--rounds", type=int, default=20, help="samples of each row")
    parser.addoption("--peers", default="", help="only the baselines whose name matches this expression")
    parser.addoption("--sweep", action="store_true", help="also bench_sweep.py: minutes")
    parser.addoption("--keys", type=int, default=2**20, help="most keys of bench_memory.py; 16777216 takes 4 GB")


def pytest_collection_modifyitems(config, items):
    for peers in (getattr(item.module, "PEERS", {}) for item in items):
        for name in [name for name in peers if not re.search(config.getoption("--peers"), name)]:
            del peers[name]


DEVICES = "cpu,cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=os.environ.get("MOCO_EXT_TEST_DEVICES", DEVICES).split(","), scope="session")
def device(request) -> torch.device:
    torch.manual_seed(0)
    return torch.device(request.param)


@pytest.fixture
def compare(benchmark, device, request):
    """compare(group, rows, want): check every row against `want`, then time them all in turn.

    `skipped` says by name why others take no part; it is printed and kept. If one of ours fails, this fails once the
    others are timed.
    """

    def run(group: str, rows: list[Row], want: Tensor, skipped: dict[str, str] | None = None) -> None:
        benchmark.group = f"{group}, {device.type}"
        skipped = dict(skipped or {})
        flush = torch.zeros(FLUSH_BYTES // 4, device=device) if device.type == "cuda" else None
        records, graphs, failure = {}, {}, None
        for row in rows:
            try:
                record = _checked(row, want if row.want is None else row.want)
                row.run()  # compiles, fills caches
                record["peak_bytes"] = peak_bytes(row.run, device)
                large = (record["peak_bytes"] or 0) > GRAPH_BYTES
                graphs[row.name] = None if flush is None or large else Graph.of(row, flush)
            except Exception as error:
                if row.name.startswith("ours"):
                    failure = failure or error
                why = "wrong" if isinstance(error, AssertionError) else type(error).__name__
                skipped[row.name] = f"{why}: {error}".splitlines()[0][:200]  # a baseline's failure is a result
                continue
            record["graph"] = graphs[row.name] is not None
            records[row.name] = record
        for name, why in skipped.items():
            print(f"{benchmark.group}: {name} skipped: {why}")
        rows = [row for row in rows if row.name in records]
        order = random.Random(0)

        def one_round():
            for row in order.sample(rows, len(rows)):
                device_ms, wall_ms = _sample(row, graphs[row.name], flush)
                records[row.name]["ms"].append(round(device_ms, 5))
                records[row.name]["wall_ms"].append(round(wall_ms, 5))

        benchmark.extra_info["rows"] = records
        benchmark.extra_info["skipped"] = skipped
        benchmark.extra_info["load"] = [os.getloadavg()[0]]
        benchmark.pedantic(one_round, rounds=request.config.getoption("rounds"), iterations=1)
        benchmark.extra_info["load"].append(os.getloadavg()[0])
        if failure is not None:
            raise failure

    return run


def _checked(row: Row, want: Tensor) -> dict:
    record = {"flops": row.flops, "bytes": row.bytes, "error": None, "ms": [], "wall_ms": []}
    if row.value is not None:
        record["error"] = ((row.value().double() - want).norm() / want.norm()).item()
        assert record["error"] <= row.tolerance, f"relative error {record['error']:.1e}"
    return record


@dataclass
class Graph:
    """`calls` calls of a row in a CUDA graph, each after a read of `flush`; and as many reads."""

    calls: int
    replay: Callable[[], None]
    replay_reads: Callable[[], None]

    @classmethod
    def of(cls, row: Row, flush: Tensor) -> "Graph | None":
        """None where the row cannot be captured."""
        if not row.captured:
            return None

        def captured(run: Callable[[], object]) -> Callable[[], None]:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(calls):
                    flush.sum()
                    run()
            return graph.replay

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                for _ in range(2):
                    row.run()
                ms = _elapsed(row.run)
                torch.cuda.set_sync_debug_mode("error")  # a capture that fails would leave torch's generator unusable
                try:
                    row.run()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            torch.cuda.current_stream().wait_stream(side)
            calls = max(row.calls, 20 if ms < 2 else 4 if ms < 10 else 1)
            return cls(calls, captured(row.run), captured(lambda: None))
        except RuntimeError as error:
            torch.cuda.synchronize()
            print(f"{row.name}: timed without a graph: {str(error).splitlines()[0]}")
            return None


def _elapsed(run: Callable[[], object]) -> float:
    """Milliseconds between two events of the current stream."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def _sample(row: Row, graph: Graph | None, flush: Tensor | None) -> tuple[float, float]:
    """(ms on the device, ms of wall clock) of one call; the same number twice on a CPU."""

    def calls() -> None:
        for _ in range(row.calls):
            row.run()

    if flush is not None:
        torch.cuda.synchronize()
    start = time.perf_counter()
    calls()
    if flush is not None:
        torch.cuda.synchronize()
    wall = (time.perf_counter() - start) * 1e3 / row.calls
    if flush is None:
        return wall, wall
    if graph is not None:
        return (_elapsed(graph.replay) - _elapsed(graph.replay_reads)) / graph.calls, wall
    flush.sum()
    return _elapsed(calls) / row.calls, wall


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
