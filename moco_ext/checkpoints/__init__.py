"""Checkpoints of every package that trains or uses MoCo encoders, from any to any; nothing in them is executed."""

from .convert import Report, convert, read_checkpoint
from .formats import FORMATS

__all__ = ["FORMATS", "Report", "convert", "read_checkpoint"]
