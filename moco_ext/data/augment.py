"""Random views of images: what a view may go through, and the code that makes whole batches of them.

Every image of a batch has its own random numbers, all of them a function of the image's own seed
(:mod:`.draws`): a view does not depend on the batch, process or device it is made in. The same code serves batches in
memory, loader workers, and batches on a GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .draws import uniforms

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma, as torchvision's grayscale
_BLUR_FROM = 64  # pixels; below, a published blur would leave nothing to tell images apart
_TRIES = 10  # of RandomResizedCrop, before it settles for a crop at the centre
_CPU_CHUNK = 2**18  # values; steps over them follow each other in the cache


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What a view may go through: crop, then jitter and grayscale, blur, flip.

    ``scale`` and ``ratio`` are those of ``RandomResizedCrop`` (share of the area, width / height); ``gray_first`` says
    whether colour is dropped before it is jittered or after; ``jitter`` holds the strengths of brightness, contrast,
    saturation and hue, ``*_p`` the probability of each step, and ``blur_sigma`` the range of the Gaussian's sigma in
    pixels.
    """

    size: int
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    gray_first: bool = True
    gray_p: float = 0.2
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.4)
    jitter_p: float = 1.0
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    flip_p: float = 0.5

    @staticmethod
    def v1(size: int, **changes: Any) -> Augmentation:
        """MoCo v1 (arXiv 1911.05722, section 3.3): crop, grayscale, colour jitter, flip."""
        return Augmentation(size, **changes)

    @staticmethod
    def v2(size: int, **changes: Any) -> Augmentation:
        """MoCo v2 (arXiv 2003.04297, ``--aug-plus``): jitter with a milder hue and p 0.8, then grayscale, and blur.

        Blur is left out below 64 pixels.
        """
        v2: dict[str, Any] = {
            "gray_first": False,
            "jitter": (0.4, 0.4, 0.4, 0.1),
            "jitter_p": 0.8,
            "blur_p": 0.5 if size >= _BLUR_FROM else 0.0,
        }
        return Augmentation(size, **(v2 | changes))

    @staticmethod
    def supervised(size: int, *, crop_min: float = 0.08, flip_p: float = 0.5) -> Augmentation:
        """What classifiers are trained with: crop and flip."""
        return Augmentation(size, (crop_min, 1.0), jitter=(0.0,) * 4, jitter_p=0.0, gray_p=0.0, flip_p=flip_p)


class TwoCropsTransform:
    """Two independent draws of ``base_transform`` on one image: ``[q, k]``."""

    def __init__(self, base_transform: Callable) -> None:
        self.base_transform = base_transform

    def __call__(self, image) -> list:
        return [self.base_transform(image), self.base_transform(image)]


class _Draws:
    """The random numbers of N views, one row of uniform ones each; what each of them is for stands here."""

    def __init__(self, seeds: Tensor) -> None:
        crop, self.flip, self.gray, self.jitter, self.order, self.factors, self.blur, self.sigma = uniforms(
            seeds, 2 * _TRIES + 12
        ).split([2 * _TRIES + 2, 1, 1, 1, 1, 4, 1, 1], dim=1)
        self.crop = crop


def augment_batch(images: Tensor, augmentation: Augmentation, seeds: Tensor) -> Tensor:
    """One view of each image in memory.

    Args:
        images: uint8 or floating (then in [0, 1]) [N, C, H, W], C = 1 or 3, on any device.
        seeds: int64 [N] on the CPU, one a view.

    Returns:
        float32 [N, C, size, size] in [0, 1], on the images' device.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images: expected shape [N, 1 or 3, H, W], got {list(images.shape)}")
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    return recolour(_resized_crop(images, augmentation, seeds), augmentation, seeds)


def crop_boxes(
    draws: Tensor,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    whole: bool = False,
) -> Tensor:
    """Boxes as ``RandomResizedCrop`` draws them, in an image of ``height`` x ``width`` pixels.

    Area uniform in ``scale``, aspect log-uniform in ``ratio``, the first of ten draws that fits; else the largest
    centred box within ``ratio``.

    Args:
        draws: [N, 22] uniform in [0, 1).
        whole: round to whole pixels, as is published; else fractions of pixels, which small images need.

    Returns:
        [N, 4] float32: top, left, height, width in pixels.
    """
    area = (scale[0] + (scale[1] - scale[0]) * draws[:, :_TRIES]) * height * width
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * draws[:, _TRIES : 2 * _TRIES])
    h, w = (area / aspect).sqrt(), (area * aspect).sqrt()  # [N, 10]
    if whole:
        h, w = h.round(), w.round()
    fits = (h <= height) & (w <= width) & (h > 0) & (w > 0)
    first, any_fits = fits.int().argmax(1, keepdim=True), fits.any(1)
    fallback = min(max(width / height, ratio[0]), ratio[1])
    h = torch.where(any_fits, h.gather(1, first)[:, 0], min(height, width / fallback))
    w = torch.where(any_fits, w.gather(1, first)[:, 0], min(width, height * fallback))
    y, x = torch.where(any_fits, draws[:, 2 * _TRIES :].T, 0.5)
    if whole:
        h, w = h.round(), w.round()
        return torch.stack([(y * (height - h + 1)).floor(), (x * (width - w + 1)).floor(), h, w], dim=1)
    return torch.stack([y * (height - h), x * (width - w), h, w], dim=1)


def file_crops(image: Tensor, augmentation: Augmentation, seeds: Tensor) -> list[Tensor]:
    """The crops of one decoded image, uint8 [3, H, W], that each of ``seeds`` asks for: uint8 [3, size, size] each."""
    from torchvision.transforms.v2.functional import resized_crop

    a, (height, width) = augmentation, image.shape[-2:]
    boxes = crop_boxes(_Draws(seeds).crop, height, width, a.scale, a.ratio, whole=True)
    return [resized_crop(image, *box, size=[a.size, a.size], antialias=True) for box in boxes.int().tolist()]


def recolour(images: Tensor, augmentation: Augmentation, seeds: Tensor) -> Tensor:
    """What follows the crop: jitter, grayscale, blur, flip.

    Args:
        images: uint8, or float32 in [0, 1], [N, C, H, W], C = 1 or 3, on any device.
        seeds: int64 [N] on the CPU, those of the crops.

    Returns:
        New images of the same shape, dtype and device; uint8 is rounded once, at the end.
    """
    per_image = max(images[0].numel(), 1) if len(images) else 1
    rows = max(1, _CPU_CHUNK // per_image) if images.device.type == "cpu" else max(1, len(images))
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    for part, part_seeds, target in zip(images.split(rows), seeds.split(rows), out.split(rows), strict=True):
        if images.dtype == torch.uint8:
            target.copy_(_recolour(part / 255, augmentation, part_seeds).mul_(255).round_())
        else:
            target.copy_(_recolour(part.clone(), augmentation, part_seeds))
    return out


def _recolour(images: Tensor, a: Augmentation, seeds: Tensor) -> Tensor:
    """float32 images, overwritten."""
    draws = _Draws(seeds)
    gray = draws.gray[:, 0] < a.gray_p

    def grayscale(images: Tensor) -> Tensor:
        if images.shape[1] == 1:
            return images
        return _on_rows(images, gray, lambda rows, _: _luma(rows).repeat(1, 3, 1, 1))

    if a.gray_first:
        images = grayscale(images)
    images = _jitter(images, a, draws)
    if not a.gray_first:
        images = grayscale(images)
    sigmas = a.blur_sigma[0] + (a.blur_sigma[1] - a.blur_sigma[0]) * draws.sigma[:, 0]
    kernels = gaussian_kernels(sigmas, math.ceil(3 * a.blur_sigma[1])) if a.blur_p > 0 else sigmas
    images = _on_rows(images, draws.blur[:, 0] < a.blur_p, lambda rows, at: blur(rows, kernels[at].to(rows.device)))
    return _on_rows(images, draws.flip[:, 0] < a.flip_p, lambda rows, _: rows.flip(3))


def _on_rows(images: Tensor, chosen: Tensor, step: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``step(rows, indices)`` in place of the chosen rows; ``chosen`` bool [N] on the CPU, so that no GPU is asked."""
    at = chosen.nonzero()[:, 0]
    if len(at) == 0:
        return images
    if len(at) == len(images):
        return step(images, at)
    index = at.to(images.device, non_blocking=True)
    return images.index_copy_(0, index, step(images.index_select(0, index), at))


_ORDERS = torch.tensor(list(itertools.permutations(range(4))))  # [24, 4]


def _jitter(images: Tensor, a: Augmentation, draws: _Draws) -> Tensor:
    """Brightness, contrast, saturation and hue in an order drawn per image."""
    strengths = torch.tensor(a.jitter)
    low = torch.cat([(1 - strengths[:3]).clamp_min(0), -strengths[3:]])
    high = torch.cat([1 + strengths[:3], strengths[3:]])
    factors = low + (high - low) * draws.factors  # [N, 4]
    orders = _ORDERS[(draws.order[:, 0] * len(_ORDERS)).long()]  # [N, 4]
    applied = draws.jitter[:, 0] < a.jitter_p
    steps = [step for step in range(4) if a.jitter[step] and (step < 2 or images.shape[1] == 3)]
    for place, step in itertools.product(range(4), steps):

        def turn(rows: Tensor, at: Tensor, step: int = step) -> Tensor:
            return _JITTERS[step](rows, factors[at, step].to(rows.device, non_blocking=True).view(-1, 1, 1, 1))

        images = _on_rows(images, applied & (orders[:, place] == step), turn)
    return images


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return images.mul_(factor).clamp_(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    # Row sums first: a sum over all pixels is cut up by the number of threads, and its last bit with it.
    mean = _luma(images).mean(3, keepdim=True).mean(2, keepdim=True)
    return torch.lerp(mean, images, factor).clamp_(0, 1)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_luma(images), images, factor).clamp_(0, 1)


def _luma(images: Tensor) -> Tensor:
    """[N, 1 or 3, H, W] -> [N, 1, H, W]"""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return (red * _GREY[0]).add_(green, alpha=_GREY[1]).add_(blue, alpha=_GREY[2])


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


_JITTERS = (_brightness, _contrast, _saturation, shift_hue)


def gaussian_kernels(sigmas: Tensor, radius: int) -> Tensor:
    """Gaussians sampled at whole pixels, sum 1: sigmas [N] in pixels -> [N, 2 radius + 1]."""
    at = torch.arange(-radius, radius + 1)
    return torch.softmax(-0.5 * (at / sigmas[:, None]).square(), dim=1)


def blur(images: Tensor, kernels: Tensor) -> Tensor:
    """Each image [C, H, W] convolved along both axes with its own kernel [k], k odd; edges continue outwards.

    Outwards as in PIL, whose blur the published training uses.
    """
    n, channels, height, width = images.shape
    radius = kernels.shape[1] // 2
    groups = n * channels
    kernels = kernels.to(images.device).repeat_interleave(channels, dim=0)
    images = F.pad(images, (radius,) * 4, mode="replicate").view(1, groups, height + 2 * radius, width + 2 * radius)
    images = F.conv2d(images, kernels.view(groups, 1, 1, -1), groups=groups)
    return F.conv2d(images, kernels.view(groups, 1, -1, 1), groups=groups).view(n, channels, height, width)


def _resized_crop(images: Tensor, a: Augmentation, seeds: Tensor) -> Tensor:
    height, width = images.shape[2:]
    boxes = crop_boxes(_Draws(seeds).crop, height, width, a.scale, a.ratio)
    # An output pixel's centre, as a share of the box; then where it lies in the image, from -1 to 1.
    centres = (torch.arange(a.size) + 0.5) / a.size
    y, x = ((boxes[:, i, None] + boxes[:, i + 2, None] * centres) * 2 / (height, width)[i] - 1 for i in (0, 1))
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)  # [N, size, size, 2]
    return F.grid_sample(images, grid.to(images.device), padding_mode="border", align_corners=False)
