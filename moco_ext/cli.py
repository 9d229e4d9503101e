"""``moco-ext COMMAND``: one module of ``commands`` each. What a command needs is imported when it runs."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from .commands import ablate, convert, finetune, info, knn, linear, pretrain, report

_TRAIN_EXTRA = {"torchvision", "rich", "tensorboard", "matplotlib", "sklearn", "safetensors", "torchdata", "PIL"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moco-ext", description="Momentum Contrast: train and evaluate encoders.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (pretrain, knn, linear, finetune, convert, ablate, report, info):
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    args = build_parser().parse_args(argv)
    return guarded(lambda: args.run(args))


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
