"""A run that was interrupted, anywhere and in any way, ends as the one that was not: bit for bit."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("tensorboard")
from rich.console import Console
from training import assert_equal_states, environment, few_digits, run_in, state_of, tiny

from moco_ext.runs.directory import claim
from moco_ext.runs.metrics import read_metrics
from moco_ext.train import build_model, pretrain
from moco_ext.train.config import DTYPES
from moco_ext.train.trainer import Trainer

# What a machine's speed decides, and what only the running process knows (see Health).
TIMES = {"images_per_second", "wait", "seconds", "key_drift", "key_age"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits():
    return few_digits()


class Interrupted(Exception):
    pass


def interrupt_at(monkeypatch, step: int) -> None:
    """The process vanishes before step + 1; what a checkpoint has not got is lost."""
    train_step = Trainer._train_step

    def until(self, *args):
        if self.step == step:
            raise Interrupted
        train_step(self, *args)

    monkeypatch.setattr(Trainer, "_train_step", until)


def same_records(one, other):
    kept = [[{k: v for k, v in record.items() if k not in TIMES} for record in records] for records in (one, other)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("settings", "workers"),
    [
        ({}, 0),
        ({}, 2),
        ({"dictionary": "memory-bank"}, 0),  # draws its negatives from torch's own generator
        pytest.param(
            {"precision": "bf16", "accumulate": 2, "batch_size": 16, "symmetric": True, "split_bn": 2},
            0,
            marks=pytest.mark.slow,
        ),
        ({"rotate": 10.0, "elastic": 20.0, "erase": 0.5}, 2),
        ({"steps": 9, "log_every": 4, "moco_m_cos": True}, 0),
        ({"same_image": "mask", "empty_queue": True, "in_batch": True, "label_smoothing": 0.1}, 0),
    ],
    ids=str,
)
def test_resumed_in_the_middle_of_an_epoch(digits, tmp_path, monkeypatch, settings, workers):
    config = tiny(**settings)
    through = pretrain(config, digits, run_in(tmp_path / "through", workers=workers))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 8)
        with pytest.raises(Interrupted):
            pretrain(config, digits, run_in(tmp_path / "cut", workers=workers, save_every=7))
    resumed = pretrain(config, digits, run_in(tmp_path / "cut", workers=workers, save_every=7, resume="auto"))
    same_records(through, resumed)
    assert_equal_states(state_of(tmp_path / "through"), state_of(tmp_path / "cut"))
    optimizers = [
        torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)["optimizer"]["state"]
        for name in ("through", "cut")
    ]
    for index, state in optimizers[0].items():
        assert torch.equal(state["momentum_buffer"], optimizers[1][index]["momentum_buffer"])


def test_resumed_between_epochs(digits, tmp_path):
    through = pretrain(tiny(epochs=4), digits, run_in(tmp_path / "through"))
    pretrain(tiny(epochs=2), digits, run_in(tmp_path / "halves"))
    resumed = pretrain(tiny(epochs=4), digits, run_in(tmp_path / "halves", resume=tmp_path / "halves"))
    assert [r["loss"] for r in resumed] == [r["loss"] for r in through]
    assert [r["epoch"] for r in read_metrics(tmp_path / "halves" / "metrics.jsonl")] == [1, 2, 3, 4]
    assert_equal_states(state_of(tmp_path / "through"), state_of(tmp_path / "halves"))


def test_auto_begins_where_there_is_nothing_yet(digits, tmp_path):
    records = pretrain(tiny(epochs=1), digits, run_in(tmp_path, resume="auto"))
    assert [record["epoch"] for record in records] == [1]


def test_a_finished_run_is_not_run_again(digits, tmp_path):
    records = pretrain(tiny(epochs=1), digits, run_in(tmp_path))
    with pytest.warns(UserWarning, match="has completed all of its 5 steps"):
        again = pretrain(tiny(epochs=1), digits, run_in(tmp_path, resume="auto"))
    assert again == records


def test_a_finished_checkpoint_is_refused_in_a_new_directory(digits, tmp_path):
    """Before any work: there are no records to evaluate."""
    pretrain(tiny(epochs=1), digits, run_in(tmp_path / "one"))
    message = "resume, start_epoch: expected a start before the last of 5 steps, got 5 completed steps"
    with pytest.raises(ValueError, match=message):
        pretrain(tiny(epochs=1), digits, run_in(tmp_path / "two", resume=tmp_path / "one"))
    with pytest.raises(ValueError, match=message):
        pretrain(tiny(epochs=1), digits, run_in(tmp_path / "two", start_epoch=1))
    assert [path.name for path in (tmp_path / "two").iterdir()] == [".lock"]


def test_changed_settings_are_printed(digits, tmp_path):
    pretrain(tiny(epochs=1), digits, run_in(tmp_path))
    options = run_in(tmp_path, resume="auto")
    options.console = Console(file=io.StringIO(), width=200)
    pretrain(tiny(epochs=2, lr=0.06), digits, options)
    assert "resumed with changed settings: epochs 1 -> 2, lr 0.03 -> 0.06\n" in options.console.file.getvalue()
    pretrain(tiny(epochs=2, lr=0.06), digits, options)
    assert options.console.file.getvalue().count("changed settings") == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_16_bit_queue_is_saved_in_float32(digits, tmp_path, precision):
    """As with a float32 queue: what reads checkpoints need not know the queue's dtype."""
    config = tiny(epochs=1, precision=precision)
    model = build_model(config)
    pretrain(config, digits, run_in(tmp_path), model)
    assert model.queue.dtype == DTYPES[precision]
    saved = state_of(tmp_path)["module.queue"]
    assert saved.dtype == torch.float32
    assert torch.equal(saved, model.queue.T.float())


def test_a_float32_queue_is_resumed_in_16_bits(digits, tmp_path):
    """Runs under --precision once kept a float32 queue by default."""
    pretrain(tiny(epochs=1, precision="bf16", queue_dtype="fp32"), digits, run_in(tmp_path))
    before = state_of(tmp_path)["module.queue"]
    options = run_in(tmp_path, resume="auto")
    options.console = Console(file=io.StringIO(), width=200)
    with claim(options):
        trainer = Trainer(tiny(epochs=2, precision="bf16"), digits, options, None)
    assert torch.equal(trainer.model.queue, before.T.bfloat16())
    assert "changed settings: epochs 1 -> 2, queue_dtype fp32 -> bf16\n" in options.console.file.getvalue()
    assert not torch.equal(before, before.bfloat16().float())


def test_resume_with_another_seed_is_refused(digits, tmp_path):
    pretrain(tiny(epochs=1), digits, run_in(tmp_path))
    with pytest.raises(ValueError, match="seed = 1"):
        pretrain(tiny(epochs=2, seed=1), digits, run_in(tmp_path, resume="auto"))


def test_resume_with_epochs_of_another_length_is_refused(digits, tmp_path):
    """Its images and records would be out of step with its epochs: one epoch's images came twice."""
    pretrain(tiny(epochs=2, drop_last=True), digits, run_in(tmp_path))
    with pytest.raises(
        ValueError, match=r"step: expected 1 epochs of this run's 5 steps and 4 more, got 8; .*drop_last"
    ):
        pretrain(tiny(epochs=4), digits, run_in(tmp_path, resume="auto"))


# --- signals to a process of its own --------------------------------------------------------------------------

PROGRAM = """
import sys
from pathlib import Path
from training import few_digits, run_in, tiny
from moco_ext.train import pretrain
pretrain(tiny(epochs=20), few_digits(), run_in(Path(sys.argv[1]), save_every=3, resume="auto"))
"""


def start(folder) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)], env=environment(), stderr=subprocess.PIPE, text=True
    )


def wait_for_checkpoint(folder, process: subprocess.Popen) -> None:
    while not (folder / "checkpoint.pth").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_and_resumed_equals_never_killed(tmp_path):
    """SIGKILL at a moment that nobody chose, twice; then to the end."""
    for _ in range(2):
        process = start(tmp_path / "killed")
        wait_for_checkpoint(tmp_path / "killed", process)
        time.sleep(random.uniform(0, 0.7))
        process.kill()
        process.wait()
    process = start(tmp_path / "killed")
    assert process.wait(timeout=120) == 0, process.stderr.read()
    through = start(tmp_path / "through")
    assert through.wait(timeout=120) == 0, through.stderr.read()
    assert_equal_states(state_of(tmp_path / "through"), state_of(tmp_path / "killed"))
    same_records(*(read_metrics(tmp_path / name / "metrics.jsonl") for name in ("through", "killed")))


def test_sigterm_saves_first(tmp_path):
    process = start(tmp_path)
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM, process.stderr.read()
    saved = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["trainer"]["step"]
    assert 0 < saved < 100
    assert os.path.basename(os.readlink(tmp_path / "checkpoint.pth")) == f"checkpoint_{saved:08d}.pth"


def test_what_is_in_the_checkpoint_is_plain(digits, tmp_path):
    """weights_only=True reads all of it, and the configuration in it is the run's."""
    pretrain(tiny(epochs=1), digits, run_in(tmp_path))
    trainer = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["trainer"]
    assert trainer["step"] == 5
    assert trainer["config"]["moco_k"] == 100
    json.dumps({name: value for name, value in trainer.items() if name != "random"})
    assert build_model(tiny()).updates == 0
