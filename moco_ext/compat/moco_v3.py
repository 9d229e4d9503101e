"""The loss of MoCo v3's official code, on this package's kernels.

Replaces the body of ``MoCo.contrastive_loss`` in ``moco/builder.py`` of facebookresearch/moco-v3.
:class:`moco_ext.MoCoV3` is the whole model.
"""

from __future__ import annotations

from torch import Tensor

from ..distributed import all_gather, rank
from ..mechanism import check_temperature
from ..ops import info_nce

__all__ = ["contrastive_loss"]


def contrastive_loss(q: Tensor, k: Tensor, T: float) -> Tensor:
    """``2 T`` times the InfoNCE loss, 0-dim, of queries and the keys of all ranks (arXiv 2104.02057, Algorithm 1).

    Row n of ``k`` is the positive of row n of ``q``; all other keys, of all ranks, are its negatives. One process needs
    no process group. The [N, world * N] logits are not stored.

    Args:
        q: [N, C] queries of any norm.
        k: [N, C] keys of any norm, of the same N on all ranks; they get no gradient.
        T: temperature, a positive number.

    Raises:
        ValueError, TypeError: q or k of another shape or dtype, or T is not a positive number; the message names it.
    """
    T = check_temperature(T)
    check_pairs(q=q, k=k)
    return info_nce(q, all_gather(k), None, T, in_batch=True, key_offset=rank() * len(q)) * (2 * T)


def check_pairs(**pair: Tensor) -> None:
    """Refuse two tensors that are not [N, C] both: labels of another number of keys would be wrong on all other ranks.

    Raises:
        ValueError, TypeError: the message names the tensor.
    """
    for name, x in pair.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    (first, x), (second, y) = pair.items()
    if x.dim() != 2:
        raise ValueError(f"{first}: expected [N, C], got {list(x.shape)}")
    if y.shape != x.shape:
        raise ValueError(f"{second}: expected {list(x.shape)} as {first}, got {list(y.shape)}")
