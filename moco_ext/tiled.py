"""The operators in plain torch and bounded memory, for devices without kernels: MPS, XPU, ROCm and others.

The arguments are checked by the native library, and the results are those of its kernels up to rounding. Keys are read
in tiles, so that no [N, K] matrix is stored. The first call on a device warns that it has no kernels.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .library import CUDA_LIBRARY, has_cuda_kernels
from .ops import nearest_keys_in_pieces, row_norms
from .ops.info_nce_operator import Arguments, Results

_SCORES = 1 << 19  # of a tile of keys: 2 MB
_EPS = 1e-12  # floor of a row's norm
_POSITIVE, _DECOUPLED, _EXCLUDED = range(3)  # own_key
_MASK, _SAME_POSITIVE, _ONLY = range(3)  # same_id
_ops = torch.ops.moco_ext


class _Rows(NamedTuple):
    """Wide rows [N, C], of unit length if normalized, and the norms [N, 1] that they were divided by."""

    unit: Tensor
    norm: Tensor | None

    @classmethod
    def of(cls, x: Tensor, dtype: torch.dtype, normalize: bool) -> _Rows:
        x = x.contiguous().to(dtype)
        if not normalize:
            return cls(x, None)
        norm = row_norms(x).clamp_min(_EPS)
        return cls(x / norm, norm)

    def backward(self, grad: Tensor) -> Tensor:
        """The gradient with respect to the rows before they were normalized."""
        if self.norm is None:
            return grad
        along = torch.where(self.norm > _EPS, (self.unit * grad).sum(1, keepdim=True), 0)
        return (grad - along * self.unit) / self.norm


class _Tile(NamedTuple):
    """Some keys, zero in place of those that are not finite, and for each row which of them count."""

    keys: Tensor  # [t, C]
    finite: Tensor  # [t] bool
    scores: Tensor  # [N, t], of the keys as they are
    hidden: Tensor | None  # [N, t] bool: no candidates
    same: Tensor | None  # [N, t] bool: other keys of the row's id


def _tiles(a: Arguments, unit: Tensor, batch: Tensor | None) -> Iterator[_Tile]:
    """The queue, then the keys of the batch."""
    n, rows = len(unit), torch.arange(len(unit), device=unit.device)
    shared = a.in_batch and a.key_ids is None  # query_ids are those of the keys
    row_ids = a.query_ids
    if row_ids is not None and shared:
        row_ids = row_ids[a.key_offset :][:n]
    sources: list[tuple[Tensor, Tensor | None, bool]] = []
    if a.queue is not None:
        sources.append((a.queue[: a.num_valid], a.queue_ids, False))
    if batch is not None:
        sources.append((batch, a.query_ids if shared else a.key_ids, True))
    for keys, ids, of_batch in sources:
        for start in range(0, len(keys), max(_SCORES // max(n, 1), 256)):
            tile = keys[start : start + max(_SCORES // max(n, 1), 256)].to(unit.dtype)
            index = torch.arange(start, start + len(tile), device=unit.device)
            hidden = same = None
            if a.num_valid_tensor is not None and not of_batch:
                hidden = (index >= a.num_valid_tensor).expand(n, -1)
                tile = torch.where(hidden[:1].t(), 0, tile) if n else tile
            if of_batch:
                hidden = index == (a.key_offset + rows)[:, None]
            if row_ids is not None:
                same = row_ids.new_zeros(n, len(tile), dtype=torch.bool)
                if ids is not None:
                    same = (row_ids[:, None] == ids[start : start + len(tile)]) & (row_ids >= 0)[:, None]
                same = same if hidden is None else same & ~hidden
                if a.same_id != _SAME_POSITIVE:
                    more = same if a.same_id == _MASK else ~same
                    hidden = more if hidden is None else hidden | more
            scores, finite = unit @ tile.t(), tile.isfinite().all(1)
            yield _Tile(torch.where(finite[:, None], tile, 0), finite, scores, hidden, same)


def info_nce_forward(*arguments: Any) -> tuple[Tensor, ...]:
    a, out = Arguments._make(arguments), Results._make(_ops.info_nce_forward_outputs(*arguments))
    n, dtype, device = len(a.query), out.lse.dtype, a.query.device
    T = a.temperature if a.temperature_tensor is None else a.temperature_tensor.to(device, dtype).reshape(())
    _check_on_cpu("temperature", T, lambda t: 0 < t < math.inf, "a positive number")
    if a.num_valid_tensor is not None and a.queue is not None:
        limit = len(a.queue)
        _check_on_cpu("num_valid", a.num_valid_tensor, lambda x: 0 <= x <= limit, f"0 to {limit} keys of the queue")
    query = _Rows.of(a.query, dtype, a.normalize)
    key = None if a.key is None else _Rows.of(a.key, dtype, a.normalize)
    own = None if key is None or a.own_key == _EXCLUDED else key.unit[a.key_offset :][:n]
    given = None if a.target is None else a.target.to(dtype)
    anchor = given if own is None else own  # what ranks refer to
    candidate = own is not None and a.own_key == _POSITIVE
    wants_gradient = out.grad_query.dim() == 2
    target_by_id = given is None and (a.query_ids is not None or a.label_smoothing > 0)

    zeros = torch.zeros(n, dtype=dtype, device=device)
    positive = zeros if anchor is None else (query.unit * anchor).sum(1)
    most = positive.clone() if candidate else zeros - math.inf  # the maximum so far, of the scores
    total, above, matches = zeros.clone(), torch.zeros(n, dtype=torch.int64, device=device), None
    expected, match_sum, column_sum = torch.zeros_like(query.unit), torch.zeros_like(query.unit), zeros.new_zeros(())
    count = 0
    for tile in _tiles(a, query.unit, key.unit if key is not None and a.in_batch else None):
        count += len(tile.keys)
        seen = ~tile.finite[None] if tile.hidden is None else ~tile.finite & ~tile.hidden
        broken = seen.any(1)  # rows that see a key which is not finite
        scores = tile.scores if tile.hidden is None else tile.scores.masked_fill_(tile.hidden, -math.inf)
        scores.masked_fill_(~tile.finite, -math.inf)
        higher = scores > positive[:, None]
        above += (higher & ~tile.same if tile.same is not None and a.same_id == _SAME_POSITIVE else higher).sum(1)
        new = torch.maximum(most, scores.amax(1)) if n else most
        shift = torch.where(new == -math.inf, 0, new)
        decay = torch.where(most == -math.inf, 0, ((most - shift) / T).exp())
        weights = scores.sub_(shift[:, None]).div_(T).exp_()
        total = torch.where(broken, math.nan, total * decay + weights.sum(1))
        most = new
        if wants_gradient:
            expected = torch.addmm(expected * decay[:, None], weights, tile.keys)
        if tile.same is not None:
            matches = tile.same.sum(1) if matches is None else matches + tile.same.sum(1)
            if target_by_id:
                match_sum = match_sum + tile.same.to(dtype) @ tile.keys
        if a.label_smoothing > 0:
            column_sum = column_sum + tile.keys.sum(0)

    most = torch.where(most == -math.inf, 0, most)
    own_weight = ((positive - most) / T).exp() if candidate else zeros
    all_weight = total + own_weight
    # Relative to the anchor, so that a small loss is not the difference of two large numbers.
    plain = (most - positive) / T + all_weight.log()
    if candidate:
        plain = torch.where(most > positive, plain, total.log1p())
    empty = all_weight == 0
    own_probability = torch.where(empty, 0, own_weight / all_weight)
    rest = torch.where(empty, 1, total / all_weight)  # 1 - p, without cancellation

    share, floor = zeros + 1, zeros
    target = anchor
    if target_by_id:
        valid = count if a.num_valid_tensor is None or a.queue is None else (
            count - len(a.queue) + a.num_valid_tensor.to(device).reshape(()).clamp(0, len(a.queue))
        )  # fmt: skip
        share, floor, target = _target(a, own, valid, matches, match_sum, column_sum, zeros)
        rest = rest - (1 - (share + floor))
    elif given is not None and own is not None:
        rest, target = -own_probability, given
    assert target is not None
    score = positive if target is anchor else (query.unit * target).sum(1)
    has_positive = share > 0
    losses = torch.where(has_positive, plain + (positive - score) / T, 0)
    out.losses.copy_(losses)
    out.lse.copy_(plain + positive / T)
    out.positive_logit.copy_((score if anchor is None else positive) / T)
    out.rank.copy_(above if anchor is not None else torch.full_like(above, -1))
    reduce = {0: lambda x: x, 1: lambda x: x.mean(), 2: lambda x: x.sum()}[a.reduction]
    out.loss.copy_(reduce(losses))
    if out.weights.dim() == 2:
        own_rest = zeros if own is None else -rest
        out.weights.copy_(torch.stack([torch.where(empty, 0, share), floor, own_rest], dim=1))
    weight = 1 / max(n, 1) if a.reduction == 1 else 1
    if wants_gradient:
        mean = torch.where(empty[:, None], 0, expected / all_weight[:, None])
        if target is anchor:
            grad = (mean - rest[:, None] * target) / T
        else:
            grad = (mean + (own_probability[:, None] * own if candidate and own is not None else 0) - target) / T
        if out.grad_temperature.numel() or a.temperature_grad:
            by_row = torch.where(has_positive, -(query.unit * grad).sum(1) / T * weight, 0)
            out.grad_temperature.copy_(by_row if a.reduction == 0 else by_row.sum())
        out.grad_query.copy_(torch.where(has_positive[:, None], query.backward(grad) * weight, 0))
    if out.grad_key.dim() == 2 and key is not None and own is not None:
        rows = _Rows(own, None if key.norm is None else key.norm[a.key_offset :][:n])
        out.grad_key.copy_(rows.backward(-rest[:, None] * query.unit / T) * weight)
    return tuple(out)


def _target(
    a: Arguments,
    own: Tensor | None,
    valid: int | Tensor,
    matches: Tensor | None,
    match_sum: Tensor,
    column_sum: Tensor,
    zeros: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's share of every positive and of every class in the target distribution, and its mean key [N, C]."""
    same_positive = a.query_ids is not None and a.same_id == _SAME_POSITIVE
    found = zeros if matches is None else matches.to(zeros.dtype)
    key: Tensor | float = 0.0 if own is None else own
    positives = zeros + int(own is not None) + found * same_positive
    # Of the keys of the batch, a row's own one is among those that were read.
    classes = zeros + (1 + valid - int(a.in_batch)) - (0 if same_positive else found)
    alone = (classes == 1) & (own is not None)  # the positive has the whole target, exactly
    share = torch.where(alone, 1, (1 - a.label_smoothing) / positives.clamp_min(1))
    floor = torch.where(alone, 0, a.label_smoothing / classes)
    everything = column_sum + (0.0 if a.in_batch else key) - (0.0 if same_positive else match_sum)
    target = share[:, None] * (key + (match_sum if same_positive else 0.0))
    if a.label_smoothing > 0:
        target = target + floor[:, None] * everything
    none = positives == 0
    share, floor = torch.where(none, 0, share), torch.where(none, 0, floor)
    return share.to(zeros.dtype), floor.to(zeros.dtype), torch.where(none[:, None], 0, target)


def info_nce_backward(
    query: Tensor,
    key: Tensor,
    temperature_tensor: Tensor | None,
    temperature: float,
    normalize: bool,
    precision: int,
    key_offset: int,
    query_ids: Tensor | None,
    same_id: int,
    key_ids: Tensor | None,
    lse: Tensor,
    weights: Tensor,
    grad_loss: Tensor,
) -> Tensor:
    arguments = (
        query, key, temperature_tensor, temperature, normalize, precision, key_offset, query_ids, same_id, key_ids, lse,
        weights, grad_loss,
    )  # fmt: skip
    out = _ops.info_nce_backward_output(*arguments)
    dtype, device = lse.dtype, query.device
    T = temperature if temperature_tensor is None else temperature_tensor.to(device, dtype).reshape(())
    queries, keys = (_Rows.of(x, dtype, normalize) for x in (query, key))
    share, floor, own_weight = weights[:, :, None].unbind(1)  # [N, 1] each
    lost = (share == 0) | (grad_loss[:, None] == 0)
    upstream = torch.where(lost, 0, grad_loss[:, None])
    shift = torch.where(lost, math.inf, lse[:, None])
    row_ids, of_keys = query_ids, query_ids if key_ids is None else key_ids
    if row_ids is not None and key_ids is None:
        row_ids = row_ids[key_offset:][: len(query)]
    own_row = torch.arange(len(query), device=device)[:, None] + key_offset
    for start in range(0, len(key), max(_SCORES // max(len(query), 1), 256)):
        unit = keys.unit[start : start + max(_SCORES // max(len(query), 1), 256)]
        own = own_row == torch.arange(start, start + len(unit), device=device)
        p = (queries.unit @ unit.t() / T - shift).clamp_max_(0).exp() - floor  # huge scores differ by rounding
        if row_ids is not None and of_keys is not None:
            same = (row_ids[:, None] == of_keys[start : start + len(unit)]) & (row_ids >= 0)[:, None]
            if same_id == _SAME_POSITIVE:
                p = torch.where(same, p - share, p)
            else:
                p = p.masked_fill(same if same_id == _MASK else ~same, 0)
        p = torch.where(own, own_weight, p) * upstream
        out[start : start + len(unit)] = p.t() @ queries.unit / T
    return out.copy_(keys.backward(out))


def enqueue_(
    queue: Tensor, queue_ptr: Tensor, keys: Tensor, normalize: bool, row_offset: int = 0, K: int | None = None
) -> None:
    _ops.check_enqueue(queue, queue_ptr, keys, normalize, row_offset, K)
    K = len(queue) if K is None else K
    rows = _Rows.of(keys, torch.promote_types(keys.dtype, torch.float32), normalize).unit.to(queue.dtype)
    first = max(len(keys) - K, 0)  # earlier keys would be overwritten in the same call
    slots = (queue_ptr + torch.arange(first, len(keys), device=queue.device)) % K - row_offset
    rows = rows[first:].clone()  # before any row is written
    if len(queue) < K:
        here = (slots >= 0) & (slots < len(queue))
        slots, rows = slots[here], rows[here]
    queue.index_copy_(0, slots, rows)
    queue_ptr.copy_((queue_ptr + len(keys)) % K)


def momentum_update_(
    key_params: list[Tensor],
    query_params: list[Tensor],
    m_tensor: Tensor | None,
    m: float,
    low_precision: list[Tensor],
) -> None:
    _ops.check_momentum_update(key_params, query_params, m_tensor, m, low_precision)
    if not key_params:
        return
    if m_tensor is not None and m_tensor.device != key_params[0].device:
        expected = f"on the device of key_params ({key_params[0].device})"
        raise ValueError(f"m: expected {expected}, got {m_tensor.device}")
    keep: float | Tensor = m if m_tensor is None else m_tensor
    _check_on_cpu("m", keep, lambda value: 0 <= value <= 1, "a momentum in [0, 1]")
    for key, query in zip(key_params, query_params, strict=True):
        dtype = torch.promote_types(key.dtype, torch.float32)
        key.copy_(keep * key.to(dtype) + (1 - keep) * query.to(dtype))
    for copy, key in zip(low_precision, key_params, strict=bool(low_precision)):
        copy.copy_(key)


def l2_normalize_forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _ops.check_l2_normalize(x, eps)
    wide = x.contiguous().to(torch.promote_types(x.dtype, torch.float32))
    norm = row_norms(wide).clamp_min(eps)
    return (wide / norm).to(x.dtype), norm[:, 0]


def _check_on_cpu(name: str, value: float | Tensor, holds: Callable[[float], bool], expected: str) -> None:
    """Elsewhere the value of a tensor is not known without waiting for the device."""
    if isinstance(value, Tensor) and value.device.type == "cpu" and not holds(value.item()):
        raise ValueError(f"{name}: expected {expected}, got {value.item():g}")


KERNELS: dict[str, Callable[..., Any]] = {
    "info_nce_forward": info_nce_forward,
    "info_nce_backward": info_nce_backward,
    "enqueue_": enqueue_,
    "momentum_update_": momentum_update_,
    "nearest_keys": nearest_keys_in_pieces,
    "l2_normalize_forward": l2_normalize_forward,
}


@functools.cache
def _warn(device: str) -> None:
    why = "no kernels for this device"
    if device == "cuda":
        why = f"this torch ({torch.__version__}) has no CUDA" if CUDA_LIBRARY.is_file() else (
            "this build is for the CPU only; reinstall with MOCO_EXT_CUDA=1 pip install --no-cache-dir ."
        )  # fmt: skip
    warnings.warn(f"moco_ext on {device}: {why}. Plain torch operations take their place, and more time", stacklevel=4)


def register(device: str) -> None:
    """Take these implementations for a device type."""

    def warned(kernel: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(kernel)
        def call(*arguments: Any) -> Any:
            _warn(device)
            with torch.no_grad(), torch.autocast(device, enabled=False):
                return kernel(*arguments)

        return call

    for name, kernel in KERNELS.items():
        if (name, device) == ("nearest_keys", "cuda"):  # the same with and without kernels, see ops/_nearest_keys.py
            continue
        torch.library.register_kernel(f"moco_ext::{name}", device, warned(kernel))


def devices() -> list[str]:
    """The device types that :func:`register` was called for when moco_ext was imported."""
    found = ["mps", "xpu", "hpu", "privateuseone"]
    if not has_cuda_kernels():
        found.append("cuda")  # ROCm, too
    if os.environ.get("MOCO_EXT_TILED") == "1":
        found.append("cpu")  # to test them
    return found


for _device in devices():
    register(_device)
