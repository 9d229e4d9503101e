"""``moco-ext COMMAND``. The module of a command is imported when that command runs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from .. import __version__
from .config_file import with_file
from .errors import guarded
from .flags import Parser

COMMANDS = {
    "pretrain": "train an encoder with momentum contrast, evaluate it, write a report",
    "distill": "train an encoder to reproduce the similarities of a frozen teacher",
    "knn": "measure the kNN top-1 accuracy of a trained encoder",
    "linear": "measure the linear top-1 accuracy of a trained encoder",
    "finetune": "train all layers for classification, with all labels or a part of them",
    "detect": "train Faster R-CNN on a trained encoder, with data in the layout of VOC or COCO",
    "segment": "train an FCN for semantic segmentation on a trained encoder, with masks as in VOC or Cityscapes",
    "embed": "write the features of a folder of images to .parquet, .npy, .npz or .safetensors",
    "neighbors": "find the nearest images of a query in a file of features",
    "export": "export an encoder to torchvision, timm, ONNX, torch.export or the Hugging Face hub",
    "convert": "convert between checkpoint formats",
    "ablate": "train a grid of runs (mechanism, m, K, T, shuffling BN) and compare them in tables and plots",
    "shard": "pack a folder of images into tar files, for fast reading from disk or a URL",
    "report": "write an HTML report about one run, or comparing several",
    "info": "print versions, libraries and devices, and run a self-test",
}


def build_parser(command: str | None = None) -> Parser:
    """The parser of ``moco-ext``, with the flags of one command."""
    parser = Parser(prog="moco-ext", description="Momentum Contrast: train and evaluate encoders.")
    parser.add_argument("--version", action="version", version=f"moco-ext {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        subparser = commands.add_parser(name, help=summary)
        if name == command:
            module = importlib.import_module(f".{name}", __package__)
            module.add_flags(subparser)
            subparser.set_defaults(run=module.run, command=name)
            parser.of_command = subparser
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return guarded(lambda: _run(argv))


def _run(argv: Sequence[str]) -> int:
    parser = build_parser(argv[0] if argv else None)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    if parser.of_command is not None and hasattr(args, "config"):
        args = with_file(parser.of_command, argv[1:], args)
    return args.run(argparse.Namespace(**{name: _from_home(value) for name, value in vars(args).items()}))


def _from_home(value: Any) -> Any:
    """Expand ``~`` in paths: no shell does in a file or in ``--output=~/runs``, and a folder ``~`` would appear."""
    if isinstance(value, list):
        return [_from_home(item) for item in value]
    return os.pathsep.join(map(os.path.expanduser, value.split(os.pathsep))) if isinstance(value, str) else value
