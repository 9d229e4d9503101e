"""The pre-training loop, its checkpoints and its configuration."""

import dataclasses
import json
import math

import pytest
import torch

from moco_ext import MoCo
from moco_ext import data as mdata
from moco_ext.data import TensorSplit
from moco_ext.evaluate import encoder_features
from moco_ext.train import PretrainConfig, Run, build_model, load_checkpoint, load_encoder, pretrain, resolve_config
from moco_ext.train.checkpoint import save_checkpoint, write_atomically
from moco_ext.train.log import MetricLog, read_metrics
from moco_ext.train.pretrain import encoder_knn

pytest.importorskip("tensorboard")


@pytest.fixture(scope="module")
def digits():
    """150 images: four full batches of 32 and one of 22; 60 to evaluate on."""
    data = mdata.load("digits")
    train, test = (TensorSplit(split.images[:n], split.labels[:n]) for split, n in ((data.train, 150), (data.test, 60)))
    return dataclasses.replace(data, train=train, test=test)


@pytest.fixture(autouse=True)
def one_thread():
    """Of such small convolutions one core does as many a second as two, and on a busy machine more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(**changes) -> PretrainConfig:
    """K = 100 is no multiple of the batch of 32."""
    base = {"arch": "resnet8-small", "epochs": 2, "batch_size": 32, "moco_dim": 16, "moco_k": 100, "knn_every": 0}
    return PretrainConfig("digits", **(base | changes))


def run_in(folder, **changes) -> Run:
    folder.mkdir(exist_ok=True)
    return Run(folder, **changes)


# --- configuration ------------------------------------------------------------------------------------------


def test_defaults_are_the_published_ones():
    config = resolve_config("/some/folder", {})
    assert (config.arch, config.epochs, config.batch_size, config.lr) == ("resnet50", 200, 256, 0.03)
    assert (config.schedule, config.momentum, config.weight_decay, config.cos) == ((120, 160), 0.9, 1e-4, False)
    assert (config.moco_dim, config.moco_k, config.moco_m, config.moco_t) == (128, 65536, 0.999, 0.07)
    assert not config.mlp
    assert not config.aug_plus


def test_explicit_settings_win_over_a_preset():
    preset = resolve_config("digits", {})
    assert preset.cos
    assert preset.moco_k < 1258
    assert resolve_config("digits", {"lr": 7.0}) == dataclasses.replace(preset, lr=7.0)
    assert not resolve_config("digits", {"schedule": (3,)}).cos
    assert resolve_config("digits", {"schedule": (3,), "cos": True}).cos


def test_learning_rates():
    step = tiny(lr=1.0, epochs=200)
    assert [step.learning_rate(e) for e in (0, 119)] == [1.0, 1.0]
    assert [step.learning_rate(e) for e in (120, 159, 160)] == pytest.approx([0.1, 0.1, 0.01])
    cosine = tiny(lr=1.0, epochs=10, cos=True)
    assert [cosine.learning_rate(e) for e in (0, 5)] == pytest.approx([1.0, 0.5])
    assert cosine.learning_rate(9) == pytest.approx(0.5 * (1 + math.cos(0.9 * math.pi)))


@pytest.mark.parametrize(
    "changes",
    [{"epochs": 0}, {"batch_size": 1}, {"lr": 0.0}, {"lr": math.nan}, {"moco_t": -1.0}, {"moco_m": 1.5}, {"moco_k": 0}],
)
def test_impossible_settings(changes):
    (name, value), *_ = changes.items()
    with pytest.raises(ValueError, match=f"{name}: expected .*got {value}"):
        tiny(**changes)


# --- the loop -----------------------------------------------------------------------------------------------


def test_losses_are_those_of_the_four_lines(digits, tmp_path):
    """The loop against the same steps written out, over batches that do not divide K and a short last one."""
    config = tiny(epochs=1)
    records = pretrain(config, digits, run_in(tmp_path))
    model = build_model(config)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    total, hits = 0.0, 0.0
    for im_q, im_k in mdata.two_crop_batches(digits, config.augmentation(digits), 32, seed=0, epoch=0):
        out = model(im_q, im_k)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        model.update(out.keys)
        total += out.stats.loss.sum().item()
        hits += (out.stats.rank < 5).sum().item()
    # float32 rounding, amplified over five steps by another order of summation in the convolutions' layout
    assert records[0]["loss"] == pytest.approx(total / 150, rel=1e-3)
    assert records[0]["acc5"] == pytest.approx(100 * hits / 150, abs=2.1)  # three images of 150 may change sides
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["state_dict"]
    assert state["queue_ptr"].tolist() == [150 % 100]


def test_training_teaches(tmp_path):
    """Five epochs of the digits' preset: loss down, neighbours better than the untrained encoder's."""
    digits = mdata.load("digits")
    config = resolve_config("digits", {"epochs": 5, "knn_every": 0})
    model = build_model(config)
    untrained = encoder_knn(model.encoder_q, digits, run_in(tmp_path), config.knn_k)
    records = pretrain(config, digits, run_in(tmp_path), model)
    assert records[-1]["loss"] < records[1]["loss"] - 0.5  # from the second epoch: the queue then holds real keys
    assert records[-1]["acc1"] > records[1]["acc1"]
    assert records[-1]["knn_top1"] > untrained + 2


def test_what_a_run_leaves_behind(digits, tmp_path):
    records = pretrain(tiny(epochs=3, knn_every=2), digits, run_in(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == records
    assert [record["epoch"] for record in lines] == [1, 2, 3]
    assert [("knn_top1" in record) for record in lines] == [False, True, True]
    seconds = [record["seconds"] for record in lines]
    assert seconds == sorted(seconds)
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert not list(tmp_path.glob("*.tmp"))
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert checkpoint.keys() == {"epoch", "arch", "state_dict", "optimizer"}
    assert (checkpoint["epoch"], checkpoint["arch"]) == (3, "resnet8-small")
    prefixes = {name.split(".")[0] for name in checkpoint["state_dict"]}
    assert prefixes == {"encoder_q", "encoder_k", "queue", "queue_ptr"}
    assert checkpoint["state_dict"]["queue"].shape == (16, 100)


def test_resume_goes_on_as_if_never_stopped(digits, tmp_path):
    through = pretrain(tiny(epochs=4), digits, run_in(tmp_path / "through"))
    pretrain(tiny(epochs=2), digits, run_in(tmp_path / "halves"))
    checkpoint = tmp_path / "halves" / "checkpoint.pth"
    resumed = pretrain(tiny(epochs=4), digits, run_in(tmp_path / "halves", resume=checkpoint))
    assert [r["loss"] for r in resumed] == [r["loss"] for r in through]
    assert [r["epoch"] for r in read_metrics(tmp_path / "halves" / "metrics.jsonl")] == [1, 2, 3, 4]
    states = [load_checkpoint(tmp_path / name / "checkpoint.pth")["state_dict"] for name in ("through", "halves")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_seeds(digits, tmp_path):
    losses = [
        pretrain(tiny(epochs=1, seed=seed), digits, run_in(tmp_path / str(i)))[0]["loss"]
        for i, seed in enumerate((5, 5, 6))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_a_queue_larger_than_the_data_is_warned_of(digits, tmp_path):
    with pytest.warns(UserWarning, match="moco_k: 151 keys but only 150 images"):
        pretrain(tiny(epochs=1, moco_k=151), digits, run_in(tmp_path))


def test_a_loss_that_is_not_finite_stops_before_the_step(digits, tmp_path):
    model = build_model(tiny())
    with torch.no_grad():
        model.encoder_q.fc.bias.fill_(math.nan)
    before = {
        name: value.clone() for name, value in model.state_dict().items() if name.startswith(("queue", "encoder_k"))
    }
    with pytest.raises(FloatingPointError, match="loss: expected a finite number, got nan in epoch 1, step 1"):
        pretrain(tiny(), digits, run_in(tmp_path), model)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for name, value in before.items():
        if not name.endswith(statistics):
            assert torch.equal(model.state_dict()[name], value), name
    assert not (tmp_path / "checkpoint.pth").exists()


# --- checkpoints --------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A saved checkpoint's path, and the model it is of, with statistics that are not those of the start."""
    model = build_model(tiny(mlp=True))
    model(torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8))
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.03)
    save_checkpoint(tmp_path / "c.pth", epoch=7, arch="resnet8-small", model=model, optimizer=optimizer)
    return tmp_path / "c.pth", model


def test_checkpoint_round_trip(saved):
    path, model = saved
    checkpoint = load_checkpoint(path)
    assert checkpoint["epoch"] == 7
    assert all(torch.equal(checkpoint["state_dict"][name], value) for name, value in model.state_dict().items())


def test_names_of_distributed_checkpoints_lose_their_prefix(saved):
    path, model = saved
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"] = {f"module.{name}": value for name, value in checkpoint["state_dict"].items()}
    torch.save(checkpoint, path)
    assert load_checkpoint(path)["state_dict"].keys() == model.state_dict().keys()


@pytest.mark.parametrize("mlp", [False, True], ids=["v1", "v2"])
def test_load_encoder_has_the_same_features(digits, tmp_path, mlp):
    model = build_model(tiny(mlp=mlp))
    model(torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8))
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.03)
    save_checkpoint(tmp_path / "c.pth", epoch=1, arch="resnet8-small", model=model, optimizer=optimizer)
    encoder = load_encoder(load_checkpoint(tmp_path / "c.pth"))
    features = [encoder_features(e, digits, digits.test) for e in (encoder, model.encoder_q)]
    torch.testing.assert_close(*features, rtol=1e-5, atol=1e-6)


def test_load_encoder_of_another_architecture(saved):
    checkpoint = load_checkpoint(saved[0]) | {"arch": "resnet18-small"}
    with pytest.raises(ValueError, match=r"expected the layers of resnet18-small under encoder_q.*missing"):
        load_encoder(checkpoint)


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
def test_resume_from_another_configuration(saved, digits, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain(tiny(**changes), digits, run_in(tmp_path, resume=saved[0]))


def test_metrics_of_a_resumed_run_drop_what_is_done_anew(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n{"epoch": 3}\n{"epo')
    log = MetricLog(tmp_path, keep_epochs=2)
    log.write({"epoch": 3, "loss": 1.5})
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"epoch": 1}, {"epoch": 2}, {"epoch": 3, "loss": 1.5}]


def test_build_model_is_moco_with_the_configured_constants():
    model = build_model(tiny(moco_m=0.9, moco_t=0.3))
    assert isinstance(model, MoCo)
    assert (model.m, model.T, model.K) == (0.9, 0.3, 100)
