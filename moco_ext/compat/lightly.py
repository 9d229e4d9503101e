"""Lightly's loss, memory bank and momentum helpers, on this package's kernels.

Replaces, name by name, what a MoCo or SimCLR trainer imports from ``lightly.loss``, ``lightly.models.modules`` and
``lightly.models.utils`` (Lightly 1.6); encoders, heads and transforms stay Lightly's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..distributed import all_gather, all_gather_with_grad, rank, world_size
from ..momentum import update_key_encoder_
from ..ops import info_nce, l2_normalize
from ..shuffle_bn import shared_permutation, start_shuffle

__all__ = [
    "MemoryBankModule",
    "NTXentLoss",
    "batch_shuffle",
    "batch_unshuffle",
    "deactivate_requires_grad",
    "update_momentum",
]


class MemoryBankModule(nn.Module):
    """A circular bank of features, to be used as it is or as the base class of a loss.

    ``bank`` [size, dim] float32 and ``bank_ptr`` [1] are buffers, not saved in the state dict. They follow the features
    to their device; Lightly's bank would be copied there at each step. A batch that reaches the bank's end is cut there
    and the pointer starts anew, as in Lightly (:class:`moco_ext.KeyQueue` wraps around).

    Args:
        size: ``(features, dim)``, or 0 for no bank; a number of features alone takes ``dim`` from the first batch
            (which Lightly allowed up to 1.5).
        gather_distributed: store the features of all ranks.
        feature_dim_first: hand the bank out as [dim, size] instead of [size, dim].

    Raises:
        ValueError: a negative size, or one that is neither of these.
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
        """A copy of the bank as it is, and then, if ``update``, the output [B, dim] written into it.

        Args:
            labels: ignored.

        Returns:
            The output and the copy; None instead of the copy if there is no bank.
        """
        if self.size[0] == 0:
            return output, None
        bank = self._ready(output).detach().clone()
        if update:
            self._dequeue_and_enqueue(output)
        return output, bank.t() if self.feature_dim_first else bank

    def _ready(self, like: Tensor) -> Tensor:
        """The bank, on the features' device and of their width."""
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
        # Rows past the end all become one more copy of the last that fits: no slice depends on the pointer's value, so
        # the host need not know it.
        size, after = self.size[0], self.bank_ptr + len(batch)
        rows = torch.arange(len(batch), device=self.bank.device).minimum(size - 1 - self.bank_ptr)
        self.bank.index_copy_(0, self.bank_ptr + rows, batch.detach().to(self.bank)[rows])
        self.bank_ptr.copy_(torch.where(after >= size, 0, after))


class NTXentLoss(nn.Module):
    """Normalised temperature-scaled cross-entropy: MoCo's loss with a memory bank, SimCLR's without.

    With a bank, row n's negatives are the bank's features, and gradient flows to both outputs through their own
    similarity. Without, both views are queries and their negatives are all other rows of both views (SimCLR,
    arXiv 2002.05709, Eq. 1). In either case the similarities are never stored.

    Args:
        temperature: what similarities are divided by; a negative one turns them round, as in Lightly.
        memory_bank_size: see :class:`MemoryBankModule`.
        gather_distributed: with a bank, store the features of all ranks; without, take them as negatives, with
            gradient.

    Raises:
        ValueError: a temperature within 1e-8 of zero, an illegal bank size, or ``gather_distributed`` in a torch that
            has no distributed support.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        if not abs(temperature) >= 1e-8:
            raise ValueError(f"temperature: expected at least 1e-8 in size, got {temperature}")
        if gather_distributed and not torch.distributed.is_available():
            raise ValueError("gather_distributed: expected False in a torch without distributed support, got True")
        self.memory_bank = MemoryBankModule(memory_bank_size, gather_distributed)
        self.temperature = temperature
        self.gather_distributed = gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The mean loss, 0-dim; a bank takes in ``out1`` if ``out0`` requires a gradient.

        Args:
            out0, out1: [N, dim] features of two views, row by row of the same images; of any length.
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
        queries, keys = torch.cat([out0, out1]), torch.cat([out1, out0])  # row by row each other's positive
        me, world = 0, 1
        if self.gather_distributed:
            me, world = rank(), world_size()
            keys = all_gather_with_grad(keys)
        # The only other key of a query's image is the query itself, which is no negative.
        images = torch.arange(world * n, device=out0.device).view(world, 1, n).expand(-1, 2, -1).flatten()
        queries = self._signed(queries)
        return info_nce(
            queries, keys, None, abs(self.temperature), in_batch=True, key_offset=me * 2 * n, query_ids=images
        )


def update_momentum(model: nn.Module, model_ema: nn.Module, m: float) -> None:
    """Move the parameters of ``model_ema`` towards those of ``model``: ``ema = m·ema + (1 - m)·model``.

    Each module's parameters are laid out in one buffer at the first call, so that the update is one launch.

    Raises:
        ValueError: m not in [0, 1], or modules of different parameters.
    """
    update_key_encoder_(model_ema, model, m)


def deactivate_requires_grad(model: nn.Module) -> None:
    """Let no parameter of the module take a gradient."""
    model.requires_grad_(False)


_shuffles = itertools.count()  # all ranks shuffle equally often, so each draws the same permutations by itself


@torch.no_grad()
def batch_shuffle(batch: Tensor, distributed: bool = False) -> tuple[Tensor, Tensor]:
    """Put the rows of a batch [N, ...] in random order, across all ranks if ``distributed``.

    Returns:
        This rank's rows [N, ...], and what :func:`batch_unshuffle` wants: the permutation [N], or, if ``distributed``,
        the inverse of the global one [world * N], int64.
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
    """Undo :func:`batch_shuffle` on what was made of its rows, [N, ...]; ``shuffle`` is what it returned."""
    if not distributed:
        return batch[torch.argsort(shuffle)]
    return all_gather(batch)[shuffle.view(world_size(), -1)[rank()]]
