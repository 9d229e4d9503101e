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

__all__ = [
    "ExpectedKey",
    "NearestKeys",
    "enqueue_",
    "expected_key",
    "info_nce",
    "l2_normalize",
    "momentum_update_",
    "nearest_keys",
]

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
            if _is_wrapper(tensor):
                raise TypeError(
                    f"{name}: expected plain tensors, got {type(tensor).__name__}; parameters sharded by FSDP2 "
                    "(fully_shard) share no buffer: use its MixedPrecisionPolicy instead of low_precision"
                )


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, such as a parameter that FSDP2 (``fully_shard``) has sharded."""
    if not _is_wrapper(tensor):
        return False
    from torch.distributed.tensor import DTensor  # not in every build of torch

    return isinstance(tensor, DTensor)


def _is_wrapper(tensor: Tensor) -> bool:
    return hasattr(type(tensor), "__tensor_flatten__")


def _local_shards(keys: Sequence[Tensor], queries: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """This rank's part of each DTensor; other tensors as they are."""
    for i, (key, query) in enumerate(zip(keys, queries, strict=False)):  # the operator reports unequal lengths
        if _sharding(key) != _sharding(query):
            raise ValueError(
                f"query_params[{i}]: expected the sharding of key_params[{i}], {_sharding(key) or 'none'}, got "
                f"{_sharding(query) or 'none'}; shard both encoders alike"
            )
    local_keys, local_queries = (
        [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]  # type: ignore[attr-defined]
        for tensors in (keys, queries)
    )
    check_plain(key_params=local_keys, query_params=local_queries)
    return local_keys, local_queries


def _sharding(tensor: Any) -> tuple[Any, Any] | None:
    return (tensor.placements, tensor.device_mesh) if is_sharded(tensor) else None


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
        key_ids: Tensor | None
        queue_ids: Tensor | None
        same_id: str
        positives: str
        own_key: str
        target: Tensor | None


@overload
def info_nce(
    query: Tensor,
    key: Tensor | None,
    queue: Tensor | None,
    temperature: float | Tensor = ...,
    *,
    return_stats: Literal[False] = ...,
    **keywords: Unpack[_Keywords],
) -> Tensor: ...
@overload
def info_nce(
    query: Tensor,
    key: Tensor | None,
    queue: Tensor | None,
    temperature: float | Tensor = ...,
    *,
    return_stats: Literal[True],
    **keywords: Unpack[_Keywords],
) -> tuple[Tensor, InfoNCEStats]: ...
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
    """InfoNCE of queries against their positive key and a queue of negatives (MoCo, arXiv 1911.05722, Eq. 1).

    ``loss[n] = -log softmax([q_n·k_n, q_n·queue_1, ..., q_n·queue_K] / temperature)[0]``, computed with its gradients
    in one pass over the queue. Neither the [N, K] logits nor a copy of the queue are stored, and the queue is not saved
    for backward: you may overwrite it before ``backward()``.

    Args:
        query: [N, C] features; float32, bfloat16 or float16 (float64 on the CPU, for gradient checks).
        key: [N, C] the positive of each row. Gets a gradient if it requires one. None: there is no positive among the
            candidates, as in losses with a ``target``, or the positives are those of ``queue_ids``.
        queue: [K, C] negatives, contiguous rows of unit length if ``normalize``. Its dtype may differ from query's. It
            gets no gradient. None: only the keys of the batch (with ``in_batch``).
        temperature: a positive number, or a tensor of one element on the queue's device, which may require a gradient;
            or [N] (positive, not checked on CUDA), one for each row.
        normalize: scale query and key rows to unit length first (``x / max(||x||, 1e-12)``). ``False`` takes all
            three as they are.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the N rows.
        return_stats: also return :class:`InfoNCEStats` (loss, lse, positive_logit, rank; [N] each, no gradient).
            Without a key, positive_logit is the target's and the rank is relative to it, or -1 if positives have ids
            only.
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
        query_ids: [N] integers that identify the image, text or class of each query; with ``in_batch`` and without
            ``key_ids`` [M], those of all keys. Negative: unknown, equal to none.
        key_ids: [M] integers, the same for the keys of the batch, if query ``n`` and ``key[key_offset + n]`` differ.
        queue_ids: [K] integers, the same for the queue.
        same_id: ``"mask"`` ignores negatives with the query's id; ``"positive"`` makes them additional positives (the
            loss is the cross-entropy of a target distribution that is uniform over the positives). A row without any
            positive has the loss 0 and no gradient.
        positives: of several positives, ``"mean"`` is the mean of their ``-log p`` (SupCon's L_out), and ``"sum"`` the
            ``-log`` of the sum of their p (MIL-NCE, arXiv 1912.06430; SupCon's L_in but for a constant), in two passes.
        own_key: what ``key[key_offset + n]`` is to query n. ``"positive"``; ``"decoupled"``, the positive but not in
            the denominator (DCL, arXiv 2110.06848); or ``"excluded"``, not among its candidates: with ``in_batch``,
            where the keys are the queries themselves and positives have ids (SupCon, arXiv 2004.11362).
        target: [N, C] soft labels: the mean of the candidates under each row's target distribution, such as
            :func:`expected_key` of a teacher, taken as it is. The loss is the cross-entropy
            ``logsumexp(s) - unit(query)·target / temperature``, for any distribution, because it is linear in the
            scores s. The target gets no gradient, nor do ``in_batch`` keys.

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
    _check_tensors(query=query, **{} if key is None else {"key": key})
    if target is not None and target.requires_grad:
        raise ValueError("target: expected a tensor without gradient, got one that requires it; pass target.detach()")
    if queue is not None and queue.requires_grad:
        raise ValueError(
            "queue: expected a tensor without gradient, got one that requires it; for gradients into the keys use "
            "in_batch or EndToEnd, or pass queue.detach()"
        )
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    if same_id not in ("mask", "positive"):
        raise ValueError(f"same_id: expected 'mask' or 'positive', got {same_id!r}")
    if positives not in ("mean", "sum"):
        raise ValueError(f"positives: expected 'mean' or 'sum', got {positives!r}")
    if positives == "sum" and (same_id != "positive" or query_ids is None or own_key == "decoupled"):
        raise ValueError(
            "positives: expected 'mean' without same_id='positive' and ids, or with 'decoupled', got 'sum'"
        )
    if positives == "sum" and target is not None:
        raise ValueError("target: expected none with positives='sum', got a tensor")
    if own_key not in _OWN_KEYS:
        raise ValueError(f"own_key: expected 'positive', 'decoupled' or 'excluded', got {own_key!r}")
    temperature_tensor, temperature_value = _scalar("temperature", temperature)
    _refuse_forward_mode("info_nce", query, key, temperature_tensor)
    if temperature_tensor is not None and _has_rows(temperature_tensor):
        query = _over_temperature(_wide_rows(query, normalize), temperature_tensor)
        key = None if key is None else _wide_rows(key, normalize)
        temperature_tensor, temperature_value, normalize = None, 1.0, False
    grad = torch.is_grad_enabled()
    arguments = Arguments(
        query,
        key,
        queue,
        temperature_tensor,
        temperature_value,
        normalize,
        _REDUCTIONS[reduction],
        grad and query.requires_grad,
        grad and key is not None and key.requires_grad,
        grad and temperature_tensor is not None and temperature_tensor.requires_grad,
        _terms(query.is_cuda),
        in_batch,
        key_offset,
        num_valid if isinstance(num_valid, Tensor) else None,
        None if isinstance(num_valid, Tensor) else num_valid,
        label_smoothing,
        query_ids,
        queue_ids,
        _SAME_IDS[same_id],
        key_ids,
        target,
        _OWN_KEYS[own_key],
    )
    if target is not None and in_batch and arguments.key_grad:
        raise ValueError("key: expected no gradient with in_batch and a target, got one that requires it")
    if positives == "sum":
        losses, *stats = _summed_positives(arguments)
        loss = {"none": losses, "mean": losses.mean(), "sum": losses.sum()}[reduction]
        return (loss, InfoNCEStats(*stats)) if return_stats else loss
    loss, *stats = (_info_nce_groups if query.dim() == 3 else _info_nce_rows)(arguments)
    return (loss, InfoNCEStats(*stats)) if return_stats else loss


_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # the schema's numbers, which are torch's
_NONE, _MEAN = 0, 1
_SAME_IDS = {"mask": 0, "positive": 1, "only": 2}
_OWN_KEYS = {"positive": 0, "decoupled": 1, "excluded": 2}


def _wide_rows(x: Tensor, normalize: bool) -> Tensor:
    """Float32 (float64) rows, unit rows if ``normalize``; differentiable."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return l2_normalize(wide.flatten(0, -2)).view(wide.shape) if normalize else wide


def _has_rows(temperature: Tensor | None) -> bool:
    return temperature is not None and temperature.dim() > 0 and temperature.numel() != 1


def _over_temperature(rows: Tensor, temperature: Tensor) -> Tensor:
    """Rows [..., N, C] over a temperature, or over one each. On CUDA its values are not checked."""
    if not temperature.is_floating_point():
        raise ValueError(f"temperature: expected a floating point tensor, got {temperature.dtype}")
    if _has_rows(temperature):
        if temperature.shape != rows.shape[:-1]:
            expected = f"a number, or one for each row {list(rows.shape[:-1])}"
            raise ValueError(f"temperature: expected {expected}, got shape {list(temperature.shape)}")
        if temperature.device != rows.device:
            raise ValueError(f"temperature: expected on the device of query ({rows.device}), got {temperature.device}")
        temperature = temperature.unsqueeze(-1)
    if temperature.device.type == "cpu" and not torch.compiler.is_compiling():
        positive = (temperature > 0) & temperature.isfinite()
        if not positive.all():
            raise ValueError(f"temperature: expected a positive number, got {temperature[~positive].flatten()[0]:g}")
    return rows / temperature


def _summed_positives(a: Arguments) -> tuple[Tensor, ...]:
    """The logsumexp of all candidates less that of the positives: the losses of a target of zero."""
    run = _info_nce_groups if a.query.dim() == 3 else _info_nce_rows
    # Wide, so that the two gradients, which may cancel, are rounded to the inputs' dtype as a sum.
    query, key = _wide_rows(a.query, False), None if a.key is None else _wide_rows(a.key, False)
    a = a._replace(query=query, key=key, target=torch.zeros_like(query), reduction=_NONE)
    some = a._replace(same_id=_SAME_IDS["only"])
    if a.queue_ids is None:  # of unknown ids: no positives
        some = some._replace(queue=None, num_valid=None, num_valid_tensor=None)
    positive, _, _, _, above = run(some)
    none = positive == -torch.inf
    # No gradient of rows without a positive: their logsumexp may be NaN, whose gradient is NaN even times 0.
    a = a._replace(query=torch.where(none.unsqueeze(-1), query.detach(), query))
    everything, _, lse, logit, rank = run(a._replace(query_ids=None, key_ids=None, queue_ids=None))
    losses = torch.where(none, 0.0, everything - positive)
    if a.key is None or a.own_key == _OWN_KEYS["excluded"]:
        logit, rank = torch.where(none, 0.0, positive.detach()), torch.full_like(rank, -1)
    else:
        rank = rank - above
    return losses, losses.detach(), lse, logit, rank


class Arguments(NamedTuple):
    """The arguments of ``info_nce_forward``, in the order of its schema."""

    query: Tensor
    key: Tensor | None
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
    same_id: int
    key_ids: Tensor | None
    target: Tensor | None
    own_key: int


_NO_TENSORS = dict.fromkeys(
    ("query", "key", "queue", "temperature_tensor", "num_valid_tensor", "query_ids", "queue_ids", "key_ids", "target")
)


class Results(NamedTuple):
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


def _info_nce_rows(arguments: Arguments) -> tuple[Tensor, ...]:
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
        a, r = Arguments._make(arguments), Results._make(results)
        ctx.set_materialize_grads(False)
        ctx.arguments = a._replace(**_NO_TENSORS)
        ctx.in_batch_gradient = a.in_batch and a.key_grad
        rest = (r.weights, r.lse, a.query_ids, a.key_ids) if ctx.in_batch_gradient else ()
        ctx.save_for_backward(r.grad_query, r.grad_key, r.grad_temperature, a.query, a.key, a.temperature_tensor, *rest)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        grads: list[Tensor | None] = [None] * len(Arguments._fields)
        if grad_loss is None:
            return tuple(grads)
        a = ctx.arguments
        grad_query, grad_key, grad_temperature, query, key, temperature, *rest = ctx.saved_tensors
        scale = grad_loss.unsqueeze(1) if a.reduction == _NONE else grad_loss
        if a.query_grad:
            grads[0] = _scaled(grad_query, scale, query.dtype)
        if ctx.in_batch_gradient:  # each key gets a gradient from every row
            weights, lse, query_ids, key_ids = rest
            grad_losses = grad_loss / len(query) if a.reduction == _MEAN else grad_loss
            grads[1] = _native(
                torch.ops.moco_ext.info_nce_backward.default, query, key, temperature, a.temperature, a.normalize,
                a.terms, a.key_offset, query_ids, a.same_id, key_ids, lse, weights,
                grad_losses.expand(len(query)).to(lse.dtype),
            ).to(key.dtype)  # fmt: skip
        elif a.key_grad:
            grads[1] = _scaled(grad_key, scale, key.dtype)
        if a.temperature_grad:
            product = grad_loss * grad_temperature  # of a row without a positive, perhaps 0 times NaN
            total = torch.where(grad_loss == 0, 0, product).sum() if a.reduction == _NONE else product
            grads[3] = total.to(temperature.dtype).view(temperature.shape)
        if torch.is_grad_enabled():  # create_graph=True, torch.func
            inputs = [x for x in (query, key, temperature) if x is not None]
            grads = [None if grad is None else NotTwice.apply(grad, *inputs) for grad in grads]
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


class NotTwice(torch.autograd.Function):
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


def _info_nce_groups(a: Arguments) -> tuple[Tensor, ...]:
    """G problems, stats [G, N]. Groups that share a queue, and no keys of the batch, are one batch."""
    groups, n = a.query.shape[:2]
    if groups == 0:
        raise ValueError("query: expected at least one group in [G, N, C], got none")
    for name, x in (("key", a.key), ("target", a.target)):
        if x is not None and (x.dim() != 3 or len(x) != groups):
            raise ValueError(f"{name}: expected [{groups}, N, C] as query, got {list(x.shape)}")
    if a.queue is not None and a.queue.dim() == 3 and len(a.queue) != groups:
        raise ValueError(f"queue: expected [K, C], or [{groups}, K, C] as query, got {list(a.queue.shape)}")
    for name, ids in (("query_ids", a.query_ids), ("key_ids", a.key_ids), ("queue_ids", a.queue_ids)):
        if ids is not None and not (ids.dim() == 1 or (ids.dim() == 2 and len(ids) == groups)):
            raise ValueError(f"{name}: expected one row of ids for all groups or one each, got {list(ids.shape)}")

    def of(x: Tensor | None, group: int, dims: int) -> Tensor | None:  # the group's x, where each has one
        return x[group] if x is not None and x.dim() > dims else x

    shared_queue = a.queue is not None and a.queue.dim() == 2 and (a.queue_ids is None or a.queue_ids.dim() == 1)
    if not a.in_batch and shared_queue:
        ids = None if a.query_ids is None else a.query_ids.expand(groups, n).flatten()
        key, target = (None if x is None else x.flatten(0, 1) for x in (a.key, a.target))
        flat = a._replace(query=a.query.flatten(0, 1), key=key, target=target, query_ids=ids)
        loss, *stats = _info_nce_rows(flat)
        stats = [values.unflatten(0, (groups, n)) for values in stats]
        return (loss.unflatten(0, (groups, n)) if a.reduction == _NONE else loss), *stats
    parts = [
        _info_nce_rows(
            a._replace(
                query=a.query[g],
                key=of(a.key, g, 2),
                queue=of(a.queue, g, 2),
                query_ids=of(a.query_ids, g, 1),
                queue_ids=of(a.queue_ids, g, 1),
                key_ids=of(a.key_ids, g, 1),
                target=of(a.target, g, 2),
            ),
        )
        for g in range(groups)
    ]
    loss, *stats = (torch.stack(values) for values in zip(*parts, strict=True))
    return (loss if a.reduction == _NONE else loss.mean() if a.reduction == _MEAN else loss.sum()), *stats


@torch.library.register_fake("moco_ext::info_nce_forward")
def _(*arguments):
    a = Arguments(*arguments)
    tensors = {name: x for name in ("query", "key", "queue", "target") if (x := getattr(a, name)) is not None}
    _check_devices(**tensors)
    n, c = a.query.shape
    dtype = torch.float64 if torch.float64 in (x.dtype for x in tensors.values()) else torch.float32
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
def _(query, key, temperature_tensor, temperature, normalize, terms, key_offset, query_ids, positive, key_ids, lse, *_):
    return key.new_empty(key.shape, dtype=lse.dtype)


# --- expected_key -----------------------------------------------------------------------------------------------------


class ExpectedKey(NamedTuple):
    """What :func:`expected_key` returns.

    Attributes:
        keys: [N, C] mean of each row's candidates, weighted by their softmax.
        lse: [N] logsumexp of the row's scores over the temperature.
    """

    keys: Tensor
    lse: Tensor


@torch.no_grad()
def expected_key(
    query: Tensor,
    key: Tensor | None,
    queue: Tensor | None,
    temperature: float | Tensor = 0.07,
    *,
    normalize: bool = True,
    in_batch: bool = False,
    key_offset: int = 0,
    num_valid: int | Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    own_key: str = "positive",
) -> ExpectedKey:
    """The mean of the candidates under each query's softmax: a teacher's soft labels for :func:`info_nce`.

    ``keys[n] = Σ_j p_nj n_j`` with ``p_n = softmax(q_n·n_j / temperature)`` over the candidates n_j that
    :func:`info_nce` has for the same arguments, in one pass and without the [N, K] probabilities. As ``target`` it
    stands for the whole distribution, so momentum distillation (ALBEF, arXiv 2107.07651, Eq. 6) is

        teacher = expected_key(query_m, key_m, queue, T, in_batch=True).keys
        loss = info_nce(query, key_m, queue, T, in_batch=True, target=0.6 * unit(key_m) + 0.4 * teacher)

    and relational losses (ReSSL, arXiv 2107.09282), whose candidates are the queue alone, pass ``key=None`` to both.
    The cross-entropy differs from the KL divergence by the teacher's entropy, ``lse - q·keys / temperature``, which has
    no gradient.

    Args:
        query: [N, C] features of the teacher.
        key: [N, C] or, with ``in_batch``, [M, C]; None: the queue alone.
        queue, temperature, normalize, in_batch, key_offset, num_valid: as in :func:`info_nce`; no gradient is recorded.
        query_ids, key_ids, queue_ids: candidates other than the row's own key with the query's id are left out.
        own_key: ``"positive"``, it is a candidate, or ``"excluded"``.

    Returns:
        :class:`ExpectedKey`, float32 (float64 if an input is float64). Of no candidates, the keys are NaN and lse is
        -inf.

    Raises:
        ValueError, TypeError: as :func:`info_nce`.
    """
    if own_key not in ("positive", "excluded"):
        raise ValueError(f"own_key: expected 'positive' or 'excluded', got {own_key!r}")
    candidates = expected_candidates(
        query,
        key,
        queue,
        temperature,
        normalize=normalize,
        in_batch=in_batch,
        key_offset=key_offset,
        num_valid=num_valid,
        query_ids=query_ids,
        key_ids=key_ids,
        queue_ids=queue_ids,
        own_key=own_key,
    )
    return ExpectedKey(candidates.keys, candidates.lse)


class ExpectedCandidates(NamedTuple):
    """The candidates of each row: their mean [N, C] under their softmax, its logsumexp [N], and the number [N] of those
    that score above the row's own key."""

    keys: Tensor
    lse: Tensor
    rank: Tensor


@torch.no_grad()
def expected_candidates(
    query: Tensor,
    key: Tensor | None,
    queue: Tensor | None,
    temperature: float | Tensor,
    *,
    normalize: bool = True,
    in_batch: bool = False,
    key_offset: int = 0,
    num_valid: int | Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    own_key: str = "positive",
) -> ExpectedCandidates:
    """:func:`expected_key`; with ``"decoupled"``, of the queue alone, while the ranks refer to the own key [N, C]."""
    _check_tensors(query=query, **{} if key is None else {"key": key})
    if query.dim() == 3:
        raise ValueError(f"query: expected [N, C], got {list(query.shape)}; call it for each group")
    tensor, value = _scalar("temperature", temperature)
    # The gradient of logsumexp with respect to unit(query) / temperature, which is the loss of a target of zero.
    query = _over_temperature(
        _wide_rows(query, normalize), torch.tensor(value, dtype=torch.float64) if tensor is None else tensor
    )
    key = None if key is None else _wide_rows(key, normalize)
    decoupled = own_key == "decoupled"
    results = Results._make(
        _native(
            torch.ops.moco_ext.info_nce_forward.default,
            *Arguments(
                query,
                key,
                queue,
                None,
                1.0,
                False,
                _NONE,
                True,
                False,
                False,
                _terms(query.is_cuda),
                in_batch,
                key_offset,
                num_valid if isinstance(num_valid, Tensor) else None,
                None if isinstance(num_valid, Tensor) else num_valid,
                0.0,
                query_ids,
                queue_ids,
                _SAME_IDS["mask"],
                key_ids,
                None if decoupled else torch.zeros_like(query),
                _OWN_KEYS[own_key],
            ),
        )
    )
    mean = results.grad_query + key if decoupled and key is not None else results.grad_query
    return ExpectedCandidates(mean, results.lse, results.rank)


# --- nearest_keys -----------------------------------------------------------------------------------------------------


class NearestKeys(NamedTuple):
    """What :func:`nearest_keys` returns.

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
        num_valid: use only the first ``num_valid`` keys, as in :func:`info_nce`. Of fewer than k keys, the remaining
            similarities are -inf and indices -1.

    Returns:
        :class:`NearestKeys`; similarities are float32 (float64 if an input is float64). No gradient is recorded.

    Raises:
        ValueError, TypeError: an argument of the wrong type, shape, dtype, device or value; the message names it.
    """
    _check_tensors(query=query, queue=queue)
    tensor, number = (num_valid, None) if isinstance(num_valid, Tensor) else (None, num_valid)
    return NearestKeys(*_native(torch.ops.moco_ext.nearest_keys.default, query, queue, k, normalize, tensor, number))


@torch.library.register_fake("moco_ext::nearest_keys")
def _(query, queue, k, normalize, num_valid_tensor, num_valid):
    _check_devices(query=query, queue=queue)
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
    if num_valid is not None and not 0 <= num_valid <= K:
        raise ValueError(f"num_valid: expected 0 to {K} keys of the queue, got {num_valid}")
    for name, x in (("query", query), ("queue", queue)):
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {x.dtype}")
    _check_devices(query=query, queue=queue)
    rows = _wide_rows(query, normalize)
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


# --- enqueue_ ---------------------------------------------------------------------------------------------------------


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

    Overwrites rows ``[ptr, ptr + B) mod K``, cast to the queue's dtype. Any B is allowed; of more than K keys, the last
    K remain. The pointer is read and written on the device, without a host synchronization.

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

    Of DTensors, such as parameters sharded by FSDP2 (``fully_shard``), each rank updates its own shards: nothing is
    gathered.

    Args:
        key_params: tensors to update; views remain views. No two may share memory.
        query_params: tensors of the same shapes on the same device, sharded alike; their dtypes may differ. A query may
            be its own key, or appear several times, but may not share memory with another key.
        m: momentum in [0, 1], as a number or a 0-dim tensor (on the parameters' device, without a synchronization).
        low_precision: optional bfloat16 or float16 copies of the key parameters, one for each, with the same shapes and
            strides. They are written in the same pass: the encoder runs with the copies, while the float32 keys keep
            steps that are too small for 16 bits.

    Raises:
        ValueError: lists, shapes, dtypes, devices or shardings that do not match, m outside [0, 1], shared memory, or a
            freed storage. Nothing is written.
        TypeError: tensor subclasses other than DTensor.
    """
    keys, queries = _local_shards(key_params, query_params)
    m_tensor, value = _scalar("m", m)
    if m_tensor is None and not 0 <= value <= 1:
        raise ValueError(f"m: expected a momentum in [0, 1], got {m}")
    if len(key_params) == len(query_params) == len(low_precision) == 0:
        return  # without a tensor there is no device to dispatch to
    torch.ops.moco_ext.momentum_update_(keys, queries, m_tensor, value, list(low_precision))
    torch.autograd.graph.increment_version((*keys, *low_precision))


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
    # The squares of huge rows overflow, their norms may not. Not in float64, which MPS lacks.
    norm = torch.where(norm.isinf(), (wide * 2.0**-80).norm(dim=1, keepdim=True) * 2.0**80, norm)
    floored = norm.clamp_min(ctx.eps)
    unit = wide / floored
    along = torch.where(norm > ctx.eps, (grad.to(wide.dtype) * unit).sum(dim=1, keepdim=True), 0.0)
    return ((grad.to(wide.dtype) - along * unit) / floored).to(x.dtype), None


torch.library.register_autograd(
    "moco_ext::l2_normalize_forward", _l2_normalize_backward, setup_context=_l2_normalize_setup_context
)


# --- color_steps ------------------------------------------------------------------------------------------------------


def color_steps(images: Tensor, steps: Tensor, factors: Tensor, kernels: Tensor) -> Tensor:
    """What follows the crop in an augmentation, in one pass a view: the kernel of ``color_transform`` on a CPU.

    Args:
        images: uint8 [N, 3, H, W], on the CPU.
        steps: int64 [N, S] the steps of each image, in order. -1: none, 0: brightness, 1: contrast, 2: saturation,
            3: hue, 4: grayscale, 5: blur, 6: solarization, 7: horizontal flip.
        factors: float32 [N, 4] of brightness, contrast and saturation, and the shift of the hue in turns.
        kernels: float32 [N, T] of the blur, T odd.

    Returns:
        New images of the same shape, rounded once.

    Raises:
        ValueError: an argument of another shape or dtype, or an unknown step.
    """
    return _native(torch.ops.moco_ext.color_steps.default, images, steps, factors, kernels)


@torch.library.register_fake("moco_ext::color_steps")
def _(images, steps, factors, kernels):
    return images.new_empty(images.shape)
