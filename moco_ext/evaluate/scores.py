"""Features and scores of raw pixels and encoders on labeled data: what every command that evaluates calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..data import ImageData, Split
from ..runs.options import RunOptions
from .features import check_finite, encoder_features, estimate_batchnorm_, is_missing, pixel_features
from .knn import knn_top1
from .linear import linear_top1

Rows = tuple[Tensor, Tensor]  # [N, D] of the training split and [M, D] of the test split
Features = dict[str, Rows]  # by representation
LABELS = {"pixels": "raw pixels", "untrained": "untrained encoder", "trained": "trained encoder"}


def split_features(data: ImageData, options: RunOptions, encoder: nn.Module | None, name: str = "encoder") -> Rows:
    """Features of both splits: of an encoder, or the raw pixels if it is None. Without a test split, those of the
    training split take its place.

    In a process group every rank must call it and gets all rows. Those of unreadable images are NaN.

    Args:
        name: what error messages call the representation.

    Raises:
        FloatingPointError: features are not finite, as training has diverged.
    """

    def features(split: Split) -> Tensor:
        if encoder is None:
            return pixel_features(data, split, workers=options.workers)
        encoder.to(options.device)
        return encoder_features(encoder, data, split, device=options.device, workers=options.workers)

    train = features(data.train)
    test = train if data.test is None else features(data.test)
    for part, rows in (("training", train), ("test", test)):
        found, _ = _readable(rows, rows)
        check_finite(f"features of {LABELS.get(name, name)} ({part} images)", found, FloatingPointError)
    return train, test


def representations(
    data: ImageData, options: RunOptions, *, untrained: nn.Module | None = None, **encoders: nn.Module
) -> Iterator[tuple[str, Rows]]:
    """Names and :func:`split_features` of the pixels and each encoder, one at a time to save memory.

    Args:
        untrained: encoder at its random start. Its BatchNorm statistics fit no data, so they are first set to those of
            the training images, in place.
    """
    yield "pixels", split_features(data, options, None, "pixels")
    if untrained is not None:
        untrained.to(options.device)
        estimate_batchnorm_(untrained, data, data.train, device=options.device, workers=options.workers)
        encoders = {"untrained": untrained} | encoders
    for name, encoder in encoders.items():
        yield name, split_features(data, options, encoder, name)


def all_features(data: ImageData, options: RunOptions, **encoders: nn.Module) -> Features:
    """All :func:`representations`, with the same arguments, at once."""
    return dict(representations(data, options, **encoders))


def knn_score(data: ImageData, rows: Rows, **voting: Any) -> float:
    """:func:`knn_top1`, with its options, of a representation of ``data``."""
    return knn_top1(*_labeled(data, rows), **voting)


def linear_score(data: ImageData, rows: Rows, *, C: float = 1.0) -> float:
    """:func:`linear_top1` of a representation of ``data``."""
    return linear_top1(*_labeled(data, rows), C=C)


def _labeled(data: ImageData, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and labels of the readable training images, and of the test images."""
    train, test = data.splits
    return *_readable(rows[0], train.labels), *_readable(rows[1], test.labels)


def _readable(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    missing = is_missing(rows)
    return (rows[~missing], labels[~missing]) if missing.any() else (rows, labels)


def top1(data: ImageData, features: Features, knn_k: int) -> dict[str, dict[str, float]]:
    """kNN and linear top-1 accuracy in percent by representation, as ``summary.json`` has them."""
    return {
        "knn_top1": {name: round(knn_score(data, rows, k=knn_k), 2) for name, rows in features.items()},
        "linear_top1": {name: round(linear_score(data, rows), 2) for name, rows in features.items()},
    }
