"""The MoCo v3 model (arXiv 2104.02057, Algorithm 1): a predictor, a momentum encoder, and the batch as dictionary."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import distributed, encoders
from .distributed import all_gather
from .encoders import encode
from .mechanism import Mechanism, check_momentum, check_temperature
from .moco import MoCoOutput
from .momentum import LowPrecisionWeights, update_key_encoder_
from .ops import info_nce
from .queue import check_size
from .stats import InfoNCEStats


class MoCoV3(Mechanism):
    """Momentum Contrast without a queue (MoCo v3): the keys of all ranks are the dictionary.

    Both views of an image are encoded once by the query encoder, whose output passes through a predictor, and once by
    the momentum encoder: ``loss = 2 T · (InfoNCE(q1, k2) + InfoNCE(q2, k1))``. Train it like :class:`moco_ext.MoCo`,
    with ``update`` after each optimizer step. BatchNorm is not shuffled: with several GPUs its statistics are those of
    the whole batch (:attr:`Mechanism.sync_batchnorm`).

    The state dict has ``encoder_q.*``, ``encoder_k.*`` and ``predictor.*``; ``moco-ext convert --to moco-v3`` writes
    the published names, and reads them.

    Args:
        base_encoder: see :class:`moco_ext.MoCo`. The last linear layer of its head becomes the projector.
        dim: number of features of a query or key.
        mlp_dim: width of the hidden layers of projector and predictor.
        m: momentum of the key encoder, in [0, 1].
        T: temperature of the softmax.
        projector_layers: number of linear layers of the projector; None: as published, 2 in encoders whose head is
            ``fc`` (ResNets), else 3.
        predictor_norm: BatchNorm after the predictor; None: as published, unless the head is ``fc``.
        low_precision: see :class:`moco_ext.MoCo`.

    Raises:
        ValueError, TypeError: an argument of the wrong type or out of its range; the message names it.
    """

    symmetric = True
    sync_batchnorm = True

    def __init__(
        self,
        base_encoder: str | Callable[..., nn.Module],
        dim: int = 256,
        mlp_dim: int = 4096,
        m: float = 0.99,
        T: float = 1.0,
        *,
        projector_layers: int | None = None,
        predictor_norm: bool | None = None,
        low_precision: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("mlp_dim", mlp_dim), ("projector_layers", projector_layers)):
            if value is not None:
                check_size(name, value)
        self.m = check_momentum(m)
        self.T = check_temperature(T)
        self.encoder_q = encoders.build(base_encoder, dim)
        is_resnet = isinstance(getattr(self.encoder_q, "fc", None), nn.Linear)
        layers = projector_layers or (2 if is_resnet else 3)
        encoders.replace_head(
            self.encoder_q, lambda head: _mlp([head.in_features, *[mlp_dim] * (layers - 1), dim], norm=True), "mlp_dim"
        )
        self.predictor = _mlp([dim, mlp_dim, dim], norm=not is_resnet if predictor_norm is None else predictor_norm)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self._low_precision = None if low_precision is None else LowPrecisionWeights(low_precision)

    def forward(self, im_1: Tensor, im_2: Tensor) -> MoCoOutput:
        """The loss of two views of the same images.

        Args:
            im_1, im_2: [N, 3, H, W], in the same order.

        Returns:
            The loss; the keys [2 * world * N, dim] of all ranks, of the first view, then of the second; and the
            statistics [2 * N] of the queries of both views.
        """
        self._check_images(im_1, im_2)
        self._warn_if_update_is_forgotten()
        queries = [self.predictor(encode(self.encoder_q, images)) for images in (im_1, im_2)]  # [N, dim] each
        keys = [all_gather(self._encode_keys(images)) for images in (im_1, im_2)]  # [world * N, dim] each
        self._watch(queries[0])
        loss, stats = info_nce(
            torch.stack(queries),
            torch.stack(keys[::-1]),
            None,
            self.T,
            return_stats=True,
            in_batch=True,
            key_offset=distributed.rank() * len(im_1),
        )
        # The mean over both directions, where the published loss is their sum.
        return MoCoOutput(loss * (4 * self.T), torch.cat(keys), InfoNCEStats(*(values.flatten() for values in stats)))

    if TYPE_CHECKING:

        def __call__(self, im_1: Tensor, im_2: Tensor) -> MoCoOutput: ...

    def forward_batch(
        self, im_q: Tensor, im_k: Tensor, *, index: Tensor, key_order: Tensor | None = None
    ) -> tuple[Tensor, InfoNCEStats, tuple[Tensor, ...]]:
        out = self(im_q, im_k)
        return out.loss, out.stats, (out.keys,)

    @torch.no_grad()
    def update(self, keys: Tensor) -> None:
        """After the optimizer step: momentum update of the key encoder."""
        self._check_keys(keys)
        update_key_encoder_(self.encoder_k, self.encoder_q, self.m, self._low_precision)
        self._count_update()

    def extra_repr(self) -> str:
        return f"m={self.m}, T={self.T}"

    @torch.no_grad()
    def _encode_keys(self, images: Tensor) -> Tensor:
        if self._low_precision is None:
            return encode(self.encoder_k, images)
        return encode(functools.partial(self._low_precision, self.encoder_k), images)


def _mlp(widths: list[int], norm: bool) -> nn.Sequential:
    """Linear layers without bias, with BatchNorm and ReLU in between, and a BatchNorm without weights at the end."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        layers.append(nn.Linear(inputs, outputs, bias=False))
        if i < len(widths) - 2:
            layers += [nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]
        elif norm:
            layers.append(nn.BatchNorm1d(outputs, affine=False))
    return nn.Sequential(*layers)
