"""The operators: for each one its wrapper, fake kernel and autograd formula, side by side.

Schemas are in csrc/ops.cpp, argument checks in csrc/checks.h, the same operators in plain torch in reference.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .library import load_libraries
from .stats import InfoNCEStats

__all__ = ["enqueue_", "info_nce", "l2_normalize", "momentum_update_"]

load_libraries()


def _scalar(name: str, value: float | Tensor) -> tuple[Tensor | None, float]:
    """A scalar as the operators take it: a tensor stays on its device, anything else is a number."""
    if isinstance(value, Tensor):
        return value, math.nan
    if isinstance(value, (str, bytes)):
        raise TypeError(f"{name}: expected a number or a 0-dim tensor, got {value!r}")
    try:
        return None, float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number or a 0-dim tensor, got {value!r}") from None


def _check_tensors(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def _refuse_forward_mode(name: str, *tensors: Tensor | None) -> None:
    """The operators would drop tangents without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and tensor.is_floating_point() and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(f"{name}: forward-mode differentiation is not implemented; use reverse mode")


def _native(operator: Any, *arguments: Any) -> Any:
    """Call an operator; its out-of-memory errors become torch's own type."""
    try:
        return operator(*arguments)
    except RuntimeError as error:
        if str(error).startswith("CUDA out of memory") and not isinstance(error, torch.OutOfMemoryError):
            raise torch.OutOfMemoryError(str(error)) from None
        raise


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


def _terms(cuda: bool) -> int:
    """The number of bfloat16 terms that CUDA kernels split float32 rows into: the precision of the products."""
    if not cuda:
        return 3
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        if dtype in (torch.bfloat16, torch.float16):
            return 1 if dtype == torch.bfloat16 else 2  # two have 16 bits, float16 has 11
    return 2 if _allow_tf32() else 3


# --- info_nce ---------------------------------------------------------------------------------------------------------

if TYPE_CHECKING:
    from typing_extensions import TypedDict, Unpack

    class _Keywords(TypedDict, total=False):
        normalize: bool
        reduction: str
        label_smoothing: float
        num_valid: int | Tensor | None
        in_batch: bool
        key_offset: int
        query_ids: Tensor | None
        queue_ids: Tensor | None
        same_id: str


@overload
def info_nce(
    query: Tensor,
    key: Tensor,
    queue: Tensor | None,
    temperature: float | Tensor = ...,
    *,
    return_stats: Literal[False] = ...,
    **keywords: Unpack[_Keywords],
) -> Tensor: ...
@overload
def info_nce(
    query: Tensor,
    key: Tensor,
    queue: Tensor | None,
    temperature: float | Tensor = ...,
    *,
    return_stats: Literal[True],
    **keywords: Unpack[_Keywords],
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
    in one pass over the queue. Neither the [N, K] logits nor a copy of the queue are stored, and the queue is not saved
    for backward: you may overwrite it before ``backward()``.

    Args:
        query: [N, C] features; float32, bfloat16 or float16 (float64 on the CPU, for gradient checks).
        key: [N, C] the positive of each row. Gets a gradient if it requires one.
        queue: [K, C] negatives, contiguous rows of unit length if ``normalize``. Its dtype may differ from query's. It
            gets no gradient. None: only the keys of the batch (with ``in_batch``).
        temperature: a positive number, or a tensor of one element on the queue's device, which may require a gradient.
        normalize: scale query and key rows to unit length first (``x / max(||x||, 1e-12)``). ``False`` takes all
            three as they are.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the N rows.
        return_stats: also return :class:`InfoNCEStats` (loss, lse, positive_logit, rank; [N] each, no gradient).
        label_smoothing: share of the target distribution, in [0, 1), that is spread evenly over the positive and all
            negatives, as in ``torch.nn.functional.cross_entropy``.
        num_valid: use only the first ``num_valid`` keys of the queue, for a queue that starts empty. A number, or an
            integer tensor of one element on the queue's device. On CUDA a tensor is not checked, which would stall the
            GPU: values out of range are clamped.
        in_batch: the other keys of the batch are negatives too. Key may then be [M, C] with M >= N, for example the
            keys of all ranks, and the positive of row n is ``key[key_offset + n]``. With ``queue=None`` this is the
            end-to-end mechanism. Keys that require a gradient get it as positives and as negatives, by a second pass in
            ``backward()``.
        key_offset: see ``in_batch``.
        query_ids: [N] integers that identify the image, text or class of each query; with ``in_batch`` [M], those of
            all keys. Negative: unknown, equal to none.
        queue_ids: [K] integers, the same for the queue.
        same_id: ``"mask"`` ignores negatives with the query's id; ``"positive"`` makes them additional positives (the
            loss is the cross-entropy of a target distribution that is uniform over the positives).

    Several problems in one call: query and key [G, N, C], with one queue [K, C] for all or [G, K, C], and ids likewise.
    The symmetric loss of two views is ``info_nce(torch.stack([q1, q2]), torch.stack([k2, k1]), queue)``, which reads
    the queue once.

    Returns:
        The loss, float32 (float64 if an input is float64): 0-dim, or [N] ([G, N]) for ``reduction="none"``. With
        ``return_stats``, the pair ``(loss, stats)``. The mean over N = 0 rows is NaN, as in
        ``torch.nn.functional.cross_entropy``.

    Precision: accumulation is float32. On CUDA, a bfloat16 or float16 queue is multiplied in its own dtype. A float32
    queue is multiplied with float32 accuracy by default, and in bfloat16 under bfloat16 autocast, as the matrix
    products of the published formulation are. In between, if ``torch.backends.cuda.matmul.allow_tf32`` is set or under
    float16 autocast, the scores keep 16 bits (tf32 and float16: 11), and the gradient's sum of keys has bfloat16
    operands (relative error of the gradient up to 4e-4). On a CPU the products are float32, also under autocast, where
    16 bits would not be faster.

    Reproducibility: on a CPU, equal inputs and an equal number of threads give equal bits. The keys are divided among
    the threads, so another number of threads changes the order of summation, and with it the last bits.

    Raises:
        ValueError, TypeError: an argument of the wrong type, shape, dtype, device or value; the message names it.
            Nothing is computed.
        RuntimeError: a second derivative or forward-mode differentiation is requested, there is no kernel for the
            device, or memory runs out (``torch.OutOfMemoryError`` on CUDA).
    """
    _check_tensors(query=query, key=key)
    if queue is not None and queue.requires_grad:
        raise ValueError(
            "queue: expected a tensor without gradient, got one that requires it; for gradients into the keys use "
            "in_batch or EndToEnd, or pass queue.detach()"
        )
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    if same_id not in ("mask", "positive"):
        raise ValueError(f"same_id: expected 'mask' or 'positive', got {same_id!r}")
    temperature_tensor, temperature_value = _scalar("temperature", temperature)
    _refuse_forward_mode("info_nce", query, key, temperature_tensor)
    grad = torch.is_grad_enabled()
    arguments = _Arguments(
        query,
        key,
        queue,
        temperature_tensor,
        temperature_value,
        normalize,
        _REDUCTIONS[reduction],
        grad and query.requires_grad,
        grad and key.requires_grad,
        grad and temperature_tensor is not None and temperature_tensor.requires_grad,
        _terms(query.is_cuda),
        in_batch,
        key_offset,
        num_valid if isinstance(num_valid, Tensor) else None,
        None if isinstance(num_valid, Tensor) else num_valid,
        label_smoothing,
        query_ids,
        queue_ids,
        same_id == "positive",
    )
    loss, *stats = (_info_nce_groups if query.dim() == 3 else _info_nce_rows)(arguments)
    return (loss, InfoNCEStats(*stats)) if return_stats else loss


_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # the schema's numbers, which are torch's
_NONE, _MEAN = 0, 1


class _Arguments(NamedTuple):
    """The arguments of ``info_nce_forward``, in the order of its schema."""

    query: Tensor
    key: Tensor
    queue: Tensor | None
    temperature_tensor: Tensor | None
    temperature: float
    normalize: bool
    reduction: int
    query_grad: bool
    key_grad: bool
    temperature_grad: bool
    terms: int
    in_batch: bool
    key_offset: int
    num_valid_tensor: Tensor | None
    num_valid: int | None
    label_smoothing: float
    query_ids: Tensor | None
    queue_ids: Tensor | None
    same_id_positive: bool


_NO_TENSORS = dict.fromkeys(
    ("query", "key", "queue", "temperature_tensor", "num_valid_tensor", "query_ids", "queue_ids")
)


class _Results(NamedTuple):
    """The results of ``info_nce_forward``; a gradient that was not asked for is empty."""

    loss: Tensor
    losses: Tensor
    lse: Tensor
    positive_logit: Tensor
    rank: Tensor
    grad_query: Tensor
    grad_key: Tensor
    grad_temperature: Tensor
    weights: Tensor


def _info_nce_rows(arguments: _Arguments) -> tuple[Tensor, ...]:
    """The reduced loss, and the stats [N] without gradient."""
    if arguments.query_grad or arguments.key_grad or arguments.temperature_grad:
        function = _TransformedInfoNCE if torch._C._are_functorch_transforms_active() else _InfoNCE
        return function.apply(*arguments)[:5]
    return _native(torch.ops.moco_ext.info_nce_forward.default, *arguments)[:5]


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad * scale``, rounded to dtype once; on CUDA in one kernel."""
    if grad.dtype == dtype or torch.is_grad_enabled():  # out= is not differentiable
        return (grad * scale).to(dtype)
    return torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype))


class _InfoNCE(torch.autograd.Function):
    """Backward only scales the gradients that forward has computed. Not registered with the operators, because
    torch.library's autograd takes three times as long, longer than the kernel for a small batch."""

    @staticmethod
    def forward(ctx, *arguments):
        results = _native(torch.ops.moco_ext.info_nce_forward.default, *arguments)
        _InfoNCE.save(ctx, arguments, results)
        ctx.mark_non_differentiable(*results[1:5])
        return results[:5]

    @staticmethod
    def save(ctx, arguments, results):
        a, r = _Arguments._make(arguments), _Results._make(results)
        ctx.set_materialize_grads(False)
        ctx.arguments = a._replace(**_NO_TENSORS)
        ctx.in_batch_gradient = a.in_batch and a.key_grad
        rest = (r.weights, r.lse, a.query_ids) if ctx.in_batch_gradient else ()
        ctx.save_for_backward(r.grad_query, r.grad_key, r.grad_temperature, a.query, a.key, a.temperature_tensor, *rest)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        grads: list[Tensor | None] = [None] * len(_Arguments._fields)
        if grad_loss is None:
            return tuple(grads)
        a = ctx.arguments
        grad_query, grad_key, grad_temperature, query, key, temperature, *rest = ctx.saved_tensors
        scale = grad_loss.unsqueeze(1) if a.reduction == _NONE else grad_loss
        if a.query_grad:
            grads[0] = _scaled(grad_query, scale, query.dtype)
        if ctx.in_batch_gradient:  # each key gets a gradient from every row
            weights, lse, ids = rest
            grad_losses = grad_loss / len(query) if a.reduction == _MEAN else grad_loss
            grads[1] = _native(
                torch.ops.moco_ext.info_nce_backward.default, query, key, temperature, a.temperature, a.normalize,
                a.terms, a.key_offset, ids, a.same_id_positive, lse, weights,
                grad_losses.expand(len(query)).to(lse.dtype),
            ).to(key.dtype)  # fmt: skip
        elif a.key_grad:
            grads[1] = _scaled(grad_key, scale, key.dtype)
        if a.temperature_grad:
            product = grad_loss * grad_temperature
            total = product.sum() if a.reduction == _NONE else product
            grads[3] = total.to(temperature.dtype).view(temperature.shape)
        if torch.is_grad_enabled():  # create_graph=True, torch.func
            inputs = [x for x in (query, key, temperature) if x is not None]
            grads = [None if grad is None else _NotTwice.apply(grad, *inputs) for grad in grads]
        return tuple(grads)


class _TransformedInfoNCE(_InfoNCE):
    """The form that torch.func asks for: every result an output, saved afterwards. It takes 15 µs longer."""

    @staticmethod
    def forward(*arguments):
        return _native(torch.ops.moco_ext.info_nce_forward.default, *arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        _InfoNCE.save(ctx, inputs, output)


class _NotTwice(torch.autograd.Function):
    """The identity, whose derivative with respect to the inputs of the loss is an error instead of zero."""

    @staticmethod
    def forward(grad, *inputs):
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError("info_nce: second derivatives are not implemented (the gradient is computed in forward)")


def _info_nce_groups(a: _Arguments) -> tuple[Tensor, ...]:
    """G problems, stats [G, N]. Groups that share a queue, and no keys of the batch, are one batch."""
    groups, n = a.query.shape[:2]
    if groups == 0:
        raise ValueError("query: expected at least one group in [G, N, C], got none")
    if a.key.dim() != 3 or len(a.key) != groups:
        raise ValueError(f"key: expected [{groups}, N, C] as query, got {list(a.key.shape)}")
    if a.queue is not None and a.queue.dim() == 3 and len(a.queue) != groups:
        raise ValueError(f"queue: expected [K, C], or [{groups}, K, C] as query, got {list(a.queue.shape)}")
    for name, ids in (("query_ids", a.query_ids), ("queue_ids", a.queue_ids)):
        if ids is not None and not (ids.dim() == 1 or (ids.dim() == 2 and len(ids) == groups)):
            raise ValueError(f"{name}: expected one row of ids for all groups or one each, got {list(ids.shape)}")

    def of(x: Tensor | None, group: int, dims: int) -> Tensor | None:  # the group's x, where each has one
        return x[group] if x is not None and x.dim() > dims else x

    shared_queue = a.queue is not None and a.queue.dim() == 2 and (a.queue_ids is None or a.queue_ids.dim() == 1)
    if not a.in_batch and shared_queue:
        ids = None if a.query_ids is None else a.query_ids.expand(groups, n).flatten()
        flat = a._replace(query=a.query.flatten(0, 1), key=a.key.flatten(0, 1), query_ids=ids)
        loss, *stats = _info_nce_rows(flat)
        stats = [values.unflatten(0, (groups, n)) for values in stats]
        return (loss.unflatten(0, (groups, n)) if a.reduction == _NONE else loss), *stats
    parts = [
        _info_nce_rows(
            a._replace(
                query=a.query[g],
                key=a.key[g],
                queue=of(a.queue, g, 2),
                query_ids=of(a.query_ids, g, 1),
                queue_ids=of(a.queue_ids, g, 1),
            ),
        )
        for g in range(groups)
    ]
    loss, *stats = (torch.stack(values) for values in zip(*parts, strict=True))
    return (loss if a.reduction == _NONE else loss.mean() if a.reduction == _MEAN else loss.sum()), *stats


@torch.library.register_fake("moco_ext::info_nce_forward")
def _(*arguments):
    a = _Arguments(*arguments)
    _check_devices(query=a.query, key=a.key, **({} if a.queue is None else {"queue": a.queue}))
    n, c = a.query.shape
    dtype = torch.float64 if torch.float64 in (a.query.dtype, a.key.dtype) else torch.float32
    empty = a.query.new_empty
    reduced = (n,) if a.reduction == _NONE else ()
    return (
        empty(reduced, dtype=dtype),
        *(empty(n, dtype=dtype) for _ in range(3)),
        empty(n, dtype=torch.int64),
        empty((n, c) if a.query_grad or a.temperature_grad else 0, dtype=dtype),
        empty((n, c) if a.key_grad and not a.in_batch else 0, dtype=dtype),
        empty(reduced if a.temperature_grad else (0,), dtype=dtype),
        empty((n, 3) if a.key_grad and a.in_batch else (0,), dtype=dtype),
    )


@torch.library.register_fake("moco_ext::info_nce_backward")
def _(query, key, temperature_tensor, temperature, normalize, terms, key_offset, query_ids, positive, lse, *_):
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
    _check_tensors(x=x)
    _refuse_forward_mode("l2_normalize", x)
    return _native(torch.ops.moco_ext.l2_normalize_forward, x, eps)[0]


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
