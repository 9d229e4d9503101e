"""``moco-ext ablate``: a grid of runs, and a table and a plot for each axis."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from ..experiments.ablation import AXES, make_grid, run_grid, subset
from ..report.ablation import markdown, write_report
from ..runs.options import RunOptions
from ..runs.settings import settings
from ..train.config import PretrainConfig
from .config_file import add_config_flag, with_file
from .flags import Parser, add_data_flags, add_settings, type_of
from .launch import LaunchOptions, options_of
from .plan import make_plan, show_choices
from .pretrain import add_recipe


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train a base configuration and, one at a time, each value of each axis; evaluate; write results.json, "
        "results.md and plots. The flags after -- set the base configuration. Finished runs are kept: the same "
        "command resumes where it was interrupted."
    )
    add_data_flags(parser, "digits")
    add = parser.add_argument
    add("--output", metavar="DIR", help="a directory for the runs and the results")
    add_config_flag(parser)
    add("--seeds", type=int, nargs="+", default=[0], metavar="S", help="repeat every run with each seed (default: 0)")
    add("--images", type=int, metavar="N", help="train on a subset, the same one in all runs (default: all images)")
    add("--epochs", type=int, default=argparse.SUPPRESS, metavar="N", help="epochs per run (default: that of the base)")
    add("--grid", choices=("one-at-a-time", "full"), default="one-at-a-time", help="full: all combinations")
    add("trainer", nargs="*", metavar="-- FLAGS", help="flags of moco-ext pretrain for all runs")

    add = parser.add_argument_group("axes").add_argument
    for name, setting in settings(PretrainConfig, *AXES["queue"]).items():
        values = type_of(setting) | {"nargs": "+", "default": argparse.SUPPRESS}
        add(f"--{name.replace('_', '-')}", help=setting.help, **values)
    add("--groups", type=int, default=8, metavar="G", help="with --shuffle-bn: --split-bn of these runs (default: 8)")
    add_settings(parser, settings(RunOptions, "workers") | settings(LaunchOptions, "device", "threads"))


def run(args: argparse.Namespace) -> int:
    axes = {axis: getattr(args, axis) for axis in AXES["queue"] if hasattr(args, axis)}
    if not axes:
        raise ValueError("axes: expected at least one, --moco-m 0 0.9 0.999 for example, got none")
    for name, setting in settings(PretrainConfig, *axes).items():
        setting.check(tuple(axes[name]))
    if args.output is None:
        raise ValueError("output: expected --output DIR, got none")
    trainer = _trainer_flags(args.trainer)
    epochs = {"epochs": args.epochs} if hasattr(args, "epochs") else {}
    options = options_of(argparse.Namespace(**{"keep": 1} | vars(trainer) | vars(args)), Path(args.output))
    named = {"dir": [], "data": args.data or trainer.data, "data_root": args.data_root}
    named["from_file"] = getattr(trainer, "from_file", frozenset()) - epochs.keys()
    trainer = argparse.Namespace(**{"online_knn": 0} | vars(trainer) | epochs | named)
    plan = make_plan(trainer, options)
    base, data = plan.config, plan.data
    show_choices(plan, options)
    grid = make_grid(base, axes, args.seeds, groups=args.groups, full=args.grid == "full")
    if args.images is not None:
        data = subset(data, args.images)
    results = run_grid(grid, base, data, options)
    write_report(results, options.output)
    Console().print(Markdown(markdown(results)))
    return 0


def _trainer_flags(flags: list[str]) -> argparse.Namespace:
    """The flags after --: all of ``moco-ext pretrain`` that may be the same in every run."""
    parser = Parser(prog="moco-ext ablate ... --")
    add_recipe(parser)
    add_config_flag(parser)
    add_data_flags(parser, "that of --data before --")
    declared = settings(PretrainConfig) | settings(RunOptions, "print_freq", "save_every", "keep")
    del declared["seed"]
    add_settings(parser, declared)
    args, unknown = parser.parse_known_args(flags)
    if unknown:
        raise ValueError(f"--: expected flags of moco-ext pretrain that all runs share, got {' '.join(unknown)}")
    return with_file(parser, flags, args, ignored=("seed",))
