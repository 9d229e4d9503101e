"""expected_key: the gradient of info_nce's logsumexp."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._info_nce import over_temperature
from ._l2_normalize import wide_rows
from .checks import check_tensors, native, scalar
from .info_nce_operator import NONE, OWN_KEYS, SAME_IDS, Arguments, Results, current_precision


class ExpectedKey(NamedTuple):
    """Result of :func:`expected_key`.

    Attributes:
        keys: [N, C] mean of each row's candidates, weighted by their softmax.
        lse: [N] logsumexp of the row's scores over the temperature.
    """

    keys: Tensor
    lse: Tensor


def expected_key(
    query: Tensor,
    key: Tensor | None,
    queue: Tensor | None,
    temperature: float | Tensor = 0.07,
    *,
    normalize: bool = True,
    in_batch: bool = False,
    key_offset: int = 0,
    num_valid: int | Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    own_key: str = "positive",
) -> ExpectedKey:
    """The mean of the candidates under each query's softmax: a teacher's soft labels for :func:`info_nce`.

    ``keys[n] = Σ_j p_nj n_j`` with ``p_n = softmax(q_n·n_j / temperature)`` over the candidates n_j that
    :func:`info_nce` has for the same arguments, in one pass and without the [N, K] probabilities. As ``target`` it
    stands for the whole distribution, so momentum distillation (ALBEF, arXiv 2107.07651, Eq. 6) is

        teacher = expected_key(query_m, key_m, queue, T, in_batch=True).keys
        loss = info_nce(query, key_m, queue, T, in_batch=True, target=0.6 * unit(key_m) + 0.4 * teacher)

    and relational losses (ReSSL, arXiv 2107.09282), whose candidates are the queue alone, pass ``key=None`` to both.
    The cross-entropy differs from the KL divergence by the teacher's entropy, ``lse - q·keys / temperature``, which has
    no gradient.

    Args:
        query: [N, C] features of the teacher.
        key: [N, C] or, with ``in_batch``, [M, C]; None: the queue alone.
        queue, temperature, normalize, in_batch, key_offset, num_valid: as in :func:`info_nce`; no gradient is recorded.
        query_ids, key_ids, queue_ids: candidates other than the row's own key with the query's id are left out.
        own_key: ``"positive"``, it is a candidate, or ``"excluded"``.

    Returns:
        :class:`ExpectedKey`, float32 (float64 if an input is float64). Without candidates, the keys are NaN and lse is
        -inf.

    Raises:
        ValueError, TypeError: as :func:`info_nce`.
    """
    if own_key not in ("positive", "excluded"):
        raise ValueError(f"own_key: expected 'positive' or 'excluded', got {own_key!r}")
    candidates = expected_candidates(
        query, key, queue, temperature, normalize=normalize, in_batch=in_batch, key_offset=key_offset,
        num_valid=num_valid, query_ids=query_ids, key_ids=key_ids, queue_ids=queue_ids, own_key=own_key,
    )  # fmt: skip
    return ExpectedKey(candidates.keys, candidates.lse)


class ExpectedCandidates(NamedTuple):
    """The candidates of each row: their mean [N, C] under their softmax, its logsumexp [N], and the number [N] of those
    that score above the row's own key."""

    keys: Tensor
    lse: Tensor
    rank: Tensor


@torch.no_grad()
def expected_candidates(
    query: Tensor,
    key: Tensor | None,
    queue: Tensor | None,
    temperature: float | Tensor,
    *,
    normalize: bool = True,
    in_batch: bool = False,
    key_offset: int = 0,
    num_valid: int | Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    own_key: str = "positive",
) -> ExpectedCandidates:
    """:func:`expected_key`; with ``"decoupled"``, of the queue alone, while the ranks refer to the own key [N, C]."""
    check_tensors(query=query, **{} if key is None else {"key": key})
    if query.dim() == 3:
        raise ValueError(f"query: expected [N, C], got {list(query.shape)}; call it for each group")
    tensor, value = scalar("temperature", temperature)
    # The gradient of logsumexp with respect to unit(query) / temperature, which is the loss of a target of zero.
    query = over_temperature(
        wide_rows(query, normalize),
        torch.tensor(value, dtype=torch.float64, device="cpu") if tensor is None else tensor,
    )
    key = None if key is None else wide_rows(key, normalize)
    decoupled = own_key == "decoupled"
    arguments = Arguments(
        query, key, queue, None, 1.0, False, NONE, True, False, False, current_precision(query.is_cuda),
        in_batch, key_offset, num_valid if isinstance(num_valid, Tensor) else None,
        None if isinstance(num_valid, Tensor) else num_valid, 0.0, query_ids, queue_ids, SAME_IDS["mask"], key_ids,
        None if decoupled else torch.zeros_like(query), OWN_KEYS[own_key],
    )  # fmt: skip
    results = Results._make(native(torch.ops.moco_ext.info_nce_forward.default, *arguments))
    mean = results.grad_query + key if decoupled and key is not None else results.grad_query
    return ExpectedCandidates(mean, results.lse, results.rank)
