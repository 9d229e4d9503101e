"""nearest_keys, also in torch operations, for devices without a kernel."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._l2_normalize import wide_rows
from .checks import check_devices, check_tensors, native


class NearestKeys(NamedTuple):
    """Result of :func:`nearest_keys`.

    Attributes:
        similarity: [N, k], highest first.
        index: [N, k] int64, rows of the queue.
    """

    similarity: Tensor
    index: Tensor  # type: ignore[assignment]  # not tuple.index


@torch.no_grad()
def nearest_keys(
    query: Tensor, queue: Tensor, k: int = 1, *, normalize: bool = True, num_valid: int | Tensor | None = None
) -> NearestKeys:
    """The k keys with the highest similarity to each query: ``(query @ queue.T).topk(k)`` without the [N, K] matrix.

    For nearest-neighbor positives (NNCLR, arXiv 2104.14548), kNN evaluation and retrieval. Equal similarities come in
    the order of the queue, and NaN comes first. Memory does not grow with K. On a CPU it is one pass over the queue; on
    CUDA, pieces of the queue go through torch's ``matmul`` and ``topk``, in float32 (tf32 if that is allowed).

    Args:
        query: [N, C]; float32, bfloat16 or float16 (float64 on the CPU).
        queue: [K, C], contiguous, rows of unit length for cosine similarities.
        k: 1 to K.
        normalize: scale query rows to unit length first.
        num_valid: use only the first ``num_valid`` keys, as in :func:`info_nce`. With fewer than k keys, the remaining
            similarities are -inf and indices -1.

    Returns:
        :class:`NearestKeys`; similarities are float32 (float64 if an input is float64). No gradient is recorded.

    Raises:
        ValueError, TypeError: an argument of the wrong type, shape, dtype, device or value; the message names it.
    """
    check_tensors(query=query, queue=queue)
    tensor, number = (num_valid, None) if isinstance(num_valid, Tensor) else (None, num_valid)
    return NearestKeys(*native(torch.ops.moco_ext.nearest_keys.default, query, queue, k, normalize, tensor, number))


@torch.library.register_fake("moco_ext::nearest_keys")
def _(query, queue, k, normalize, num_valid_tensor, num_valid):
    check_devices(query=query, queue=queue)
    wide = torch.float64 in (query.dtype, queue.dtype)
    similarity = query.new_empty((len(query), k), dtype=torch.float64 if wide else torch.float32)
    return similarity, torch.empty_like(similarity, dtype=torch.int64)


_PIECE_SCORES = 1 << 23  # of the scores of a piece of the queue: 64 MB of int64


def nearest_keys_in_pieces(
    query: Tensor,
    queue: Tensor,
    k: int,
    normalize: bool,
    num_valid_tensor: Tensor | None = None,
    num_valid: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator in torch's own, for devices without a kernel.

    A score and its key are packed into an integer whose order is the order of the result.
    """
    K = len(queue)
    if not 1 <= k <= K:
        raise ValueError(f"k: expected 1 to {K} keys of the queue, got {k}")
    if query.dim() != 2 or queue.dim() != 2 or query.shape[1] != queue.shape[1]:
        raise ValueError(f"query: expected [N, C] for a queue [K, C], got {list(query.shape)} and {list(queue.shape)}")
    if num_valid is not None and num_valid_tensor is not None:
        raise ValueError("num_valid: expected a tensor or a number, got both")
    if num_valid is not None and not 0 <= num_valid <= K:
        raise ValueError(f"num_valid: expected 0 to {K} keys of the queue, got {num_valid}")
    for name, x in (("query", query), ("queue", queue)):
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {x.dtype}")
    check_devices(query=query, queue=queue)
    rows = wide_rows(query, normalize)
    last = torch.iinfo(torch.int32).max
    if last < K:
        raise ValueError(f"queue: expected at most {last} keys, got {K}")
    piece = max(_PIECE_SCORES // max(len(rows), 1), k, 1024)
    best = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
    for first in range(0, K if num_valid is None else num_valid, piece):
        keys = queue[first : first + piece] if num_valid is None else queue[first : min(first + piece, num_valid)]
        with torch.autocast(rows.device.type, enabled=False):  # which would round the scores to 16 bits
            scores = rows @ keys.to(rows.dtype).t()
        scores = torch.where(scores.isnan(), torch.nan, scores + 0.0)  # one NaN, one zero
        index = torch.arange(first, first + len(keys), device=rows.device)
        bits = scores.view(torch.int32)
        ordered = torch.where(bits < 0, bits ^ last, bits).long() << 32
        packed = ordered | (last - index)
        if num_valid_tensor is not None:
            packed = torch.where(index < num_valid_tensor, packed, torch.iinfo(torch.int64).min)
        best = torch.cat([best, packed], dim=1).topk(min(k, best.shape[1] + len(keys)), dim=1).values
    best = torch.nn.functional.pad(best, (0, k - best.shape[1]), value=torch.iinfo(torch.int64).min)
    exists = best != torch.iinfo(torch.int64).min
    bits = (best >> 32).int()
    similarity = torch.where(bits < 0, bits ^ last, bits).view(torch.float32)
    return torch.where(exists, similarity, -torch.inf), torch.where(exists, last - (best & last), -1)


torch.library.register_kernel("moco_ext::nearest_keys", "cuda", nearest_keys_in_pieces)
