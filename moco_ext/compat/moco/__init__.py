"""The official implementation's package ``moco``: ``from moco_ext.compat import moco`` instead of importing its own."""

from . import builder, loader

__all__ = ["builder", "loader"]
