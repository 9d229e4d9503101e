"""Contriever's MoCo, on this package's kernels.

Replaces ``src/moco.py`` of facebookresearch/contriever. Its retrievers, data and trainer are still Contriever's.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..distributed import all_gather
from ..momentum import update_key_encoder_
from ..ops import enqueue_, info_nce

__all__ = ["MoCo"]


class MoCo(nn.Module):
    """Momentum contrast of text spans (Contriever, arXiv 2112.09118, Sec. 3.2), with a loss without logits.

    The forward pass encodes the queries, updates the key encoder, encodes the keys, computes the loss and enqueues the
    keys of all ranks, as in Contriever. The batch size need not divide ``queue_size``.

    The buffer ``queue`` [projection_size, queue_size] is a transposed view: its columns, the keys, are contiguous. Its
    first keys are the same on all ranks, so DDP, if it wraps this module, does not broadcast the queue at each step.

    Args:
        opt: Contriever's options. Required are ``queue_size`` (published: 131,072), ``projection_size`` (768),
            ``momentum``, ``temperature``, ``label_smoothing``, ``norm_query``, ``norm_doc`` and
            ``moco_train_mode_encoder_k``. The last one has no effect, as in Contriever: the key encoder runs in the
            mode it is in. Without a retriever also ``retriever_model_id``, ``pooling`` and ``random_init``.
        retriever: encoder, called with ``input_ids`` [N, L], ``attention_mask`` [N, L] and ``normalize``, a bool. It
            returns [N, projection_size] and becomes ``encoder_q``. None: ``_load_retriever`` makes it.
        tokenizer: kept as ``tokenizer``.

    Raises:
        ImportError: no retriever, and Contriever's ``src`` cannot be imported.
        TypeError: a subclass overrides ``_compute_logits``, which is never called.
    """

    # DDP reads this from the module that it wraps; see distributed.exclude_queues_from_ddp.
    _ddp_params_and_buffers_to_ignore = ("queue", "queue_ptr")

    queue: Tensor
    queue_ptr: Tensor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "_compute_logits"):
            raise TypeError(f"_compute_logits: expected no override, the loss has no logits; got one in {cls.__name__}")

    def __init__(self, opt: Any, retriever: nn.Module | None = None, tokenizer: Any = None) -> None:
        super().__init__()
        self.queue_size = opt.queue_size
        self.momentum = opt.momentum
        self.temperature = opt.temperature
        self.label_smoothing = opt.label_smoothing
        self.norm_doc = opt.norm_doc
        self.norm_query = opt.norm_query
        self.moco_train_mode_encoder_k = opt.moco_train_mode_encoder_k
        if retriever is None:
            retriever, tokenizer = self._load_retriever(
                opt.retriever_model_id, pooling=opt.pooling, random_init=opt.random_init
            )
        self.tokenizer = tokenizer
        self.encoder_q = retriever
        self.encoder_k = copy.deepcopy(retriever).requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        keys = torch.randn(opt.queue_size, opt.projection_size, generator=generator, device="cpu")
        self.register_buffer("queue", F.normalize(keys, dim=1).to(torch.get_default_device()).t())
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def _load_retriever(self, model_id: str, pooling: str, random_init: bool) -> tuple[nn.Module, Any]:
        """Contriever's retriever and tokenizer, by its own function."""
        try:
            original = importlib.import_module("src.moco").MoCo
        except (ImportError, AttributeError) as error:
            raise ImportError(
                f"retriever: expected an encoder, or Contriever's src.moco to load {model_id!r} with, got None and "
                f"{error!r}"
            ) from error
        return original._load_retriever(self, model_id, pooling, random_init)

    def get_encoder(self, return_encoder_k: bool = False) -> nn.Module:
        """The query encoder, or the key encoder."""
        return self.encoder_k if return_encoder_k else self.encoder_q

    def forward(
        self,
        q_tokens: Tensor,
        q_mask: Tensor,
        k_tokens: Tensor,
        k_mask: Tensor,
        stats_prefix: str = "",
        iter_stats: dict[str, tuple[Any, int]] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, tuple[Any, int]]]:
        """The loss of a batch. The queue and the key encoder are updated.

        Args:
            q_tokens, q_mask: [N, L] a span of each document, and its attention mask.
            k_tokens, k_mask: [N, L'] another span of each.
            stats_prefix: of the names of the statistics, separated by a slash.
            iter_stats: dictionary to add the statistics to; None: a new one.
            kwargs: ignored.

        Returns:
            The loss, 0-dim, and ``iter_stats`` with ``loss``, ``accuracy`` (of the positive among its negatives, in
            percent), ``stdq`` and ``stdk`` (standard deviation of the features), each with the weight N.

        Raises:
            ValueError: features of another shape than [N, projection_size], or an option out of its range.
        """
        n = len(q_tokens)
        q = self.encoder_q(input_ids=q_tokens, attention_mask=q_mask, normalize=self.norm_query)
        with torch.no_grad():
            self._momentum_update_key_encoder()
            k = self.encoder_k(input_ids=k_tokens, attention_mask=k_mask, normalize=self.norm_doc)
        loss, stats = info_nce(
            q,
            k,
            self._rows(),
            self.temperature,
            normalize=False,
            label_smoothing=self.label_smoothing,
            return_stats=True,
        )
        self._dequeue_and_enqueue(k)

        values = torch.stack([loss.detach(), *(x.detach().to(loss.dtype).std(dim=0).mean() for x in (q, k))])
        loss_value, std_q, std_k = values.tolist()  # one synchronization instead of three
        found = {"loss": loss_value, "accuracy": stats.accuracy()[0], "stdq": std_q, "stdk": std_k}
        prefix = f"{stats_prefix}/" if stats_prefix else ""
        iter_stats = {} if iter_stats is None else iter_stats
        iter_stats.update({prefix + name: (value, n) for name, value in found.items()})
        return loss, iter_stats

    def _momentum_update_key_encoder(self) -> None:
        """``encoder_k = momentum·encoder_k + (1 - momentum)·encoder_q``, in one launch.

        The first call flattens both encoders (:func:`moco_ext.flatten_parameters_`).
        """
        update_key_encoder_(self.encoder_k, self.encoder_q, self.momentum)

    @torch.no_grad()
    def _dequeue_and_enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys with those of all ranks, [N, projection_size] each."""
        enqueue_(self._rows(), self.queue_ptr, all_gather(keys))

    def _rows(self) -> Tensor:
        """The queue [queue_size, projection_size] as the kernels read it, in the memory of the buffer."""
        rows = self.queue.t()
        if not rows.is_contiguous():  # assigned by the user, or by load_state_dict(assign=True)
            rows = rows.contiguous()
            self.queue = rows.t()
        return rows
