"""tools/fuzz.py: random calls of the CPU operators against float64, and what it reports of a wrong one."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moco_ext

TOOL = Path(__file__).parent.parent / "tools" / "fuzz.py"


@pytest.mark.slow
def test_random_calls_match_float64():
    done = subprocess.run([sys.executable, TOOL, "--seconds", "20"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    calls, different = map(int, re.search(r"'calls': (\d+), 'different': (\d+)", done.stdout).groups())
    assert calls >= 9 * 3  # of every operator with every instruction set
    assert different == 0


def test_a_wrong_result_is_reported_as_a_command_that_repeats_it(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("fuzz", TOOL)
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    monkeypatch.setenv("MOCO_EXT_ISA", "baseline")  # no processes for the others
    threads, right = torch.get_num_threads(), moco_ext.l2_normalize

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fuzz.py", *arguments])
        status = fuzz.main()
        return status, capsys.readouterr().out.splitlines()

    try:
        assert run("--count", "9")[0] == 0
        monkeypatch.setattr(moco_ext, "l2_normalize", lambda x, eps: right(x, eps) * 1.001)
        status, (*lines, total) = run("--count", "90")
        assert status == 1
        assert len(lines) >= 5
        assert total == f"{{'calls': 90, 'different': {len(lines)}}}"
        command = re.match(
            r"MOCO_EXT_ISA=\w+ python tools/fuzz.py (--seed 0 --first \d+ --count 1)  # .*l2_normalize", lines[0]
        )
        assert run(*command[1].split()) == (1, [lines[0], "{'calls': 1, 'different': 1}"])
    finally:
        torch.set_num_threads(threads)
