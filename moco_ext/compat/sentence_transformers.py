"""sentence-transformers' multiple negatives ranking losses, on this package's kernels.

Replaces what a trainer imports from ``sentence_transformers.sentence_transformer.losses`` (sentence-transformers 6.2,
which has to be installed). Both classes are subclasses of the originals: embedding, gradient caching, attributes, the
model card and wrappers such as ``MatryoshkaLoss`` are sentence-transformers' own. The similarities are never stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..distributed import all_gather_with_grad, rank
from ..ops import info_nce, l2_normalize
from ..queue import KeyQueue

try:
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.losses.adaptive_layer import TransformerDecorator
    from sentence_transformers.util import SimilarityFunction, cos_sim, dot_score, pytorch_cos_sim, similarity_fct_name

    losses.MultipleNegativesRankingLoss.compute_loss_from_embeddings  # noqa: B018  # without it, ours is never called
    losses.CachedMultipleNegativesRankingLoss.calculate_loss  # noqa: B018
except (ImportError, AttributeError) as error:
    raise ImportError(
        "moco_ext.compat.sentence_transformers: expected sentence-transformers 6.2 to be installed, got another "
        f"version or none ({error})"
    ) from error

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = ["CachedMultipleNegativesRankingLoss", "MultipleNegativesRankingLoss"]

Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
Partition = Literal["joint", "per_direction"]
Hardness = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]
Similarity = Callable[[Tensor, Tensor], Tensor]


class MultipleNegativesRankingLoss(losses.MultipleNegativesRankingLoss):
    """InfoNCE of (anchor, positive, negative_1, ..., negative_n) texts: each anchor finds its positive in the batch.

    The candidates of an anchor are the positives and negatives of all anchors. The other arguments are
    sentence-transformers'; see its documentation.

    Args:
        model: the ``SentenceTransformer``.
        scale: multiplies the similarities: 1 / temperature.
        similarity_fct: ``cos_sim`` or ``dot_score`` of ``sentence_transformers.util``, or ``model.similarity`` of a
            model with one of these.
        gather_across_devices: candidates of all ranks, with gradient. All ranks must have the same batch size.
        directions: ``"query_to_doc"``, and further candidates or rows: ``"query_to_query"``, ``"doc_to_query"``,
            ``"doc_to_doc"``.
        partition_mode: ``"joint"``, one softmax over all directions, or ``"per_direction"``, the mean of their losses.
        hardness_mode, hardness_strength: add ``hardness_strength * similarity``, without gradient, to the logits of
            ``"in_batch_negatives"``, ``"hard_negatives"`` or ``"all_negatives"`` of query_to_doc.
        queue_size: keep this many embeddings of earlier positives as further negatives of query_to_doc (for
            ``hardness_mode``, in-batch negatives). They have no gradient, and were encoded by an earlier state of the
            model. They have no ids: a text that occurs again within ``queue_size`` texts is its own negative, so keep
            the queue well below the size of the data set. The queue starts empty and is filled in training only, with
            the positives of all ranks if ``gather_across_devices``. It is a :class:`moco_ext.KeyQueue`, ``queue``, in
            the state dict of the loss, which ``SentenceTransformerTrainer`` does not save: a resumed run starts with
            an empty queue. The loss in evaluation has these negatives, too.

    Raises:
        ValueError: an argument out of its range, another ``similarity_fct``, or a queue for a model that does not know
            its embedding dimension.
        TypeError: ``queue_size`` is not an integer.
    """

    queue: KeyQueue | None

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: Similarity = cos_sim,
        gather_across_devices: bool = False,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: Partition = "joint",
        hardness_mode: Hardness | None = None,
        hardness_strength: float = 0.0,
        *,
        queue_size: int = 0,
    ) -> None:
        super().__init__(
            model,
            scale,
            similarity_fct,
            gather_across_devices,
            directions,
            partition_mode,
            hardness_mode,
            hardness_strength,
        )
        _is_cosine(similarity_fct)
        self.queue = None
        if queue_size != 0:
            dim = model.get_embedding_dimension()
            if dim is None:
                raise ValueError(
                    f"queue_size: expected 0 for a model whose get_embedding_dimension() is None, got {queue_size}"
                )
            self.queue = KeyQueue(dim, queue_size, empty=True)

    @property
    def queue_size(self) -> int:
        """The number of earlier positives that the queue can hold."""
        return 0 if self.queue is None else self.queue.K

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The mean loss, 0-dim float32 (float64 for float64 embeddings).

        Args:
            embeddings: [N, dim] of each column: anchors, positives, and any number of negatives.
            labels: ignored.

        Raises:
            ValueError: fewer than two columns, columns of different shapes, or embeddings that the queue cannot hold.
        """
        queries, *docs = _columns(embeddings)
        n, first = len(queries), 0
        all_queries, all_docs = queries, docs
        if self.gather_across_devices:
            first = rank() * n
            all_queries, *all_docs = (all_gather_with_grad(column) for column in (queries, *docs))
        keys = torch.cat(all_docs)
        pairs = torch.arange(len(all_queries), device=keys.device)
        ids = {"query_ids": pairs[first : first + n], "key_ids": pairs.repeat(len(docs))}

        # Of each direction: the logsumexp of its scores, less the positive's, [N].
        terms = [self._query_to_doc(queries, docs, keys, first, ids)]
        if "doc_to_query" in self.directions:
            terms.append(self._info_nce(docs[0], all_queries, first, self.scale))
        others = []
        if "query_to_query" in self.directions:
            others.append(self._others(queries, all_queries, first, self.scale))
        if "doc_to_doc" in self.directions:
            others.append(self._others(docs[0], keys, first, self.scale, **ids))
        if others:
            positive = self.scale * self._similarities(queries, docs[0])
            terms += [term - positive for term in others]
        joint = self.partition_mode == "joint"
        loss = (torch.stack(terms).logsumexp(0) if joint else torch.stack(terms)).mean()
        if self.queue is not None and loss.requires_grad:
            self.queue.enqueue(all_docs[0], normalize=_is_cosine(self.similarity_fct))
        return loss

    def _query_to_doc(
        self, queries: Tensor, docs: list[Tensor], keys: Tensor, first: int, ids: dict[str, Tensor]
    ) -> Tensor:
        queue = self._queue_for(keys)
        mode = self.hardness_mode if self.hardness_strength > 0 else None
        if mode is None:
            return self._info_nce(queries, keys, first, self.scale, **queue)
        positive, *hard = (self._similarities(queries, column) for column in docs)
        if mode == "hard_negatives":  # N of them for each column, so their logits may be stored
            terms = [self._info_nce(queries, keys, first, self.scale, **queue, **ids)]
            terms += [self.scale * (s - positive) + self.hardness_strength * s.detach() for s in hard]
        elif mode in ("in_batch_negatives", "all_negatives"):
            # The logits are similarities times (scale + strength), with the gradient of similarities times scale.
            scale = self.scale + self.hardness_strength
            share = self.scale / scale
            of_others = ids if mode == "in_batch_negatives" else {}
            rest = self._others(
                _scale_gradient(queries, share), _scale_gradient(keys, share), first, scale, **queue, **of_others
            )
            terms = [torch.zeros_like(positive), rest - self.scale * positive]
            terms += [self.scale * (s - positive) for s in hard if mode == "in_batch_negatives"]
        else:
            raise ValueError(
                f"hardness_mode: expected None, 'in_batch_negatives', 'hard_negatives' or 'all_negatives', got {mode!r}"
            )
        return torch.stack(terms).logsumexp(0)

    def _info_nce(self, rows: Tensor, keys: Tensor, first: int, scale: float, **options: Any) -> Tensor:
        """[N] logsumexp of the scores of rows [N, dim] with keys [M, dim], less that of row n with key first + n."""
        normalize = _is_cosine(self.similarity_fct)
        queue = options.pop("queue", None)
        return info_nce(
            rows, keys, queue, 1 / scale, normalize=normalize, reduction="none", in_batch=True, key_offset=first,
            **options,
        )  # fmt: skip

    def _others(self, rows: Tensor, keys: Tensor, first: int, scale: float, **options: Any) -> Tensor:
        """[N] logsumexp of the scores of each row with all keys but its own, and those of its id."""
        own = self._similarities(rows, keys[first : first + len(rows)]) * scale
        return self._info_nce(rows, keys, first, scale, own_key="decoupled", **options) + own

    def _similarities(self, a: Tensor, b: Tensor) -> Tensor:
        """[N] of row n with row n."""
        if _is_cosine(self.similarity_fct):
            a, b = l2_normalize(a), l2_normalize(b)
        return (a * b).sum(1)

    def _queue_for(self, keys: Tensor) -> dict[str, Tensor | None]:
        if self.queue is None:
            return {}
        if self.queue.queue.shape[1] != keys.shape[1]:
            raise ValueError(
                f"queue_size: expected 0 or embeddings with {self.queue.queue.shape[1]} features, as the model's, got "
                f"{self.queue_size} and {keys.shape[1]} features; losses that truncate embeddings (MatryoshkaLoss) "
                "cannot have a queue"
            )
        if any(isinstance(module.forward, TransformerDecorator) for module in self.model.modules()):
            raise ValueError(
                f"queue_size: expected 0 within AdaptiveLayerLoss, got {self.queue_size}; all layers would share the "
                "queue, and an anchor's positive of one layer would be its negative in another"
            )
        self.queue.to(keys.device)
        return {"queue": self.queue.queue, "num_valid": self.queue.queue_valid}

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments, for the model card."""
        return super().get_config_dict() | ({"queue_size": self.queue_size} if self.queue_size else {})


class CachedMultipleNegativesRankingLoss(losses.CachedMultipleNegativesRankingLoss):
    """:class:`MultipleNegativesRankingLoss` of large batches, with the memory of a small one (arXiv 2101.06983).

    Embeds the batch without a graph, in mini-batches; computes the loss and its gradient with respect to the
    embeddings; and embeds each mini-batch again, with the same random state, to continue the gradient into the model.
    The loss of the whole batch is computed at once, since its similarities are not stored, so the progress bar shows
    the embedding only. The other arguments are those of :class:`MultipleNegativesRankingLoss`.

    Args:
        mini_batch_size: number of texts that are embedded at a time.
        mini_batch_num_tokens: fill each mini-batch up to this number of tokens instead.
        show_progress_bar: show the progress of the embedding.

    Raises:
        ValueError, TypeError: as :class:`MultipleNegativesRankingLoss`; or the model's first module is a
            ``StaticEmbedding``, whose inputs cannot be split.
    """

    loss: MultipleNegativesRankingLoss

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: Similarity = cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: Partition = "joint",
        show_progress_bar: bool = False,
        hardness_mode: Hardness | None = None,
        hardness_strength: float = 0.0,
        *,
        queue_size: int = 0,
    ) -> None:
        super().__init__(
            model,
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
            show_progress_bar=show_progress_bar,
        )
        self.loss = MultipleNegativesRankingLoss(
            model,
            scale,
            similarity_fct,
            gather_across_devices,
            directions,
            partition_mode,
            hardness_mode,
            hardness_strength,
            queue_size=queue_size,
        )

    @property
    def queue_size(self) -> int:
        """The number of earlier positives that ``loss.queue`` can hold."""
        return self.loss.queue_size

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The mean loss, 0-dim; with its gradient into the embeddings, and detached, if ``with_backward``.

        Args:
            reps: for each column its embeddings [n, dim], one tensor for each mini-batch.
            labels: ignored.
            with_backward: run backward.
        """
        loss = self.loss.compute_loss_from_embeddings([torch.cat(column) for column in reps], labels)
        if with_backward:
            loss.backward()
        return loss.detach() if with_backward else loss

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments, for the model card."""
        return super().get_config_dict() | ({"queue_size": self.queue_size} if self.queue_size else {})


def _is_cosine(similarity_fct: Similarity) -> bool:
    """True for the cosine similarity, False for the dot product."""
    of_model: Any = getattr(similarity_fct, "__self__", None)
    function: object = similarity_fct
    if getattr(similarity_fct, "__name__", None) == "similarity" and hasattr(of_model, "similarity_fn_name"):
        function = SimilarityFunction.to_similarity_fn(of_model.similarity_fn_name)
    if function in (cos_sim, pytorch_cos_sim):
        return True
    if function is dot_score:
        return False
    raise ValueError(
        "similarity_fct: expected cos_sim or dot_score of sentence_transformers.util, or the similarity of a model "
        f"with one of these, got {similarity_fct_name(similarity_fct)}; others need sentence_transformers' own loss"
    )


def _columns(embeddings: list[Tensor]) -> list[Tensor]:
    """Columns of one shape [N, dim], in float32 (float64): the precision in which the original takes similarities."""
    if len(embeddings) < 2:
        raise ValueError(f"embeddings: expected at least 2 columns, anchors and positives, got {len(embeddings)}")
    shapes = [list(column.shape) for column in embeddings]
    if len(shapes[0]) != 2 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"embeddings: expected columns of one shape [N, dim], got {shapes}")
    return [column.to(torch.promote_types(column.dtype, torch.float32)) for column in embeddings]


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient is multiplied by the factor."""
    if not x.requires_grad:
        return x
    x = x.view_as(x)
    x.register_hook(lambda grad: factor * grad)
    return x
