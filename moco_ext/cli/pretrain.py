"""``moco-ext pretrain``: main_moco.py, with more settings."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .. import distributed
from ..data.urls import split_sources
from ..experiments.pretrain import pretrain_and_evaluate
from ..runs.options import RunOptions
from ..runs.settings import settings
from ..train.config import DTYPES, PretrainConfig
from ..train.mechanisms import has_setting
from ..train.memory import device_memory
from ..train.optimizer import warn_of_late_drops
from ..train.recipes import RECIPES
from . import launch
from .config_file import add_config_flag
from .flags import add_data_flags, add_settings, name_of
from .plan import Plan, check_step_memory, configuration, make_plan, print_dry_run, show_choices


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train an encoder with momentum contrast. Flags have the names and meanings of main_moco.py. Unspecified "
        "settings come from --recipe, or from a preset for the built-in data sets. For other images, they are chosen "
        "for the number of images and the device. The defaults below are those of --recipe moco-v1."
    )
    add = parser.add_argument
    add("dir", nargs="*", metavar="DIR", help="folders, lists or shards of images; the same as --data DIR")
    add_data_flags(parser, "digits")
    add("--output", metavar="DIR", help="run directory: checkpoints, metrics, report (default: runs/DATA)")
    add_recipe(parser)
    add_config_flag(parser)
    dry = "print each setting and its source, the number of steps and the memory, without writing anything"
    add("--dry-run", action="store_true", help=dry)
    add_settings(parser, settings(PretrainConfig) | settings(RunOptions) | settings(launch.LaunchOptions))


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe", metavar="NAME", help=f"{', '.join(RECIPES)}: published values for unspecified options"
    )


def run(args: argparse.Namespace) -> int:
    config = configuration(args)  # errors in flags are reported before processes are started or data is read
    output = Path(args.output or f"runs/{name_of(split_sources(config.data)[0])}")
    if args.dry_run:
        return _dry_run(args, output)
    return launch.run(_work, args, output)


def _dry_run(args: argparse.Namespace, output: Path) -> int:
    options = launch.options_of(args, output, local_world=launch.local_processes(args))
    print_dry_run(_plan(args, options), options)
    return 0


def _plan(args: argparse.Namespace, options: RunOptions) -> Plan:
    check_memory(configuration(args), options.device, max(distributed.world_size(), options.local_world))
    plan = make_plan(args, options)
    if not plan.config.steps and options.start_epoch >= plan.config.epochs:
        raise ValueError(f"start_epoch: expected less than the {plan.config.epochs} epochs, got {options.start_epoch}")
    config = plan.config
    if distributed.rank() == 0 and not (config.steps or config.cos or config.lr_every):
        warn_of_late_drops(config.schedule, config.epochs, "epochs")
    return plan


def _work(args: argparse.Namespace, options: RunOptions) -> int:
    print_ = options.console.print
    if options.device.type == "cpu" and not hasattr(args, "device"):
        print_("no GPU that torch can use: training on the CPU", highlight=False)
    plan = _plan(args, options)
    config, data = plan.config, plan.data
    check_step_memory(plan, options)
    show_choices(plan, options)
    length = f"{config.steps:,} steps" if config.steps else f"{config.epochs} epochs"
    world = distributed.world_size()
    symbols = {"moco_k": "K", "moco_m": "m", "moco_t": "T"}
    values = [f"{of} = {getattr(config, x):,}" for x, of in symbols.items() if has_setting(config.dictionary, x)]
    print_(
        f"{data.name}: {len(data.train):,} images, {config.arch}, {', '.join(values)}, "
        f"{length} of batch {config.batch_size} on {options.device}" + (f", {world} processes" if world > 1 else ""),
        highlight=False,
    )
    pretrain_and_evaluate(config, data, options)
    return 0


def check_memory(config: PretrainConfig, device: torch.device, world: int = 1) -> None:
    """Raise a ValueError if the dictionary is larger than the memory of the device.

    Beyond its memory, a machine may end the process without a message rather than refuse to allocate.
    """
    if not has_setting(config.dictionary, "moco_k"):
        return
    memory = device_memory(device)
    shards = world if config.shard_queue else 1
    needed = config.moco_k * config.moco_dim * DTYPES[config.queue_dtype].itemsize // shards
    if needed > memory:
        can_divide = has_setting(config.dictionary, "shard_queue") and not config.shard_queue
        raise ValueError(
            f"moco_k, moco_dim: expected a queue that fits in the {memory / 2**30:.1f} GiB of {device}, got "
            f"{config.moco_k:,} keys of {config.moco_dim:,} numbers, which take {needed / 2**30:,.1f} GiB"
            + "; --shard-queue divides them among processes"
            * can_divide
        )
