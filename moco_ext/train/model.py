"""The model of a configuration."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import nn

from ..encoders import AUTOCAST, freeze_patch_projection, resolve, zero_init_residual
from ..mechanism import Mechanism
from .config import DTYPES, PretrainConfig
from .mechanisms import MECHANISMS, PARAMETERS


def build_model(config: PretrainConfig, images: int = 0, size: int | None = None) -> Mechanism:
    """The model of a run at its first step, with the same weights for the same seed.

    Args:
        images: size of the training set; a memory bank stores a feature of each image.
        size: side of the views in pixels; None: ``config.image_size``.
    """
    size = config.image_size if size is None else size
    if size is not None and config.views == "patches":
        size //= math.isqrt(config.patches)
    torch.manual_seed(config.seed)
    dtype = DTYPES[config.queue_dtype]
    settings: dict[str, Any] = {parameter: getattr(config, name) for name, parameter in PARAMETERS.items()}
    settings |= {
        "images": images,
        "queue_dtype": dtype,
        "bank_dtype": dtype,
        "teacher": None,  # the trainer attaches it
        "same_id": None if config.same_image == "negative" else config.same_image,
    }
    if config.key_encoder is None:
        del settings["key_encoder"]
    if config.key_encoder in (None, "momentum"):  # what autocast would cast at each step
        settings["low_precision"] = AUTOCAST.get(config.precision)
    mechanism = MECHANISMS[config.dictionary]
    known = inspect.signature(mechanism).parameters
    encoder = resolve(config.arch, size)
    changes = [(config.stop_grad_conv1, freeze_patch_projection), (config.zero_init_residual, zero_init_residual)]

    def build(num_classes: int) -> nn.Module:
        module = encoder(num_classes=num_classes)
        for wanted, change in changes:
            if wanted:
                change(module)
        return module

    return mechanism(build, **{name: value for name, value in settings.items() if name in known})
