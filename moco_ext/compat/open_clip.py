"""open_clip's contrastive loss, on this package's kernels (open_clip 3).

Replaces ``from open_clip import ClipLoss``. Towers, gathering options and the training loop stay open_clip's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import distributed
from ..clip import both_directions

__all__ = ["ClipLoss"]


class ClipLoss(nn.Module):
    """CLIP's loss over the pairs of all ranks, without their [N, M] similarities.

    Args:
        local_loss: only this rank's pairs are queries; otherwise each rank computes the loss of all pairs.
        gather_with_grad: gradients reach the features of other ranks. Without it only this rank's get one, and with
            ``local_loss`` only as queries, as in open_clip.
        cache_labels: ignored, there are no labels.
        rank, world_size: of the process group; a world_size of 1 does not gather.
        use_horovod: must be False.

    Raises:
        ValueError: use_horovod.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod: expected False, got True; use torch.distributed")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, 0-dim, or ``{"contrastive_loss": loss}`` with ``output_dict``.

        Args:
            image_features, text_features: [N, C], normalized by the model.
            logit_scale: the inverse temperature, of shape [] or [1].
            logit_bias: added to all similarities, so it does not change the loss and gets no gradient.

        Raises:
            ValueError: a world_size above 1 and a rank that are not those of the process group.
        """
        own = distributed.rank(), distributed.world_size()
        if self.world_size != 1 and (self.rank, self.world_size) != own:
            raise ValueError(
                f"rank, world_size: expected those of the process group, {own[0]} and {own[1]}, got {self.rank} and "
                f"{self.world_size}"
            )
        image, text = image_features, text_features
        images, texts = self._gather(image), self._gather(text)
        first = self.rank * len(image) if self.world_size > 1 else 0
        if not self.local_loss:
            image, text, first = images, texts, 0
        loss = both_directions(image, text, images, texts, logit_scale, first, normalize=False)
        return {"contrastive_loss": loss} if output_dict else loss

    def _gather(self, features: Tensor) -> Tensor:
        if self.world_size == 1:
            return features
        if self.gather_with_grad:
            return distributed.all_gather_with_grad(features)
        everyone = distributed.all_gather(features)
        if self.local_loss:
            return everyone
        parts = list(everyone.chunk(self.world_size))
        parts[self.rank] = features
        return torch.cat(parts)
