"""The few collectives MoCo needs; with one process, or none started, each is the identity."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def all_gather(x: Tensor) -> Tensor:
    """Concatenate the ranks' tensors: [N, ...] on each -> [world * N, ...] on all, without gradient.

    Every rank must bring the same shape (a sampler that pads or drops the last batch sees to that).
    """
    world = world_size()
    if world == 1:
        return x
    out = x.new_empty(world * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous())
    return out
