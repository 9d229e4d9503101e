"""Worker processes of data loaders."""

from __future__ import annotations

import os
import signal
import threading


def leave_signals_to_parent(worker: int) -> None:
    """A ``worker_init_fn``: a signal for the whole process group does not end a worker before its parent has saved.

    ``timeout``, Slurm, containers and Ctrl-C signal every process of a group. The parent finishes its step and then
    ends its workers, if need be by a SIGTERM, the only one that they obey.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
