"""The MoCo model (arXiv 1911.05722, Algorithm 1) and its v2 head (arXiv 2003.04297)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from . import distributed, encoders
from .distributed import all_gather, start_all_gather
from .encoders import encode
from .mechanism import Mechanism, check_momentum, check_temperature
from .momentum import LowPrecisionWeights, flatten_parameters_, has_another_owner, update_key_encoder_
from .objectives import OBJECTIVES
from .ops import info_nce, momentum_update_
from .queue import KeyQueue
from .sharded_queue import sharded_info_nce
from .shuffle_bn import check_mode, convert_split_bn, shuffle_order, start_shuffle, unshuffle
from .stats import InfoNCEStats

# How the key encoder is made from the query encoder.
KEY_ENCODERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "momentum": copy.deepcopy,
    "partial": encoders.with_own_head,
    "identical": lambda encoder: encoder,
}


class MoCoOutput(NamedTuple):
    """Output of a forward pass.

    Attributes:
        loss: 0-dim, float32: the mean InfoNCE loss of the batch.
        keys: [world * N, dim] outputs of the key encoder for the images of all ranks, in order, without gradient and
            not normalized. Pass them to ``update``.
        stats: statistics of this rank's queries [N]; see :class:`moco_ext.InfoNCEStats`.
    """

    loss: Tensor
    keys: Tensor
    stats: InfoNCEStats


class MoCo(Mechanism, KeyQueue):
    """Momentum Contrast: a query encoder, a momentum key encoder, and a queue of keys (arXiv 1911.05722, Algorithm 1).

    One training step::

        out = model(im_q, im_k)      # encode, shuffle BN, fused loss; changes no state but BatchNorm statistics
        out.loss.backward()
        optimizer.step()
        model.update(out.keys)       # momentum update, then enqueue

    Call ``update`` once per optimizer step, and skip it with the step. With gradient accumulation, pass the keys of all
    micro-batches. The state dict has the names and layouts of the official implementation (``encoder_q.*``,
    ``encoder_k.*``, ``queue`` [dim, K], ``queue_ptr`` [1]), so checkpoints load in both directions.

    Large encoders are sharded by FSDP2: ``fully_shard(model.encoder_q); fully_shard(model.encoder_k)``, after their
    blocks and before the optimizer is made. ``update`` then updates the local shards and gathers nothing. Use FSDP2's
    ``MixedPrecisionPolicy`` instead of ``low_precision``.

    Args:
        base_encoder: ``base_encoder(num_classes=dim) -> Module`` that maps images to [N, dim] features, or a name:
            ``"resnet50"`` or any other torchvision model, ``"resnet18-small"``, ``"timm:NAME"``.
        dim: number of features of a query or key.
        K: number of keys in the queue. The batch size need not divide it.
        m: momentum of the key encoder, in [0, 1].
        T: temperature of the softmax.
        mlp: MoCo v2's head: a hidden layer as wide as the backbone and a ReLU before the last linear layer.
        queue_dtype: dtype of the stored keys.
        shuffle_bn: ``"auto"``, ``"gather"``, ``"all_to_all"``, ``"loader"`` or ``"none"``: how key images are exchanged
            between processes, so that no query shares batch statistics with its key. With ``"loader"``, the data loader
            has already exchanged them. A single process exchanges nothing.
        split_bn: number of groups of the batch with separate BatchNorm statistics. More than one gives a single device
            the effect of as many devices.
        key_encoder: ``"momentum"``, a separate network that follows the query encoder; ``"partial"``, which shares all
            layers but the head, and only the head follows; ``"identical"``, the query encoder itself.
        low_precision: None, ``torch.bfloat16`` or ``torch.float16``: run a momentum key encoder under autocast with a
            copy of its weights in that dtype, which the momentum update writes together with the float32 weights.
        label_smoothing, in_batch, same_id: options of the loss, see :func:`moco_ext.info_nce`. ``in_batch`` uses the
            keys of all ranks. With ``same_id`` ("mask" or "positive"), ``forward`` and ``update`` need ``ids``; with
            None, other views of the query's image in the queue are negatives, as published.
        empty: start with an empty queue instead of K random keys.
        objective: ``"infonce"``; ``"nnclr"``, where the key's nearest neighbor in the queue is the positive; or
            ``"ressl"``, where the query's softmax over the queue learns the key's, at temperature ``teacher_T``. See
            moco_ext/objectives.py. The last two accept no options of the loss, and need a full queue.
        queue_sharding: divide the queue among the processes, K / world keys each. Queries then go to the keys, see
            moco_ext/sharded_queue.py; losses and gradients are those of one queue up to rounding. The process group
            must exist when the model is made.
        flatten_parameters: keep each encoder's parameters in one buffer (:func:`moco_ext.flatten_parameters_`), so that
            the momentum update is one launch over two buffers. If False, they are left where they are. Encoders that
            FSDP2 shards have no buffer: their shards are updated as a list, in one launch.

    Raises:
        ValueError, TypeError: an argument of the wrong type or out of its range, or an encoder of the wrong shape; the
            message names it.
    """

    def __init__(
        self,
        base_encoder: str | Callable[..., nn.Module],
        dim: int = 128,
        K: int = 65536,
        m: float = 0.999,
        T: float = 0.07,
        mlp: bool = False,
        *,
        queue_dtype: torch.dtype = torch.float32,
        shuffle_bn: str = "auto",
        split_bn: int = 1,
        key_encoder: str = "momentum",
        low_precision: torch.dtype | None = None,
        label_smoothing: float = 0.0,
        in_batch: bool = False,
        same_id: str | None = None,
        empty: bool = False,
        objective: str = "infonce",
        teacher_T: float = 0.04,
        queue_sharding: bool = False,
        flatten_parameters: bool = True,
    ) -> None:
        super().__init__(dim, K, queue_dtype, ids=same_id is not None, empty=empty, sharded=queue_sharding)
        if key_encoder not in KEY_ENCODERS:
            raise ValueError(f"key_encoder: expected one of {', '.join(KEY_ENCODERS)}, got {key_encoder!r}")
        if low_precision is not None and key_encoder != "momentum":
            raise ValueError(f"low_precision: expected None with key_encoder {key_encoder!r}, got {low_precision}")
        if low_precision is not None and not flatten_parameters:
            raise ValueError("flatten_parameters: expected True with low_precision, got False")
        if same_id not in (None, "mask", "positive"):
            raise ValueError(f"same_id: expected None, 'mask' or 'positive', got {same_id!r}")
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing}")
        if objective not in ("infonce", *OBJECTIVES):
            expected = ", ".join(map(repr, ("infonce", *OBJECTIVES)))
            raise ValueError(f"objective: expected one of {expected}, got {objective!r}")
        if objective != "infonce" and (label_smoothing or in_batch or same_id or empty):
            raise ValueError(
                f"objective: expected 'infonce' with label_smoothing, in_batch, same_id or empty, got {objective!r}"
            )
        if queue_sharding and (label_smoothing or in_batch or same_id == "positive" or objective != "infonce"):
            raise ValueError(
                "queue_sharding: expected False with label_smoothing, in_batch, same_id 'positive' or another "
                "objective than 'infonce', got True"
            )
        self.queue_sharding = queue_sharding
        self.objective, self.teacher_T = objective, check_temperature(teacher_T, "teacher_T")
        self.label_smoothing, self.in_batch, self.same_id = label_smoothing, in_batch, same_id
        self.m = check_momentum(m)
        self.T = check_temperature(T)
        self.shuffle_bn = check_mode(shuffle_bn)
        self.split_bn = split_bn
        self.key_encoder = key_encoder
        self.flatten_parameters = flatten_parameters
        self._low_precision = None if low_precision is None else LowPrecisionWeights(low_precision)

        encoder = convert_split_bn(encoders.build(base_encoder, dim, mlp), split_bn)
        self.encoder_q = encoder
        self.encoder_k = KEY_ENCODERS[key_encoder](encoder)
        trained = set(encoder.parameters())
        for parameter in self.encoder_k.parameters():
            if parameter not in trained:
                parameter.requires_grad_(False)  # an error for lazy ones, of which the copy would get other values
        self._flatten()

    def forward(
        self, im_q: Tensor, im_k: Tensor, *, key_order: Tensor | None = None, ids: Tensor | None = None
    ) -> MoCoOutput:
        """The loss of two views of the same images.

        Args:
            im_q: query views [N, 3, H, W], or sets of patches [N, P, 3, h, w], whose features are averaged.
            im_k: key views of the same images, in the same order; with ``shuffle_bn="loader"``, of the images that
                ``key_order`` assigns to this rank.
            key_order: [world * N] int64 on the CPU, equal on all ranks: slot i of the shuffled global batch holds image
                ``key_order[i]``. Default: a permutation drawn from the number of updates so far.
            ids: [N] int64 that identify the images, if the model has a ``same_id``.

        Raises:
            ValueError: views that do not match, or are not floating-point; ``ids`` without ``same_id`` or vice versa.
        """
        self._check_same_id(ids)
        if self.queue_sharding and self.shards != distributed.world_size():
            raise RuntimeError(
                f"queue_sharding: expected the {self.shards} processes that the model was made for, got "
                f"{distributed.world_size()}; make the model after init_process_group"
            )
        self._check_images(im_q, im_k)
        self._warn_if_update_is_forgotten()
        q, keys = self._encode(im_q, im_k, key_order)  # [N, dim], [world * N, dim]
        n, offset = len(q), distributed.rank() * len(q)
        if self.objective != "infonce":
            contrast = OBJECTIVES[self.objective]
            loss, stats = contrast(q, keys[offset:][:n], self.queue, self.T, self.teacher_T)
            return MoCoOutput(loss, keys, stats)
        if self.shards > 1:
            rows = slice(self.row_offset, self.row_offset + len(self.queue))
            valid = None if self.queue_valid is None else (self.queue_valid - rows.start).clamp(0, len(self.queue))
            loss, stats = sharded_info_nce(
                q,
                keys,
                self.queue,
                self.T,
                num_valid=valid,
                query_ids=None if ids is None else all_gather(ids),
                queue_ids=None if self.queue_ids is None else self.queue_ids[rows],
            )
            return MoCoOutput(loss, keys, stats)
        if self.in_batch and ids is not None:
            ids = all_gather(ids)
        loss, stats = info_nce(
            q,
            keys if self.in_batch else keys[offset:][:n],
            self.queue,
            self.T,
            return_stats=True,
            label_smoothing=self.label_smoothing,
            num_valid=self.queue_valid,
            in_batch=self.in_batch,
            key_offset=offset if self.in_batch else 0,
            query_ids=ids,
            queue_ids=self.queue_ids,
            same_id=self.same_id or "mask",
        )
        return MoCoOutput(loss, keys, stats)

    def _encode(self, im_q: Tensor, im_k: Tensor, key_order: Tensor | None) -> tuple[Tensor, Tensor]:
        """The queries [N, dim] of this rank and the keys [world * N, dim] of all, with shuffling BN."""
        order = shuffle_order(len(im_q), self.shuffle_bn, self.split_bn, self._permutation, key_order)
        shuffled = start_shuffle(im_k, order, self.shuffle_bn)
        # Communication overlaps with encoding the queries: of the images or, if they are in place, of the keys.
        if shuffled is None:
            gathered = start_all_gather(self._encode_keys(im_k))
            q = encode(self.encoder_q, im_q)
            keys = gathered()
        else:
            q = encode(self.encoder_q, im_q)
            keys = all_gather(self._encode_keys(shuffled()))
        self._watch(q)
        return q, unshuffle(keys, order)

    if TYPE_CHECKING:

        def __call__(
            self, im_q: Tensor, im_k: Tensor, *, key_order: Tensor | None = None, ids: Tensor | None = None
        ) -> MoCoOutput: ...

    def forward_batch(
        self, im_q: Tensor, im_k: Tensor, *, index: Tensor, key_order: Tensor | None = None
    ) -> tuple[Tensor, InfoNCEStats, tuple[Tensor, ...]]:
        if self.same_id is None:
            return super().forward_batch(im_q, im_k, index=index, key_order=key_order)
        ids = index.to(im_q.device, non_blocking=True)
        out = self(im_q, im_k, key_order=key_order, ids=ids)
        return out.loss, out.stats, (out.keys, all_gather(ids))

    def key_queue(self) -> Tensor | None:
        return self.queue if self.shards == 1 else None

    @torch.no_grad()
    def update(self, keys: Tensor, ids: Tensor | None = None) -> None:
        """After the optimizer step: momentum update of the key encoder (Eq. 2), then enqueue the keys of the batch.

        Args:
            keys: [B, dim] ``MoCoOutput.keys``, equal on all ranks.
            ids: [B] int64 that identify their images, of all ranks (``moco_ext.distributed.all_gather(ids)``), if the
                model has a ``same_id``.

        Raises:
            ValueError, TypeError: keys or ids of another shape, dtype or device; ``ids`` without ``same_id`` or vice
                versa. Nothing is changed.
        """
        self._check_keys(keys)
        self._check_same_id(ids)
        self.check_batch(keys, ids)
        if self.key_encoder == "momentum":
            flatten = self.flatten_parameters
            update_key_encoder_(self.encoder_k, self.encoder_q, self.m, self._low_precision, flatten=flatten)
        elif self.key_encoder == "partial":
            pairs = zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True)
            own = [(key, query) for key, query in pairs if key is not query]
            momentum_update_([key for key, _ in own], [query for _, query in own], self.m)
        self.enqueue(keys, ids)
        self._count_update()

    def _check_same_id(self, ids: Tensor | None) -> None:
        if (ids is None) != (self.same_id is None):
            raise ValueError(f"ids: expected {'a tensor' if self.same_id else 'none'} with same_id {self.same_id!r}")

    def extra_repr(self) -> str:
        return f"K={self.K}, dim={self.queue.shape[1]}, m={self.m}, T={self.T}, queue_dtype={self.queue.dtype}"

    @torch.no_grad()
    def _encode_keys(self, images: Tensor) -> Tensor:
        if self._low_precision is None:
            return encode(self.encoder_k, images)
        return encode(functools.partial(self._low_precision, self.encoder_k), images)

    def _flatten(self) -> None:
        """Keep each encoder's parameters in one buffer, except those of several dtypes; see momentum.py."""
        if not self.flatten_parameters:
            return
        for encoder in (self.encoder_q, self.encoder_k)[: 2 if self.key_encoder == "momentum" else 1]:
            parameters = list(encoder.parameters())
            if any(map(has_another_owner, parameters)):
                continue
            if len({(p.dtype, p.device) for p in parameters}) == 1 and not parameters[0].is_meta:
                flatten_parameters_(encoder)

    def _apply(self, *args, **kwargs):  # .to(), .cuda(), .half(): parameters get new memory
        super()._apply(*args, **kwargs)
        self._flatten()
        return self

    def __setstate__(self, state):  # copy.deepcopy and pickle too
        super().__setstate__(state)
        self._flatten()
