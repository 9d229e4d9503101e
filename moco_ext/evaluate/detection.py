"""Average precision of object detectors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data.detection import DetectionSplit
from ..data.items import items
from ..distributed import rank, world_size
from ..encoders import restored_modes

Detections = Mapping[str, Tensor]
_SCORES = {"AP": "map", "AP50": "map_50", "AP75": "map_75"}


def average_precision(detections: Sequence[Detections], targets: Sequence[Detections]) -> dict[str, float]:
    """COCO's ``AP`` (mean over IoU thresholds 0.5 to 0.95), ``AP50`` and ``AP75`` in percent; NaN if all objects of the
    targets are ignored.

    Args:
        detections: of each image: ``boxes`` [n, 4] as x1, y1, x2, y2, ``scores`` and ``labels`` [n].
        targets: of each image: ``boxes``, ``labels`` and ``iscrowd``; objects with ``iscrowd`` 1 are ignored.

    Raises:
        ModuleNotFoundError: torchmetrics or pycocotools is not installed.
    """
    import pycocotools  # noqa: F401  # torchmetrics' own error does not name the module
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(backend="pycocotools", sync_on_compute=False)
    metric.warn_on_many_detections = False
    metric.update(list(detections), list(targets))
    computed = metric.compute()
    found = {name: computed[key].item() for name, key in _SCORES.items()}
    return {name: 100 * value if value >= 0 else math.nan for name, value in found.items()}  # -1: undefined


@torch.no_grad()
def evaluate_detector(
    model: nn.Module, split: DetectionSplit, *, device: torch.device | str = "cpu", workers: int = 0
) -> dict[str, float]:
    """:func:`average_precision` of one of torchvision's detectors on a split, image by image, in eval mode.

    In a process group every rank must call it: each detects in its share of the images, and all get the result.
    """
    share = range(rank(), len(split), world_size())
    found: dict[int, tuple[Any, Any]] = {}
    with restored_modes(model):
        model.eval()
        for position, (image, target) in zip(share, items(split.read, share, workers), strict=True):
            [detections] = model([image.to(device) / 255])
            found[position] = {name: value.cpu() for name, value in detections.items()}, target
    parts: list[Any] = [found]
    if world_size() > 1:
        parts *= world_size()
        dist.all_gather_object(parts, found)
    merged = {position: pair for part in parts for position, pair in part.items()}
    pairs = [merged[position] for position in range(len(split))]
    return average_precision([pair[0] for pair in pairs], [pair[1] for pair in pairs])
