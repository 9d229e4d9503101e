"""The official implementation's ``moco/builder.py``: its model and its gather, on this package's kernels.

``forward`` gives ``(logits, labels)``, where the logits are a :class:`moco_ext.compat.moco.logits.LazyLogits`:
``nn.CrossEntropyLoss`` on them is the loss that forward has already computed, ``topk`` never holds all of them, and any
other use gives the values the official code would have had.
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
    """The official ``moco.builder.MoCo``: same arguments, state dict, methods, and order of events in ``forward``.

    What differs: one process needs no process group; K need not be a multiple of the batch; ``queue`` is [K, dim] in
    memory (its columns are rows) and [dim, K] in the state dict; DDP does not broadcast it; and images are shuffled by
    a permutation that all ranks draw alike, each sent once, where the official code gathers them all.
    Of the methods named with an underscore, ``forward`` calls the momentum update alone.

    Args:
        base_encoder: ``base_encoder(num_classes=dim) -> Module``.
        dim, K, m, T, mlp: see :class:`moco_ext.MoCo`.
    """

    def __init__(
        self, base_encoder: Any, dim: int = 128, K: int = 65536, m: float = 0.999, T: float = 0.07, mlp: bool = False
    ) -> None:
        super().__init__(base_encoder, dim, K, m, T, mlp)

    def forward(self, im_q: Tensor, im_k: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Move the key encoder, encode, enqueue the keys.

        Args:
            im_q, im_k: [N, 3, H, W] the two views.

        Returns:
            Logits [N, 1 + K], divided by T, the positive first, and labels [N] int64, all 0. The logits can be used
            until the next forward pass.
        """
        n = im_q.shape[0]
        queries = encode(self.encoder_q, im_q)  # [N, dim]
        with torch.no_grad():
            self._momentum_update_key_encoder()
            order = shuffle_order(n, self.shuffle_bn, self.split_bn, self._steps, None)
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
        self._steps += 1
        key = F.normalize(own.to(torch.promote_types(own.dtype, torch.float32)), dim=1)
        scores = Scores(queries, leaf, losses, labels, key, self.queue, slots, kept, self.T)
        return LazyLogits.of(scores), labels

    @torch.no_grad()
    def _momentum_update_key_encoder(self) -> None:
        update_key_encoder_(self.encoder_k, self.encoder_q, self.m)

    @torch.no_grad()
    def _dequeue_and_enqueue(self, keys: Tensor) -> None:
        """Write the unit keys [N, dim] of all ranks over the oldest ones."""
        self.enqueue(concat_all_gather(keys), normalize=False)
        self._steps += 1

    @torch.no_grad()
    def _batch_shuffle_ddp(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's share [N, ...] of all ranks' rows in random order, and the order [world * N] that undoes it."""
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
    """All ranks' rows [world * N, ...], in order, without gradient; with one process the tensor itself."""
    return distributed.all_gather(tensor)
