"""The trainer: configuration, model, optimizer step, loop and diagnostics."""

from .config import PretrainConfig, resolve_config
from .model import build_model
from .trainer import pretrain

__all__ = [
    "PretrainConfig",
    "build_model",
    "pretrain",
    "resolve_config",
]
