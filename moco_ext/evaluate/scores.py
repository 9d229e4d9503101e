"""Features and scores of raw pixels and encoders on labeled data: what every command that evaluates calls."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..data import ImageData, Split
from ..data.datasets import labeled_subset
from ..distributed import rank, world_size
from ..runs.console import ImageProgress
from ..runs.options import RunOptions
from .features import check_finite, encoder_features, estimate_batchnorm_, is_missing, pixel_features
from .knn import knn_top1
from .linear import linear_top1

Rows = tuple[Tensor, Tensor]  # [N, D] of the training split and [M, D] of the test split
Features = dict[str, Rows]  # by representation
LABELS = {"pixels": "raw pixels", "untrained": "untrained encoder", "trained": "trained encoder"}
_FEW, _SUBSETS = 10, 5  # labels per class, and how many such subsets are averaged


def split_features(
    data: ImageData,
    options: RunOptions,
    encoder: nn.Module | None,
    name: str = "encoder",
    *,
    precision: str = "fp32",
) -> Rows:
    """Features of both splits: of an encoder, or the raw pixels if it is None. Without a test split, those of the
    training split take its place.

    In a process group every rank must call it and gets all rows. Those of unreadable images are NaN.

    Args:
        name: what error messages call the representation.
        precision: of the encoder, as for :func:`encoder_features`.

    Raises:
        FloatingPointError: features are not finite, as training has diverged.
    """

    console, label = options.console if rank() == 0 else None, LABELS.get(name, name)

    def features(split: Split) -> Tensor:
        with ImageProgress(console, -(-len(split) // world_size()), f"{label}: ", bar=False) as progress:
            loading: dict[str, Any] = {"workers": options.workers, "advance": progress.advance}
            if encoder is None:
                return pixel_features(data, split, **loading)
            device = options.device
            return encoder_features(encoder.to(device), data, split, device=device, precision=precision, **loading)

    train = features(data.train)
    test = train if data.test is None else features(data.test)
    for part, rows in (("training", train), ("test", test)):
        found, _ = _readable(rows, rows)
        check_finite(f"features of {label} ({part} images)", found, FloatingPointError)
    return train, test


def representations(
    data: ImageData,
    options: RunOptions,
    *,
    untrained: nn.Module | None = None,
    precision: str = "fp32",
    **encoders: nn.Module,
) -> Iterator[tuple[str, Rows]]:
    """Names and :func:`split_features` of the pixels and each encoder, one at a time to save memory.

    Args:
        untrained: encoder at its random start. Its BatchNorm statistics fit no data, so they are first set to those of
            the training images, in place.
        precision: of the encoders, as for :func:`encoder_features`.
    """
    yield "pixels", split_features(data, options, None, "pixels")
    if untrained is not None:
        untrained.to(options.device)
        device, workers = options.device, options.workers
        estimate_batchnorm_(untrained, data, data.train, device=device, workers=workers, precision=precision)
        encoders = {"untrained": untrained} | encoders
    for name, encoder in encoders.items():
        yield name, split_features(data, options, encoder, name, precision=precision)


def all_features(data: ImageData, options: RunOptions, **arguments: Any) -> Features:
    """All :func:`representations`, with the same arguments, at once."""
    return dict(representations(data, options, **arguments))


def knn_score(
    data: ImageData, rows: Rows, *, labels_per_class: int | None = None, seed: int = 0, **voting: Any
) -> float:
    """:func:`knn_top1`, with its options, of a representation of ``data``.

    Args:
        labels_per_class: labeled training images of each class, drawn by ``seed``; None: all.
    """
    train, labels, *test = _labeled(data, rows)
    chosen = _subset(labels, labels_per_class, seed)
    return knn_top1(train[chosen], labels[chosen], *test, **voting)


def linear_score(
    data: ImageData, rows: Rows, *, C: float = 1.0, labels_per_class: int | None = None, seed: int = 0
) -> float:
    """:func:`linear_top1` of a representation of ``data``; the other arguments are those of :func:`knn_score`."""
    task = _labeled(data, rows)
    return linear_top1(*task, C=C, labeled=_subset(task[1], labels_per_class, seed))


def _subset(labels: Tensor, per_class: int | None, seed: int) -> Tensor | slice:
    return slice(None) if per_class is None else labeled_subset(labels, per_class=per_class, seed=seed)


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


def few_label_top1(data: ImageData, features: Features) -> dict[str, Any]:
    """Linear accuracy with 10 labels per class: mean and standard deviation over 5 subsets by representation.

    Empty if a class has no more than 10 readable images.
    """
    scores = {}
    for name, rows in features.items():
        if int(_labeled(data, rows)[1].unique(return_counts=True)[1].min()) <= _FEW:
            return {}
        scores[name] = [linear_score(data, rows, labels_per_class=_FEW, seed=seed) for seed in range(_SUBSETS)]
    return {
        "labels_per_class": _FEW,
        "subsets": _SUBSETS,
        "linear_top1": {name: round(statistics.fmean(each), 2) for name, each in scores.items()},
        "linear_std": {name: round(statistics.stdev(each), 2) for name, each in scores.items()},
    }


def few_label_cells(summary: dict[str, Any]) -> dict[str, dict[str, str]]:
    """:func:`few_label_top1` of a run's summary as a table shows it: by column, then by representation."""
    few = summary.get("few_labels")
    if not few:
        return {}
    cells = {name: f"{mean:.1f} ± {few['linear_std'][name]:.1f}" for name, mean in few["linear_top1"].items()}
    return {f"linear, {few['labels_per_class']} labels per class": cells}
