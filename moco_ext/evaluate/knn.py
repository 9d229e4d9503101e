"""Weighted k-nearest-neighbor classification (Wu et al., arXiv 1805.01978, section 3.4)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed import all_reduce, rank, world_size
from ..ops import nearest_keys
from .features import check_finite, collective_device

_CHUNK_NUMBERS = 1 << 25  # of a bank, normalized at a time


@torch.no_grad()
def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.07,
    chunk: int = 4096,
    device: torch.device | str | None = None,
) -> Tensor:
    """Predict the class with the most votes among the k nearest training images, each vote exp(cosine / temperature).

    Args:
        train_features: [N, D] floating point; need not be normalized.
        train_labels: int64 [N], classes 0 to n - 1.
        test_features: [M, D].
        k: number of neighbors; clipped to N.
        chunk: number of test rows, and the least number of training rows, compared at a time. Memory beyond the
            arguments is O(chunk * (k + D)) and pieces of 128 MB, whatever N and M are.
        device: where to compute, by default the device of test_features; features are copied there in chunks.

    Returns:
        int64 [M], on the device of test_features.

    Raises:
        ValueError: shapes do not match, features are not finite, or k, temperature or N is not positive.
    """
    if train_features.ndim != 2 or test_features.ndim != 2 or train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"test_features: expected [M, D] with the D of train_features {list(train_features.shape)}, "
            f"got {list(test_features.shape)}"
        )
    if train_labels.shape != train_features.shape[:1]:
        raise ValueError(f"train_labels: expected [{len(train_features)}], got {list(train_labels.shape)}")
    if k < 1 or not temperature > 0 or len(train_features) == 0:  # NaN is not positive either
        raise ValueError(f"k, temperature, N: expected all positive, got {k}, {temperature}, {len(train_features)}")
    check_finite("train_features", train_features)
    check_finite("test_features", test_features)
    n_classes = int(train_labels.max()) + 1
    device = torch.device(device or test_features.device)
    labels = train_labels.to(device)
    predictions = []
    for rows in test_features.split(chunk):
        similarity, index = nearest_in(rows.to(device), _chunks(train_features, chunk, k), k)
        # exp(s/T) divided by the row's largest vote, so that small temperatures do not overflow
        votes = torch.exp((similarity - similarity[:, :1]) / temperature)
        scores = votes.new_zeros(len(rows), n_classes).scatter_add_(1, labels[index], votes)
        predictions.append(scores.argmax(1).to(test_features.device))
    return torch.cat(predictions) if predictions else train_labels.new_empty(0)


def knn_top1(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.07,
    device: torch.device | str | None = None,
    sharded: bool = False,
) -> float:
    """Top-1 accuracy in percent of :func:`knn_predict`.

    With ``sharded``, every rank of a process group must call this with the same features. Each classifies its share of
    the test images and gets the accuracy on all of them.
    """
    mine = slice(rank(), None, world_size()) if sharded else slice(None)
    predicted = knn_predict(
        train_features, train_labels, test_features[mine], k=k, temperature=temperature, device=device
    )
    correct = (predicted == test_labels[mine]).sum()
    if sharded:
        correct = all_reduce(correct.to(collective_device(device)))
    return 100 * correct.item() / len(test_labels)


def nearest(bank_features: Tensor, features: Tensor, k: int, chunk: int = 4096) -> Tensor:
    """Indices int64 [M, k] of the k rows of ``bank_features`` with the highest cosine, nearest first."""
    return nearest_in(features, _chunks(bank_features, chunk, k), k)[1]


def _chunks(bank: Tensor, chunk: int, k: int) -> Iterable[Tensor]:
    return bank.split(max(chunk, min(k, len(bank)), _CHUNK_NUMBERS // max(bank.shape[1], 1)))


def nearest_in(rows: Tensor, chunks: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Cosines and indices [M, k] of the k nearest rows of a bank, nearest first, merged over its chunks [n, D].

    Computes in float32 on the device of ``rows``, to which one chunk of the bank is copied at a time. A bank of fewer
    than k rows gives all of them.
    """
    rows = F.normalize(rows.float(), dim=1)
    best, where = rows.new_empty(len(rows), 0), torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
    start = 0
    for chunk in chunks:
        part = F.normalize(chunk.to(rows.device).float(), dim=1)
        similarity, index = nearest_keys(rows, part, min(k, len(part)), normalize=False)
        merged, indices = torch.cat([best, similarity], 1), torch.cat([where, index + start], 1)
        best, order = (x[:, :k] for x in merged.sort(dim=1, descending=True, stable=True))
        where = indices.gather(1, order)
        start += len(part)
    return best, where
