"""enqueue_: wrapper and fake kernel."""

import torch
from torch import Tensor

from .checks import check_devices


@torch.no_grad()
def enqueue_(
    queue: Tensor,
    queue_ptr: Tensor,
    keys: Tensor,
    *,
    normalize: bool = False,
    row_offset: int = 0,
    K: int | None = None,
) -> None:
    """Write a batch of keys into the circular queue, in place, and advance its pointer (Algorithm 1 of the paper).

    Overwrites rows ``[ptr, ptr + B) mod K``, cast to the queue's dtype. Any B is allowed; of more than K keys, only the
    last K remain. The pointer is read and written on the device, without a host synchronization.

    Args:
        queue: [K, C] contiguous; float32, bfloat16 or float16 (float64 on the CPU).
        queue_ptr: [1] int64 on the queue's device, the next row to write; taken modulo K, so -1 is the last row. On
            CUDA between -2**39 and 2**39.
        keys: [B, C] float rows, with any strides. They may be a view of the queue: all keys are read before any row
            is written.
        normalize: scale each key to unit length.
        row_offset, K: the queue has K rows, of which ``queue`` has ``row_offset`` and the following ones: the shard of
            this process. Only keys for these rows are written. Default: all of it.

    Raises:
        ValueError: wrong shape, dtype or device, rows outside the K, a pointer in the queue's memory, or a freed
            storage. Nothing is written.
    """
    torch.ops.moco_ext.enqueue_(queue, queue_ptr, keys, normalize, row_offset, K)
    torch.autograd.graph.increment_version((queue, queue_ptr))


@torch.library.register_fake("moco_ext::enqueue_")
def _(queue, queue_ptr, keys, normalize, row_offset=0, K=None):
    check_devices(queue=queue, queue_ptr=queue_ptr, keys=keys)
