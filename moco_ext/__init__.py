"""Momentum Contrast for PyTorch with fused C++/CUDA kernels."""

from .end_to_end import EndToEnd
from .memory_bank import MemoryBank, MemoryBankOutput
from .moco import MoCo, MoCoOutput
from .moco_v3 import MoCoV3
from .momentum import flatten_parameters_
from .ops import enqueue_, info_nce, l2_normalize, momentum_update_
from .queue import KeyQueue
from .stats import InfoNCEStats

__version__ = "0.1.0"

__all__ = [
    "EndToEnd",
    "InfoNCEStats",
    "KeyQueue",
    "MemoryBank",
    "MemoryBankOutput",
    "MoCo",
    "MoCoOutput",
    "MoCoV3",
    "enqueue_",
    "flatten_parameters_",
    "info_nce",
    "l2_normalize",
    "momentum_update_",
]
