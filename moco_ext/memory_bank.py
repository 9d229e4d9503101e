"""The memory bank: a feature of every image of the data set (arXiv 1911.05722, Fig. 2b; arXiv 1805.01978)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from . import distributed, encoders
from .encoders import encode
from .mechanism import Mechanism, check_momentum, check_temperature
from .ops import info_nce, l2_normalize
from .queue import check_size, first_keys
from .shuffle_bn import convert_split_bn
from .stats import InfoNCEStats


class MemoryBankOutput(NamedTuple):
    """Output of a forward pass; pass ``keys`` and ``images`` to ``update``.

    Attributes:
        loss: 0-dim: the mean InfoNCE loss of the batch.
        keys: [world * N, dim] features of the images of all ranks, in order, without gradient and not normalized.
        images: [world * N] int64 positions of these images in the data set.
        stats: statistics of this rank's queries [N].
    """

    loss: Tensor
    keys: Tensor
    images: Tensor
    stats: InfoNCEStats


class MemoryBank(Mechanism):
    """One encoder and a stored feature for each image: an image's own is the positive, K random ones the negatives.

    The dictionary is large but inconsistent: each feature comes from the encoder at the time its image was last seen.
    As in the paper's comparison, momentum is applied to the features, not to the encoder::

        out = model(im_q, index)
        out.loss.backward()
        optimizer.step()
        model.update(out.keys, out.images)      # bank[i] = normalize(m * bank[i] + (1 - m) * feature)

    Args:
        base_encoder, dim, T, mlp, split_bn: see :class:`moco_ext.MoCo`.
        images: number of images in the data set; the bank takes images * dim * 4 bytes (in float32).
        K: number of negatives per step, drawn uniformly with replacement, the same for all queries of a rank.
        m: momentum of the features, in [0, 1].
        bank_dtype: dtype of the stored features.

    Raises:
        ValueError: an argument out of its range, or an encoder of the wrong shape; the message names it.
    """

    bank: Tensor
    # Equal on all ranks by construction, as MoCo's queue.
    _ddp_params_and_buffers_to_ignore = ("bank",)

    def __init__(
        self,
        base_encoder: str | Callable[..., nn.Module],
        images: int,
        dim: int = 128,
        K: int = 65536,
        m: float = 0.5,
        T: float = 0.07,
        mlp: bool = False,
        *,
        split_bn: int = 1,
        bank_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_size("images", images)
        self.K = check_size("K", K)
        self.m = check_momentum(m)
        self.T = check_temperature(T)
        self.encoder_q = convert_split_bn(encoders.build(base_encoder, dim, mlp), split_bn)
        self.register_buffer("bank", first_keys(images, dim, bank_dtype, 0, images))

    def forward(self, im_q: Tensor, index: Tensor) -> MemoryBankOutput:
        """Loss of a batch of views, one of each image.

        Args:
            im_q: [N, 3, H, W], or sets of patches [N, P, 3, h, w].
            index: [N] int64, which images of the data set they are.

        Raises:
            ValueError: views that are not floating-point, or an index of another shape or dtype; on the CPU, of images
                that there are not.
        """
        if index.shape != im_q.shape[:1]:
            raise ValueError(f"index: expected [{im_q.shape[0]}], an image number a row, got {list(index.shape)}")
        self._check_index(index)
        self._check_images(im_q, im_q)
        self._warn_if_update_is_forgotten()
        queries = encode(self.encoder_q, im_q)
        gathering = distributed.start_all_gather(queries)
        index = index.to(self.bank.device, non_blocking=True)
        drawn = torch.randint(len(self.bank), (self.K,), device=self.bank.device)
        self._watch(queries)
        loss, stats = info_nce(queries, self.bank[index].to(queries.dtype), self.bank[drawn], self.T, return_stats=True)
        return MemoryBankOutput(loss, gathering(), distributed.all_gather(index), stats)

    if TYPE_CHECKING:

        def __call__(self, im_q: Tensor, index: Tensor) -> MemoryBankOutput: ...

    def forward_batch(
        self, im_q: Tensor, im_k: Tensor, *, index: Tensor, key_order: Tensor | None = None
    ) -> tuple[Tensor, InfoNCEStats, tuple[Tensor, ...]]:
        out = self(im_q, index)
        return out.loss, out.stats, (out.keys, out.images)

    @torch.no_grad()
    def update(self, keys: Tensor, index: Tensor) -> None:  # type: ignore[override]
        """After the optimizer step: update the stored features of the batch.

        Args:
            keys: [B, dim] ``MemoryBankOutput.keys``, equal on all ranks.
            index: [B] int64 ``MemoryBankOutput.images``; each image once.

        Raises:
            ValueError: keys or index of another shape or dtype; on the CPU, an index of images that there are not.
                Nothing is changed.
        """
        self._check_keys(keys)
        if keys.dim() != 2 or keys.shape[1] != self.bank.shape[1] or index.shape != keys.shape[:1]:
            expected = f"keys [B, {self.bank.shape[1]}] and index [B]"
            raise ValueError(f"keys: expected {expected}, got {list(keys.shape)} and {list(index.shape)}")
        self._check_index(index)
        # Mixed and scaled in float32; rounded once, to the bank's dtype.
        mixed = torch.lerp(l2_normalize(keys.float()), self.bank[index].float(), self.m)
        self.bank[index] = l2_normalize(mixed).to(self.bank.dtype)
        self._count_update()

    def _check_index(self, index: Tensor) -> None:
        if index.dtype != torch.long:  # uint8 would be a mask
            raise ValueError(f"index: expected int64, got {index.dtype}")
        if index.device.type != "cpu" or torch.compiler.is_compiling():  # the values are not known
            return
        outside = index[(index < 0) | (index >= len(self.bank))]
        if len(outside):  # -1 would be the last image
            raise ValueError(f"index: expected images 0 to {len(self.bank) - 1}, got {int(outside[0])}")
