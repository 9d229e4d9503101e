"""The console of a run: a terminal, a log file or a pipe."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY = 30.0  # seconds


def make_console(**options: Any) -> Console:
    """A console that prints text as it is, since paths may contain [tags] and :emoji:, and that does not wrap lines
    unless it is a terminal or COLUMNS is set."""
    options = {"markup": False, "emoji": False} | options
    console = Console(**options)
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(**options, width=10_000)


@contextlib.contextmanager
def phase(console: Console, name: str) -> Iterator[None]:
    """Show what the block does: in a terminal while it runs, elsewhere by a line."""
    if console.is_terminal:
        with console.status(name):
            yield
    else:
        console.print(f"{time.strftime('%H:%M:%S')}  {name}", highlight=False)
        yield


class ImageProgress(contextlib.AbstractContextManager["ImageProgress"]):
    """A bar in a terminal; elsewhere a line every half minute.

    Args:
        console: None shows nothing.
        total: number of images.
        what: start of the lines.
        bar: False: no bar, for blocks of :func:`phase`, which shows something else.
    """

    def __init__(self, console: Console | None, total: int, what: str = "", *, bar: bool = True) -> None:
        self._console, self._total, self._what, self._done = console, total, what, 0
        self._started = self._said = time.monotonic()
        columns = TextColumn("images"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn()
        terminal = console is not None and console.is_terminal
        self._lines = console is not None and not terminal
        self._bar = Progress(*columns, console=console, disable=not (terminal and bar), expand=True, transient=True)
        self._task = self._bar.add_task("images", total=total)

    def __enter__(self) -> ImageProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def advance(self, images: int) -> None:
        self._done += images
        self._bar.advance(self._task, images)
        now = time.monotonic()
        if self._lines and self._console is not None and now - self._said > _LINE_EVERY:
            self._said = now
            left = (self._total - self._done) * (now - self._started) / self._done
            line = f"{self._what}{self._done:,} of {self._total:,} images, {math.ceil(left / 60)} min left"
            self._console.print(line, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Rounded for reading: ``"45 s"``, ``"12 min"``, ``"3 h 05 min"``, ``"2 d 4 h"``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24} d {hours % 24} h"


def clock(moment: float) -> str:
    """The time of day of a moment in seconds since 1970; with the date if it is not today."""
    then, now = time.localtime(moment), time.localtime()
    return time.strftime("%H:%M" if then[:3] == now[:3] else "%b %d, %H:%M", then)
