"""What one InfoNCE forward pass knows about its batch, without its logits."""

from typing import NamedTuple

from torch import Tensor


class InfoNCEStats(NamedTuple):
    """Per-row figures of one InfoNCE forward pass; they carry no gradient.

    Attributes:
        loss: [N] cross-entropy of each query, in nats, whatever the reduction of the returned loss.
        lse: [N] log-sum-exp over the row's K + 1 logits (already divided by the temperature).
        positive_logit: [N] the positive's logit; ``loss == lse - positive_logit``.
        rank: [N] int64, how many of the K negatives score strictly above the positive; 0 is a hit.
    """

    loss: Tensor
    lse: Tensor
    positive_logit: Tensor
    rank: Tensor

    def accuracy(self, topk: tuple[int, ...] = (1,)) -> tuple[Tensor, ...]:
        """Share of queries whose positive is among their k best logits.

        Args:
            topk: the values of k.

        Returns:
            One 0-dim float tensor a k, in percent, on the stats' device; NaN for an empty batch.
        """
        return tuple((self.rank < k).float().mean() * 100 for k in topk)
