"""What a query is compared with: the losses that a queue of keys serves.

Each function takes the queries [N, dim] of this rank with gradient, the keys [N, dim] of the same images, the queue
[K, dim] and the temperatures, and returns the loss, 0-dim, and the stats [N].
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from . import distributed
from .ops import expected_key, info_nce, nearest_keys
from .stats import InfoNCEStats

Objective = Callable[[Tensor, Tensor, Tensor, float, float], tuple[Tensor, InfoNCEStats]]


def relational(q: Tensor, key: Tensor, queue: Tensor, T: float, teacher_T: float) -> tuple[Tensor, InfoNCEStats]:
    """Cross-entropy between the key's softmax over the queue and the query's (ReSSL, arXiv 2107.09282).

    The key's temperature is the lower one, so that its softmax is the sharper one.
    """
    target = expected_key(key, None, queue, teacher_T).keys
    return info_nce(q, None, queue, T, target=target, return_stats=True)


def nearest_neighbor(q: Tensor, key: Tensor, queue: Tensor, T: float, teacher_T: float) -> tuple[Tensor, InfoNCEStats]:
    """The key's nearest neighbor in the queue is contrasted with the queries of all ranks (NNCLR, arXiv 2104.14548,
    Eq. 3): its own image's is the positive."""
    neighbors = queue[nearest_keys(key, queue).index[:, 0]]
    queries, first = distributed.all_gather_with_grad(q), distributed.rank() * len(q)
    return info_nce(neighbors, queries, None, T, in_batch=True, key_offset=first, return_stats=True)


# Besides "infonce", which has options of its own; see MoCo.forward.
OBJECTIVES: dict[str, Objective] = {"nnclr": nearest_neighbor, "ressl": relational}
