"""How good are frozen features? Weighted kNN and a linear classifier, on an encoder or on raw pixels."""

from .features import encoder_features, estimate_batchnorm_, pixel_features
from .knn import knn_predict, knn_top1, nearest
from .linear import linear_top1

__all__ = [
    "encoder_features",
    "estimate_batchnorm_",
    "knn_predict",
    "knn_top1",
    "linear_top1",
    "nearest",
    "pixel_features",
]
