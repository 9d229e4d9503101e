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


@torch.no_grad()
def estimate_batchnorm_(
    encoder: nn.Module,
    data: ImageData,
    split: Split,
    *,
    batch_size: int = 512,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> None:
    """Set BatchNorm's running statistics to averages over the images (no augmentation), in place.

    An encoder at its random start has statistics that fit no data at all; this makes it a fair baseline.
    """
    layers = [layer for layer in encoder.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    modes = [(module, module.training) for module in encoder.modules()]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative average
    model = backbone(encoder.train())
    try:
        for images, _ in plain_batches(data, split, batch_size, workers):
            if len(images) > 1:  # one image has no variance
                model(images.to(device, non_blocking=True))
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, training in modes:
            module.training = training


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
