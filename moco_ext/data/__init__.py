"""Data sets, the augmentations and the batches made of both."""

from .augment import Augmentation, TwoCropsTransform, augment_batch
from .datasets import BUILT_IN, FolderSplit, ImageData, Split, TensorSplit, load, normalize, plain_batches
from .loader import Batch, LabelledLoader, TrainLoader

__all__ = [
    "BUILT_IN",
    "Augmentation",
    "Batch",
    "FolderSplit",
    "ImageData",
    "LabelledLoader",
    "Split",
    "TensorSplit",
    "TrainLoader",
    "TwoCropsTransform",
    "augment_batch",
    "load",
    "normalize",
    "plain_batches",
]
