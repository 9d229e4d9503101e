"""``moco-ext knn``."""

from __future__ import annotations

import argparse
from typing import Any

from ..distributed import rank
from ..evaluate.scores import knn_score, representations
from ..runs.directory import report_unreadable
from ..runs.options import RunOptions
from ..runs.settings import settings
from ..train.classifier import ClassifierConfig
from . import evaluate
from .evaluate import Inputs, load_inputs, percent, show, write_result
from .flags import add_settings, given


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure the weighted k-nearest-neighbor top-1 accuracy of the pooled features of a trained encoder (for MoCo, "
        "the query encoder), compared with raw pixels."
    )
    evaluate.add_input_flags(parser)
    parser.add_argument("-k", type=int, dest="knn_k", metavar="N", help="neighbors (default: that of the run, or 200)")
    parser.add_argument(
        "-t", "--temperature", type=float, default=0.07, metavar="T", help="temperature of the votes (default: 0.07)"
    )
    subset = settings(ClassifierConfig, "labels_per_class", "precision", "seed")
    add_settings(parser, subset | {"seed": subset["seed"]._replace(help="seed of the labeled subset")})


def run(args: argparse.Namespace) -> int:
    return evaluate.run(_work, args)


def _work(inputs: Inputs, args: argparse.Namespace, options: RunOptions) -> int:
    encoder, _, data = load_inputs(inputs, args)
    k = inputs.config.get("knn_k", 200) if args.knn_k is None else args.knn_k
    flags = given(args, ClassifierConfig)
    precision = flags.pop("precision", "fp32")
    voting: dict[str, Any] = {"k": k, "temperature": args.temperature} | flags
    scores = {
        name: percent(knn_score(data, rows, **voting, device=options.device, sharded=True))
        for name, rows in representations(data, options, trained=encoder, precision=precision)
    }
    report_unreadable(options, data.unite_unreadable())
    if rank() == 0:
        result = {"data": inputs.data, "precision": precision, **voting, "knn_top1": scores}
        write_result(options.output, "knn", result)
        rows = [("raw pixels", scores["pixels"]), ("encoder", scores["trained"])]
        show(result, f"{data.name}: kNN top-1, %", ("features", "kNN"), rows, as_json=args.json)
    return 0
