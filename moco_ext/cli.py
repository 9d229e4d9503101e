"""``moco-ext``: pretrain, knn, linear, info. What a command needs is imported when it runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_TRAIN_EXTRA = {
    "torchvision",
    "rich",
    "tensorboard",
    "matplotlib",
    "sklearn",
    "safetensors",
    "torchdata",
    "PIL",
}
_DATA_HELP = "digits, fashion-mnist, cifar10, cifar100, or an image folder (train/ and val/ inside, or classes)"
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


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moco-ext", description="Momentum Contrast: train and evaluate encoders.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    pretrain = commands.add_parser(
        "pretrain",
        help="train an encoder by momentum contrast, evaluate it, write a report",
        description="Train an encoder by momentum contrast. Flags keep the names, meanings and defaults of "
        "main_moco.py; the small data sets have presets of their own for whatever is left out.",
        argument_default=argparse.SUPPRESS,
    )
    add = pretrain.add_argument
    flag = argparse.BooleanOptionalAction
    add("dir", nargs="?", metavar="DIR", help="image folder; the same as --data DIR")
    add("--data", metavar="NAME|DIR", help=_DATA_HELP + " (default: digits)")
    add("--data-root", metavar="DIR", help="where downloaded data sets are kept (default: data)")
    add("--output", metavar="DIR", help="run directory: checkpoint, metrics, report (default: runs/DATA)")
    add(
        "-a",
        "--arch",
        metavar="ARCH",
        help="torchvision name, resnet18-small and kin, timm:NAME (default: resnet50)",
    )
    add("--epochs", type=int, metavar="N", help="(default: 200)")
    add("-b", "--batch-size", type=int, metavar="N", help="(default: 256)")
    add("--lr", "--learning-rate", type=float, dest="lr", metavar="LR", help="(default: 0.03)")
    add(
        "--schedule",
        type=int,
        nargs="*",
        metavar="E",
        help="epochs at which lr falls tenfold (default: 120 160)",
    )
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
    add(
        "--knn-every",
        type=int,
        metavar="N",
        help="epochs between kNN evaluations, 0 for the last only (default: 10)",
    )
    add("--knn-k", type=int, metavar="N", help="neighbours (default: 200)")
    add("--seed", type=int, metavar="N", help="of weights, order and augmentations (default: 0)")
    add("--resume", metavar="FILE", help="checkpoint to go on from")
    add(
        "-p",
        "--print-freq",
        type=int,
        metavar="N",
        help="steps between updates of the figures shown (default: 10)",
    )
    _add_machine_flags(pretrain)

    for name, summary in (
        ("knn", "weighted k-nearest-neighbour top-1"),
        ("linear", "linear classification top-1"),
    ):
        command = commands.add_parser(
            name,
            help=f"{summary} of a trained encoder",
            description=f"{summary[0].upper()}{summary[1:]} on the pooled features of a run's or checkpoint's query "
            "encoder, beside raw pixels.",
            argument_default=argparse.SUPPRESS,
        )
        command.add_argument("run", metavar="RUN", help="run directory or checkpoint file")
        command.add_argument("--data", metavar="NAME|DIR", help=_DATA_HELP + " (default: the run's own)")
        command.add_argument("--data-root", metavar="DIR", help="where downloaded data sets are kept (default: data)")
        command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
        if name == "knn":
            command.add_argument("-k", type=int, dest="knn_k", metavar="N", help="(default: the run's own, or 200)")
            command.add_argument("-t", "--temperature", type=float, metavar="T", help="(default: 0.07)")
        else:
            command.add_argument("-C", type=float, metavar="C", help="inverse L2 penalty (default: 1)")
        _add_machine_flags(command)

    info = commands.add_parser("info", help="versions, libraries, devices and a self-test")
    info.add_argument("--json", action="store_true")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. Errors a user can mend are one line (all of it with MOCO_EXT_DEBUG=1)."""
    args = build_parser().parse_args(argv)
    warnings.showwarning = lambda message, *rest, **more: print(f"moco-ext: warning: {message}", file=sys.stderr)
    command = {"pretrain": _pretrain, "knn": _evaluate, "linear": _evaluate, "info": _info}[args.command]
    try:
        return command(args)
    except KeyboardInterrupt:
        print("moco-ext: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if os.environ.get("MOCO_EXT_DEBUG"):
            raise
        message = str(error)
        if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in _TRAIN_EXTRA:
            message = f'{error.name} is needed here and not installed: pip install "moco-ext[train]"'
        print(f"moco-ext: error: {message}", file=sys.stderr)
        return 1


def _add_machine_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-j", "--workers", type=int, metavar="N", help="image loading processes (default: one a core)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")


def _pretrain(args: argparse.Namespace) -> int:
    given = vars(args)
    if "dir" in given and given.get("data", given["dir"]) != given["dir"]:
        raise ValueError(f"data: expected DIR or --data, got both: {given['dir']} and {given['data']}")
    name = given.get("dir", given.get("data", "digits"))

    from rich.console import Console

    from .data import load
    from .train.config import resolve_config
    from .train.pretrain import Run
    from .train.run import pretrain_and_evaluate

    explicit = {flag: given[flag] for flag in _CONFIG_FLAGS if flag in given}
    if "schedule" in explicit:
        explicit["schedule"] = tuple(explicit["schedule"])
    config = resolve_config(name, explicit)
    device, workers = _machine(given)
    console = Console()
    data = load(name, given.get("data_root", "data"))
    output = Path(given.get("output", Path("runs") / Path(name).name))
    resume = Path(given["resume"]) if "resume" in given else None
    console.print(
        f"{data.name}: {len(data.train):,} images, {config.arch}, K = {config.moco_k:,}, m = {config.moco_m:g}, "
        f"T = {config.moco_t:g}, {config.epochs} epochs of batch {config.batch_size} on {device}",
        highlight=False,
    )
    run = Run(output, device, resume, workers, print_freq=max(1, given.get("print_freq", 10)), console=console)
    pretrain_and_evaluate(config, data, run)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    given = vars(args)
    path = Path(args.run)
    checkpoint_path = path / "checkpoint.pth" if path.is_dir() else path
    config_path = checkpoint_path.with_name("config.json")
    config: dict[str, Any] = json.loads(config_path.read_text()) if config_path.is_file() else {}
    name = given.get("data", config.get("data"))
    if name is None:
        raise ValueError(f"data: expected --data, as {path} has no config.json beside it that says")

    from rich.console import Console
    from rich.table import Table

    from .data import load
    from .evaluate import encoder_features, knn_top1, linear_top1, pixel_features
    from .train.checkpoint import load_checkpoint, load_encoder

    device, workers = _machine(given)
    encoder = load_encoder(load_checkpoint(checkpoint_path)).to(device)
    data = load(name, given.get("data_root", "data"))
    train_labels, test_labels = (split.labels for split in data.splits)
    score: Callable[..., float] = knn_top1 if args.command == "knn" else linear_top1
    if args.command == "knn":
        title = "kNN"
        options = {
            "k": given.get("knn_k", config.get("knn_k", 200)),
            "temperature": given.get("temperature", 0.07),
        }
    else:
        title = "linear"
        options = {"C": given.get("C", 1.0)}
    scores = {}
    for features in ("pixels", "trained"):
        train, test = (
            pixel_features(data, split, workers=workers)
            if features == "pixels"
            else encoder_features(encoder, data, split, device=device, workers=workers)
            for split in data.splits
        )
        scores[features] = round(score(train, train_labels, test, test_labels, **options), 2)
    if given.get("json"):
        print(json.dumps({"data": name, **options, f"{args.command}_top1": scores}))
        return 0
    table = Table(
        "features",
        title=f"{name}: {title} top-1, %",
        caption=" ".join(f"{k}={v}" for k, v in options.items()),
    )
    table.add_column(title, justify="right")
    for features, value in scores.items():
        table.add_row({"pixels": "raw pixels", "trained": "encoder"}[features], f"{value:.2f}")
    Console().print(table)
    return 0


def _info(args: argparse.Namespace) -> int:
    from . import info

    return info.main(as_json=args.json)


def _machine(given: dict[str, Any]) -> tuple[Any, int]:
    """The device and the number of loader processes; sets torch's threads."""
    import torch

    if "threads" in given:
        torch.set_num_threads(given["threads"])
    workers = given.get("workers", min(32, os.cpu_count() or 1))
    try:
        device = torch.device(given.get("device", "cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected one that torch can use, got {device} and no CUDA GPU")
    return device, workers
