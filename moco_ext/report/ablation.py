"""Tables and plots of the results of an ablation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..runs.files import write_json

_TITLES = {
    "dictionary": "mechanism",
    "batch_size": "images per batch",
    "objective": "objective",
    "moco_m": "momentum m of the key encoder",
    "moco_k": "K, keys in the queue",
    "moco_t": "temperature T",
    "shuffle_bn": "shuffling BN",
    "key_encoder": "key encoder",
}
_COLUMNS = {  # heading -> metric, digits
    "kNN top-1, %": ("knn_top1", 2),
    "linear top-1, %": ("linear_top1", 2),
    "contrast acc@1, %": ("acc1", 1),
    "loss": ("loss", 3),
    "spread": ("feature_std", 2),
    "key drift": ("key_drift", 2),
    "seconds": ("seconds", 0),
}
_NUMBERS = ("batch_size", "moco_m", "moco_k", "moco_t")
_PROTOCOLS = {"knn_top1": ("kNN", "#2b6cb0", "o"), "linear_top1": ("linear", "#c05621", "s")}
_LINES = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ablations",  # the same results give the same file
    "font.size": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e2e8f0",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Write ``results.json``, ``results.md``, ``accuracy.svg`` and, if there is that axis, ``shuffling-bn.svg``."""
    write_json(folder / "results.json", results)
    plots = write_plots(results, folder)
    links = [f"![{name.removesuffix('.svg')}]({name})" for name in plots]
    (folder / "results.md").write_text("\n\n".join([markdown(results), *links]) + "\n")


def markdown(results: dict[str, Any]) -> str:
    """A table per axis: mean ± standard error over the seeds; training metrics are those of the last record.

    Spread and key drift are the ``feature_std`` and ``key_drift`` of :class:`moco_ext.train.diagnostics.Diagnostics`.
    """
    tables = [_setting(results)]
    for title, rows in results["tables"].items():
        lines = [f"| {' | '.join([_TITLES.get(title, title), *_COLUMNS, 'seeds'])} |"]
        lines.append(f"|---{'|--:' * (len(_COLUMNS) + 1)}|")
        for label, name in rows:
            runs = _finished(results, name)
            cells = []
            for metric, digits in _COLUMNS.values():
                found = [run["records"][-1] | run for run in runs]
                values = [run[metric] for run in found if metric in run]
                cells.append("NaN" if None in values else mean_and_error(values, digits))  # which JSON does not have
            seeds = ", ".join(str(run["seed"]) for run in runs)
            failed = ", ".join(str(run["seed"]) for run in _runs(results, name) if run["status"] == "failed")
            cells.append(seeds + f" (failed: {failed})" * bool(failed))
            mark = " (base)" if name == "base" else ""
            lines.append(f"| {' | '.join([label + mark, *cells])} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def mean_and_error(values: Sequence[float], digits: int) -> str:
    """Such as 12.3 ± 0.4, with the standard error of the mean; without it for one value, empty for none."""
    if not values:
        return ""
    error = f" ± {_standard_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):,.{digits}f}{error}"


def write_plots(results: dict[str, Any], folder: Path) -> list[str]:
    """Write the plots as SVG; returns the names of the files."""
    written = []
    with matplotlib.rc_context(_STYLE):
        tables = results["tables"]
        columns = min(3, len(tables))
        rows = -(-len(tables) // columns)
        tallest = max(len(table) for table in tables.values())
        figure = Figure(figsize=(4.2 * columns, (2.9 + 0.25 * max(0, tallest - 6)) * rows), layout="constrained")
        panels = np.atleast_1d(figure.subplots(rows, columns)).flatten()
        for axes, (title, table) in zip(panels, tables.items(), strict=False):
            _accuracy(axes, title, table, results)
        for axes in panels[len(tables) :]:
            axes.set_axis_off()
        panels[min(len(tables), len(panels) - 1)].legend(*panels[0].get_legend_handles_labels(), frameon=False)
        written.append(_save(figure, folder / "accuracy.svg"))
        if any(len(_curves(results, name)) for _, name in tables.get("shuffle_bn", [])):
            figure = Figure(figsize=(8.4, 3), layout="constrained")
            left, right = figure.subplots(1, 2)
            for axes, metric, label in ((left, "acc1", "contrast acc@1, %"), (right, "loss", "loss")):
                _curve(axes, metric, label, tables["shuffle_bn"], results)
            left.legend(frameon=False)
            written.append(_save(figure, folder / "shuffling-bn.svg"))
    return written


def _setting(results: dict[str, Any]) -> str:
    base, ran = results["base"], [run for run in results["runs"] if "seed" in run]
    length = f"{base['steps']:,} steps" if base["steps"] else f"{base['epochs']} epochs"
    made = [run["made_with"] for run in ran]

    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(str(each[name]) for each in made))

    changed = " with changes" if any(each["changed"] for each in made) else ""
    batches = dict.fromkeys(str(run.get("setting", {}).get("batch_size", base["batch_size"])) for run in ran)
    rate = f"{base['lr_base']:g} per 256 images" if base.get("lr_base") else f"{base['lr']:g}"
    text = (
        f"{results['data']}, {results['images']:,} training images, {length} of batch {', '.join(batches)}; base: "
        f"{base['arch']}{', MLP head' if base['mlp'] else ''}, {base['dictionary']}, m = {base['moco_m']:g}, "
        f"K = {base['moco_k']:,}, T = {base['moco_t']:g}, lr {rate}. {all_of('device')}, {all_of('threads')} "
        f"thread{'s' * (all_of('threads') != '1')}, torch {all_of('torch')}, commit "
        f"{all_of('commit')}{changed}. Mean ± standard error over the seeds."
    )
    for what, start in (("Raw pixels", "pixels"), ("The untrained encoder", "untrained"), ("The teacher", "teacher")):
        runs = [run for run in results["runs"] if run["name"].split(",")[0] == start]
        scores = [
            f"{name} {mean_and_error([run[key] for run in runs], 2)} %" for key, (name, _, _) in _PROTOCOLS.items()
        ]
        text += f" {what}: {', '.join(scores)}." if runs else ""
    return text


def _runs(results: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [run for run in results["runs"] if "seed" in run and run["name"] == f"{name},seed={run['seed']}"]


def _finished(results: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [run for run in _runs(results, name) if run["status"] == "finished"]


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _accuracy(axes: Axes, title: str, table: Sequence[tuple[str, str]], results: dict[str, Any]) -> None:
    """Numbers from left to right, connected; names from top to bottom."""
    numbers = title in _NUMBERS
    for protocol, (label, color, marker) in _PROTOCOLS.items():
        values = [[run[protocol] for run in _finished(results, name)] for _, name in table]
        means = [statistics.fmean(v) if v else math.nan for v in values]
        errors = [_standard_error(v) for v in values]
        positions = range(len(table))
        style: dict[str, Any] = {"color": color, "marker": marker, "capsize": 3, "label": label}
        if numbers:
            axes.errorbar(positions, means, yerr=errors, **style)
        else:
            axes.errorbar(means, positions, xerr=errors, linestyle="none", **style)
    set_ticks: Callable[..., Any] = axes.set_xticks if numbers else axes.set_yticks
    set_ticks(range(len(table)), [label for label, _ in table])
    axes.set_title(_TITLES.get(title, title), loc="left", fontsize=10)
    (axes.set_ylabel if numbers else axes.set_xlabel)("top-1, %")
    if not numbers:
        axes.invert_yaxis()
        axes.margins(y=0.3)


def _curves(results: dict[str, Any], name: str) -> list[dict[str, list[float]]]:
    return [run["curves"] for run in _finished(results, name)]


def _curve(axes: Axes, metric: str, label: str, table: Sequence[tuple[str, str]], results: dict) -> None:
    """A thin line per seed."""
    for (setting, name), color in zip(table, _LINES, strict=False):
        for i, curves in enumerate(_curves(results, name)):
            axes.plot(curves["step"], curves[metric], color=color, linewidth=1.2, label=None if i else setting)
    axes.set_xlabel("step")
    axes.set_title(label, loc="left", fontsize=10)


def _save(figure: Figure, path: Path) -> str:
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})
    return path.name
