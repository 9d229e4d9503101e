"""``moco-ext info``."""

from __future__ import annotations

import argparse


def add_parser(commands) -> None:
    parser = commands.add_parser("info", help="versions, libraries, devices and a self-test")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from .. import info

    return info.main(as_json=args.json)
