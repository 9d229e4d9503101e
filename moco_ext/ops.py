"""The operators: for each one its wrapper, fake kernel and autograd formula, side by side.

Schemas are in csrc/ops.cpp, argument checks in csrc/checks.h, the same operators in plain torch in reference.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NoReturn, overload

import torch
from torch import Tensor

from .stats import InfoNCEStats

__all__ = ["enqueue_", "info_nce", "l2_normalize", "momentum_update_"]

LIBRARY_FOLDER = Path(__file__).parent / "lib"
CUDA_LIBRARY = LIBRARY_FOLDER / "libmoco_ext_cuda.so"


def _load_libraries() -> None:
    cpu = LIBRARY_FOLDER / "libmoco_ext.so"
    if not cpu.is_file():
        raise ImportError(
            f"moco_ext: the native library is missing, expected {cpu}. In a source checkout, run "
            "`pip install -e .` (or import from another folder if you meant the installed package)."
        )
    torch.ops.load_library(cpu)
    if torch.version.cuda and CUDA_LIBRARY.is_file():
        torch.ops.load_library(CUDA_LIBRARY)
    else:
        for name in ("info_nce_forward", "enqueue_", "momentum_update_", "l2_normalize_forward"):
            torch.library.impl(f"moco_ext::{name}", "cuda", _missing_cuda_kernel)


def _missing_cuda_kernel(*args: object) -> NoReturn:
    """What CUDA tensors reach where no CUDA library is loaded, instead of the dispatcher's table of backends."""
    if CUDA_LIBRARY.is_file():
        why = f"this torch ({torch.__version__}) has no CUDA"
    else:
        why = "this build is for the CPU only; reinstall with MOCO_EXT_CUDA=1 pip install --no-cache-dir ."
    raise RuntimeError(f"moco_ext: no CUDA kernels are loaded, tensors on a GPU cannot be used: {why}")


_load_libraries()


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
    queue: Tensor,
    temperature: float | Tensor = ...,
    *,
    normalize: bool = ...,
    reduction: str = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...
@overload
def info_nce(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float | Tensor = ...,
    *,
    normalize: bool = ...,
    reduction: str = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, InfoNCEStats]: ...
def info_nce(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, InfoNCEStats]:
    """InfoNCE of queries against their positive key and a queue of negatives (MoCo, arXiv 1911.05722, Eq. 1).

    ``loss[n] = -log softmax([q_n·k_n, q_n·queue_1, ..., q_n·queue_K] / temperature)[0]``, computed with its gradients
    in one pass over the queue. Neither the [N, K] logits nor a copy of the queue ever exist, and the queue is not
    saved for the backward pass: it may be overwritten before ``backward()``.

    Args:
        query: [N, C] features; float32, bfloat16 or float16 (float64 on the CPU, for gradient checks).
        key: [N, C] the positive of each row; gradient flows to it if it requires one.
        queue: [K, C] negatives, contiguous rows, unit length if ``normalize``; its dtype may differ from query's.
            It takes no gradient.
        temperature: a positive number, or a 0-dim tensor on the queue's device, which may require a gradient.
        normalize: scale query and key rows to unit length first (``x / max(||x||, 1e-12)``). ``False`` takes all
            three as they are.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the N rows.
        return_stats: also return :class:`InfoNCEStats` (loss, lse, positive_logit, rank; [N] each, no gradient).

    Returns:
        The loss, float32 (float64 for float64 input): 0-dim, or [N] for ``reduction="none"``; with ``return_stats``
        the pair ``(loss, stats)``. N = 0 gives NaN for the mean, as in ``torch.nn.functional.cross_entropy``.

    Precision: accumulation is float32. On CUDA a bfloat16 or float16 queue is multiplied on tensor cores in its own
    dtype; a float32 queue in float32 accuracy, or in tf32 where ``torch.backends.cuda.matmul.allow_tf32`` is set.

    Raises:
        ValueError: an argument of wrong shape, dtype, device or value; the message names it. Nothing is computed.
        RuntimeError: a second derivative is asked for, or no kernel exists for the device.
    """
    if queue.requires_grad:
        raise ValueError(
            "queue: expected a tensor without gradient, got one that requires it; for gradients into the keys use "
            "EndToEnd, or pass queue.detach()"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    grad = torch.is_grad_enabled()
    temperature_tensor, temperature_value = _scalar("temperature", temperature)
    loss, lse, positive_logit, rank, _, _, _ = torch.ops.moco_ext.info_nce_forward(
        query,
        key,
        queue,
        temperature_tensor,
        temperature_value,
        normalize,
        grad and query.requires_grad,
        grad and key.requires_grad,
        grad and temperature_tensor is not None and temperature_tensor.requires_grad,
        query.is_cuda and queue.dtype == torch.float32 and _allow_tf32(),
    )
    stats = InfoNCEStats(loss.detach(), lse.detach(), positive_logit.detach(), rank) if return_stats else None
    if reduction == "mean":
        loss = loss.mean()
    elif reduction == "sum":
        loss = loss.sum()
    return loss if stats is None else (loss, stats)


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
    dtype = torch.float64 if queue.dtype == torch.float64 else torch.float32
    row = [queue.new_empty(n, dtype=dtype) for _ in range(3)]
    return (
        *row,
        queue.new_empty(n, dtype=torch.int64),
        queue.new_empty((n, c) if query_grad or temperature_grad else 0, dtype=dtype),
        queue.new_empty((n, c) if key_grad else 0, dtype=dtype),
        queue.new_empty(n if temperature_grad else 0, dtype=dtype),
    )


def _info_nce_setup_context(ctx, inputs, output):
    query, key, _, temperature_tensor, _, _, *ctx.wanted, _ = inputs
    _, lse, positive_logit, rank, grad_query, grad_key, grad_temperature = output
    ctx.mark_non_differentiable(lse, positive_logit, rank, grad_query, grad_key, grad_temperature)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_query, grad_key, grad_temperature)
    ctx.dtypes = query.dtype, key.dtype, None if temperature_tensor is None else temperature_tensor.dtype


def _info_nce_backward(ctx, grad_loss, *_):
    grad_query, grad_key, grad_temperature = ctx.saved_tensors
    if grad_loss is None:
        return (None,) * 10
    if torch.is_grad_enabled():  # create_graph=True: going on would make the penalty a constant, silently
        raise RuntimeError("info_nce: second derivatives are not implemented (the gradient is computed in forward)")
    query_grad, key_grad, temperature_grad = ctx.wanted
    query_dtype, key_dtype, temperature_dtype = ctx.dtypes
    row = grad_loss.unsqueeze(1)
    return (
        (row * grad_query).to(query_dtype) if query_grad else None,
        (row * grad_key).to(key_dtype) if key_grad else None,
        None,
        grad_loss.dot(grad_temperature).to(temperature_dtype) if temperature_grad else None,
        *(None,) * 6,
    )


torch.library.register_autograd("moco_ext::info_nce_forward", _info_nce_backward, setup_context=_info_nce_setup_context)


# --- enqueue_ ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def enqueue_(queue: Tensor, queue_ptr: Tensor, keys: Tensor, *, normalize: bool = False) -> None:
    """Write a batch of keys into the circular queue, in place, and advance its pointer (Algorithm 1 of the paper).

    Rows ``[ptr, ptr + B) mod K`` are overwritten, cast to the queue's dtype. Any B: it wraps around, and of more than
    K keys the last K stay. The pointer is read and written on the device: no host synchronisation.

    Args:
        queue: [K, C] contiguous; float32, bfloat16 or float16 (float64 on the CPU).
        queue_ptr: [1] int64 on the queue's device, the next row to write, not negative; taken modulo K.
        keys: [B, C] float rows, of any strides.
        normalize: scale each key to unit length on the way.

    Raises:
        ValueError: an argument of wrong shape, dtype or device; nothing is written.
    """
    torch.ops.moco_ext.enqueue_(queue, queue_ptr, keys, normalize)
    torch.autograd.graph.increment_version((queue, queue_ptr))


@torch.library.register_fake("moco_ext::enqueue_")
def _(queue, queue_ptr, keys, normalize):
    _check_devices(queue=queue, queue_ptr=queue_ptr, keys=keys)


# --- momentum_update_ -------------------------------------------------------------------------------------------------


@torch.no_grad()
def momentum_update_(key_params: Sequence[Tensor], query_params: Sequence[Tensor], m: float | Tensor) -> None:
    """Move the key parameters towards the query parameters, in place: ``k = m·k + (1 - m)·q`` (Eq. 2 of the paper).

    All tensors in one launch. Computed in float32 (float64 for float64) and rounded to the key's dtype: at m = 0.999
    keys kept in bfloat16 would round most steps away, so keep them in float32 and let the queries be bfloat16.

    Args:
        key_params: tensors to update; views stay views.
        query_params: as many tensors of the same shapes on the same device; dtypes may differ.
        m: momentum in [0, 1], or a 0-dim tensor holding it (on the parameters' device: no synchronisation).

    Raises:
        ValueError: lists, shapes, dtypes or devices that do not match; nothing is written.
    """
    m_tensor, value = _scalar("m", m)
    if len(key_params) == len(query_params) == 0:
        return  # without a tensor there is no device to dispatch to
    torch.ops.moco_ext.momentum_update_(list(key_params), list(query_params), m_tensor, value)
    torch.autograd.graph.increment_version(tuple(key_params))


@torch.library.register_fake("moco_ext::momentum_update_")
def _(key_params, query_params, m_tensor, m):
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
