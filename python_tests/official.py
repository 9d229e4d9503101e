"""A rewrite of MoCo's published training step, to compare values and speed with.

The queue is [C, K], as in published checkpoints.
"""

import copy
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.07) -> Tensor:
    """Mean loss of raw query [N, C] and key [N, C] against a queue [C, K] of unit columns."""
    return F.cross_entropy(*logits(F.normalize(query, dim=1), F.normalize(key, dim=1), queue, temperature))


def logits(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits [N, 1 + K] of unit rows, the positive first, and labels [N], all 0."""
    positive = torch.einsum("nc,nc->n", query, key)[:, None]  # [N, 1]
    negative = torch.einsum("nc,ck->nk", query, queue.clone().detach())  # [N, K]
    logits = torch.cat((positive, negative), dim=1) / temperature
    return logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device)


@torch.no_grad()
def enqueue(queue: Tensor, queue_ptr: Tensor, keys: Tensor) -> None:
    """Write keys [B, C] to columns of the queue [C, K]; B must divide K. Reads the pointer on the host."""
    start, batch, size = int(queue_ptr), len(keys), queue.shape[1]
    assert size % batch == 0
    queue[:, start : start + batch] = keys.T
    queue_ptr[0] = (start + batch) % size


@torch.no_grad()
def momentum_update(key_params: list[Tensor], query_params: list[Tensor], m: float) -> None:
    """k = m k + (1 - m) q, one parameter at a time, into new memory."""
    for key, query in zip(key_params, query_params, strict=True):
        key.data = key.data * m + query.data * (1.0 - m)


class MoCo(nn.Module):
    """The published model: forward updates the key encoder first, returns logits, and enqueues last.

    In a process group it gathers all images and keys, and shuffles with a permutation that rank 0 broadcasts. With one
    process it does not shuffle; the published model raises an error.
    """

    queue: Tensor
    queue_ptr: Tensor

    def __init__(
        self, base_encoder: Callable[..., nn.Module], dim: int = 128, K: int = 65536, m: float = 0.999, T: float = 0.07
    ) -> None:
        super().__init__()
        self.m, self.T = m, T
        self.encoder_q = base_encoder(num_classes=dim)
        self.encoder_k = copy.deepcopy(self.encoder_q)
        for parameter in self.encoder_k.parameters():
            parameter.requires_grad = False
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, im_q: Tensor, im_k: Tensor, key_order: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [N, 1 + K], already divided by T, and labels [N], all 0, of this rank's images.

        `key_order` [world * N] is the permutation to broadcast; by default, rank 0 draws one.
        """
        q = F.normalize(self.encoder_q(im_q), dim=1)
        with torch.no_grad():
            self.momentum_update()
            k = self.encode_keys(im_k, key_order)
        output = logits(q, k, self.queue, self.T)
        self.enqueue(k)
        return output

    def momentum_update(self) -> None:
        momentum_update(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), self.m)

    def encode_keys(self, im_k: Tensor, key_order: Tensor | None) -> Tensor:
        """Unit keys [N, dim] of this rank's images, encoded by the ranks that the permutation assigns."""
        if not dist.is_initialized():
            return F.normalize(self.encoder_k(im_k), dim=1)
        n, rank = len(im_k), dist.get_rank()
        images = gather(im_k)
        order = torch.randperm(len(images)) if key_order is None else key_order.clone()
        order = order.to(im_k.device)
        dist.broadcast(order, src=0)
        k = F.normalize(self.encoder_k(images[order[rank * n : (rank + 1) * n]]), dim=1)
        return gather(k)[torch.argsort(order)[rank * n : (rank + 1) * n]]

    def enqueue(self, k: Tensor) -> None:
        enqueue(self.queue, self.queue_ptr, gather(k) if dist.is_initialized() else k)


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """All ranks' rows, in the order of the ranks: [N, ...] -> [world * N, ...]."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
