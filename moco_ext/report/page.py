"""The page itself, section by section."""

from __future__ import annotations

import dataclasses
import html
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data import ImageData
from ..runs.files import write_atomically
from ..train.config import PretrainConfig
from .gallery import feature_map, neighbours
from .plots import Axes, Line, curves
from .read import Gallery, ReportedRun
from .style import CSS, PAGE, section, switches

_LABELS = {"pixels": "raw pixels", "untrained": "untrained encoder", "trained": "trained encoder"}
_PROTOCOLS = {"knn": "kNN", "linear": "linear"}
_ABSENT = "&ndash;"


def write_report(
    path: str | Path,
    config: PretrainConfig,
    data: ImageData,
    records: list[dict[str, Any]],
    summary: dict[str, Any],
    features: dict[str, tuple[Tensor, Tensor]],
) -> None:
    """Write the page about one run to ``path``, atomically. It requests nothing from anywhere.

    Args:
        records: as :func:`moco_ext.train.pretrain` returns them.
        summary: as written to ``summary.json``; without scores, the page has no evaluation.
        features: rows [N, D] of the training and the test split for each representation; may be empty.
    """
    run = ReportedRun(Path(path).parent.name, dataclasses.asdict(config), records, summary)
    shown = {_LABELS.get(name, name): rows for name, rows in features.items()}
    page = compose([run], [Gallery(data, shown)] if features else [])
    write_atomically(path, lambda file: file.write(page.encode()))


def compose(runs: Sequence[ReportedRun], galleries: Sequence[Gallery]) -> str:
    """The page about ``runs``: of one what became of it, of several how they compare; HTML."""
    names = list(dict.fromkeys(run.config["data"] for run in runs))
    sections = [_results(runs, name, several_sets=len(names) > 1) for name in names]
    if len(runs) > 1:
        sections.append(_differences(runs))
    sections += [_training(runs), _health(runs)]
    for gallery in galleries:
        sections += [neighbours(gallery), feature_map(gallery)]
    sections.append(_configuration(runs))
    on = ", ".join(Path(name).name for name in names)
    title = f"MoCo on {on}" if len(runs) == 1 else f"{len(runs)} runs on {on}"
    lead = _lead(runs[0], galleries) if len(runs) == 1 else _differing_lead(runs)
    bar, rules = switches([run.name for run in runs]) if len(runs) > 1 else ("", "")
    return PAGE.format(
        title=html.escape(title), lead=html.escape(lead), switches=bar, body="\n".join(sections), css=CSS + rules
    )


def _lead(run: ReportedRun, galleries: Sequence[Gallery]) -> str:
    config, last = run.config, run.records[-1]
    parts = [config["arch"]]
    if galleries:
        train, test = galleries[0].data.splits
        parts.append(f"{len(train):,} training images, {len(test):,} test images")
    parts.append(f"{_progress(run)} in {_duration(last['seconds'])}")
    if config.get("dictionary", "queue") == "queue":
        parts.append(f"queue of {config['moco_k']:,} keys")
    else:
        parts.append(config["dictionary"])
    return " · ".join(parts)


def _differing_lead(runs: Sequence[ReportedRun]) -> str:
    differing = _differing(runs)
    return f"They differ in {', '.join(differing)}." if differing else "Their configurations are the same."


# --- results ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Row:
    """Of the table of results: ``colour`` is a CSS variable's name; ``start`` are scores marked on the bars."""

    label: str
    colour: str
    scores: dict[str, float]
    css: str = ""
    start: dict[str, float] = dataclasses.field(default_factory=dict)
    others: dict[str, float] = dataclasses.field(default_factory=dict)


def _results(runs: Sequence[ReportedRun], data: str, several_sets: bool) -> str:
    numbered = [(i, run) for i, run in enumerate(runs) if run.config["data"] == data]
    rows = _rows_of_one(runs[0]) if len(runs) == 1 else _rows_of_several(numbered)
    title = "What the features are worth" + (f"<small>{html.escape(data)}</small>" if several_sets else "")
    scored = [row.scores[protocol] for row in rows for protocol in row.scores]
    others = list(dict.fromkeys(name for row in rows for name in row.others))
    if not scored and not others:
        return section(title, "<p>Not evaluated: there are no labelled test images, or no scores yet.</p>")
    # Bars start at the round number under the lowest score, so that differences near 100 % can be seen.
    lowest = min([*scored, *(s for row in rows for s in row.start.values())], default=0)
    floor = max(0, math.floor(lowest / 10 - 1e-9) * 10)

    def cell(row: _Row, protocol: str) -> str:
        if protocol not in row.scores:
            return f"<td>{_ABSENT}</td>"
        mark = _place(row.start[protocol], floor) if protocol in row.start else None
        tick = f'<s style="left:{mark:.1f}%"></s>' if mark is not None else ""
        bar = f'<i style="width:{_place(row.scores[protocol], floor):.1f}%;background:var(--{row.colour})"></i>'
        return f'<td><div class="score"><div class="bar">{bar}{tick}</div><b>{row.scores[protocol]:.1f}</b></div></td>'

    body = "".join(
        f'<tr class="{row.css}"><th scope="row">{html.escape(row.label)}</th>'
        + "".join(cell(row, protocol) for protocol in _PROTOCOLS)
        + "".join(f"<td><b>{_number(row.others.get(name), '.1f')}</b></td>" for name in others)
        + "</tr>"
        for row in rows
    )
    heads = "".join(f"<th>{label}</th>" for label in [*_PROTOCOLS.values(), *others])
    table = f'<div class="scroll"><table class="results"><tr><td></td>{heads}</tr>{body}</table></div>'
    return section(title, table, _results_note([run for _, run in numbered], floor, rows))


def _rows_of_one(run: ReportedRun) -> list[_Row]:
    rows = []
    for name in _LABELS:
        scores = {protocol: run.top1(protocol)[name] for protocol in _PROTOCOLS if name in run.top1(protocol)}
        others = _supervised(run) if name == "trained" else {}
        if scores or others:
            colour = "run0" if name == "trained" else name
            rows.append(_Row(_LABELS[name], colour, scores, "trained" if name == "trained" else "", others=others))
    return rows


def _rows_of_several(numbered: Sequence[tuple[int, ReportedRun]]) -> list[_Row]:
    """Raw pixels (once, if all runs agree on them) and each run's encoder, its untrained score a mark on its bar."""
    pixels: dict[tuple, list[str]] = {}
    encoders = []
    for i, run in numbered:
        by_protocol = {protocol: run.top1(protocol) for protocol in _PROTOCOLS}
        of = {name: {p: s[name] for p, s in by_protocol.items() if name in s} for name in _LABELS}
        if of["pixels"]:
            pixels.setdefault(tuple(of["pixels"].items()), []).append(run.name)
        encoders.append(_Row(run.name, f"run{i}", of["trained"], f"r{i}", of["untrained"], _supervised(run)))
    baselines = [
        _Row(
            _LABELS["pixels"] if len(pixels) == 1 else f"{_LABELS['pixels']}, as in {', '.join(names)}",
            "pixels",
            dict(s),
        )
        for s, names in pixels.items()
    ]
    return baselines + encoders


def _supervised(run: ReportedRun) -> dict[str, float]:
    """Top-1 of the protocols that train by SGD, as ``moco-ext linear`` and ``finetune`` have left them."""
    linear, finetune = run.evaluations.get("linear", {}), run.evaluations.get("finetune", {})
    scores = {"linear, SGD": linear["top1"]} if "top1" in linear else {}
    if "top1" in finetune:
        scores[f"fine-tuned, {100 * finetune['fraction']:g} % of labels"] = finetune["top1"]
    return scores


def _results_note(runs: Sequence[ReportedRun], floor: int, rows: Sequence[_Row]) -> str:
    ks = sorted({run.config["knn_k"] for run in runs})
    nearest = f"{ks[0]} nearest" if len(ks) == 1 else f"nearest ({', '.join(map(str, ks))}: see knn_k)"
    note = (
        f"Top-1 accuracy on the test images, %; bars from {floor} to 100. kNN: {nearest} training images "
        "by cosine, votes weighted by exp(cosine / 0.07). Linear: multinomial logistic regression on standardised "
        "features. "
    )
    baseline = "with BatchNorm statistics of the training images, evaluated in the same way."
    if any(row.start for row in rows):
        return note + f"The mark on a bar is the same network at its random start, {baseline}"
    if any(row.colour == "untrained" for row in rows):
        return note + f"The untrained encoder is the same network at its random start, {baseline}"
    return note


def _place(score: float, floor: int) -> float:
    return 100 * (score - floor) / (100 - floor)


# --- curves -------------------------------------------------------------------------------------------------


def _training(runs: Sequence[ReportedRun]) -> str:
    sizes = sorted({run.config["moco_k"] for run in runs if run.config.get("dictionary") != "end-to-end"})
    chances = {f"chance: log(K + 1) = {math.log(k + 1):.2f}": math.log(k + 1) for k in sizes}
    pixels = {run.top1("knn")["pixels"] for run in runs if "pixels" in run.top1("knn")}
    baseline = {f"raw pixels: {score:.1f}": score for score in pixels} if len(pixels) == 1 else {}
    x = _axis(runs)
    charts = [
        _chart(runs, "loss", "Contrastive loss (nats)", Axes(x, chances)),
        _chart(runs, "acc1", "Contrast accuracy, top-1 (%)", Axes(x, floor=0)),
        _chart(runs, "acc5", "Contrast accuracy, top-5 (%)", Axes(x, floor=0)),
        _chart(runs, "knn_top1", "kNN top-1 on test images (%)", Axes(x, baseline), from_untrained=True),
        _chart(runs, "lr", "Learning rate", Axes(x, floor=0)),
        _chart(runs, "images_per_second", "Speed (images/s)", Axes(x, floor=0)),
    ]
    note = (
        "The first epochs look too good: the queue still holds the random vectors that it starts with, which are easy "
        "negatives. Contrast accuracy counts how often the other view of the same image scores above all negatives "
        "(top-1), or above all but four (top-5). "
    )
    unlike = [name for name in _differing(runs) if name in ("data", "dictionary", "moco_k", "moco_t", "symmetric")]
    if unlike:
        note += f"Losses and contrast accuracies of runs that differ in {', '.join(unlike)} are not comparable."
    return section("Training", _grid(charts) + (_ends(runs) if len(runs) > 1 else ""), note)


def _ends(runs: Sequence[ReportedRun]) -> str:
    """Where each run stood at its last record."""
    heads = ("", "trained", "time", "loss", "top-1, %", "top-5, %", "images/s", "data wait")
    rows = ""
    for i, run in enumerate(runs):
        last = run.records[-1]
        cells = (
            _progress(run),
            _duration(last["seconds"]),
            _number(last.get("loss"), ".3f"),
            _number(last.get("acc1"), ".1f"),
            _number(last.get("acc5"), ".1f"),
            _number(_median(run.curve("images_per_second")[1]), ",.0f"),
            _number(_median([100 * share for share in run.curve("wait")[1]]), ".0f", " %"),
        )
        name = f'<i class="dot" style="background:{_colour(i)}"></i>{html.escape(run.name)}'
        rows += f'<tr class="r{i}"><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f'<div class="scroll"><table class="figures"><tr>{head}</tr>{rows}</table></div>'


def _health(runs: Sequence[ReportedRun]) -> str:
    x = _axis(runs)
    sizes = sorted({run.config["moco_k"] for run in runs if run.curve("effective_negatives")[1]})
    all_keys = {f"all K = {k:,}": float(k) for k in sizes}
    ages = sorted({round(age[-1]) for run in runs if (age := run.curve("key_age")[1])})
    old = f", {' or '.join(map(str, ages))} steps" if ages else ""
    charts = [
        _chart(runs, "feature_std", "Spread of queries (0 none, 1 even)", Axes(x, floor=0)),
        _chart(runs, "effective_rank", "Effective rank of a batch's queries", Axes(x, floor=0)),
        _chart(runs, "effective_negatives", "Effective negatives", Axes(x, all_keys, floor=1, log=True)),
        _chart(runs, "key_drift", f"Key drift (1 - cosine{old})", Axes(x, floor=0)),
        _chart(runs, "query_norm", "Norm of a query, ‖q‖", Axes(x, floor=0)),
        _chart(runs, "query_grad_norm", "Gradient at a query, N · ‖∂loss/∂q‖", Axes(x, floor=0)),
    ]
    if not any(charts):
        return ""
    return section(
        "Health",
        _grid(charts),
        "Means over each record of figures taken every few steps. Spread: √dim times the standard deviation of unit "
        "queries over a batch; near 0, or with an effective rank (exp of the entropy of the singular values) near 1, "
        "the features have collapsed. Effective negatives: exp of the entropy of the softmax over the negatives; 1 if "
        "a single one counts. Key drift: how far the keys of a fixed few images have moved while such a key is in the "
        "queue; high at first, while BatchNorm's running statistics settle.",
    )


def _chart(runs: Sequence[ReportedRun], figure: str, title: str, axes: Axes, from_untrained: bool = False) -> str:
    """A figure with its caption; nothing if no run has any of it."""
    lines = []
    for i, run in enumerate(runs):
        xs, ys = run.curve(figure, axes.x)
        if not xs:
            continue
        untrained = run.top1("knn").get("untrained") if from_untrained else None
        if untrained is not None:
            xs, ys = [0, *xs], [untrained, *ys]
        lines.append(Line(xs, ys, i))
    if not lines:
        return ""
    levels = "".join(f"<small>{label}</small>" for label in axes.levels)
    return f"<figure><figcaption>{title}{levels}</figcaption>{curves(figure, lines, axes)}</figure>"


def _axis(runs: Sequence[ReportedRun]) -> str:
    """Epochs, unless a run is too short to have two of them."""
    by_steps = all("step" in record for run in runs for record in run.records)
    return "step" if by_steps and min(run.records[-1]["epoch"] for run in runs) < 2 else "epoch"


def _grid(charts: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(charts)}</div>'


# --- settings -----------------------------------------------------------------------------------------------


def _differing(runs: Sequence[ReportedRun]) -> list[str]:
    """Settings whose values are not the same in all runs that have them."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    return [name for name in names if len({_plain(run.config[name]) for run in runs if name in run.config}) > 1]


def _differences(runs: Sequence[ReportedRun]) -> str:
    differing = _differing(runs)
    if not differing:
        return section("What differs", "<p>Nothing: all settings are the same.</p>", _unrecorded(runs))
    head = "".join(
        f'<th class="r{i}"><i class="dot" style="background:{_colour(i)}"></i>{html.escape(run.name)}</th>'
        for i, run in enumerate(runs)
    )
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>'
        + "".join(f'<td class="r{i}">{_setting(run, name)}</td>' for i, run in enumerate(runs))
        + "</tr>"
        for name in differing
    )
    table = f'<table class="figures"><tr><th></th>{head}</tr>{rows}</table>'
    return section("What differs", f'<div class="scroll">{table}</div>', _unrecorded(runs))


def _unrecorded(runs: Sequence[ReportedRun]) -> str:
    """Settings that some runs, of another version, do not know."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    lacking: dict[str, list[str]] = {}
    for run in runs:
        lacking.setdefault(", ".join(name for name in names if name not in run.config), []).append(run.name)
    return " ".join(
        html.escape(f"Not recorded by {', '.join(whose)}: {settings}.")
        for settings, whose in lacking.items()
        if settings
    )


def _configuration(runs: Sequence[ReportedRun]) -> str:
    differing = _differing(runs)
    cells = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{_plain(value)}</dd></div>"
        for name, value in {name: value for run in runs for name, value in run.config.items()}.items()
        if name not in differing
    )
    title = "Configuration" if len(runs) == 1 else "What is the same"
    return section(title, f"<dl>{cells}</dl>")


def _progress(run: ReportedRun) -> str:
    last = run.records[-1]
    if run.config.get("steps"):
        return f"{last['step']:,} steps"
    return "1 epoch" if last["epoch"] == 1 else f"{last['epoch']:g} epochs"


def _colour(run: int) -> str:
    return f"var(--run{run % 8})"


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _number(value: float | None, form: str, unit: str = "") -> str:
    return _ABSENT if value is None else f"{value:{form}}{unit}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _setting(run: ReportedRun, name: str) -> str:
    return _plain(run.config[name]) if name in run.config else _ABSENT


def _plain(value: Any) -> str:
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return html.escape(" ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value))
