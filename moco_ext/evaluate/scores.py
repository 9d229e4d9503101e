"""Scores of several representations of one data set: raw pixels and encoders, by kNN and a linear classifier."""

from __future__ import annotations

from torch import Tensor, nn

from ..data import ImageData
from ..runs.options import RunOptions
from .features import encoder_features, pixel_features
from .knn import knn_top1
from .linear import linear_top1

Features = dict[str, tuple[Tensor, Tensor]]  # representation -> rows of the train and of the test split


def all_features(data: ImageData, options: RunOptions, **encoders: nn.Module) -> Features:
    """Features of both splits: pixels first, then each encoder by its name."""
    train, test = data.splits
    features = {
        "pixels": (
            pixel_features(data, train, workers=options.workers),
            pixel_features(data, test, workers=options.workers),
        )
    }
    for name, encoder in encoders.items():
        encoder.to(options.device)
        rows = [
            encoder_features(encoder, data, split, device=options.device, workers=options.workers)
            for split in (train, test)
        ]
        features[name] = (rows[0], rows[1])
    return features


def top1(data: ImageData, features: Features, knn_k: int) -> dict[str, dict[str, float]]:
    """kNN and linear top-1 in percent of every representation."""
    scores: dict[str, dict[str, float]] = {"knn_top1": {}, "linear_top1": {}}
    train_labels, test_labels = (split.labels for split in data.splits)
    for name, (train, test) in features.items():
        task = (train, train_labels, test, test_labels)
        scores["knn_top1"][name] = round(knn_top1(*task, k=knn_k), 2)
        scores["linear_top1"][name] = round(linear_top1(*task), 2)
    return scores
