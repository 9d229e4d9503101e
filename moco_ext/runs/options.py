"""Where and how a run executes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from rich.console import Console


@dataclasses.dataclass
class RunOptions:
    """Where a run executes and which files it writes; nothing here changes what the model learns.

    Attributes:
        output: run directory.
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
    resume: Path | str | None = None
    start_epoch: int = 0
    workers: int = 0
    local_world: int = 1
    print_freq: int = 10
    save_every: int = 0
    keep: int = 2
    overwrite: bool = False
    console: Console = dataclasses.field(default_factory=Console)
