"""The operators in plain torch: the specification of the native ones, without native code.

16-bit inputs are computed in float32 and float64 inputs in float64, so ``.double()`` copies of the inputs give the
value to compare with.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .stats import InfoNCEStats

NORM_FLOOR = 1e-12  # a row shorter than this is divided by this instead of by its norm


def l2_normalize(x: Tensor, eps: float = NORM_FLOOR) -> Tensor:
    """x / max(||x||, eps), row by row.

    Args:
        x: [N, C] floating point.
        eps: lower bound of the divisor.

    Returns:
        [N, C] in x's dtype, rounded once.
    """
    wide = x.to(_compute_dtype(x))
    return (wide / _row_norms(wide, eps)).to(x.dtype)


def info_nce(
    query: Tensor,
    key: Tensor | None,
    queue: Tensor | None,
    temperature: float | Tensor = 0.07,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    return_stats: bool = False,
    label_smoothing: float = 0.0,
    num_valid: int | Tensor | None = None,
    in_batch: bool = False,
    key_offset: int = 0,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    same_id: str = "mask",
    positives: str = "mean",
    own_key: str = "positive",
    target: Tensor | None = None,
) -> Tensor | tuple[Tensor, InfoNCEStats]:
    """Cross-entropy of each query's positive key among itself and its negatives (MoCo, equation 1).

    Args:
        query: [N, C].
        key: [N, C], row i the positive of query i; [M, C] with in_batch, row key_offset + i; or None.
        queue: [K, C] negatives, shared by all rows, or None.
        temperature: a float, or a tensor, 0-dim or [N] (which may require grad).
        normalize: scale the rows of query and key, but not of queue, to length 1 first.
        reduction: "mean", "sum" or "none". With N = 0 the mean is NaN, as in ``F.cross_entropy``.
        return_stats: return ``(loss, InfoNCEStats)``.
        label_smoothing: share of the target distribution that is spread evenly over all classes.
        num_valid: keys of the queue that count.
        in_batch: the other keys of the batch are negatives too.
        query_ids: [N], or [M] with in_batch and without key_ids [M]; queue_ids: [K]; same_id: negatives of the query's
            id are masked out ("mask") or share the target with the positive ("positive"). Negative ids equal none.
        positives: the mean of the positives' losses, or ("sum") the loss of their summed probability.
        own_key: the row of key for each query is its positive, its positive outside the denominator ("decoupled"), or
            ignored ("excluded"). A row without any positive has a loss of 0.
        target: [N, C], the mean of the candidates under a target distribution.

    Raises:
        ValueError: queue requires grad, or an unknown reduction.
    """
    if queue is not None and queue.requires_grad:
        raise ValueError("queue: expected a tensor without gradient, got one that requires grad; use EndToEnd")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction: expected "mean", "sum" or "none", got {reduction!r}')

    dtype = _compute_dtype(*(x for x in (query, key, queue, target) if x is not None))
    has_own = own_key != "excluded" and key is not None
    query = query.to(dtype)
    key = query[:0].detach() if key is None else key.to(dtype)
    queue = key[:0].detach() if queue is None else queue.to(dtype)
    if num_valid is not None:
        queue, queue_ids = queue[:num_valid], None if queue_ids is None else queue_ids[:num_valid]
    if normalize:
        query = query / _row_norms(query)
        key = key / _row_norms(key)
    scaled = query / (temperature[:, None] if isinstance(temperature, Tensor) and temperature.dim() else temperature)

    rows = torch.arange(len(query), device=query.device)
    own = key[key_offset + rows] if has_own else torch.zeros_like(query)
    positive = (scaled * own).sum(1, keepdim=True)  # [N, 1]
    negatives = torch.cat([key, queue]) if in_batch else queue  # [M + K, C] or [K, C]
    logits = torch.cat([positive, scaled @ negatives.t()], dim=1)  # [N, 1 + negatives]

    masked = torch.zeros_like(logits, dtype=torch.bool)  # not in the denominator
    is_positive = torch.zeros_like(masked)
    masked[:, 0] = not has_own or own_key == "decoupled"
    is_positive[:, 0] = has_own
    if query_ids is not None:
        shared = in_batch and key_ids is None  # query_ids are those of the keys
        in_queue = query_ids.new_full((len(queue),), -1) if queue_ids is None else queue_ids
        in_batch_ids = query_ids[:0] if not in_batch else query_ids if key_ids is None else key_ids
        ids = torch.cat([in_batch_ids, in_queue])
        own_ids = query_ids[key_offset + rows] if shared else query_ids
        same = (own_ids[:, None] == ids) & (own_ids >= 0)[:, None]
        (masked if same_id == "mask" else is_positive)[:, 1:] = same
    if in_batch:  # the own key is among the keys once more
        masked[rows, 1 + key_offset + rows] = True
        is_positive[rows, 1 + key_offset + rows] = False

    lse = torch.logsumexp(logits.masked_fill(masked, -torch.inf), dim=1)
    if positives == "sum":
        target_logit = torch.logsumexp(logits.masked_fill(~is_positive, -torch.inf), dim=1)
        losses = torch.where(is_positive.any(1), lse - target_logit, 0.0)
        target_logit = torch.where(is_positive.any(1), target_logit, 0.0)
    elif target is None:
        weights = (1 - label_smoothing) * is_positive / is_positive.sum(1, keepdim=True).clamp_min(1)
        weights = weights + label_smoothing * ~masked / (~masked).sum(1, keepdim=True)
        target_logit = torch.where(weights > 0, weights * logits, 0.0).sum(1)
        losses = torch.where(is_positive.any(1), lse - target_logit, 0.0)
    else:
        target_logit = (scaled * target.to(dtype)).sum(1)
        losses = lse - target_logit
    loss = losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()
    if not return_stats:
        return loss

    threshold = positive if has_own else target_logit[:, None]
    rank = ((logits > threshold) & ~masked & ~is_positive)[:, 1:].sum(1)
    if not has_own and target is None:
        rank = torch.full_like(rank, -1)
    return loss, InfoNCEStats(losses.detach(), lse.detach(), threshold[:, 0].detach(), rank)


@torch.no_grad()
def expected_key(
    query: Tensor, key: Tensor | None, queue: Tensor | None, temperature: float | Tensor = 0.07, **options: Any
) -> tuple[Tensor, Tensor]:
    """The mean [N, C] of the candidates of info_nce under each row's softmax, and the logsumexp [N]."""
    normalize = options.pop("normalize", True)
    with torch.enable_grad():
        unit = (l2_normalize(query) if normalize else query).detach().requires_grad_()
        key = l2_normalize(key) if normalize and key is not None else key
        zero = torch.zeros_like(query)
        loss, stats = info_nce(
            unit, key, queue, temperature, normalize=False, reduction="none", return_stats=True, target=zero, **options
        )
        (gradient,) = torch.autograd.grad(loss.sum(), unit)
    return gradient * (
        temperature[:, None] if isinstance(temperature, Tensor) and temperature.dim() else temperature
    ), stats.lse


@torch.no_grad()
def enqueue_(queue: Tensor, queue_ptr: Tensor, keys: Tensor, *, normalize: bool = False) -> None:
    """Write keys over the oldest rows of a circular queue and move its pointer on.

    Args:
        queue: [K, C], written in place.
        queue_ptr: [1] int64, taken modulo K on entry, advanced by B modulo K.
        keys: [B, C], any B; of more than K rows only the last K remain to be seen.
        normalize: scale the rows to length 1 before they are rounded to the queue's dtype.
    """
    K, B = queue.shape[0], keys.shape[0]
    rows = keys.to(_compute_dtype(keys))
    if normalize:
        rows = rows / _row_norms(rows)
    first = max(B - K, 0)  # earlier rows would be overwritten in the same call
    slots = (queue_ptr + torch.arange(first, B, device=queue.device)) % K
    queue[slots] = rows[first:].to(queue.dtype)
    queue_ptr.copy_((queue_ptr + B) % K)


@torch.no_grad()
def momentum_update_(key_params: list[Tensor], query_params: list[Tensor], m: float | Tensor) -> None:
    """key = m * key + (1 - m) * query, in place (MoCo, equation 2).

    Args:
        key_params: tensors written in place, each in its own dtype, after computing in float32 (float64 if
            it is float64).
        query_params: as many tensors of the same shapes, of any floating dtype.
        m: momentum in [0, 1], a float or a 0-dim tensor.
    """
    for key, query in zip(key_params, query_params, strict=True):
        dtype = _compute_dtype(key)
        key.copy_(m * key.to(dtype) + (1 - m) * query.to(dtype))


@torch.no_grad()
def flatten_parameters_(module: nn.Module) -> Tensor:
    """Move a module's parameters into one contiguous buffer of which each becomes a view.

    The ``Parameter`` objects stay, and with them names, values, ``requires_grad`` and ``.grad``. A parameter
    that the module uses under several names is stored once. Flattening again returns the buffer that is
    there, unless something (``.to()``, a deep copy) has given a parameter memory of its own since.

    Returns:
        [total] the buffer.

    Raises:
        ValueError: there are no parameters, or they differ in dtype or device.
    """
    params = list(module.parameters())  # a tied parameter comes once
    kinds = sorted({f"{p.dtype} on {p.device}" for p in params})
    if len(kinds) > 1:
        raise ValueError(f"module: expected parameters of one dtype and device, got {', '.join(kinds)}")
    if not params:
        raise ValueError(f"module: expected parameters to flatten, {type(module).__name__} has none")

    total = sum(p.numel() for p in params)
    if _is_packed(params):
        return params[0].detach().as_strided((total,), (1,))

    buffer = torch.cat([p.detach().reshape(-1) for p in params])
    start = 0
    for p in params:
        p.data = buffer[start : start + p.numel()].view(p.shape)
        start += p.numel()
    return buffer


def _is_packed(params: list[nn.Parameter]) -> bool:
    """Whether the parameters lie one after the other, gapless, in one storage."""
    storage = params[0].untyped_storage().data_ptr()
    address = params[0].data_ptr()
    for p in params:
        if p.untyped_storage().data_ptr() != storage or p.data_ptr() != address or not p.is_contiguous():
            return False
        address += p.numel() * p.element_size()
    return True


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 as soon as one of the tensors is float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _row_norms(x: Tensor, eps: float = NORM_FLOOR) -> Tensor:
    """[N, 1] Euclidean norms, none below eps."""
    return torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(eps)
