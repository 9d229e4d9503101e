"""MoCo's training step the way its authors published it, rewritten: the formulation users have today.

Tests compare values with it, benches compare speed. The queue lies [C, K] here, as in published checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.07) -> Tensor:
    """Mean loss of raw query [N, C] and key [N, C] against a queue [C, K] of unit columns."""
    query = F.normalize(query, dim=1)
    key = F.normalize(key, dim=1)
    positive = torch.einsum("nc,nc->n", query, key)[:, None]  # [N, 1]
    negative = torch.einsum("nc,ck->nk", query, queue.clone().detach())  # [N, K]
    logits = torch.cat((positive, negative), dim=1) / temperature
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, labels)


@torch.no_grad()
def enqueue(queue: Tensor, queue_ptr: Tensor, keys: Tensor) -> None:
    """Write keys [B, C] over columns of the queue [C, K]; B must divide K. Reads the pointer on the host."""
    start, batch, size = int(queue_ptr), len(keys), queue.shape[1]
    assert size % batch == 0
    queue[:, start : start + batch] = keys.T
    queue_ptr[0] = (start + batch) % size


@torch.no_grad()
def momentum_update(key_params: list[Tensor], query_params: list[Tensor], m: float) -> None:
    """k = m k + (1 - m) q, one parameter at a time, each into memory of its own."""
    for key, query in zip(key_params, query_params, strict=True):
        key.data = key.data * m + query.data * (1.0 - m)
