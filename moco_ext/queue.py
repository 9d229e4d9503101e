"""The dictionary: a circular queue of keys."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from . import distributed
from .ops import enqueue_
from .ops.checks import check_devices

_BLOCK = 65536  # first keys that one seed gives


class KeyQueue(nn.Module):
    """A first-in-first-out queue of K unit-length keys: the dictionary of the paper, Sec. 3.1.

    In memory the keys are rows, ``queue`` [K, dim], so that a batch is one contiguous write. In the state dict they are
    columns, ``queue`` [dim, K], next to ``queue_ptr`` [1]: the official layout, so checkpoints load both ways. The
    state dict holds a transposed copy of the queue; all other entries share memory with the module, as usual.

    The first keys are random unit vectors from a fixed seed, and all ranks enqueue the same keys, so the queue is the
    same on every rank. DistributedDataParallel need not broadcast it: if the queue is part of a module that DDP wraps,
    call :func:`moco_ext.distributed.exclude_queues_from_ddp` on that module first.

    Args:
        dim: number of features of a key.
        K: number of keys.
        dtype: of the stored keys; bfloat16 takes half the memory and the traffic of float32.
        ids: also store the id of each key, ``queue_ids`` [K] int64 (-1: unknown), and its age (``ages``).
        empty: start without keys; ``queue_valid`` [1] int64 is then the number of valid keys, to pass to the loss.
        sharded: divide the rows among the processes. ``queue`` then has the K / world rows of this process, from
            ``row_offset`` on; ids, pointer and ``queue_valid`` are those of the whole queue on every rank. In the state
            dict, ``queue`` is a DTensor [dim, K]. It loads the checkpoint of a whole queue, too.

    The state of ``ids`` and ``empty`` is in the state dict, too. A checkpoint without it loads as a full queue of keys
    with unknown ids.
    """

    # DDP reads this from the module that it wraps; see distributed.exclude_queues_from_ddp.
    _ddp_params_and_buffers_to_ignore = (
        "queue", "queue_ptr", "queue_ids", "queue_written", "queue_writes", "queue_valid"
    )  # fmt: skip

    queue: Tensor
    queue_ptr: Tensor
    queue_ids: Tensor | None
    queue_valid: Tensor | None
    queue_written: Tensor | None  # [K] number of the enqueue that wrote each key, -1 if none has
    queue_writes: Tensor | None  # [1] number of enqueues so far

    def __init__(
        self,
        dim: int,
        K: int,
        dtype: torch.dtype = torch.float32,
        *,
        ids: bool = False,
        empty: bool = False,
        sharded: bool = False,
    ) -> None:
        super().__init__()
        K, dim = check_size("K", K), check_size("dim", dim)
        self.shards = distributed.world_size() if sharded else 1
        if K % self.shards:
            raise ValueError(f"K: expected a multiple of the {self.shards} processes that share the queue, got {K}")
        self.row_offset = distributed.rank() * (K // self.shards) if sharded else 0
        self.register_buffer("queue", first_keys(K, dim, dtype, self.row_offset, K // self.shards))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.register_buffer("queue_ids", torch.full((K,), -1) if ids else None)
        self.register_buffer("queue_written", torch.full((K,), -1) if ids else None)
        self.register_buffer("queue_writes", torch.zeros(1, dtype=torch.long) if ids else None)
        self.register_buffer("queue_valid", torch.zeros(1, dtype=torch.long) if empty else None)

    @property
    def K(self) -> int:
        return self.queue.shape[0] * self.shards

    @property
    def ages(self) -> Tensor:
        """[K] int64: how many enqueues ago each key was written; 0 for the latest, -1 for keys never written.

        Raises:
            ValueError: the queue was made without ``ids``.
        """
        if self.queue_written is None or self.queue_writes is None:
            raise ValueError("ages: expected a queue made with ids=True, got one without")
        return torch.where(self.queue_written < 0, -1, self.queue_writes - 1 - self.queue_written)

    @torch.no_grad()
    def enqueue(self, keys: Tensor, ids: Tensor | None = None, *, normalize: bool = True) -> None:
        """Replace the oldest keys; see :func:`moco_ext.enqueue_`.

        Args:
            keys: [B, dim].
            ids: [B] int64, of a queue made with ``ids``; None: unknown.
            normalize: scale the keys to unit length first.

        Raises:
            ValueError: ids for a queue without them, ids of another shape, dtype or device, or keys that
                :func:`moco_ext.enqueue_` refuses; nothing is written.
        """
        self._check_ids(keys, ids)
        B = len(keys)
        start = None if self.queue_ids is None else self.queue_ptr.clone()
        enqueue_(self.queue, self.queue_ptr, keys, normalize=normalize, row_offset=self.row_offset, K=self.K)
        if start is not None and self.queue_ids is not None:
            assert self.queue_written is not None and self.queue_writes is not None
            first = max(B - self.K, 0)  # earlier keys would be overwritten in the same call
            slots = (start + torch.arange(first, B, device=self.queue.device)) % self.K
            self.queue_ids[slots] = -1 if ids is None else ids[first:]
            self.queue_written[slots] = self.queue_writes
            self.queue_writes += 1
        if self.queue_valid is not None:
            self.queue_valid.add_(B).clamp_(max=self.K)

    def check_batch(self, keys: Tensor, ids: Tensor | None = None) -> None:
        """Raise the error that :meth:`enqueue` would raise for these arguments. Nothing is written."""
        self._check_ids(keys, ids)
        if not torch.compiler.is_compiling() and not self.queue.is_meta:  # neither has memory to look at
            torch.ops.moco_ext.check_enqueue(self.queue, self.queue_ptr, keys, False, self.row_offset, self.K)

    def _check_ids(self, keys: Tensor, ids: Tensor | None) -> None:
        if ids is None:
            return
        if self.queue_ids is None:
            raise ValueError("ids: expected none for a queue made without ids, got a tensor")
        if ids.shape != keys.shape[:1] or ids.dtype != torch.long:
            raise ValueError(f"ids: expected int64 [{len(keys)}], one id per key, got {ids.dtype} {list(ids.shape)}")
        check_devices(queue=self.queue, ids=ids)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # A copy, because safetensors, and the tools that use it, refuse a transposed view, which is not contiguous.
        transposed = destination[prefix + "queue"].t()
        destination[prefix + "queue"] = transposed.clone(memory_format=torch.contiguous_format)
        if self.shards > 1:
            mesh = init_device_mesh(self.queue.device.type, (self.shards,))
            destination[prefix + "queue"] = DTensor.from_local(destination[prefix + "queue"], mesh, [Shard(1)])

    def _load_from_state_dict(self, state_dict, prefix, *args):
        name = prefix + "queue"
        if name in state_dict and state_dict[name].dim() == 2:
            keys = state_dict[name]
            if isinstance(keys, DTensor):
                keys = keys.full_tensor() if self.shards == 1 else keys.redistribute(placements=[Shard(1)]).to_local()
            elif self.shards > 1:
                if keys.shape[1] != self.K:  # K / world keys would fit a shard, the same ones on every rank
                    raise RuntimeError(f"size mismatch for {name}: expected {self.K} keys, got {keys.shape[1]}")
                keys = keys[:, self.row_offset :][:, : len(self.queue)]
            state_dict[name] = keys.t().contiguous()  # rows, also for load_state_dict(assign=True)
            full = {"queue_ids": -1, "queue_written": -1, "queue_writes": 0, "queue_valid": self.K}
            for extra, value in full.items():
                if (own := getattr(self, extra)) is not None:
                    state_dict.setdefault(prefix + extra, torch.full_like(own, value))
        super()._load_from_state_dict(state_dict, prefix, *args)


def first_keys(K: int, dim: int, dtype: torch.dtype, first: int, rows: int) -> Tensor:
    """Rows ``first`` and following of the [K, dim] random unit vectors, without the memory for the others."""
    keys = torch.empty(rows, dim, dtype=dtype)
    if keys.is_meta:  # of an estimate
        return keys
    for block in range(first // _BLOCK, -(-(first + rows) // _BLOCK)):
        start = block * _BLOCK
        generator = torch.Generator().manual_seed(block)  # of the CPU, also within torch.device("cuda")
        drawn = torch.randn(min(_BLOCK, K - start), dim, generator=generator, device="cpu")
        begin, end = max(first, start), min(first + rows, start + _BLOCK)
        keys[begin - first : end - first] = nn.functional.normalize(drawn, dim=1)[begin - start : end - start]
    return keys


def check_size(name: str, value: Any) -> int:
    """A size as an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return int(value)
