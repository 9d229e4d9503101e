"""The operators: for each one its wrapper, fake kernel and autograd formula, side by side.

Schemas are in csrc/ops.cpp, argument checks in csrc/checks.h, the same operators in plain torch in reference.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .library import load_libraries
from .stats import InfoNCEStats

__all__ = ["enqueue_", "info_nce", "l2_normalize", "momentum_update_"]

load_libraries()


def _scalar(name: str, value: float | Tensor) -> tuple[Tensor | None, float]:
    """A scalar argument as the operators take it: a tensor stays on its device, anything else is a number."""
    if isinstance(value, Tensor):
        return value, math.nan
    try:
        return None, float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number or a 0-dim tensor, got {value!r}") from None


def _check_devices(**tensors: Tensor) -> None:
    """For the fake kernels, which a meta tensor among real ones reaches; the native ones check for themselves."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != first.device:
            raise ValueError(f"{name}: expected on the device of {first_name} ({first.device}), got {tensor.device}")


def check_plain(**tensors: Sequence[Tensor]) -> None:
    """Refuse DTensors and other wrappers, whose memory the kernels cannot reach."""
    for name, of_name in tensors.items():
        for tensor in of_name:
            if hasattr(type(tensor), "__tensor_flatten__"):
                raise TypeError(
                    f"{name}: expected plain tensors, got {type(tensor).__name__}; parameters sharded by FSDP2 "
                    "(fully_shard) are not supported, DistributedDataParallel is"
                )


def _allow_tf32() -> bool:
    if torch.compiler.is_compiling():
        return torch.backends.cuda.matmul.allow_tf32  # the form that torch.compile traces, and guards on
    # Sees both of torch's switches, old and new; the old one raises where they have been mixed.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# --- info_nce ---------------------------------------------------------------------------------------------------------


@overload
def info_nce(
    query: Tensor,
    key: Tensor,
    queue: Tensor | None,
    temperature: float | Tensor = ...,
    *,
    normalize: bool = ...,
    reduction: str = ...,
    return_stats: Literal[False] = ...,
    label_smoothing: float = ...,
    num_valid: int | Tensor | None = ...,
    in_batch: bool = ...,
    key_offset: int = ...,
    query_ids: Tensor | None = ...,
    queue_ids: Tensor | None = ...,
    same_id: str = ...,
) -> Tensor: ...
@overload
def info_nce(
    query: Tensor,
    key: Tensor,
    queue: Tensor | None,
    temperature: float | Tensor = ...,
    *,
    normalize: bool = ...,
    reduction: str = ...,
    return_stats: Literal[True],
    label_smoothing: float = ...,
    num_valid: int | Tensor | None = ...,
    in_batch: bool = ...,
    key_offset: int = ...,
    query_ids: Tensor | None = ...,
    queue_ids: Tensor | None = ...,
    same_id: str = ...,
) -> tuple[Tensor, InfoNCEStats]: ...
def info_nce(
    query: Tensor,
    key: Tensor,
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
    queue_ids: Tensor | None = None,
    same_id: str = "mask",
) -> Tensor | tuple[Tensor, InfoNCEStats]:
    """InfoNCE of queries against their positive key and a queue of negatives (MoCo, arXiv 1911.05722, Eq. 1).

    ``loss[n] = -log softmax([q_n·k_n, q_n·queue_1, ..., q_n·queue_K] / temperature)[0]``, computed with its gradients
    in one pass over the queue. Neither the [N, K] logits nor a copy of the queue ever exist, and the queue is not
    saved for the backward pass: it may be overwritten before ``backward()``.

    Args:
        query: [N, C] features; float32, bfloat16 or float16 (float64 on the CPU, for gradient checks).
        key: [N, C] the positive of each row; gradient flows to it if it requires one.
        queue: [K, C] negatives, contiguous rows, unit length if ``normalize``; its dtype may differ from query's.
            It takes no gradient. None: the batch's keys alone (``in_batch``).
        temperature: a positive number, or a 0-dim tensor on the queue's device, which may require a gradient.
        normalize: scale query and key rows to unit length first (``x / max(||x||, 1e-12)``). ``False`` takes all
            three as they are.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the N rows.
        return_stats: also return :class:`InfoNCEStats` (loss, lse, positive_logit, rank; [N] each, no gradient).
        label_smoothing: this share of the target distribution, in [0, 1), is spread evenly over the positive and
            all negatives, as in ``torch.nn.functional.cross_entropy``.
        num_valid: only the queue's first ``num_valid`` keys count (a queue that starts empty); a number, or int64 of
            one element on the queue's device.
        in_batch: every other key of the batch is a negative too. Then key may be [M, C] with M >= N, the keys of all
            ranks say, of which row n's positive is ``key[key_offset + n]``. With ``queue=None`` this is the end-to-end
            mechanism. Keys that require a gradient get it as positives and as negatives, by a second pass in
            ``backward()``.
        query_ids: [N] int64, which image (text, class) each query is of; [M], those of all keys, if ``in_batch``.
            Negative: not known, equal to none.
        queue_ids: [K] int64, the same for the queue.
        same_id: what a negative with the query's own id is: ``"mask"``, no negative; ``"positive"``, a further
            positive (the loss is the cross-entropy of a target distribution even over the positives).

    Several problems in one call: query and key [G, N, C], with one queue [K, C] for all or one each [G, K, C] (ids
    likewise). The symmetric loss of two views is
    ``info_nce(torch.stack([q1, q2]), torch.stack([k2, k1]), queue)``, which passes over the queue once.

    Returns:
        The loss, float32 (float64 for float64 input): 0-dim, or [N] ([G, N]) for ``reduction="none"``; with
        ``return_stats`` the pair ``(loss, stats)``. N = 0 gives NaN for the mean, as in
        ``torch.nn.functional.cross_entropy``.

    Precision: accumulation is float32. On CUDA a bfloat16 or float16 queue is multiplied on tensor cores in its own
    dtype; a float32 queue in float32 accuracy, or in tf32 where ``torch.backends.cuda.matmul.allow_tf32`` is set.

    Raises:
        ValueError: an argument of wrong shape, dtype, device or value; the message names it. Nothing is computed.
        RuntimeError: a second derivative is asked for, or no kernel exists for the device.
    """
    if queue is not None and queue.requires_grad:
        raise ValueError(
            "queue: expected a tensor without gradient, got one that requires it; for gradients into the keys use "
            "in_batch or EndToEnd, or pass queue.detach()"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    if same_id not in ("mask", "positive"):
        raise ValueError(f"same_id: expected 'mask' or 'positive', got {same_id!r}")
    if num_valid is not None and not isinstance(num_valid, Tensor) and num_valid < 0:  # the operator takes -1 for all
        raise ValueError(f"num_valid: expected a number of keys, got {num_valid}")
    options = _Options(temperature, normalize, reduction, label_smoothing, num_valid, in_batch, key_offset, same_id)
    problem = _info_nce_groups if query.dim() == 3 else _info_nce_rows
    loss, *figures = problem(query, key, queue, query_ids, queue_ids, options)
    return (loss, InfoNCEStats(*figures)) if return_stats else loss


class _Options(NamedTuple):
    temperature: float | Tensor
    normalize: bool
    reduction: str
    label_smoothing: float
    num_valid: int | Tensor | None
    in_batch: bool
    key_offset: int
    same_id: str


def _info_nce_rows(query, key, queue, query_ids, queue_ids, options: _Options) -> tuple[Tensor, ...]:
    """The reduced loss, and the stats [N] without gradient."""
    temperature, normalize, reduction, label_smoothing, num_valid, in_batch, key_offset, same_id = options
    grad = torch.is_grad_enabled()
    temperature_tensor, temperature_value = _scalar("temperature", temperature)
    wanted = (
        grad and query.requires_grad,
        grad and key.requires_grad,
        grad and temperature_tensor is not None and temperature_tensor.requires_grad,
    )
    inputs: tuple[Any, ...] = (
        query,
        key,
        queue,
        temperature_tensor,
        temperature_value,
        normalize,
        *wanted,
        query.is_cuda and (key if queue is None else queue).dtype == torch.float32 and _allow_tf32(),
    )
    no_ids = query_ids is None and queue_ids is None
    if queue is None or not no_ids or num_valid is not None or in_batch or key_offset != 0 or label_smoothing != 0:
        num_valid_tensor, num_valid_number = (
            (num_valid, -1) if isinstance(num_valid, Tensor) else (None, -1 if num_valid is None else num_valid)
        )
        inputs += (in_batch, key_offset, num_valid_tensor, num_valid_number, label_smoothing)
        inputs += (query_ids, queue_ids, same_id == "positive")
    if any(wanted):
        return _InfoNCE.apply(reduction, *inputs)
    return _info_nce_figures(reduction, inputs)[0]


def _info_nce_figures(reduction: str, inputs: tuple) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(the reduced loss and the stats), (what backward needs)."""
    operator = (
        torch.ops.moco_ext.info_nce_forward if len(inputs) == 10 else torch.ops.moco_ext.info_nce_contrast_forward
    )
    losses, lse, positive_logit, rank, *gradients = operator.default(*inputs)
    loss = losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses.clone()
    return (loss, losses, lse, positive_logit, rank), gradients


class _InfoNCE(torch.autograd.Function):
    """The gradients were computed in forward: backward scales them. Not registered with the operators, because
    torch.library's own layer takes three times as long, longer than the kernel for a small batch."""

    @staticmethod
    def forward(ctx, reduction, *inputs):
        figures, gradients = _info_nce_figures(reduction, inputs)
        ctx.mark_non_differentiable(*figures[1:])
        ctx.set_materialize_grads(False)
        ctx.reduction = reduction
        query, key, _, temperature, temperature_value, normalize, *ctx.wanted, tf32 = inputs[:10]
        ctx.second_pass = False
        if len(inputs) > 10:
            in_batch, key_offset, _, _, _, key_ids, _, positive = inputs[10:]
            ctx.second_pass = in_batch and key.requires_grad  # such keys get a gradient from every row
            ctx.options = temperature_value, normalize, tf32, key_offset, positive
        rest = (query, key, temperature, key_ids, figures[2]) if ctx.second_pass else ()
        ctx.save_for_backward(*gradients, *rest)
        ctx.dtypes = query.dtype, key.dtype, None if temperature is None else temperature.dtype
        ctx.rows, ctx.inputs = len(query), len(inputs)
        return figures

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return (None,) * (1 + ctx.inputs)
        if torch.is_grad_enabled():  # create_graph=True: going on would make the penalty a constant, silently
            raise RuntimeError("info_nce: second derivatives are not implemented (the gradient is computed in forward)")
        grad_query, grad_key, grad_temperature, *rest = ctx.saved_tensors
        query_grad, key_grad, temperature_grad = ctx.wanted
        query_dtype, key_dtype, temperature_dtype = ctx.dtypes
        if ctx.reduction == "mean":
            grad_loss = grad_loss / ctx.rows
        scale = grad_loss.unsqueeze(1) if ctx.reduction == "none" else grad_loss
        if ctx.second_pass:
            weights, query, key, temperature, key_ids, lse = rest
            temperature_value, normalize, tf32, key_offset, positive = ctx.options
            wanted_key = torch.ops.moco_ext.info_nce_contrast_backward.default(
                query, key, temperature, temperature_value, normalize, tf32, key_offset, key_ids, positive, lse,
                weights, grad_loss.expand(ctx.rows),
            )  # fmt: skip
        else:
            wanted_key = scale * grad_key if key_grad else None
        return (
            None,
            (scale * grad_query).to(query_dtype) if query_grad else None,
            wanted_key.to(key_dtype) if key_grad else None,
            None,
            (grad_loss * grad_temperature).sum().to(temperature_dtype) if temperature_grad else None,
            *(None,) * (ctx.inputs - 4),
        )


def _info_nce_groups(query, key, queue, query_ids, queue_ids, options: _Options) -> tuple[Tensor, ...]:
    """The same for G problems, stats [G, N]. Those that share a queue, and no keys of the batch, are one batch."""
    groups, n = query.shape[:2]
    if key.dim() != 3 or len(key) != groups:
        raise ValueError(f"key: expected [{groups}, N, C] as query, got {list(key.shape)}")
    if queue is not None and queue.dim() == 3 and len(queue) != groups:
        raise ValueError(f"queue: expected [K, C], or [{groups}, K, C] as query, got {list(queue.shape)}")
    reduction = options.reduction

    def of(x, group, dims):  # the group's own x, where they do not share one
        return x[group] if x is not None and x.dim() > dims else x

    if not options.in_batch and queue is not None and queue.dim() == 2 and (queue_ids is None or queue_ids.dim() == 1):
        ids = None if query_ids is None else query_ids.expand(groups, n).flatten()
        loss, *stats = _info_nce_rows(query.flatten(0, 1), key.flatten(0, 1), queue, ids, queue_ids, options)
        stats = [figure.unflatten(0, (groups, n)) for figure in stats]
        return (loss.unflatten(0, (groups, n)) if reduction == "none" else loss), *stats
    parts = [
        _info_nce_rows(query[g], key[g], of(queue, g, 2), of(query_ids, g, 1), of(queue_ids, g, 1), options)
        for g in range(groups)
    ]
    loss, *stats = (torch.stack(figures) for figures in zip(*parts, strict=True))
    return (loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss), *stats


@torch.library.register_fake("moco_ext::info_nce_forward")
def _(
    query,
    key,
    queue,
    temperature_tensor,
    temperature,
    normalize,
    query_grad,
    key_grad,
    temperature_grad,
    _tf32,
):
    _check_devices(queue=queue, query=query, key=key)
    n, c = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    row = [query.new_empty(n, dtype=dtype) for _ in range(3)]
    return (
        *row,
        query.new_empty(n, dtype=torch.int64),
        query.new_empty((n, c) if query_grad or temperature_grad else 0, dtype=dtype),
        query.new_empty((n, c) if key_grad else 0, dtype=dtype),
        query.new_empty(n if temperature_grad else 0, dtype=dtype),
    )


@torch.library.register_fake("moco_ext::info_nce_contrast_forward")
def _(
    query,
    key,
    queue,
    temperature_tensor,
    temperature,
    normalize,
    query_grad,
    key_grad,
    temperature_grad,
    _tf32,
    in_batch,
    *_,
):
    _check_devices(query=query, key=key, **({} if queue is None else {"queue": queue}))
    n, c = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    row = [query.new_empty(n, dtype=dtype) for _ in range(3)]
    return (
        *row,
        query.new_empty(n, dtype=torch.int64),
        query.new_empty((n, c) if query_grad or temperature_grad else 0, dtype=dtype),
        query.new_empty((n, c) if key_grad and not in_batch else 0, dtype=dtype),
        query.new_empty(n if temperature_grad else 0, dtype=dtype),
        query.new_empty((n, 2) if key_grad and in_batch else (0,), dtype=dtype),
    )


@torch.library.register_fake("moco_ext::info_nce_contrast_backward")
def _(query, key, temperature_tensor, temperature, normalize, _tf32, first, key_ids, same_id_positive, lse, *_):
    return key.new_empty(key.shape, dtype=lse.dtype)


# --- enqueue_ ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def enqueue_(queue: Tensor, queue_ptr: Tensor, keys: Tensor, *, normalize: bool = False) -> None:
    """Write a batch of keys into the circular queue, in place, and advance its pointer (Algorithm 1 of the paper).

    Overwrites rows ``[ptr, ptr + B) mod K``, cast to the queue's dtype. Any B is allowed; of more than K keys, the last
    K remain. The pointer is read and written on the device, without a host synchronization.

    Args:
        queue: [K, C] contiguous; float32, bfloat16 or float16 (float64 on the CPU).
        queue_ptr: [1] int64 on the queue's device, the next row to write; taken modulo K, so -1 is the last row. On
            CUDA between -2**39 and 2**39.
        keys: [B, C] float rows, with any strides. They may be a view of the queue: all keys are read before any row
            is written.
        normalize: scale each key to unit length.

    Raises:
        ValueError: wrong shape, dtype or device, a pointer in the queue's memory, or a freed storage. Nothing is
            written.
    """
    torch.ops.moco_ext.enqueue_(queue, queue_ptr, keys, normalize)
    torch.autograd.graph.increment_version((queue, queue_ptr))


@torch.library.register_fake("moco_ext::enqueue_")
def _(queue, queue_ptr, keys, normalize):
    _check_devices(queue=queue, queue_ptr=queue_ptr, keys=keys)


# --- momentum_update_ -------------------------------------------------------------------------------------------------


@torch.no_grad()
def momentum_update_(
    key_params: Sequence[Tensor],
    query_params: Sequence[Tensor],
    m: float | Tensor,
    *,
    low_precision: Sequence[Tensor] = (),
) -> None:
    """Move the key parameters towards the query parameters, in place: ``k = m·k + (1 - m)·q`` (Eq. 2 of the paper).

    Updates all tensors in one launch. Computes in float32 (float64 for float64) and rounds to the key's dtype. Keys in
    bfloat16 lose most steps to rounding at m = 0.999, so keep them in float32; the queries may be bfloat16.

    Args:
        key_params: tensors to update; views remain views. No two may share memory.
        query_params: tensors of the same shapes on the same device; their dtypes may differ. A query may be its own
            key, or appear several times, but may not share memory with another key.
        m: momentum in [0, 1], as a number or a 0-dim tensor (on the parameters' device, without a synchronization).
        low_precision: optional bfloat16 or float16 copies of the key parameters, one for each, with the same shapes and
            strides. They are written in the same pass: the encoder runs with the copies, while the float32 keys keep
            steps that are too small for 16 bits.

    Raises:
        ValueError: lists, shapes, dtypes or devices that do not match, m outside [0, 1], shared memory, or a freed
            storage. Nothing is written.
    """
    check_plain(key_params=key_params, query_params=query_params)
    m_tensor, value = _scalar("m", m)
    if m_tensor is None and not 0 <= value <= 1:
        raise ValueError(f"m: expected a momentum in [0, 1], got {m}")
    if len(key_params) == len(query_params) == len(low_precision) == 0:
        return  # without a tensor there is no device to dispatch to
    torch.ops.moco_ext.momentum_update_(list(key_params), list(query_params), m_tensor, value, list(low_precision))
    torch.autograd.graph.increment_version((*key_params, *low_precision))


@torch.library.register_fake("moco_ext::momentum_update_")
def _(key_params, query_params, m_tensor, m, low_precision):
    for i, (key, query) in enumerate(zip(key_params, query_params, strict=True)):
        _check_devices(**{"key_params[0]": key_params[0], f"key_params[{i}]": key, f"query_params[{i}]": query})


# --- l2_normalize -----------------------------------------------------------------------------------------------------


def l2_normalize(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Scale each row to unit length: ``x / max(||x||₂, eps)``, the value of ``F.normalize(x, dim=1)``.

    Args:
        x: [N, C]; float32, bfloat16 or float16 (float64 on the CPU).
        eps: floor of the norm, so that a zero row stays zero.

    Returns:
        [N, C] of x's dtype, differentiable (twice too).

    Raises:
        ValueError: x is not a float matrix, or eps is negative or not finite.
    """
    return torch.ops.moco_ext.l2_normalize_forward(x, eps)[0]


@torch.library.register_fake("moco_ext::l2_normalize_forward")
def _(x, eps):
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape[0], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32),
    )


def _l2_normalize_setup_context(ctx, inputs, output):
    x, ctx.eps = inputs
    _, norm = output
    ctx.mark_non_differentiable(norm)
    ctx.save_for_backward(x)


def _l2_normalize_backward(ctx, grad, _):
    # From x in plain differentiable torch, so that a second derivative is right too.
    (x,) = ctx.saved_tensors
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = wide.norm(dim=1, keepdim=True)
    floored = norm.clamp_min(ctx.eps)
    unit = wide / floored
    along = torch.where(norm > ctx.eps, (grad.to(wide.dtype) * unit).sum(dim=1, keepdim=True), 0.0)
    return ((grad.to(wide.dtype) - along * unit) / floored).to(x.dtype), None


torch.library.register_autograd(
    "moco_ext::l2_normalize_forward", _l2_normalize_backward, setup_context=_l2_normalize_setup_context
)
