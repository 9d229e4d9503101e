"""Features to evaluate: an encoder's pooled output, or the pixels themselves."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data import FolderSplit, ImageData, Split, TensorSplit, eval_batches
from ..distributed import all_gather, rank, world_size
from ..encoders import backbone, restored_modes

_GATHERED_ROWS = 8192  # of each rank at a time: 64 MB of 2048 features


@torch.no_grad()
def encoder_features(
    encoder: nn.Module,
    data: ImageData,
    split: Split,
    *,
    batch_size: int = 512,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> Tensor:
    """Pooled features under the head, float32 [N, D] on the CPU, of the images as they are (no augmentation).

    Runs in evaluation mode and leaves every layer in the mode it was in. In a process group every rank must call it:
    each encodes its share of the images, and all get all rows.
    """
    with restored_modes(encoder):
        model = backbone(encoder.eval())
        rows = [
            model(to_device(images, device)).flatten(1).float().cpu()
            for images, _ in eval_batches(data, _some_share(split), batch_size, workers)
        ]
    return _gather(torch.cat(rows), len(split), device)


def to_device(images: Tensor, device: torch.device | str) -> Tensor:
    """Images as an encoder reads them fastest: convolutions on a CPU prefer channels that lie together."""
    layout = torch.channels_last if torch.device(device).type == "cpu" else torch.preserve_format
    return images.to(device, non_blocking=True, memory_format=layout)


def rank_share(split: Split) -> Split:
    """This rank's part of a split: ceil(N / world) images in a row, less or none on the last ranks."""
    size = _share_size(len(split))
    return take(split, min(rank() * size, len(split)), min((rank() + 1) * size, len(split)))


def _some_share(split: Split) -> Split:
    """A rank without a share takes one image all the same: it must know how wide the gathered rows are."""
    return rank_share(split) or take(split, len(split) - 1, len(split))


def take(split: Split, start: int, stop: int) -> Split:
    """Images ``start`` to ``stop`` - 1."""
    if (start, stop) == (0, len(split)):
        return split
    if isinstance(split, TensorSplit):
        return TensorSplit(split.images[start:stop], split.labels[start:stop])
    return FolderSplit(split.paths[start:stop], split.labels[start:stop])


def collective_device(device: torch.device | str | None) -> torch.device:
    """Where a tensor must be for a collective: NCCL moves GPU memory only."""
    nccl = dist.is_available() and dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device(device or "cuda") if nccl else torch.device("cpu")


def _share_size(n: int) -> int:
    return -(-n // world_size())


def _gather(rows: Tensor, n: int, device: torch.device | str | None = None) -> Tensor:
    """The ranks' shares of :func:`rank_share`, [<= ceil(n / world), D] on the CPU, as one [n, D] there."""
    world, size = world_size(), _share_size(n)
    if world == 1:
        return rows
    rows = nn.functional.pad(rows, (0, 0, 0, size - len(rows)))
    everyone = rows.new_empty(world, size, rows.shape[1])
    transit = collective_device(device)  # a part at a time: the whole set need not fit there
    for start in range(0, size, _GATHERED_ROWS):
        part = rows[start : start + _GATHERED_ROWS]
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
) -> None:
    """Set BatchNorm's running statistics to averages over the images (no augmentation), in place.

    An encoder at its random start has statistics that fit no data at all; this makes it a fair baseline.
    """
    layers = [layer for layer in encoder.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative average
    with restored_modes(encoder):
        model = backbone(encoder.train())
        for images, _ in eval_batches(data, split, batch_size, workers):
            if len(images) > 1:  # one image has no variance
                model(to_device(images, device))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def pixel_features(data: ImageData, split: Split, *, size: int = 32, workers: int = 0) -> Tensor:
    """The images themselves as rows, float32 [N, D]: what any encoder has to beat.

    Small sets keep every pixel and their own channels, in [0, 1]; larger images are averaged down to ``size``
    pixels a side, and in a process group each rank, all of which must call this, averages its share.
    """
    if isinstance(split, TensorSplit):
        return split.images.flatten(1).float() / 255
    rows = [
        nn.functional.adaptive_avg_pool2d(images, size).flatten(1)
        for images, _ in eval_batches(data, _some_share(split), 256, workers)
    ]
    return _gather(torch.cat(rows), len(split))
