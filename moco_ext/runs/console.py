"""The console of a run: a terminal, a log file or a pipe."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console


def make_console(**options: Any) -> Console:
    """A console that does not wrap lines, unless it is a terminal or COLUMNS is set."""
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
