"""A run directory belongs to one run: no other deletes its checkpoints, at the same time or later."""

import subprocess
import sys

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("tensorboard")
from training import environment, few_digits, run_in, tiny, torchrun

from moco_ext.experiments.pretrain import pretrain_and_evaluate
from moco_ext.runs.directory import claim, exclusive
from moco_ext.train import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")


def listing(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("left", ["checkpoint_00000900.pth", "metrics.jsonl", "config.json", "checkpoint_0003.pth.tar"])
def test_a_used_directory_is_refused_before_anything_is_written(tmp_path, left):
    (tmp_path / left).write_bytes(b"of another run")
    before = listing(tmp_path)
    message = rf"output: expected a directory without a run, got .* with {left}; --resume auto .* --overwrite"
    for run in (pretrain, pretrain_and_evaluate):
        with pytest.raises(ValueError, match=message):
            run(tiny(), few_digits(), run_in(tmp_path))
    assert listing(tmp_path) == before
    elsewhere = tmp_path / "elsewhere.pth" / "checkpoint.pth"
    with pytest.raises(ValueError, match=message), claim(run_in(tmp_path, resume=elsewhere)):
        pass


@pytest.mark.parametrize("resume", ["auto", "file", "folder"])
def test_a_run_resumed_in_its_own_directory_is_not_refused(tmp_path, resume):
    path = tmp_path / "checkpoint_00000900.pth"
    path.write_bytes(b"")
    sources = {"auto": "auto", "file": path, "folder": str(tmp_path)}
    with claim(run_in(tmp_path, resume=sources[resume])):
        pass


def test_overwriting_deletes_the_run_and_its_evaluations(tmp_path):
    data = few_digits(64)
    old = ("checkpoint_00000900.pth", "linear.json", "linear.pth", "summary.json", "report.html")
    old += ("metrics.csv", "loggers.json")
    for name in (*old, "notes.txt"):
        (tmp_path / name).write_bytes(b"old")
    (tmp_path / "checkpoint.pth").symlink_to("checkpoint_00000900.pth")
    with pytest.raises(ValueError, match="start_epoch: expected a start before the last of 2 steps, got 10 completed"):
        pretrain(tiny(epochs=1), data, run_in(tmp_path, overwrite=True, start_epoch=5))
    assert (tmp_path / "checkpoint_00000900.pth").exists()  # nothing is deleted for a run that cannot start
    with pytest.raises(ValueError, match="overwrite: expected no --resume of the run"):
        pretrain(tiny(epochs=1), data, run_in(tmp_path, overwrite=True, resume="auto"))
    pretrain(tiny(epochs=1), data, run_in(tmp_path, overwrite=True))
    assert not [name for name in old if (tmp_path / name).exists()]
    assert (tmp_path / "notes.txt").exists()
    assert (tmp_path / "checkpoint.pth").resolve().name == "checkpoint_00000002.pth"


HOLD = """
import sys, time
from pathlib import Path
from moco_ext.runs.directory import exclusive
with exclusive(Path(sys.argv[1]), lambda: None):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_at_once(tmp_path):
    """The second is refused; a killed run leaves no lock, not even through a child that outlives it."""
    program = f"import os\nif os.fork() == 0: time.sleep(20); os._exit(0)\n{'time.sleep(60)'}"
    held = HOLD.replace("time.sleep(60)", program.replace("\n", "\n    "))
    with subprocess.Popen(
        [sys.executable, "-c", held, str(tmp_path)], env=environment(), stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        refused = rf"output: expected no other run in progress in .*, got process {holder.pid} on"
        with pytest.raises(ValueError, match=refused), exclusive(tmp_path, lambda: None):
            pass
        holder.kill()
        holder.wait()
        with exclusive(tmp_path, lambda: None):
            pass
        holder.stdout.close()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    with pytest.warns(UserWarning, match="cannot be locked.*No locks available"), exclusive(tmp_path, lambda: None):
        pass


def test_temporary_files_of_a_killed_run_are_removed(tmp_path):
    """Its own, and nobody else's."""
    mine = [".checkpoint_00000007.pth.123.tmp", ".checkpoint.pth.123.tmp", ".metrics.jsonl.9.tmp"]
    others = [".linear.pth.123.tmp", ".checkpoint_00000007.pth.swp", "checkpoint.123.tmp", ".notes.123.tmp"]
    for name in (*mine, *others):
        (tmp_path / name).write_bytes(b"half")
    with claim(run_in(tmp_path)):
        assert sorted(listing(tmp_path)) == sorted(others)


@pytest.mark.slow
def test_every_rank_learns_of_the_refusal(tmp_path):
    program = tmp_path / "two.py"
    program.write_text(
        "import sys, torch.distributed as dist\n"
        "from pathlib import Path\n"
        "from training import run_in\n"
        "from moco_ext.runs.directory import claim\n"
        "dist.init_process_group('gloo')\n"
        "try:\n"
        "    with claim(run_in(Path(sys.argv[1]))): pass\n"
        "except ValueError as error: (Path(sys.argv[1]) / f'rank{dist.get_rank()}').write_text(str(error))\n"
        "dist.barrier(); dist.destroy_process_group()\n"
    )
    (tmp_path / "config.json").write_text("{}")
    done = torchrun(2, program, tmp_path)
    assert done.returncode == 0, done.stderr
    told = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    assert told[0] == told[1]
    assert "expected a directory without a run" in told[0]


def test_what_was_just_written_is_never_deleted(tmp_path):
    """Resuming an older checkpoint: those of later steps go, once the run has one of its own."""
    data = few_digits(64)
    pretrain(tiny(epochs=3), data, run_in(tmp_path, keep=3))
    first = tmp_path / "checkpoint_00000002.pth"
    pretrain(tiny(epochs=2), data, run_in(tmp_path, resume=first, keep=1))
    assert [path.name for path in tmp_path.glob("checkpoint_*")] == ["checkpoint_00000004.pth"]
    assert (tmp_path / "checkpoint.pth").resolve() == tmp_path / "checkpoint_00000004.pth"


@pytest.mark.slow
def test_importing_checkpoints_brings_no_training():
    program = "import sys, {}; print([name for name in {} if name in sys.modules])"
    heavy = ["torchvision", "rich", "matplotlib", "sklearn", "tensorboard", "PIL"]
    ours = [f"moco_ext.{room}" for room in ("data", "train", "evaluate", "report", "runs.options", "cli")]
    for module in ("moco_ext", "moco_ext.checkpoints", "moco_ext.checkpoints.training"):
        done = subprocess.run(
            [sys.executable, "-c", program.format(module, heavy + ours)],
            capture_output=True, text=True, env=environment(),
        )  # fmt: skip
        assert done.stdout == "[]\n", (module, done.stdout, done.stderr)
