"""Logits [N, 1 + K] whose values are computed only if something needs them.

The official trainer takes the cross-entropy of its logits and the five largest of each row, and drops the rest.
``forward`` has the loss already, from the fused pass, and the largest are found tile by tile, so the matrix is not
needed. The first operation that needs it computes it; from then on it is kept, and in-place operations change it as
they change any tensor.

The autograd graph is the official one, queries -> logits -> loss. The loss's gradient with respect to the logits is
lazy, too: the logits' node replaces it with the gradient that the fused pass has computed, while a hook,
``retain_grad`` or ``autograd.grad`` finds its values.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

TILE = 8192  # keys whose scores exist at a time
GROUP = 16  # keys represented by the best of their scores: the k best keys are in the k best groups


class Source:
    """What a lazy tensor is computed from. Tensors that are aliases of each other have the same source."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    values: Tensor | None = None

    def compute(self) -> Tensor:
        raise NotImplementedError

    def materialize(self) -> Tensor:
        if self.values is None:
            with torch.no_grad():
                self.values = self.compute()
        return self.values


class LazyTensor(Tensor):
    """A tensor that computes its values when the first operation needs them; from then on an ordinary one.

    Autograd treats it like any tensor and calls ``__torch_dispatch__`` with the operations that need values. Those
    that read a tensor's memory without an operation (``numpy()``, pickling) get a plain tensor with that memory.
    """

    source: Source

    @staticmethod
    @torch.compiler.disable(reason="a tensor subclass that torch.compile cannot trace")
    def __new__(cls, source: Source) -> LazyTensor:
        made = Tensor._make_wrapper_subclass(cls, source.shape, dtype=source.dtype, device=source.device)  # type: ignore[attr-defined]
        torch._C._set_throw_on_mutable_data_ptr(made)  # C++ code that reads memory gets an error, not a null pointer
        made.source = source
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        if self.source.values is not None:
            return repr(_plain(self))
        return f"{type(self).__name__}({list(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    @classmethod
    @torch.compiler.disable(reason="computes the logits when they are needed")
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func == Tensor.data.__set__ and isinstance(args[0], LazyTensor):  # type: ignore[attr-defined]
                return args[0]._set_data(_plain(args[1]))
            if func in _READ_MEMORY:
                args, kwargs = tree_map(_plain, (args, kwargs))
            return func(*args, **(kwargs or {}))

    def _set_data(self, values: Tensor) -> None:
        if (values.shape, values.dtype, values.device) != (self.shape, self.dtype, self.device):
            raise RuntimeError(
                f"logits: expected data of shape {list(self.shape)}, {self.dtype} on {self.device}, "
                f"got {list(values.shape)}, {values.dtype} on {values.device}; use a new tensor"
            )
        self.source = copy.copy(self.source)  # aliases keep the memory that they had
        self.source.values = values.detach()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return type(args[0])(args[0].source)
        if torch.Tag.inplace_view in func.tags and isinstance(args[0], LazyTensor):
            raise RuntimeError(
                f"logits: expected operations that keep the shape and the memory of the tensor, got {func}; "
                "call it on logits.clone()"
            )
        lazy: dict[int, LazyTensor] = {}

        def values(x: Any) -> Any:
            if not isinstance(x, LazyTensor):
                return x
            lazy[id(x.source.materialize())] = x
            return x.source.values

        args, kwargs = tree_map(values, (args, kwargs or {}))
        # In-place operations and those with out= return the tensor they were given.
        return tree_map(lambda x: lazy.get(id(x), x), func(*args, **kwargs))


def _plain(x: Any) -> Any:
    """A plain tensor in the same place of the autograd graph, with the same memory; other objects as they are."""
    if not isinstance(x, LazyTensor):
        return x
    return x.view_as(x) if x.grad_fn is not None else x.source.materialize().detach().requires_grad_(x.requires_grad)


_READ_MEMORY = {Tensor.__cuda_array_interface__.__get__} | {  # type: ignore[attr-defined]
    getattr(Tensor, name)
    for name in (
        "__array__", "__deepcopy__", "__dlpack__", "__reduce_ex__", "_typed_storage", "apply_", "data_ptr", "is_shared",
        "map_", "numpy", "share_memory_", "storage", "tolist", "untyped_storage",
    )
}  # fmt: skip


@dataclass(eq=False)
class Scores(Source):
    """The source of a forward pass's logits."""

    queries: Tensor  # [N, C] raw, with gradient
    leaf: Tensor  # [N, C] the same, detached, of which
    losses: Tensor  # [N] were computed
    labels: Tensor  # [N], all 0
    key: Tensor  # [N, C] unit rows, the positives, float32 or float64
    queue: Tensor  # [K, C] the model's, after this forward pass wrote to
    slots: Tensor  # [B] int64, rows of it,
    kept: Tensor  # [B, C] which were these before
    T: float

    def __post_init__(self) -> None:
        self.shape = (len(self.queries), 1 + len(self.queue))
        self.device = self.queries.device
        kind = self.device.type
        # that of the official einsum
        self.dtype = (
            torch.get_autocast_dtype(kind)
            if torch.is_autocast_enabled(kind)
            else torch.promote_types(self.queries.dtype, self.queue.dtype)
        )
        self.version = self.queue._version
        self.negatives: Tensor | None = None  # [K, C] once they were needed: for the backward pass

    def rows(self, first: int, last: int) -> Tensor:
        """A copy of the queue's rows [first, last) as they were in the forward pass."""
        if self.negatives is not None:
            return self.negatives[first:last]
        if self.queue._version != self.version:
            raise RuntimeError(
                "logits: expected to be used before the next forward pass of their model, got a queue that has been "
                "written to since; take what you need (the loss, topk, .clone()) first"
            )
        inside = (self.slots >= first) & (self.slots < last)
        rows = F.pad(self.queue[first:last], (0, 0, 0, 1))  # a copy, with an extra row for the slots outside
        rows[torch.where(inside, self.slots - first, last - first)] = self.kept
        return rows[:-1]

    def compute(self) -> Tensor:
        self.negatives = self.rows(0, len(self.queue))
        with torch.autocast(self.device.type, enabled=False):
            q = F.normalize(self.queries, dim=1).to(self.dtype)
            positive = (q * self.key.to(self.dtype)).sum(1, keepdim=True)
            return torch.cat([positive, q @ self.negatives.to(self.dtype).t()], dim=1) / self.T

    def backward(self, gradient: Tensor) -> Tensor:
        """The gradient [N, C] to the queries of one [N, 1 + K] to the logits."""
        source = getattr(gradient, "source", None)
        if isinstance(source, CrossEntropyGradient) and source.scores is self and source.values is None:
            return torch.autograd.grad(self.losses, self.leaf, source.weights, retain_graph=True)[0]
        twice = torch.is_grad_enabled()  # create_graph=True
        with torch.enable_grad(), torch.autocast(self.device.type, enabled=False):
            queries = self.queries if twice else self.queries.detach().requires_grad_()
            q = F.normalize(queries, dim=1).to(self.dtype)
            scaled = gradient.to(self.dtype) / self.T
            negatives = self.rows(0, len(self.queue)).to(self.dtype)
            grad_q = scaled[:, :1] * self.key.to(self.dtype) + scaled[:, 1:] @ negatives
            return torch.autograd.grad(q, queries, grad_q, create_graph=twice)[0]

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits of each row [N, k] and their columns [N, k] int64, largest first."""
        K = len(self.queue)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            q = F.normalize(self.queries.to(self.key.dtype), dim=1)
            best: list[Tensor] = []
            spread: list[tuple[int, int]] = []  # of a tile: its first key, and the number of its groups
            for first in range(0, K, TILE):
                score = q @ self.rows(first, min(first + TILE, K)).to(q.dtype).t()  # [N, tile]
                groups = -(-score.shape[1] // GROUP)
                score = F.pad(score, (0, groups * GROUP - score.shape[1]), value=-torch.inf)
                best.append(score.view(len(q), GROUP, groups).amax(dim=1))  # group g: keys g, g + groups, ...
                spread.append((first, groups))
            group = torch.cat(best, dim=1).topk(min(k, sum(groups for _, groups in spread))).indices  # [N, k]
            first_of = torch.cat([torch.arange(groups) + first for first, groups in spread]).to(q.device)
            step_of = torch.cat([torch.full((groups,), groups) for _, groups in spread]).to(q.device)
            keys = first_of[group][:, :, None] + step_of[group][:, :, None] * torch.arange(GROUP, device=q.device)
            end_of = torch.cat([torch.full((g,), min(f + TILE, K)) for f, g in spread]).to(q.device)
            exists = (keys < end_of[group][:, :, None]).flatten(1)
            keys = keys.flatten(1).clamp(max=K - 1)  # [N, k * GROUP]
            score = torch.einsum("nc,njc->nj", q, self._gather(keys).to(q.dtype)).masked_fill(~exists, -torch.inf)
            positive = (q * self.key).sum(1, keepdim=True)
            values, at = torch.cat([positive, score], dim=1).topk(k, dim=1)
            columns = torch.cat([torch.zeros_like(keys[:, :1]), keys + 1], dim=1).gather(1, at)
            return (values / self.T).to(self.dtype), columns

    def _gather(self, keys: Tensor) -> Tensor:
        """Keys [N, J, C] of columns [N, J], as they were in the forward pass."""
        moved = torch.full((len(self.queue),), -1, device=keys.device)
        moved[self.slots] = torch.arange(len(self.slots), device=keys.device)
        place = moved[keys]
        return torch.where((place >= 0)[:, :, None], self.kept[place.clamp(min=0)], self.queue[keys])

    def are_labels(self, target: Tensor) -> bool:
        """Whether the losses are those for this target."""
        # forward's own labels are known without reading them, for which a GPU's host would wait
        if target is self.labels and not target.is_inference() and target._version == 0:
            return True
        return target.dtype == torch.long and target.shape == self.labels.shape and not bool(target.any())


@dataclass(eq=False)
class CrossEntropyGradient(Source):
    """The source of the loss's gradient with respect to the logits."""

    scores: Scores
    weights: Tensor  # [N] gradient of each row's loss

    def __post_init__(self) -> None:
        self.shape, self.dtype, self.device = self.scores.shape, self.scores.dtype, self.scores.device

    def compute(self) -> Tensor:
        return _softmax_gradient(self.scores.compute(), self.weights)  # anew: the logits may have been edited


def _softmax_gradient(logits: Tensor, weights: Tensor) -> Tensor:
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1)
    return (weights[:, None] * torch.cat([p[:, :1] - 1, p[:, 1:]], dim=1)).to(logits.dtype)


class LazyLogits(LazyTensor):
    """[N, 1 + K] logits of which the cross-entropy and the largest of each row are known without their values."""

    source: Scores

    @classmethod
    @torch.compiler.disable(reason="makes a tensor subclass that torch.compile cannot trace")
    def of(cls, scores: Scores) -> Tensor:
        return _Logits.apply(scores.queries, scores)

    @classmethod
    @torch.compiler.disable(reason="computes the logits when they are needed")
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.cross_entropy:
            loss = _cross_entropy(*args, **(kwargs or {}))
            if loss is not None:
                return loss
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.topk.default and args[0].source.values is None:
            logits, k, dim, largest = (*args, -1, True)[:4] if len(args) == 2 else (*args, True)[:4]
            if dim in (1, -1) and largest and 1 <= k <= min(64, logits.shape[1] - 1):
                return logits.source.topk(k)
        return super().__torch_dispatch__(func, types, args, kwargs)


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """The loss that forward has computed; None where another one is wanted, or the logits may have been edited."""
    plain = weight is None and size_average is None and reduce is None and label_smoothing == 0 and ignore_index != 0
    if not plain or reduction not in ("mean", "sum", "none"):
        return None
    if not isinstance(input, LazyLogits) or input.source.values is not None or not input.source.are_labels(target):
        return None
    return _CrossEntropy.apply(input, input.source, reduction)


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, scores: Scores) -> Tensor:
        ctx.scores = scores
        return LazyLogits(scores)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.scores.backward(gradient), None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, scores: Scores, reduction: str) -> Tensor:
        ctx.scores, ctx.reduction = scores, reduction
        ctx.save_for_backward(logits)
        losses = scores.losses.detach()
        return losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        n = ctx.scores.shape[0]
        weights = (gradient / n if ctx.reduction == "mean" else gradient).expand(n)
        if torch.is_grad_enabled():  # create_graph=True
            (logits,) = ctx.saved_tensors
            return _softmax_gradient(logits, weights), None, None
        return LazyTensor(CrossEntropyGradient(ctx.scores, weights)), None, None
