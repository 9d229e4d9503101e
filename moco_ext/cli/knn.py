"""``moco-ext knn``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .evaluate import add_source_flags, find_source, load_source, percent, process_workers, show, write_result

if TYPE_CHECKING:
    from .launch import Process


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "knn",
        help="weighted k-nearest-neighbour top-1 of a trained encoder",
        description="Weighted k-nearest-neighbour top-1 on the pooled features of a trained encoder (of MoCo, the "
        "query encoder), beside raw pixels.",
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(run=run)
    add_source_flags(parser)
    parser.add_argument("-k", type=int, dest="knn_k", metavar="N", help="neighbours (default: the run's own, or 200)")
    parser.add_argument("-t", "--temperature", type=float, metavar="T", help="of the votes (default: 0.07)")


def run(args: argparse.Namespace) -> int:
    from . import launch

    return launch.run(_work, args)


def _work(args: argparse.Namespace, process: Process) -> int:
    from ..distributed import rank
    from ..evaluate import encoder_features, knn_top1, pixel_features

    given = vars(args)
    source = find_source(given)
    encoder, _, data = load_source(given, source)
    encoder.to(process.device)
    workers = process_workers(given, process)
    options: dict[str, Any] = {
        "k": given.get("knn_k", source.config.get("knn_k", 200)),
        "temperature": given.get("temperature", 0.07),
    }
    train_labels, test_labels = (split.labels for split in data.splits)
    scores = {}
    for name in ("pixels", "trained"):
        train, test = (
            pixel_features(data, split, workers=workers)
            if name == "pixels"
            else encoder_features(encoder, data, split, device=process.device, workers=workers)
            for split in data.splits
        )
        top1 = knn_top1(train, train_labels, test, test_labels, **options, device=process.device, sharded=True)
        scores[name] = percent(top1)
    if rank() == 0:
        result = {"data": source.data, **options, "knn_top1": scores}
        write_result(source, "knn", result)
        rows = [("raw pixels", scores["pixels"]), ("encoder", scores["trained"])]
        show(given, result, f"{data.name}: kNN top-1, %", ("features", "kNN"), rows)
    return 0
