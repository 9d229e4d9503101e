"""Logits [N, 1 + K] that are computed only if somebody looks at them.

A published trainer takes the loss of its logits and the five largest of each row, and drops them. The loss is known
already, from the fused pass; the largest are found tile by tile; so the matrix need not exist. Whatever else is done
with it makes it, as it would have been: the few keys that have left the queue since were kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from ..moco import MoCo

TILE = 8192  # keys whose scores exist at a time
GROUP = 16  # keys that compete with their best score: the k best keys lie in the k best groups


@dataclass
class Scores:
    """What a step's logits are made of."""

    model: MoCo
    step: int  # of the queue, after this forward's enqueue
    queries: Tensor  # [N, C] raw, with gradient
    key: Tensor  # [N, C] float32 unit rows, the positives
    losses: Tensor  # [N] with gradient
    labels: Tensor  # [N], all 0
    slots: Tensor  # [B] int64, of the queue's rows that forward has overwritten,
    kept: Tensor  # [B, C] and what they were

    def __post_init__(self) -> None:
        device = self.queries.device.type
        autocast = torch.is_autocast_enabled(device)
        # What the official einsum would give.
        self.dtype = (
            torch.get_autocast_dtype(device) if autocast else torch.promote_types(self.queries.dtype, self.kept.dtype)
        )

    @property
    def K(self) -> int:
        return self.model.K

    @property
    def T(self) -> float:
        return self.model.T

    def rows(self, first: int, last: int) -> Tensor:
        """Keys [first, last) as they were in forward."""
        if self.model.updates != self.step:
            raise RuntimeError(
                "logits: expected to be used before the next forward pass of their model, got "
                f"{self.model.updates - self.step} more, and the queue has moved on; take what you need of them "
                "(the loss, topk, .clone()) first"
            )
        inside = (self.slots >= first) & (self.slots < last)
        rows = F.pad(self.model.queue[first:last], (0, 0, 0, 1))  # a copy, and a row for what lies outside
        rows[torch.where(inside, self.slots - first, last - first)] = self.kept
        return rows[:-1]

    def matrix(self) -> Tensor:
        """The logits [N, 1 + K], with gradient to the queries."""
        q = F.normalize(self.queries, dim=1).to(self.dtype)
        with torch.autocast(q.device.type, enabled=False):
            positive = (q * self.key.to(self.dtype)).sum(1, keepdim=True)
            return torch.cat([positive, q @ self.rows(0, self.K).to(self.dtype).t()], dim=1) / self.T

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits of each row [N, k] with gradient, and their columns [N, k] int64; largest first."""
        with torch.autocast(self.queries.device.type, enabled=False):
            query = F.normalize(self.queries.float(), dim=1)
            q = query.detach()
            best: list[Tensor] = []
            spread: list[tuple[int, int]] = []  # of groups: their largest score, and their keys' distance
            for first in range(0, self.K, TILE):
                score = q @ self.rows(first, min(first + TILE, self.K)).to(q.dtype).t()  # [N, tile]
                groups = -(-score.shape[1] // GROUP)
                score = F.pad(score, (0, groups * GROUP - score.shape[1]), value=-torch.inf)
                best.append(score.view(len(q), GROUP, groups).amax(dim=1))  # group g: keys g, g + groups, ...
                spread.append((first, groups))
            group = torch.cat(best, dim=1).topk(min(k, sum(groups for _, groups in spread))).indices  # [N, k]
            first_of = torch.cat([torch.arange(groups) + first for first, groups in spread]).to(q.device)
            step_of = torch.cat([torch.full((groups,), groups) for _, groups in spread]).to(q.device)
            keys = first_of[group][:, :, None] + step_of[group][:, :, None] * torch.arange(GROUP, device=q.device)
            end_of = torch.cat([torch.full((g,), min(f + TILE, self.K)) for f, g in spread]).to(q.device)
            exists = (keys < end_of[group][:, :, None]).flatten(1)
            keys = keys.flatten(1).clamp(max=self.K - 1)  # [N, k * GROUP]
            score = torch.einsum("nc,njc->nj", query, self._gather(keys).to(query.dtype))
            score = score.masked_fill(~exists, -torch.inf)
            positive = (query * self.key).sum(1, keepdim=True)
            values, at = torch.cat([positive, score], dim=1).topk(k, dim=1)
            columns = torch.cat([torch.zeros_like(keys[:, :1]), keys + 1], dim=1).gather(1, at)
            return (values / self.T).to(self.dtype), columns

    def _gather(self, keys: Tensor) -> Tensor:
        """Keys [N, J, C] of columns [N, J], as they were in forward."""
        moved = torch.full((self.K,), -1, device=keys.device)
        moved[self.slots] = torch.arange(len(self.slots), device=keys.device)
        place = moved[keys]
        return torch.where((place >= 0)[:, :, None], self.kept[place.clamp(min=0)], self.model.queue[keys])

    def cross_entropy(self, target: Tensor, reduction: str) -> Tensor | None:
        """The loss that forward has computed; None where it is another one that is wanted."""
        n = len(self.labels)
        # forward's own labels need no look, for which a GPU's host would wait; unless somebody has written to them
        untouched = target is self.labels and not target.is_inference() and target._version == 0
        if not untouched and (target.dtype != torch.long or target.shape != (n,) or bool(target.any())):
            return None
        if reduction == "none":
            return self.losses.clone()
        return self.losses.mean() if reduction == "mean" else self.losses.sum()


class _Attach(torch.autograd.Function):
    """Ties lazy logits to the graph of their queries, where DDP looks for parameters in use."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, scores: Scores) -> Tensor:
        ctx.scores = scores
        return LazyLogits(scores)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        with torch.enable_grad():
            queries = ctx.scores.queries.detach().requires_grad_()
            logits = replace(ctx.scores, queries=queries).matrix()
        return torch.autograd.grad(logits, queries, gradient.to(logits.dtype))[0], None


class LazyLogits(Tensor):
    """[N, 1 + K] logits; see the module's text."""

    scores: Scores

    @staticmethod
    def __new__(cls, scores: Scores) -> LazyLogits:
        n = len(scores.labels)
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, (n, 1 + scores.K), dtype=scores.dtype, device=scores.queries.device
        )
        made.scores = scores
        return made

    @classmethod
    def of(cls, scores: Scores) -> Tensor:
        return _Attach.apply(scores.queries, scores)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyLogits({list(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = _HANDLERS.get(func)
        if handler is not None and isinstance(args[0] if args else kwargs.get("input"), LazyLogits):
            done = handler(*args, **kwargs)
            if done is not None:
                return done
        args, kwargs = tree_map(_values, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        with torch.no_grad():
            args, kwargs = tree_map(_values, (args, kwargs or {}))
        return func(*args, **kwargs)


def _values(x: Any) -> Any:
    return x.scores.matrix() if isinstance(x, LazyLogits) else x


def _cross_entropy(
    input: LazyLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    plain = weight is None and size_average is None and reduce is None and label_smoothing == 0 and ignore_index != 0
    if not plain or reduction not in ("mean", "sum", "none"):
        return None
    return input.scores.cross_entropy(target, reduction)


def _topk(
    input: LazyLogits, k: int, dim: int = -1, largest: bool = True, sorted: bool = True, *, out: Any = None
) -> Any:
    if dim not in (1, -1) or not largest or out is not None or not 1 <= k <= min(64, input.scores.K):
        return None
    return torch.return_types.topk(input.scores.topk(k))


def _detach(input: LazyLogits) -> Tensor:
    scores = input.scores
    return LazyLogits(replace(scores, queries=scores.queries.detach(), losses=scores.losses.detach()))


_PROPERTIES = (
    "shape",
    "device",
    "dtype",
    "ndim",
    "requires_grad",
    "is_cuda",
    "is_leaf",
    "grad_fn",
    "layout",
    "is_meta",
)
_METADATA = {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__, Tensor.is_floating_point,
    Tensor.get_device, Tensor.__hash__,
}  # fmt: skip
_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: _cross_entropy,
    torch.topk: _topk,
    Tensor.topk: _topk,
    Tensor.detach: _detach,
}
