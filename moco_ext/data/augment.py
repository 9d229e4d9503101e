"""Random views of images: what a view may go through, and the code that makes whole batches of them.

Every image of a batch has its own random numbers, all of them a function of the image's own seed
(:mod:`.seeds`): a view does not depend on the batch, process or device it is made in. The same code serves batches in
memory, loader workers, and batches on a GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .seeds import uniforms

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma, as PIL's
_BLUR_FROM = 64  # pixels; below, a published blur would leave nothing to tell images apart
_TRIES = 10  # of RandomResizedCrop, before it settles for a crop at the centre
_BLUR_SIGMAS = 3  # where a kernel ends
_ORDERS = np.array(list(itertools.permutations(range(4))))  # [24, 4]
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
    if seeds.shape != images.shape[:1] or seeds.dtype != torch.int64:
        raise ValueError(f"seeds: expected int64 [{len(images)}], got {seeds.dtype} {list(seeds.shape)}")
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    return recolour(_resized_crop(images, augmentation, seeds), augmentation, seeds)


def file_crops(image: Tensor, augmentation: Augmentation, seeds: Tensor) -> list[Tensor]:
    """The crops of one decoded image, uint8 [3, H, W], that each of ``seeds`` asks for: uint8 [3, size, size] each."""
    from torchvision.transforms.v2.functional import resized_crop

    a, (height, width) = augmentation, image.shape[-2:]
    boxes = crop_boxes(_draws(seeds)["crop"], height, width, a.scale, a.ratio, whole=True)
    return [resized_crop(image, *box, size=[a.size, a.size], antialias=True) for box in boxes.astype(int).tolist()]


def recolour(images: Tensor, augmentation: Augmentation, seeds: Tensor) -> Tensor:
    """What follows the crop: jitter and grayscale, blur, flip.

    Args:
        images: uint8, or float32 in [0, 1], [N, C, H, W], C = 1 or 3, on any device.
        seeds: int64 [N] on the CPU, those of the crops.

    Returns:
        New images of the same shape, dtype and device; uint8 is rounded once, at the end.
    """
    choices = _Choices.of(augmentation, seeds, images.device)
    chunk = max(1, _CPU_CHUNK // images[:1].numel()) if images.is_cpu and len(images) else max(1, len(images))
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    for start in range(0, len(images), chunk):
        rows = slice(start, start + chunk)
        mine = choices.of_rows(rows)
        if images.dtype == torch.uint8:
            view = _recolour(images[rows].float().div_(255), augmentation, mine).mul_(255).round_()
            if view.is_cpu:  # a conversion that torch does value by value
                np.copyto(out[rows].numpy(), view.numpy(), casting="unsafe")
            else:
                out[rows] = view
        else:
            out[rows] = _recolour(images[rows].clone(), augmentation, mine)
    return out


def crop_boxes(
    draws: np.ndarray,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    whole: bool = False,
) -> np.ndarray:
    """Boxes as ``RandomResizedCrop`` draws them, in an image of ``height`` x ``width`` pixels.

    Area uniform in ``scale``, aspect log-uniform in ``ratio``, the first of ten draws that fits; else the largest
    centred box within ``ratio``.

    Args:
        draws: [N, 22] uniform in [0, 1).
        whole: round to whole pixels, as is published; else fractions of pixels, which small images need.

    Returns:
        [N, 4]: top, left, height, width in pixels.
    """
    area = (scale[0] + (scale[1] - scale[0]) * draws[:, :_TRIES]) * (height * width)
    aspect = np.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * draws[:, _TRIES : 2 * _TRIES])
    rounded = np.round if whole else np.asarray
    sides = rounded(np.sqrt(np.stack([area / aspect, area * aspect])))  # [2, N, 10]
    room = np.array([[height], [width]])
    fits = np.all((sides <= room[..., None]) & (sides > 0), axis=0)
    aspect_then = min(max(width / height, ratio[0]), ratio[1])
    centred = rounded(np.array([[min(height, width / aspect_then)], [min(width, height * aspect_then)]]))
    any_fits, rows = np.any(fits, axis=1), np.arange(len(draws))
    sides = np.where(any_fits, sides[:, rows, fits.argmax(1)], centred)  # [2, N]
    place = np.where(any_fits, draws[:, 2 * _TRIES :].T, 0.5)
    corner = np.floor(place * (room - sides + 1)) if whole else place * (room - sides)
    return np.concatenate([corner, sides]).T


def _draws(seeds: Tensor) -> dict[str, np.ndarray]:
    """The random numbers of N views, and what each is for: uniform in [0, 1), [N, ...]."""
    numbers = uniforms(seeds, 2 * _TRIES + 12)
    names = ("flip", "gray", "jitter", "order", "blur", "sigma")
    named = {name: numbers[:, 2 * _TRIES + 6 + i] for i, name in enumerate(names)}
    return named | {"crop": numbers[:, : 2 * _TRIES + 2], "factors": numbers[:, 2 * _TRIES + 2 :][:, :4]}


class _Choices(NamedTuple):
    """What happens to each of N views after its crop.

    Which rows a step applies to is known on the CPU, so that a GPU is never asked; the steps' parameters are on the
    images' device.
    """

    gray: np.ndarray  # [N] bool
    order: np.ndarray  # [N, 4] which of the jitter's steps comes first, second, ...; -1: none
    factors: Tensor  # [N, 4, 1, 1, 1] of brightness, contrast, saturation; turns of hue
    radius: np.ndarray  # [N] of the blur's kernel, in pixels; 0: no blur
    kernels: Tensor  # [N, 2 r + 1], r the largest radius that can be drawn
    flip: np.ndarray  # [N] bool

    @staticmethod
    def of(a: Augmentation, seeds: Tensor, device: torch.device) -> _Choices:
        draws = _draws(seeds)
        strengths = np.array(a.jitter)
        middle = np.array([1, 1, 1, 0])  # factors around 1, turns around 0
        low, high = np.maximum(middle - strengths, middle - 1), middle + strengths
        factors = torch.from_numpy((low + (high - low) * draws["factors"]).astype(np.float32))
        orders = _ORDERS[(draws["order"] * len(_ORDERS)).astype(int)]
        order = np.where((draws["jitter"] < a.jitter_p)[:, None], orders, -1)
        sigma = a.blur_sigma[0] + (a.blur_sigma[1] - a.blur_sigma[0]) * draws["sigma"]
        radius = np.where(draws["blur"] < a.blur_p, np.ceil(_BLUR_SIGMAS * sigma), 0).astype(int)
        kernels = gaussian_kernels(torch.from_numpy(sigma), math.ceil(_BLUR_SIGMAS * a.blur_sigma[1]))
        on_device = [values.to(device, non_blocking=True) for values in (factors.view(-1, 4, 1, 1, 1), kernels)]
        return _Choices(draws["gray"] < a.gray_p, order, on_device[0], radius, on_device[1], draws["flip"] < a.flip_p)

    def of_rows(self, rows: slice) -> _Choices:
        gray, order, factors, radius, kernels, flip = self
        return _Choices(gray[rows], order[rows], factors[rows], radius[rows], kernels[rows], flip[rows])


def _recolour(images: Tensor, a: Augmentation, choices: _Choices) -> Tensor:
    """float32 images, overwritten."""
    colour = images.shape[1] == 3
    if colour and a.gray_first:
        images = _on_rows(images, choices.gray, _grayscale)
    for place, step in itertools.product(range(4), range(4)):
        chosen = choices.order[:, place] == step
        if step >= 2 and a.gray_first:
            chosen &= ~choices.gray  # which have no saturation and no hue to change
        if a.jitter[step] and (colour or step < 2):
            images = _on_rows(images, chosen, _JITTERS[step], choices.factors[:, step])
    if colour and not a.gray_first:
        images = _on_rows(images, choices.gray, _grayscale)
    spare = choices.kernels.shape[1] // 2 - int(choices.radius.max())  # taps that are zero in every kernel
    kernels = choices.kernels[:, spare : choices.kernels.shape[1] - spare]
    images = _on_rows(images, choices.radius > 0, blur, kernels)
    return _on_rows(images, choices.flip, lambda rows: rows.flip(3))


def _on_rows(images: Tensor, chosen: np.ndarray, step: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """``step`` on those rows alone, with their rows of the parameters; may overwrite ``images``."""
    count = np.count_nonzero(chosen)
    if count == 0:
        return images
    if count == len(images):
        return step(images, *parameters)
    index = torch.from_numpy(np.flatnonzero(chosen)).to(images.device, non_blocking=True)
    rows = (values.index_select(0, index) for values in (images, *parameters))
    return images.index_copy_(0, index, step(*rows))


def _grayscale(images: Tensor) -> Tensor:
    return _luma(images).repeat(1, 3, 1, 1)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return images.mul_(factor).clamp_(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    # Row sums first: a sum over all pixels is cut up by the number of threads, and its last bit with it.
    mean = _luma(images).mean(3, keepdim=True).mean(2, keepdim=True)
    return images.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_luma(images), images, factor).clamp_(0, 1)


def _luma(images: Tensor) -> Tensor:
    """[N, 1 or 3, H, W] -> [N, 1, H, W]"""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return (red * _GREY[0]).add_(green, alpha=_GREY[1]).add_(blue, alpha=_GREY[2])


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """RGB images [N, 3, H, W] in [0, 1] turned around the HSV hue circle by ``shift`` [N or 1, 1, 1, 1], in turns."""
    red, green, blue = images.unbind(1)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = torch.maximum(torch.maximum(red, green), blue).sub_(low)
    # The hue in sixths of a turn from red, -3 to 3. Its distance from red is 1 + green + blue - red, once low is 0 and
    # chroma 1, in all six sextants; its side is green's or blue's. No case has to be told from another.
    hue = (green + blue).sub_(red).sub_(low).div_(chroma.clamp_min(1e-12)).add_(1)
    hue = torch.copysign(hue, green - blue).add_(6 * shift.flatten(1)[:, :, None])
    hue.sub_((hue / 6).floor_(), alpha=6)
    # A channel is at low + chroma within a sixth of its own hue, and at low beyond two: red's distance is taken from
    # the opposite hue, so that none crosses 0.
    share = torch.empty_like(images)
    for channel, centre in enumerate((3, 2, 4)):
        distance = torch.sub(hue, centre, out=share[:, channel]).abs_()
        torch.sub(*((distance, 1) if channel == 0 else (2, distance)), out=distance)
    share.clamp_(0, 1)
    return torch.addcmul(low[:, None], chroma[:, None], share)


_JITTERS = (_brightness, _contrast, _saturation, shift_hue)


def gaussian_kernels(sigmas: Tensor, radius: int) -> Tensor:
    """Gaussians sampled at whole pixels up to three sigmas, sum 1: sigmas [N] -> float32 [N, 2 radius + 1]."""
    at = torch.arange(-radius, radius + 1)
    exponents = -0.5 * (at / sigmas[:, None]).square()
    beyond = at.abs() > (_BLUR_SIGMAS * sigmas).ceil()[:, None]
    return torch.softmax(exponents.masked_fill_(beyond, -math.inf), dim=1).float()


def blur(images: Tensor, kernels: Tensor) -> Tensor:
    """Each of [N, C, H, W] convolved along both axes with its own kernel of [N, k], k odd; edges continue outwards.

    Outwards as in PIL, whose blur the published training uses.
    """
    taps = kernels.shape[1]
    weights = kernels.view(len(kernels), taps, 1, 1, 1).unbind(1)
    images = F.pad(images, (taps // 2,) * 4, mode="replicate")
    for dim in (3, 2):  # shifted sums: with a kernel an image, faster than a grouped convolution
        size = images.shape[dim] - taps + 1
        total = images.narrow(dim, 0, size) * weights[0]
        for place in range(1, taps):
            total.addcmul_(images.narrow(dim, place, size), weights[place])
        images = total
    return images


def _resized_crop(images: Tensor, a: Augmentation, seeds: Tensor) -> Tensor:
    height, width = images.shape[2:]
    boxes = torch.from_numpy(crop_boxes(_draws(seeds)["crop"], height, width, a.scale, a.ratio)).float()
    # An output pixel's centre, as a share of the box; then where it lies in the image, from -1 to 1.
    centres = (torch.arange(a.size) + 0.5) / a.size
    y, x = ((boxes[:, i, None] + boxes[:, i + 2, None] * centres) * 2 / (height, width)[i] - 1 for i in (0, 1))
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)  # [N, size, size, 2]
    return F.grid_sample(images, grid.to(images.device, non_blocking=True), padding_mode="border", align_corners=False)
