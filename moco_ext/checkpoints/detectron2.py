"""The tensors of a Faster R-CNN R50-C4 under the names of detectron2, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .files import to_array
from .formats import FORMATS

_RENAME, _RENAME_BACK = FORMATS["detectron2"].backbone[::-1]
_HEADS = {  # torchvision -> detectron2
    "rpn.head.conv.0.0": "proposal_generator.rpn_head.conv",
    "rpn.head.cls_logits": "proposal_generator.rpn_head.objectness_logits",
    "rpn.head.bbox_pred": "proposal_generator.rpn_head.anchor_deltas",
    "roi_heads.box_head.1": "roi_heads.res5.norm",
    "roi_heads.box_predictor.cls_score": "roi_heads.box_predictor.cls_score",
    "roi_heads.box_predictor.bbox_pred": "roi_heads.box_predictor.bbox_pred",
}
_HEADS_BACK = {new: old for old, new in _HEADS.items()}
_RATIOS = 3


def detector_to_detectron2(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What detectron2's ``DetectionCheckpointer`` reads, for the official ``Res5ROIHeadsExtraNorm``.

    Values are unchanged. Anchors go from the order (ratio, size) to (size, ratio). The background, the first class of
    torchvision, becomes the last, and its box, which is never used, is dropped.

    Args:
        state: the state dict of :func:`moco_ext.train.detector.build_detector` with ``neck="c4"``, on the CPU.

    Raises:
        ValueError: a tensor that detectron2's C4 model has no place for, such as those of an FPN.
    """
    renamed = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        body = re.sub(r"^roi_heads\.box_head\.0\.", "layer4.", name.removeprefix("backbone."))
        if layer in _HEADS:
            new: str | None = f"{_HEADS[layer]}.{kind}"
        else:
            new = _RENAME(body)
            new = new and f"{'roi_heads' if body.startswith('layer4.') else 'backbone'}.{new}"
        if new is None:
            raise ValueError(f"state: expected the tensors of a detector with neck c4, got {name}")
        renamed[new] = to_array(name, _reordered(name, tensor, back=False))
    return {"model": renamed, "__author__": "moco_ext"}


def detector_from_detectron2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`detector_to_detectron2`, of the entries of ``model``; the background's box is 0."""
    renamed = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        if layer in _HEADS_BACK:
            new = f"{_HEADS_BACK[layer]}.{kind}"
        else:
            body = _RENAME_BACK(re.sub(r"^(backbone|roi_heads)\.", "", name))
            new = f"backbone.{body}".replace("backbone.layer4.", "roi_heads.box_head.0.")
        renamed[new] = _reordered(new, tensor, back=True)
    return renamed


def _reordered(name: str, tensor: Tensor, *, back: bool) -> Tensor:
    """The rows of a predictor in the other package's order."""
    if name.startswith(("rpn.head.cls_logits.", "rpn.head.bbox_pred.")):
        values = 1 if "cls_logits" in name else 4
        first = len(tensor) // values // _RATIOS if back else _RATIOS
        return tensor.view(first, -1, values, *tensor.shape[1:]).transpose(0, 1).flatten(0, 2)
    if name.startswith("roi_heads.box_predictor.cls_score."):
        return tensor.roll(1 if back else -1, 0)
    if name.startswith("roi_heads.box_predictor.bbox_pred."):
        return torch.cat([torch.zeros_like(tensor[:4]), tensor]) if back else tensor[4:]
    return tensor
