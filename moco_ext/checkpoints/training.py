"""Checkpoints in the official layout ``{epoch, arch, state_dict, optimizer}``, written whole or not at all."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..runs.files import write_atomically
from .files import read_saved


def save_checkpoint(
    path: str | Path,
    *,
    epoch: int,
    arch: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    **more: Any,
) -> None:
    """Write a checkpoint atomically, in the official layout: names in ``state_dict`` start with ``module.``.

    Args:
        epoch: finished epochs, as the official trainer counts.
        more: further entries, tensors and plain containers: what a trainer needs to go on where it stopped.
    """
    checkpoint = {
        "epoch": epoch,
        "arch": arch,
        "state_dict": {f"module.{name}": value for name, value in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        **more,
    }
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def save_rotating(folder: Path, step: int, keep: int, **content: Any) -> None:
    """:func:`save_checkpoint` as ``checkpoint_STEP.pth``; ``checkpoint.pth`` points to it; the last ``keep`` stay."""
    name = f"checkpoint_{step:08d}.pth"
    save_checkpoint(folder / name, **content)
    pointer = folder / f".checkpoint.{os.getpid()}.tmp"
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(name)
    os.replace(pointer, folder / "checkpoint.pth")
    for old in _numbered(folder)[keep:]:
        old.unlink(missing_ok=True)


def load_newest(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """The newest checkpoint of a run directory that can be read, and its path; None if it has none.

    A file that cannot be read is warned of, and the one before it taken.

    Raises:
        ValueError: there are checkpoints, and none can be read.
    """
    unnumbered = folder / "checkpoint.pth"
    candidates = _numbered(folder) or ([unnumbered] if unnumbered.exists() else [])
    for path in candidates:
        try:
            return load_checkpoint(path), path
        except ValueError as error:
            warnings.warn(str(error), stacklevel=2)
    if candidates:
        raise ValueError(f"resume: expected a checkpoint that can be read in {folder}, got none of {len(candidates)}")
    return None


def _numbered(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob("checkpoint_[0-9]*.pth"), reverse=True)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's dictionary, on the CPU, the ``module.`` of DistributedDataParallel taken off its names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, not a checkpoint, or one without the keys of the official layout.
    """
    checkpoint = read_saved(path)
    if not isinstance(checkpoint, dict) or not {"arch", "state_dict"} <= checkpoint.keys():
        found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"checkpoint: expected epoch, arch, state_dict and optimizer in {path}, got {found}")
    names = checkpoint["state_dict"]
    checkpoint["state_dict"] = {name.removeprefix("module."): value for name, value in names.items()}
    return checkpoint
