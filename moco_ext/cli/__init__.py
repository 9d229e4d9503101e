"""``moco-ext COMMAND``: one module of ``commands`` each. What a command needs is imported when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import ablate, convert, finetune, info, knn, linear, pretrain, report
from .errors import guarded


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
