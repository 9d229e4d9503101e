"""``moco-ext ablate``: a grid of runs, a table and a plot of each axis."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import pretrain
from .flags import add_data_flags, add_machine_flags, workers

_AXES = ("dictionary", "moco_m", "moco_k", "moco_t", "shuffle_bn", "key_encoder")
# Flags of the trainer that are not the grid's own affair.
_FOR_ALL_RUNS = ("recipe", "print_freq", "save_every", "keep")


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "ablate",
        help="train a grid of runs (mechanism, m, K, T, shuffling BN), compare them in tables and plots",
        description="Train a base configuration and, one at a time, each value of each axis; evaluate; write "
        "results.json, results.md and plots. The base is what moco-ext pretrain does with the flags after --. "
        "Finished runs are kept: the same command goes on where it was broken off.",
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(run=run)
    add_data_flags(parser, "digits")
    add = parser.add_argument
    add("--output", required=True, metavar="DIR", help="a directory for each run, and for the results")
    add("--seeds", type=int, nargs="+", metavar="S", help="every run once a seed (default: 0)")
    add("--images", type=int, metavar="N", help="of the training set, the same ones for all runs (default: all)")
    add("--epochs", type=int, metavar="N", help="of each run (default: the trainer's)")
    add("--grid", choices=("one-at-a-time", "full"), help="full: all combinations (default: one-at-a-time)")
    add("trainer", nargs="*", metavar="-- FLAGS", help="of moco-ext pretrain, the same for all runs")

    add = parser.add_argument_group("axes").add_argument
    add("--dictionary", nargs="+", choices=("queue", "end-to-end", "memory-bank"), help="mechanism")
    add("--moco-m", type=float, nargs="+", metavar="M", help="momentum of the key encoder")
    add("--moco-k", type=int, nargs="+", metavar="K", help="negatives")
    add("--moco-t", type=float, nargs="+", metavar="T", help="temperature")
    add("--shuffle-bn", nargs="+", choices=("on", "off"), help="keys shuffled between groups of the batch, or not")
    add("--groups", type=int, metavar="G", help="with --shuffle-bn: groups of the batch, as of G GPUs (default: 8)")
    add("--key-encoder", nargs="+", metavar="KIND", help="how keys are encoded, as in moco-ext pretrain")
    add_machine_flags(parser)


def run(args: argparse.Namespace) -> int:
    given = vars(args)
    axes = {axis: given[axis] for axis in _AXES if axis in given}
    if not axes:
        raise ValueError("axes: expected at least one, --moco-m 0 0.9 0.999 for example, got none")
    trainer = _trainer_flags(given.get("trainer", []))
    epochs = {"epochs": given["epochs"]} if "epochs" in given else {}
    base = pretrain.given_config({"online_knn": 0} | trainer | epochs | {"data": given.get("data", "digits")})

    from rich.console import Console
    from rich.markdown import Markdown

    from ..data import load
    from ..experiments.ablation import make_grid, run_grid, subset
    from ..report.ablation import markdown, write_report
    from ..runs.options import RunOptions
    from .launch import local_device

    full = given.get("grid") == "full"
    grid = make_grid(base, axes, given.get("seeds", [0]), groups=given.get("groups", 8), full=full)
    data = load(base.data, given.get("data_root", "data"))
    if "images" in given:
        data = subset(data, given["images"])
    console = Console()
    options = RunOptions(
        Path(args.output),
        local_device(given),
        workers=workers(given),
        print_freq=max(1, trainer.get("print_freq", 10)),
        save_every=trainer.get("save_every", 0),
        keep=max(1, trainer.get("keep", 1)),
        console=console,
    )
    results = run_grid(grid, base, data, options)
    write_report(results, options.output)
    console.print(Markdown(markdown(results)))
    return 0


def _trainer_flags(flags: list[str]) -> dict:
    parser = argparse.ArgumentParser(prog="moco-ext ablate ... --")
    pretrain.add_parser(parser.add_subparsers(dest="command"))
    given = vars(parser.parse_args(["pretrain", *flags]))
    own = {"command", "run"}
    wrong = sorted((pretrain.RUN_FLAGS - own - set(_FOR_ALL_RUNS) | {"seed"}) & given.keys())
    if wrong:
        raise ValueError(f"--: expected flags of what is learnt in all runs, got {', '.join(wrong)}")
    return {name: value for name, value in given.items() if name not in own}
