"""The frozen teacher of a distillation."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ..data import ImageData
from ..distillation import Distillation
from ..distributed import rank
from ..evaluate.encoder import load_encoder, recorded_size
from ..mechanism import Mechanism


class Renormalized(nn.Module):
    """A module for images with its own normalization, given images with that of a data set."""

    scale: Tensor
    shift: Tensor

    def __init__(self, module: nn.Module, own: tuple[Tensor, Tensor], given: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.module = module
        self.head = nn.Identity()  # what evaluations take off
        (mean, std), (given_mean, given_std) = own, given
        self.register_buffer("scale", (given_std / std).expand(3).view(1, 3, 1, 1).clone())
        self.register_buffer("shift", ((given_mean - mean) / std).expand(3).view(1, 3, 1, 1).clone())

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.module(torch.addcmul(self.shift, images, self.scale)))


def load_teacher(source: str, data: ImageData) -> tuple[nn.Module, int]:
    """The encoder of :func:`moco_ext.load_encoder`, for images normalized as those of ``data``; number of features."""
    encoder, transform = load_encoder(source, image_size=data.size)
    trained = recorded_size(source)
    if trained not in (None, data.size) and rank() == 0:
        warnings.warn(
            f"teacher: its images have {trained} pixels and those of {data.name} {data.size}, which may cost accuracy; "
            "see --image-size",
            stacklevel=5,
        )
    own, given = ((torch.tensor(x.mean), torch.tensor(x.std)) for x in (transform, data))
    return Renormalized(encoder, own, given), encoder.num_features


def attach_teacher(model: Mechanism, source: str, data: ImageData) -> None:
    """Set the teacher of a :class:`moco_ext.distillation.Distillation`, which sees the views as it was trained.

    Args:
        source: for :func:`moco_ext.load_encoder`.

    Raises:
        ValueError: the encoder has another number of features than the model's queue.
    """
    assert isinstance(model, Distillation)
    teacher, features = load_teacher(source, data)
    dim = model.queue.shape[1]
    if features != dim:
        raise ValueError(f"moco_dim: expected the teacher's {features} features, got {dim}")
    model.set_teacher(teacher.to(model.queue.device))
