"""``moco-ext pretrain``: the flags of main_moco.py, and what is new beside them."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import DATA_HELP, add_machine_flags, workers

# Flags that are part of a PretrainConfig; what the user leaves out is absent and a preset may fill it in.
_CONFIG_FLAGS = [
    "arch",
    "epochs",
    "batch_size",
    "lr",
    "schedule",
    "cos",
    "momentum",
    "weight_decay",
    "moco_dim",
    "moco_k",
    "moco_m",
    "moco_t",
    "mlp",
    "aug_plus",
    "crop_min",
    "knn_k",
    "knn_every",
    "seed",
]


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "pretrain",
        help="train an encoder by momentum contrast, evaluate it, write a report",
        description="Train an encoder by momentum contrast. Flags keep the names, meanings and defaults of "
        "main_moco.py; the small data sets have presets of their own for whatever is left out.",
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    flag = argparse.BooleanOptionalAction
    add("dir", nargs="?", metavar="DIR", help="image folder; the same as --data DIR")
    add("--data", metavar="NAME|DIR", help=DATA_HELP + " (default: digits)")
    add("--data-root", metavar="DIR", help="where downloaded data sets are kept (default: data)")
    add("--output", metavar="DIR", help="run directory: checkpoint, metrics, report (default: runs/DATA)")
    add("-a", "--arch", metavar="ARCH", help="torchvision name, resnet18-small and kin, timm:NAME (default: resnet50)")
    add("--epochs", type=int, metavar="N", help="(default: 200)")
    add("-b", "--batch-size", type=int, metavar="N", help="(default: 256)")
    add("--lr", "--learning-rate", type=float, dest="lr", metavar="LR", help="(default: 0.03)")
    add("--schedule", type=int, nargs="*", metavar="E", help="epochs at which lr falls tenfold (default: 120 160)")
    add("--cos", action=flag, help="let lr follow half a cosine instead")
    add("--momentum", type=float, metavar="M", help="of SGD (default: 0.9)")
    add("--wd", "--weight-decay", type=float, dest="weight_decay", metavar="W", help="(default: 1e-4)")
    add("--moco-dim", type=int, metavar="C", help="feature dimension (default: 128)")
    add("--moco-k", type=int, metavar="K", help="queue size, number of negatives (default: 65536)")
    add("--moco-m", type=float, metavar="M", help="momentum of the key encoder (default: 0.999)")
    add("--moco-t", type=float, metavar="T", help="softmax temperature (default: 0.07)")
    add("--mlp", action=flag, help="MoCo v2's projection head")
    add("--aug-plus", action=flag, help="MoCo v2's augmentations")
    add("--crop-min", type=float, metavar="A", help="least share of the image's area in a view (default: 0.2)")
    add("--knn-every", type=int, metavar="N", help="epochs between kNN evaluations, 0: only the last (default: 10)")
    add("--knn-k", type=int, metavar="N", help="neighbours (default: 200)")
    add("--seed", type=int, metavar="N", help="of weights, order and augmentations (default: 0)")
    add("--resume", metavar="FILE", help="checkpoint to go on from")
    add("-p", "--print-freq", type=int, metavar="N", help="steps between updates of the figures shown (default: 10)")
    add_machine_flags(parser)


def run(args: argparse.Namespace) -> int:
    given = vars(args)
    if "dir" in given and given.get("data", given["dir"]) != given["dir"]:
        raise ValueError(f"data: expected DIR or --data, got both: {given['dir']} and {given['data']}")
    name = given.get("dir", given.get("data", "digits"))

    from rich.console import Console

    from ..data import load
    from ..train.config import resolve_config
    from ..train.launch import local_device
    from ..train.pretrain import Run
    from ..train.run import pretrain_and_evaluate

    explicit = {flag: given[flag] for flag in _CONFIG_FLAGS if flag in given}
    if "schedule" in explicit:
        explicit["schedule"] = tuple(explicit["schedule"])
    config = resolve_config(name, explicit)
    device = local_device(given)
    console = Console()
    data = load(name, given.get("data_root", "data"))
    output = Path(given.get("output", Path("runs") / Path(name).name))
    resume = Path(given["resume"]) if "resume" in given else None
    console.print(
        f"{data.name}: {len(data.train):,} images, {config.arch}, K = {config.moco_k:,}, m = {config.moco_m:g}, "
        f"T = {config.moco_t:g}, {config.epochs} epochs of batch {config.batch_size} on {device}",
        highlight=False,
    )
    options = Run(
        output, device, resume, workers(given), print_freq=max(1, given.get("print_freq", 10)), console=console
    )
    pretrain_and_evaluate(config, data, options)
    return 0
