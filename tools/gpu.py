"""Runs `make gpu` on a machine with a GPU: build, tests, timings, sanitizers, benchmarks and training, in stages.

A stage ends within --minutes. Its most important cases run first, each in its own process, which is killed with its
children at its time limit. Finished cases are kept in build/gpu-cases: the same command continues where the last one
ended, until a source file changes. The machine needs nvcc and a Python >= 3.11 with torch, setuptools, cmake, ninja,
pytest and pytest-benchmark, but no network. Stage 5 also needs [train] and Fashion-MNIST. The results are
OUT/gpu-STAGE.json, and OUT/bench.json, label-efficiency.json and learning.json for bench/results.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cmake"  # setup.py's
SOURCES = ("CMakeLists.txt", "setup.py", "csrc", "moco_ext", "python_tests", "bench", "tools")
TIMEOUT, NOT_FOUND, NOT_RUN = 124, 127, -1
KEPT = 30000  # characters of output
PASSES = ("portable", "Hopper")  # MOCO_EXT_SM90 of 0 and 1; the end of a case's name
OPS = sorted(path.stem[5:-5] for path in ROOT.glob("csrc/tests/test_*_cuda.cu"))
KERNELS = [op for op in OPS if op.startswith("info_nce")]  # these have both passes
OTHERS = [op for op in OPS if op not in KERNELS]
# Arguments of probe_cuda -> goal on an H200, microseconds; 0: none
PROBES = {
    "info_nce 256 65536 128 bfloat16": 18,
    "info_nce 256 65536 128 float32 3": 60,
    "info_nce 256 65536 128 float32 2": 34,
    "info_nce 32 65536 128 bfloat16": 9,
    "info_nce 32 65536 128 float32 3": 0,
    "info_nce 1024 65536 128 bfloat16": 54,
    "info_nce 4096 65536 128 bfloat16": 205,
    "info_nce 256 1048576 128 bfloat16": 205,
    "info_nce 256 65536 768 bfloat16": 85,
    "info_nce 256 65536 128 float32 1": 0,
    "info_nce 256 65536 128 float16": 18,
    "info_nce 256 65536 64 bfloat16": 0,
    "info_nce 256 65536 256 bfloat16": 0,
    "info_nce 256 65536 128 bfloat16 forward": 0,
    "info_nce 256 65536 128 bfloat16 near": 0,
    "info_nce 4096 65536 128 bfloat16 near": 0,
    "copy": 0,
    "momentum_update": 76,
    "momentum_update copy": 0,
    "enqueue 256 float32": 2.5,
    "enqueue 256 bfloat16": 2.5,
    "enqueue 65536 bfloat16": 0,
}
NCU_SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "WarpStateStats", "Occupancy")
PYTEST_OF_BOTH = ("info_nce", "info_nce_options", "soft_labels", "clip", "moco", "step_cuda")
PYTEST = ("compile", "shuffle_bn", "momentum_update", "enqueue", "queue", "l2_normalize", "flatten_parameters",
          "freed_storage", "end_to_end_and_memory_bank", "nearest_keys", "distillation", "errors", "info")  # fmt: skip
LEARNING = "--epochs 40 -b 256 --lr 0.12 --augment-on device"  # of Fashion-MNIST
# Baselines that torch has. The others are packages, whose faults must not cost these results.
TORCH = "official|flash attention|linear_cross_entropy"

# A case: name, command, and limit in seconds. A group: how many of its cases run at a time.
Case = tuple[str, str, float]
Group = tuple[int, list[Case]]


def build() -> Iterator[Group]:
    """Every stage begins so; done at once if the machine still has the build."""
    yield 1, [("build", "python -m pip install -v --no-build-isolation --no-deps --editable .", 420)]
    yield 2, [(f"{op}, Hopper", f"gpu_test_{op}", 90) for op in KERNELS]


def sanitize(tool: str) -> Group:
    sanitizer = f"compute-sanitizer --tool {tool} --error-exitcode 9"
    cases = [(f"{tool} {op}, {p}", f"{sanitizer} gpu_test_{op} 10", 120.0) for op in KERNELS for p in PASSES]
    return 4, cases + [(f"{tool} {op}", f"{sanitizer} gpu_test_{op}", 120.0) for op in OTHERS]


def bench(name: str, which: str = "", limit: float = 120, peers: str = "") -> Case:
    select = f"cuda and {which}" if which else "cuda"
    label = f"bench {name} {which} {'torch' if peers == TORCH else ''}".strip()
    return label, (f"python -m pytest bench/bench_{name}.py -q -s -rs -k '{select}' --keys={2**24} '--peers={peers}' "
                   f"--rounds={8 if name == 'step' else 20} --benchmark-json=REPORT"), limit  # fmt: skip


def stage_1() -> Iterator[Group]:
    yield from build()
    tests = [(f"{op}, portable", f"gpu_test_{op}", 90.0) for op in KERNELS]
    yield 6, tests + [(op, f"gpu_test_{op} --large", 90) for op in OTHERS]  # momentum_update: beyond 2^31 elements
    yield 1, [(f"probe {what}, {p}", f"probe_cuda {what}", 20) for what in PROBES for p in PASSES
              if p == "portable" or what.startswith("info_nce")]  # fmt: skip
    yield 1, [("limit: GEMM", "python bench/gemm_limit.py", 60)]
    yield sanitize("memcheck")


def stage_2() -> Iterator[Group]:
    yield from build()
    tests = [f"{test}, {p}" for test in PYTEST_OF_BOTH for p in PASSES] + list(PYTEST)
    yield 10, [(f"pytest {test}", f"python -m pytest python_tests/test_{test.split(',')[0]}.py -q" +
                (" -m 'not slow'" if test == "compile" else ""), 240) for test in tests]  # fmt: skip
    ncu = f"ncu --profile-from-start off --clock-control none {' '.join(f'--section {x}' for x in NCU_SECTIONS)}"
    kernels = [f"{what}, {p}" for what in list(PROBES)[:2] for p in PASSES] + ["momentum_update", "enqueue 256 float32"]
    yield 1, [(f"ncu {what}", f"{ncu} probe_cuda {what.split(',')[0]} once", 60) for what in kernels]


def stage_3() -> Iterator[Group]:
    yield from build()
    shapes = [f"N{n}-K65536-C128-{dtype}" for n, dtype in
              ((256, "float32"), (256, "bfloat16"), (32, "bfloat16"), (4096, "bfloat16"), (32, "float32"))]  # fmt: skip
    yield 1, [bench("info_nce", shape, peers=TORCH) for shape in shapes]
    yield 1, [bench("momentum_update", "resnet50"), bench("enqueue", "256-128")]
    yield 1, [bench("info_nce", shape) for shape in shapes]


def stage_4() -> Iterator[Group]:
    yield from build()
    yield 1, [bench("step", f"resnet50-{batch}x224", 240) for batch in (32, 256)]
    graphs = {"plain": "not symmetric and not bf16", "symmetric": "symmetric", "bf16": "bf16"}
    yield 4, [(f"pytest CUDA graphs, {name}",
               f"python -m pytest python_tests/test_trainer.py -q -k 'cuda_graphs and {which}'", 240.0)
              for name, which in graphs.items()] + [
        ("pytest inductor", "python -m pytest python_tests/test_compile.py -q -m slow", 240)]  # fmt: skip
    yield 1, [bench("info_nce", shape) for shape in ("C768", "N1024", "K1048576")]
    yield sanitize("racecheck")
    yield sanitize("synccheck")
    yield 1, [bench(name) for name in ("momentum_update", "enqueue", "host", "family", "shuffle", "memory")]
    yield sanitize("initcheck")
    yield (
        1,
        [("pytest all", "python -m pytest python_tests -q -n 12 --dist loadfile -m 'not slow and not torture'", 300)],
    )


def stage_5() -> Iterator[Group]:
    yield from build()
    final = (f"python bench/label_efficiency.py final --settings '{LEARNING}' --rates 0.003 0.03 --device cuda "
             "--workers 4 --out OUT/label-efficiency.json --work build/gpu-learning")  # fmt: skip
    yield 4, [(f"label efficiency, seed {seed}", f"{final} --seeds {seed}", 400.0) for seed in range(3)]
    yield 1, [("trainers", "python bench/compare_learning.py --device cuda --epochs 20 --curve 2 --seeds 0 1 2 3 4 "
               "--out OUT/learning.json", 300)]  # fmt: skip


STAGES = {1: stage_1, 2: stage_2, 3: stage_3, 4: stage_4, 5: stage_5}


class Runner:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.out, self.kept, self.only, self.python = arguments.out, arguments.kept, arguments.only, arguments.python
        self.limit = arguments.limit
        self.running: set[int] = set()  # process groups
        self.tree = tree()
        ncu = sorted(Path("/opt/nvidia/nsight-compute").glob("*"))
        path = [os.environ["PATH"], BUILD / "csrc" / "tests", "/usr/local/cuda/bin", *ncu]
        self.environment = os.environ | {
            "PATH": os.pathsep.join(map(str, path)),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "MOCO_EXT_CUDA": "1",
            "MOCO_EXT_CMAKE_ARGS": "-DMOCO_EXT_TESTS=ON",
            "MOCO_EXT_TEST_DEVICES": "cuda",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",  # the network
        }
        query = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
        try:
            self.device = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            raise SystemExit("make gpu: no NVIDIA GPU found (nvidia-smi failed)") from None
        for folder in (self.out, self.kept):
            folder.mkdir(parents=True, exist_ok=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def stage(self, number: int, minutes: float) -> bool:
        deadline, records = time.monotonic() + 60 * minutes, []
        for workers, cases in STAGES[number]():
            with ThreadPoolExecutor(workers) as pool:
                for record in pool.map(lambda case: self.record(case, deadline), cases):
                    records.append(record)
                    self.write(number, records)
            if records[0]["status"] != 0:  # the build
                break
        print(f"\n===== stage {number}, {self.device}", *summary(records), sep="\n", flush=True)
        return all(record["status"] == 0 or missing_tool(record) for record in records)

    def record(self, case: Case, deadline: float) -> dict:
        """The case's record: an earlier one, or that of running it now."""
        name, command, limit = case[0], case[1], min(case[2], self.limit)
        record = {"name": name, "command": command, "status": NOT_RUN, "seconds": 0.0, "output": ""}
        selected = self.only is not None and re.search(self.only, name) is not None
        earlier = self.earlier(name)
        if earlier is not None and not selected:
            return earlier
        left = deadline - time.monotonic()
        tests = [f"{op}, Hopper" for op in KERNELS]
        hopper = [(self.earlier(test) or {"status": NOT_RUN})["status"] for test in tests]
        if self.only is not None and not selected and name != "build":
            return record | {"output": "not selected"}
        hangs = [self.earlier(name.partition(" ")[2])]  # of "memcheck enqueue": enqueue
        hangs += [self.earlier(tests[0])] if name.endswith(", Hopper") and name not in tests else []
        if any(test is not None and test["status"] == TIMEOUT for test in hangs):
            return record | {"output": "its kernel test hangs"}
        if left < min(10, limit):
            return record | {"output": "no time left"}
        # What names no pass takes Hopper's if that has passed its tests.
        enabled = not name.endswith("portable") and (name.endswith("Hopper") or not any(hopper))
        started = time.monotonic()
        status, output = self.run(name, command, min(limit, left), {"MOCO_EXT_SM90": str(int(enabled))})
        output = self.without_paths(output) if name != "build" or status != 0 else ""
        counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", output)}
        record |= {"status": status, "seconds": round(time.monotonic() - started, 1), "hopper": enabled}
        record |= {"counts": counts, "output": output[-KEPT:], "tree": self.tree}
        with contextlib.suppress(json.JSONDecodeError, IndexError):  # most programs print none
            record["result"] = json.loads([line for line in output.splitlines() if line.startswith("{")][-1])
        if status != TIMEOUT or left > limit:  # else it may pass with all of a stage's time
            write(self.path(name, ".json"), record)
        print(f"{name}: status {status} in {record['seconds']} s", flush=True)
        return record

    def run(self, name: str, command: str, limit: float, environment: dict[str, str]) -> tuple[int, str]:
        log, report = self.path(name, ".log"), self.path(name, ".report")
        report.unlink(missing_ok=True)  # of other sources
        words = [word.replace("REPORT", str(report)) for word in shlex.split(command)]
        words = [word.replace("OUT/", f"{self.out}/") for word in words]
        words[:1] = [self.python if words[0] == "python" else words[0]]
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(words, cwd=ROOT, env=self.environment | environment, process_group=0,
                                           stdin=subprocess.DEVNULL, stdout=output, stderr=output)  # fmt: skip
            except OSError as error:
                return NOT_FOUND, str(error)
            self.running.add(process.pid)
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = TIMEOUT
            self.running.discard(process.pid)
            kill_group(process.pid)  # also what a process that ended has left behind
            process.wait()
        return status, log.read_text(errors="replace")

    def without_paths(self, output: str) -> str:
        """The results are published: they name no folder of the machine."""
        folders = {self.kept: "kept", self.out: "out", ROOT: ".", Path(sys.prefix): "python", Path.home(): "~"}
        for folder, name in folders.items():
            output = output.replace(str(folder.absolute()), name)
        return output

    def stop(self, *_: object) -> None:
        for group in list(self.running):
            kill_group(group)
        os._exit(143)  # the results hold every case that had ended

    def path(self, name: str, suffix: str) -> Path:
        return self.kept / (re.sub(r"[^\w.-]+", "-", name) + suffix)

    def earlier(self, name: str) -> dict | None:
        path = self.path(name, ".json")
        found = json.loads(path.read_text()) if path.is_file() else {"tree": None}
        return found if found["tree"] == self.tree else None

    def write(self, number: int, records: list[dict]) -> None:
        commit = os.environ.get("COMMIT")
        content = {"device": self.device, "tree": self.tree, "commit": commit, "records": records}
        write(self.out / f"gpu-{number}.json", content)
        groups: dict[str, dict] = {}  # in the order of files, one with all baselines replaces that with TORCH's
        for path in sorted(self.kept.glob("bench-*.report")):
            if path.stat().st_size and self.earlier(path.stem):  # empty: nothing was measured
                report = json.loads(path.read_text())
                groups |= {benchmark["group"]: benchmark for benchmark in report["benchmarks"]}
        if groups:
            report["benchmarks"] = list(groups.values())
            if commit:  # pytest-benchmark finds it only in a git checkout
                report["commit_info"] = {"id": commit, "dirty": commit.endswith("-dirty")}
            write(self.out / "bench.json", report)


def tree() -> str:
    """A hash of all sources. A record counts only for the sources it was made from."""
    digest = hashlib.sha256()
    for source in SOURCES:
        for path in sorted([ROOT / source, *(ROOT / source).rglob("*")]):
            if path.suffix in (".txt", ".py", ".cpp", ".h", ".inc", ".cu", ".cuh"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def write(path: Path, content: dict) -> None:
    """A file is complete whenever this process is killed."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1))
    part.replace(path)


def missing_tool(record: dict) -> bool:
    return record["status"] == NOT_FOUND and record["command"].startswith(("ncu", "compute-sanitizer"))


def summary(records: list[dict]) -> list[str]:
    """The end of each failure's output, a table of the probes, and a line for each other case."""
    failed = [record for record in records if record["status"] not in (0, NOT_RUN) and not missing_tool(record)]
    lines = [line for record in failed[:10] for line in (f"--- {record['name']}", *record["output"].splitlines()[-8:])]
    results = {record["name"]: record["result"] for record in records if "result" in record}
    table = []
    for what, goal in PROBES.items():
        found = [results.get(f"probe {what}, {p}") for p in PASSES]
        if best := min((x for x in found if x), key=lambda x: x["us"], default=None):
            cells = [f"{x['us']:.2f} ({x['min_us']:.2f})" if x else "" for x in found]
            rates = f"{best['flop'] / best['us'] / 1e6:9.0f}{best['bytes'] / best['us'] / 1e3:7.0f}"
            errors = " ".join(x["error"] + ("" if x["correct"] else " WRONG") for x in found if x)
            table.append(f"{what:<40}{cells[0]:>18}{cells[1]:>18}{goal or '':>7}{rates}  {errors}")
    if table:
        lines.append(f"us a call, median (min){'portable':>35}{'Hopper':>18}   goal  TFLOP/s   GB/s  error")
    lines += [*table, *(f"{name}: {results[name]}" for name in results if name.startswith("limit"))]
    for record in records:
        if not record["name"].startswith("probe") or record["status"] != 0:
            counts = ", ".join(f"{n} {word}" for word, n in record.get("counts", {}).items())
            why = record["output"] if record["status"] == NOT_RUN else counts
            lines.append(f"{record['name']:<60}status {record['status']:>4}{record['seconds']:>8} s  {why}")
    hopper = [x["status"] for x in records if x["name"].endswith(", Hopper") and not missing_tool(x)]
    return [*lines, f"Hopper pass: {hopper.count(0)} of {len(hopper)} cases passed"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", type=int, help="of 1 to 5; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of the results")
    parser.add_argument("--kept", type=Path, default=ROOT / "build" / "gpu-cases", help="folder of finished cases")
    parser.add_argument("--minutes", type=float, default=9, help="limit of a stage")
    parser.add_argument("--limit", type=float, default=420, help="longest limit of a case, in seconds")
    parser.add_argument("--only", help="run only the cases whose name matches, also those that have ended before")
    parser.add_argument("--python", default=sys.executable)
    arguments = parser.parse_args()
    runner = Runner(arguments)
    return int(not all([runner.stage(number, arguments.minutes) for number in arguments.stages or STAGES]))


if __name__ == "__main__":
    sys.exit(main())
