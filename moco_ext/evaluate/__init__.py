"""Evaluation of frozen features, of an encoder or of raw pixels: weighted kNN and a linear classifier."""

from .features import encoder_features, estimate_batchnorm_, is_missing, pixel_features
from .knn import knn_predict, knn_top1, nearest
from .label_free import label_free_scores
from .linear import linear_top1

__all__ = [
    "encoder_features",
    "estimate_batchnorm_",
    "is_missing",
    "knn_predict",
    "knn_top1",
    "label_free_scores",
    "linear_top1",
    "nearest",
    "pixel_features",
]
