"""The thin trainer: configuration, loop, checkpoints, logs, and whole runs with their evaluation."""

from .checkpoint import load_checkpoint, save_checkpoint
from .config import PretrainConfig, resolve_config
from .pretrain import Run, build_model, pretrain

__all__ = [
    "PretrainConfig",
    "Run",
    "build_model",
    "load_checkpoint",
    "pretrain",
    "resolve_config",
    "save_checkpoint",
]
