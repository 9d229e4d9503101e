"""solo-learn's MoCo v2+ loss, its queue, and its momentum updater, on this package's kernels.

Replaces what ``solo/methods/mocov2plus.py`` takes from ``solo.losses`` and ``solo.utils.momentum``. A queue made by
:func:`init_queue` has solo-learn's shape [2, C, K] and the memory that the kernels read; one made otherwise works too,
at the price of a transposed copy a call.
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
    """InfoNCE of features taken as they are (the trainer normalises them), 0-dim; see :func:`moco_ext.info_nce`.

    Args:
        query, key: [N, C]; gradient flows to whichever requires one.
        queue: [C, K] negatives, without gradient. If its columns are contiguous (``queue.t()`` is), nothing is copied.
        temperature: positive.
    """
    key = key.to(query.dtype)
    return info_nce(query, key, queue.detach().t().contiguous(), temperature, normalize=False)


def init_queue(proj_output_dim: int, queue_size: int, queues: int = 2) -> Tensor:
    """Queues of random unit keys, [queues, C, K] float32, each column of which is contiguous in memory.

    To be registered as a buffer; ``.to()``, ``clone()`` and loading a checkpoint keep the layout.
    """
    keys = F.normalize(torch.randn(queues, queue_size, proj_output_dim), dim=2)
    return keys.transpose(1, 2)


@torch.no_grad()
def dequeue_and_enqueue_(queue: Tensor, queue_ptr: Tensor, keys: Tensor) -> None:
    """Write keys over the oldest columns of each queue, in place, and advance the pointer that they share.

    Args:
        queue: [Q, C, K]; of any layout, though only that of :func:`init_queue` is written by the kernel.
        queue_ptr: [1] int64. Any B goes: the write wraps around.
        keys: [Q, B, C].
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
    """Copy the online parameters into the momentum network, which takes no gradient from then on."""
    update_key_encoder_(momentum_net, online_net, 0.0)
    momentum_net.requires_grad_(False)


class MomentumUpdater:
    """``momentum = tau·momentum + (1 - tau)·online``, tau going from ``base_tau`` to ``final_tau`` along a cosine.

    Args:
        base_tau, final_tau: 0 <= base_tau <= final_tau <= 1.

    Attributes:
        cur_tau: the tau of the next update.
    """

    def __init__(self, base_tau: float = 0.996, final_tau: float = 1.0) -> None:
        if not 0 <= base_tau <= final_tau <= 1:
            raise ValueError(
                f"base_tau, final_tau: expected 0 <= base_tau <= final_tau <= 1, got {base_tau}, {final_tau}"
            )
        self.base_tau = self.cur_tau = base_tau
        self.final_tau = final_tau

    def update(self, online_net: nn.Module, momentum_net: nn.Module) -> None:
        """After the optimizer's step; one launch over all parameters.

        Raises:
            ValueError: networks of different parameters (solo-learn stops at the shorter list, in silence).
        """
        update_key_encoder_(momentum_net, online_net, self.cur_tau)

    def update_tau(self, cur_step: int, max_steps: int) -> None:
        """Set ``cur_tau`` for step ``cur_step`` of ``max_steps``."""
        remaining = (math.cos(math.pi * cur_step / max_steps) + 1) / 2
        self.cur_tau = self.final_tau - (self.final_tau - self.base_tau) * remaining
