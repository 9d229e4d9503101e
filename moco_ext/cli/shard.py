"""``moco-ext shard``."""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path

from ..data import load
from ..data.shard_writer import ShardWriter
from ..runs.console import ImageProgress, make_console
from ..runs.directory import exclusive
from ..runs.settings import settings
from ..train.config import PretrainConfig
from .flags import add_settings


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write the images of a folder, a list or other shards to tar files, which moco-ext and WebDataset read. The "
        "files are copied unchanged. The same command continues after an interruption."
    )
    add = parser.add_argument
    add(
        "data",
        metavar="DIR",
        help="a folder of images, with or without class folders, train/ and val/, a list, or shards",
    )
    add("output", metavar="OUT", help="folder for shard-000000.tar ..., in train/ and val/ if there are test images")
    add("-n", "--images-per-shard", type=int, default=10_000, metavar="N", help="images per shard (default: 10000)")
    add("--shuffle", type=int, metavar="SEED", help="write the images in random order (default: in their order)")
    add_settings(parser, settings(PretrainConfig, "val_fraction"))


def run(args: argparse.Namespace) -> int:
    console, output = make_console(), Path(args.output)
    data = load(args.data, val_fraction=getattr(args, "val_fraction", 0.0))
    total = len(data.train) + (0 if data.test is None else len(data.test))
    writer = ShardWriter(data, output, images_per_shard=args.images_per_shard, shuffle=args.shuffle)
    with exclusive(output, lambda: None), ImageProgress(console, total) as progress:
        done = writer.write(progress.advance)
    if done.missing:
        warnings.warn(
            f"{len(done.missing):,} files could not be read and are empty in the shards, such as {done.missing[0]}",
            stacklevel=1,
        )
    size = sum(os.path.getsize(path) for path in output.glob("**/shard-*.tar")) / 1e9
    line = f"{output}: {done.images:,} images, {done.shards:,} shards, {size:.3g} GB; moco-ext pretrain {output}"
    console.print(line, highlight=False, soft_wrap=True)
    return 0
