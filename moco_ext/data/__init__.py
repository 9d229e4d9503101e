"""Datasets, augmentations and data loaders."""

from .augment import Augmentation, TwoCropsTransform, augment_batch
from .datasets import BUILT_IN, FolderSplit, ImageData, Normalize, Split, TensorSplit, eval_batches, load
from .images import UnreadableImageError
from .loader import Batch, SupervisedLoader, TrainLoader
from .transform import EvalTransform

__all__ = [
    "BUILT_IN",
    "Augmentation",
    "Batch",
    "EvalTransform",
    "FolderSplit",
    "ImageData",
    "Normalize",
    "Split",
    "SupervisedLoader",
    "TensorSplit",
    "TrainLoader",
    "TwoCropsTransform",
    "UnreadableImageError",
    "augment_batch",
    "eval_batches",
    "load",
]
