"""Checkpoints to resume training from, in the official layout ``{epoch, arch, state_dict, optimizer}``."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..runs.files import write_atomically
from .files import DDP_PREFIX, read_saved, with_prefix, without_prefix

_SET = ("weight_decay", "momentum", "betas", "eps", "lr_scale")  # what a run's settings determine
_LIKE_PARAMETERS = ("momentum_buffer", "exp_avg", "exp_avg_sq")  # states of the parameters' shapes


def save_checkpoint(
    path: str | Path,
    *,
    epoch: int,
    arch: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    **more: Any,
) -> None:
    """Write a checkpoint atomically, in the official layout: names in ``state_dict`` start with ``module.``, and the
    queue is float32, also of a model that keeps it in 16 bits.

    Args:
        epoch: number of completed epochs, as in the official trainer.
        more: further entries that the trainer needs to resume, tensors and plain containers.
    """
    state = model.state_dict()
    if "queue" in state:
        state["queue"] = state["queue"].to(torch.promote_types(state["queue"].dtype, torch.float32))
    checkpoint = {
        "epoch": epoch,
        "arch": arch,
        "state_dict": with_prefix(DDP_PREFIX, state),
        "optimizer": optimizer.state_dict(),
        **more,
    }
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def save_rotating(folder: Path, step: int, keep: int, **content: Any) -> None:
    """Write ``checkpoint_STEP.pth`` with :func:`save_checkpoint`, and point ``checkpoint.pth`` to it.

    The ``keep`` - 1 checkpoints before it remain, the rest is deleted. That includes checkpoints of later steps: the
    run was resumed from before them, and computes these steps again.
    """
    path = folder / f"checkpoint_{step:08d}.pth"
    save_checkpoint(path, **content)
    pointer = folder / f".checkpoint.pth.{os.getpid()}.tmp"
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(path.name)
    os.replace(pointer, folder / "checkpoint.pth")
    others = _numbered(folder)
    others.pop(step)
    earlier = [number for number in others if number < step]
    for number in others.keys() - set(earlier[: max(0, keep - 1)]):
        others[number].unlink(missing_ok=True)


def load_newest(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """The newest intact checkpoint of a run directory, and its path; None if the directory has no checkpoint.

    A checkpoint that :func:`load_checkpoint` refuses causes a warning, and the previous one is tried.

    Raises:
        ValueError: there are checkpoints, but none of them is intact.
    """
    unnumbered = folder / "checkpoint.pth"
    candidates = list(_numbered(folder).values()) or ([unnumbered] if unnumbered.exists() else [])
    for path in candidates:
        try:
            return load_checkpoint(path), path
        except Exception as error:  # damage can take any form
            warnings.warn(f"{error}; trying the checkpoint before it", stacklevel=2)
    if candidates:
        raise ValueError(
            f"resume: expected a checkpoint that can be resumed in {folder}, got none of {len(candidates)}; "
            "--overwrite starts a new run"
        )
    return None


def _numbered(folder: Path) -> dict[int, Path]:
    """Checkpoints by step, the newest first."""
    found = {path: re.fullmatch(r"checkpoint_(\d+)\.pth", path.name) for path in folder.glob("checkpoint_*.pth")}
    return dict(sorted(((int(match[1]), path) for path, match in found.items() if match), reverse=True))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU, and remove DistributedDataParallel's ``module.`` from its names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, not in the official layout, or its weights have diverged.
    """
    checkpoint = read_saved(path)
    if not isinstance(checkpoint, dict) or not {"epoch", "arch", "state_dict", "optimizer"} <= checkpoint.keys():
        found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"checkpoint: expected epoch, arch, state_dict and optimizer in {path}, got {found}")
    epoch, arch, state, optimizer = (checkpoint[name] for name in ("epoch", "arch", "state_dict", "optimizer"))
    _expect(isinstance(epoch, int) and epoch >= 0, f"a number of epochs as epoch in {path}", epoch)
    _expect(isinstance(arch, str), f"a name as arch in {path}", arch)
    _expect(isinstance(state, dict), f"a dictionary as state_dict in {path}", state)
    for name, value in state.items():
        named = isinstance(name, str) and isinstance(value, Tensor)
        _expect(named, f"tensors by name in state_dict of {path}", {name: type(value).__name__})
    slots = optimizer.get("state") if isinstance(optimizer, dict) else None
    plain = isinstance(slots, dict) and all(isinstance(slot, dict) for slot in slots.values())
    _expect(plain and isinstance(optimizer.get("param_groups"), list), f"an optimizer's state in {path}", optimizer)
    state = checkpoint["state_dict"] = without_prefix(DDP_PREFIX, state)
    for name, limit in (("queue_ptr", 0), ("queue_valid", 1)):
        if name in state and "queue" in state:
            found, largest = state[name].flatten().tolist(), [0, *state["queue"].shape][-1] - 1 + limit
            _expect(len(found) == 1 and 0 <= found[0] <= largest, f"{name} from 0 to {largest} in {path}", found)
    diverged = _find_diverged(state, optimizer)
    _expect(diverged is None, f"finite weights in {path}", f"NaN, infinity or an overflow in {diverged}")
    return checkpoint


def load_into(
    model: nn.Module,
    checkpoint: Mapping[str, Any],
    path: Path,
    *,
    arch: str,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Load a checkpoint that :func:`load_checkpoint` has read from ``path`` into a model and its optimizer.

    Raises:
        ValueError: the checkpoint is of another architecture or configuration.
    """
    if checkpoint["arch"] != arch:
        raise ValueError(f"resume: expected a checkpoint of {arch}, got one of {checkpoint['arch']}: {path}")
    try:
        model.load_state_dict(checkpoint["state_dict"])
        if optimizer is not None:
            _load_optimizer(optimizer, checkpoint["optimizer"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"resume: {path} is of another configuration: {reason}") from None


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load an optimizer's state; the hyperparameters of this run win over the saved ones."""
    own = [{name: group[name] for name in _SET if name in group} for group in optimizer.param_groups]
    for name in ("momentum", "betas"):
        if any((name in own[0]) != (name in group) for group in saved["param_groups"]):
            kind, with_ = type(optimizer).__name__, "with" if name in own[0] else "without"
            raise ValueError(f"optimizer: expected the state of {kind}, {with_} {name}, got another optimizer's")
    optimizer.load_state_dict(saved)
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)
    for parameter, state in optimizer.state.items():
        for name in _LIKE_PARAMETERS:
            value = state.get(name)
            if isinstance(value, Tensor) and value.shape != parameter.shape:
                raise ValueError(
                    f"optimizer: expected {name} of shape {list(parameter.shape)}, got {list(value.shape)}"
                )


def check_finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise an error if training has diverged, before a checkpoint is written from which no run could recover.

    Raises:
        FloatingPointError: a tensor of the model or of the optimizer has NaN, infinity, or a norm that overflows.
    """
    diverged = _find_diverged(model.state_dict(), optimizer.state_dict())
    if diverged is not None:
        raise FloatingPointError(
            f"model: expected finite weights, got NaN, infinity or an overflow in {diverged}; no checkpoint is "
            "written, a lower learning rate may help"
        )


def _find_diverged(state: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> str | None:
    """Name of the first tensor whose norm is not finite in float32."""
    tensors: dict[str, Any] = dict(state)
    for index, of_parameter in optimizer["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in of_parameter.items()}
    for name, value in tensors.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.float().norm().isfinite()):
            return name
    return None


def _expect(condition: bool, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"checkpoint: expected {expected}, got {str(got)[:100]}")
