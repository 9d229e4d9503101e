"""Semantic segmentation on top of an encoder: an FCN as in the MoCo paper (section 4.2), all of it trained."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.fcn import FCN
from torchvision.ops import Conv2dNormActivation

from ..data.datasets import IMAGENET_MEAN, IMAGENET_STD
from ..data.segmentation import IGNORED, Item, SegmentationData
from ..encoders import stage_maps
from ..evaluate.segmentation import evaluate_segmenter
from ..runs.options import RunOptions
from ..runs.settings import POSITIVE, at_least, setting
from .iterations import IterationsConfig, train_iterations

HEAD = "fcn"
_CHANNELS = 256
_DILATION = 6  # of the head


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmenterConfig(IterationsConfig):
    """How a segmenter is trained.

    Attributes:
        crop: side of a training view in pixels.
        scales: smallest and largest ratio by which a training image is scaled before it is cropped.

    Raises:
        ValueError: a setting outside its range.
    """

    crop: int = setting(valid=at_least(32), help="side of a training view in pixels")
    scales: tuple[float, ...] = setting(
        (0.5, 2.0), metavar="X", valid=POSITIVE, help="smallest and largest ratio by which training images are scaled"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.scales) != 2 or self.scales[0] > self.scales[1]:
            raise ValueError(f"scales: expected the smallest and the largest ratio, got {self.scales}")


# The published configurations: appendix of the paper.
RECIPES = {
    "voc": SegmenterConfig(30_000, (21_000, 27_000), 0.003, crop=513),
    "cityscapes": SegmenterConfig(90_000, (63_000, 81_000), 0.01, crop=769),
}


class Segmenter(FCN):
    """torchvision's FCN, with the normalization of images."""

    def __init__(self, backbone: nn.Module, classifier: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__(backbone, classifier)
        self.register_buffer("mean", mean[:, None, None], persistent=False)
        self.register_buffer("std", std[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes, H, W] of images uint8 [N, 3, H, W]."""
        return super().forward((images / 255 - self.mean) / self.std)["out"]


def build_segmenter(
    encoder: nn.Module,
    classes: int,
    config: SegmenterConfig,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Segmenter:
    """An FCN on a ResNet, whose layers it shares; none is frozen, and new layers have BatchNorm.

    In the encoder itself, layer4 gets stride 1 and 3x3 convolutions with dilation 2; weights and names stay. So a
    ResNet-50 has a stride of 16. Two 3x3 convolutions with dilation 6 and a 1x1 convolution follow.

    Args:
        mean, std: per channel of pixel values in [0, 1], as in pre-training; one or three entries.

    Raises:
        ValueError: the encoder is no ResNet with four stages, or its layer4 cannot be dilated.
    """
    channels = stage_maps(encoder, "segmentation")[-1].shape[1]
    dilate(encoder.get_submodule("layer4"))
    encoder.requires_grad_(True)
    head = functools.partial(Conv2dNormActivation, out_channels=_CHANNELS, kernel_size=3, dilation=_DILATION)
    predictor = nn.Conv2d(_CHANNELS, classes, 1)
    nn.init.normal_(predictor.weight, std=0.01)
    assert predictor.bias is not None
    nn.init.zeros_(predictor.bias)
    return Segmenter(
        IntermediateLayerGetter(encoder, {"layer4": "out"}),
        nn.Sequential(head(channels), head(_CHANNELS), predictor),
        torch.tensor((list(mean) * 3)[:3]),
        torch.tensor((list(std) * 3)[:3]),
    ).train()


def dilate(stage: nn.Module) -> None:
    """Give a stage of a ResNet stride 1, and its convolutions dilation 2 so that they cover as much, in place.

    Raises:
        ValueError: a stride in other layers than convolutions and average pooling.
    """
    for name, layer in list(stage.named_modules()):
        if isinstance(layer, nn.Conv2d):
            layer.stride = (1, 1)
            if max(layer.kernel_size) > 1:
                layer.dilation, layer.padding = (2, 2), tuple(2 * (side // 2) for side in layer.kernel_size)
        elif isinstance(layer, nn.AvgPool2d) and layer.kernel_size == 2:  # of timm
            stage.set_submodule(name, nn.Sequential(nn.ReplicationPad2d((0, 1, 0, 1)), nn.AvgPool2d(2, 1)))
        elif not list(layer.children()) and getattr(layer, "stride", 1) not in (1, (1, 1)):
            raise ValueError(
                f"arch: expected strides of layer4 in convolutions and average pooling, got {type(layer).__name__}"
            )


def train_segmenter(
    model: Segmenter, data: SegmentationData, config: SegmenterConfig, options: RunOptions, *, name: str, arch: str
) -> list[dict[str, Any]]:
    """:func:`train_iterations` of a segmenter; a record has mIoU, pixel_accuracy and IoU/CLASS in percent."""
    fill = (255 * model.mean).round().int().flatten().tolist()
    return train_iterations(
        model,
        data,
        config,
        options,
        name=name,
        arch=arch,
        head=HEAD,
        mean=model.mean.flatten().tolist(),
        std=model.std.flatten().tolist(),
        view=functools.partial(data.train.view, crop=config.crop, scales=config.scales, fill=fill),
        loss_of=functools.partial(cross_entropy, device=options.device),
        evaluate=evaluate_segmenter,
    )


def cross_entropy(model: nn.Module, batch: list[Item], device: torch.device) -> Tensor:
    """Mean over the labeled pixels of a batch; 0 if there are none."""
    images, masks = (torch.stack(tensors).to(device, non_blocking=True) for tensors in zip(*batch, strict=True))
    total = F.cross_entropy(model(images), masks.long(), ignore_index=IGNORED, reduction="sum")
    return total / (masks != IGNORED).sum().clamp(min=1)
