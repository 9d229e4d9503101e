"""The commands of ``moco-ext``, and the flags that several of them share."""

from __future__ import annotations

import argparse
import os
from typing import Any

DATA_HELP = "digits, fashion-mnist, cifar10, cifar100, or an image folder (train/ and val/ inside, or classes)"


def add_data_flags(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--data", metavar="NAME|DIR", help=f"{DATA_HELP} (default: {default})")
    parser.add_argument("--data-root", metavar="DIR", help="where downloaded data sets are kept (default: data)")


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-j", "--workers", type=int, metavar="N", help="image loading processes (default: one a core)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")


def add_launch_flags(parser: argparse.ArgumentParser) -> None:
    """Several processes: under torchrun none of these is needed. Names and meanings as in main_moco.py."""
    group = parser.add_argument_group("several processes (with torchrun, none of these is needed)")
    group.add_argument("--multiprocessing-distributed", action="store_true", help="start one process per GPU here")
    group.add_argument("--world-size", type=int, metavar="N", help="nodes; without the flag above, processes")
    group.add_argument("--rank", type=int, metavar="R", help="of this node; without the flag above, of this process")
    group.add_argument("--dist-url", metavar="URL", help="where all meet, tcp://HOST:PORT or env:// (default: here)")
    group.add_argument("--dist-backend", metavar="NAME", help="nccl or gloo (default: nccl on GPUs, else gloo)")
    group.add_argument("--gpu", type=int, metavar="I", help="the same as --device cuda:I")


def workers(given: dict[str, Any]) -> int:
    """Loader processes of this node."""
    return given.get("workers", min(32, os.cpu_count() or 1))
