"""Momentum Contrast for PyTorch with fused C++/CUDA kernels."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import tiled  # noqa: F401  # registers itself
from .clip import clip_loss
from .end_to_end import EndToEnd
from .memory_bank import MemoryBank, MemoryBankOutput
from .moco import MoCo, MoCoOutput
from .moco_v3 import MoCoV3
from .momentum import flatten_parameters_
from .ops import (
    ExpectedKey,
    NearestKeys,
    enqueue_,
    expected_key,
    info_nce,
    l2_normalize,
    momentum_update_,
    nearest_keys,
)
from .queue import KeyQueue
from .stats import InfoNCEStats

if TYPE_CHECKING:
    from .evaluate.embed import embed as embed
    from .evaluate.encoder import Encoder as Encoder
    from .evaluate.encoder import load_encoder as load_encoder
    from .evaluate.neighbors import neighbors as neighbors
    from .experiments.export import export as export

__version__ = "0.1.0"

__all__ = [
    "EndToEnd",
    "ExpectedKey",
    "InfoNCEStats",
    "KeyQueue",
    "MemoryBank",
    "MemoryBankOutput",
    "MoCo",
    "MoCoOutput",
    "MoCoV3",
    "NearestKeys",
    "clip_loss",
    "enqueue_",
    "expected_key",
    "flatten_parameters_",
    "info_nce",
    "l2_normalize",
    "momentum_update_",
    "nearest_keys",
]

# Not in __all__: they need torchvision, and are imported when they are used.
_MODULE_OF = {
    "Encoder": ".evaluate.encoder",
    "embed": ".evaluate.embed",
    "export": ".experiments.export",
    "load_encoder": ".evaluate.encoder",
    "neighbors": ".evaluate.neighbors",
}


def __dir__() -> list[str]:
    return [*globals(), *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name], __name__), name)
