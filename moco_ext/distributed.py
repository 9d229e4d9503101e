"""The few collectives MoCo needs; with one process, or none started, each is the identity."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_gather(x: Tensor) -> Tensor:
    """Concatenate the ranks' tensors: [N, ...] on each -> [world * N, ...] on all, without gradient.

    Every rank must bring the same shape (a sampler that pads or drops the last batch sees to that).
    """
    return start_all_gather(x)()


@torch.no_grad()
def start_all_gather(x: Tensor) -> Callable[[], Tensor]:
    """Begin :func:`all_gather`; what it returns waits (on CUDA the stream does, not the host) and gives the result."""
    world = world_size()
    x = x.detach()
    if world == 1:
        return lambda: x
    x = x.contiguous()
    out = x.new_empty(world * x.shape[0], *x.shape[1:])
    return _result_of(dist.all_gather_into_tensor(out, x, async_op=True), out, x)


@torch.no_grad()
def start_exchange(x: Tensor, send_counts: list[int], receive_counts: list[int]) -> Callable[[], Tensor]:
    """Begin to send rows of x [N, ...], the first ``send_counts[0]`` to rank 0 and so on; gives those received."""
    x = x.contiguous()
    received = x.new_empty(sum(receive_counts), *x.shape[1:])
    work = dist.all_to_all_single(received, x, receive_counts, send_counts, async_op=True)
    return _result_of(work, received, x)


def all_gather_with_grad(x: Tensor) -> Tensor:
    """:func:`all_gather` whose gradient goes back to the rank each row came from, summed over the ranks."""
    if world_size() == 1:
        return x
    from torch.distributed.nn import functional

    return torch.cat(functional.all_gather(x.contiguous()))


def all_reduce(x: Tensor) -> Tensor:
    """The sum over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def _result_of(work: dist.Work, out: Tensor, source: Tensor) -> Callable[[], Tensor]:
    def wait() -> Tensor:
        nonlocal source
        work.wait()
        source = out  # not before: the collective reads its memory until here
        return out

    return wait
