"""The image-text contrastive loss of ALBEF, BLIP and LAVIS, with their queues and momentum distillation.

Their models define it among their own layers. Here it is a base class of such a model instead of ``nn.Module``, with
the same buffers in the state dict. See docs/peers/text_and_multimodal.md for the lines to change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..distributed import all_gather
from ..ops import enqueue_, expected_key, info_nce
from ..ops.checks import check_devices

__all__ = ["ImageTextContrast"]


class ImageTextContrast(nn.Module):
    """Base class of a model with a queue of momentum features for images and another for texts.

    In memory the queues are rows, ``image_queue`` and ``text_queue`` [K, C]; in the state dict they are columns [C, K],
    so checkpoints load both ways. Call :meth:`make_queues` in the constructor.
    """

    image_queue: Tensor
    text_queue: Tensor
    idx_queue: Tensor | None  # [1, K] int64; -100: unknown
    _pointer = "queue_ptr"

    def make_queues(self, embed_dim: int, queue_size: int, ids: bool = False, pointer: str = "queue_ptr") -> None:
        """Register the queues, filled with random unit keys.

        Args:
            embed_dim, queue_size: C and K.
            ids: also keep the ``idx`` of each pair.
            pointer: name of the pointer's buffer [1]; BLIP's retrieval model calls it ``"ptr_queue"``.
        """
        for name in ("image_queue", "text_queue"):
            self.register_buffer(name, F.normalize(torch.randn(queue_size, embed_dim), dim=1))
        self.register_buffer("idx_queue", torch.full((1, queue_size), -100) if ids else None)
        self._pointer = pointer
        self.register_buffer(pointer, torch.zeros(1, dtype=torch.long))

    def contrastive_loss(
        self,
        image_feat: Tensor,
        text_feat: Tensor,
        image_feat_m: Tensor,
        text_feat_m: Tensor,
        temp: float | Tensor,
        alpha: float = 0.0,
        idx: Tensor | None = None,
    ) -> Tensor:
        """``loss_ita``, the mean of both directions, 0-dim.

        The candidates are the momentum features of the batch and of the queue. The target is ``1 - alpha`` times the
        pair's own, or, with ``idx``, uniform over the candidates of its idx, plus ``alpha`` times the softmax of the
        momentum models. The similarities are not stored.

        Args:
            image_feat, text_feat: [N, C], normalized by the model.
            image_feat_m, text_feat_m: [N, C] of the momentum models.
            temp: the temperature, which may require a gradient.
            alpha: weight of the distillation, in [0, 1]; 0 saves its pass.
            idx: [N] or [N, 1] integers that identify images. Needs queues made with ``ids``.

        Raises:
            ValueError: alpha out of range, idx without ids of the queue, or as :func:`moco_ext.info_nce`.
        """
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
        if idx is not None and self.idx_queue is None:
            raise ValueError("idx: expected none for queues made without ids, got a tensor")
        losses = [
            self._direction(query, query_m, key_m, queue, temp, alpha, idx)
            for query, query_m, key_m, queue in (
                (image_feat, image_feat_m, text_feat_m, self.text_queue),
                (text_feat, text_feat_m, image_feat_m, self.image_queue),
            )
        ]
        return torch.stack(losses).mean()

    def _direction(
        self,
        query: Tensor,
        query_m: Tensor,
        key_m: Tensor,
        queue: Tensor,
        temp: float | Tensor,
        alpha: float,
        idx: Tensor | None,
    ) -> Tensor:
        options: dict[str, Any] = {"normalize": False, "in_batch": True}
        key_m = key_m.detach()
        ids: dict[str, Any] = {}
        if idx is not None and self.idx_queue is not None:
            ids = {"query_ids": idx.view(-1), "queue_ids": self.idx_queue.view(-1), "same_id": "positive"}
        if alpha == 0:
            return info_nce(query, key_m, queue, temp, **options, **ids)
        fixed = temp.detach() if isinstance(temp, Tensor) else temp
        soft = expected_key(query_m.detach(), key_m, queue, fixed, **options).keys
        if not ids:  # cross-entropy is linear in the target
            return info_nce(query, key_m, queue, temp, target=torch.lerp(key_m.to(soft), soft, alpha), **options)
        hard_loss = info_nce(query, key_m, queue, temp, **options, **ids)
        return torch.lerp(hard_loss, info_nce(query, key_m, queue, temp, target=soft, **options), alpha)

    @torch.no_grad()
    def _dequeue_and_enqueue(self, image_feat: Tensor, text_feat: Tensor, idx: Tensor | None = None) -> None:
        """Replace the oldest pairs by those of all ranks, [N, C] each, and advance the pointer. N need not divide K.

        Raises:
            ValueError: features or idx of another shape, dtype or device, or idx without ids of the queue; nothing is
                written.
        """
        pointer = getattr(self, self._pointer)
        start, (size, dim) = pointer.clone(), self.image_queue.shape
        batches = (("image_feat", self.image_queue, image_feat), ("text_feat", self.text_queue, text_feat))
        for name, queue, features in batches:  # before anything is written
            if features.shape != (len(image_feat), dim):
                raise ValueError(f"{name}: expected [{len(image_feat)}, {dim}], got {list(features.shape)}")
            wide = torch.float64 in (queue.dtype, features.dtype)
            if not features.is_floating_point() or (wide and queue.dtype != features.dtype):
                raise ValueError(f"{name}: expected features for a queue of {queue.dtype}, got {features.dtype}")
            check_devices(**{"queue": queue, name: features})
        if idx is not None and (self.idx_queue is None or idx.numel() != len(image_feat)):
            expected = "none" if self.idx_queue is None else f"{len(image_feat)} integers"
            raise ValueError(f"idx: expected {expected}, got shape {list(idx.shape)}")
        if idx is not None:
            check_devices(image_queue=self.image_queue, idx=idx)
        for _, queue, features in batches:
            pointer.copy_(start)
            enqueue_(queue, pointer, all_gather(features))
        if self.idx_queue is None:
            return
        numbers = all_gather(torch.full((len(image_feat),), -100, device=start.device) if idx is None else idx.view(-1))
        first = max(len(numbers) - size, 0)
        slots = (start + torch.arange(first, len(numbers), device=start.device)) % size
        self.idx_queue[0, slots] = numbers[first:].to(self.idx_queue.dtype)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in (prefix + "image_queue", prefix + "text_queue"):
            destination[name] = destination[name].t().clone(memory_format=torch.contiguous_format)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in (prefix + "image_queue", prefix + "text_queue"):
            if name in state_dict and state_dict[name].dim() == 2:
                state_dict[name] = state_dict[name].t().contiguous()
        super()._load_from_state_dict(state_dict, prefix, *args)
