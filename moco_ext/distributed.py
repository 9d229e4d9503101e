"""The collectives that MoCo needs, and what DistributedDataParallel has to be told.

With one process, or without a process group, each collective is the identity.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

M = TypeVar("M", bound=nn.Module)
_waits = itertools.count()


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def wait_for_all() -> None:
    """Wait until every process has called this as often: for a day, unlike a collective."""
    if world_size() == 1:
        return
    store, name = dist.distributed_c10d._get_default_store(), f"wait for all {next(_waits)}"
    store.set(f"{name}/{rank()}", "")
    store.wait([f"{name}/{other}" for other in range(world_size())], datetime.timedelta(days=1))


def exclude_queues_from_ddp(module: M) -> M:
    """Keep DDP from broadcasting the queues and memory banks in a module. Call it before wrapping the module.

    DDP broadcasts all buffers at every forward pass, unless the module that it wraps lists them as ignored. Queues are
    equal on all ranks anyway. :class:`moco_ext.MoCo`, wrapped itself, does not need this; a module that contains it or
    a :class:`moco_ext.KeyQueue` does::

        model = DistributedDataParallel(exclude_queues_from_ddp(model))

    Returns:
        The module.
    """
    names = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    for prefix, child in module.named_modules():
        of_child = getattr(type(child), "_ddp_params_and_buffers_to_ignore", ())
        names.update(f"{prefix}.{name}" if prefix else name for name in of_child)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, sorted(names))
    return module


def all_gather(x: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks, [N, ...] each, to [world * N, ...] on every rank; without gradient.

    All ranks must pass the same shape (drop or pad the last batch).
    """
    return start_all_gather(x)()


@torch.no_grad()
def start_all_gather(x: Tensor) -> Callable[[], Tensor]:
    """Start :func:`all_gather`. The returned function waits (on CUDA, the stream does) and returns the result."""
    world = world_size()
    x = x.detach()
    if world == 1:
        return lambda: x
    x = x.contiguous()
    out = x.new_empty(world * x.shape[0], *x.shape[1:])
    return _result_of(dist.all_gather_into_tensor(out, x, async_op=True), out, x)


@torch.no_grad()
def start_exchange(x: Tensor, send_counts: list[int], receive_counts: list[int]) -> Callable[[], Tensor]:
    """Start an all-to-all exchange of rows: the first ``send_counts[0]`` rows of x [N, ...] go to rank 0, and so on.

    The returned function waits and returns the received rows, in the order of the ranks.
    """
    x = x.contiguous()
    received = x.new_empty(sum(receive_counts), *x.shape[1:])
    work = dist.all_to_all_single(received, x, receive_counts, send_counts, async_op=True)
    return _result_of(work, received, x)


def all_gather_with_grad(x: Tensor) -> Tensor:
    """:func:`all_gather` with gradient: each row's, summed over the ranks, goes back to the rank it came from."""
    if world_size() == 1:
        return x
    from torch.distributed.nn import functional

    return torch.cat(functional.all_gather(x.contiguous()))


def all_reduce(x: Tensor) -> Tensor:
    """Sum over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def unite(values: set[str]) -> set[str]:
    """Add the elements of all ranks' sets to this rank's, and return it."""
    if world_size() > 1:
        parts: list[Any] = [None] * world_size()
        dist.all_gather_object(parts, values)
        values.update(*parts)
    return values


def _result_of(work: dist.Work, out: Tensor, source: Tensor) -> Callable[[], Tensor]:
    def wait() -> Tensor:
        nonlocal source
        work.wait()
        source = out  # not earlier: the collective reads the source's memory until here
        return out

    return wait
