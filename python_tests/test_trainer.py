"""The pre-training loop on one process: what a step is, what a run leaves behind, what stops it."""

import contextlib
import json
import math
import warnings

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("tensorboard")
from torch._subclasses import FakeTensorMode
from training import assert_equal_states, few_digits, run_in, state_of, tiny

from moco_ext import EndToEnd, MemoryBank, MoCo, distributed
from moco_ext import data as mdata
from moco_ext.data import TrainLoader
from moco_ext.evaluate.scores import knn_score, split_features
from moco_ext.train import build_model, pretrain, resolve_config
from moco_ext.train.step import OptimizerStep, _to_host

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits():
    return few_digits()


def steps_of(config, data):
    """The micro-batches of each optimizer step of the first epoch."""
    loader = TrainLoader(
        data, config.augmentation(data), config.batch_size, accumulate=config.accumulate, channels_last=True
    )
    steps, step = [], []
    for batch in loader.epoch(0):
        step.append(batch)
        if batch.last:
            steps.append(step)
            step = []
    return steps


def test_losses_are_those_of_the_four_lines(digits, tmp_path):
    """The loop against the same steps written out, over batches that do not divide K and a short last one."""
    config = tiny(epochs=1)
    records = pretrain(config, digits, run_in(tmp_path))
    model = build_model(config)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    total, hits = 0.0, 0.0
    for (batch,) in steps_of(config, digits):
        out = model(batch.im_q, batch.im_k)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        model.update(out.keys)
        total += out.stats.loss.sum().item()
        hits += (out.stats.rank < 5).sum().item()
    assert records[0]["loss"] == pytest.approx(total / 150, rel=1e-6)
    assert records[0]["acc5"] == pytest.approx(100 * hits / 150, rel=1e-6)
    assert state_of(tmp_path)["module.queue_ptr"].tolist() == [150 % 100]


@pytest.mark.slow
def test_training_teaches(tmp_path):
    """Five epochs of the digits' preset: loss down, neighbors better than the untrained encoder's."""
    digits = mdata.load("digits")
    config = resolve_config("digits", {"epochs": 5, "online_knn": 0})
    model = build_model(config)
    untrained = knn_score(digits, split_features(digits, run_in(tmp_path), model.encoder_q), k=config.knn_k)
    records = pretrain(config, digits, run_in(tmp_path), model)
    assert records[-1]["loss"] < records[1]["loss"] - 0.5  # from the second epoch: the queue then holds real keys
    assert records[-1]["acc1"] > records[1]["acc1"]
    assert records[-1]["knn_top1"] > untrained + 2


def test_features_that_do_not_fit_in_memory_are_not_compared(digits, tmp_path, monkeypatch):
    images, width = sum(map(len, digits.splits)), 256
    warning = pytest.warns(UserWarning, match=f"^knn_top1: the features of {images:,} images take .*: kNN accuracy is")
    for memory, expected in ((4 * images * width - 1, warning), (4 * images * width, contextlib.nullcontext())):
        monkeypatch.setattr("moco_ext.train.trainer.device_memory", lambda device, n=memory: n, raising=False)
        with expected:
            records = pretrain(tiny(epochs=1, online_knn=1), digits, run_in(tmp_path / str(memory)))
        assert ("knn_top1" in records[0]) == (expected is not warning)
    monkeypatch.setattr(distributed, "unite", lambda failures: failures | {"1 GiB"})
    with warning:  # of another rank
        assert "knn_top1" not in pretrain(tiny(epochs=1), digits, run_in(tmp_path / "other"))[0]


def test_what_a_run_leaves_behind(digits, tmp_path):
    records = pretrain(tiny(epochs=3, online_knn=2), digits, run_in(tmp_path, print_freq=2))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == records
    assert [record["epoch"] for record in lines] == [1, 2, 3]
    assert [record["step"] for record in lines] == [5, 10, 15]
    assert [("knn_top1" in record) for record in lines] == [False, True, True]
    assert all(0 < record["feature_std"] < 2 and record["images_per_second"] > 0 for record in lines)
    seconds = [record["seconds"] for record in lines]
    assert seconds == sorted(seconds)
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert not list(tmp_path.glob(".*.tmp"))
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert checkpoint.keys() == {"epoch", "arch", "state_dict", "optimizer", "trainer", "transform"}
    assert (checkpoint["epoch"], checkpoint["arch"]) == (3, "resnet8-small")
    prefixes = {".".join(name.split(".")[:2]) for name in checkpoint["state_dict"]}
    assert prefixes == {"module.encoder_q", "module.encoder_k", "module.queue", "module.queue_ptr"}
    assert checkpoint["state_dict"]["module.queue"].shape == (16, 100)
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == [
        "checkpoint.pth",
        "checkpoint_00000010.pth",
        "checkpoint_00000015.pth",
    ]


def test_training_by_steps_crosses_epochs(digits, tmp_path):
    """Seven steps of epochs of five, a record each five: the first is that of the first epoch."""
    by_steps = pretrain(tiny(steps=7, log_every=5), digits, run_in(tmp_path / "steps"))
    by_epochs = pretrain(tiny(epochs=1), digits, run_in(tmp_path / "epochs"))
    assert [(record["step"], record["epoch"]) for record in by_steps] == [(5, 1), (7, 1.4)]
    assert by_steps[0]["loss"] == by_epochs[0]["loss"]
    assert math.isfinite(by_steps[1]["loss"])


def test_a_first_epoch_other_than_zero(digits, tmp_path):
    """main_moco.py's --start-epoch: the images, and the rates, of that epoch and those after it."""
    records = pretrain(tiny(epochs=4, cos=True), digits, run_in(tmp_path, start_epoch=3))
    assert [(record["step"], record["epoch"]) for record in records] == [(20, 4)]
    assert records[0]["lr"] == pytest.approx(0.03 * 0.5 * (1 + math.cos(math.pi * 3 / 4)))


def test_seeds(digits, tmp_path):
    losses = [
        pretrain(tiny(epochs=1, seed=seed), digits, run_in(tmp_path / str(i)))[0]["loss"]
        for i, seed in enumerate((5, 5, 6))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_the_plain_copy(digits, tmp_path):
    """--moco-m 0: after each update the key encoder has the query encoder's parameters."""
    model = build_model(tiny(moco_m=0.0))
    pretrain(tiny(moco_m=0.0, epochs=1), digits, run_in(tmp_path), model)
    for key, query in zip(model.encoder_k.parameters(), model.encoder_q.parameters(), strict=True):
        assert torch.equal(key, query)


def test_momentum_schedule(digits, tmp_path, monkeypatch):
    """The update after step t is the published one at the start of step t + 1, and the last one changes nothing."""
    used = []
    update = MoCo.update
    monkeypatch.setattr(MoCo, "update", lambda self, *keys: (used.append(self.m), update(self, *keys)))
    pretrain(tiny(moco_m_cos=True), digits, run_in(tmp_path))
    assert used == pytest.approx([1 - 0.001 * (math.cos(math.pi * t / 10) + 1) / 2 for t in range(1, 11)])
    assert used[-1] == 1


# --- steps ----------------------------------------------------------------------------------------------------


def one_step(config, data, batches):
    model = build_model(config, len(data.train))
    optimizer = torch.optim.SGD(model.parameters(), 0.03)
    step = OptimizerStep(model, optimizer, config.precision, config.symmetric)
    return model, step(batches)


def test_accumulated_gradients_are_those_of_the_mean_loss(digits):
    """Two micro-batches, the second shorter: each image counts the same, one update takes all keys."""
    config = tiny(accumulate=4)
    batches = steps_of(config, digits)[1]  # 128 images are behind it: one micro-batch of 22 is left
    assert [len(batch.im_q) for batch in batches] == [22]
    batches = steps_of(tiny(batch_size=40, accumulate=4), digits)[0]
    assert [len(batch.im_q) for batch in batches] == [40, 40, 40, 30]
    model, result = one_step(config, digits, batches)
    expected = build_model(config)
    before = [p.detach().clone() for p in expected.encoder_q.parameters()]
    outs = [expected(batch.im_q, batch.im_k, key_order=batch.key_order) for batch in batches]
    loss = sum(len(batch.im_q) * out.loss for batch, out in zip(batches, outs, strict=True)) / 150
    loss.backward()
    assert result.metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert result.images == 150
    for was, parameter, now in zip(before, expected.encoder_q.parameters(), model.encoder_q.parameters(), strict=True):
        torch.testing.assert_close(now, was - 0.03 * parameter.grad, rtol=1e-5, atol=1e-7)
    assert model.queue_ptr.item() == 150 % 100
    expected.enqueue(torch.cat([out.keys for out in outs]))
    torch.testing.assert_close(model.queue, expected.queue)


def test_symmetric_is_the_mean_of_both_directions(digits):
    (batch,) = steps_of(tiny(), digits)[0]
    model, result = one_step(tiny(symmetric=True), digits, [batch])
    expected = build_model(tiny())
    losses = [expected(*views).loss.item() for views in ((batch.im_q, batch.im_k), (batch.im_k, batch.im_q))]
    assert result.metrics["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert model.queue_ptr.item() == 64


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_are_near_float32(digits, precision):
    (batch,) = steps_of(tiny(), digits)[0]
    _, exact = one_step(tiny(), digits, [batch])
    _, rounded = one_step(tiny(precision=precision), digits, [batch])
    # eps of bfloat16 is 2^-8; cosines of features that far off, divided by T = 0.07
    assert rounded.metrics["loss"] == pytest.approx(exact.metrics["loss"], abs=0.3)
    assert rounded.metrics["loss"] != exact.metrics["loss"]


def test_a_step_that_the_scaler_skips_changes_nothing(digits):
    (batch,) = steps_of(tiny(), digits)[0]
    config = tiny(precision="fp16")
    model = build_model(config)
    before = {name: value.clone() for name, value in model.state_dict().items() if _trained(name)}
    step = OptimizerStep(model, torch.optim.SGD(model.parameters(), 0.03), "fp16", False)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)  # gradients overflow for certain
    assert step([batch]).skipped
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    step.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    assert not step([batch]).skipped
    assert model.queue_ptr.item() == 32


def _trained(name):
    return not name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def test_the_loss_is_awaited_on_its_own_gpu(monkeypatch):
    """Of another GPU than the current one, whose stream the event was recorded on, the loss could be read before it
    had arrived."""
    waited_for = []

    class Event:
        def record(self, stream=None):
            waited_for.append(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: device)
    with FakeTensorMode():
        _to_host(torch.zeros(3, device="cuda:0"))
    assert waited_for == [torch.device("cuda:0")]


def test_a_loss_that_is_not_finite_stops_before_the_step(digits, tmp_path):
    model = build_model(tiny())
    with torch.no_grad():
        model.encoder_q.fc.bias.fill_(math.nan)
    before = {
        name: value.clone()
        for name, value in model.state_dict().items()
        if name.startswith(("queue", "encoder_k")) and _trained(name)
    }
    with pytest.raises(FloatingPointError, match=r"loss: expected a finite number, got nan in epoch 1, step 1.*nonfi"):
        pretrain(tiny(), digits, run_in(tmp_path), model)
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not (tmp_path / "checkpoint.pth").exists()
    dump = torch.load(tmp_path / "nonfinite.pth", weights_only=True)
    assert dump["step"] == 1
    assert dump["im_q"].shape == (32, 3, 8, 8)
    assert len(dump["index"].unique()) == 32
    assert dump["state_dict"]["encoder_q.fc.bias"].isnan().all()


# --- mechanisms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"dictionary": "end-to-end"}, EndToEnd),
        ({"dictionary": "end-to-end", "key_encoder": "partial", "split_bn": 2}, EndToEnd),
        ({"dictionary": "end-to-end", "key_encoder": "resnet10-small"}, EndToEnd),
        ({"dictionary": "memory-bank"}, MemoryBank),
        ({"key_encoder": "partial"}, MoCo),
        ({"key_encoder": "identical", "split_bn": 2}, MoCo),
        ({"views": "patches", "patches": 4, "split_bn": 2}, MoCo),
        ({"shuffle_bn": "loader"}, MoCo),
        ({"same_image": "positive", "empty_queue": True, "in_batch": True, "symmetric": True}, MoCo),
        ({"augment_on": "device", "aug_plus": True, "queue_dtype": "bf16"}, MoCo),
        ({"rotate": 10.0, "elastic": 20.0, "erase": 0.5}, MoCo),
        pytest.param({"compile": True}, MoCo, marks=pytest.mark.slow),
        pytest.param({"compile": True, "compile_mode": "reduce-overhead"}, MoCo, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_mechanism_trains(digits, tmp_path, settings, kind):
    config = tiny(epochs=1, **settings)
    model = build_model(config, len(digits.train))
    assert isinstance(model, kind)
    before = [p.detach().clone() for p in model.encoder_q.parameters()]
    (record,) = pretrain(config, digits, run_in(tmp_path), model)
    assert math.isfinite(record["loss"])
    assert all(not torch.equal(was, now) for was, now in zip(before, model.encoder_q.parameters(), strict=True))
    again = build_model(config, len(digits.train))
    again.load_state_dict({n.removeprefix("module."): v for n, v in state_of(tmp_path).items()})
    assert_equal_states(again.state_dict(), model.state_dict())


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("changes", [{}, {"symmetric": True}, {"precision": "bf16"}], ids=str)
def test_cuda_graphs_train_as_launched_kernels(digits, tmp_path, changes):
    """150 images: the last batch of each epoch is a partial one, which needs a graph of its own."""
    losses = []
    for mode in ("default", "reduce-overhead"):
        torch._dynamo.reset()
        config = tiny(epochs=3, compile=True, compile_mode=mode, **changes)
        records = pretrain(config, digits, run_in(tmp_path / mode, device=torch.device("cuda")))
        losses.append([record["loss"] for record in records])
    # cuDNN sums weight gradients in any order; a graph that reads another step's images is off by far more
    assert losses[1] == pytest.approx(losses[0], rel=2e-2 if "precision" in changes else 2e-3)


def test_a_queue_larger_than_the_data_is_warned_of(digits, tmp_path):
    with pytest.warns(UserWarning, match="moco_k: 151 keys but only 150 images"):
        pretrain(tiny(epochs=1, moco_k=151), digits, run_in(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pretrain(tiny(epochs=1, moco_k=150), digits, run_in(tmp_path / "fits"))


def test_build_model_is_moco_with_the_configured_constants():
    model = build_model(tiny(moco_m=0.9, moco_t=0.3, queue_dtype="bf16", split_bn=2, shuffle_bn="gather"))
    assert isinstance(model, MoCo)
    assert (model.m, model.T, model.K, model.split_bn, model.shuffle_bn) == (0.9, 0.3, 100, 2, "gather")
    assert model.queue.dtype == torch.bfloat16
