"""Features to evaluate: the pooled output of an encoder, or the pixels themselves."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data import ImageData, Split, TensorSplit, eval_batches
from ..data.images import check_readable
from ..distributed import all_gather, rank, world_size
from ..encoders import autocast, backbone, restored_modes

_GATHERED_ROWS = 65_536  # of all ranks, in a collective: 512 MB of 2048 features


@torch.no_grad()
def encoder_features(
    encoder: nn.Module,
    data: ImageData,
    split: Split,
    *,
    batch_size: int = 512,
    device: torch.device | str = "cpu",
    workers: int = 0,
    precision: str = "fp32",
    advance: Callable[[int], object] = lambda images: None,
) -> Tensor:
    """Pooled features under the head of the images without augmentation, float32 [N, D] on the CPU.

    Runs in eval mode and restores the mode of every layer. In a process group every rank must call it: each encodes
    its share of the images and gets all rows.

    The row of an image that cannot be decoded is NaN (see :func:`is_missing`), and its path is in ``data.unreadable``.
    NaN that the encoder computes becomes infinity. ``advance`` is called with the number of images of each batch.

    Args:
        precision: "fp32", "bf16" or "fp16": the encoder runs under autocast.

    Raises:
        UnreadableImageError: more than half of the images, on all ranks.
    """
    with restored_modes(encoder):
        model = backbone(encoder.eval())

        def features(images: Tensor) -> Tensor:
            with autocast(device, precision):
                rows = model(to_device(images, device)).flatten(1).float().cpu()
            return rows.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)

        return _all_rows(features, data, split, batch_size, workers, advance, device)


def is_missing(rows: Tensor) -> Tensor:
    """Bool [N]: which rows of features [N, D] are those of images that could not be decoded."""
    return rows[:, 0].isnan()


def to_device(images: Tensor, device: torch.device | str) -> Tensor:
    """Images on the device, in the fastest memory format: channels last for convolutions on a CPU."""
    layout = torch.channels_last if torch.device(device).type == "cpu" else torch.preserve_format
    return images.to(device, non_blocking=True, memory_format=layout)


def rank_share(split: Split) -> Split:
    """This rank's part of a split: ceil(N / world) consecutive images, fewer or none on the last ranks."""
    size = _share_size(len(split))
    return take(split, range(min(rank() * size, len(split)), min((rank() + 1) * size, len(split))))


def take(split: Split, rows: Sequence[int]) -> Split:
    """The images at these positions."""
    if rows == range(len(split)):
        return split
    return split.take(torch.tensor(rows, dtype=torch.int64))


def collective_device(device: torch.device | str | None) -> torch.device:
    """The device that a collective needs its tensors on: with NCCL a GPU, else the CPU."""
    nccl = dist.is_available() and dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device(device or "cuda") if nccl else torch.device("cpu")


def _share_size(n: int) -> int:
    return -(-n // world_size())


def _all_rows(
    features: Callable[[Tensor], Tensor],
    data: ImageData,
    split: Split,
    batch_size: int,
    workers: int,
    advance: Callable[[int], object],
    device: torch.device | str | None = None,
) -> Tensor:
    """The features [N, D] of all images, each rank's share gathered; NaN for images that cannot be decoded."""
    share, rows = rank_share(split), None
    for images, index in eval_batches(data, share, batch_size, workers):
        found = features(images)
        if rows is None:
            rows = found.new_full((len(share), found.shape[1]), math.nan)
        rows[index] = found
        advance(len(index))
    if rows is None:  # every rank must know D
        width = features(torch.zeros(1, 3, data.size, data.size)).shape[1]
        rows = torch.full((len(share), width), math.nan)
    rows = _gather(rows, len(split), device)
    check_readable(int(is_missing(rows).sum()), len(rows))
    return rows


def _gather(rows: Tensor, n: int, device: torch.device | str | None = None) -> Tensor:
    """Gather the shares of :func:`rank_share`, each [<= ceil(n / world), D] on the CPU, to [n, D] on the CPU."""
    world, size = world_size(), _share_size(n)
    if world == 1:
        return rows
    rows = nn.functional.pad(rows, (0, 0, 0, size - len(rows)))
    everyone = rows.new_empty(world, size, rows.shape[1])
    transit = collective_device(device)  # in parts: all rows may not fit on it
    count = max(1, _GATHERED_ROWS // world)
    for start in range(0, size, count):
        part = rows[start : start + count]
        everyone[:, start : start + len(part)] = all_gather(part.to(transit)).view(world, *part.shape).cpu()
    return everyone.flatten(0, 1)[:n]


@torch.no_grad()
def estimate_batchnorm_(
    encoder: nn.Module,
    data: ImageData,
    split: Split,
    *,
    batch_size: int = 512,
    device: torch.device | str = "cpu",
    workers: int = 0,
    precision: str = "fp32",
) -> None:
    """Set the running statistics of BatchNorm to averages over the images without augmentation, in place.

    This makes an encoder with random weights a fair baseline: its initial statistics fit no data.
    """
    with averaged_batchnorm(encoder), autocast(device, precision):
        model = backbone(encoder)
        for images, _ in eval_batches(data, split, batch_size, workers):
            if len(images) > 1:  # one image has no variance
                model(to_device(images, device))


@contextlib.contextmanager
def averaged_batchnorm(module: nn.Module) -> Iterator[None]:
    """Within the block, a module is in training mode and each forward pass counts equally in the running statistics of
    its BatchNorm, which start anew. Modes and momenta are restored."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
    try:
        with restored_modes(module):
            module.train()
            yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def pixel_features(
    data: ImageData,
    split: Split,
    *,
    size: int = 32,
    workers: int = 0,
    advance: Callable[[int], object] = lambda images: None,
) -> Tensor:
    """The pixels of each image as a row, float32 [N, D]: the baseline for any encoder.

    Images of a set that is held in memory keep all pixels and channels, in [0, 1]. Images on disk are averaged down to
    ``size`` x ``size`` pixels, and missing rows are as in :func:`encoder_features`; in a process group every rank must
    call this and averages its share.
    """
    if isinstance(split, TensorSplit):
        return split.images.flatten(1).float() / 255

    def averages(images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, size).flatten(1)

    return _all_rows(averages, data, split, 256, workers, advance)


def check_finite(name: str, rows: Tensor, error: type[Exception] = ValueError) -> None:
    """Raise unless all rows [N, D] are finite."""
    # A sum is finite only if its terms are, and in float64 it cannot overflow; isfinite of all terms would need memory.
    bad = int((~rows.sum(1, dtype=torch.float64).isfinite()).sum())
    if bad:
        raise error(f"{name}: expected finite values, got NaN or infinity in {bad:,} of {len(rows):,} rows")
