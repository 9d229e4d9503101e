"""The model that a configuration asks for."""

from __future__ import annotations

from typing import Any

import torch

from ..encoders import resolve
from ..end_to_end import EndToEnd
from ..memory_bank import MemoryBank
from ..moco import MoCo
from .config import DTYPES, PretrainConfig

Model = MoCo | EndToEnd | MemoryBank
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(config: PretrainConfig, images: int = 0) -> Model:
    """The model of a run at its first step: the same weights whenever the seed is the same.

    Args:
        images: in the training set; a memory bank has a feature of each.
    """
    torch.manual_seed(config.seed)
    base, split = resolve(config.arch), config.split_bn
    shared: dict[str, Any] = {"dim": config.moco_dim, "T": config.moco_t, "mlp": config.mlp, "split_bn": split}
    own: dict[str, Any] = {} if config.key_encoder is None else {"key_encoder": config.key_encoder}
    if config.dictionary == "end-to-end":
        return EndToEnd(base, shuffle_bn=config.shuffle_bn, **shared, **own)
    shared |= {"K": config.moco_k, "m": config.moco_m}
    dtype = DTYPES[config.queue_dtype]
    if config.dictionary == "memory-bank":
        return MemoryBank(base, images, bank_dtype=dtype, **shared)
    own |= {"label_smoothing": config.label_smoothing, "in_batch": config.in_batch, "empty": config.empty_queue}
    if config.key_encoder in (None, "momentum"):  # what autocast would make of the weights, without making it each step
        own["key_dtype"] = AUTOCAST.get(config.precision)
    same_id = None if config.same_image == "negative" else config.same_image
    return MoCo(base, queue_dtype=dtype, shuffle_bn=config.shuffle_bn, same_id=same_id, **shared, **own)
