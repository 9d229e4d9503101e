"""``moco-ext pretrain``: main_moco.py, with more settings."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from .. import distributed
from ..data import load
from ..experiments.pretrain import pretrain_and_evaluate
from ..runs.options import RunOptions
from ..runs.settings import settings
from ..train.config import DTYPES, RECIPES, PretrainConfig, resolve_config
from ..train.memory import print_plan
from . import launch
from .flags import add_data_flags, add_settings, given, name_of


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train an encoder with momentum contrast. Flags have the names, meanings and defaults of main_moco.py; the "
        "small data sets have presets for settings that are not given."
    )
    add = parser.add_argument
    add("dir", nargs="*", metavar="DIR", help="folders of images or lists of them; the same as --data DIR")
    add_data_flags(parser, "digits")
    add("--output", metavar="DIR", help="run directory: checkpoints, metrics, report (default: runs/DATA)")
    add_recipe(parser)
    add("--dry-run", action="store_true", help="print the resolved configuration and the memory it needs, and stop")
    add_settings(parser, settings(PretrainConfig) | settings(RunOptions) | settings(launch.LaunchOptions))


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe", metavar="NAME", help=f"{', '.join(RECIPES)}: published values for unspecified options"
    )


def run(args: argparse.Namespace) -> int:
    config = _config(args)
    output = Path(args.output or f"runs/{name_of(args.dir[0] if args.dir else config.data)}")
    start = getattr(args, "start_epoch", 0)
    if not config.steps and start >= config.epochs:
        raise ValueError(f"start_epoch: expected less than the {config.epochs} epochs, got {start}")
    if args.dry_run:
        return print_plan(config, args.data_root, launch.options_of(args, output).device)
    return launch.run(_work, args, output)


def _config(args: argparse.Namespace) -> PretrainConfig:
    if "" in args.dir:  # an empty variable of a script
        raise ValueError(f"data: expected folders of images or lists of them, got {args.dir}")
    folders = os.pathsep.join(args.dir)
    if folders and args.data not in (None, folders):
        raise ValueError(f"data: expected DIR or --data, got both: {folders} and {args.data}")
    return resolve_config(folders or args.data or "digits", given(args, PretrainConfig), args.recipe)


def _work(args: argparse.Namespace, options: RunOptions) -> int:
    config = _config(args)
    check_memory(config, options.device)
    data = load(config.data, args.data_root, val_fraction=config.val_fraction, image_size=config.image_size)
    print_ = options.console.print
    if options.device.type == "cpu" and not hasattr(args, "device"):
        print_("no GPU that torch can use: training on the CPU", highlight=False)
    length = f"{config.steps:,} steps" if config.steps else f"{config.epochs} epochs"
    world = distributed.world_size()
    print_(
        f"{data.name}: {len(data.train):,} images, {config.arch}, K = {config.moco_k:,}, m = {config.moco_m:g}, "
        f"T = {config.moco_t:g}, {length} of batch {config.batch_size} on {options.device}"
        + (f", {world} processes" if world > 1 else ""),
        highlight=False,
    )
    pretrain_and_evaluate(config, data, options)
    return 0


def check_memory(config: PretrainConfig, device: torch.device) -> None:
    """Raise a ValueError if the dictionary is larger than the memory of the device.

    Beyond its memory, a machine may end the process without a message rather than refuse to allocate.
    """
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = config.moco_k * config.moco_dim * DTYPES[config.queue_dtype].itemsize
    if needed > memory:
        raise ValueError(
            f"moco_k, moco_dim: expected a queue that fits in the {memory / 2**30:.1f} GiB of {device}, got "
            f"{config.moco_k:,} keys of {config.moco_dim:,} numbers, which take {needed / 2**30:,.1f} GiB"
        )
