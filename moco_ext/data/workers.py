"""Worker processes of data loaders."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

# Not on macOS and Windows. There, a SIGTERM for the whole process group ends the workers too.
_KNOWS_SENDER = hasattr(signal, "sigwaitinfo")


@contextlib.contextmanager
def sigterm_held() -> Iterator[None]:
    """Start workers in this block: until :func:`leave_signals_to_parent` runs in them, SIGTERM would end them."""
    if not _KNOWS_SENDER:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(worker: int) -> None:
    """A ``worker_init_fn``: a signal for the whole process group does not end a worker before its parent has saved.

    ``timeout``, Slurm, containers and Ctrl-C signal every process of a group. The parent finishes its step and then
    ends its workers, if need be by a SIGTERM, the only one that they obey.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not _KNOWS_SENDER:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
