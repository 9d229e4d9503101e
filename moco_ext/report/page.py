"""The HTML page about runs: the data that ``templates/report.html.j2`` shows."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from ..data import ImageData
from ..evaluate.scores import LABELS, few_label_cells
from ..runs.files import read_json, write_atomically
from ..train.config import PretrainConfig
from ..train.mechanisms import has_setting
from .gallery import feature_map, neighbors
from .plots import RUN_COLORS, Axes, Line, curves
from .read import Gallery, ImageSet, ReportedRun, titles
from .verdict import collapsed, learned

_PROTOCOLS = ("knn", "linear")
# Losses and contrast accuracies of runs that differ in one of these cannot be compared.
_TASK_SETTINGS = ("data", "dictionary", "moco_k", "moco_t", "symmetric")


def write_report(
    path: str | Path,
    config: PretrainConfig,
    data: ImageData,
    records: list[dict[str, Any]],
    summary: dict[str, Any],
    features: dict[str, tuple[Tensor, Tensor]],
) -> None:
    """Write a page about one run to ``path``, atomically. The page is self-contained.

    Args:
        records: as returned by :func:`moco_ext.train.pretrain`.
        summary: the content of ``summary.json``; without scores, the page has no evaluation.
        features: rows [N, D] of the training and the test split by representation; may be empty.
    """
    folder = Path(path).parent
    made = read_json(folder / "environment.json")
    run = ReportedRun(folder.name, dataclasses.asdict(config), records, summary, environment=made)
    shown = {LABELS.get(name, name): rows for name, rows in features.items()}
    page = compose([run], [Gallery.of(data, shown)] if features else [])
    write_atomically(path, lambda file: file.write(page.encode()))


def compose(runs: Sequence[ReportedRun], galleries: Sequence[Gallery]) -> str:
    """The page about one run, or comparing several, as HTML."""
    several = len(runs) > 1
    sets = titles(runs)
    on = ", ".join(dict.fromkeys(Path(images.data).name for images in sets))
    differing = _differing(runs)
    shown = [{"data": g.title or g.data.name, "neighbors": neighbors(g), "map": feature_map(g)} for g in galleries]
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            title=f"{len(runs)} runs on {on}" if several else f"MoCo on {on}",
            lead=_lead_of_several(differing) if several else _lead(runs[0], galleries),
            switches=[run.name for run in runs] if several else [],
            answers=[(run.name, learned(run), collapsed(run)) for run in runs],
            run_colors=RUN_COLORS,
            results=[_results(runs, images, title) for images, title in sets.items()],
            label_free=[(run.name, *_label_free(run)) for run in runs if run.summary.get("label_free")],
            differing=[(name, [_setting(run, name) for run in runs]) for name in differing],
            unrecorded=_unrecorded(runs),
            training=_training(runs),
            ends=[_End(run.name, _last_metrics(run)) for run in runs] if several else [],
            incomparable=", ".join(name for name in differing if name in _TASK_SETTINGS),
            diagnostics=_diagnostics(runs),
            galleries=shown,
            made_with=[(run.name, made) for run in runs if (made := _made_with(run))],
            common=[(name, _plain(value)) for name, value in _settings(runs).items() if name not in differing],
        )
    )
    return page.encode(errors="replace").decode()  # names of files may be no text


def environment() -> Environment:
    """Of the templates of all pages."""
    return Environment(
        loader=PackageLoader("moco_ext.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )


def _lead(run: ReportedRun, galleries: Sequence[Gallery]) -> str:
    parts = [run.config["arch"]]
    if galleries:
        data = galleries[0].data
        test = f", {len(data.test):,} test images" if data.test else ""
        parts.append(f"{len(data.train):,} training images{test}")
    parts.append(f"{_progress(run)} in {_duration(run.records[-1]['seconds'])}")
    return " · ".join([*parts, _mechanism(run.config)])


def _lead_of_several(differing: Sequence[str]) -> str:
    return f"They differ in {', '.join(differing)}." if differing else "Their configurations are the same."


def _mechanism(config: dict[str, Any]) -> str:
    dictionary = config.get("dictionary", "queue")
    return f"queue of {config['moco_k']:,} keys" if dictionary == "queue" else dictionary


def _made_with(run: ReportedRun) -> tuple[str, str] | None:
    """The command, and what it ran on; None for a run that has not recorded them."""
    made = run.environment
    if not made:
        return None
    commit = f" (commit {made['commit']}{', with changes' if made['changed'] else ''})" if made["commit"] else ""
    versions = f"moco_ext {made['moco_ext']}{commit}, torch {made['torch']}, Python {made['python']}"
    return made["command"], f"{versions}; {made['device']}, {made['threads']} CPU threads; {made['started']}"


def _chance_losses(runs: Sequence[ReportedRun]) -> dict[str, float]:
    """log(K + 1) of each K, by label; the end-to-end mechanism has no K."""
    configs = (run.config for run in runs)
    sizes = {config["moco_k"] for config in configs if has_setting(config.get("dictionary", "queue"), "moco_k")}
    return {f"chance loss: log(K + 1) = {math.log(K + 1):.2f}": math.log(K + 1) for K in sorted(sizes)}


# --- results ------------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """A row of the table of results.

    Attributes:
        color: CSS variable of the bars.
        scores: top-1 by protocol.
        css: class of the row.
        start: scores of the untrained encoder, marked on the bars.
        others: scores without a bar, by heading.
    """

    label: str
    color: str
    scores: dict[str, float]
    css: str = ""
    start: dict[str, float] = {}  # noqa: RUF012
    others: dict[str, str] = {}  # noqa: RUF012


def _results(runs: Sequence[ReportedRun], images: ImageSet, title: str) -> dict[str, Any]:
    numbered = [(i, run) for i, run in enumerate(runs) if run.images == images]
    rows = _rows_of_one(runs[0]) if len(runs) == 1 else _rows_of_several(numbered)
    # Bars start at the round number below the lowest score, so that differences near 100 % are visible.
    lowest = min((score for row in rows for score in [*row.scores.values(), *row.start.values()]), default=0)
    ks = sorted({run.config["knn_k"] for _, run in numbered if "knn_k" in run.config})
    baseline = ""
    if any(row.start for row in rows):
        baseline = "The mark on a bar"
    elif any(row.color == "untrained" for row in rows):
        baseline = "The untrained encoder"
    return {
        "data": title,
        "rows": rows if any(row.scores or row.others for row in rows) else [],
        "others": list(dict.fromkeys(name for row in rows for name in row.others)),
        "few": any(few_label_cells(run.summary) for _, run in numbered),
        "floor": max(0, math.floor(lowest / 10 - 1e-9) * 10),
        "nearest": f"{ks[0]} nearest" if len(ks) == 1 else f"nearest ({', '.join(map(str, ks))}: see knn_k)",
        "baseline": baseline,
    }


def _rows_of_one(run: ReportedRun) -> list[_Row]:
    rows = []
    for name, label in LABELS.items():
        scores, trained = run.scores(name), name == "trained"
        others = _few_labels(run, name) | _on_other_data(run, name) | (_supervised(run) if trained else {})
        if scores or others:
            rows.append(_Row(label, "run0" if trained else name, scores, "trained" if trained else "", others=others))
    return rows


def _rows_of_several(numbered: Sequence[tuple[int, ReportedRun]]) -> list[_Row]:
    """Raw pixels (once, if all runs agree on them) and the encoder of each run."""
    pixels: dict[tuple, list[str]] = {}
    few: dict[tuple, dict[str, str]] = {}
    encoders = []
    for i, run in numbered:
        if run.scores("pixels"):
            pixels.setdefault(scores := tuple(run.scores("pixels").items()), []).append(run.name)
            few.setdefault(scores, {}).update(_few_labels(run, "pixels"))
        color = f"run{i % RUN_COLORS}"
        encoders.append(
            _Row(
                run.name,
                color,
                run.scores("trained"),
                f"r{i}",
                run.scores("untrained"),
                _few_labels(run, "trained") | _on_other_data(run, "trained") | _supervised(run),
            )
        )
    label = LABELS["pixels"]
    labels = {s: label if len(pixels) == 1 else f"{label}, as in {', '.join(names)}" for s, names in pixels.items()}
    return [_Row(labels[scores], "pixels", dict(scores), others=few[scores]) for scores in pixels] + encoders


def _few_labels(run: ReportedRun, representation: str) -> dict[str, str]:
    cells = few_label_cells(run.summary)
    return {column: values[representation] for column, values in cells.items() if representation in values}


def _on_other_data(run: ReportedRun, representation: str) -> dict[str, str]:
    """Top-1 of ``moco-ext knn`` and ``linear`` on labeled data that the run was not trained on."""
    scores = {}
    for protocol, label in (("knn", "kNN"), ("linear", "linear")):
        result = run.evaluations.get(protocol, {})
        top1 = result.get(f"{protocol}_top1", {})
        if run.other_data(protocol) and representation in top1:
            scores[f"{label}{_labels(result, ', ')}{_on(run, protocol)}"] = f"{top1[representation]:.1f}"
    return scores


def _supervised(run: ReportedRun) -> dict[str, str]:
    """Top-1 of the classifiers trained by SGD, from the results of ``moco-ext linear`` and ``finetune``."""
    linear, finetune = run.evaluations.get("linear", {}), run.evaluations.get("finetune", {})
    scores = {f"linear, SGD{_labels(linear, ', ')}{_on(run, 'linear')}": linear["top1"]} if "top1" in linear else {}
    if "top1" in finetune:
        used = _labels(finetune) or f"{100 * finetune['fraction']:g} % of labels"
        scores[f"fine-tuned, {used}{_on(run, 'finetune')}"] = finetune["top1"]
    return {name: f"{score:.1f}" for name, score in scores.items()}


def _on(run: ReportedRun, command: str) -> str:
    data = run.other_data(command)
    return f" on {Path(data).name}" if data else ""


def _labels(result: dict[str, Any], before: str = "") -> str:
    per_class = result.get("labels_per_class")
    return f"{before}{per_class} labels per class" if per_class else ""


def _label_free(run: ReportedRun) -> tuple[list[tuple[str, dict[str, float]]], str]:
    scores = run.summary["label_free"]
    rows = [(LABELS[name], values) for name, values in scores.items() if name in LABELS]
    return rows, f"{scores['images']:,} {scores['split']} images"


# --- curves -------------------------------------------------------------------------------------------------


class _Chart(NamedTuple):
    title: str
    levels: Sequence[str]
    svg: str


class _End(NamedTuple):
    """The last metrics of a run, by heading; None where there are none."""

    name: str
    cells: dict[str, str | None]


def _training(runs: Sequence[ReportedRun]) -> list[_Chart]:
    pixels = {run.top1("knn")["pixels"] for run in runs if "pixels" in run.top1("knn")}
    baseline = {f"raw pixels: {score:.1f}": score for score in pixels} if len(pixels) == 1 else {}
    x = _axis(runs)
    charts = [
        _chart(runs, "loss", "Contrastive loss (nats)", Axes(x, _chance_losses(runs))),
        _chart(runs, "acc1", "Contrast accuracy, top-1 (%)", Axes(x, floor=0)),
        _chart(runs, "acc5", "Contrast accuracy, top-5 (%)", Axes(x, floor=0)),
        _chart(runs, "knn_top1", "kNN top-1 on test images (%)", Axes(x, baseline), from_untrained=True),
        _chart(runs, "lr", "Learning rate", Axes(x, floor=0)),
        _chart(runs, "images_per_second", "Speed (images/s)", Axes(x, floor=0)),
    ]
    return [chart for chart in charts if chart]


def _diagnostics(runs: Sequence[ReportedRun]) -> list[_Chart]:
    x = _axis(runs)
    sizes = sorted({run.config["moco_k"] for run in runs if run.curve("effective_negatives")[1]})
    all_keys = {f"all K = {K:,}": float(K) for K in sizes}
    ages = sorted({round(age[-1]) for run in runs if (age := run.curve("key_age")[1])})
    old = f", {' or '.join(map(str, ages))} steps" if ages else ""
    charts = [
        _chart(runs, "feature_std", "Spread of queries (0 none, 1 even)", Axes(x, floor=0)),
        _chart(runs, "effective_rank", "Effective rank of a batch of queries", Axes(x, floor=0)),
        _chart(runs, "effective_negatives", "Effective negatives", Axes(x, all_keys, floor=1, log=True)),
        _chart(runs, "key_drift", f"Key drift (1 - cosine{old})", Axes(x, floor=0)),
        _chart(runs, "query_norm", "Norm of a query, ‖q‖", Axes(x, floor=0)),
        _chart(runs, "query_grad_norm", "Gradient at a query, N · ‖∂loss/∂q‖", Axes(x, floor=0)),
    ]
    return [chart for chart in charts if chart]


def _chart(
    runs: Sequence[ReportedRun], metric: str, title: str, axes: Axes, from_untrained: bool = False
) -> _Chart | None:
    """The curves of a metric; None if no run has it."""
    lines = []
    for i, run in enumerate(runs):
        xs, ys = run.curve(metric, axes.x)
        if not xs:
            continue
        untrained = run.top1("knn").get("untrained") if from_untrained else None
        if untrained is not None:
            xs, ys = [0, *xs], [untrained, *ys]
        lines.append(Line(xs, ys, i))
    return _Chart(title, list(axes.levels), curves(metric, lines, axes)) if lines else None


def _axis(runs: Sequence[ReportedRun]) -> str:
    """Epochs, unless a run is shorter than two of them."""
    by_steps = all("step" in record for run in runs for record in run.records)
    return "step" if by_steps and min(run.records[-1]["epoch"] for run in runs) < 2 else "epoch"


def _last_metrics(run: ReportedRun) -> dict[str, str | None]:
    last = run.records[-1]
    return {
        "trained": _progress(run),
        "time": _duration(last["seconds"]),
        "loss": _number(last.get("loss"), ".3f"),
        "top-1, %": _number(last.get("acc1"), ".1f"),
        "top-5, %": _number(last.get("acc5"), ".1f"),
        "images/s": _number(_median(run.curve("images_per_second")[1]), ",.0f"),
        "data wait": _number(_median([100 * share for share in run.curve("wait")[1]]), ".0f", " %"),
    }


# --- settings -----------------------------------------------------------------------------------------------


def _settings(runs: Sequence[ReportedRun]) -> dict[str, Any]:
    """Every setting that a run has, with one of its values."""
    return {name: value for run in runs for name, value in run.config.items()}


def _differing(runs: Sequence[ReportedRun]) -> list[str]:
    """Settings whose values differ between the runs that have them."""
    return [name for name in _settings(runs) if len({_setting(run, name) for run in runs if name in run.config}) > 1]


def _unrecorded(runs: Sequence[ReportedRun]) -> list[tuple[str, str]]:
    """Names of runs, and the settings that these runs, of another version, do not have."""
    names = _settings(runs)
    lacking: dict[str, list[str]] = {}
    for run in runs:
        lacking.setdefault(", ".join(name for name in names if name not in run.config), []).append(run.name)
    return [(", ".join(whose), settings) for settings, whose in lacking.items() if settings]


def _setting(run: ReportedRun, name: str) -> str | None:
    return _plain(run.config[name]) if name in run.config else None


# --- formats ------------------------------------------------------------------------------------------------


def _progress(run: ReportedRun) -> str:
    last = run.records[-1]
    if run.config.get("steps"):
        return f"{last['step']:,} steps"
    return "1 epoch" if last["epoch"] == 1 else f"{last['epoch']:g} epochs"


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _number(value: float | None, form: str, unit: str = "") -> str | None:
    return None if value is None else f"{value:{form}}{unit}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _plain(value: Any) -> str:
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
