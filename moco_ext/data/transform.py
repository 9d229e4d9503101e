"""The preprocessing of an encoder's evaluation, one image at a time and without the data it was trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .datasets import IMAGENET_MEAN, IMAGENET_STD, ImageData, Normalize, TensorSplit, eval_crop
from .images import from_pil, read_image

if TYPE_CHECKING:
    from PIL import Image

_CENTER = 224 / 256  # of eval_crop


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """The preprocessing of :func:`moco_ext.data.eval_batches`, for one image or a batch of them.

    The defaults are those of ImageNet, for weights that record no preprocessing.

    Attributes:
        size: side of the square images that the encoder takes, in pixels.
        mean: per channel, of pixel values in [0, 1]; one or three entries.
        std: standard deviation per channel, likewise.
        crop_pct: share of the resized image's side that the center crop keeps: 0.875, or 1 for the built-in data sets,
            whose images are resized whole.

    Raises:
        ValueError: a value outside its range.
    """

    size: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop_pct: float = _CENTER

    def __post_init__(self) -> None:
        for name, found in (("mean", self.mean), ("std", self.std)):
            object.__setattr__(self, name, tuple(map(float, found)))
        if self.size < 1:
            raise ValueError(f"size: expected a number of pixels of at least 1, got {self.size}")
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean) or min(self.std) <= 0:
            raise ValueError(f"mean, std: expected one or three channels, std positive, got {self.mean}, {self.std}")
        if self.crop_pct not in (_CENTER, 1):
            raise ValueError(f"crop_pct: expected {_CENTER} or 1, got {self.crop_pct}")

    @staticmethod
    def of(data: ImageData) -> EvalTransform:
        """The preprocessing of a data set."""
        whole = isinstance(data.train, TensorSplit)
        return EvalTransform(data.size, data.mean, data.std, 1.0 if whole else _CENTER)

    @staticmethod
    def from_dict(recorded: Mapping[str, Any]) -> EvalTransform:
        """From :meth:`as_dict`; unknown entries are an error."""
        try:
            return EvalTransform(**recorded)
        except TypeError as error:
            raise ValueError(f"transform: expected size, mean, std and crop_pct, got {error}") from None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and checkpoints."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    def __call__(self, image: str | Path | Image.Image | Tensor) -> Tensor:
        """Normalized float32 [3, size, size] of an image file, a PIL image or a tensor [1 or 3, H, W]; or
        [N, 3, size, size] of a batch [N, 1 or 3, H, W]. Tensors are uint8, or floating-point in [0, 1].

        Raises:
            UnreadableImageError: the file cannot be decoded.
            ValueError: a tensor of another shape.
        """
        view = self.view(image)
        return self.normalize(view) if view.ndim == 4 else self.normalize(view[None])[0]

    def view(self, image: str | Path | Image.Image | Tensor) -> Tensor:
        """The resized center crop, [..., size, size], uint8 or floating-point in [0, 1], before normalization."""
        pixels = image if isinstance(image, Tensor) else _decoded(image)
        if pixels.ndim not in (3, 4) or pixels.shape[-3] not in (1, 3):
            raise ValueError(f"image: expected shape [1 or 3, H, W] or a batch of these, got {list(pixels.shape)}")
        if self.crop_pct < 1:
            return eval_crop(pixels, self.size)
        from torchvision.transforms.v2.functional import center_crop

        pixels = center_crop(pixels, [min(pixels.shape[-2:])] * 2)
        if pixels.shape[-1] == self.size:
            return pixels
        pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        batch = pixels if pixels.ndim == 4 else pixels[None]
        resized = F.interpolate(batch, size=(self.size, self.size), mode="bilinear", antialias=True)
        return resized if pixels.ndim == 4 else resized[0]

    def normalize(self, views: Tensor) -> Tensor:
        """Normalized float32 [N, 3, size, size] of a batch of :meth:`view`, on its device."""
        return Normalize(self, views.device)(views)


def _decoded(image: str | Path | Image.Image) -> Tensor:
    return read_image(image) if isinstance(image, (str, Path)) else from_pil(image)
