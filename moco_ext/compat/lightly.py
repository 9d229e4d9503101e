"""Lightly's loss, memory bank and momentum helpers, on this package's kernels.

Replaces what a MoCo, SimCLR or NNCLR trainer imports from ``lightly.loss``, ``lightly.models.modules`` and
``lightly.models.utils`` (Lightly 1.6). Encoders, heads and transforms are still Lightly's. For code that says
``utils.update_momentum``, import ``utils`` from here, which has the functions of ``lightly.models.utils``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..distributed import all_gather, all_gather_with_grad, rank, world_size
from ..momentum import update_key_encoder_
from ..ops import info_nce, l2_normalize, nearest_keys
from ..shuffle_bn import shared_permutation, start_shuffle

__all__ = [
    "MemoryBankModule",
    "NNMemoryBankModule",
    "NTXentLoss",
    "activate_requires_grad",
    "batch_shuffle",
    "batch_unshuffle",
    "concat_all_gather",
    "deactivate_requires_grad",
    "update_momentum",
    "utils",
]


class MemoryBankModule(nn.Module):
    """A circular bank of features, for direct use or as the base class of a loss.

    ``bank`` [size, dim] float32 and ``bank_ptr`` [1] are buffers that are not saved in the state dict. They move to the
    device of the features once, where Lightly copies the bank at every step. A batch that reaches the end of the bank
    is cut off there and the pointer is reset, as in Lightly (:class:`moco_ext.KeyQueue` wraps around).

    Args:
        size: ``(features, dim)``, or 0 for no bank. With the number of features alone, as up to Lightly 1.5, ``dim``
            is that of the first batch.
        gather_distributed: store the features of all ranks.
        feature_dim_first: return the bank as [dim, size] instead of [size, dim].

    Raises:
        ValueError: a size that is negative or not one of these.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(
        self, size: int | Sequence[int] = 65536, gather_distributed: bool = False, feature_dim_first: bool = True
    ) -> None:
        super().__init__()
        self.size = (size,) if isinstance(size, int) else tuple(size)
        if any(n < 0 for n in self.size) or len(self.size) not in (1, 2):
            raise ValueError(f"size: expected (features, dim), neither negative, or 0 for no memory bank, got {size}")
        self.gather_distributed = gather_distributed
        self.feature_dim_first = feature_dim_first
        self.register_buffer("bank", torch.empty(self.size), persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=False)
        if len(self.size) == 2:
            self._init_memory_bank(self.size)

    def forward(
        self, output: Tensor, labels: Tensor | None = None, update: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return the bank as it is, then write the output into it if ``update``.

        Args:
            output: [B, dim] features.
            labels: ignored.
            update: write the output into the bank.

        Returns:
            The output, and a copy of the bank or None if there is no bank.
        """
        if self.size[0] == 0:
            return output, None
        bank = self._ready(output).detach().clone()
        if update:
            self._dequeue_and_enqueue(output)
        return output, bank.t() if self.feature_dim_first else bank

    @torch.inference_mode(False)  # Lightning validates before it trains, in inference mode
    def _ready(self, like: Tensor) -> Tensor:
        """The bank, on the device of the features and with their dimension."""
        if self.bank.device != like.device:
            self.to(like.device)
        if len(self.size) == 1:
            self._init_memory_bank((self.size[0], like.shape[1]))
        return self.bank

    @torch.no_grad()
    def _init_memory_bank(self, size: tuple[int, ...]) -> None:
        self.size = size
        self.bank = F.normalize(torch.randn(size), dim=-1).to(self.bank)
        self.bank_ptr.zero_()

    @torch.no_grad()
    def _dequeue_and_enqueue(self, batch: Tensor) -> None:
        if self.gather_distributed:
            batch = all_gather(batch)
        # Rows past the end are replaced with the last row that fits. So no slice depends on the pointer's value, for
        # which the host would have to wait.
        size, after = self.size[0], self.bank_ptr + len(batch)
        rows = torch.arange(len(batch), device=self.bank.device).minimum(size - 1 - self.bank_ptr)
        self.bank.index_copy_(0, self.bank_ptr + rows, batch.detach().to(self.bank)[rows])
        self.bank_ptr.copy_(torch.where(after >= size, 0, after))


class NNMemoryBankModule(MemoryBankModule):
    """A memory bank that returns the nearest neighbor of each feature (NNCLR, arXiv 2104.14548).

    The similarities [B, size] are not stored, and the bank is copied once, to normalize it.

    Args:
        size: see :class:`MemoryBankModule`; not 0.

    Raises:
        ValueError: an invalid size, or 0, with which Lightly fails in the first step.

    Example::

        bank = NNMemoryBankModule((4096, 128))
        z0, z1 = bank(z0, update=False), bank(z1, update=True)
        loss = 0.5 * (criterion(z0, p1) + criterion(z1, p0))
    """

    def __init__(self, size: int | Sequence[int]) -> None:
        super().__init__(size)
        if self.size[0] == 0:
            raise ValueError(f"size: expected at least one feature to choose from, got {size}")

    @torch.no_grad()
    def forward(self, output: Tensor, update: bool = False) -> Tensor:  # type: ignore[override]  # no labels, as in Lightly
        """Return the bank's feature with the highest cosine similarity to each output, without gradient.

        Args:
            output: [B, dim] features, of any norm.
            update: then write the output into the bank.

        Returns:
            [B, dim] rows of the bank as it was before, float32, as they were stored.
        """
        bank = self._ready(output)
        nearest = bank[nearest_keys(output, l2_normalize(bank)).index[:, 0]]
        if update:
            self._dequeue_and_enqueue(output)
        return nearest


class NTXentLoss(nn.Module):
    """Normalized temperature-scaled cross-entropy: MoCo's loss with a memory bank, SimCLR's without.

    With a bank, the negatives of each row are the bank's features, and both outputs receive a gradient. Without a bank,
    both views are queries, and their negatives are all other rows of both views (SimCLR, arXiv 2002.05709, Eq. 1). The
    similarities are never stored.

    Args:
        temperature: divides the similarities; a negative temperature inverts them, as in Lightly.
        memory_bank_size: see :class:`MemoryBankModule`.
        gather_distributed: with a bank, store the features of all ranks; without a bank, use them as negatives, with
            gradient.

    Raises:
        ValueError: a temperature within 1e-8 of zero, an invalid bank size, or ``gather_distributed`` when torch has
            no distributed support.

    Example::

        criterion = NTXentLoss(temperature=0.1, memory_bank_size=(4096, 128))
        loss = criterion(query, key)  # [N, 128] each
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        if not abs(temperature) >= 1e-8:
            raise ValueError(f"temperature: expected an absolute value of at least 1e-8, got {temperature}")
        if gather_distributed and not torch.distributed.is_available():
            raise ValueError("gather_distributed: expected False in a torch without distributed support, got True")
        self.memory_bank = MemoryBankModule(memory_bank_size, gather_distributed)
        self.temperature = temperature
        self.gather_distributed = gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The mean loss, 0-dim. The bank stores ``out1`` if ``out0`` requires a gradient.

        Args:
            out0, out1: [N, dim] features of two views of the same images, of any norm.
        """
        if self.memory_bank.size[0] == 0:
            return self._in_batch(out0, out1)
        loss = info_nce(self._signed(out0), out1, self.memory_bank._ready(out0), abs(self.temperature))
        if out0.requires_grad:
            self.memory_bank._dequeue_and_enqueue(l2_normalize(out1.detach()))
        return loss

    def _signed(self, queries: Tensor) -> Tensor:
        return queries if self.temperature > 0 else -queries

    def _in_batch(self, out0: Tensor, out1: Tensor) -> Tensor:
        n = len(out0)
        queries, keys = torch.cat([out0, out1]), torch.cat([out1, out0])  # row n of each is the other's positive
        me, world = 0, 1
        if self.gather_distributed:
            me, world = rank(), world_size()
            keys = all_gather_with_grad(keys)
        # Besides its positive, the only key of a query's image is the query itself, which is not a negative.
        images = torch.arange(world * n, device=out0.device).view(world, 1, n).expand(-1, 2, -1).flatten()
        queries = self._signed(queries)
        return info_nce(
            queries, keys, None, abs(self.temperature), in_batch=True, key_offset=me * 2 * n, query_ids=images
        )


def update_momentum(model: nn.Module, model_ema: nn.Module, m: float) -> None:
    """Exponential moving average of the parameters: ``ema = m·ema + (1 - m)·model``.

    The first call flattens the parameters of each module (:func:`moco_ext.flatten_parameters_`), so that the update is
    one launch. To leave them where they are, call ``moco_ext.momentum_update_`` with two lists of parameters instead.

    Raises:
        ValueError: m is not in [0, 1], or the modules have different parameters.
    """
    update_key_encoder_(model_ema, model, m)


def deactivate_requires_grad(model: nn.Module) -> None:
    """Freeze all parameters of the module."""
    model.requires_grad_(False)


def activate_requires_grad(model: nn.Module) -> None:
    """Undo :func:`deactivate_requires_grad`."""
    model.requires_grad_(True)


def concat_all_gather(x: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks, [N, ...] each, to [world * N, ...], without gradient.

    Without a process group, where Lightly's fails, it is the tensor itself, detached.
    """
    return all_gather(x)


_shuffles = itertools.count()  # all ranks shuffle equally often, so they draw the same permutations


@torch.no_grad()
def batch_shuffle(batch: Tensor, distributed: bool = False) -> tuple[Tensor, Tensor]:
    """Shuffle the rows of a batch [N, ...], across all ranks if ``distributed``.

    Returns:
        This rank's rows [N, ...], and the argument of :func:`batch_unshuffle`: the permutation [N] int64, or, if
        ``distributed``, the inverse of the global permutation [world * N] int64.
    """
    if not distributed:
        shuffle = torch.randperm(len(batch), device=batch.device)
        return batch[shuffle], shuffle
    order = shared_permutation(world_size() * len(batch), next(_shuffles))
    arriving = start_shuffle(batch, order, "auto")
    assert arriving is not None
    return arriving(), torch.argsort(order).to(batch.device)


@torch.no_grad()
def batch_unshuffle(batch: Tensor, shuffle: Tensor, distributed: bool = False) -> Tensor:
    """Undo :func:`batch_shuffle`.

    Args:
        batch: [N, ...] computed from the shuffled rows.
        shuffle: the second result of :func:`batch_shuffle`.
        distributed: as for :func:`batch_shuffle`.
    """
    if not distributed:
        return batch[torch.argsort(shuffle)]
    return all_gather(batch)[shuffle.view(world_size(), -1)[rank()]]


#: The functions of ``lightly.models.utils`` that are replaced here.
utils = SimpleNamespace(
    activate_requires_grad=activate_requires_grad,
    batch_shuffle=batch_shuffle,
    batch_unshuffle=batch_unshuffle,
    concat_all_gather=concat_all_gather,
    deactivate_requires_grad=deactivate_requires_grad,
    update_momentum=update_momentum,
)
