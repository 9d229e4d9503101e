"""The dictionary: a circular queue of keys."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor, nn

from .ops import enqueue_


class KeyQueue(nn.Module):
    """A first-in-first-out queue of K unit-length keys (the dictionary of the paper, Sec. 3.1).

    In memory the keys are rows, ``queue`` [K, dim]: a batch is one contiguous write. In the state dict they are
    columns, ``queue`` [dim, K], beside ``queue_ptr`` [1]: the official layout, so either side loads the other's.

    The first keys are random unit vectors from a fixed seed, equal on every rank by construction: under DDP the queue
    need never be broadcast.

    Args:
        dim: features of a key.
        K: keys the queue holds.
        dtype: of the stored keys; bfloat16 takes half of float32's memory and traffic.
        ids: keep what each key is of, ``queue_ids`` [K] int64 (-1: not known), and when it was written (``ages``).
        empty: begin without keys: ``queue_valid`` [1] int64 says how many there are, for the loss to be told.

    What ``ids`` and ``empty`` add is in the state dict too; a checkpoint without it loads as a full queue of unknowns.
    """

    queue: Tensor
    queue_ptr: Tensor
    queue_ids: Tensor | None
    queue_valid: Tensor | None
    queue_written: Tensor | None  # [K] number of the enqueue that wrote each key; -1: none has
    queue_writes: Tensor | None  # [1] enqueues so far

    def __init__(
        self, dim: int, K: int, dtype: torch.dtype = torch.float32, *, ids: bool = False, empty: bool = False
    ) -> None:
        super().__init__()
        K, dim = check_size("K", K), check_size("dim", dim)
        keys = torch.randn(K, dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("queue", nn.functional.normalize(keys, dim=1).to(dtype))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.register_buffer("queue_ids", torch.full((K,), -1) if ids else None)
        self.register_buffer("queue_written", torch.full((K,), -1) if ids else None)
        self.register_buffer("queue_writes", torch.zeros(1, dtype=torch.long) if ids else None)
        self.register_buffer("queue_valid", torch.zeros(1, dtype=torch.long) if empty else None)

    @property
    def K(self) -> int:
        return self.queue.shape[0]

    @property
    def ages(self) -> Tensor:
        """[K] int64: how many enqueues ago each key was written, 0 for the latest; -1 where none has been.

        Raises:
            ValueError: the queue was made without ``ids``.
        """
        if self.queue_written is None or self.queue_writes is None:
            raise ValueError("ages: expected a queue made with ids=True, got one without")
        return torch.where(self.queue_written < 0, -1, self.queue_writes - 1 - self.queue_written)

    @torch.no_grad()
    def enqueue(self, keys: Tensor, ids: Tensor | None = None, *, normalize: bool = True) -> None:
        """Write keys [B, dim] over the oldest ones, and what they are of; see :func:`moco_ext.enqueue_`.

        Args:
            ids: [B] int64, for a queue made with ``ids``; None: not known.
        """
        B = len(keys)
        if ids is not None and self.queue_ids is None:
            raise ValueError("ids: expected none for a queue made without ids, got a tensor")
        if ids is not None and (ids.shape != (B,) or ids.dtype != torch.long):
            raise ValueError(f"ids: expected int64 [{B}], an id a key, got {ids.dtype} {list(ids.shape)}")
        if self.queue_ids is not None and self.queue_written is not None and self.queue_writes is not None:
            first = max(B - self.K, 0)  # earlier keys are overwritten in the same call
            slots = (self.queue_ptr + torch.arange(first, B, device=self.queue.device)) % self.K
            self.queue_ids[slots] = -1 if ids is None else ids[first:]
            self.queue_written[slots] = self.queue_writes
            self.queue_writes += 1
        if self.queue_valid is not None:
            self.queue_valid.add_(B).clamp_(max=self.K)
        enqueue_(self.queue, self.queue_ptr, keys, normalize=normalize)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # A copy, as a transposed view is not contiguous, which safetensors and whatever builds on it refuse to save.
        transposed = destination[prefix + "queue"].t()
        destination[prefix + "queue"] = transposed.clone(memory_format=torch.contiguous_format)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        name = prefix + "queue"
        if name in state_dict and state_dict[name].dim() == 2:
            state_dict[name] = state_dict[name].t().contiguous()  # rows, also for load_state_dict(assign=True)
            full = {"queue_ids": -1, "queue_written": -1, "queue_writes": 0, "queue_valid": self.K}
            for extra, value in full.items():
                if (own := getattr(self, extra)) is not None:
                    state_dict.setdefault(prefix + extra, torch.full_like(own, value))
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_size(name: str, value: Any) -> int:
    """A size as an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return int(value)
