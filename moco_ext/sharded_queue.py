"""InfoNCE against a queue that is divided among the processes: each has K / world of its rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import distributed
from .ops import expected_candidates, l2_normalize
from .ops.info_nce_operator import NotTwice
from .stats import InfoNCEStats


def sharded_info_nce(
    query: Tensor,
    keys: Tensor,
    shard: Tensor,
    T: float,
    *,
    num_valid: int | Tensor | None = None,
    query_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
) -> tuple[Tensor, InfoNCEStats]:
    """:func:`moco_ext.info_nce` of this rank's queries against the shards of all ranks, which all must call it.

    The queries go to the keys: each rank computes, for the queries of all ranks, the logsumexp over its shard, the mean
    of its rows under their softmax, and how many of them score above the positive. Each rank then combines the results
    for its own queries in the order of the ranks. A step sends and receives :func:`exchanged_bytes`.

    Args:
        query: [N, C], the same N on all ranks. Gets the gradient.
        keys: [world * N, C] the positives of all ranks' queries, equal on all ranks.
        shard: [K / world, C] the unit rows of this rank.
        T: temperature.
        num_valid: how many rows of the shard to use, as in :func:`moco_ext.info_nce`.
        query_ids: [world * N] ids of all queries. Rows with the query's id are ignored.
        queue_ids: [K / world] ids of the shard's rows.

    Returns:
        The mean loss, 0-dim, and the stats of this rank's queries [N], over the whole queue.
    """
    n, c = query.shape
    world, first = distributed.world_size(), distributed.rank() * n
    part = expected_candidates(
        distributed.all_gather(query),
        keys,
        shard,
        T,
        own_key="decoupled",  # known, but not a candidate: it must count once, not once a shard
        num_valid=num_valid,
        query_ids=query_ids,
        queue_ids=queue_ids,
    )
    # One exchange: the rank is an integer of the same width.
    number = torch.int64 if part.lse.dtype == torch.float64 else torch.int32
    columns = (part.keys, part.lse[:, None], part.rank.to(number).view(part.lse.dtype)[:, None])
    counts = [n] * world
    received = distributed.start_exchange(torch.cat(columns, dim=1), counts, counts)().view(world, n, c + 2)
    expected, lses, ranks = received.split([c, 1, 1], dim=2)  # [world, N, ...]
    rank = ranks.contiguous().view(number).to(torch.int64).sum((0, 2))

    unit = l2_normalize(query.to(part.lse.dtype))
    key = l2_normalize(keys[first:][:n].to(part.lse.dtype))
    positive = (unit.detach() * key).sum(1) / T
    lse = torch.cat([positive[None], lses[:, :, 0]]).logsumexp(0)
    weights = (lses - lse[:, None]).exp()  # [world, N, 1]
    candidates = torch.where(weights == 0, 0, weights * expected).sum(0)  # NaN of a shard without candidates
    gradient = (candidates + ((positive - lse).exp() - 1)[:, None] * key) / T
    losses = lse - positive
    loss = _WithGradient.apply(unit, losses, gradient).mean()
    return loss, InfoNCEStats(losses, lse, positive, rank)


def exchanged_bytes(world: int, n: int, c: int) -> int:
    """What a rank receives, and sends, in a step of N float32 queries per rank."""
    return 4 * (world - 1) * n * (c + c + 2)


class _WithGradient(torch.autograd.Function):
    """losses [N], whose gradient with respect to x [N, C] is known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, losses: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(x, gradient)
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, gradient = ctx.saved_tensors
        scaled = grad[:, None] * gradient
        return (NotTwice.apply(scaled, x) if torch.is_grad_enabled() else scaled), None, None
