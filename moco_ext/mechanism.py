"""What the mechanisms have in common: the interface by which a trainer drives any of them."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .shuffle_bn import shared_permutation
from .stats import InfoNCEStats

_FORGOTTEN = 3  # optimizer steps without an update before the warning


class Mechanism(nn.Module):
    """Base class of :class:`MoCo`, :class:`EndToEnd` and :class:`MemoryBank` (arXiv 1911.05722, Fig. 2), and of
    :class:`MoCoV3`.

    A trainer needs to know nothing else about a model::

        loss, stats, arguments = model.forward_batch(im_q, im_k, index=index, key_order=key_order)
        loss.backward()
        optimizer.step()
        model.update(*arguments)

    Attributes:
        encoder_q: the query encoder, the network that is evaluated.
        encoder_k: the key encoder, if the mechanism has one; may be ``encoder_q`` itself.
        T: temperature.
        m: momentum of the update, or None if nothing moves by momentum; may be changed between steps.
        updates: number of updates so far. Key images are shuffled by a permutation drawn from it, so restore it when
            you resume training.
        symmetric: whether one forward pass uses each view as query and as key.
        sync_batchnorm: whether the statistics of BatchNorm should be those of the batch of all ranks. A trainer
            converts the layers to ``SyncBatchNorm``, which exists on CUDA only.
        query_hook: if set, called in each forward pass with the raw queries [N, dim].
    """

    encoder_q: nn.Module
    T: float
    m: Any = None  # a float where there is one
    symmetric = False
    sync_batchnorm = False
    updates: int = 0
    query_hook: Callable[[Tensor], object] | None = None
    _low_precision: Any = None  # the LowPrecisionWeights of a key encoder that has them

    def forward_batch(
        self, im_q: Tensor, im_k: Tensor, *, index: Tensor, key_order: Tensor | None = None
    ) -> tuple[Tensor, InfoNCEStats, tuple[Tensor, ...]]:
        """The forward pass on everything a loader knows about a batch.

        Args:
            im_q, im_k: [N, ...] two views of each image.
            index: [N] int64 position of each image in the data set.
            key_order: see :meth:`MoCo.forward`.

        Returns:
            The loss (0-dim), the stats of this rank's queries [N], and the arguments for :meth:`update`.
        """
        out = self(im_q, im_k, key_order=key_order)
        return out.loss, out.stats, (out.keys,)

    def update(self, keys: Tensor) -> None:
        """Change the model's state after the optimizer step; see the subclasses."""
        self._check_keys(keys)
        self._count_update()

    def key_queue(self) -> Tensor | None:
        """The keys [K, dim] that stay in the dictionary from one step to the next; None if not all are here."""
        return None

    @property
    def chance_loss(self) -> float | None:
        """Loss in nats of a model that cannot tell the positive from the negatives, log(K + 1); None if K varies."""
        K = getattr(self, "K", None)
        return None if K is None else math.log(K + 1)

    def _check_images(self, im_q: Tensor, im_k: Tensor) -> None:
        for name, images in (("im_q", im_q), ("im_k", im_k)):
            if not images.is_floating_point():
                raise ValueError(f"{name}: expected floating-point images, normalized, got {images.dtype}")
        if im_q.shape[0] != im_k.shape[0]:
            raise ValueError(f"im_k: expected {im_q.shape[0]} images as in im_q, got {im_k.shape[0]}")

    # Not traced: torch.compile would compile again at each step, for another number of updates.
    @torch.compiler.disable
    def _count_update(self) -> None:
        self.updates += 1

    @torch.compiler.disable
    def _permutation(self, n: int) -> Tensor:
        """The order of the global batch's keys in this step."""
        return shared_permutation(n, self.updates)

    def _check_keys(self, keys: Tensor) -> None:
        self._steps_without_update = 0
        if not isinstance(keys, Tensor):
            raise TypeError(f"keys: expected the output's keys, out.keys, got {type(keys).__name__}")

    _steps_without_update = 0
    _seen: tuple[int, int] | None = None

    def _warn_if_update_is_forgotten(self) -> None:
        """Called in forward: an optimizer step shows as a new version of the first trained parameter."""
        if not (self.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return
        parameter = next((p for p in self.encoder_q.parameters() if p.requires_grad), None)
        if parameter is None:
            return
        seen, self._seen = self._seen, (id(parameter), parameter._version)
        # FSDP2 puts another parameter in its place while the weights are gathered.
        if seen is not None and seen[0] == id(parameter) and seen != self._seen:
            self._steps_without_update += 1
        if self._steps_without_update == _FORGOTTEN:
            warnings.warn(
                f"{type(self).__name__}: {_FORGOTTEN} optimizer steps without a call of update; call "
                "model.update(out.keys) after each optimizer step, or the dictionary never changes",
                stacklevel=4,
            )

    def _watch(self, queries: Tensor) -> None:
        if self.query_hook is not None:
            self.query_hook(queries)


def check_temperature(T: Any, name: str = "T") -> float:
    """T as a positive, finite float."""
    if isinstance(T, bool) or not isinstance(T, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {T!r}")
    if not 0.0 < float(T) < math.inf:
        raise ValueError(f"{name}: expected a positive, finite temperature, got {T}")
    return float(T)


def check_momentum(m: Any) -> float:
    """m as a float in [0, 1]."""
    if isinstance(m, bool) or not isinstance(m, numbers.Real):
        raise TypeError(f"m: expected a number, got {m!r}")
    if not 0.0 <= float(m) <= 1.0:
        raise ValueError(f"m: expected a momentum in [0, 1], got {m}")
    return float(m)
