"""Statistics of an InfoNCE forward pass."""

from typing import NamedTuple

import torch
from torch import Tensor


class InfoNCEStats(NamedTuple):
    """Per-query statistics of an InfoNCE forward pass, without gradient.

    Attributes:
        loss: [N] cross-entropy of each query, in nats, whatever the reduction of the returned loss.
        lse: [N] log-sum-exp over the row's K + 1 logits (already divided by the temperature).
        positive_logit: [N] logit of the positive; ``loss == lse - positive_logit``.
        rank: [N] int64, the number of negatives that score strictly above the positive; -1 if there is no such score.
    """

    loss: Tensor
    lse: Tensor
    positive_logit: Tensor
    rank: Tensor

    def accuracy(self, topk: tuple[int, ...] = (1,)) -> tuple[Tensor, ...]:
        """Contrast accuracy: percentage of queries whose positive is among the k highest logits.

        Args:
            topk: values of k.

        Returns:
            A 0-dim float tensor for each k, in percent; NaN for an empty batch, without ranks, and where a loss is NaN.
        """
        unknown = (self.rank < 0) | self.loss.isnan()
        return tuple((self.rank < k).float().masked_fill(unknown, torch.nan).mean() * 100 for k in topk)
