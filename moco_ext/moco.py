"""Momentum Contrast: the model of Algorithm 1 (arXiv 1911.05722) and its v2 head (arXiv 2003.04297)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import distributed, encoders
from .momentum import flatten_parameters_, update_key_encoder_
from .ops import info_nce
from .queue import KeyQueue
from .shuffle_bn import check_mode, convert_split_bn, encode_shuffled, encode_split
from .stats import InfoNCEStats


class MoCoOutput(NamedTuple):
    """What one forward pass gives.

    Attributes:
        loss: 0-dim, float32: the mean InfoNCE loss of the batch.
        keys: [world * N, dim] the key encoder's outputs for all ranks' images, in order, without gradient; not yet
            normalised (that happens where they are compared and where they are stored). Pass them to ``update``.
        stats: [N] figures of this rank's queries; see :class:`moco_ext.InfoNCEStats`.
    """

    loss: Tensor
    keys: Tensor
    stats: InfoNCEStats


class MoCo(KeyQueue):
    """A query encoder, a momentum key encoder, and a queue of keys.

    A training step changes the model's state in one visible place::

        out = model(im_q, im_k)      # encode, shuffle BN, fused loss: changes no state but BatchNorm's own
        out.loss.backward()
        optimizer.step()
        model.update(out.keys)       # momentum update, then enqueue

    A skipped step calls no ``update``; with gradient accumulation, call it once, with the accumulated keys.
    The state dict has the official implementation's names and layouts (``encoder_q.*``, ``encoder_k.*``,
    ``queue`` [dim, K], ``queue_ptr`` [1]): checkpoints load both ways.

    Args:
        base_encoder: ``base_encoder(num_classes=dim) -> Module`` mapping images to [N, dim] features, or a name:
            ``"resnet50"`` and the rest of torchvision, ``"resnet18-small"``, ``"timm:NAME"``.
        dim: features of a query or key.
        K: keys in the queue. A batch need not divide it.
        m: momentum of the key encoder, in [0, 1].
        T: temperature of the softmax.
        mlp: v2's head: a hidden layer of the backbone's width and a ReLU before the last linear layer.
        queue_dtype: of the stored keys.
        shuffle_bn: ``"auto"``, ``"gather"``, ``"all_to_all"`` or ``"none"``: how key images move between processes so
            that no query shares batch statistics with its key. With one process there is nothing to move.
        split_bn: number of groups of a device's batch with BatchNorm statistics of their own; more than one gives a
            single device the effect of as many devices.

    Raises:
        ValueError: an argument out of its range, or an encoder of the wrong shape; the message names it.
    """

    # Equal on all ranks by construction (same start, same gathered keys), so DDP must not broadcast them each step.
    _ddp_params_and_buffers_to_ignore = ("queue", "queue_ptr")

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
    ) -> None:
        super().__init__(dim, K, queue_dtype)
        if not 0.0 <= m <= 1.0:
            raise ValueError(f"m: expected a momentum in [0, 1], got {m}")
        if not 0.0 < T < float("inf"):
            raise ValueError(f"T: expected a finite positive temperature, got {T}")
        if split_bn < 1:
            raise ValueError(f"split_bn: expected at least one group, got {split_bn}")
        self.m = m
        self.T = T
        self.shuffle_bn = check_mode(shuffle_bn)
        self.split_bn = split_bn
        self._steps = 0

        encoder = encoders.resolve(base_encoder)(num_classes=dim)
        if mlp:
            _add_mlp_head(encoder)
        if split_bn > 1:
            encoder = convert_split_bn(encoder, split_bn)
        self.encoder_q = encoder
        self.encoder_k = copy.deepcopy(encoder)
        for parameter in self.encoder_k.parameters():
            parameter.requires_grad = False
        self._flatten()

    def forward(self, im_q: Tensor, im_k: Tensor) -> MoCoOutput:
        """Loss of a batch of two views of the same images.

        Args:
            im_q: [N, ...] the query views.
            im_k: [N, ...] the key views, row by row of the same images.
        """
        if im_q.shape[0] != im_k.shape[0]:
            raise ValueError(f"im_k: expected {im_q.shape[0]} images as in im_q, got {im_k.shape[0]}")
        queries = self.encoder_q(im_q)  # [N, dim]
        all_keys = self._encode_keys(im_k)  # [world * N, dim]
        n = queries.shape[0]
        keys = all_keys[distributed.rank() * n :][:n]
        loss, stats = info_nce(queries, keys, self.queue, self.T, return_stats=True)
        return MoCoOutput(loss, all_keys, stats)

    @torch.no_grad()
    def update(self, keys: Tensor) -> None:
        """After the optimizer's step: move the key encoder (Eq. 2), then enqueue the batch's keys.

        Args:
            keys: [B, dim] ``MoCoOutput.keys``, the same on every rank.
        """
        update_key_encoder_(self.encoder_k, self.encoder_q, self.m)
        self.enqueue(keys)
        self._steps += 1

    def extra_repr(self) -> str:
        return f"K={self.K}, dim={self.queue.shape[1]}, m={self.m}, T={self.T}, queue_dtype={self.queue.dtype}"

    @torch.no_grad()
    def _encode_keys(self, im_k: Tensor) -> Tensor:
        if distributed.world_size() > 1:
            return encode_shuffled(self.encoder_k, im_k, self.shuffle_bn, self._steps)
        if self.split_bn > 1 and self.shuffle_bn != "none":
            return encode_split(self.encoder_k, im_k)
        return self.encoder_k(im_k)

    def _flatten(self) -> None:
        """Lay out each encoder in one buffer. Those of several dtypes are updated as lists; see momentum.py."""
        for encoder in (self.encoder_q, self.encoder_k):
            parameters = list(encoder.parameters())
            if len({(p.dtype, p.device) for p in parameters}) == 1 and not parameters[0].is_meta:
                flatten_parameters_(encoder)

    def _apply(self, *args, **kwargs):  # .to(), .cuda(), .half(): each parameter gets memory of its own
        super()._apply(*args, **kwargs)
        self._flatten()
        return self

    def __setstate__(self, state):  # copy.deepcopy and pickle too
        super().__setstate__(state)
        self._flatten()


def _add_mlp_head(encoder: nn.Module) -> None:
    """Linear -> Linear, ReLU, Linear, in place (MoCo v2): ``fc`` becomes ``fc.0``, ``fc.2``."""
    name = next((name for name in encoders.HEADS if isinstance(getattr(encoder, name, None), nn.Linear)), None)
    if name is None:
        raise ValueError(
            f"mlp: expected an encoder whose head is a Linear layer named one of {', '.join(encoders.HEADS)}, got "
            f"{type(encoder).__name__}; give it its own two-layer head and pass mlp=False"
        )
    head = getattr(encoder, name)
    setattr(encoder, name, nn.Sequential(nn.Linear(head.in_features, head.in_features), nn.ReLU(), head))
