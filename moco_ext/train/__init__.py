"""The trainer: configuration, model, optimizer step, loop and diagnostics."""

from .config import PretrainConfig
from .model import build_model
from .recipes import resolve_config
from .trainer import pretrain

__all__ = [
    "PretrainConfig",
    "build_model",
    "pretrain",
    "resolve_config",
]
