"""``moco-ext info``, and the self-test with every instruction set of this processor."""

import argparse
import json
import os
import subprocess
import sys

import pytest
import torch

from moco_ext import ops
from moco_ext.cli import info


def test_facts_describe_this_installation():
    facts = info.collect()
    assert facts["torch"] == torch.__version__
    assert "libmoco_ext.so" in facts["libraries"]
    assert {name.partition(" ")[0] for name in facts["self_test"]} == {
        "info_nce", "enqueue_", "momentum_update_", "l2_normalize"
    }  # fmt: skip
    assert all(test["passed"] for test in facts["self_test"].values())
    json.dumps(facts)


def test_a_wrong_kernel_fails_the_self_test(monkeypatch, capsys):
    monkeypatch.setattr(ops, "l2_normalize", lambda x: x)
    assert info.run(argparse.Namespace(json=False)) == 1
    out = capsys.readouterr().out
    assert "WRONG" in out
    assert "FAILED" in out


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_computes_the_same(isa):
    """MOCO_EXT_ISA lowers the instruction set; one that the processor lacks selects the next lower one."""
    run = subprocess.run(
        [sys.executable, "-m", "moco_ext", "info", "--json"],
        env=os.environ | {"MOCO_EXT_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    used = json.loads(run.stdout)["cpu_instruction_set"]
    assert used == isa or ["baseline", "avx2", "avx512"].index(used) < ["baseline", "avx2", "avx512"].index(isa)
