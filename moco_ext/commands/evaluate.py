"""``moco-ext knn`` and ``moco-ext linear``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import add_data_flags, add_machine_flags, workers


def add_parser(commands) -> None:
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
        command.set_defaults(run=run)
        command.add_argument("checkpoint", metavar="RUN", help="run directory or checkpoint file")
        add_data_flags(command, "the run's own")
        command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
        if name == "knn":
            command.add_argument("-k", type=int, dest="knn_k", metavar="N", help="(default: the run's own, or 200)")
            command.add_argument("-t", "--temperature", type=float, metavar="T", help="(default: 0.07)")
        else:
            command.add_argument("-C", type=float, metavar="C", help="inverse L2 penalty (default: 1)")
        add_machine_flags(command)


def run(args: argparse.Namespace) -> int:
    given = vars(args)
    path = Path(args.checkpoint)
    checkpoint_path = path / "checkpoint.pth" if path.is_dir() else path
    config_path = checkpoint_path.with_name("config.json")
    config: dict[str, Any] = json.loads(config_path.read_text()) if config_path.is_file() else {}
    name = given.get("data", config.get("data"))
    if name is None:
        raise ValueError(f"data: expected --data, as {path} has no config.json beside it that says")

    from rich.console import Console
    from rich.table import Table

    from ..data import load
    from ..evaluate import encoder_features, knn_top1, linear_top1, pixel_features
    from ..train.checkpoint import load_checkpoint, load_encoder
    from ..train.launch import local_device

    device = local_device(given)
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
            pixel_features(data, split, workers=workers(given))
            if features == "pixels"
            else encoder_features(encoder, data, split, device=device, workers=workers(given))
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
