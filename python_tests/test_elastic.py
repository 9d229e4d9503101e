"""Elastic launches: several torchrun agents, here on the loopback interface, restart a run that lost a process."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("tensorboard")
from test_distributed import learned
from training import assert_equal_states, environment, torchrun

from moco_ext.checkpoints.training import load_checkpoint

# Otherwise a restarted rank may read addresses of the ranks before it from the store that the agents share.
ENVIRONMENT = environment() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

# Eight steps of 32 images, whatever the number of nodes. The fault strikes before the seventh, once.
PROGRAM = """
import argparse, os, signal, sys
from pathlib import Path
from moco_ext.cli.errors import guarded
from moco_ext.cli import launch
from moco_ext.train import pretrain
from moco_ext.train.trainer import Trainer
from training import few_digits, run_in, tiny

folder, images, fault, timeout, *extra = sys.argv[1:]
folder = Path(folder)
struck = folder / "struck"

def work(args, options):
    train_step = Trainer._train_step
    def step(self, batches, *rest):
        if self.step == 6 and fault != "none" and os.environ["AGENT"] == "1":
            if fault == "always" or not struck.exists():
                struck.write_text("")
                if fault == "node":  # its agent, too, as when a machine is lost
                    os.kill(os.getppid(), signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGSTOP if fault == "hangs" else signal.SIGKILL)
        train_step(self, batches, *rest)
    Trainer._train_step = step
    more = dict(item.split("=") for item in extra)
    run = run_in(folder, local_world=options.local_world, save_every=2, resume="auto", **more)
    pretrain(tiny(steps=8, log_every=100, batch_size=int(images)), few_digits(), run)
    return 0

args = argparse.Namespace(device="cpu", dist_timeout=float(timeout))
sys.exit(guarded(lambda: launch.run(work, args, Path())))
"""


@pytest.fixture
def agents(tmp_path):
    """A function that starts torchrun's agents, one process each, on one rendezvous."""
    program, started = tmp_path / "program.py", []
    program.write_text(PROGRAM)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def start(count: int, nodes: int, *arguments: object, restarts: int = 2, conf: str = "") -> list[subprocess.Popen]:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--nproc-per-node", "1"]
        command += ["--max-restarts", str(restarts), "--rdzv-backend", "c10d", "--rdzv-id", "test"]
        command += ["--rdzv-endpoint", f"localhost:{port}", "--local-addr", "localhost"]
        command += [str(program), *map(str, arguments)]
        first = len(started)
        for number in range(first, first + count):
            host = f"is_host={int(number == 0)}{conf}"  # the first has the store of the rendezvous
            own = [*command[:3], "--rdzv-conf", host, *command[3:]]
            with open(tmp_path / f"agent{number}.txt", "w") as out:
                agent = subprocess.Popen(own, stdout=out, stderr=out, env=ENVIRONMENT | {"AGENT": str(number)})
            started.append(agent)
        return started[first:]

    yield start
    for agent in started:
        workers = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout
        for pid in (agent.pid, *map(int, workers.split())) if agent.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
        agent.wait()


def end_of(run: Path) -> dict:
    return learned(load_checkpoint(run / "checkpoint.pth")["state_dict"])


def said(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("agent*.txt")))


def ended(agents: list[subprocess.Popen], timeout: float) -> list[int]:
    deadline = time.monotonic() + timeout
    return [agent.wait(timeout=max(1, deadline - time.monotonic())) for agent in agents]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """State after eight steps of a run on one node of as many processes."""
    states = {}

    def run(processes: int):
        if processes not in states:
            folder = tmp_path_factory.mktemp("unbroken")
            (folder / "program.py").write_text(PROGRAM)
            done = torchrun(processes, folder / "program.py", folder / "run", 32, "none", 1)
            assert done.returncode == 0, done.stderr
            states[processes] = end_of(folder / "run")
        return states[processes]

    return run


@pytest.mark.parametrize(
    ("nodes", "fault", "more"),
    [
        pytest.param(2, "dies", [], marks=pytest.mark.slow),
        pytest.param(2, "dies", ["parallel=fsdp", "checkpoint_format=dcp"], marks=pytest.mark.torture),
        pytest.param(2, "hangs", [], marks=pytest.mark.torture),
        pytest.param(4, "dies", [], marks=pytest.mark.torture),
    ],
)
def test_a_lost_rank_is_restarted(tmp_path, agents, unbroken, nodes, fault, more):
    """The agents start all ranks again, which resume from the newest checkpoint and end with the same weights."""
    timeout = 0.1 if fault == "hangs" else 2
    started = agents(nodes, nodes, tmp_path / "run", 32 // nodes, fault, timeout, *more)
    assert ended(started, 240) == [0] * nodes, said(tmp_path)
    assert (tmp_path / "run" / "struck").exists()
    if nodes == 2:
        assert_equal_states(end_of(tmp_path / "run"), unbroken(nodes))
    else:  # of more than two ranks, DDP's first step after a start sums gradients in another order than the others
        assert_close_states(end_of(tmp_path / "run"), unbroken(nodes))


def assert_close_states(one: dict, other: dict) -> None:
    for name, value in other.items():
        torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.torture
def test_a_lost_node_is_replaced(tmp_path, agents, unbroken):
    first, lost = agents(2, 2, tmp_path / "run", 16, "node", 2)
    assert lost.wait(timeout=120) == -signal.SIGKILL, said(tmp_path)
    new = agents(1, 2, tmp_path / "run", 16, "node", 2)
    assert ended([first, *new], 240) == [0, 0], said(tmp_path)
    assert_equal_states(end_of(tmp_path / "run"), unbroken(2))


@pytest.mark.torture
def test_a_lost_node_without_a_replacement(tmp_path, agents):
    first, _ = agents(2, 2, tmp_path / "run", 16, "node", 2, conf=",join_timeout=40")
    assert ended([first], 240) == [1], said(tmp_path)
    assert "RendezvousTimeoutError" in said(tmp_path)


@pytest.mark.slow
def test_after_the_last_restart_all_end_with_a_message(tmp_path, agents):
    started = agents(2, 2, tmp_path / "run", 16, "always", 2, restarts=1)
    assert ended(started, 240) == [1, 1], said(tmp_path)
    assert "moco-ext: error: process group: rank" in said(tmp_path)
