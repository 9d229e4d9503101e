"""solo-learn's contrastive losses, MoCo v2+ queue and momentum updater, on this package's kernels.

Replaces what ``solo/methods/mocov2plus.py``, ``mocov3.py``, ``nnclr.py`` and ``ressl.py`` import from ``solo.losses``
and ``solo.utils.momentum``. In solo-learn, the queues of MoCo v2+ are [2, C, K], those of ReSSL and of the methods with
nearest neighbors [K, C]. A queue made by :func:`init_queue` has the shape of the former and the memory layout of the
kernels; any other works, too, but is transposed at each call.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..distributed import all_gather, all_gather_with_grad, rank
from ..momentum import check_same_structure, update_key_encoder_
from ..ops import enqueue_, expected_key, info_nce, nearest_keys
from .moco_v3 import check_pairs

__all__ = [
    "MomentumUpdater",
    "dequeue_and_enqueue_",
    "find_nn",
    "init_queue",
    "initialize_momentum_params",
    "mocov2plus_loss_func",
    "mocov3_loss_func",
    "nnclr_loss_func",
    "ressl_loss_func",
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


def mocov3_loss_func(query: Tensor, key: Tensor, temperature: float = 0.2) -> Tensor:
    """``2 * temperature`` times the InfoNCE loss, 0-dim, of queries and the keys of all ranks (MoCo v3).

    Args:
        query: [N, C] of any norm.
        key: [N, C] of any norm, of the same N on all ranks; row n is the positive of query n, all others are its
            negatives. As in solo-learn, a key that requires a gradient gets it only without a process group.
        temperature: positive.

    Raises:
        ValueError, TypeError: an argument of another type, shape, dtype or value; the message names it.
    """
    check_pairs(query=query, key=key)
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    keys = all_gather(key) if grouped else key
    loss = info_nce(query, keys, None, temperature, in_batch=True, key_offset=rank() * len(query))
    return loss * (2 * temperature)


def nnclr_loss_func(nn: Tensor, p: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE loss, 0-dim, of nearest neighbors and the predictions of all ranks (NNCLR, arXiv 2104.14548, Eq. 3).

    Args:
        nn: [N, C] nearest neighbors of one view, of any norm; see :func:`find_nn`.
        p: [N, C] predictions of the other view, of any norm, of the same N on all ranks. Row n is the positive of row n
            of ``nn``, all others are its negatives. Gradients reach the predictions of all ranks.
        temperature: positive.

    Raises:
        ValueError, TypeError: an argument of another type, shape, dtype or value; the message names it.
    """
    check_pairs(nn=nn, p=p)
    return info_nce(nn, all_gather_with_grad(p), None, temperature, in_batch=True, key_offset=rank() * len(nn))


@torch.no_grad()
def find_nn(z: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest neighbor of each row in the queue: the methods of this name, but for All4One's, as a function.

    Args:
        z: [N, C].
        queue: [K, C] unit rows.

    Returns:
        The rows' numbers in the queue, [N] int64, and the rows, [N, C] of the queue's dtype.

    Raises:
        ValueError, TypeError: z or queue of another type, shape or dtype; the message names it.
    """
    index = nearest_keys(z, queue.contiguous(), normalize=False).index[:, 0]
    return index, queue[index]


def ressl_loss_func(
    q: Tensor, k: Tensor, queue: Tensor, temperature_q: float = 0.1, temperature_k: float = 0.04
) -> Tensor:
    """Cross-entropy, 0-dim, of the softmax of ``q`` over the queue with that of ``k`` (ReSSL, arXiv 2107.09282, Eq. 4).

    Args:
        q: [N, C] student's features, taken as they are, with gradient.
        k: [N, C] teacher's features, taken as they are, without gradient.
        queue: [K, C] keys, without gradient.
        temperature_q, temperature_k: of either softmax, positive.

    Raises:
        ValueError, TypeError: an argument of another type, shape, dtype or value; the message names it.
    """
    check_pairs(q=q, k=k)
    for name, temperature in (("temperature_q", temperature_q), ("temperature_k", temperature_k)):
        if not temperature > 0:
            raise ValueError(f"{name}: expected a positive number, got {temperature}")
    queue = queue.contiguous()
    labels = expected_key(k, None, queue, temperature_k, normalize=False).keys
    return info_nce(q, None, queue, temperature_q, normalize=False, target=labels)


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
    """Copy the online parameters into the momentum network, and freeze it.

    Raises:
        ValueError: the networks have different parameters; nothing is copied.
    """
    check_same_structure(momentum_net, online_net)
    for momentum, online in zip(momentum_net.parameters(), online_net.parameters(), strict=True):
        momentum.copy_(online)  # an update with tau = 0 would keep NaN, which 0 times NaN is
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
