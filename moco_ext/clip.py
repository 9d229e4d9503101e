"""The contrastive loss of image-text pairs in both directions (CLIP, arXiv 2103.00020, Fig. 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import distributed
from .ops import info_nce
from .ops.checks import check_positive

__all__ = ["clip_loss"]


def clip_loss(
    image: Tensor, text: Tensor, logit_scale: float | Tensor, *, normalize: bool = True, label_smoothing: float = 0.0
) -> Tensor:
    """The mean of the cross-entropies of images among all texts and of texts among all images, 0-dim.

    The candidates are the pairs of all ranks, and gradients reach both sides of each of them: with DDP, which averages
    over the ranks, the gradient is that of the loss over the global batch. The similarities are never stored, but
    computed twice in each direction: eight matrix products in all, where plain torch has three. This saves memory, but
    takes longer if the N x M similarities fit in memory.

    Args:
        image, text: [N, C] features of the rank's pairs, with equal N on all ranks.
        logit_scale: positive, the inverse of the temperature (CLIP's parameter after ``.exp()``); a number or a tensor
            of one element, which may require a gradient.
        normalize: scale the features to unit length first.
        label_smoothing: as in :func:`moco_ext.info_nce`.

    Raises:
        ValueError, TypeError: features of different shapes, or as :func:`moco_ext.info_nce`.
    """
    _check_pairs(image, text)
    gather = distributed.all_gather_with_grad
    first = distributed.rank() * len(image)
    return both_directions(image, text, gather(image), gather(text), logit_scale, first, normalize, label_smoothing)


def _check_pairs(image: Tensor, text: Tensor) -> None:
    for name, x in (("image", image), ("text", text)):
        if not isinstance(x, Tensor) or x.dim() != 2:
            raise ValueError(f"{name}: expected features [N, C], got {list(x.shape) if isinstance(x, Tensor) else x!r}")
    if text.shape != image.shape:
        raise ValueError(f"text: expected the shape of image {list(image.shape)}, got {list(text.shape)}")


def both_directions(
    image: Tensor,
    text: Tensor,
    images: Tensor,
    texts: Tensor,
    logit_scale: float | Tensor,
    first: int = 0,
    normalize: bool = True,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Pairs [N, C] among all pairs [M, C], of which they are number ``first`` and following."""
    check_positive("logit_scale", logit_scale)
    temperature = logit_scale.reciprocal().to(image.device) if isinstance(logit_scale, Tensor) else 1 / logit_scale
    losses = [
        info_nce(
            queries,
            keys,
            None,
            temperature,
            normalize=normalize,
            in_batch=True,
            key_offset=first,
            label_smoothing=label_smoothing,
        )
        for queries, keys in ((image, texts), (text, images))
    ]
    return torch.stack(losses).mean()
