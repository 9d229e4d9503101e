"""SIGTERM: finish the current step, save, stop. SIGINT: stop."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console

from .. import distributed


class Interrupts:
    """SIGINT raises KeyboardInterrupt as usual, and once more in :meth:`check`.

    Libraries clear exceptions that are raised while they look up an attribute, and the first one may be lost there.
    """

    def __init__(self) -> None:
        self._received = False
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Interrupts:
        in_main = threading.current_thread() is threading.main_thread()  # Python handles signals there only
        if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._undo.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, self._interrupt))
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()

    def check(self) -> None:
        """Raise KeyboardInterrupt if SIGINT has been received."""
        if self._received:
            raise KeyboardInterrupt

    def _interrupt(self, *_: Any) -> None:
        self._received = True
        raise KeyboardInterrupt


T = TypeVar("T")


class _Abandoned(BaseException):
    """SIGTERM has come during work that need not be finished."""


class Preemption:
    """Notes SIGTERM, so that the current step is finished and saved.

    In a process group the step may never finish, if a collective waits for a rank that is stopped. A process that makes
    no progress for :attr:`GRACE` seconds after SIGTERM therefore ends without saving, with status 143.

    For SIGINT, see :class:`Interrupts`.
    """

    name = "SIGTERM"
    GRACE = 15.0

    def __init__(self) -> None:
        self._received = False
        self._abandons = False
        self._steps = 0

    def __enter__(self) -> Preemption:
        self._undo = contextlib.ExitStack()
        self._interrupts = self._undo.enter_context(Interrupts())
        if threading.current_thread() is not threading.main_thread():
            return self
        before = signal.signal(signal.SIGTERM, self._note)
        self._undo.callback(signal.signal, signal.SIGTERM, before)
        if distributed.world_size() > 1:
            self._watch()
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()

    def agreed(self, ask: bool) -> bool:
        """Whether to stop after this step. Several ranks agree on it, at steps where all of them ``ask``."""
        self._interrupts.check()
        self._steps += 1
        if distributed.world_size() == 1:
            return self._received
        if not ask:
            return False
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return bool(distributed.all_reduce(torch.tensor(float(self._received), device=device)).item())

    def progress(self) -> None:
        """Tell that the process is not stuck, during work that changes no step."""
        self._steps += 1

    def stop(self, console: Console, step: int) -> NoReturn:
        """End the process with status 143, after the step has been saved."""
        if distributed.rank() == 0:
            console.print(
                f"stopped by {self.name} after step {step:,}; saved, --resume auto continues from there",
                highlight=False,
            )
        raise SystemExit(128 + signal.SIGTERM)

    def unless_stopped(self, work: Callable[[], T]) -> T | None:
        """``work()``, or None if SIGTERM came before its end: schedulers do not wait long.

        Several ranks finish it, as they wait for each other.
        """
        alone = distributed.world_size() == 1
        if alone and self._received:
            return None
        self._abandons = alone
        try:
            return work()
        except _Abandoned:
            return None
        finally:
            self._abandons = False

    def _note(self, *_: Any) -> None:
        self._received = True
        if self._abandons:
            self._abandons = False
            raise _Abandoned

    def _watch(self) -> None:
        """Start a thread that learns of signals through a pipe: while a collective waits, no Python handler runs."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._undo.callback(os.close, writer)
        self._undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer, warn_on_full_buffer=False))
        ended = threading.Event()
        self._undo.callback(ended.set)
        threading.Thread(target=self._end_if_stuck, args=(reader, ended), daemon=True).start()

    def _end_if_stuck(self, reader: int, ended: threading.Event) -> None:
        with open(reader, "rb", buffering=0) as pipe:
            while signal.SIGTERM not in (received := pipe.read(256)):
                if not received:  # closed: training has ended
                    return
        place, since = None, time.monotonic()
        while not ended.wait(0.2):
            frame = sys._current_frames()[threading.main_thread().ident or 0]
            here = (self._steps, id(frame), frame.f_lasti)
            if here != place:
                place, since = here, time.monotonic()
            elif time.monotonic() - since > self.GRACE:
                print(
                    f"moco-ext: error: rank {distributed.rank()} got {self.name} but cannot finish its step: for "
                    f"{self.GRACE:g} s it has waited for another rank, which may be stopped; nothing saved",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(128 + signal.SIGTERM)
