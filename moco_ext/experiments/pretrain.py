"""A whole run: training, evaluation of pixels, untrained and trained encoder, summary and report."""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from typing import Any

import torch
from rich.table import Table

from .. import distributed
from ..data import ImageData
from ..evaluate.label_free import label_free_scores, scored_split
from ..evaluate.scores import LABELS, Features, all_features, few_label_cells, few_label_top1, top1
from ..mechanism import Mechanism
from ..report import write_report
from ..runs.console import phase
from ..runs.directory import claim, report_unreadable
from ..runs.environment import environment
from ..runs.files import write_json
from ..runs.options import RunOptions
from ..train.config import PretrainConfig
from ..train.model import build_model
from ..train.trainer import Trainer

_EVALUATED = 200_000  # images; with more, features and the linear classifier would take too much memory and time


def pretrain_and_evaluate(config: PretrainConfig, data: ImageData, options: RunOptions) -> dict[str, Any]:
    """Everything ``moco-ext pretrain`` does; returns the content of ``summary.json``.

    The summary is ``{"data", "seconds", "knn_top1", "linear_top1", "few_labels"}``: training time, and top-1 accuracy
    in percent of ``"pixels"``, ``"untrained"`` (the encoder at its random start, with BatchNorm statistics of the
    training images) and ``"trained"``. ``"few_labels"`` is :func:`moco_ext.evaluate.scores.few_label_top1`, left out
    without enough images. It has no accuracies without labeled test images or with more than 200,000 images; without
    labeled test images it has ``"label_free"``, :func:`moco_ext.evaluate.label_free_scores` of both encoders.

    Files that cannot be decoded are listed in ``unreadable.txt`` and left out of the evaluation.
    """
    if len(data.train) < 2:
        raise ValueError(f"data: expected at least two training images in {data.name}, got {len(data.train)}")
    # Before the directory is created, as it may not fit in memory.
    model = build_model(config, len(data.train), data.size)
    with claim(options):
        return _pretrain_and_evaluate(config, data, options, model)


def _pretrain_and_evaluate(
    config: PretrainConfig, data: ImageData, options: RunOptions, model: Mechanism
) -> dict[str, Any]:
    first = distributed.rank() == 0
    untrained = copy.deepcopy(model.encoder_q)
    trainer = Trainer(config, data, options, model)
    if first:
        write_json(options.output / "config.json", dataclasses.asdict(config))
        started = {"directory": os.getcwd()}  # from which relative paths of the data start
        write_json(options.output / "environment.json", environment(options.device) | started)
    records = trainer.train()

    summary: dict[str, Any] = {"data": config.data}
    features: Features = {}
    reason = data.why_not_scored
    with phase(options.console, "evaluating"):
        trained = trainer.encoder()
        if len(data.train) > _EVALUATED:
            reason = f"{data.name} has more than {_EVALUATED:,} images"
        else:
            features = all_features(data, options, untrained=untrained, trained=trained, precision=config.precision)
        report_unreadable(options, data.unite_unreadable())
        if first and not reason:
            summary |= top1(data, features, config.knn_k) | {"test_images": len(data.splits[1])}
            summary |= {"few_labels": few} if (few := few_label_top1(data, features)) else {}
        elif first and data.why_not_scored:
            summary["label_free"] = _label_free(config, data, options, untrained=untrained, trained=trained)
    if not first:
        return summary
    summary["seconds"] = records[-1]["seconds"]
    write_json(options.output / "summary.json", summary)

    with phase(options.console, "writing the report"):
        write_report(options.output / "report.html", config, data, records, summary, features)
    if reason and data.classes:
        warnings.warn(f"data: {reason}: accuracy not measured", stacklevel=2)
    if "knn_top1" in summary:
        options.console.print(summary_table(summary))
    else:
        if "label_free" in summary:
            options.console.print(_label_free_table(summary))
        elsewhere = " --data DATA" if data.why_not_scored else ""
        line = f"trained in {summary['seconds']:.0f} s; to evaluate: moco-ext linear {options.output}{elsewhere}"
        options.console.print(line, highlight=False, soft_wrap=True)
    options.console.print(
        f"{options.output}/: checkpoint.pth, metrics.jsonl, summary.json, report.html", highlight=False
    )
    return summary


def _label_free(
    config: PretrainConfig, data: ImageData, options: RunOptions, **encoders: torch.nn.Module
) -> dict[str, Any]:
    scores = {
        name: label_free_scores(
            encoder.to(options.device),
            data,
            config.augmentation(data),
            device=options.device,
            workers=options.workers,
            precision=config.precision,
        )
        for name, encoder in encoders.items()
    }
    images = [score.pop("images") for score in scores.values()][-1]
    return scores | {"images": images, "split": "training" if scored_split(data) is data.train else "held-out"}


def _label_free_table(summary: dict[str, Any]) -> Table:
    scores = summary["label_free"]
    title = f"{summary['data']}: two views of {scores['images']:,} {scores['split']} images"
    table = Table("encoder", title=title)
    for column in ("contrast top-1, %", "alignment", "uniformity", "effective rank"):
        table.add_column(column, justify="right")
    for name in ("untrained", "trained"):
        s = scores[name]
        cells = f"{s['contrast_top1']:.1f}", f"{s['alignment']:.3f}", f"{s['uniformity']:.2f}", f"{s['rankme']:.1f}"
        table.add_row(LABELS[name], *cells, style="bold" if name == "trained" else None)
    return table


def summary_table(summary: dict[str, Any]) -> Table:
    """The accuracies of a run's summary, for the terminal."""
    caption = f"trained in {summary['seconds']:.0f} s"
    table = Table("features", title=f"{summary['data']}: top-1 on the test images, %", caption=caption)
    protocols = {"kNN": summary["knn_top1"], "linear": summary["linear_top1"]}
    few = few_label_cells(summary)
    for protocol in (*protocols, *few):
        table.add_column(protocol, justify="right")
    for name in summary["knn_top1"]:
        scores = [f"{accuracies[name]:.1f}" for accuracies in protocols.values()] + [few[key][name] for key in few]
        table.add_row(LABELS[name], *scores, style="bold" if name == "trained" else None)
    return table
