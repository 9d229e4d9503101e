"""PyTorch Metric Learning's cross-batch memory, NT-Xent and SupCon losses, on this package's kernels.

Replaces what a trainer imports from ``pytorch_metric_learning.losses`` (2.9) and, for several processes,
``DistributedLossWrapper`` from its ``utils.distributed``. Miners, other losses, distances and reducers are still the
peer's, and an error here.

The losses of embeddings q and references k, of any norm, with cosine similarities s over the temperature:

- NT-Xent (InfoNCE), the mean over all pairs of equal labels (a, p): ``-log(e^s_ap / (e^s_ap + Σ_n e^s_an))``, where n
  are the references of other labels. Other positives are not in the denominator.
- SupCon (arXiv 2004.11362, L_out): for each embedding, the mean over its positives of ``-log softmax``, with all
  references in the denominator; then the mean over the embeddings where that is above zero.

The similarities [N, K] are never stored. NT-Xent computes those of its positive pairs in pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..distributed import all_gather, rank, world_size
from ..ops import info_nce, l2_normalize
from ..ops.checks import check_positive

__all__ = ["CrossBatchMemory", "DistributedLossWrapper", "NTXentLoss", "SupConLoss"]

_PIECE_ELEMENTS = 1 << 22  # of the gathered rows of a piece of the pairs: 16 MB of float32


# The losses of unit queries [N, C] and keys [K, C] with ids: key ``own + n`` is query n itself, which is not one of its
# positives; own is None if no key is. Keys with a gradient are those of the batch.


def _ntxent(query: Tensor, ids: Tensor, keys: Tensor, key_ids: Tensor, own: int | None, temperature: Any) -> Tensor:
    if keys.requires_grad and own is not None:
        # The decoupled loss is the logsumexp of the negatives less the own score.
        options: dict[str, Any] = {"query_ids": ids, "key_ids": key_ids, "reduction": "none", "normalize": False}
        decoupled = info_nce(
            query, keys, None, temperature, in_batch=True, key_offset=own, own_key="decoupled", **options
        )
        negatives = decoupled + (query * keys[own : own + len(query)]).sum(1) / temperature
    else:
        options = {"query_ids": ids, "queue_ids": key_ids, "reduction": "none", "normalize": False}
        negatives = info_nce(query, None, keys, temperature, target=torch.zeros_like(query), **options)
    anchors, positives = _positive_pairs(ids, key_ids, own)
    if len(anchors) == 0:
        return (query * 0).sum()

    def losses(anchors: Tensor, positives: Tensor) -> Tensor:
        scores = (query.index_select(0, anchors) * keys.index_select(0, positives)).sum(1) / temperature
        return -F.logsigmoid(scores - negatives.index_select(0, anchors)).sum()

    piece = max(_PIECE_ELEMENTS // query.shape[1], 1)
    if len(anchors) <= piece:
        return losses(anchors, positives) / len(anchors)
    total = query.new_zeros(())
    for pairs in zip(anchors.split(piece), positives.split(piece), strict=True):
        total = total + checkpoint(losses, *pairs, use_reentrant=False, preserve_rng_state=False)
    return total / len(anchors)


def _supcon(query: Tensor, ids: Tensor, keys: Tensor, key_ids: Tensor, own: int | None, temperature: Any) -> Tensor:
    options: dict[str, Any] = {"same_id": "positive", "reduction": "none", "normalize": False}
    if own is None:
        losses = info_nce(query, None, keys, temperature, query_ids=ids, queue_ids=key_ids, **options)
    else:
        options |= {"in_batch": True, "key_offset": own, "own_key": "excluded"}
        losses = info_nce(query, keys, None, temperature, query_ids=ids, key_ids=key_ids, **options)
    any_negative = (ids != ids[0]).any() | (key_ids != ids[0]).any()
    counted = ~(losses <= 0) & any_negative  # a NaN remains visible
    return torch.where(counted, losses, 0.0).sum() / counted.sum().clamp_min(1)


def _positive_pairs(ids: Tensor, key_ids: Tensor, own: int | None) -> tuple[Tensor, Tensor]:
    """The rows of queries and keys of equal ids, but for the query itself."""
    in_order, order = key_ids.sort()
    first = torch.searchsorted(in_order, ids)
    count = torch.searchsorted(in_order, ids, right=True) - first
    anchors = torch.repeat_interleave(count)
    nth = torch.arange(len(anchors), device=ids.device) - (count.cumsum(0) - count)[anchors]
    positives = order[first[anchors] + nth]
    if own is None:
        return anchors, positives
    others = positives != anchors + own
    return anchors[others], positives[others]


def _unit(x: Tensor) -> Tensor:
    return l2_normalize(x.to(torch.promote_types(x.dtype, torch.float32)))  # gradients are rounded as a sum


def _labels(name: str, labels: Tensor | None, rows: Tensor) -> Tensor:
    """Labels on the device of their rows, checked."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != rows.shape[:1]:
        got = type(labels).__name__ if not isinstance(labels, Tensor) else f"{labels.dtype} {list(labels.shape)}"
        raise ValueError(f"{name}: expected integers [{len(rows)}], one for each embedding, got {got}")
    return labels.to(rows.device)


def _ids(labels: Tensor) -> Tensor:
    """Ids that the operators do not take for unknown, which negative ones are; equal where the labels are."""
    return labels.long() & torch.iinfo(torch.int64).max


def _check_rows(name: str, x: Tensor, dim: int | None = None) -> None:
    if x.dim() != 2 or (dim is not None and x.shape[1] != dim):
        raise ValueError(f"{name}: expected [N, {'C' if dim is None else dim}], got {list(x.shape)}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):  # before the memory takes it
        raise ValueError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")


def _refuse_pairs(indices_tuple: Any) -> None:
    if indices_tuple is not None:
        raise ValueError(
            f"indices_tuple: expected None, all pairs, got {type(indices_tuple).__name__}; pairs of a miner are not "
            "supported"
        )


class _PairLoss(nn.Module):
    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss, 0-dim, of all pairs; zero, with a gradient of zero, if none is positive or none negative.

        Args:
            embeddings: [N, C], of any norm; float32, bfloat16 or float16 (float64 on the CPU).
            labels: [N] integers.
            indices_tuple: not supported.
            ref_emb: [K, C] to compare with, without gradient; None: the embeddings, each with the others.
            ref_labels: [K] integers, the labels of ref_emb.

        Raises:
            ValueError: an argument of the wrong shape or dtype, an indices_tuple, or a ref_emb that requires a
                gradient (compare ``torch.cat([embeddings, ref_emb])`` with itself instead).
        """
        _refuse_pairs(indices_tuple)
        _check_rows("embeddings", embeddings)
        labels = _labels("labels", labels, embeddings)
        if ref_emb is None:
            if ref_labels is not None:
                raise ValueError("ref_emb: expected a tensor together with ref_labels, got None")
            return _loss_of(self, embeddings, labels, embeddings, labels, 0)
        _check_rows("ref_emb", ref_emb, embeddings.shape[1])
        if ref_emb.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "ref_emb: expected a tensor without gradient, got one that requires it; compare "
                "torch.cat([embeddings, ref_emb]) with itself, or pass ref_emb.detach()"
            )
        return _loss_of(self, embeddings, labels, ref_emb, _labels("ref_labels", ref_labels, ref_emb), None)


class NTXentLoss(_PairLoss):
    """NT-Xent, also known as InfoNCE: the mean over all positive pairs, each against the negatives alone.

    Args:
        temperature: a positive number, or a tensor of one element, which may require a gradient.
    """

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__(temperature)


class SupConLoss(_PairLoss):
    """The supervised contrastive loss: the mean over the embeddings whose loss is above zero.

    Args:
        temperature: a positive number, or a tensor of one element, which may require a gradient.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__(temperature)


_LOSSES: dict[str, tuple[Callable[..., Tensor], str]] = {  # and the peer's default reducer, which they include
    "NTXentLoss": (_ntxent, "MeanReducer"),
    "SupConLoss": (_supcon, "AvgNonZeroReducer"),
}


def _function_of(loss: nn.Module) -> Callable[..., Tensor]:
    """The function of a loss of this module or of the peer's, as it is set up now; all of it is checked."""
    kind, package = type(loss).__name__, type(loss).__module__.split(".")[0]
    if kind not in _LOSSES or not (type(loss).__module__ == __name__ or package == "pytorch_metric_learning"):
        name = f"{type(loss).__module__}.{kind}"
        raise TypeError(f"loss: expected NTXentLoss or SupConLoss, of this module or the peer's, got {name}")
    function, reducer = _LOSSES[kind]
    temperature: Any = loss.temperature
    check_positive("temperature", temperature)
    if isinstance(loss, _PairLoss):
        return function

    def check(name: str, expected: str, **settings: object) -> None:
        part = getattr(loss, name)
        found = {setting: getattr(part, setting, None) for setting in settings}
        if type(part).__name__ != expected or found != settings:
            wanted, got = (", ".join(f"{k}={v}" for k, v in values.items()) for values in (settings, found))
            raise ValueError(f"loss.{name}: expected {expected}({wanted}), got {type(part).__name__}({got})")

    check("embedding_regularizer", "NoneType")  # first: with one, the reducer is another, too
    check("distance", "CosineSimilarity", p=2, power=1, collect_stats=False)
    thresholds = {"low": 0, "high": None} if reducer == "AvgNonZeroReducer" else {}
    check("reducer", reducer, collect_stats=False, **thresholds)
    return function


def _loss_of(
    loss: nn.Module, embeddings: Tensor, labels: Tensor, keys: Tensor, key_labels: Tensor, own: int | None
) -> Tensor:
    function = _function_of(loss)
    query = _unit(embeddings)
    if len(embeddings) == 0 or len(keys) == 0:
        return (query * 0).sum()
    unit_keys = query if keys is embeddings else _unit(keys) if keys.requires_grad else l2_normalize(keys)
    return function(query, _ids(labels), unit_keys, _ids(key_labels), own, loss.temperature)


class CrossBatchMemory(nn.Module):
    """A circular memory of the embeddings and labels of recent batches, whose pairs with a batch are its loss (XBM).

    The batch is stored first, so its other embeddings are among the references; no embedding is its own positive. The
    buffers ``embedding_memory`` [memory_size, embedding_size], of embeddings as they came, and ``label_memory``
    [memory_size] take the device and dtype of the batch. As in the peer, the state dict has these two alone:
    ``queue_idx`` and ``has_been_filled`` are attributes, and a memory that has been loaded starts empty unless you
    restore them.

    Args:
        loss: :class:`NTXentLoss` or :class:`SupConLoss`, or the peer's of the same name with its default distance and
            reducer. Its temperature may change between calls.
        embedding_size: C.
        memory_size: rows of the memory.
        miner: not supported.

    Attributes:
        queue_idx: the next row to be written.
        has_been_filled: the whole memory is in use; before, its first ``queue_idx`` rows.
        curr_batch_idx: [N] int64, the rows of the last batch.

    Raises:
        TypeError: another loss.
        ValueError: a loss with other settings, a miner, or a size that is not positive.

    Example::

        criterion = CrossBatchMemory(NTXentLoss(0.1), embedding_size=128, memory_size=4096)
        loss = criterion(embeddings, labels)  # [N, 128], [N]
    """

    embedding_memory: Tensor
    label_memory: Tensor
    queue_idx: int
    has_been_filled: bool

    def __init__(self, loss: nn.Module, embedding_size: int, memory_size: int = 1024, miner: None = None) -> None:
        super().__init__()
        _function_of(loss)
        if miner is not None:
            raise ValueError(f"miner: expected None, all pairs, got {type(miner).__name__}; miners are not supported")
        for name, size in (("embedding_size", embedding_size), ("memory_size", memory_size)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.loss = loss
        self.miner = miner
        self.embedding_size = embedding_size
        self.memory_size = memory_size
        self.reset_queue()

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        """Store the batch, and return its loss against the memory, 0-dim.

        Args:
            embeddings: [N, embedding_size], of any norm, at most memory_size to store; float32, bfloat16 or float16
                (float64 on the CPU). Those in the memory get no gradient.
            labels: [N] integers.
            indices_tuple: not supported.
            enqueue_mask: [N] bool. Store these embeddings, without a loss, and compare the others with the memory.

        Raises:
            ValueError: an argument of the wrong shape or dtype, more to store than memory_size, an indices_tuple, or
                a loss with other settings. Nothing is stored.
        """
        _refuse_pairs(indices_tuple)
        _function_of(self.loss)
        _check_rows("embeddings", embeddings, self.embedding_size)
        labels = _labels("labels", labels, embeddings)
        stored, stored_labels = embeddings, labels
        if enqueue_mask is not None:
            if enqueue_mask.dtype != torch.bool or enqueue_mask.shape != labels.shape:
                got = f"{enqueue_mask.dtype} {list(enqueue_mask.shape)}"
                raise ValueError(f"enqueue_mask: expected bool [{len(embeddings)}], got {got}")
            mask = enqueue_mask.to(embeddings.device)
            stored, stored_labels = embeddings[mask], labels[mask]
            embeddings, labels = embeddings[~mask], labels[~mask]
        self.embedding_memory = self.embedding_memory.to(embeddings)
        self.label_memory = self.label_memory.to(labels)
        start = self.queue_idx
        self.add_to_memory(stored, stored_labels, len(stored))

        used = self.memory_size if self.has_been_filled else self.queue_idx
        keys, key_labels = self.embedding_memory[:used], self.label_memory[:used]
        own = start if enqueue_mask is None else None
        if own is not None and own + len(embeddings) > used:  # the batch continues at the beginning of the memory
            keys, key_labels, own = keys.roll(-own, 0), key_labels.roll(-own), 0
        return _loss_of(self.loss, embeddings, labels, keys, key_labels, own)

    @torch.no_grad()
    def add_to_memory(self, embeddings: Tensor, labels: Tensor, batch_size: int) -> None:
        """Write a batch over the oldest rows, wrapping around, and advance ``queue_idx``.

        Args:
            embeddings: [batch_size, embedding_size], on the memory's device.
            labels: [batch_size].
            batch_size: at most memory_size.

        Raises:
            ValueError: more rows than that; nothing is written.
        """
        if batch_size > self.memory_size:
            raise ValueError(f"embeddings: expected at most memory_size={self.memory_size} to store, got {batch_size}")
        rows = torch.arange(self.queue_idx, self.queue_idx + batch_size, device=self.embedding_memory.device)
        self.curr_batch_idx = rows % self.memory_size
        self.embedding_memory[self.curr_batch_idx] = embeddings.detach().to(self.embedding_memory)
        self.label_memory[self.curr_batch_idx] = labels.detach().to(self.label_memory)
        after = self.queue_idx + batch_size
        self.has_been_filled = self.has_been_filled or after >= self.memory_size
        self.queue_idx = after % self.memory_size

    def reset_queue(self) -> None:
        """Empty the memory."""
        self.register_buffer("embedding_memory", torch.zeros(self.memory_size, self.embedding_size))
        self.register_buffer("label_memory", torch.zeros(self.memory_size, dtype=torch.long))
        self.has_been_filled = False
        self.queue_idx = 0


class DistributedLossWrapper(nn.Module):
    """The loss of the embeddings of all ranks, times their number, so that DDP's mean of the gradients is their sum.

    A rank's own embeddings get a gradient, and come first; those of the other ranks follow without gradient. All ranks
    must pass as many. With one process, it is the loss itself.

    Args:
        loss: :class:`CrossBatchMemory`, :class:`NTXentLoss` or :class:`SupConLoss` of this module.
        efficient: not with CrossBatchMemory: the loss of a rank's own embeddings against those of all ranks.

    Raises:
        TypeError: another loss.
        ValueError: ``efficient`` with CrossBatchMemory.
    """

    def __init__(self, loss: CrossBatchMemory | _PairLoss, efficient: bool = False) -> None:
        super().__init__()
        if not isinstance(loss, (CrossBatchMemory, _PairLoss)):
            kind = f"{type(loss).__module__}.{type(loss).__name__}"
            raise TypeError(f"loss: expected CrossBatchMemory, NTXentLoss or SupConLoss of {__name__}, got {kind}")
        if efficient and isinstance(loss, CrossBatchMemory):
            raise ValueError("efficient: expected False with CrossBatchMemory, got True")
        self.loss = loss
        self.efficient = efficient

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: None = None,
        ref_emb: None = None,
        ref_labels: None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss, 0-dim; arguments as in the wrapped loss.

        Args:
            embeddings: [N, C] of this rank.
            labels: [N] integers.
            indices_tuple, ref_emb, ref_labels: not supported.
            enqueue_mask: [N] bool, with CrossBatchMemory.

        Raises:
            ValueError: as the wrapped loss, or one of the arguments that are not supported.
        """
        _refuse_pairs(indices_tuple)
        for name, value in (("ref_emb", ref_emb), ("ref_labels", ref_labels)):
            if value is not None:
                raise ValueError(f"{name}: expected None, got {type(value).__name__}; references are not gathered")
        memory = isinstance(self.loss, CrossBatchMemory)
        if enqueue_mask is not None and not memory:
            raise ValueError("enqueue_mask: expected None without CrossBatchMemory, got a mask")
        _check_rows("embeddings", embeddings)
        labels = _labels("labels", labels, embeddings)
        everything, all_labels = _own_rank_first(embeddings), _own_rank_first(labels)
        if self.efficient:
            loss = _loss_of(self.loss, embeddings, labels, everything, all_labels, 0)
        elif memory:
            mask = None if enqueue_mask is None else _own_rank_first(enqueue_mask.to(embeddings.device))
            loss = self.loss(everything, all_labels, None, mask)
        else:
            loss = self.loss(everything, all_labels)
        return loss * world_size()


def _own_rank_first(x: Tensor) -> Tensor:
    """[N, ...] of this rank, with gradient, then those of the others in their order."""
    if world_size() == 1:
        return x
    ranks = all_gather(x).view(world_size(), *x.shape)
    return torch.cat([x, *(part for other, part in enumerate(ranks) if other != rank())])
