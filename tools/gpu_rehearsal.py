"""Rehearses tools/gpu.py without a GPU: every stage, with mocks of the programs of a GPU machine.

The mocks fail, crash, hang and leave child processes; the script itself is terminated and resumes. pytest's options and
selections are checked by collecting the tests, and the timing of the benchmarks runs on mocks of torch.cuda.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAULTS = {  # program, MOCO_EXT_SM90, words of its arguments -> what it does
    "gpu_test_enqueue 0": "hang",
    "gpu_test_l2_normalize 0": "fail",
    "gpu_test_info_nce_options 1": "crash",
    "probe_cuda 0 info_nce 32 65536 128 bfloat16": "crash",
}


def stand_in(name: str, arguments: list[str]) -> int:
    """What a program of this name does in a rehearsal."""
    folder = Path(os.environ["REHEARSAL"])
    words = " ".join([name, os.environ.get("MOCO_EXT_SM90", "0"), *arguments])
    with (folder / "log").open("a") as log:
        log.write(json.dumps([name, *arguments]) + "\n")
    faults = json.loads((folder / "faults").read_text())
    fault = next((fault for start, fault in faults.items() if words.startswith(start)), None)
    if fault == "hang":
        child = subprocess.Popen(["sleep", "600"])
        (folder / "children").open("a").write(f"{os.getpid()} {child.pid} ")
        time.sleep(600)
    if fault == "crash":
        print('{"us": 1', flush=True)
        os.abort()
    if fault == "fail":
        print("FAILED: stand-in\n2 passed, 1 failed")
        return 1
    if name == "nvidia-smi":
        print("stand-in, 0, 9.0")
        return 0
    if name in ("ncu", "compute-sanitizer"):
        at = next(i for i, argument in enumerate(arguments) if argument.startswith(("probe_cuda", "gpu_test_")))
        os.execvp(arguments[at], arguments[at:])
    elif name == "probe_cuda":
        assert arguments[0] in ("info_nce", "momentum_update", "enqueue", "copy"), arguments
        print(json.dumps({"us": 20, "min_us": 19, "flop": 1e9, "bytes": 1e8, "correct": True, "error": "1.0e-04"}))
    elif arguments[:1] == ["bench/gemm_limit.py"]:
        print('{"bfloat16": 800.0}')
    elif arguments[:2] == ["-m", "pytest"]:
        assert (ROOT / arguments[2]).exists(), arguments
        if found := [argument for argument in arguments if argument.startswith("--benchmark-json=")]:
            report = json.loads((ROOT / "bench" / "results" / "cpu.json").read_text())
            benchmark = report["benchmarks"][0] | {"group": " ".join(arguments[2:9])}
            Path(found[0].partition("=")[2]).write_text(json.dumps(report | {"benchmarks": [benchmark]}))
    print("3 passed, 0 failed")
    return 0


# Standard input: arguments of pytest, a list a line, each of which must select tests. Then the benches' timing, with a
# clock of milliseconds: a call takes 5, a read of the flush buffer 3, and a graph's start 100.
COLLECT = """
import contextlib, json, runpy, sys, unittest.mock
import pytest, torch

for line in sys.stdin:
    if code := pytest.main([*json.loads(line), "--collect-only", "-q"]):
        sys.exit(f"pytest {line}: status {code}")

conftest = sys.modules["conftest"]
if hasattr(conftest, "Graph"):
    sys.argv[1:] = ["64"]
    runpy.run_path("bench/gemm_limit.py")
    now = 0

    def takes(ms):
        global now
        now += ms

    class Event:
        def __init__(self, enable_timing): pass
        def record(self): self.time = now
        def elapsed_time(self, end): return end.time - self.time

    class CUDAGraph:
        def replay(self): takes(100 + self.ms)

    @contextlib.contextmanager
    def graph(captured):
        start = now
        yield
        captured.ms = now - start

    cuda = unittest.mock.MagicMock(Event=Event, CUDAGraph=CUDAGraph, graph=graph)
    cuda.stream.return_value.__exit__.return_value = False
    with unittest.mock.patch.object(torch, "cuda", cuda):
        row, flush = conftest.Row("ours", lambda: takes(5)), unittest.mock.Mock(sum=lambda: takes(3))
        captured = conftest.Graph.of(row, flush)
        assert captured.calls == 4
        assert conftest.Graph.of(conftest.Row("replays", lambda: takes(5), captured=False), flush) is None
        for graph in captured, None:
            assert conftest._sample(row, graph, flush)[0] == 5
"""


def collect(folder: Path) -> None:
    commands = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    for tests in ("python_tests", "bench"):
        chosen = {tuple(command[3:]) for command in commands if command[1:3] == ["-m", "pytest"]}
        lines = [json.dumps(arguments) for arguments in sorted(chosen) if arguments[0].startswith(f"{tests}/")]
        assert lines, tests
        environment = os.environ | {"MOCO_EXT_TEST_DEVICES": "cuda", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", COLLECT], input="\n".join(lines), capture_output=True, text=True,
                              cwd=ROOT, env=environment)  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


class Rehearsal:
    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.out = folder, folder / "bin", folder / "out"
        self.bin.mkdir()
        tests = (f"gpu_{path.stem.removesuffix('_cuda')}" for path in ROOT.glob("csrc/tests/test_*_cuda.cu"))
        for name in ("nvidia-smi", "python", "compute-sanitizer", "ncu", "probe_cuda", *tests):
            (self.bin / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{__file__}" {name} "$@"\n')
            (self.bin / name).chmod(0o755)
        self.environment = os.environ | {"REHEARSAL": str(folder), "COMMIT": "0123456789abcdef"}
        self.environment["PATH"] = f"{self.bin}{os.pathsep}{os.environ['PATH']}"

    def start(self, *arguments: str, **faults: str) -> subprocess.Popen:
        (self.folder / "faults").write_text(json.dumps(faults))
        command = [sys.executable, str(ROOT / "tools" / "gpu.py"), *arguments, "--python", str(self.bin / "python")]
        command += ["--out", str(self.out), "--kept", str(self.folder / "kept")]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def records(self, stage: int) -> dict:
        found = json.loads((self.out / f"gpu-{stage}.json").read_text())
        assert found["device"] == "stand-in, 0, 9.0"
        return {record["name"]: record for record in found["records"]}

    def check_children(self) -> None:
        """None of the processes that hang runs any more."""
        states = ["ps", "-o", "s=", *(self.folder / "children").read_text().split()]
        deadline = time.monotonic() + 10
        while set(subprocess.run(states, capture_output=True, text=True).stdout.split()) - {"Z"}:
            assert time.monotonic() < deadline, states
            time.sleep(0.1)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        r = Rehearsal(Path(temporary))

        # Faults of programs cost their own cases, and the Hopper pass its default.
        run = r.start("1", "--limit", "15", **FAULTS)
        text, _ = run.communicate()
        assert run.returncode == 1, text
        status = {name: record["status"] for name, record in r.records(1).items()}
        bad = {name: value for name, value in status.items() if value != 0}
        probe = "probe info_nce 32 65536 128 bfloat16, portable"
        want = {"enqueue": 124, "l2_normalize": 1, "info_nce_options, Hopper": -6, probe: -6, "memcheck enqueue": -1}
        assert bad == want | {"memcheck l2_normalize": 1, "memcheck info_nce_options, Hopper": -6}, bad
        assert "limit: GEMM" in text, text
        assert len(text) < 12000
        r.check_children()

        # Terminated in the middle of a stage, then resumed: what had ended is not run again.
        run = r.start("2", **{"ncu 0": "hang"})
        while (r.folder / "children").read_text().count(" ") < 4:  # of enqueue, then of ncu
            time.sleep(0.1)
        run.send_signal(signal.SIGTERM)
        assert run.wait() == 143
        r.check_children()
        before = (r.folder / "log").read_text()
        for arguments in ("1", "--only", "enqueue|l2_normalize|info_nce_options|^probe info_nce 32 "), ("2",):
            run = r.start(*arguments)
            text, _ = run.communicate()
            assert run.returncode == 0, text
        after = (r.folder / "log").read_text().removeprefix(before)
        assert "test_enqueue.py" in after, after  # not run earlier, because its kernel test hung
        assert "test_queue.py" not in after, after

        # Without a sanitizer, and with too little time.
        (r.bin / "compute-sanitizer").unlink()
        run = r.start("3", "--minutes", "0.05")
        text, _ = run.communicate()
        assert run.returncode == 1, text
        assert "no time left" in text, text
        run = r.start("3", "4", "5")
        text, _ = run.communicate()
        assert run.returncode == 0, text
        assert any(record["hopper"] for name, record in r.records(3).items() if name.startswith("bench"))
        report = r.out / "bench.json"
        assert len(json.loads(report.read_text())["benchmarks"]) > 15
        subprocess.run(
            [sys.executable, str(ROOT / "bench" / "table.py"), str(report)], check=True, stdout=subprocess.DEVNULL
        )
        collect(r.folder)
        assert sorted(path.name for path in r.out.iterdir()) == ["bench.json", *(f"gpu-{n}.json" for n in range(1, 6))]
    print("gpu-rehearsal: passed")


if __name__ == "__main__":
    sys.exit(stand_in(sys.argv[1], sys.argv[2:]) if sys.argv[1:] else main())
