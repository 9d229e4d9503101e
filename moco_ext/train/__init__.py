"""The thin trainer: configuration, loop, checkpoints, logs, and whole runs with their evaluation."""

from .config import PretrainConfig, resolve_config
from .model import build_model
from .trainer import pretrain

__all__ = [
    "PretrainConfig",
    "build_model",
    "pretrain",
    "resolve_config",
]
