"""Two random crops of each image: the query's view and the key's.

One :class:`Augmentation` says what is done; it is carried out either per image, by torchvision's transforms
in loader workers (:func:`image_transform`, for image folders), or on whole batches in memory with parameters
drawn per image (:func:`augment_batch`, for small sets: without a Python call an image).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma, as torchvision's grayscale
_BLUR_FROM = 64  # pixels; below, a published blur would leave nothing to tell images apart


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What a view may go through, in the order of the fields.

    ``scale`` and ``ratio`` are those of ``RandomResizedCrop`` (share of the area, width / height); ``jitter``
    holds the strengths of brightness, contrast, saturation and hue, ``*_p`` the probability of each step, and
    ``blur_sigma`` the range of the Gaussian's sigma in pixels.
    """

    size: int
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.4)
    jitter_p: float = 1.0
    gray_p: float = 0.2
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    flip_p: float = 0.5

    @staticmethod
    def v1(size: int, **changes: Any) -> Augmentation:
        """MoCo v1 (arXiv 1911.05722, section 3.3): crop, grayscale, colour jitter, flip."""
        return Augmentation(size, **changes)

    @staticmethod
    def v2(size: int, **changes: Any) -> Augmentation:
        """MoCo v2 (arXiv 2003.04297, ``--aug-plus``): jitter with a milder hue and p 0.8, and blur.

        Blur is left out below 64 pixels.
        """
        v2: dict[str, Any] = {
            "jitter": (0.4, 0.4, 0.4, 0.1),
            "jitter_p": 0.8,
            "blur_p": 0.5 if size >= _BLUR_FROM else 0.0,
        }
        return Augmentation(size, **(v2 | changes))


class TwoCropsTransform:
    """Two independent draws of ``base_transform`` on one image: ``[q, k]``."""

    def __init__(self, base_transform: Callable) -> None:
        self.base_transform = base_transform

    def __call__(self, image) -> list:
        return [self.base_transform(image), self.base_transform(image)]


def image_transform(augmentation: Augmentation, mean: tuple[float, ...], std: tuple[float, ...]) -> Callable:
    """``augmentation`` as a torchvision v2 transform: PIL image or uint8 tensor -> float32 [3, size, size]."""
    from torchvision.transforms import v2

    a = augmentation
    kernel = 2 * math.ceil(2 * a.blur_sigma[1]) + 1  # two sigmas each side
    jitter = v2.RandomApply([v2.ColorJitter(*a.jitter)], a.jitter_p)
    v1_order = a.jitter_p == 1.0  # v1 drops the colour before it jitters, v2 after
    colour = [v2.RandomGrayscale(a.gray_p), jitter] if v1_order else [jitter, v2.RandomGrayscale(a.gray_p)]
    steps = [
        v2.ToImage(),
        v2.RGB(),
        v2.RandomResizedCrop(a.size, a.scale, a.ratio, antialias=True),
        *colour,
        v2.RandomApply([v2.GaussianBlur(kernel, a.blur_sigma)], a.blur_p),
        v2.RandomHorizontalFlip(a.flip_p),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean, std),
    ]
    return v2.Compose(steps)


def augment_batch(images: Tensor, augmentation: Augmentation, generator: torch.Generator | None = None) -> Tensor:
    """One view of each image, every parameter drawn per image.

    The jitter's order (brightness, contrast, saturation, hue) is drawn once a batch. There is no blur here:
    small images get none.

    Args:
        images: uint8 or floating (then in [0, 1]) [N, C, H, W], C = 1 or 3.
        generator: where every draw comes from; a CPU generator.

    Returns:
        float32 [N, C, size, size] in [0, 1].
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images: expected shape [N, 1 or 3, H, W], got {list(images.shape)}")
    if augmentation.blur_p > 0:
        raise ValueError(f"augmentation: expected blur_p = 0 for batches in memory, got {augmentation.blur_p}")
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    draw = _Draws(len(images), generator, images.device)
    images = _resized_crop_and_flip(images, augmentation, draw)
    if augmentation.jitter_p == 1.0:  # v1 drops the colour before it jitters, v2 after
        return _jitter(_grayscale(images, augmentation.gray_p, draw), augmentation, draw)
    return _grayscale(_jitter(images, augmentation, draw), augmentation.gray_p, draw)


def crop_boxes(
    n: int,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Boxes as ``RandomResizedCrop`` draws them, [n, 4] = (centre y, centre x, height, width) as shares of
    the image.

    Area uniform in ``scale``, aspect log-uniform in ``ratio``, the first of ten draws that fits; else the
    largest centred box within ``ratio``.
    """
    tries = torch.rand(2, 10, n, generator=generator)
    area = (scale[0] + (scale[1] - scale[0]) * tries[0]) * height * width
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * tries[1])
    h, w = (area / aspect).sqrt(), (area * aspect).sqrt()
    fits = (h <= height) & (w <= width)
    first = fits.int().argmax(0, keepdim=True)
    fallback = min(max(width / height, ratio[0]), ratio[1])
    h = torch.where(fits.any(0), h.gather(0, first)[0], min(height, width / fallback)) / height
    w = torch.where(fits.any(0), w.gather(0, first)[0], min(width, height * fallback)) / width
    y, x = torch.where(fits.any(0), torch.rand(2, n, generator=generator), 0.5)
    return torch.stack([h / 2 + y * (1 - h), w / 2 + x * (1 - w), h, w], dim=1)


class _Draws:
    """Random numbers per image, shaped to broadcast over [N, C, H, W]."""

    def __init__(self, n: int, generator: torch.Generator | None, device: torch.device) -> None:
        self.n, self.generator, self.device = n, generator, device

    def uniform(self, low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(self.n, 1, 1, 1, generator=self.generator)).to(self.device)

    def chance(self, p: float) -> Tensor:
        return self.uniform(0, 1) < p


def _resized_crop_and_flip(images: Tensor, a: Augmentation, draw: _Draws) -> Tensor:
    n, channels, height, width = images.shape
    box = crop_boxes(n, height, width, a.scale, a.ratio, draw.generator).to(images.device)
    mirror = torch.where(draw.chance(a.flip_p).flatten(), -1.0, 1.0)
    affine = images.new_zeros(n, 2, 3)  # output coordinates in [-1, 1] to input ones
    affine[:, 0, 0], affine[:, 0, 2] = box[:, 3] * mirror, 2 * box[:, 1] - 1
    affine[:, 1, 1], affine[:, 1, 2] = box[:, 2], 2 * box[:, 0] - 1
    grid = F.affine_grid(affine, [n, channels, a.size, a.size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _jitter(images: Tensor, a: Augmentation, draw: _Draws) -> Tensor:
    brightness, contrast, saturation, hue = a.jitter
    colour = images.shape[1] == 3
    original = images

    def factor(strength: float) -> Tensor:
        return draw.uniform(max(0.0, 1 - strength), 1 + strength)

    for step in torch.randperm(4, generator=draw.generator).tolist():
        if step == 0 and brightness:
            images = (images * factor(brightness)).clamp_(0, 1)
        elif step == 1 and contrast:
            mean = _luma(images).mean((1, 2, 3), keepdim=True)
            images = torch.lerp(mean, images, factor(contrast)).clamp_(0, 1)
        elif step == 2 and saturation and colour:
            images = torch.lerp(_luma(images), images, factor(saturation)).clamp_(0, 1)
        elif step == 3 and hue and colour:
            images = shift_hue(images, draw.uniform(-hue, hue))
    return torch.where(draw.chance(a.jitter_p), images, original)


def _grayscale(images: Tensor, p: float, draw: _Draws) -> Tensor:
    return images if images.shape[1] == 1 else torch.where(draw.chance(p), _luma(images), images)


def _luma(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    return (images * images.new_tensor(_GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """RGB images [N, 3, H, W] in [0, 1] turned around the HSV hue circle by ``shift`` (broadcast; in turns)."""
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, 1)
    sextant = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    turned = sextant + 6 * shift.flatten(1)[:, :, None]
    # A channel falls from `value` to `low` as the hue leaves it; each is a third of a turn from the next.
    offset = images.new_tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)
    position = (offset + turned[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(position, 4 - position).clamp_(0, 1)
