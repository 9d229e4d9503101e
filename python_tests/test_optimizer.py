"""Optimizers by name: their groups, clipping, schedules, and runs that resume bit for bit with each of them."""

import math
import sys

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("tensorboard")
from test_resume import Interrupted, interrupt_at, same_records
from training import assert_equal_states, few_digits, run_in, state_of, tiny

from moco_ext import MoCo, encoders
from moco_ext.train import pretrain, resolve_config
from moco_ext.train.optimizer import build_optimizer, state_size
from moco_ext.train.step import OptimizerStep

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits():
    return few_digits(48)


def model() -> MoCo:
    torch.manual_seed(0)
    return MoCo("resnet8-small", dim=8, K=16)


def test_names_are_those_of_torch_and_timm():
    """timm's sgd is Nesterov's; the published one is torch's."""
    moco = model()
    sgd = build_optimizer(moco, lr=0.03, weight_decay=1e-4)
    assert type(sgd) is torch.optim.SGD
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.9, False)
    (group,) = sgd.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in moco.parameters()]
    assert type(build_optimizer(moco, "adamw", lr=0.1, betas=(0.9, 0.95))) is torch.optim.AdamW
    assert type(build_optimizer(moco, "lars", lr=0.1)) is timm.optim.Lars
    assert type(build_optimizer(moco, "lion", lr=0.1)) is timm.optim.Lion


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adamv"}, r"optimizer: expected one of sgd, adamw, .* got 'adamv'; did you mean .*adam"),
        ({"name": "lbfgs"}, r"optimizer: expected one of .* got 'lbfgs'"),
        ({"name": "adamw", "momentum": 0.5}, "momentum: expected none with optimizer adamw, got 0.5"),
        ({"name": "sgd", "betas": (0.9, 0.99)}, r"betas: expected none with optimizer sgd, got \(0.9, 0.99\)"),
        ({"name": "adamw", "betas": (0.9,)}, r"betas: expected 2 numbers with adamw, got \(0.9,\)"),
        ({"name": "sgd", "eps": 1e-3}, "opt_eps: expected none with optimizer sgd, got 0.001"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(model(), lr=0.1, **settings)


def test_unknown_names_are_errors_of_the_configuration(monkeypatch):
    with pytest.raises(ValueError, match=r"optimizer: expected one of .* got 'heavyball'"):
        tiny(optimizer="heavyball")
    monkeypatch.delitem(sys.modules, "timm.optim")
    monkeypatch.setitem(sys.modules, "timm", None)  # import timm raises
    with pytest.raises(ModuleNotFoundError, match=r"optimizer: lars is not one of torch's .* pip install timm"):
        tiny(optimizer="lars")
    tiny(optimizer="adamw")


def test_norms_and_biases_do_not_decay():
    moco = model()
    groups = build_optimizer(moco, "sgd", lr=0.1, weight_decay=0.5, decay_norm_bias=False).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    trained = dict(moco.encoder_q.named_parameters())
    assert {id(p) for p in trained.values()} == decays.keys()
    assert {decays[id(p)] for p in trained.values() if p.ndim > 1} == {0.5}
    assert {decays[id(p)] for p in trained.values() if p.ndim == 1} == {0.0}


def test_what_a_timm_encoder_exempts_does_not_decay():
    moco = MoCo(lambda num_classes: timm.create_model("test_vit", num_classes=num_classes), dim=8, K=16)
    groups = build_optimizer(moco, "adamw", lr=0.1, weight_decay=0.5, decay_norm_bias=False).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert (decays[id(moco.encoder_q.pos_embed)], decays[id(moco.encoder_q.cls_token)]) == (0.0, 0.0)
    assert decays[id(moco.encoder_q.blocks[0].attn.qkv.weight)] == 0.5


def test_lars_scales_matrices_only():
    """At each weight decay, also 0: one step of lr * 0.001 * |w| / |g| for matrices, plain SGD for vectors."""
    for weight_decay in (0.0, 1e-6):
        moco = model()
        optimizer = build_optimizer(moco, "lars", lr=2.0, weight_decay=weight_decay)
        before = {name: p.detach().clone() for name, p in moco.encoder_q.named_parameters()}
        for p in moco.encoder_q.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        for name, p in moco.encoder_q.named_parameters():
            w = before[name]
            scale = 0.001 * w.norm() / p.grad.norm() if p.ndim > 1 else 1.0
            torch.testing.assert_close(p.detach(), w - 2.0 * scale * p.grad, rtol=1e-5, atol=1e-6)


def test_layer_decay():
    numbers = encoders.layer_numbers(encoders.resolve("resnet8-small")(num_classes=4))
    assert (numbers["conv1.weight"], numbers["bn1.bias"], numbers["layer1.0.conv1.weight"]) == (0, 0, 1)
    assert (numbers["layer3.0.bn2.bias"], numbers["fc.weight"]) == (3, 4)
    vit = encoders.layer_numbers(encoders.resolve("vit_b_16")(num_classes=4))
    assert vit["class_token"] == vit["encoder.pos_embedding"] == 0
    assert (vit["encoder.layers.encoder_layer_11.mlp.0.weight"], vit["heads.head.weight"]) == (12, 13)
    moco = model()
    optimizer = build_optimizer(moco, "adamw", lr=0.1, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in moco.encoder_q.named_parameters():
        assert scales[id(p)] == 0.5 ** (4 - numbers[name])


def test_layer_decay_reaches_the_optimizer(digits, tmp_path, monkeypatch):
    seen = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, closure=None: (seen.append(sorted({g["lr"] for g in self.param_groups})), step(self, closure))[1],
    )
    pretrain(tiny(epochs=1, optimizer="adamw", lr=0.08, layer_decay=0.5), digits, run_in(tmp_path))
    assert seen[0] == pytest.approx([0.005, 0.01, 0.02, 0.04, 0.08])


def test_state_sizes():
    assert state_size("sgd") == 1
    assert state_size("lars") == 1
    assert state_size("adamw") == pytest.approx(2, abs=1e-3)


# --- clipping ---------------------------------------------------------------------------------------------------------


def batch_of(digits):
    from test_trainer import steps_of

    return steps_of(tiny(), digits)[0]


@pytest.mark.parametrize("scale", [None, 2.0**10])
def test_the_true_gradient_is_clipped(digits, scale):
    """With a gradient scaler too: of the unscaled gradient, whose norm becomes 0.01."""
    moco = model()
    optimizer = build_optimizer(moco, lr=1.0, momentum=0.0)
    step = OptimizerStep(moco, optimizer, "fp32" if scale is None else "fp16", False, clip_grad=0.01)
    if scale is not None:
        step.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    before = [p.detach().clone() for p in moco.encoder_q.parameters()]
    assert not step(batch_of(digits)).skipped
    moved = [now.detach() - was for was, now in zip(before, moco.encoder_q.parameters(), strict=True)]
    assert torch.cat([m.flatten() for m in moved]).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_a_short_gradient_is_not_changed(digits, tmp_path):
    pretrain(tiny(epochs=1), digits, run_in(tmp_path / "free"))
    pretrain(tiny(epochs=1, clip_grad=1e6), digits, run_in(tmp_path / "clipped"))
    assert_equal_states(state_of(tmp_path / "free"), state_of(tmp_path / "clipped"))


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_a_skipped_step_changes_nothing(digits, name):
    moco = model()
    step = OptimizerStep(moco, build_optimizer(moco, name, lr=0.1), "fp16", False, clip_grad=1.0)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    before = [p.detach().clone() for p in moco.parameters()]
    assert step(batch_of(digits)).skipped
    assert all(torch.equal(was, now) for was, now in zip(before, moco.parameters(), strict=True))
    assert moco.updates == 0
    step.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    assert not step(batch_of(digits)).skipped
    assert moco.updates == 1


# --- schedules --------------------------------------------------------------------------------------------------------


def test_warm_up_as_in_moco_v3():
    """lr · epoch / warm-up, then half a cosine over the remaining epochs, at each step."""
    config = tiny(lr=2.0, epochs=10, warmup_epochs=2, cos=True)
    for step in range(40):
        epoch = step / 4
        cosine = 0.5 * (1 + math.cos(math.pi * (epoch - 2) / 8))
        assert config.learning_rate(step, 4) == pytest.approx(2.0 * (epoch / 2 if epoch < 2 else cosine)), step
    steps = tiny(lr=2.0, epochs=200, warmup_epochs=2)
    assert [steps.learning_rate(step, 10) for step in (0, 5, 20, 1200)] == pytest.approx([0.0, 0.5, 2.0, 0.2])
    by_steps = tiny(lr=1.0, steps=20, warmup_epochs=0.5, cos=True)
    assert [by_steps.learning_rate(step, 10) for step in (0, 4, 5)] == pytest.approx([0.0, 0.8, 1.0])


def test_a_rate_of_256_images():
    config = tiny(lr_base=0.6, batch_size=1024, accumulate=2)
    assert config.learning_rate(0, 10) == pytest.approx(0.6 * 8)
    assert config.learning_rate(0, 10, nodes=2) == pytest.approx(0.6 * 16)
    assert resolve_config("digits", {"lr": 0.5, "batch_size": 64}).learning_rate(0, 10) == 0.5


SCHEDULES = {
    "cosine": {"cos": True},
    "steps": {"schedule": (1,)},
    "warm-up": {"cos": True, "warmup_epochs": 1, "moco_m_cos": True},
}


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        pytest.param(name, schedule, marks=() if "sgd" in name or "warm" in schedule else pytest.mark.slow)
        for name in ("sgd", "adamw", "lars", "lamb")
        for schedule in SCHEDULES
    ],
)
def test_resumed_equals_unbroken(digits, tmp_path, monkeypatch, name, schedule):
    extra = {"layer_decay": 0.7, "clip_grad": 1.0} if name == "adamw" else {}
    config = tiny(batch_size=16, optimizer=name, **SCHEDULES[schedule], **extra)
    through = pretrain(config, digits, run_in(tmp_path / "through"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(Interrupted):
            pretrain(config, digits, run_in(tmp_path / "cut", save_every=2))
    resumed = pretrain(config, digits, run_in(tmp_path / "cut", resume="auto"))
    same_records(through, resumed)
    assert_equal_states(state_of(tmp_path / "through"), state_of(tmp_path / "cut"))
    states = [
        torch.load(tmp_path / run / "checkpoint.pth", weights_only=True)["optimizer"] for run in ("through", "cut")
    ]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for index, state in states[0]["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1]["state"][index][key])), key


def test_another_optimizer_cannot_resume(digits, tmp_path):
    pretrain(tiny(epochs=1), digits, run_in(tmp_path))
    for name in ("adamw", "lars"):
        with pytest.raises(ValueError, match=f"resume: .*: expected --optimizer sgd, got {name}"):
            pretrain(tiny(epochs=2, optimizer=name), digits, run_in(tmp_path, resume="auto"))


def test_changed_hyperparameters_are_those_of_the_resumed_run(digits, tmp_path, monkeypatch):
    pretrain(tiny(epochs=1, weight_decay=0.1), digits, run_in(tmp_path))
    seen = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD,
        "step",
        lambda self, closure=None: (seen.append(self.param_groups[0]["weight_decay"]), step(self, closure))[1],
    )
    pretrain(tiny(epochs=2, weight_decay=0.2), digits, run_in(tmp_path, resume="auto"))
    assert set(seen) == {0.2}
