"""Momentum Contrast for PyTorch with fused C++/CUDA kernels."""

from .ops import enqueue_, info_nce, l2_normalize, momentum_update_
from .stats import InfoNCEStats

__all__ = ["InfoNCEStats", "enqueue_", "info_nce", "l2_normalize", "momentum_update_"]
