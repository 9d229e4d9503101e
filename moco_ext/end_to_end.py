"""The end-to-end mechanism: the dictionary is the batch, and gradients reach the keys (arXiv 1911.05722, Fig. 2a)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from . import distributed, encoders
from .encoders import encode
from .mechanism import Mechanism, check_temperature
from .moco import MoCoOutput
from .ops import info_nce
from .shuffle_bn import check_mode, convert_split_bn, shuffle_order, start_shuffle, unshuffle


class EndToEnd(Mechanism):
    """End-to-end contrastive learning: the keys of all ranks are the dictionary, and both encoders are trained.

    The dictionary is as large as the global batch, and always consistent. Train it like :class:`moco_ext.MoCo`.

    Args:
        base_encoder, dim, T, mlp, shuffle_bn, split_bn: see :class:`moco_ext.MoCo`.
        key_encoder: ``"identical"``, one network for queries and keys; ``"partial"``, two heads on one backbone;
            ``"different"``, two networks of the same architecture; or another ``base_encoder`` for the keys.

    Raises:
        ValueError: an argument out of its range, or an encoder of the wrong shape; the message names it.
    """

    def __init__(
        self,
        base_encoder: str | Callable[..., nn.Module],
        dim: int = 128,
        T: float = 0.07,
        mlp: bool = False,
        *,
        shuffle_bn: str = "auto",
        split_bn: int = 1,
        key_encoder: str | Callable[..., nn.Module] = "identical",
    ) -> None:
        super().__init__()
        self.T = check_temperature(T)
        self.shuffle_bn = check_mode(shuffle_bn)
        self.split_bn = split_bn
        self.encoder_q = convert_split_bn(encoders.build(base_encoder, dim, mlp), split_bn)
        if key_encoder == "identical":
            self.encoder_k = self.encoder_q
        elif key_encoder == "partial":
            self.encoder_k = encoders.with_own_head(self.encoder_q)
        else:
            kind = base_encoder if key_encoder == "different" else key_encoder
            self.encoder_k = convert_split_bn(encoders.build(kind, dim, mlp), split_bn)

    def forward(self, im_q: Tensor, im_k: Tensor, *, key_order: Tensor | None = None) -> MoCoOutput:
        """Loss of a batch of two views of the same images; see :meth:`moco_ext.MoCo.forward`."""
        self._check_images(im_q, im_k)
        self._warn_if_update_is_forgotten()
        n = im_q.shape[0]
        order = shuffle_order(n, self.shuffle_bn, self.split_bn, self._permutation, key_order)
        arriving = start_shuffle(im_k, order, self.shuffle_bn)
        queries = encode(self.encoder_q, im_q)
        keys = encode(self.encoder_k, im_k if arriving is None else arriving())
        keys = unshuffle(distributed.all_gather_with_grad(keys), order)  # [world * N, dim]
        self._watch(queries)
        loss, stats = info_nce(
            queries, keys, None, self.T, return_stats=True, in_batch=True, key_offset=distributed.rank() * n
        )
        return MoCoOutput(loss, keys.detach(), stats)

    if TYPE_CHECKING:

        def __call__(self, im_q: Tensor, im_k: Tensor, *, key_order: Tensor | None = None) -> MoCoOutput: ...

    def update(self, keys: Tensor) -> None:
        """Count the step: the optimizer has trained both encoders, and no keys are stored."""
        super().update(keys)
