"""Intersection over union of segmented images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..data.items import items
from ..data.segmentation import IGNORED, SegmentationSplit
from ..distributed import all_reduce, rank, world_size
from ..encoders import restored_modes


def confusion_matrix(predictions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Numbers of pixels, int64 [classes (label), classes (prediction)]; pixels labeled 255 are ignored.

    Args:
        predictions, labels: integers of the same shape, on one device.
    """
    labeled = labels != IGNORED
    pairs = labels[labeled].long() * classes + predictions[labeled].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def intersection_over_union(confusion: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """``mIoU``, ``pixel_accuracy`` and ``IoU/CLASS`` in percent; no IoU of classes that are in neither the labels nor
    the predictions, which do not count in the mean.

    Args:
        confusion: as from :func:`confusion_matrix`.

    Raises:
        ValueError: no pixels.
    """
    counts = confusion.double().cpu()
    if not counts.sum():
        raise ValueError("data: expected labeled pixels in the test masks, got none")
    correct = counts.diag()
    union = counts.sum(0) + counts.sum(1) - correct
    ratios = 100 * correct[union > 0] / union[union > 0]
    names = [f"IoU/{name}" for name, n in zip(classes, union.tolist(), strict=True) if n]
    scores = {"mIoU": ratios.mean().item(), "pixel_accuracy": 100 * (correct.sum() / counts.sum()).item()}
    return scores | dict(zip(names, ratios.tolist(), strict=True))


@torch.no_grad()
def evaluate_segmenter(
    model: nn.Module, split: SegmentationSplit, *, device: torch.device | str = "cpu", workers: int = 0
) -> dict[str, float]:
    """:func:`intersection_over_union` on a split, image by image at its own size, in eval mode.

    In a process group every rank must call it: each segments its share of the images, and all get the result.

    Args:
        model: maps images uint8 [1, 3, H, W] to logits [1, classes, H, W].
    """
    n = len(split.classes)
    confusion = torch.zeros(n, n, dtype=torch.int64, device=device)
    with restored_modes(model):
        model.eval()
        for image, mask in items(split.read, range(rank(), len(split), world_size()), workers):
            predictions = model(image[None].to(device)).argmax(1)[0]
            confusion += confusion_matrix(predictions, mask.to(device), n)
    return intersection_over_union(all_reduce(confusion), split.classes)
