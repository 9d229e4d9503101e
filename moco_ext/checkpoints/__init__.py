"""Read, write and convert checkpoints of every package that trains or uses MoCo encoders, without executing them."""

from .convert import Report, convert, read_checkpoint
from .formats import FORMATS

__all__ = ["FORMATS", "Report", "convert", "read_checkpoint"]
