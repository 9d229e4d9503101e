"""``moco-ext embed``."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from ..data import load
from ..distributed import rank
from ..evaluate.embed import Embedded, embed
from ..evaluate.encoder import load_encoder
from ..evaluate.feature_files import DTYPES, SUFFIXES, check_output
from ..runs.options import RunOptions
from ..runs.settings import settings
from . import launch
from .flags import add_data_root, add_settings


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write the features of all images of folders, lists or shards to a file: .parquet (columns path, features, "
        "label), .npy with the paths in FILE.json, .npz or .safetensors. Images that cannot be decoded are skipped and "
        "listed in FILE.unreadable.txt."
    )
    add = parser.add_argument
    add_encoder_flags(parser)
    add("data", nargs="+", metavar="DATA", help="folders, lists or shards of images, or a built-in name such as digits")
    add("-o", "--output", required=True, metavar="FILE", help=f"the file to write: {', '.join(SUFFIXES)}")
    add("--head", action="store_true", help="keep the projection head")
    add("--normalize", action="store_true", help="scale each row to unit length")
    add("--dtype", default="float32", metavar="DTYPE", help=f"{' or '.join(DTYPES)} (default: float32)")
    add("--precision", default="fp32", metavar="{fp32,bf16,fp16}", help="autocast of the encoder (default: fp32)")
    add("-b", "--batch-size", type=int, default=256, metavar="N", help="images per process and pass (default: 256)")
    add("--image-size", type=int, metavar="N", help="side of the images in pixels (default: that of the training)")
    add("--overwrite", action="store_true", help="replace an existing file")
    add("--json", action="store_true", help="print one JSON object")
    add_data_root(parser)
    add_settings(parser, settings(RunOptions, "workers") | settings(launch.LaunchOptions))


def add_encoder_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="RUN|WEIGHTS",
        help="run directory, checkpoint of any known format, state dict, exported folder, torchvision:NAME, "
        "timm:NAME, or hf:USER/NAME",
    )
    parser.add_argument("-a", "--arch", metavar="ARCH", help="architecture, if the weights do not name it")


def run(args: argparse.Namespace) -> int:
    output = Path(args.output)
    check_output(output)
    if output.exists() and not args.overwrite:
        raise FileExistsError(f"output: {output} exists; --overwrite replaces it")
    return launch.run(_work, args, output.parent)


def _work(args: argparse.Namespace, options: RunOptions) -> int:
    encoder = load_encoder(args.source, args.arch, head=args.head, image_size=args.image_size)[0]
    data = load(os.pathsep.join(args.data), args.data_root)
    done = embed(
        encoder,
        data,
        args.output,
        normalize=args.normalize,
        dtype=args.dtype,
        batch_size=args.batch_size,
        device=options.device,
        workers=options.workers,
        precision=args.precision,
        overwrite=args.overwrite,
        console=options.console,
    )
    if rank() == 0:
        _tell(done, args, options)
    return 0


def _tell(done: Embedded, args: argparse.Namespace, options: RunOptions) -> None:
    if args.json:
        print(json.dumps(done._asdict() | {"output": str(done.output)}))
        return
    line = f"{done.output}: {done.images:,} images, {done.dim:,} features, {done.images / done.seconds:,.0f} images/s"
    if done.unreadable:
        line += f"; {len(done.unreadable):,} unreadable files are listed in {done.output.name}.unreadable.txt"
    options.console.print(line, highlight=False, soft_wrap=True)
