"""Checkpoints to resume training from, in the official layout ``{epoch, arch, state_dict, optimizer}``."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..distributed import rank, unite
from ..ops.checks import is_sharded
from ..runs.files import remove, write_atomically
from .files import DDP_PREFIX, read_saved, with_prefix, without_prefix

if TYPE_CHECKING:
    from .dcp import AsyncWriter

_SET = ("weight_decay", "momentum", "betas", "eps", "lr_scale")  # what a run's settings determine
_LIKE_PARAMETERS = ("momentum_buffer", "exp_avg", "exp_avg_sq")  # states of the parameters' shapes


def official_layout(
    *, epoch: int, arch: str, model: nn.Module, optimizer: torch.optim.Optimizer, **more: Any
) -> dict[str, Any]:
    """A checkpoint in the official layout: names in ``state_dict`` start with ``module.``, and the queue is float32,
    also of a model that keeps it in 16 bits. Tensors share memory with the model, and may be DTensors.

    Args:
        epoch: number of completed epochs, as in the official trainer.
        more: further entries that the trainer needs to resume, tensors and plain containers.
    """
    state = model.state_dict()
    if "queue" in state:
        state["queue"] = state["queue"].to(torch.promote_types(state["queue"].dtype, torch.float32))
    state = with_prefix(DDP_PREFIX, state)
    return {"epoch": epoch, "arch": arch, "state_dict": state, "optimizer": optimizer.state_dict(), **more}


def gathered(content: Any, *, everywhere: bool = False) -> Any:
    """The same containers with every DTensor in one piece: on the CPU on rank 0, and None on other ranks.

    If there are DTensors, every rank must call it.

    Args:
        everywhere: leave the pieces on their device, on all ranks.
    """
    if isinstance(content, dict):
        return {name: gathered(value, everywhere=everywhere) for name, value in content.items()}
    if isinstance(content, list):
        return [gathered(value, everywhere=everywhere) for value in content]
    if not (isinstance(content, Tensor) and is_sharded(content)):
        return content
    whole = content.full_tensor()  # type: ignore[attr-defined]
    return whole if everywhere else whole.cpu() if rank() == 0 else None


def local_shards(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of each DTensor, and other tensors as they are."""
    return {name: value.to_local() if is_sharded(value) else value for name, value in state.items()}  # type: ignore[attr-defined]


def save_checkpoint(path: str | Path, **content: Any) -> None:
    """Write a checkpoint atomically; the arguments are those of :func:`official_layout`."""
    checkpoint = official_layout(**content)
    write_atomically(path, lambda file: torch.save(checkpoint, file))


class Checkpoints:
    """The checkpoints of a run directory: ``checkpoint_STEP``, the last ``keep`` of them, of which ``checkpoint.pth``
    points to the newest. In a process group every rank must make and use it.

    At the end of a ``with`` block a checkpoint that is still being written is waited for.

    Args:
        folder: the run directory.
        keep: number of checkpoints to keep.
        format: ``"file"``: rank 0 gathers and writes a file, ``checkpoint_STEP.pth``. ``"dcp"``: each rank writes its
            shards to a folder, while training goes on; see :mod:`moco_ext.checkpoints.dcp`.
    """

    def __init__(self, folder: Path, keep: int, format: str = "file") -> None:
        self.folder, self.keep = folder, keep
        self._writer: AsyncWriter | None = None
        self._writing = 0  # the step whose checkpoint is being written
        if format == "dcp":
            from .dcp import AsyncWriter

            self._writer = AsyncWriter()

    def save(self, step: int, content: dict[str, Any]) -> None:
        """Write a checkpoint (see :func:`official_layout`) or, in the format ``"dcp"``, start to.

        An earlier checkpoint that is still being written is waited for; if it failed, that is a warning.

        Raises:
            OSError: the file cannot be written.
        """
        path = self.folder / f"checkpoint_{step:08d}"
        if self._writer is not None:
            try:
                self.finish()
            except OSError as error:
                if rank() == 0:
                    warnings.warn(
                        f"checkpoint of step {self._writing} not written, training continues: {error}", stacklevel=3
                    )
            self._writing = step
            self._writer.start(path, content, lambda: rotate(path, self.keep))
            return
        content, path = gathered(content), path.with_suffix(".pth")
        if rank() > 0:
            return
        try:
            write_atomically(path, lambda file: torch.save(content, file))
        except RuntimeError as error:
            raise OSError(str(error)) from error
        rotate(path, self.keep)

    def finish(self, progress: Callable[[], object] = lambda: None) -> None:
        """Wait until the last checkpoint is complete; ``progress`` is called every second.

        Raises:
            OSError: it could not be written.
        """
        if self._writer is not None:
            self._writer.finish(progress)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(Exception) if kind is not None else contextlib.nullcontext():
            self.finish()


def rotate(path: Path, keep: int) -> None:
    """Point ``checkpoint.pth`` to a checkpoint that has been written to the same folder, and delete old ones.

    The ``keep`` - 1 checkpoints before it remain, the rest is deleted. That includes checkpoints of later steps: the
    run was resumed from before them, and computes these steps again.
    """
    pointer = path.with_name(f".checkpoint.pth.{os.getpid()}.tmp")
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(path.name)
    os.replace(pointer, path.with_name("checkpoint.pth"))
    found = _numbered(path.parent)
    step = dict((other, number) for number, other in found)[path]
    earlier = [other for number, other in found if number < step]
    for _, other in found:
        if other != path and other not in earlier[: max(0, keep - 1)]:
            remove(other)


def load_newest(folder: Path, shards: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Any], Path] | None:
    """The newest intact checkpoint of a run directory, and its path; None if the directory has no checkpoint.

    A checkpoint that :func:`load_checkpoint` refuses, on any rank, causes a warning, and the previous one is tried. In
    a process group every rank must call it. For ``shards`` see :func:`load_checkpoint`.

    Raises:
        ValueError: there are checkpoints, but none of them is intact.
    """
    unnumbered = folder / "checkpoint.pth"
    candidates = [path for _, path in _numbered(folder)] or ([unnumbered] if unnumbered.exists() else [])
    for path in candidates:
        failures: set[str] = set()
        try:
            checkpoint = load_checkpoint(path, shards)
        except Exception as error:  # damage can take any form
            failures = {str(error)}
        if not unite(failures):
            return checkpoint, path
        warnings.warn(f"{min(failures)}; trying the checkpoint before it", stacklevel=2)
    if candidates:
        raise ValueError(
            f"resume: expected a checkpoint that can be resumed in {folder}, got none of {len(candidates)}; "
            "--overwrite starts a new run"
        )
    return None


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Steps and paths of the checkpoints, files and folders, the newest first."""
    found = {path: re.fullmatch(r"checkpoint_(\d+)(\.pth)?", path.name) for path in folder.glob("checkpoint_*")}
    return sorted(((int(match[1]), path) for path, match in found.items() if match), reverse=True)


def has_checkpoint(folder: Path) -> bool:
    """Whether :func:`load_newest` finds a checkpoint in a run directory, intact or not."""
    return bool(_numbered(folder)) or (folder / "checkpoint.pth").exists()


def sharded_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The DTensors of a model, and parameters in the place of their optimizer states, for :func:`load_checkpoint`."""
    named = {f"state_dict.{DDP_PREFIX}{name}": value for name, value in model.state_dict().items()}
    named |= {f"optimizer.state.{i}": parameter for i, parameter in enumerate(_parameters(optimizer))}
    return {name: value for name, value in named.items() if is_sharded(value)}


def load_checkpoint(path: str | Path, shards: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Read a checkpoint, a file or a folder, to the CPU, and remove DDP's ``module.`` from its names.

    Args:
        shards: :func:`sharded_tensors`, of which each rank reads only its shards if the checkpoint is a folder.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: damaged, not in the official layout, or its weights have diverged.
    """
    checkpoint = read_saved(path, shards=shards)
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

    Of tensors that the model keeps as DTensors, each rank takes its shards, whatever wrote the checkpoint.

    Raises:
        ValueError: the checkpoint is of another architecture or configuration.
    """
    if checkpoint["arch"] != arch:
        raise ValueError(f"resume: expected a checkpoint of {arch}, got one of {checkpoint['arch']}: {path}")
    try:
        own = model.state_dict()
        model.load_state_dict({name: _like(own.get(name), value) for name, value in checkpoint["state_dict"].items()})
        if optimizer is not None:
            _load_optimizer(optimizer, checkpoint["optimizer"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"resume: {path} is of another configuration: {reason}") from None


def check_classes(checkpoint: Mapping[str, Any], classes: Sequence[str], path: str | Path) -> None:
    """Raise a ValueError unless ``classes``, in their order, are those that a checkpoint of ``path`` records."""
    found = checkpoint["classes"]
    if found != list(classes):
        own, other = next(pair for pair in itertools.zip_longest(classes, found, fillvalue="none") if len({*pair}) > 1)
        raise ValueError(
            f"resume: expected a checkpoint of the {len(classes)} classes of the data, got one of {len(found)}, with "
            f"{other} instead of {own}: {path}"
        )


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load an optimizer's state; the hyperparameters of this run win over the saved ones."""
    own = [{name: group[name] for name in _SET if name in group} for group in optimizer.param_groups]
    for name in ("momentum", "betas"):
        if any((name in own[0]) != (name in group) for group in saved["param_groups"]):
            kind, with_ = type(optimizer).__name__, "with" if name in own[0] else "without"
            raise ValueError(f"optimizer: expected the state of {kind}, {with_} {name}, got another optimizer's")
    parameters = _parameters(optimizer)
    slots = {
        index: {name: _like(parameters[index], value) for name, value in slot.items()}
        for index, slot in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": slots})
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)
    for parameter, state in optimizer.state.items():
        for name in _LIKE_PARAMETERS:
            value = state.get(name)
            if isinstance(value, Tensor) and value.shape != parameter.shape:
                raise ValueError(
                    f"optimizer: expected {name} of shape {list(parameter.shape)}, got {list(value.shape)}"
                )


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _like(own: Tensor | None, value: Any) -> Any:
    """This rank's shard of a tensor [...], if ``own`` is a DTensor of its shape; else the value as it is."""
    if own is None or not is_sharded(own) or not isinstance(value, Tensor) or value.shape != own.shape:
        return value
    if is_sharded(value):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(own, DTensor)
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def check_finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise an error if training has diverged, before a checkpoint is written from which no run could recover.

    In a process group every rank must call it: each checks its shards of DTensors.

    Raises:
        FloatingPointError: a tensor of the model or of the optimizer has NaN, infinity, or a norm that overflows.
    """
    found = _find_diverged(model.state_dict(), optimizer.state_dict())
    diverged = unite(set() if found is None else {found})
    if diverged:
        raise FloatingPointError(
            f"model: expected finite weights, got NaN, infinity or an overflow in {min(diverged)}; no checkpoint is "
            "written, a lower learning rate may help"
        )


def _find_diverged(state: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> str | None:
    """Name of the first tensor whose norm is not finite in float32."""
    tensors: dict[str, Any] = dict(state)
    for index, of_parameter in optimizer["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in of_parameter.items()}
    for name, value in local_shards(tensors).items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.float().norm().isfinite()):
            return name
    return None


def _expect(condition: bool, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"checkpoint: expected {expected}, got {str(got)[:100]}")
