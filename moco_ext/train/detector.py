"""Object detection on top of an encoder: Faster R-CNN as in the MoCo paper (section 4.2), all of it trained."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign, roi_align

from ..data.datasets import IMAGENET_MEAN, IMAGENET_STD
from ..data.detection import DetectionData, Item
from ..encoders import STAGES, stage_maps
from ..evaluate.detection import evaluate_detector
from ..runs.options import RunOptions
from ..runs.settings import POSITIVE, at_least, one_of, setting
from .iterations import IterationsConfig, train_iterations

_RATIOS = (0.5, 1.0, 2.0)  # height / width of the anchors


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectorConfig(IterationsConfig):
    """How a detector is built and trained.

    Attributes:
        neck: ``"c4"``: RPN and RoIs on layer3, layer4 in the box head. ``"fpn"``: a feature pyramid on all stages.
        min_size: shorter sides of the training images in pixels, one drawn for each; the last is also for tests.

    Raises:
        ValueError: a setting outside its range.
    """

    min_size: tuple[int, ...] = setting(
        metavar="N", valid=at_least(32), help="shorter sides of training images in pixels; the last is also for tests"
    )
    neck: str = setting("c4", valid=one_of("c4", "fpn"), help="features between the encoder and the box head")
    lr: float = setting(0.02, flags=("--lr", "--learning-rate"), metavar="LR", valid=POSITIVE, help="learning rate")
    max_size: int = setting(1333, valid=at_least(32), help="largest longer side of an image in pixels")
    anchors: tuple[int, ...] = setting(
        (32, 64, 128, 256, 512), metavar="N", valid=at_least(1), help="sizes of the anchors in pixels"
    )
    rois: int = setting(512, valid=at_least(1), help="regions per image that the box head is trained on")
    proposals: int = setting(1000, valid=at_least(1), help="regions per image for the box head in tests")
    roi_size: int | None = setting(
        None, valid=at_least(2), shown="14 for c4, 7 for fpn", help="side of the pooled features of a region"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neck == "fpn" and len(self.anchors) != 5:
            raise ValueError(f"anchors: expected 5 sizes, one for each level of fpn, got {len(self.anchors)}")


# The published configurations: detection/configs of the official repository and the defaults of detectron2.
RECIPES = {
    "voc": DetectorConfig(24_000, (18_000, 22_000), min_size=tuple(range(480, 801, 32)), warmup=100),
    "coco-1x": DetectorConfig(90_000, (60_000, 80_000), min_size=tuple(range(640, 801, 32)), warmup=1000),
    "coco-2x": DetectorConfig(180_000, (120_000, 160_000), min_size=tuple(range(640, 801, 32)), warmup=1000),
}


class _AlignedRoIAlign(MultiScaleRoIAlign):
    """RoIAlign on one feature map, with boxes shifted by half a pixel, as in detectron2."""

    def __init__(self, output_size: int, scale: float) -> None:
        super().__init__(["0"], output_size, sampling_ratio=0)
        self.scale = scale

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        return roi_align(x["0"], boxes, self.output_size, self.scale, aligned=True)


def build_detector(
    encoder: nn.Module,
    classes: int,
    config: DetectorConfig,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> FasterRCNN:
    """Faster R-CNN on a ResNet, whose layers it shares; none is frozen, and new layers have BatchNorm.

    With ``neck="c4"`` another BatchNorm follows layer4 (res5). With ``"fpn"`` the pyramid has BatchNorm, and the box
    head is four convolutions with BatchNorm and a linear layer.

    Args:
        classes: number of classes without the background.
        mean, std: per channel of pixel values in [0, 1], as in pre-training; one or three entries.

    Raises:
        ValueError: the encoder is no ResNet with four stages.
    """
    maps = stage_maps(encoder, "detection")
    encoder.requires_grad_(True)
    channels = [features.shape[1] for features in maps]
    options: dict[str, Any]
    backbone: nn.Module
    box_head: nn.Module
    if config.neck == "c4":
        backbone = IntermediateLayerGetter(encoder, {"layer3": "0"})
        backbone.out_channels = channels[2]  # type: ignore[assignment]
        sizes, features = [config.anchors], channels[3]
        layer4 = encoder.get_submodule("layer4")
        box_head = nn.Sequential(layer4, nn.BatchNorm2d(features), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        pool: MultiScaleRoIAlign = _AlignedRoIAlign(config.roi_size or 14, maps[2].shape[-1] / 64)
        options = {"rpn_pre_nms_top_n_train": 12_000, "rpn_pre_nms_top_n_test": 6000}
    else:
        levels = {name: str(number) for number, name in enumerate(STAGES)}
        backbone = BackboneWithFPN(encoder, levels, channels, 256, norm_layer=nn.BatchNorm2d)
        sizes, features, side = [(size,) for size in config.anchors], 1024, config.roi_size or 7
        box_head = FastRCNNConvFCHead((256, side, side), [256] * 4, [features], norm_layer=nn.BatchNorm2d)
        pool = MultiScaleRoIAlign(list(levels.values()), side, sampling_ratio=0)
        options = {"rpn_post_nms_top_n_train": 1000}
    predictor = FastRCNNPredictor(features, classes + 1)
    for layer, deviation in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)
    nn.init.zeros_(predictor.bbox_pred.weight[:4].detach())  # the background has no box: never used, never trained
    return FasterRCNN(
        backbone,
        min_size=config.min_size,
        max_size=config.max_size,
        image_mean=(list(mean) * 3)[:3],
        image_std=(list(std) * 3)[:3],
        rpn_anchor_generator=AnchorGenerator(tuple(sizes), (_RATIOS,) * len(sizes)),
        rpn_post_nms_top_n_test=config.proposals,
        box_roi_pool=pool,
        box_head=box_head,
        box_predictor=predictor,
        box_batch_size_per_image=config.rois,
        **options,
    ).train()


def train_detector(
    model: FasterRCNN, data: DetectionData, config: DetectorConfig, options: RunOptions, *, name: str, arch: str
) -> list[dict[str, Any]]:
    """:func:`train_iterations` of a detector; a record has AP, AP50 and AP75 in percent."""
    return train_iterations(
        model,
        data,
        config,
        options,
        name=name,
        arch=arch,
        head=config.neck,
        mean=model.transform.image_mean,
        std=model.transform.image_std,
        view=data.train.view,
        loss_of=lambda model, batch: sum(model(*to_device(batch, options.device)).values()),
        evaluate=evaluate_detector,
    )


def to_device(batch: list[Item], device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images float32 [3, H, W] in [0, 1] and targets, as torchvision's detectors take them."""
    return (
        [image.to(device, non_blocking=True) / 255 for image, _ in batch],
        [{name: value.to(device, non_blocking=True) for name, value in target.items()} for _, target in batch],
    )
