"""Each example, run as a user would, learns well beyond chance."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchvision")
pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*arguments: object) -> list[dict[str, float]]:
    """The metrics of each line that an example prints, by name: ``loss 2.65, top-1 30 %`` gives loss and top-1."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    lines = [re.findall(r"([a-z0-9_@-]+)'?:? (\d+\.?\d*)", line) for line in done.stdout.splitlines()]
    return [{name: float(value) for name, value in line} for line in lines]


def test_training_loop():
    chance, *epochs = run(EXAMPLES / "training_loop.py")
    assert chance["loss"] == pytest.approx(6.93)
    assert min(epoch["loss"] for epoch in epochs) < chance["loss"] - 0.5
    assert max(epoch["top-1"] for epoch in epochs) > 15  # chance: 0.1


def test_compiled():
    chance, *epochs = [line for line in run(EXAMPLES / "compiled.py") if "loss" in line]
    assert epochs[-1]["loss"] < chance["loss"] - 0.5


def test_ddp():
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    chance, *epochs = run(*torchrun, EXAMPLES / "ddp.py")
    assert epochs[-1]["loss"] < chance["loss"] - 0.5
    assert epochs[-1]["accuracy"] > 10


def test_text():
    chance, untrained, *steps = run(EXAMPLES / "text.py")
    assert steps[-1]["loss"] < chance["loss"] - 3
    assert steps[-1]["recall@1"] > untrained["recall@1"] + 10
    assert steps[-1]["recall@10"] > untrained["recall@10"] + 15


def test_image_text():
    chance, *steps = run(EXAMPLES / "image_text.py")
    assert steps[-1]["loss"] < chance["loss"] - 1
    assert steps[-1]["accuracy"] > 90  # of unseen images, by the nearest of ten captions
    assert steps[-1]["temperature"] != 0.07


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning(tmp_path, accumulate):
    pytest.importorskip("lightning")
    arguments = ("--epochs", 2 * accumulate + 1, "--accumulate", accumulate, "--output", tmp_path)
    (*_, last) = run(EXAMPLES / "lightning_moco.py", *arguments)
    assert last["loss"] < 6.8  # chance: 6.93
    assert last["knn_top1"] > 90  # that it is computed: digits are as good untrained
    assert last["after"] == {1: 3 * 19, 2: 5 * 10}[accumulate]  # of 19 batches an epoch, the last alone
