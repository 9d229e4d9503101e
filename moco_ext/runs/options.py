"""Where and how a run executes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from rich.console import Console

from .settings import NOT_NEGATIVE, at_least, check_settings, setting

GROUP = "logging and checkpoints"


@dataclasses.dataclass
class RunOptions:
    """Where a run executes and which files it writes; nothing here changes what the model learns.

    Attributes:
        output: run directory.
        device: device of this process.
        resume: checkpoint file or run directory to resume from; ``"auto"``: the newest checkpoint in ``output``, or a
            new run if there is none.
        start_epoch: number of the first epoch when not resuming; sets its learning rate and its images.
        workers: data loading processes of this process.
        local_world: processes on this node, which share its batch.
        print_freq: steps between printed metrics.
        save_every: steps between checkpoints, in addition to one at the end of each epoch; 0: only those.
        keep: number of checkpoints to keep.
        overwrite: start a new run in a used directory; what the previous run wrote there, evaluations included, is
            deleted.
    """

    output: Path
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    resume: Path | str | None = setting(  # noqa: RUF009
        None,
        metavar="FILE|auto",
        help="checkpoint to resume from; auto: the newest one in the output directory, if any",
        group=GROUP,
    )
    start_epoch: int = setting(
        0, valid=NOT_NEGATIVE, help="number of the first epoch, without --resume", group="optimization"
    )
    workers: int = setting(
        0, flags=("-j", "--workers"), valid=NOT_NEGATIVE, shown="one per core", help="data loading processes per node"
    )
    local_world: int = 1
    print_freq: int = setting(
        10, flags=("-p", "--print-freq"), valid=at_least(1), help="steps between printed metrics", group=GROUP
    )
    save_every: int = setting(
        0, valid=NOT_NEGATIVE, help="steps between checkpoints, in addition to those of each record", group=GROUP
    )
    keep: int = setting(2, valid=at_least(1), help="checkpoints to keep", group=GROUP)
    overwrite: bool = setting(
        False, negatable=False, help="start a new run in an output directory that holds another one", group=GROUP
    )
    console: Console = dataclasses.field(default_factory=Console)

    def __post_init__(self) -> None:
        check_settings(self)
