"""One self-contained HTML page about a run: results, curves, nearest neighbours, a map of the features."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import FolderSplit, ImageData, Split
from .evaluate import nearest
from .report_plots import Line, curves, feature_maps
from .train.checkpoint import write_atomically
from .train.config import PretrainConfig

_LABELS = {"pixels": "raw pixels", "untrained": "untrained encoder", "trained": "trained encoder"}
_QUERIES, _NEIGHBOURS, _MAP_POINTS, _PRECISION_ROWS = 10, 7, 1000, 2000


def write_report(
    path: str | Path,
    config: PretrainConfig,
    data: ImageData,
    records: list[dict[str, Any]],
    summary: dict[str, Any],
    features: dict[str, tuple[Tensor, Tensor]],
) -> None:
    """Write the page to ``path``, atomically. It requests nothing from anywhere.

    Args:
        records: one dictionary of metrics an epoch, as :func:`moco_ext.train.pretrain` returns them.
        summary: as written to ``summary.json``; without scores, the page has no evaluation.
        features: rows [N, D] of the training and the test split for each representation; may be empty.
    """
    sections = [_results(summary, config), _training(config, records, summary)]
    if features:
        sections += [_neighbours(data, features), _map(data, features)]
    sections.append(_configuration(config))
    title = f"MoCo on {data.name}"
    images = f"{len(data.train):,} training images" + (f", {len(data.test):,} test images" if data.test else "")
    lead = (
        f"{config.arch} · {images} · {len(records)} epochs in {_duration(summary['seconds'])} · "
        f"queue of {config.moco_k:,} keys"
    )
    page = _PAGE.format(title=html.escape(title), lead=html.escape(lead), body="\n".join(sections), css=_CSS)
    write_atomically(path, lambda file: file.write(page.encode()))


def _results(summary: dict[str, Any], config: PretrainConfig) -> str:
    if "knn_top1" not in summary:
        return _section("Result", "<p>Not evaluated: there are no labelled test images.</p>")
    # Bars start at the round number under the lowest score, so that differences near 100 % can be seen.
    lowest = min(min(summary[protocol].values()) for protocol in ("knn_top1", "linear_top1"))
    floor = max(0, math.floor(lowest / 10) * 10)
    rows = ""
    for name in summary["knn_top1"]:
        cells = ""
        for protocol in ("knn_top1", "linear_top1"):
            score = summary[protocol][name]
            width = 100 * (score - floor) / (100 - floor)
            cells += (
                f'<td><div class="score"><div class="bar"><i class="{name}" style="width:{width:.1f}%"></i></div>'
                f"<b>{score:.1f}</b></div></td>"
            )
        rows += f'<tr class="{name}"><th scope="row">{_LABELS[name]}</th>{cells}</tr>'
    head = "<tr><td></td><th>kNN</th><th>linear</th></tr>"
    return _section(
        "What the features are worth",
        f'<table class="results">{head}{rows}</table>',
        f"Top-1 accuracy on the test images, %; bars from {floor} to 100. kNN: {config.knn_k} nearest training images "
        "by cosine, votes weighted by exp(cosine / 0.07). Linear: multinomial logistic regression on standardised "
        "features. The untrained encoder is the same network at its random start, with BatchNorm statistics of the "
        "training images, evaluated in the same way.",
    )


def _training(config: PretrainConfig, records: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    epochs = [record["epoch"] for record in records]
    chance = math.log(config.moco_k + 1)
    charts = [
        (
            "Contrastive loss (nats)",
            [Line(epochs, [r["loss"] for r in records], "trained", "loss")],
            {f"chance, log(K+1) = {chance:.2f}": chance},
        ),
        (
            "Contrast accuracy (%)",
            [
                Line(epochs, [r["acc1"] for r in records], "trained", "top-1"),
                Line(epochs, [r["acc5"] for r in records], "untrained", "top-5"),
            ],
            {},
        ),
    ]
    evaluated = [record for record in records if "knn_top1" in record]
    if evaluated and "knn_top1" in summary:
        scores = summary["knn_top1"]
        start = [(0, scores["untrained"])] if "untrained" in scores else []
        points = start + [(record["epoch"], record["knn_top1"]) for record in evaluated]
        charts.append(
            (
                "kNN top-1 on test images (%)",
                [Line([p[0] for p in points], [p[1] for p in points], "trained", "encoder")],
                {"raw pixels": scores["pixels"]},
            )
        )
    figures = "".join(
        f"<figure><figcaption>{name}</figcaption>{curves(lines, levels)}</figure>" for name, lines, levels in charts
    )
    return _section(
        "Training",
        f'<div class="charts">{figures}</div>',
        "By epoch. The first epochs look too good: the queue still holds the random vectors that it starts with, "
        "which are easy negatives. Contrast accuracy counts how often the other view of the same image scores above "
        f"all {config.moco_k:,} keys of the queue (top-1), or above all but four (top-5).",
    )


def _neighbours(data: ImageData, features: dict[str, tuple[Tensor, Tensor]]) -> str:
    train_split, test_split = data.splits
    train_labels, test_labels = train_split.labels, test_split.labels
    queries = [int((test_labels == label).nonzero()[0]) for label in test_labels.unique()[:_QUERIES]]
    sample = torch.linspace(0, len(test_labels) - 1, min(_PRECISION_ROWS, len(test_labels))).long()
    found, heads = {}, ""
    for name, (train, test) in features.items():
        found[name] = nearest(train, test[queries], _NEIGHBOURS)
        closest = nearest(train, test[sample], _NEIGHBOURS)
        same = 100 * (train_labels[closest] == test_labels[sample, None]).double().mean().item()
        heads += f"<th>{_LABELS[name]}<small>{same:.1f} % of the same class</small></th>"
    rows = ""
    for row, query in enumerate(queries):
        label = int(test_labels[query])
        caption = html.escape(data.classes[label])
        cells = f'<th scope="row">{_thumbnail(test_split, query, data, caption)}<small>{caption}</small></th>'
        for name in features:
            thumbnails = "".join(
                _thumbnail(
                    train_split,
                    int(index),
                    data,
                    html.escape(data.classes[int(train_labels[index])]),
                    wrong=int(train_labels[index]) != label,
                )
                for index in found[name][row]
            )
            cells += f'<td><div class="strip">{thumbnails}</div></td>'
        rows += f"<tr>{cells}</tr>"
    return _section(
        "Nearest neighbours",
        f'<div class="scroll"><table class="neighbours"><tr><th>test image</th>{heads}</tr>{rows}</table></div>',
        f"The first test image of each class and its {_NEIGHBOURS} nearest training images by cosine, nearest first; "
        "those of another class are framed.",
    )


def _map(data: ImageData, features: dict[str, tuple[Tensor, Tensor]]) -> str:
    labels = data.splits[1].labels
    sample = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:_MAP_POINTS]
    maps, colours = feature_maps(
        {name: test[sample] for name, (_, test) in features.items()}, labels[sample], len(data.classes)
    )
    figures = "".join(f"<figure><figcaption>{_LABELS[name]}</figcaption>{svg}</figure>" for name, svg in maps.items())
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>'
        for name, colour in zip(data.classes, colours, strict=True)
    )
    legend = f'<p class="legend">{legend}</p>' if len(data.classes) <= 20 else ""
    return _section(
        "Map of the features",
        f'{legend}<div class="charts">{figures}</div>',
        f"t-SNE of {len(sample):,} test images, coloured by class; no representation has seen a label.",
    )


def _configuration(config: PretrainConfig) -> str:
    cells = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(_plain(value))}</dd></div>"
        for name, value in dataclasses.asdict(config).items()
    )
    return _section("Configuration", f"<dl>{cells}</dl>")


def _section(title: str, body: str, note: str = "") -> str:
    note = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{title}</h2>{body}{note}</section>"


def _thumbnail(split: Split, index: int, data: ImageData, caption: str, wrong: bool = False) -> str:
    from PIL import Image

    if isinstance(split, FolderSplit):
        image = split.dataset[index][0].convert("RGB")
        image.thumbnail((96, 96))
    else:
        pixels = split.images[index].permute(1, 2, 0).squeeze(-1).numpy()
        image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    source = base64.b64encode(buffer.getvalue()).decode()
    mark = ' class="wrong"' if wrong else ""
    return f'<img{mark} src="data:image/png;base64,{source}" alt="{caption}" title="{caption}">'


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else f"{value}"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{css}</style></head>
<body><main><header><h1>{title}</h1><p>{lead}</p></header>
{body}
</main></body></html>
"""

_CSS = """
:root { color-scheme: light dark; --ink: #1d2530; --soft: #5d6978; --line: #dfe4ea; --paper: #fbfbfa; --card: #fff;
  --pixels: #9aa5b1; --untrained: #e0973a; --trained: #2f6fdb; --wrong: #d6455d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #98a4b3; --line: #2c3440; --paper: #12161c;
  --card: #191f27; --pixels: #76828f; --untrained: #e5a352; --trained: #6aa1ff; --wrong: #f0687e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", "Noto Sans", sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1080px; margin: 0 auto; padding: 56px 24px 72px; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -.02em; margin: 0 0 8px; }
header p { color: var(--soft); margin: 0 0 40px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 26px 28px;
  margin: 0 0 24px; }
h2 { font-size: 19px; letter-spacing: -.01em; margin: 0 0 18px; }
.note { color: var(--soft); font-size: 14px; margin: 18px 0 0; max-width: 76ch; }
table { border-collapse: collapse; width: 100%; }
th { font-weight: 500; text-align: left; }
.results { max-width: 820px; }
.results tr:first-child th { color: var(--soft); font-size: 14px; padding-bottom: 6px; }
.results td, .results th { padding: 9px 28px 9px 0; border-top: 1px solid var(--line); }
.results tr:first-child > * { border: 0; }
.results th[scope] { white-space: nowrap; width: 1%; }
.results tr.trained th, .results tr.trained b { font-weight: 650; }
.score { display: flex; align-items: center; gap: 12px; }
.score b { font-weight: 450; min-width: 3em; text-align: right; }
.bar { flex: 1; height: 10px; border-radius: 5px; background: var(--line); overflow: hidden; }
.bar i { display: block; height: 100%; border-radius: 5px; }
i.pixels { background: var(--pixels); } i.untrained { background: var(--untrained); }
i.trained { background: var(--trained); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(290px, 1fr)); gap: 26px; }
figure { margin: 0; } figcaption { font-size: 14px; font-weight: 500; margin-bottom: 8px; }
svg { width: 100%; height: auto; display: block; } svg text { font-family: inherit !important; }
.scroll { overflow-x: auto; }
.neighbours th { font-size: 14px; padding: 4px 20px 8px 0; vertical-align: bottom; }
.neighbours td { padding: 4px 20px 4px 0; }
.neighbours small { display: block; color: var(--soft); font-weight: 400; font-size: 12.5px; }
.neighbours th[scope] { display: flex; align-items: center; gap: 9px; padding-bottom: 4px; white-space: nowrap; }
.neighbours img { width: 36px; height: 36px; object-fit: cover; image-rendering: pixelated; border-radius: 5px;
  display: block; }
.strip { display: flex; gap: 4px; }
.neighbours img.wrong { outline: 2.5px solid var(--wrong); outline-offset: -1px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 0 0 16px; font-size: 14px; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 6px; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 14px 22px; margin: 0; }
dt { color: var(--soft); font-size: 13px; } dd { margin: 0; overflow-wrap: anywhere; }
"""
