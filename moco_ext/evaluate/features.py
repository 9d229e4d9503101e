"""Features to evaluate: an encoder's pooled output, or the pixels themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data import ImageData, Split, TensorSplit, plain_batches
from ..encoders import backbone


@torch.no_grad()
def encoder_features(
    encoder: nn.Module,
    data: ImageData,
    split: Split,
    *,
    batch_size: int = 512,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> Tensor:
    """Pooled features under the head, float32 [N, D] on the CPU, of the images as they are (no augmentation).

    Runs in evaluation mode and leaves every layer in the mode it was in.
    """
    was_training = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        model = backbone(encoder)
        rows = [
            model(images.to(device, non_blocking=True)).flatten(1).float().cpu()
            for images, _ in plain_batches(data, split, batch_size, workers)
        ]
    finally:
        for module, training in was_training:
            module.training = training
    return torch.cat(rows)


def pixel_features(data: ImageData, split: Split, *, size: int = 32, workers: int = 0) -> Tensor:
    """The images themselves as rows, float32 [N, D]: what any encoder has to beat.

    Small sets keep every pixel and their own channels, in [0, 1]; larger images are averaged down to ``size``
    pixels a side.
    """
    if isinstance(split, TensorSplit):
        return split.images.flatten(1).float() / 255
    rows = [
        nn.functional.adaptive_avg_pool2d(images, size).flatten(1)
        for images, _ in plain_batches(data, split, 256, workers)
    ]
    return torch.cat(rows)
