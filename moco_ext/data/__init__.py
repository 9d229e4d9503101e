"""Data sets, the two-crop augmentations and the batches made of both."""

from .augment import Augmentation, TwoCropsTransform, augment_batch, image_transform
from .datasets import BUILT_IN, FolderSplit, ImageData, Split, TensorSplit, load, normalize, plain_batches
from .loader import two_crop_batches

__all__ = [
    "BUILT_IN",
    "Augmentation",
    "FolderSplit",
    "ImageData",
    "Split",
    "TensorSplit",
    "TwoCropsTransform",
    "augment_batch",
    "image_transform",
    "load",
    "normalize",
    "plain_batches",
    "two_crop_batches",
]
