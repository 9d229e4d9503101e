"""How a command reports errors."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable

# Where the name is not that of the module.
_PACKAGES = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml", "faiss": "faiss-cpu"}
_OF_DETECTION = ("torchmetrics", "pycocotools")
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # in torch's RuntimeErrors


def guarded(command: Callable[[], int]) -> int:
    """Run a command; an error that its user can fix becomes one line and exit status 1.

    With MOCO_EXT_DEBUG=1 the error is raised instead.
    """
    warnings.showwarning = lambda message, *rest, **more: print(f"moco-ext: warning: {message}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be no text
    try:
        return command()
    except KeyboardInterrupt:
        print("moco-ext: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message = _explained(error)
        if message is None or os.environ.get("MOCO_EXT_DEBUG"):
            raise
        print(f"moco-ext: error: {message}", file=sys.stderr)
        return 1


def _explained(error: Exception) -> str | None:
    """The message of an error that the user can fix; None for any other, which is a bug."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        module = error.name.split(".")[0]
        package = _PACKAGES.get(module, module)
        work, extra = ("detection", "detection") if module in _OF_DETECTION else ("training", "train")
        return (
            f"this needs {module}, which is not installed: pip install {package} "
            f"(all that {work} needs, from a checkout: pip install '.[{extra}]')"
        )
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in _OUT_OF_MEMORY):
        return f"out of memory: {first}; see --dry-run, and take a smaller --batch-size, --moco-k or --moco-dim"
    return str(error) if isinstance(error, (ValueError, OSError, FloatingPointError, ImportError)) else None
