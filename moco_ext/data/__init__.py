"""Datasets, augmentations and data loaders."""

from .augment import Augmentation, TwoCropsTransform, augment_batch
from .datasets import (
    BUILT_IN,
    FileSplit,
    FolderSplit,
    ImageData,
    Normalize,
    Split,
    TensorSplit,
    eval_batches,
    load,
    seen_from_here,
)
from .images import UnreadableImageError
from .loader import Batch, SupervisedLoader, TrainLoader
from .shard_writer import WrittenShards, write_shards
from .shards import ShardSplit
from .transform import EvalTransform

__all__ = [
    "BUILT_IN",
    "Augmentation",
    "Batch",
    "EvalTransform",
    "FileSplit",
    "FolderSplit",
    "ImageData",
    "Normalize",
    "ShardSplit",
    "Split",
    "SupervisedLoader",
    "TensorSplit",
    "TrainLoader",
    "TwoCropsTransform",
    "UnreadableImageError",
    "WrittenShards",
    "augment_batch",
    "eval_batches",
    "load",
    "seen_from_here",
    "write_shards",
]
