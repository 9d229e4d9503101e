"""Drop-in replacement for the package ``moco`` of the official implementation."""

from . import builder, loader

__all__ = ["builder", "loader"]
