"""info_nce: options, groups and several positives, reduced to calls of the native operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from ..stats import InfoNCEStats
from ._l2_normalize import wide_rows
from .checks import check_tensors, refuse_forward_mode, scalar
from .info_nce_operator import MEAN, NONE, OWN_KEYS, REDUCTIONS, SAME_IDS, Arguments, current_precision, info_nce_rows

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
    products of the published formulation are. If ``torch.backends.cuda.matmul.allow_tf32`` is set, or under float16
    autocast, the operands keep 11 bits, as those of tf32 and float16 do (relative error of the gradient up to 2e-4). On
    a CPU the products are float32, also under autocast, where 16 bits would not be faster.

    Reproducibility: on a CPU, equal inputs and an equal number of threads give equal bits. The keys are divided among
    the threads, so another number of threads changes the order of summation, and with it the last bits.

    Raises:
        ValueError, TypeError: an argument of the wrong type, shape, dtype, device or value; the message names it.
            Nothing is computed.
        RuntimeError: a second derivative or forward-mode differentiation is requested, or memory runs out
            (``torch.OutOfMemoryError`` on CUDA).
    """
    optional = {"key": key, "queue": queue, "target": target}
    check_tensors(query=query, **{name: x for name, x in optional.items() if x is not None})
    if target is not None and target.requires_grad:
        raise ValueError("target: expected a tensor without gradient, got one that requires it; pass target.detach()")
    if queue is not None and queue.requires_grad:
        raise ValueError(
            "queue: expected a tensor without gradient, got one that requires it; for gradients into the keys use "
            "in_batch or EndToEnd, or pass queue.detach()"
        )
    if reduction not in REDUCTIONS:
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
    if own_key not in OWN_KEYS:
        raise ValueError(f"own_key: expected 'positive', 'decoupled' or 'excluded', got {own_key!r}")
    temperature_tensor, temperature_value = scalar("temperature", temperature)
    refuse_forward_mode("info_nce", query, key, temperature_tensor)
    if temperature_tensor is not None and _has_rows(temperature_tensor):
        query = over_temperature(wide_rows(query, normalize), temperature_tensor)
        key = None if key is None else wide_rows(key, normalize)
        temperature_tensor, temperature_value, normalize = None, 1.0, False
    grad = torch.is_grad_enabled()
    arguments = Arguments(
        query,
        key,
        queue,
        temperature_tensor,
        temperature_value,
        normalize,
        REDUCTIONS[reduction],
        grad and query.requires_grad,
        grad and key is not None and key.requires_grad,
        grad and temperature_tensor is not None and temperature_tensor.requires_grad,
        current_precision(query.is_cuda),
        in_batch,
        key_offset,
        num_valid if isinstance(num_valid, Tensor) else None,
        None if isinstance(num_valid, Tensor) else num_valid,
        label_smoothing,
        query_ids,
        queue_ids,
        SAME_IDS[same_id],
        key_ids,
        target,
        OWN_KEYS[own_key],
    )
    if target is not None and in_batch and arguments.key_grad:
        raise ValueError("key: expected no gradient with in_batch and a target, got one that requires it")
    if positives == "sum":
        losses, *stats = _summed_positives(arguments)
        loss = {"none": losses, "mean": losses.mean(), "sum": losses.sum()}[reduction]
        return (loss, InfoNCEStats(*stats)) if return_stats else loss
    loss, *stats = (_info_nce_groups if query.dim() == 3 else info_nce_rows)(arguments)
    return (loss, InfoNCEStats(*stats)) if return_stats else loss


def _has_rows(temperature: Tensor | None) -> bool:
    return temperature is not None and temperature.dim() > 0 and temperature.numel() != 1


def over_temperature(rows: Tensor, temperature: Tensor) -> Tensor:
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
    run = _info_nce_groups if a.query.dim() == 3 else info_nce_rows
    # Wide, so that the two gradients, which may cancel, are rounded to the inputs' dtype as a sum.
    query, key = wide_rows(a.query, False), None if a.key is None else wide_rows(a.key, False)
    a = a._replace(query=query, key=key, target=torch.zeros_like(query), reduction=NONE)
    some = a._replace(same_id=SAME_IDS["only"])
    if a.queue_ids is None:  # of unknown ids: no positives
        some = some._replace(queue=None, num_valid=None, num_valid_tensor=None)
    positive, _, _, _, above = run(some)
    none = positive == -torch.inf
    # No gradient of rows without a positive: their logsumexp may be NaN, whose gradient is NaN even times 0.
    a = a._replace(query=torch.where(none.unsqueeze(-1), query.detach(), query))
    everything, _, lse, logit, rank = run(a._replace(query_ids=None, key_ids=None, queue_ids=None))
    losses = torch.where(none, 0.0, everything - positive)
    if a.key is None or a.own_key == OWN_KEYS["excluded"]:
        logit, rank = torch.where(none, 0.0, positive.detach()), torch.full_like(rank, -1)
    else:
        rank = rank - above
    return losses, losses.detach(), lse, logit, rank


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
        if a.query_ids is not None and a.query_ids.shape[-1] != n:
            raise ValueError(f"query_ids: expected {n} ids, one for each row, got shape {list(a.query_ids.shape)}")
        ids = None if a.query_ids is None else a.query_ids.expand(groups, n).flatten()
        key, target = (None if x is None else x.flatten(0, 1) for x in (a.key, a.target))
        flat = a._replace(query=a.query.flatten(0, 1), key=key, target=target, query_ids=ids)
        loss, *stats = info_nce_rows(flat)
        stats = [values.unflatten(0, (groups, n)) for values in stats]
        return (loss.unflatten(0, (groups, n)) if a.reduction == NONE else loss), *stats
    parts = [
        info_nce_rows(
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
    return (loss if a.reduction == NONE else loss.mean() if a.reduction == MEAN else loss.sum()), *stats
