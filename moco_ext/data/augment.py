"""Random views of images, a batch at a time.

Each image has its own random numbers, which follow from its seed (:mod:`.seeds`): a view does not depend on the batch,
process or device it is made in. The same code runs on images in memory, in loader workers and on a GPU.
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

from ..ops import color_steps
from .seeds import uniforms

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in PIL
_MIN_BLURRED = 64  # pixels; the official blur would erase a smaller image
_TRIES = 10  # of RandomResizedCrop, before it falls back to a center crop
_CROP_NUMBERS = 2 * _TRIES + 2  # a view's first random numbers; the next 11 are those of colors, blur and flip
_ROTATE = _CROP_NUMBERS + 11  # where the random numbers of rotation, erasing and elastic deformation start
_ERASE = _ROTATE + 1
_ELASTIC = _ERASE + 1 + _CROP_NUMBERS
_ELASTIC_SIGMA = 5.0  # pixels, as in torchvision
_BLUR_SIGMAS = 3  # a kernel's radius
_ORDERS = np.array(list(itertools.permutations(range(4))))  # [24, 4]
_CPU_CHUNK = 2**18  # values; so few stay in the cache from step to step


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Parameters of the random crop, color jitter, grayscale, blur, flip and deformations that make a view.

    Attributes:
        size: side of a view in pixels.
        scale: of ``RandomResizedCrop``: range of the crop's share of the area.
        ratio: of ``RandomResizedCrop``: range of width / height.
        gray_first: apply grayscale before the jitter, rather than after it.
        gray_p: probability of grayscale.
        jitter: strengths of brightness, contrast, saturation and hue, as for ``ColorJitter``.
        jitter_p: probability of the jitter.
        blur_p: probability of the Gaussian blur.
        blur_sigma: range of the Gaussian's sigma in pixels.
        solarize_p: probability of solarization: values of 0.5 and above are inverted.
        flip_p: probability of a horizontal flip.
        rotate: largest rotation in degrees, in either direction; the edge pixels fill the corners.
        elastic: strength of the elastic deformation, alpha of torchvision's ``ElasticTransform`` with sigma 5.
        erase_p: probability that a box is set to 0, of the sizes of torchvision's ``RandomErasing``.
        second: of the second of two views, if it differs.
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
    solarize_p: float = 0.0
    flip_p: float = 0.5
    rotate: float = 0.0
    elastic: float = 0.0
    erase_p: float = 0.0
    second: Augmentation | None = None

    @staticmethod
    def v1(size: int, **changes: Any) -> Augmentation:
        """MoCo v1 (arXiv 1911.05722, section 3.3): crop, grayscale, color jitter, flip."""
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
            "blur_p": 0.5 if size >= _MIN_BLURRED else 0.0,
        }
        return Augmentation(size, **(v2 | changes))

    @staticmethod
    def byol(size: int, **changes: Any) -> Augmentation:
        """MoCo v3 (arXiv 2104.02057), after BYOL: as v2 with a milder saturation; the first view is always blurred, the
        second with p 0.1, and solarized with p 0.2.

        Blur is left out below 64 pixels.
        """
        view = Augmentation.v2(size, **({"jitter": (0.4, 0.4, 0.2, 0.1)} | changes))
        blur = 1.0 if size >= _MIN_BLURRED else 0.0
        second = dataclasses.replace(view, blur_p=0.1 * blur, solarize_p=0.2)
        return dataclasses.replace(view, blur_p=blur, second=second)

    @staticmethod
    def supervised(size: int, *, crop_min: float = 0.08, flip_p: float = 0.5) -> Augmentation:
        """The standard augmentation for training a classifier: crop and flip."""
        return Augmentation(size, (crop_min, 1.0), jitter=(0.0,) * 4, jitter_p=0.0, gray_p=0.0, flip_p=flip_p)


class TwoCropsTransform:
    """Apply ``base_transform`` to one image twice: ``[q, k]``."""

    def __init__(self, base_transform: Callable) -> None:
        self.base_transform = base_transform

    def __call__(self, image) -> list:
        return [self.base_transform(image), self.base_transform(image)]


def augment_batch(images: Tensor, augmentation: Augmentation, seeds: Tensor) -> Tensor:
    """Make one view of each image: crop, then :func:`color_transform`.

    Args:
        images: uint8, or floating-point in [0, 1], [N, C, H, W], C = 1 or 3, on any device.
        seeds: int64 [N] on the CPU, one per view.

    Returns:
        float32 [N, C, size, size] in [0, 1], on the same device.

    Raises:
        ValueError: images or seeds of another shape or dtype.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images: expected shape [N, 1 or 3, H, W], got {list(images.shape)}")
    if seeds.shape != images.shape[:1] or seeds.dtype != torch.int64:
        raise ValueError(f"seeds: expected int64 [{len(images)}], got {seeds.dtype} {list(seeds.shape)}")
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    return color_transform(_resized_crop(images, augmentation, seeds), augmentation, seeds)


def of_each_view(
    transform: Callable[[Tensor, Augmentation, Tensor], Tensor],
    images: Tensor,
    augmentation: Augmentation,
    seeds: Tensor,
) -> Tensor:
    """Apply :func:`augment_batch` or :func:`color_transform` to [2n, ...] images, n of each view."""
    if augmentation.second is None:
        return transform(images, augmentation, seeds)
    views = zip(images.chunk(2), (augmentation, augmentation.second), seeds.chunk(2), strict=True)
    return torch.cat([transform(*view) for view in views])


def file_crops(image: Tensor, augmentation: Augmentation, seeds: Tensor) -> list[Tensor]:
    """Crop one decoded image, uint8 [3, H, W], once for each of ``seeds``: uint8 [3, size, size] each."""
    a, (height, width) = augmentation, image.shape[-2:]
    boxes = crop_boxes(uniforms(seeds, _CROP_NUMBERS), height, width, a.scale, a.ratio, whole=True)
    size = (a.size, a.size)  # not by torchvision's resized_crop, whose own checks take 10 % of the time
    return [
        F.interpolate(image[None, :, top : top + h, left : left + w], size, mode="bilinear", antialias=True)[0]
        for top, left, h, w in boxes.astype(int).tolist()
    ]


def color_transform(images: Tensor, augmentation: Augmentation, seeds: Tensor) -> Tensor:
    """Apply what follows the crop: rotation and elastic deformation, jitter and grayscale, blur, solarization, flip and
    erasing.

    Args:
        images: uint8, or float32 in [0, 1], [N, C, H, W], C = 1 or 3, on any device.
        seeds: int64 [N] on the CPU, the same as for the crops.

    Returns:
        New images of the same shape, dtype and device. uint8 images are rounded once, at the end.
    """
    choices = _Choices.of(augmentation, seeds, images.device)
    if images.is_cpu and images.dtype == torch.uint8 and images.shape[1] == 3 and choices.moves_no_pixels:
        return color_steps(images, choices.steps(augmentation), choices.factors.flatten(1), choices.kernels)
    chunk = max(1, _CPU_CHUNK // images[:1].numel()) if images.is_cpu and len(images) else max(1, len(images))
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    for start in range(0, len(images), chunk):
        rows = slice(start, start + chunk)
        mine = choices.of_rows(rows)
        if images.dtype == torch.uint8:
            view = _transform_colors(images[rows].float().div_(255), augmentation, mine).mul_(255).round_()
            if view.is_cpu:  # torch's conversion is not vectorized
                np.copyto(out[rows].numpy(), view.numpy(), casting="unsafe")
            else:
                out[rows] = view
        else:
            out[rows] = _transform_colors(images[rows].clone(), augmentation, mine)
    return out


def crop_boxes(
    numbers: np.ndarray,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    whole: bool = False,
) -> np.ndarray:
    """Random boxes as in ``RandomResizedCrop``, in an image of ``height`` x ``width`` pixels.

    Area uniform in ``scale``, aspect log-uniform in ``ratio``, the first of ten tries that fits; else the largest
    center box within ``ratio``.

    Args:
        numbers: [N, 22] uniform in [0, 1).
        whole: round to whole pixels, as torchvision does; small images need fractions.

    Returns:
        [N, 4]: top, left, height, width in pixels.
    """
    area = (scale[0] + (scale[1] - scale[0]) * numbers[:, :_TRIES]) * (height * width)
    aspect = np.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * numbers[:, _TRIES : 2 * _TRIES])
    rounded = np.round if whole else np.asarray
    sides = rounded(np.sqrt(np.stack([area / aspect, area * aspect])))  # [2, N, 10]
    room = np.array([[height], [width]])
    fits = np.all((sides <= room[..., None]) & (sides > 0), axis=0)
    aspect_then = min(max(width / height, ratio[0]), ratio[1])
    centered = rounded(np.array([[min(height, width / aspect_then)], [min(width, height * aspect_then)]]))
    any_fits, rows = np.any(fits, axis=1), np.arange(len(numbers))
    sides = np.where(any_fits, sides[:, rows, fits.argmax(1)], centered)  # [2, N]
    place = np.where(any_fits, numbers[:, 2 * _TRIES :].T, 0.5)
    corner = np.floor(place * (room - sides + 1)) if whole else place * (room - sides)
    return np.concatenate([corner, sides]).T


class _Choices(NamedTuple):
    """The random parameters of each of N views after its crop.

    Which rows a step applies to is decided on the CPU, without a GPU sync; the steps' parameters are on the images'
    device.
    """

    gray: np.ndarray  # [N] bool
    order: np.ndarray  # [N, 4] the jitter's first, second, ... step; -1: none
    factors: Tensor  # [N, 4, 1, 1, 1] of brightness, contrast, saturation; the hue's shift in turns
    radius: np.ndarray  # [N] of the blur kernel, in pixels; 0: no blur
    kernels: Tensor  # [N, 2 r + 1], r the largest possible radius
    flip: np.ndarray  # [N] bool
    solarize: np.ndarray  # [N] bool
    grid: Tensor | None  # [N, size, size, 2] where pixels are sampled, for grid_sample
    erased: Tensor | None  # [N, 1, size, size] bool

    @staticmethod
    def of(a: Augmentation, seeds: Tensor, device: torch.device) -> _Choices:
        numbers = uniforms(seeds, 11, start=_CROP_NUMBERS)
        flip, gray, jitter, order, blurred, sigma, solarized = numbers[:, 4:].T
        strengths = np.array(a.jitter)
        middle = np.array([1, 1, 1, 0])  # factors around 1, turns around 0
        low, high = np.maximum(middle - strengths, middle - 1), middle + strengths
        factors = torch.from_numpy((low + (high - low) * numbers[:, :4]).astype(np.float32))
        steps = _ORDERS[(order * len(_ORDERS)).astype(int)]
        steps = np.where((jitter < a.jitter_p)[:, None], steps, -1)
        sigmas = a.blur_sigma[0] + (a.blur_sigma[1] - a.blur_sigma[0]) * sigma
        radius = np.where(blurred < a.blur_p, np.ceil(_BLUR_SIGMAS * sigmas), 0).astype(int)
        kernels = gaussian_kernels(torch.from_numpy(sigmas), math.ceil(_BLUR_SIGMAS * a.blur_sigma[1]))
        on_device = [values.to(device, non_blocking=True) for values in (factors.view(-1, 4, 1, 1, 1), kernels)]
        applied = gray < a.gray_p, flip < a.flip_p, solarized < a.solarize_p
        grid = _deformed_grid(a, seeds).to(device, non_blocking=True) if a.rotate or a.elastic else None
        erased = _erased(a, seeds).to(device, non_blocking=True) if a.erase_p else None
        return _Choices(applied[0], steps, on_device[0], radius, on_device[1], *applied[1:], grid, erased)

    @property
    def moves_no_pixels(self) -> bool:
        return self.grid is None and self.erased is None

    def steps(self, a: Augmentation) -> Tensor:
        """The steps of each view in order, as :func:`moco_ext.ops.color_steps` numbers them: int64 [N, 9]."""
        jitter = np.where(np.array(a.jitter)[self.order] == 0, -1, self.order)
        if a.gray_first:  # grayscale has no saturation and no hue
            jitter = np.where(self.gray[:, None] & (jitter >= 2), -1, jitter)
        gray, *others = (
            np.where(chosen, step, -1)
            for step, chosen in enumerate((self.gray, self.radius > 0, self.solarize, self.flip), start=4)
        )
        columns = [gray, *jitter.T] if a.gray_first else [*jitter.T, gray]
        return torch.from_numpy(np.stack([*columns, *others], axis=1))

    def of_rows(self, rows: slice) -> _Choices:
        return _Choices._make(values if values is None else values[rows] for values in self)


def _transform_colors(images: Tensor, a: Augmentation, choices: _Choices) -> Tensor:
    """float32 images, overwritten."""
    if choices.grid is not None:
        images = F.grid_sample(images, choices.grid, padding_mode="border", align_corners=False)
    color = images.shape[1] == 3
    if color and a.gray_first:
        images = _on_rows(images, choices.gray, _grayscale)
    for place, step in itertools.product(range(4), range(4)):
        chosen = choices.order[:, place] == step
        if step >= 2 and a.gray_first:
            chosen &= ~choices.gray  # grayscale has no saturation and no hue
        if a.jitter[step] and (color or step < 2):
            images = _on_rows(images, chosen, _JITTERS[step], choices.factors[:, step])
    if color and not a.gray_first:
        images = _on_rows(images, choices.gray, _grayscale)
    spare = choices.kernels.shape[1] // 2 - int(choices.radius.max())  # outer taps, zero in every kernel
    kernels = choices.kernels[:, spare : choices.kernels.shape[1] - spare]
    images = _on_rows(images, choices.radius > 0, blur, kernels)
    images = _on_rows(images, choices.solarize, _solarize)
    images = _on_rows(images, choices.flip, lambda rows: rows.flip(3))
    return images if choices.erased is None else images.masked_fill_(choices.erased, 0)


def _deformed_grid(a: Augmentation, seeds: Tensor) -> Tensor:
    """Where the pixels of each view are sampled, in the coordinates of grid_sample: float32 [N, size, size, 2]."""
    angle = np.radians(a.rotate) * (2 * uniforms(seeds, 1, start=_ROTATE).astype(np.float64) - 1)
    cos, sin = (torch.from_numpy(values.astype(np.float32))[:, :, None] for values in (np.cos(angle), np.sin(angle)))
    x = (torch.arange(a.size) + 0.5) * 2 / a.size - 1
    y = x[:, None]
    grid = torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)
    if a.elastic:
        noise = torch.from_numpy(2 * uniforms(seeds, 2 * a.size**2, start=_ELASTIC) - 1)
        kernel = gaussian_kernels(torch.tensor([_ELASTIC_SIGMA]), math.ceil(_BLUR_SIGMAS * _ELASTIC_SIGMA))
        shifts = blur(noise.view(-1, 2, a.size, a.size), kernel.expand(len(noise), -1))
        grid += shifts.permute(0, 2, 3, 1) * (a.elastic / a.size)
    return grid


def _erased(a: Augmentation, seeds: Tensor) -> Tensor:
    """Bool [N, 1, size, size]: the pixels of each view that are erased."""
    numbers = uniforms(seeds, 1 + _CROP_NUMBERS, start=_ERASE)
    boxes = crop_boxes(numbers[:, 1:], a.size, a.size, (0.02, 0.33), (0.3, 3.3), whole=True)
    top, left, height, width = boxes.T[..., None]
    at = np.arange(a.size)
    inside = ((at >= top) & (at < top + height))[:, :, None] & ((at >= left) & (at < left + width))[:, None]
    return torch.from_numpy((inside & (numbers[:, :1, None] < a.erase_p))[:, None])


def _on_rows(images: Tensor, chosen: np.ndarray, step: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """Apply ``step`` to the chosen rows, with their rows of the parameters; may overwrite ``images``."""
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


def _solarize(images: Tensor) -> Tensor:
    return torch.where(images < 0.5, images, 1 - images)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return images.mul_(factor).clamp_(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    # Rows first: how a sum over all pixels is split, and so its last bit, depends on the number of threads.
    mean = _luma(images).mean(3, keepdim=True).mean(2, keepdim=True)
    return images.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_luma(images), images, factor).clamp_(0, 1)


def _luma(images: Tensor) -> Tensor:
    """[N, 1 or 3, H, W] -> [N, 1, H, W]"""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue of RGB images [N, 3, H, W] in [0, 1] by ``shift`` [N or 1, 1, 1, 1], in turns of the HSV circle."""
    red, green, blue = images.unbind(1)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = torch.maximum(torch.maximum(red, green), blue).sub_(low)
    # The hue in sixths of a turn from red, -3 to 3. With low 0 and chroma 1, its distance from red is
    # 1 + green + blue - red in all six sextants, and its sign that of green - blue: no case distinction.
    hue = (green + blue).sub_(red).sub_(low).div_(chroma.clamp_min(1e-12)).add_(1)
    hue = torch.copysign(hue, green - blue).add_(6 * shift.flatten(1)[:, :, None])
    hue.sub_((hue / 6).floor_(), alpha=6)
    # A channel is low + chroma up to a sixth of a turn from its own hue, low beyond two sixths, and linear between.
    # Red's distance is measured from the opposite hue, so that none crosses 0.
    share = torch.empty_like(images)
    for channel, center in enumerate((3, 2, 4)):
        distance = torch.sub(hue, center, out=share[:, channel]).abs_()
        torch.sub(*((distance, 1) if channel == 0 else (2, distance)), out=distance)
    share.clamp_(0, 1)
    return torch.addcmul(low[:, None], chroma[:, None], share)


_JITTERS = (_brightness, _contrast, _saturation, shift_hue)


def gaussian_kernels(sigmas: Tensor, radius: int) -> Tensor:
    """Gaussians of ``sigmas`` [N] at whole pixels up to three sigmas, each with sum 1: float32 [N, 2 radius + 1]."""
    at = torch.arange(-radius, radius + 1)
    exponents = -0.5 * (at / sigmas[:, None]).square()
    beyond = at.abs() > (_BLUR_SIGMAS * sigmas).ceil()[:, None]
    return torch.softmax(exponents.masked_fill_(beyond, -math.inf), dim=1).float()


def blur(images: Tensor, kernels: Tensor) -> Tensor:
    """Convolve each image of [N, C, H, W] along both axes with its own kernel of [N, k], k odd.

    Edge pixels are replicated, as by PIL, whose blur the official training code uses.
    """
    taps = kernels.shape[1]
    weights = kernels.view(len(kernels), taps, 1, 1, 1).unbind(1)
    images = F.pad(images, (taps // 2,) * 4, mode="replicate")
    for dim in (3, 2):  # shifted sums: with one kernel per image, faster than a grouped convolution
        size = images.shape[dim] - taps + 1
        total = images.narrow(dim, 0, size) * weights[0]
        for place in range(1, taps):
            total.addcmul_(images.narrow(dim, place, size), weights[place])
        images = total
    return images


def _resized_crop(images: Tensor, a: Augmentation, seeds: Tensor) -> Tensor:
    height, width = images.shape[2:]
    boxes = torch.from_numpy(crop_boxes(uniforms(seeds, _CROP_NUMBERS), height, width, a.scale, a.ratio)).float()
    # Centers of the output pixels, as a share of the box, then in grid_sample's coordinates from -1 to 1.
    centers = (torch.arange(a.size) + 0.5) / a.size
    y, x = ((boxes[:, i, None] + boxes[:, i + 2, None] * centers) * 2 / (height, width)[i] - 1 for i in (0, 1))
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)  # [N, size, size, 2]
    return F.grid_sample(images, grid.to(images.device, non_blocking=True), padding_mode="border", align_corners=False)
