"""Configurations: published defaults, recipes, presets, ranges, and settings that contradict each other."""

import dataclasses
import math
import re

import pytest

pytest.importorskip("torchvision")
from training import few_digits, tiny

from moco_ext.cli.launch import LaunchOptions
from moco_ext.runs.options import RunOptions
from moco_ext.runs.settings import settings
from moco_ext.train import PretrainConfig, resolve_config
from moco_ext.train.classifier import ClassifierConfig


def test_defaults_are_the_published_ones():
    config = resolve_config("/some/folder", {})
    assert (config.arch, config.epochs, config.batch_size, config.lr) == ("resnet50", 200, 256, 0.03)
    assert (config.schedule, config.momentum, config.weight_decay, config.cos) == ((120, 160), 0.9, 1e-4, False)
    assert (config.moco_dim, config.moco_k, config.moco_m, config.moco_t) == (128, 65536, 0.999, 0.07)
    assert (config.mlp, config.aug_plus, config.dictionary, config.precision) == (False, False, "queue", "fp32")


def test_explicit_settings_win_over_a_preset():
    preset = resolve_config("digits", {})
    assert preset.cos
    assert preset.moco_k < 1258
    assert resolve_config("digits", {"lr": 7.0}) == dataclasses.replace(preset, lr=7.0)
    assert not resolve_config("digits", {"schedule": (3,)}).cos
    assert resolve_config("digits", {"schedule": (3,), "cos": True}).cos
    assert resolve_config("photos", {"epochs": 3}, "moco-v1-1b").steps == 0
    assert resolve_config("photos", {"cos": True}, "moco-v1-1b").lr_every == 0
    assert resolve_config("photos", {"cos": True, "lr_every": 9}, "moco-v1-1b").lr_every == 9


def test_the_warm_up_of_a_preset_is_at_most_a_tenth_of_the_run():
    found = [
        resolve_config("fashion-mnist", given).warmup_epochs
        for given in ({}, {"epochs": 100}, {"epochs": 1}, {"steps": 50}, {"epochs": 4, "warmup_epochs": 1.0})
    ]
    assert found == [0.6, 0.6, 0.1, 0.0, 1.0]
    assert resolve_config("cifar10", {}, "cifar10").warmup_epochs == 0  # the notebook's


def test_the_image_size_of_a_preset_is_for_its_own_encoder():
    assert resolve_config("fashion-mnist", {}).image_size == 56
    assert resolve_config("fashion-mnist", {}, "moco-v2").image_size == 56
    assert resolve_config("fashion-mnist", {"image_size": 28}).image_size == 28
    assert resolve_config("fashion-mnist", {"arch": "resnet18-small"}).image_size is None
    assert resolve_config("fashion-mnist", {}, "cifar10").image_size is None


def test_recipes_are_the_published_ones():
    v2 = resolve_config("/some/folder", {}, "moco-v2")
    assert (v2.mlp, v2.moco_t, v2.aug_plus, v2.cos, v2.lr, v2.epochs) == (True, 0.2, True, True, 0.03, 200)
    billion = resolve_config("/some/folder", {"batch_size": 512}, "moco-v1-1b")
    assert (billion.lr, billion.steps, billion.batch_size) == (0.12, 1_250_000, 512)
    assert billion.learning_rate(62_499, 1) == 0.12
    assert billion.learning_rate(62_500, 1) == pytest.approx(0.12 * 0.9)
    assert billion.learning_rate(1_249_999, 1) == pytest.approx(0.12 * 0.9**19)


def test_the_cifar10_recipe_is_the_notebooks():
    config = resolve_config("cifar10", {"epochs": 800, "symmetric": True}, "cifar10")
    assert (config.epochs, config.symmetric, config.mlp, config.moco_dim) == (800, True, False, 128)
    assert (config.moco_k, config.moco_m, config.moco_t, config.split_bn) == (4096, 0.99, 0.1, 8)
    assert (config.batch_size, config.lr, config.weight_decay, config.cos) == (512, 0.06, 5e-4, True)
    views = config.augmentation(dataclasses.replace(few_digits(), size=32, flip=True))
    assert (views.scale, views.jitter, views.jitter_p) == ((0.08, 1.0), (0.4, 0.4, 0.4, 0.1), 0.8)
    assert (views.gray_p, views.blur_p, views.flip_p) == (0.2, 0.0, 0.5)


def test_a_recipe_keeps_only_what_belongs_to_the_data():
    config = resolve_config("digits", {}, "moco-v1")
    assert (config.arch, config.crop_min, config.knn_k) == ("resnet8-small", 0.5, 20)
    assert (config.moco_k, config.epochs, config.cos, config.moco_t) == (65536, 200, False, 0.07)
    with pytest.raises(ValueError, match=r"recipe: expected one of moco-v1, .* got 'v3'"):
        resolve_config("digits", {}, "v3")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compile_mode": "reduce-overhead"}, "compile_mode: expected default without compile, got reduce-overhead"),
        ({"compile": True, "compile_mode": "fast"}, "compile_mode: expected one of default, .* got 'fast'"),
        ({"compile": True, "compile_mode": "max-autotune", "accumulate": 2}, "accumulate: expected 1 .* got 2"),
    ],
    ids=str,
)
def test_modes_of_compilation_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def test_a_memory_bank_has_the_momentum_of_the_paper():
    assert resolve_config("digits", {"dictionary": "memory-bank"}).moco_m == 0.5
    assert resolve_config("digits", {"dictionary": "memory-bank", "moco_m": 0.9}).moco_m == 0.9


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_queue_has_the_dtype_of_the_precision(precision):
    """A memory bank's features move by (1 - m), which 16 bits would round away."""
    assert tiny(precision=precision).queue_dtype == precision
    assert tiny(precision=precision, dictionary="memory-bank").queue_dtype == "fp32"
    assert tiny(precision=precision, queue_dtype="fp16").queue_dtype == "fp16"


def test_a_run_by_steps_is_longer_than_its_warm_up():
    """Its learning rate would never be the one that was asked for."""
    config = PretrainConfig("digits", steps=20, warmup_epochs=2.0)
    assert config.total_steps(9) == 20
    with pytest.raises(ValueError, match=r"^warmup_epochs: expected less than the 2 epochs of 20 steps, got 2.0"):
        config.total_steps(10)


def test_learning_rates_by_epochs():
    step = tiny(lr=1.0, epochs=200)
    assert [step.learning_rate(epoch * 10, 10) for epoch in (0, 119)] == [1.0, 1.0]
    assert [step.learning_rate(epoch * 10 + 9, 10) for epoch in (120, 159, 160)] == pytest.approx([0.1, 0.1, 0.01])
    cosine = tiny(lr=1.0, epochs=10, cos=True)
    assert [cosine.learning_rate(step, 4) for step in (0, 3, 20)] == pytest.approx([1.0, 1.0, 0.5])
    assert cosine.learning_rate(39, 4) == pytest.approx(0.5 * (1 + math.cos(0.9 * math.pi)))


def test_a_cosine_by_steps_moves_each_step():
    config = tiny(lr=1.0, steps=100, cos=True)
    assert config.total_steps(7) == 100
    assert config.learning_rate(25, 7) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_momentum_schedules():
    assert tiny(moco_m=0.9).key_momentum(150, 10) == 0.9
    rising = tiny(moco_m=0.9, moco_m_cos=True, steps=100)
    assert [rising.key_momentum(step, 10) for step in (0, 50, 100)] == pytest.approx([0.9, 0.95, 1.0])


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0},
        {"batch_size": 1},
        {"lr": 0.0},
        {"lr": math.nan},
        {"moco_t": -1.0},
        {"moco_m": 1.5},
        {"moco_k": 0},
        {"steps": -1},
        {"accumulate": 0},
        {"precision": "fp8"},
        {"dictionary": "heap"},
        {"shuffle_bn": "sometimes"},
        {"momentum": 1.0},
        {"momentum": math.nan},
        {"weight_decay": -1.0},
        {"schedule": (3, -1)},
        {"label_smoothing": 1.0},
    ],
)
def test_impossible_settings(changes):
    (name, value), *_ = changes.items()
    with pytest.raises(ValueError, match=f"{name}: expected .*got {re.escape(repr(value))}"):
        tiny(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"symmetric": True, "dictionary": "memory-bank"},
        {"symmetric": True, "shuffle_bn": "loader"},
        {"key_encoder": "partial", "dictionary": "memory-bank"},
        {"in_batch": True, "dictionary": "end-to-end"},
        {"same_image": "mask", "dictionary": "memory-bank"},
    ],
)
def test_settings_that_contradict_each_other(changes):
    with pytest.raises(ValueError, match=f"^{next(iter(changes))}: expected"):
        tiny(**changes)


def test_everything_but_the_data_is_a_setting_with_help():
    assert [field.name for field in dataclasses.fields(PretrainConfig)] == ["data", *settings(PretrainConfig)]
    assert [field.name for field in dataclasses.fields(ClassifierConfig)] == [*settings(ClassifierConfig)]
    assert all(setting.help for cls in (RunOptions, LaunchOptions) for setting in settings(cls).values())


def test_checks_name_the_setting_and_hold_for_every_class():
    with pytest.raises(ValueError, match=r"^keep: expected at least 1, got 0$"):
        RunOptions("runs", keep=0)
    with pytest.raises(ValueError, match=r"^lr_head: expected a positive number, got 0$"):
        ClassifierConfig(epochs=1, lr=0.1, lr_head=0)
    with pytest.raises(ValueError, match=r"^dist_backend: expected one of nccl, gloo, got 'mpi'$"):
        LaunchOptions(dist_backend="mpi")
