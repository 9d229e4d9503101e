"""solo-learn's MoCo v2+ loss, queue and momentum updater, on this package's kernels.

Replaces what ``solo/methods/mocov2plus.py`` imports from ``solo.losses`` and ``solo.utils.momentum``. A queue made by
:func:`init_queue` has solo-learn's shape [2, C, K] and the memory layout of the kernels; any other works, too, but is
transposed at each call.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..momentum import update_key_encoder_
from ..ops import enqueue_, info_nce

__all__ = [
    "MomentumUpdater",
    "dequeue_and_enqueue_",
    "init_queue",
    "initialize_momentum_params",
    "mocov2plus_loss_func",
]


def mocov2plus_loss_func(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE loss, 0-dim, of features that the trainer has normalized; see :func:`moco_ext.info_nce`.

    Args:
        query, key: [N, C], with gradient to those that require it.
        queue: [C, K] negatives, without gradient. It is not copied if ``queue.t()`` is contiguous.
        temperature: positive.
    """
    key = key.to(query.dtype)
    return info_nce(query, key, queue.detach().t().contiguous(), temperature, normalize=False)


def init_queue(proj_output_dim: int, queue_size: int, queues: int = 2) -> Tensor:
    """Queues of random unit keys, [queues, C, K] float32, with contiguous columns.

    Register the result as a buffer. ``.to()``, ``clone()`` and loading a checkpoint keep its layout. safetensors saves
    contiguous tensors only: pass it ``queue.contiguous()``.
    """
    keys = F.normalize(torch.randn(queues, queue_size, proj_output_dim), dim=2)
    return keys.transpose(1, 2)


@torch.no_grad()
def dequeue_and_enqueue_(queue: Tensor, queue_ptr: Tensor, keys: Tensor) -> None:
    """Replace the oldest columns of each queue, in place, and advance their common pointer.

    Args:
        queue: [Q, C, K], of any layout; that of :func:`init_queue` is written to without a copy.
        queue_ptr: [1] int64.
        keys: [Q, B, C]. B need not divide K: the write wraps around.

    Raises:
        ValueError: keys of another shape; nothing is written.
    """
    if keys.dim() != 3 or len(keys) != len(queue) or keys.shape[2] != queue.shape[1]:
        raise ValueError(f"keys: expected [{len(queue)}, B, {queue.shape[1]}], got {list(keys.shape)}")
    pointer = queue_ptr.clone()
    for columns, batch in zip(queue, keys, strict=True):
        queue_ptr.copy_(pointer)
        rows = columns.t() if columns.t().is_contiguous() else columns.t().contiguous()
        enqueue_(rows, queue_ptr, batch)
        if rows.data_ptr() != columns.data_ptr():
            columns.copy_(rows.t())


@torch.no_grad()
def initialize_momentum_params(online_net: nn.Module, momentum_net: nn.Module) -> None:
    """Copy the online parameters into the momentum network, and freeze it."""
    update_key_encoder_(momentum_net, online_net, 0.0)
    momentum_net.requires_grad_(False)


class MomentumUpdater:
    """``momentum = tau·momentum + (1 - tau)·online``, with a cosine schedule of tau.

    Args:
        base_tau, final_tau: the first and the last tau, 0 <= base_tau <= final_tau <= 1.

    Attributes:
        cur_tau: tau of the next update.

    Raises:
        ValueError: base_tau or final_tau out of range.
    """

    def __init__(self, base_tau: float = 0.996, final_tau: float = 1.0) -> None:
        if not 0 <= base_tau <= final_tau <= 1:
            raise ValueError(
                f"base_tau, final_tau: expected 0 <= base_tau <= final_tau <= 1, got {base_tau}, {final_tau}"
            )
        self.base_tau = self.cur_tau = base_tau
        self.final_tau = final_tau

    def update(self, online_net: nn.Module, momentum_net: nn.Module) -> None:
        """Update the momentum network, after the optimizer's step, in one launch.

        The first call flattens both networks (:func:`moco_ext.flatten_parameters_`). To leave their parameters where
        they are, call ``moco_ext.momentum_update_`` with two lists of parameters instead.

        Raises:
            ValueError: the networks have different parameters (solo-learn silently stops at the shorter list).
        """
        update_key_encoder_(momentum_net, online_net, self.cur_tau)

    def update_tau(self, cur_step: int, max_steps: int) -> None:
        """Set ``cur_tau`` to its value at step ``cur_step`` of ``max_steps``."""
        remaining = (math.cos(math.pi * cur_step / max_steps) + 1) / 2
        self.cur_tau = self.final_tau - (self.final_tau - self.base_tau) * remaining
