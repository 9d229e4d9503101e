"""Who may write to a run directory: one run at a time, and no new run where an earlier one has left its files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch.distributed as dist

from ..distributed import rank, world_size
from .files import remove, remove_temporaries, write_atomically
from .options import RunOptions

_LOCK = ".lock"
_UNREADABLE = "unreadable.txt"
# Any of these marks a directory as used; the last also matches the files of the official trainer.
_MARKS = ("metrics.jsonl", "config.json", "checkpoint*.pth*")
_WRITTEN = (
    *("config.json", "environment.json", "loggers.json", "metrics.jsonl", "metrics.csv", "checkpoint*.pth"),
    "checkpoint_*[0-9]",  # folders
    *("nonfinite.pth", _UNREADABLE, "summary.json", "report.html"),
)
_EVALUATIONS = ("knn", "linear", "finetune", "scratch", "detect", "detect-scratch", "segment", "segment-scratch")


@contextlib.contextmanager
def claim(options: RunOptions) -> Iterator[None]:
    """Reserve ``options.output`` for this pre-training run until the block ends; the directory is created if needed.

    In a process group every rank must call it. Temporary files of a killed run are removed.

    Raises:
        ValueError: on all ranks, if the directory is used and ``options`` neither resume that run nor overwrite it,
            or if another run is in progress there.
    """
    with exclusive(options.output, lambda: _prepare(options)):
        yield


@contextlib.contextmanager
def exclusive(folder: Path, prepare: Callable[[], None]) -> Iterator[None]:
    """Hold a lock on ``folder``, which is created if needed, until the block ends.

    Rank 0 takes the lock and then calls ``prepare``. If either fails, all ranks raise its error.

    Raises:
        ValueError: another process holds the lock.
        OSError: the directory cannot be created.
    """
    with contextlib.ExitStack() as stack:
        failure: Exception | None = None
        if rank() == 0:
            try:
                stack.enter_context(_locked(folder))
                prepare()
            except (ValueError, OSError) as error:
                failure = error
        if world_size() > 1:
            outcome = [failure]
            dist.broadcast_object_list(outcome)
            failure = outcome[0]
        if failure is not None:
            raise failure
        yield


def clear(folder: Path) -> None:
    """Delete what a pre-training run and the evaluations of its encoder have written to ``folder``."""
    written = [*_WRITTEN, *(f"{name}{suffix}" for name in _EVALUATIONS for suffix in (".json", ".pth", "_best.pth"))]
    for path in _matching(folder, written):
        remove(path)
    for name in ("tensorboard", "wandb", *_EVALUATIONS):
        shutil.rmtree(folder / name, ignore_errors=True)


def list_unreadable(folder: Path, paths: Collection[str]) -> None:
    """Add paths to ``unreadable.txt``, one a line."""
    file = folder / _UNREADABLE
    known = set(file.read_bytes().split(b"\n")[:-1]) if file.is_file() else set()
    lines = known.union(os.fsencode(path).replace(b"\n", b"\\n") for path in paths)
    if lines != known:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda out: out.writelines(line + b"\n" for line in sorted(lines)))


def report_unreadable(options: RunOptions, paths: set[str]) -> None:
    """List the files that could not be read, and print their number."""
    if paths and rank() == 0:
        list_unreadable(options.output, paths)
        line = f"{len(paths):,} files could not be read: {options.output / _UNREADABLE}"
        options.console.print(line, highlight=False, soft_wrap=True)


def _prepare(options: RunOptions) -> None:
    folder, resume = options.output, options.resume
    source = (Path(resume).resolve(), Path(resume).parent.resolve()) if resume else ()
    resumes_here = resume == "auto" or folder.resolve() in source
    if options.overwrite and resumes_here:
        raise ValueError(f"overwrite: expected no --resume of the run that it deletes, got {resume} for {folder}")
    used = _matching(folder, _MARKS)
    if used and not (options.overwrite or resumes_here):
        raise ValueError(
            f"output: expected a directory without a run, got {folder} with {used[0].name}; --resume auto resumes that "
            "run, --overwrite deletes it, and another --output keeps both"
        )
    remove_temporaries(folder, *_WRITTEN)


def _matching(folder: Path, patterns: tuple[str, ...] | list[str]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A POSIX record lock: it ends with the process that holds it, however that ends.

    Unlike ``flock``'s, it is not shared with the loader's workers, which outlive a killed trainer by seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise ValueError(
                    f"output: expected no other run in progress in {folder}, got {file.read().strip()}"
                ) from None
            warnings.warn(f"output: {folder} cannot be locked, two runs there would mix ({error})", stacklevel=2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
