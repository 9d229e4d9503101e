"""``moco-ext export``."""

from __future__ import annotations

import argparse

from ..experiments.export import EXPORTS, export
from .embed import add_encoder_flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write an encoder for other software: a state dict with the names of torchvision or timm (.pth), the weights "
        "with a model card (.safetensors), a program (.onnx, .pt2), or a folder for the Hugging Face hub."
    )
    add = parser.add_argument
    add_encoder_flags(parser)
    add("-o", "--output", required=True, metavar="OUT", help="the file to write, or the folder for the hub")
    add("--format", metavar="FORMAT", help=f"{', '.join(EXPORTS)} (default: by the suffix of OUT)")
    add("--head", action="store_true", help="keep the projection head")
    add("--force", action="store_true", help="replace existing files")


def run(args: argparse.Namespace) -> int:
    path = export(args.source, args.output, args.format, arch=args.arch, head=args.head, overwrite=args.force)
    print(path)
    return 0
