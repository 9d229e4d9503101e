"""Checkpoints: the official layout, whole or not at all, the last few kept, and clear words about bad ones."""

import errno

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("tensorboard")
from training import few_digits, run_in, tiny

from moco_ext.checkpoints.training import load_checkpoint, load_newest, save_checkpoint, save_rotating
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
        save_rotating(tmp_path, step, 2, **content)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint.pth", "checkpoint_00000002.pth", "checkpoint_00000030.pth"]
    assert (tmp_path / "checkpoint.pth").resolve().name == "checkpoint_00000030.pth"


def test_a_truncated_newest_checkpoint_costs_only_itself(tmp_path):
    content = content_of(build_model(tiny()))
    for step in (1, 2):
        save_rotating(tmp_path, step, 2, **content)
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
