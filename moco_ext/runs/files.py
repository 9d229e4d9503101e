"""Atomic file writes, and JSON."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Call ``write(file)`` on a temporary file next to ``path``, flush it to disk, and rename it to ``path``.

    ``path`` holds either its previous content or all of the new content, whatever happens. If the process is killed,
    the temporary file ``.NAME.PID.tmp`` remains; see :func:`remove_temporaries`.

    Raises:
        OSError: the file cannot be written; the message says why and names ``path``.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # otherwise a power failure may leave the new name without its content
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # After a failed write, torch.save fails once more while it closes the archive, and hides the first error.
        failure = error if isinstance(error, OSError) else error.__context__
        if isinstance(failure, OSError) and failure.errno is not None:
            raise OSError(failure.errno, failure.strerror, str(path)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path, *names: str) -> None:
    """Remove what :func:`write_atomically` left in ``folder`` when a process was killed, and folders named like that.

    Args:
        names: glob patterns of the files that were being written. No other process may be writing them.
    """
    for name in names:
        for path in folder.glob(f".{name}.[0-9]*.tmp"):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write ``content`` as indented JSON, atomically."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file.

    Raises:
        ValueError: the file holds something else.
    """
    if not Path(path).is_file():
        return {}
    try:
        content = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"expected a JSON object in {path}, got {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object in {path}, got {type(content).__name__}")
    return content
