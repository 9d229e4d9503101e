"""Checkpoints: the official layout, atomic writes, rotation, and clear errors for bad files."""

import dataclasses
import errno
import math
import os
import random
import subprocess
import sys
import tracemalloc
import warnings
import zipfile

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("tensorboard")
from encoders_on_disk import write_photos
from training import assert_equal_states, environment, few_digits, run_in, tiny

from moco_ext.checkpoints import read_checkpoint
from moco_ext.checkpoints.training import Checkpoints, load_checkpoint, load_newest, official_layout, save_checkpoint
from moco_ext.data import load
from moco_ext.runs.files import write_atomically
from moco_ext.train import build_model, pretrain

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def saved(tmp_path):
    """A saved checkpoint's path, and the model it is of, with statistics that are not those of the start."""
    model = build_model(tiny(mlp=True))
    model(torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8))
    optimizer = torch.optim.SGD(model.parameters(), 0.03)
    save_checkpoint(tmp_path / "c.pth", epoch=7, arch="resnet8-small", model=model, optimizer=optimizer)
    return tmp_path / "c.pth", model


def content_of(model) -> dict:
    optimizer = torch.optim.SGD(model.parameters(), 0.03)
    return {"epoch": 1, "arch": "resnet8-small", "model": model, "optimizer": optimizer}


def save(folder, step: int, content: dict) -> None:
    Checkpoints(folder, keep=2).save(step, official_layout(**content))


def test_the_layout_is_the_official_one(saved):
    path, model = saved
    raw = torch.load(path, weights_only=True)
    assert raw.keys() == {"epoch", "arch", "state_dict", "optimizer"}
    assert raw["state_dict"].keys() == {f"module.{name}" for name in model.state_dict()}
    assert raw["state_dict"]["module.queue"].shape == (16, 100)
    checkpoint = load_checkpoint(path)
    assert checkpoint["epoch"] == 7
    assert checkpoint["state_dict"].keys() == model.state_dict().keys()
    assert all(torch.equal(checkpoint["state_dict"][name], value) for name, value in model.state_dict().items())


def test_an_official_checkpoint_is_resumed_at_its_epoch(tmp_path):
    """SGD over all parameters, the key encoder's among them, as main_moco.py builds it; nothing of ours inside."""
    data, config = few_digits(), tiny(epochs=3)
    pretrain(tiny(epochs=2), data, run_in(tmp_path))
    official = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    del official["trainer"]
    assert len(official["optimizer"]["param_groups"][0]["params"]) == len(list(build_model(config).parameters()))
    torch.save(official, tmp_path / "official.pth.tar")
    (tmp_path / "resumed").mkdir()
    records = pretrain(config, data, run_in(tmp_path / "resumed", resume=tmp_path / "official.pth.tar"))
    assert [(record["step"], record["epoch"]) for record in records] == [(15, 3)]


def test_a_write_that_fails_leaves_the_former_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"former")

    def fail(file):
        file.write(b"half of the ne")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"former"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_last_few_stay_and_the_pointer_follows(tmp_path):
    content = content_of(build_model(tiny()))
    for step in (1, 2, 30):
        save(tmp_path, step, content)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint.pth", "checkpoint_00000002.pth", "checkpoint_00000030.pth"]
    assert (tmp_path / "checkpoint.pth").resolve().name == "checkpoint_00000030.pth"


def test_a_truncated_newest_checkpoint_costs_only_itself(tmp_path):
    content = content_of(build_model(tiny()))
    for step in (1, 2):
        save(tmp_path, step, content)
    newest = tmp_path / "checkpoint_00000002.pth"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"00000002.pth cannot be read"):
        _, path = load_newest(tmp_path)
    assert path.name == "checkpoint_00000001.pth"
    path.write_bytes(b"")
    nothing = r"resume: expected a checkpoint .* got none of 2"
    with pytest.warns(UserWarning, match="cannot"), pytest.raises(ValueError, match=nothing):
        load_newest(tmp_path)
    assert load_newest(tmp_path / "nowhere") is None


def test_a_full_disk_costs_a_checkpoint_not_the_run(tmp_path, monkeypatch):
    data = few_digits()
    attempts = []

    def full(*args, **kwargs):
        attempts.append(args)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("moco_ext.checkpoints.training.write_atomically", full)
    with (
        pytest.warns(UserWarning, match=r"checkpoint of step 5 not written, training continues: .*No space"),
        pytest.raises(OSError, match=r"the last checkpoint could not be written: .*No space"),
    ):
        pretrain(tiny(epochs=2), data, run_in(tmp_path))
    assert len(attempts) == 2
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_checkpoints_that_cannot_be_read(saved, tmp_path):
    path, _ = saved
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(path)
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"expected epoch, arch, state_dict and optimizer.*got \['weights'\]"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="checkpoint: no such file"):
        load_checkpoint(tmp_path / "none.pth")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    torch.save({"epoch": 1, "arch": "resnet18", "state_dict": {}, "optimizer": Bomb()}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(tmp_path / "c.pth")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "resnet10-small"}, "resume: expected a checkpoint of resnet10-small, got one of resnet8-small"),
        ({"moco_k": 64, "mlp": True}, "resume: .* is of another configuration"),
    ],
)
def test_resume_from_another_configuration(saved, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain(tiny(**changes), few_digits(), run_in(tmp_path, resume=saved[0]))


def test_resumed_with_other_images(tmp_path):
    """The keys of the queue, and the places of a memory bank, are those of the images of the checkpoint."""
    write_photos(tmp_path / "photos", 8)

    def train(folder, epochs):
        config = dataclasses.replace(tiny(epochs=epochs, batch_size=4), data=str(folder), image_size=16)
        pretrain(config, dataclasses.replace(load(str(folder)), size=16), run_in(tmp_path / "run", resume="auto"))

    train(tmp_path / "photos", 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="resume")
        train((tmp_path / "photos").rename(tmp_path / "moved"), 2)
    next((tmp_path / "moved").rglob("*.jpg")).rename(tmp_path / "moved" / "z.jpg")
    with pytest.warns(UserWarning, match="resume: the training images have other file names"):
        train(tmp_path / "moved", 3)


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_an_error_or_changes_nothing(saved):
    """The checksums of the archive cover all tensors; a flip elsewhere (padding, time stamps) is harmless."""
    path, model = saved
    raw, want = path.read_bytes(), model.state_dict()
    places = random.Random(0).sample(range(8 * len(raw)), 60)
    found = 0
    for place in places:
        damaged = bytearray(raw)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            assert_equal_states(load_checkpoint(path)["state_dict"], want)
        except ValueError:
            found += 1
    assert found > 50


def test_a_compressed_archive_is_not_expanded(tmp_path):
    """100 MB of zeros in 100 kB: nothing torch.save would write."""
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(100 << 20))
    assert (tmp_path / "bomb.pth").stat().st_size < 200_000
    for reader in (load_checkpoint, read_checkpoint):
        tracemalloc.start()
        with pytest.raises(ValueError, match="expected uncompressed entries, got an archive that expands"):
            reader(tmp_path / "bomb.pth")
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
        tracemalloc.stop()


def test_any_damage_costs_only_the_newest(tmp_path):
    content = content_of(build_model(tiny()))
    for step in (1, 2):
        save(tmp_path, step, content)
    newest = tmp_path / "checkpoint_00000002.pth"
    sound = newest.read_bytes()

    def flip():
        weight = content["model"].encoder_q.conv1.weight.detach().numpy().tobytes()
        raw = bytearray(sound)
        raw[sound.index(weight) + 100] ^= 1
        newest.write_bytes(raw)

    def diverge():
        changed = torch.load(tmp_path / "checkpoint_00000001.pth", weights_only=True)
        changed["state_dict"]["module.encoder_q.conv1.weight"][0] = math.nan
        torch.save(changed, newest)

    def no_file():
        newest.unlink()
        newest.mkdir()

    for damage in (flip, diverge, no_file):
        damage()
        with pytest.warns(UserWarning, match="trying the checkpoint before it"):
            _, path = load_newest(tmp_path)
        assert path.name == "checkpoint_00000001.pth"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(epoch=-1), "checkpoint: expected a number of epochs as epoch in .*, got -1"),
        (lambda c: c.update(arch=3), "checkpoint: expected a name as arch in .*, got 3"),
        (lambda c: c.update(state_dict=[1, 2]), r"checkpoint: expected a dictionary as state_dict in .*, got \[1, 2\]"),
        (lambda c: c["state_dict"].update({7: torch.ones(1)}), "checkpoint: expected tensors by name .*: 'Tensor'"),
        (lambda c: c["state_dict"].update(x=3), "checkpoint: expected tensors by name in .*'x': 'int'"),
        (lambda c: c.update(optimizer=None), "checkpoint: expected an optimizer's state in .*, got None"),
        (lambda c: c["optimizer"].update(state=[]), "checkpoint: expected an optimizer's state in .*"),
        (lambda c: c["optimizer"].update(param_groups=[{}]), "resume: .* is of another configuration"),
        (lambda c: c["optimizer"]["state"][0].update(momentum_buffer=torch.ones(3)), "expected momentum_buffer of sha"),
        (lambda c: c["state_dict"]["module.queue_ptr"].fill_(-1), r"expected queue_ptr from 0 to 99 in .* got \[-1\]"),
        (lambda c: c["state_dict"]["module.queue_ptr"].fill_(100), r"expected queue_ptr from 0 to 99 .* got \[100\]"),
        (lambda c: c["state_dict"]["module.queue"].fill_(math.inf), "expected finite weights in .* in queue"),
        (lambda c: c["trainer"].update(step=-5), "resume: .* does not fit this run: step: expected a count, got -5"),
        (lambda c: c["trainer"].update(step="5"), "resume: .* does not fit this run: step: expected a count, got 5"),
        (
            lambda c: c["trainer"]["loader"].update(images=7),
            "images = 64 .*, got 7; -a .* --init .*c.pth starts a new run",
        ),
        (lambda c: c["trainer"].pop("loader"), r"resume: .* does not fit this run: KeyError\('loader'\)"),
        (lambda c: c["trainer"]["loader"].update(step=-1), "loader step: expected a count, got -1"),
        (
            lambda c: c["trainer"]["random"].update(cpu=[torch.zeros(7, dtype=torch.uint8)]),
            "fit this run: Runtime",
        ),
        (lambda c: c["trainer"].update(seconds=[1.0]), "resume: .* does not fit this run: not enough values"),
        (lambda c: c.update(trainer=[1]), "resume: .* does not fit this run: TypeError"),
    ],
)
def test_malformed_checkpoints(one_epoch, tmp_path, change, message):
    content = torch.load(one_epoch, weights_only=True)
    change(content)
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=message) as caught:
        pretrain(tiny(), few_digits(64), run_in(tmp_path / "run", resume=tmp_path / "c.pth"))
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_epoch")
    pretrain(tiny(epochs=1), few_digits(64), run_in(folder))
    return folder / "checkpoint.pth"


# --- divergence -------------------------------------------------------------------------------------------------------


def test_diverged_weights_are_not_saved(tmp_path):
    """The last good checkpoint stays, and a sane learning rate resumes from it."""
    data = few_digits(64)
    pretrain(tiny(epochs=1), data, run_in(tmp_path))
    diverged = r"model: expected finite weights, got NaN, infinity or an overflow in encoder_q\S*; no checkpoint is wr"
    with pytest.raises(FloatingPointError, match=diverged):
        pretrain(tiny(lr=1e30), data, run_in(tmp_path, resume="auto", save_every=1))
    assert [path.name for path in tmp_path.glob("checkpoint_*")] == ["checkpoint_00000002.pth"]
    records = pretrain(tiny(), data, run_in(tmp_path, resume="auto"))
    assert math.isfinite(records[-1]["loss"])


# --- full disks -------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_called_that(tmp_path, monkeypatch):
    """torch.save itself then says "unexpected pos"."""
    limited = (
        "import resource, sys, torch; from moco_ext.runs.files import write_atomically\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "try: write_atomically(sys.argv[1], lambda file: torch.save(torch.ones(200_000), file))\n"
        "except OSError as error: print(error)\n"
    )
    path = tmp_path / "c.pth"
    done = subprocess.run([sys.executable, "-c", limited, path], capture_output=True, text=True, env=environment())
    assert done.stdout == f"[Errno 27] File too large: '{path}'\n", done.stderr  # a limit that needs no root
    (tmp_path / f".c.pth.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        write_atomically(path, lambda file: torch.save(torch.ones(200_000), file))
    assert not list(tmp_path.iterdir())
