"""The frozen teacher of a distillation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data import ImageData
from ..distillation import Distillation
from ..evaluate.encoder import load_encoder
from ..mechanism import Mechanism


class Renormalized(nn.Module):
    """A module for images with its own normalization, given images with that of a data set."""

    scale: Tensor
    shift: Tensor

    def __init__(self, module: nn.Module, own: tuple[Tensor, Tensor], given: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.module = module
        (mean, std), (given_mean, given_std) = own, given
        self.register_buffer("scale", (given_std / std).expand(3).view(1, 3, 1, 1).clone())
        self.register_buffer("shift", ((given_mean - mean) / std).expand(3).view(1, 3, 1, 1).clone())

    def forward(self, images: Tensor) -> Tensor:
        return self.module(torch.addcmul(self.shift, images, self.scale))


def attach_teacher(model: Mechanism, source: str, data: ImageData) -> None:
    """Set the teacher of a :class:`moco_ext.distillation.Distillation`, which sees the views as it was trained.

    Args:
        source: for :func:`moco_ext.load_encoder`.

    Raises:
        ValueError: the encoder has another number of features than the model's queue.
    """
    assert isinstance(model, Distillation)
    encoder, transform = load_encoder(source)
    dim = model.queue.shape[1]
    if encoder.num_features != dim:
        raise ValueError(f"moco_dim: expected the teacher's {encoder.num_features} features, got {dim}")
    own, given = ((torch.tensor(x.mean), torch.tensor(x.std)) for x in (transform, data))
    model.set_teacher(Renormalized(encoder, own, given).to(model.queue.device))
