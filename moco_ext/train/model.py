"""The model of a configuration."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ..encoders import resolve
from ..end_to_end import EndToEnd
from ..mechanism import Mechanism
from ..memory_bank import MemoryBank
from ..moco import MoCo
from .config import DTYPES, PretrainConfig

MECHANISMS: dict[str, type[Mechanism]] = {"queue": MoCo, "end-to-end": EndToEnd, "memory-bank": MemoryBank}
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(config: PretrainConfig, images: int = 0) -> Mechanism:
    """The model of a run at its first step, with the same weights for the same seed.

    Args:
        images: size of the training set; a memory bank stores a feature of each image.
    """
    torch.manual_seed(config.seed)
    dtype = DTYPES[config.queue_dtype]
    settings: dict[str, Any] = {
        "dim": config.moco_dim,
        "K": config.moco_k,
        "m": config.moco_m,
        "T": config.moco_t,
        "mlp": config.mlp,
        "images": images,
        "shuffle_bn": config.shuffle_bn,
        "split_bn": config.split_bn,
        "queue_dtype": dtype,
        "bank_dtype": dtype,
        "label_smoothing": config.label_smoothing,
        "in_batch": config.in_batch,
        "empty": config.empty_queue,
        "same_id": None if config.same_image == "negative" else config.same_image,
    }
    if config.key_encoder is not None:
        settings["key_encoder"] = config.key_encoder
    if config.key_encoder in (None, "momentum"):  # what autocast would cast at each step
        settings["low_precision"] = AUTOCAST.get(config.precision)
    mechanism = MECHANISMS[config.dictionary]
    known = inspect.signature(mechanism).parameters
    return mechanism(resolve(config.arch), **{name: value for name, value in settings.items() if name in known})


def mechanism_has(dictionary: str, parameter: str) -> bool:
    """Whether a mechanism's model takes a parameter: ``mechanism_has("end-to-end", "K")`` is false."""
    return parameter in inspect.signature(MECHANISMS[dictionary]).parameters
