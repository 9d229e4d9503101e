"""Checkpoints in folders (torch.distributed.checkpoint): written while training goes on, and read by any run."""

import argparse
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("torchvision")
pytest.importorskip("tensorboard")
from test_distributed import WORLD, in_two_processes, learned
from test_resume import Interrupted, interrupt_at, same_records
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.tensor import DTensor
from training import assert_equal_states, environment, few_digits, run_in, state_of, tiny

import moco_ext
from moco_ext.checkpoints import convert, dcp
from moco_ext.checkpoints.training import (
    Checkpoints,
    gathered,
    load_checkpoint,
    load_newest,
    official_layout,
    sharded_tensors,
)
from moco_ext.runs.directory import claim
from moco_ext.runs.options import RunOptions
from moco_ext.train import build_model, pretrain
from moco_ext.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits():
    return few_digits()


def folders(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if path.name.startswith(("checkpoint", ".checkpoint")))


def assert_equal(one: object, other: object) -> None:
    """Of nested containers, order of names included."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for name in one:
            assert_equal(one[name], other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_equal(mine, theirs)
    else:
        assert one == other


def content_of(model: torch.nn.Module) -> dict:
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    sum(parameter.square().sum() for parameter in model.encoder_q.parameters()).backward()
    optimizer.step()
    return official_layout(epoch=1, arch="resnet8-small", model=model, optimizer=optimizer, trainer={"step": 5})


def saved(folder: Path, content: dict, *steps: int) -> None:
    folder.mkdir(exist_ok=True)
    with Checkpoints(folder, 2, "dcp") as checkpoints:
        for step in steps:
            checkpoints.save(step, content)


# --- one process ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"optimizer": "adamw", "precision": "bf16"}], ids=str)
def test_resumed_in_the_middle_of_an_epoch(digits, tmp_path, monkeypatch, settings):
    """Bit for bit as a run that was not interrupted, and that wrote files."""
    config = tiny(**settings)
    through = pretrain(config, digits, run_in(tmp_path / "through"))
    run = {"save_every": 7, "checkpoint_format": "dcp"}
    with monkeypatch.context() as patch:
        interrupt_at(patch, 8)
        with pytest.raises(Interrupted):
            pretrain(config, digits, run_in(tmp_path / "cut", **run))
    assert folders(tmp_path / "cut") == ["checkpoint.pth", "checkpoint_00000005", "checkpoint_00000007"]
    resumed = pretrain(config, digits, run_in(tmp_path / "cut", **run, resume="auto"))
    same_records(through, resumed)
    one, other = (load_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("through", "cut"))
    for checkpoint in (one, other):
        del checkpoint["trainer"]["seconds"], checkpoint["trainer"]["health_averages"]
    assert_equal(one, other)


def test_training_goes_on_while_a_checkpoint_is_written(digits, tmp_path, monkeypatch):
    """The writer waits for three more steps; what it writes is from before them. The next save waits for the writer."""
    reached, finished, states = threading.Event(), [], {}
    train_step, finish = Trainer._train_step, dcp._Writer.finish

    def step(self, *args):
        states[self.step] = {name: value.clone() for name, value in self.model.state_dict().items()}
        train_step(self, *args)
        if self.step == 6:
            reached.set()

    def wait_and_finish(self, **results):
        assert reached.wait(60)
        finish(self, **results)
        finished.append((self._final.name, max(states)))

    monkeypatch.setattr(Trainer, "_train_step", step)
    monkeypatch.setattr(dcp._Writer, "finish", wait_and_finish)
    config = tiny(steps=8, log_every=100)
    pretrain(config, digits, run_in(tmp_path, save_every=3, keep=9, checkpoint_format="dcp"))
    assert [name for name, _ in finished] == ["checkpoint_00000003", "checkpoint_00000006", "checkpoint_00000008"]
    for name in ("3", "6"):
        state = load_checkpoint(tmp_path / f"checkpoint_0000000{name}")["state_dict"]
        assert_equal_states(state, states[int(name)])


def test_the_last_few_stay_in_either_format(tmp_path):
    content = content_of(build_model(tiny()))
    Checkpoints(tmp_path, 2).save(3, content)
    saved(tmp_path, content, 1, 4, 5)  # 1: computed again
    assert folders(tmp_path) == ["checkpoint.pth", "checkpoint_00000004", "checkpoint_00000005"]
    assert os.readlink(tmp_path / "checkpoint.pth") == "checkpoint_00000005"
    saved(tmp_path, content, 5)
    Checkpoints(tmp_path, 2).save(5, content)
    assert folders(tmp_path) == ["checkpoint.pth", "checkpoint_00000004", "checkpoint_00000005.pth"]
    assert load_newest(tmp_path)[1].name == "checkpoint_00000005.pth"


def test_overwrite_deletes_folders(digits, tmp_path):
    pretrain(tiny(epochs=1), digits, run_in(tmp_path, checkpoint_format="dcp"))
    (tmp_path / ".checkpoint_00000009.0.tmp").mkdir()  # of a killed run
    with pytest.raises(ValueError, match="output: expected a directory without a run"):
        pretrain(tiny(epochs=1), digits, run_in(tmp_path))
    pretrain(tiny(steps=2), digits, run_in(tmp_path, overwrite=True))
    assert folders(tmp_path) == ["checkpoint.pth", "checkpoint_00000002.pth"]


def test_a_folder_is_a_checkpoint_to_every_reader(digits, tmp_path):
    """Conversion to the official layout, and the encoder of a run directory with its preprocessing."""
    for format in ("file", "dcp"):
        pretrain(tiny(epochs=1), digits, run_in(tmp_path / format, checkpoint_format=format))
    convert(tmp_path / "dcp" / "checkpoint_00000005", tmp_path / "converted.pth", "moco")
    convert(tmp_path / "file" / "checkpoint.pth", tmp_path / "same.pth", "moco")
    one, other = (torch.load(tmp_path / name, weights_only=True) for name in ("converted.pth", "same.pth"))
    assert_equal(one, other)
    images = torch.randn(4, 3, 28, 28)
    for source in ("dcp", "dcp/checkpoint_00000005"):
        (encoder, transform), (expected, its_transform) = (
            moco_ext.load_encoder(tmp_path / folder, head=True) for folder in (source, "file")
        )
        assert transform == its_transform
        assert torch.equal(encoder(images), expected(images))


def test_a_full_disk(digits, tmp_path, monkeypatch):
    """A warning, except for the last checkpoint."""
    write, full = FileSystemWriter.write_data, []

    def fail(self, plan, planner):
        if self._final.name in full:
            raise OSError(28, "No space left on device")
        return write(self, plan, planner)

    monkeypatch.setattr(FileSystemWriter, "write_data", fail)
    options = {"save_every": 2, "checkpoint_format": "dcp"}
    full.append("checkpoint_00000002")
    with pytest.warns(UserWarning, match=r"checkpoint of step 2 not written, .*: rank 0: .*No space left"):
        pretrain(tiny(steps=5, log_every=100), digits, run_in(tmp_path, **options))
    assert folders(tmp_path) == ["checkpoint.pth", "checkpoint_00000004", "checkpoint_00000005"]
    full.append("checkpoint_00000006")
    with pytest.raises(OSError, match=r"output: the last checkpoint could not be written: rank 0: .*No space left"):
        pretrain(tiny(steps=6, log_every=100), digits, run_in(tmp_path, **options, resume="auto"))
    assert load_newest(tmp_path)[1].name == "checkpoint_00000005"


@pytest.mark.parametrize("step", [4, 5])  # the fifth ends an epoch, and is being saved already
def test_sigterm_waits_for_the_writer(digits, tmp_path, monkeypatch, step):
    train_step, write = Trainer._train_step, FileSystemWriter.write_data

    def signaled(self, *args):
        train_step(self, *args)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    def slow(self, *args):
        time.sleep(0.5)
        return write(self, *args)

    monkeypatch.setattr(Trainer, "_train_step", signaled)
    monkeypatch.setattr(FileSystemWriter, "write_data", slow)
    with pytest.raises(SystemExit) as stopped:
        pretrain(tiny(), digits, run_in(tmp_path, checkpoint_format="dcp"))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert folders(tmp_path) == ["checkpoint.pth", f"checkpoint_0000000{step}"]
    assert load_newest(tmp_path)[0]["trainer"]["step"] == step


class Malicious:
    def __reduce__(self):
        return os.mkdir, (Malicious.target,)


def test_damaged_and_malicious_folders_are_refused(tmp_path):
    """None of them is executed, and the checkpoint before them is used."""
    content = content_of(build_model(tiny()))
    saved(tmp_path / "run", content, 1, 2)
    newest, Malicious.target = tmp_path / "run" / "checkpoint_00000002", str(tmp_path / "executed")
    shards, metadata = newest / "__0_0.distcp", newest / ".metadata"
    sound = shards.read_bytes(), metadata.read_bytes()
    assert load_newest(tmp_path / "run")[1] == newest
    assert_equal(load_checkpoint(newest)["optimizer"], content["optimizer"])

    def flip():
        weight = content["state_dict"]["module.encoder_q.conv1.weight"].numpy().tobytes()
        raw = bytearray(sound[0])
        raw[sound[0].index(weight) + 100] ^= 1
        shards.write_bytes(raw)

    def changed(change) -> None:
        with open(metadata, "rb") as file:
            found = pickle.load(file)
        change(found)
        metadata.write_bytes(pickle.dumps(found))

    def outside(found):
        for place in found.storage_data.values():
            place.relative_path = f"../checkpoint_00000001/{place.relative_path}"

    def larger(found):
        found.state_dict_metadata["rest"].size = torch.Size([1 << 40])

    damages = {
        "checksum of state_dict.module.encoder_q.conv1.weight": flip,
        "cannot be read": lambda: shards.write_bytes(sound[0][:1000]),
        "expected tensors no larger": shards.unlink,
        r"its .metadata needs \w+.mkdir": lambda: metadata.write_bytes(pickle.dumps(Malicious())),
        "expected .* in a file of the folder": lambda: changed(outside),
        "no larger than the files": lambda: changed(larger),
        "expected a tensor for rest": lambda: changed(lambda found: found.state_dict_metadata.pop("rest")),
    }
    for message, damage in damages.items():
        damage()
        with pytest.raises(ValueError, match=message):
            load_checkpoint(newest)
        with pytest.warns(UserWarning, match="trying the checkpoint before it"):
            assert load_newest(tmp_path / "run")[1].name == "checkpoint_00000001"
        shards.write_bytes(sound[0])
        metadata.write_bytes(sound[1])
    assert not Path(Malicious.target).exists()

    others = {"expected only tensors, got x": {"x": "text"}, "expected a tensor for rest": {"x": torch.ones(2)}}
    for number, (message, state) in enumerate(others.items()):
        torch.distributed.checkpoint.save(state, checkpoint_id=tmp_path / str(number), no_dist=True)
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path / str(number))


RUN = """
import os, signal, sys
from pathlib import Path
from torch.distributed.checkpoint import FileSystemWriter
from training import few_digits, run_in, tiny
from moco_ext.checkpoints import dcp
from moco_ext.train import pretrain

write = FileSystemWriter.write_data
def written(self, plan, planner):
    future = write(self, plan, planner)
    if sys.argv[2] == "killed" and "6" in str(self._final.name):  # the shards are there, the metadata is not
        os.kill(os.getpid(), signal.SIGKILL)
    return future
FileSystemWriter.write_data = written
pretrain(tiny(), few_digits(), run_in(Path(sys.argv[1]), save_every=3, checkpoint_format=sys.argv[3], resume="auto"))
"""


def test_killed_while_it_writes(tmp_path):
    """SIGKILL costs the checkpoint that was being written; the one before it is resumed, to the same end."""

    def run(name: str, fate: str, form: str) -> tuple[int, str]:
        command = [sys.executable, "-c", RUN, str(tmp_path / name), fate, form]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
        return done.returncode, done.stderr

    status, said = run("killed", "killed", "dcp")
    assert status == -signal.SIGKILL, said
    left = [".checkpoint_00000006.0.tmp", "checkpoint.pth", "checkpoint_00000003", "checkpoint_00000005"]
    assert folders(tmp_path / "killed") == left
    for name in ("killed", "through"):
        status, said = run(name, "", "file")
        assert status == 0, said
    assert_equal_states(state_of(tmp_path / "through"), state_of(tmp_path / "killed"))
    assert not list((tmp_path / "killed").glob(".checkpoint*"))


# --- two processes --------------------------------------------------------------------------------------------------

CASES = {
    "ddp-file": ("ddp", "file"),
    "ddp-dcp": ("ddp", "dcp"),
    "fsdp-file": ("fsdp", "file"),
    "fsdp-dcp": ("fsdp", "dcp"),
}


def options_of(folder: Path, case: str, local_world: int, **more) -> RunOptions:
    parallel, format = CASES[case]
    return run_in(
        folder, local_world=local_world, save_every=3, keep=9, parallel=parallel, checkpoint_format=format, **more
    )


def loaded(folder: Path, options: RunOptions) -> dict:
    """The state that a run starts from: model and optimizer, in one piece."""
    with claim(options):
        trainer = Trainer(tiny(epochs=1), few_digits(), options, None)
    layout = official_layout(epoch=0, arch="", model=trainer.model, optimizer=trainer.optimizer)
    return gathered({name: layout[name] for name in ("state_dict", "optimizer")}, everywhere=True)


def read_shards(run: Path, options: RunOptions) -> None:
    """Of weights and momentum, a rank reads its shards, and these are the whole."""
    path = run / "checkpoint_00000003"
    with claim(options):
        trainer = Trainer(tiny(epochs=1), few_digits(), options, None)
    checkpoint = load_checkpoint(path, sharded_tensors(trainer.model, trainer.optimizer))
    parameters = dict(trainer.model.named_parameters())
    assert all(isinstance(checkpoint["state_dict"][name], DTensor) for name in parameters)
    momentum = [slot["momentum_buffer"] for slot in checkpoint["optimizer"]["state"].values()]
    assert len(momentum) == len(parameters) / 2
    assert all(isinstance(buffer, DTensor) for buffer in momentum)
    assert_equal(gathered(checkpoint, everywhere=True), load_checkpoint(path))


def train_in_all_formats(args: argparse.Namespace, options: RunOptions) -> int:
    folder, world = Path(args.arguments[0]), options.local_world
    for case in CASES:
        pretrain(tiny(epochs=1), few_digits(), options_of(folder / case, case, world))
    for source, case in (("ddp-file", "fsdp-dcp"), ("fsdp-dcp", "ddp-file"), ("fsdp-dcp", "fsdp-dcp")):
        middle = next((folder / source).glob("checkpoint_00000003*"))
        run = options_of(folder / f"{source}-to-{case}", case, world, resume=middle)
        pretrain(tiny(epochs=1), few_digits(), run)
    read_shards(folder / "fsdp-dcp", options_of(folder / "fsdp-dcp", "fsdp-dcp", world, resume="auto"))
    start = folder / "one" / "checkpoint_00000003"
    state = loaded(folder, options_of(folder / "one-to-two", "fsdp-dcp", world, resume=start))
    torch.save(state, folder / f"one-to-two-{dist.get_rank()}.pt")
    return 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("formats")
    pretrain(tiny(epochs=1), digits, options_of(folder / "one", "ddp-dcp", 1))
    in_two_processes(train_in_all_formats, str(folder))
    return folder


def end_of(folder: Path) -> dict:
    return load_checkpoint(folder / "checkpoint.pth")


@pytest.mark.parametrize("case", CASES)
def test_every_format_has_the_same_content(trained, case):
    """FSDP2 sums gradients of two ranks in the same order as DDP."""
    one, other = end_of(trained / "ddp-file"), end_of(trained / case)
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], value, rtol=1e-5, atol=1e-6)
    assert one["trainer"].keys() == other["trainer"].keys()
    assert_equal(one["trainer"]["random"], other["trainer"]["random"])
    if case.startswith("fsdp"):
        assert_equal(end_of(trained / "fsdp-file")["state_dict"], other["state_dict"])


@pytest.mark.parametrize("run", ["ddp-file-to-fsdp-dcp", "fsdp-dcp-to-ddp-file", "fsdp-dcp-to-fsdp-dcp"])
def test_resumed_in_another_format_and_layout(trained, run):
    """Running statistics are rank 0's, as after any resumption in a group."""
    end = end_of(trained / run.partition("-to-")[2])
    resumed = end_of(trained / run)
    for name, value in learned(end["state_dict"]).items():
        torch.testing.assert_close(resumed["state_dict"][name], value, rtol=1e-5, atol=1e-6)
    for index, slot in end["optimizer"]["state"].items():
        momentum = resumed["optimizer"]["state"][index]["momentum_buffer"]
        torch.testing.assert_close(momentum, slot["momentum_buffer"], rtol=1e-5, atol=1e-6)


def test_shards_are_written_by_all_ranks_and_other_tensors_by_rank_0(trained):
    sizes = {
        case: [
            sum(file.stat().st_size for file in (trained / case / "checkpoint_00000003").glob(f"__{rank}_*"))
            for rank in (0, 1)
        ]
        for case in ("ddp-dcp", "fsdp-dcp")
    }
    assert sizes["ddp-dcp"][1] == 0
    assert 0.5 < sizes["fsdp-dcp"][1] / sizes["fsdp-dcp"][0] < 1


def test_another_number_of_processes(trained, tmp_path):
    """Two to one, and one to two: the state is the same, in other shards."""
    middle = trained / "fsdp-dcp" / "checkpoint_00000003"
    state = loaded(tmp_path, options_of(tmp_path, "ddp-file", 1, resume=middle))
    expected = load_checkpoint(middle)
    assert_equal_states(
        {name.removeprefix("module."): value for name, value in state["state_dict"].items()}, expected["state_dict"]
    )
    assert_equal(state["optimizer"]["state"], expected["optimizer"]["state"])

    expected = load_checkpoint(trained / "one" / "checkpoint_00000003")
    for rank in range(WORLD):
        state = torch.load(trained / f"one-to-two-{rank}.pt", weights_only=True)
        assert_equal_states(
            {name.removeprefix("module."): value for name, value in state["state_dict"].items()}, expected["state_dict"]
        )
        assert_equal(state["optimizer"]["state"], expected["optimizer"]["state"])
