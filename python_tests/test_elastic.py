"""Elastic launches: several torchrun agents, here on the loopback interface, restart a run that lost a process."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("tensorboard")
from test_distributed import learned
from training import assert_equal_states, environment, state_of, torchrun

pytestmark = pytest.mark.slow

# Otherwise a restarted rank may read addresses of the ranks before it from the store that the agents share.
ENVIRONMENT = environment() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

# Eight steps of 32 images, whatever the number of nodes; the fault strikes once, before the seventh.
PROGRAM = """
import argparse, os, signal, sys
from pathlib import Path
from moco_ext import distributed
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
        if self.step == 6 and fault != "none" and distributed.rank() == distributed.world_size() - 1:
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

    def start(count: int, nodes: str, *arguments: object, restarts: int = 3) -> list[subprocess.Popen]:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", "1"]
        command += ["--max-restarts", str(restarts), "--rdzv-backend", "c10d", "--rdzv-id", "test"]
        command += ["--rdzv-endpoint", f"localhost:{port}", "--local-addr", "localhost"]
        command += [str(program), *map(str, arguments)]
        first = len(started)
        for number in range(first, first + count):
            with open(tmp_path / f"agent{number}.txt", "w") as out:
                agent = subprocess.Popen(command, stdout=out, stderr=out, env=ENVIRONMENT, start_new_session=True)
            started.append(agent)
        return started[first:]

    yield start
    for agent in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(agent.pid, signal.SIGKILL)  # its workers, too
        agent.wait()


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
            states[processes] = learned(state_of(folder / "run"))
        return states[processes]

    return run


@pytest.mark.parametrize(
    ("nodes", "fault", "more"),
    [
        (2, "dies", []),
        (2, "dies", ["parallel=fsdp", "checkpoint_format=dcp"]),
        (2, "hangs", []),
        (4, "dies", []),
    ],
)
def test_a_lost_rank_is_restarted(tmp_path, agents, unbroken, nodes, fault, more):
    """The agents start all ranks again, which resume from the newest checkpoint and end with the same weights."""
    timeout = 0.1 if fault == "hangs" else 2
    started = agents(nodes, f"1:{nodes}", tmp_path / "run", 32 // nodes, fault, timeout, *more)
    assert ended(started, 240) == [0] * nodes, said(tmp_path)
    assert (tmp_path / "run" / "struck").exists()
    assert_equal_states(learned(state_of(tmp_path / "run")), unbroken(nodes))
