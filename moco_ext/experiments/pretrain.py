"""A whole run: train, evaluate pixels, untrained and trained encoder, write summary and report."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

from rich.table import Table

from .. import distributed
from ..data import ImageData
from ..evaluate.features import estimate_batchnorm_
from ..evaluate.scores import Features, all_features, top1
from ..report import write_report
from ..runs.files import write_json
from ..runs.options import RunOptions
from ..train.config import PretrainConfig
from ..train.model import build_model
from ..train.trainer import pretrain

_EVALUATED = 200_000  # images; of more, features and a solved linear classifier are a job of their own


def pretrain_and_evaluate(config: PretrainConfig, data: ImageData, options: RunOptions) -> dict[str, Any]:
    """Everything ``moco-ext pretrain`` does; returns what it writes to ``summary.json``.

    The summary is ``{"data", "seconds", "knn_top1", "linear_top1"}``: training time, and top-1 accuracy in
    percent for ``"pixels"``, ``"untrained"`` (the encoder at its random start, with BatchNorm statistics of the
    training images) and ``"trained"``. An image folder without ``val/`` is trained on but not evaluated, one of more
    than 200,000 images not here: ``moco-ext linear`` is for that.
    """
    first = distributed.rank() == 0
    model = build_model(config, len(data.train))  # first, as it may not fit in memory
    if first:
        options.output.mkdir(parents=True, exist_ok=True)
        write_json(options.output / "config.json", dataclasses.asdict(config))
    untrained = copy.deepcopy(model.encoder_q)
    records = pretrain(config, data, options, model)

    summary: dict[str, Any] = {"data": config.data}
    features: Features = {}
    if data.test is None:
        why = f"{data.name} has no val/ folder: nothing to evaluate on"
    elif len(data.train) > _EVALUATED:
        why = f"{len(data.train):,} images are many: evaluate with moco-ext linear {options.output}"
    else:
        why = ""
        with options.console.status("evaluating"):
            untrained.to(options.device)
            estimate_batchnorm_(untrained, data, data.train, device=options.device, workers=options.workers)
            features = all_features(data, options, untrained=untrained, trained=model.encoder_q)
            if first:
                summary |= top1(data, features, config.knn_k)
    if not first:
        return summary
    if why:
        warnings.warn(f"data: {why}", stacklevel=2)
    summary["seconds"] = records[-1]["seconds"]
    write_json(options.output / "summary.json", summary)

    with options.console.status("writing the report"):
        write_report(options.output / "report.html", config, data, records, summary, features)
    options.console.print(summary_table(summary))
    options.console.print(
        f"{options.output}/: checkpoint.pth, metrics.jsonl, summary.json, report.html", highlight=False
    )
    return summary


def summary_table(summary: dict[str, Any]) -> Table:
    seconds = summary["seconds"]
    table = Table(title=f"{summary['data']}: top-1 on the test images, %", caption=f"trained in {seconds:.0f} s")
    table.add_column("features")
    for protocol in ("kNN", "linear"):
        table.add_column(protocol, justify="right")
    for name in summary.get("knn_top1", {}):
        label = {"pixels": "raw pixels", "untrained": "untrained encoder", "trained": "trained encoder"}[name]
        style = "bold" if name == "trained" else None
        scores = (f"{summary[protocol][name]:.1f}" for protocol in ("knn_top1", "linear_top1"))
        table.add_row(label, *scores, style=style)
    return table
