"""Counter-based random numbers: a function of integers, not of a generator's state.

A view's random numbers follow from its seed, and the seed from (run's seed, epoch, position in the epoch, view). So
they do not depend on the process or the batch, and resuming needs no generator state.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash_seeds(*values: int | np.ndarray | Tensor) -> np.ndarray:
    """Hash tuples of integers to 63 bits: int64, in the shape that the int64 ``values`` broadcast to."""
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for value in values:
            state = _mix((state ^ _unsigned(value)) + _GOLDEN)
    return (state >> np.uint64(1)).astype(np.int64)


def uniforms(seeds: np.ndarray | Tensor, count: int, *, start: int = 0) -> np.ndarray:
    """Random numbers ``start`` to ``start + count - 1`` of each seed, uniform in [0, 1).

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): its n-th number is a hash of (seed, n).

    Args:
        seeds: int64 [N], on the CPU.

    Returns:
        float32 [N, count].
    """
    steps = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        bits = _mix(_unsigned(seeds)[:, None] + steps * _GOLDEN)
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)  # the 24 bits that float32 holds


def _unsigned(value: int | np.ndarray | Tensor) -> np.ndarray:
    if isinstance(value, int):
        return np.asarray(value % 2**64, np.uint64)
    return np.asarray(value).view(np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
