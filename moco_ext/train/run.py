"""A whole run: train, evaluate pixels, untrained and trained encoder, write summary and report."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor, nn

from .. import distributed
from ..data import ImageData
from ..evaluate import encoder_features, estimate_batchnorm_, knn_top1, linear_top1, pixel_features
from .checkpoint import write_atomically
from .config import PretrainConfig
from .pretrain import Run, build_model, pretrain

_EVALUATED = 200_000  # images; of more, features and a solved linear classifier are a job of their own
Features = dict[str, tuple[Tensor, Tensor]]  # representation -> rows of the train and of the test split


def pretrain_and_evaluate(config: PretrainConfig, data: ImageData, run: Run) -> dict[str, Any]:
    """Everything ``moco-ext pretrain`` does; returns what it writes to ``summary.json``.

    The summary is ``{"data", "seconds", "knn_top1", "linear_top1"}``: training time, and top-1 accuracy in
    percent for ``"pixels"``, ``"untrained"`` (the encoder at its random start, with BatchNorm statistics of the
    training images) and ``"trained"``. An image folder without ``val/`` is trained on but not evaluated, one of more
    than 200,000 images not here: ``moco-ext linear`` is for that.
    """
    first = distributed.rank() == 0
    if first:
        run.output.mkdir(parents=True, exist_ok=True)
        _write_json(run.output / "config.json", dataclasses.asdict(config))
    model = build_model(config, len(data.train))
    untrained = copy.deepcopy(model.encoder_q)
    records = pretrain(config, data, run, model)

    summary: dict[str, Any] = {"data": config.data}
    features: Features = {}
    if data.test is None:
        why = f"{data.name} has no val/ folder: nothing to evaluate on"
    elif len(data.train) > _EVALUATED:
        why = f"{len(data.train):,} images are many: evaluate with moco-ext linear {run.output}"
    else:
        why = ""
        with run.console.status("evaluating"):
            untrained.to(run.device)
            estimate_batchnorm_(untrained, data, data.train, device=run.device, workers=run.workers)
            features = all_features(data, run, untrained=untrained, trained=model.encoder_q)
            if first:
                summary |= top1(data, features, config.knn_k)
    if not first:
        return summary
    if why:
        warnings.warn(f"data: {why}", stacklevel=2)
    summary["seconds"] = records[-1]["seconds"]
    _write_json(run.output / "summary.json", summary)

    from ..report import write_report

    with run.console.status("writing the report"):
        write_report(run.output / "report.html", config, data, records, summary, features)
    run.console.print(summary_table(summary))
    run.console.print(f"{run.output}/: checkpoint.pth, metrics.jsonl, summary.json, report.html", highlight=False)
    return summary


def all_features(data: ImageData, run: Run, **encoders: nn.Module) -> Features:
    """Features of both splits: pixels first, then each encoder by its name."""
    train, test = data.splits
    features = {
        "pixels": (pixel_features(data, train, workers=run.workers), pixel_features(data, test, workers=run.workers))
    }
    for name, encoder in encoders.items():
        encoder.to(run.device)
        rows = [
            encoder_features(encoder, data, split, device=run.device, workers=run.workers) for split in (train, test)
        ]
        features[name] = (rows[0], rows[1])
    return features


def top1(data: ImageData, features: Features, knn_k: int) -> dict[str, dict[str, float]]:
    """kNN and linear top-1 in percent of every representation."""
    scores: dict[str, dict[str, float]] = {"knn_top1": {}, "linear_top1": {}}
    train_labels, test_labels = (split.labels for split in data.splits)
    for name, (train, test) in features.items():
        task = (train, train_labels, test, test_labels)
        scores["knn_top1"][name] = round(knn_top1(*task, k=knn_k), 2)
        scores["linear_top1"][name] = round(linear_top1(*task), 2)
    return scores


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


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))
