"""Recipes, presets for the small data sets, and the configuration that results from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .config import PretrainConfig
from .mechanisms import MECHANISMS, own_momentum

_V3: dict[str, Any] = {
    "dictionary": "batch",
    "batch_size": 4096,
    "moco_dim": 256,
    "moco_m": 0.99,
    "moco_m_cos": True,
    "aug_byol": True,
    "cos": True,
}
RECIPES: dict[str, dict[str, Any]] = {
    "moco-v1": {},
    "moco-v2": {"mlp": True, "moco_t": 0.2, "aug_plus": True, "cos": True},
    # ImageNet, 100 epochs (ResNet-50) and 300 epochs (ViT-S): the commands of the official repository.
    "moco-v3": _V3
    | {
        "epochs": 100,
        "lr_base": 0.6,
        "weight_decay": 1e-6,
        "optimizer": "lars",
        "warmup_epochs": 10.0,
        "moco_t": 1.0,
        "zero_init_residual": True,
    },
    "moco-v3-vit": _V3
    | {
        "arch": "vit_small",
        "epochs": 300,
        "lr_base": 1.5e-4,
        "weight_decay": 0.1,
        "optimizer": "adamw",
        "warmup_epochs": 40.0,
        "moco_t": 0.2,
        "crop_min": 0.08,
        "stop_grad_conv1": True,
    },
    # The official repository's CIFAR-10 notebook. Its views have no blur, and neither have ours at 32 pixels.
    "cifar10": {
        "arch": "resnet18-small",
        "batch_size": 512,
        "lr": 0.06,
        "weight_decay": 5e-4,
        "cos": True,
        "moco_k": 4096,
        "moco_m": 0.99,
        "moco_t": 0.1,
        "split_bn": 8,
        "aug_plus": True,
        "crop_min": 0.08,
        "drop_last": True,
    },
    # Section 4 of the MoCo paper, for a billion images: 64 GPUs, about 1.4 epochs.
    "moco-v1-1b": {"batch_size": 1024, "lr": 0.12, "steps": 1_250_000, "lr_gamma": 0.9, "lr_every": 62_500},
}

# Short runs need a key encoder that moves faster than with m = 0.999, and K well below the number of images: other
# views of an image that are still in the queue count as its negatives.
_SHORT = {"mlp": True, "moco_t": 0.2, "aug_plus": True, "cos": True, "lr": 0.06, "moco_m": 0.99}
_CIFAR = _SHORT | {"arch": "resnet18-small", "batch_size": 512, "moco_k": 4096, "warmup_epochs": 10.0}
_PRESETS: dict[str, dict[str, Any]] = {
    "digits": _SHORT
    | {
        "arch": "resnet8-small",
        "epochs": 80,
        "batch_size": 128,
        "mlp": False,
        "moco_k": 512,
        "crop_min": 0.5,  # a fifth of an 8x8 digit is not recognizable
        "knn_k": 20,  # about 125 training images per class: 200 neighbors would include other classes
    },
    "fashion-mnist": _SHORT
    | {
        "arch": "resnet10",
        "image_size": 56,  # at 28 pixels the last stage would see a 1x1 map
        "epochs": 6,
        "warmup_epochs": 0.6,
        "batch_size": 128,
        "moco_k": 4096,
        "crop_min": 0.8,  # garments are centered and fill the image
        "online_knn": 2,
    },
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
}

_OF_DATA = ("arch", "image_size", "crop_min", "knn_k")  # what a recipe leaves to the preset

# Of two ways to say the same, the second wins in a configuration, and is turned off by this value.
_ALTERNATIVES: dict[str, dict[str, Any]] = {
    "lr": {"lr_base": None},
    "epochs": {"steps": 0},
    "schedule": {"cos": False, "lr_every": 0},
    "cos": {"lr_every": 0},
}


def alternatives(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that would win over ``chosen`` ones if a weaker source has them, and the values that prevent it."""
    given = (name for name, value in chosen.items() if value is not False)
    return {other: off for name in given for other, off in _ALTERNATIVES.get(name, {}).items()}


def resolve_config(
    data: str, explicit: dict[str, Any], recipe: str | None = None, guided: dict[str, Any] | None = None
) -> PretrainConfig:
    """The configuration of a run on ``data``: explicit settings, then the recipe, then the data set's preset, then
    ``guided``, then the published defaults. With a recipe, the preset only supplies what depends on the data: ``arch``,
    ``image_size``, ``crop_min`` and ``knn_k``.

    Explicit ``epochs`` turn the steps of a recipe off, and an explicit ``schedule`` its cosine; likewise in the other
    pairs of settings of which one replaces the other. With another ``arch``, a preset's image size is not used. With
    explicit ``epochs``, its warm-up takes at most a tenth of them, and with explicit ``steps`` there is none.

    Args:
        guided: what :mod:`moco_ext.train.guide` chose for the images and the device.

    Raises:
        ValueError: an unknown recipe, or settings that :class:`PretrainConfig` does not take.
    """
    settings: dict[str, Any] = {"data": data}
    for layer in layers(data, explicit, recipe, guided).values():
        settings |= layer
    return PretrainConfig(**settings)


def layers(
    data: str, explicit: dict[str, Any], recipe: str | None = None, guided: dict[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """The settings of :func:`resolve_config` by their source; a later source wins over an earlier one."""
    if recipe is not None and recipe not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {recipe!r}")
    published = RECIPES[recipe] if recipe is not None else {}
    preset = _PRESETS.get(data, {})
    if "warmup_epochs" in preset:
        epochs = 0 if explicit.get("steps") else explicit.get("epochs", math.inf)
        preset = preset | {"warmup_epochs": min(preset["warmup_epochs"], epochs / 10)}
    if recipe is not None:
        preset = {name: preset[name] for name in _OF_DATA if name in preset}
    if "arch" in published or "arch" in explicit:  # the preset's image size is for its own encoder
        preset = {name: value for name, value in preset.items() if name != "image_size"}
    weaker = {**(guided or {}), **preset, **published}
    explicit = {name: off for name, off in alternatives(explicit).items() if name in weaker} | explicit
    mechanism = explicit.get("dictionary")
    return {
        "guide": guided or {},
        "preset": preset,
        "recipe": published,
        "mechanism": own_momentum(mechanism) if mechanism in MECHANISMS else {},
        "given": explicit,
    }
