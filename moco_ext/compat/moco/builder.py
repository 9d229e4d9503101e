"""The official implementation's ``moco/builder.py`` on this package's kernels.

``forward`` returns ``(logits, labels)`` like the official model, but the logits are lazy
(:class:`moco_ext.compat.moco.logits.LazyLogits`): their cross-entropy has already been computed by the fused loss,
``topk`` runs tile by tile, and any other operation computes their values first.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ... import distributed
from ...encoders import encode
from ...moco import MoCo as _MoCo
from ...momentum import update_key_encoder_
from ...ops import info_nce
from ...shuffle_bn import shuffle_order, start_shuffle, unshuffle
from .logits import LazyLogits, Scores

__all__ = ["MoCo", "concat_all_gather"]


class MoCo(_MoCo):
    """Drop-in replacement for the official ``moco.builder.MoCo``.

    Arguments, state dict, methods and the order of operations in ``forward`` are the same. Differences:

    - A single process needs no process group, and the batch size need not divide K.
    - ``queue`` is [K, dim] in memory, and [dim, K] in the state dict. DDP does not broadcast it.
    - Shuffling BN sends only images that change rank. The official code gathers all images on every rank.
    - ``forward`` calls ``_momentum_update_key_encoder``, but none of the other methods named with an underscore.

    Args:
        base_encoder: ``base_encoder(num_classes=dim) -> Module``.
        dim, K, m, T, mlp: see :class:`moco_ext.MoCo`.
    """

    def __init__(
        self, base_encoder: Any, dim: int = 128, K: int = 65536, m: float = 0.999, T: float = 0.07, mlp: bool = False
    ) -> None:
        super().__init__(base_encoder, dim, K, m, T, mlp)

    def forward(self, im_q: Tensor, im_k: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Update the key encoder, compute the logits, and enqueue the keys.

        Args:
            im_q, im_k: [N, 3, H, W] two views of the same images.

        Returns:
            Logits [N, 1 + K], divided by T, with the positive first, and labels [N] int64, all 0. Logits that nothing
            has used yet can only be used until the next forward pass.
        """
        n = im_q.shape[0]
        queries = encode(self.encoder_q, im_q)  # [N, dim]
        with torch.no_grad():
            self._momentum_update_key_encoder()
            order = shuffle_order(n, self.shuffle_bn, self.split_bn, self._permutation, None)
            arriving = start_shuffle(im_k, order, self.shuffle_bn)
            keys = distributed.all_gather(encode(self.encoder_k, im_k if arriving is None else arriving()))
            keys = unshuffle(keys, order)  # [world * N, dim]
            own = keys[distributed.rank() * n :][:n]
        leaf = queries.detach().requires_grad_(queries.requires_grad)
        losses = info_nce(leaf, own, self.queue, self.T, reduction="none")
        labels = torch.zeros(n, dtype=torch.long, device=queries.device)
        B = min(len(keys), self.K)
        slots = (self.queue_ptr + len(keys) - B + torch.arange(B, device=self.queue.device)) % self.K
        kept = self.queue[slots]
        self.enqueue(keys)
        self._count_update()
        key = F.normalize(own.to(torch.promote_types(own.dtype, torch.float32)), dim=1)
        scores = Scores(queries, leaf, losses, labels, key, self.queue, slots, kept, self.T)
        return LazyLogits.of(scores), labels

    @torch.no_grad()
    def _momentum_update_key_encoder(self) -> None:
        update_key_encoder_(self.encoder_k, self.encoder_q, self.m)

    @torch.no_grad()
    def _dequeue_and_enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys of the queue with the unit keys [N, dim] of all ranks."""
        self.enqueue(concat_all_gather(keys), normalize=False)
        self._count_update()

    @torch.no_grad()
    def _batch_shuffle_ddp(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shuffle rows [N, ...] across all ranks: this rank's new rows, and the inverse permutation [world * N]."""
        everything = concat_all_gather(x)
        order = torch.randperm(len(everything), device=x.device)
        if distributed.world_size() > 1:
            dist.broadcast(order, src=0)
        undo = torch.argsort(order)
        return everything[order.view(distributed.world_size(), -1)[distributed.rank()]], undo

    @torch.no_grad()
    def _batch_unshuffle_ddp(self, x: Tensor, idx_unshuffle: Tensor) -> Tensor:
        return concat_all_gather(x)[idx_unshuffle.view(distributed.world_size(), -1)[distributed.rank()]]


def concat_all_gather(tensor: Tensor) -> Tensor:
    """The rows of all ranks, [world * N, ...], without gradient. With one process, the tensor itself."""
    return distributed.all_gather(tensor)
