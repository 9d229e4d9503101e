"""Random numbers that are a function of names, not of a generator's history.

A view's random numbers follow from its seed, its seed from (run's seed, epoch, place in the epoch, which view):
so they are the same in whatever process, batch or order the view is made, and after a resumption too.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash_seeds(*values: int | Tensor) -> np.ndarray:
    """63-bit hash of a tuple of integers, int64 of the values' common (broadcast) shape."""
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for value in values:
            state = _mix((state ^ _unsigned(value)) + _GOLDEN)
    return (state >> np.uint64(1)).astype(np.int64)


def uniforms(seeds: Tensor, count: int) -> np.ndarray:
    """``count`` numbers uniform in [0, 1) for each seed: seeds int64 [N], on the CPU -> float32 [N, count].

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), whose n-th number is a hash of (seed, n): rows of a batch
    are independent of each other, and all are made at once.
    """
    steps = np.arange(1, count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        bits = _mix(_unsigned(seeds)[:, None] + steps * _GOLDEN)
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)  # the 24 bits that float32 holds


def _unsigned(value: int | Tensor) -> np.ndarray:
    if isinstance(value, Tensor):
        return value.numpy().view(np.uint64)
    return np.asarray(value % 2**64, np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
