"""The mechanisms by name, and which settings of a run each of them has."""

from __future__ import annotations

import inspect
from typing import Any

from ..distillation import Distillation
from ..end_to_end import EndToEnd
from ..mechanism import Mechanism
from ..memory_bank import MemoryBank
from ..moco import MoCo
from ..moco_v3 import MoCoV3

MECHANISMS: dict[str, type[Mechanism]] = {
    "queue": MoCo,
    "batch": MoCoV3,
    "end-to-end": EndToEnd,
    "memory-bank": MemoryBank,
    "distillation": Distillation,
}

# Settings of a run -> parameters of the models.
PARAMETERS = {
    "moco_dim": "dim",
    "moco_mlp_dim": "mlp_dim",
    "moco_k": "K",
    "moco_m": "m",
    "moco_t": "T",
    "mlp": "mlp",
    "key_encoder": "key_encoder",
    "shuffle_bn": "shuffle_bn",
    "split_bn": "split_bn",
    "queue_dtype": "queue_dtype",
    "same_image": "same_id",
    "label_smoothing": "label_smoothing",
    "in_batch": "in_batch",
    "empty_queue": "empty",
    "shard_queue": "queue_sharding",
    "objective": "objective",
    "teacher": "teacher",
    "teacher_t": "teacher_T",
}


def has_setting(dictionary: str, setting: str) -> bool:
    """Whether a mechanism's model has a setting: ``has_setting("end-to-end", "moco_k")`` is false."""
    return PARAMETERS[setting] in inspect.signature(MECHANISMS[dictionary]).parameters


def has_two_views(dictionary: str) -> bool:
    """Whether a mechanism's model encodes two views of an image."""
    return "im_k" in inspect.signature(MECHANISMS[dictionary].forward).parameters


def own_momentum(dictionary: str) -> dict[str, Any]:
    """``{"moco_m": m}`` if m is not the key encoder's momentum, whose values do not suit it (a memory bank's is that of
    its features); else empty."""
    m = inspect.signature(MECHANISMS[dictionary]).parameters.get("m")
    published = inspect.signature(MoCo).parameters["m"].default
    return {} if m is None or m.default == published else {"moco_m": m.default}
