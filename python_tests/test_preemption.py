"""Signals: a run saves before it ends, and a group with a stopped rank ends."""

import contextlib
import json
import multiprocessing
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
from training import environment, few_digits, run_in, tiny

from moco_ext.data.workers import leave_signals_to_parent, sigterm_held
from moco_ext.train import pretrain
from moco_ext.train.trainer import Trainer

PRETRAIN = [sys.executable, "-m", "moco_ext", "pretrain", "--data", "digits", "--device", "cpu", "--threads", "1"]
LONG = ["--epochs", "900", "--online-knn", "0", "--moco-k", "100", "-b", "64", "-p", "2"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *PRETRAIN[2:]]


def start(command: list[str], output: Path) -> subprocess.Popen:
    """A command that trains, as the leader of a process group, after its first steps."""
    run = subprocess.Popen(
        [*command, "--output", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment() | {"PYTHONUNBUFFERED": "1"},
        cwd=output.parent,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (output / "checkpoint.pth").is_file():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["one process", "--multiprocessing-distributed", "torchrun"])
def test_a_signal_to_the_process_group_saves_and_ends(tmp_path, launcher):
    """As timeout, Slurm and containers send it: to trainers, launchers and loader workers at once."""
    output = tmp_path / "run"
    command = TORCHRUN if launcher == "torchrun" else [*PRETRAIN, *([launcher] if launcher.startswith("--") else [])]
    run = start([*command, *LONG, "--save-every", "1", "-j", "2"], output)
    os.killpg(run.pid, signal.SIGTERM)
    out, err = run.communicate(timeout=60)
    assert "DataLoader worker" not in err
    assert "Traceback" not in err or launcher == "torchrun"  # torchrun reports its own signal with one
    if launcher != "torchrun":
        assert run.returncode == 143
    step = torch.load(output / "checkpoint.pth", weights_only=True)["trainer"]["step"]
    assert f"SIGTERM after step {step:,}" in out


def test_a_signal_ends_an_evaluation(tmp_path, monkeypatch):
    """It may take longer than a scheduler waits. The last one too, before the evaluation that follows training."""

    def evaluate(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    monkeypatch.setattr(Trainer, "_knn", evaluate)
    config, data, started = tiny(steps=6, log_every=3, online_knn=3), few_digits(), time.monotonic()
    for step, resume in ((3, None), (6, "auto")):
        with pytest.raises(SystemExit, match="143"):
            pretrain(config, data, run_in(tmp_path, resume=resume))
        assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["trainer"]["step"] == step
    assert time.monotonic() - started < 30
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], "knn_top1" in record) for record in records] == [(3, False), (6, False)]


@pytest.mark.slow
def test_a_run_that_a_signal_ended_resumes(tmp_path):
    output = tmp_path / "run"
    run = start([*PRETRAIN, *LONG, "-j", "2"], output)
    os.killpg(run.pid, signal.SIGTERM)
    run.communicate(timeout=60)
    step = torch.load(output / "checkpoint.pth", weights_only=True)["trainer"]["step"]
    resumed = [*PRETRAIN, *LONG, "--steps", str(step + 1), "--resume", "auto", "-j", "0", "--output", str(output)]
    done = subprocess.run(resumed, capture_output=True, text=True, timeout=120, env=environment(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"resumed at step {step:,} of {step + 1:,}" in done.stdout


def worker(ready) -> None:
    leave_signals_to_parent(0)
    ready.set()
    time.sleep(60)


def test_where_signals_have_no_sender_sigterm_ends_a_worker(monkeypatch):
    monkeypatch.setattr("moco_ext.data.workers._KNOWS_SENDER", False)
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=worker, args=(ready,))
    with sigterm_held():
        process.start()
    assert ready.wait(10)
    process.terminate()
    process.join(10)
    assert process.exitcode == -signal.SIGTERM


def test_a_loader_worker_ends_by_its_parent_alone():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=worker, args=(ready,))
    process.start()
    assert ready.wait(10)
    for name in ("TERM", "INT"):
        subprocess.run(["kill", f"-{name}", str(process.pid)], check=True)
    process.join(0.5)
    assert process.is_alive()
    process.terminate()
    process.join(10)
    assert process.exitcode == 0


@pytest.mark.slow
def test_ctrl_c_is_one_line(tmp_path, interruptible):
    output = tmp_path / "run"
    run = start([*PRETRAIN, *LONG, "--save-every", "1", "-j", "2"], output)
    os.killpg(run.pid, signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert err == "moco-ext: interrupted\n"


def test_an_interrupt_that_a_library_clears_is_raised_again(interruptible):
    from moco_ext.train.preemption import Preemption

    before = signal.getsignal(signal.SIGINT)
    with Preemption() as preemption:
        assert not preemption.agreed(True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            preemption.agreed(True)
    assert signal.getsignal(signal.SIGINT) is before


STOPPED = """
import argparse, os, signal, sys
from pathlib import Path
from moco_ext import distributed
from moco_ext.cli import launch
from moco_ext.cli.errors import guarded
from moco_ext.train import pretrain
from moco_ext.train.preemption import Preemption
from moco_ext.train.trainer import Trainer
from training import few_digits, run_in, tiny

Preemption.GRACE = 2.0

def work(args, options):
    train_step = Trainer._train_step
    def stop(self, *rest):
        if self.step == 3:
            Path(sys.argv[1], f"pid{distributed.rank()}").write_text(str(os.getpid()))
            if distributed.rank() == stopped:
                os.kill(os.getpid(), signal.SIGSTOP)
        train_step(self, *rest)
    Trainer._train_step = stop
    pretrain(tiny(shuffle_bn="none"), few_digits(), run_in(Path(sys.argv[1]), local_world=2))
    return 0

rank, stopped, port, timeout = map(float, sys.argv[2:])
args = argparse.Namespace(device="cpu", world_size=2, rank=int(rank), dist_url=f"tcp://127.0.0.1:{port:.0f}")
args.dist_timeout = timeout / 60
sys.exit(guarded(lambda: launch.run(work, args, Path())))
"""


@pytest.fixture
def with_a_stopped_rank(tmp_path):
    """Starts two ranks, of which one stops itself before its fourth step; the other one."""
    program = tmp_path / "stopped.py"
    program.write_text(STOPPED)
    ranks = []

    def start(stopped: int, timeout: float) -> subprocess.Popen:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(2):
            arguments = [tmp_path / "run", rank, stopped, port, timeout]
            command = [sys.executable, str(program), *map(str, arguments)]
            ranks.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()))
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / f"pid{stopped}").is_file():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return ranks[1 - stopped]

    yield start
    for process in ranks:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])  # rank 0 holds the store
def test_a_stopped_rank_is_named_and_the_others_end(with_a_stopped_rank, stopped):
    other = with_a_stopped_rank(stopped, timeout=4)
    _, err = other.communicate(timeout=40)
    assert other.returncode == 1
    named = f"process group: rank {1 - stopped} waited too long for rank {stopped}, which may be stopped"
    assert f"moco-ext: error: {named}" in err


@pytest.mark.slow
def test_sigterm_ends_a_rank_that_waits_for_a_stopped_one(with_a_stopped_rank):
    rank0 = with_a_stopped_rank(stopped=1, timeout=600)
    time.sleep(1)
    rank0.send_signal(signal.SIGTERM)
    _, err = rank0.communicate(timeout=20)
    assert rank0.returncode == 143
    assert "moco-ext: error: rank 0 got SIGTERM but cannot finish its step" in err


def slow_to_start(number: int) -> None:
    time.sleep(1)
    leave_signals_to_parent(number)


def test_a_worker_that_is_still_starting_leaves_sigterm_to_its_parent():
    """torch's own handler, in place before worker_init_fn runs, would end it."""
    loader = torch.utils.data.DataLoader(range(4), num_workers=1, worker_init_fn=slow_to_start)
    with sigterm_held():
        numbers = iter(loader)
    time.sleep(0.3)
    subprocess.run(["kill", "-TERM", str(numbers._workers[0].pid)], check=True)
    assert [int(number) for number in numbers] == [0, 1, 2, 3]
