"""Where and how a run executes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from rich.console import Console

from .console import make_console
from .loggers import LOGGERS, check_installed, logger_names
from .settings import NOT_NEGATIVE, Valid, at_least, check_settings, one_of, setting

GROUP = "logging and checkpoints"
_NAMES = Valid(
    f"none, or names separated by commas: {', '.join(LOGGERS)}",
    lambda text: all(name in LOGGERS for name in logger_names(text)),
)


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
        print_freq: steps between metrics in a terminal and in the loggers.
        log_seconds: seconds between progress lines, if the console is not a terminal; 0: only a line per record.
        logger: names of :data:`moco_ext.runs.loggers.LOGGERS`, separated by commas, or ``"none"``.
        save_every: steps between checkpoints, in addition to one at the end of each epoch; 0: only those.
        keep: number of checkpoints to keep.
        checkpoint_format: ``"file"``: rank 0 gathers and writes each checkpoint, in the official layout. ``"dcp"``:
            every rank writes its part to a folder (torch.distributed.checkpoint), while training continues.
        parallel: how several processes train: ``"ddp"``, each has all weights; ``"fsdp"``, each has a shard of them.
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
        0,
        flags=("-j", "--workers"),
        valid=NOT_NEGATIVE,
        shown="one per core, at most 32",
        help="data loading processes per node",
    )
    local_world: int = 1
    print_freq: int = setting(
        10, flags=("-p", "--print-freq"), valid=at_least(1), help="steps between logged metrics", group=GROUP
    )
    log_seconds: float = setting(
        30.0,
        valid=NOT_NEGATIVE,
        help="outside a terminal: seconds between progress lines; 0: only one line per record",
        group=GROUP,
    )
    logger: str = setting(
        "tensorboard",
        metavar="NAME,...",
        valid=_NAMES,
        help=f"where metrics go besides metrics.jsonl: {', '.join(LOGGERS)}, or none",
        group=GROUP,
    )
    save_every: int = setting(
        0, valid=NOT_NEGATIVE, help="steps between checkpoints, in addition to those of each record", group=GROUP
    )
    keep: int = setting(2, valid=at_least(1), help="checkpoints to keep", group=GROUP)
    checkpoint_format: str = setting(
        "file",
        valid=one_of("file", "dcp"),
        help="file: in the official layout; dcp: a folder that all processes write while training continues",
        group=GROUP,
    )
    parallel: str = setting(
        "ddp",
        valid=one_of("ddp", "fsdp"),
        help="each process has all weights (ddp), or a shard of weights and optimizer state (fsdp)",
        group="several processes",
    )
    overwrite: bool = setting(
        False, negatable=False, help="start a new run in an output directory that holds another one", group=GROUP
    )
    console: Console = dataclasses.field(default_factory=make_console)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.logger != "tensorboard":  # which is part of [train]
            check_installed(self.logger)
