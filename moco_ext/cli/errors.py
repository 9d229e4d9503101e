"""How a command reports errors."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable

_TRAIN_EXTRA = {"torchvision", "rich", "tensorboard", "matplotlib", "sklearn", "safetensors", "torchdata", "PIL"}


def guarded(command: Callable[[], int]) -> int:
    """Errors that a user can mend become one line (all of it with MOCO_EXT_DEBUG=1) and exit status 1."""
    warnings.showwarning = lambda message, *rest, **more: print(f"moco-ext: warning: {message}", file=sys.stderr)
    try:
        return command()
    except KeyboardInterrupt:
        print("moco-ext: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if os.environ.get("MOCO_EXT_DEBUG"):
            raise
        message = str(error)
        if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in _TRAIN_EXTRA:
            message = f'{error.name} is needed here and not installed: pip install "moco-ext[train]"'
        print(f"moco-ext: error: {message}", file=sys.stderr)
        return 1
