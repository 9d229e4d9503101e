"""The dictionary: a circular queue of keys."""

from __future__ import annotations

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
    """

    queue: Tensor
    queue_ptr: Tensor

    def __init__(self, dim: int, K: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if K < 1 or dim < 1:
            raise ValueError(f"K, dim: expected at least 1 each, got K={K}, dim={dim}")
        keys = torch.randn(K, dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("queue", nn.functional.normalize(keys, dim=1).to(dtype))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @property
    def K(self) -> int:
        return self.queue.shape[0]

    def enqueue(self, keys: Tensor, *, normalize: bool = True) -> None:
        """Write keys [B, dim] over the oldest ones; see :func:`moco_ext.enqueue_`."""
        enqueue_(self.queue, self.queue_ptr, keys, normalize=normalize)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "queue"] = destination[prefix + "queue"].t()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        name = prefix + "queue"
        if name in state_dict and state_dict[name].dim() == 2:
            state_dict[name] = state_dict[name].t()
        super()._load_from_state_dict(state_dict, prefix, *args)
