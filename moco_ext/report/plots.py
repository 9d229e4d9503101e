"""The report's figures, as SVG to stand inline in its page, whose colours and fonts they take on."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from torch import Tensor

RUN_COLOURS = 8  # --run0 ... of the page; further runs take them again, dashed
# matplotlib knows no CSS variables: these colours stand for them until the SVG is written.
_VARIABLES = ("ink", "soft", "line", *(f"run{i}" for i in range(RUN_COLOURS)))
_COLOURS = {name: f"#0102{i:02x}" for i, name in enumerate(_VARIABLES)}
_CLASSES = [
    "#3b7ddd",
    "#e8873a",
    "#3aa76d",
    "#d9485f",
    "#8b65c9",
    "#9c6b52",
    "#e078b8",
    "#8a929c",
    "#b5b02d",
    "#2fb3c4",
]
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": _COLOURS["ink"],
    "axes.edgecolor": _COLOURS["line"],
    "axes.labelcolor": _COLOURS["soft"],
    "xtick.color": _COLOURS["soft"],
    "ytick.color": _COLOURS["soft"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": _COLOURS["line"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
}


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve of run number ``run``, which gives it its colour."""

    x: Sequence[float]
    y: Sequence[float]
    run: int


@dataclasses.dataclass(frozen=True)
class Axes:
    """What a chart's axes are: ``levels`` are dashed horizontals, by what they mean; ``floor`` is where y begins."""

    x: str = "epoch"
    levels: dict[str, float] = dataclasses.field(default_factory=dict)
    floor: float | None = None
    log: bool = False


def curves(name: str, lines: Sequence[Line], axes: Axes) -> str:
    """Lines over epochs or steps, and levels; an SVG.

    The lines of run i are in a group of class ``r<i>``, so that the page can hide them.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.9, 2.6), layout="constrained")
        plot = figure.add_subplot()
        plot.grid(axis="x", visible=False)
        for line in lines:
            colour = _COLOURS[f"run{line.run % RUN_COLOURS}"]
            dashes = "solid" if line.run < RUN_COLOURS else (0, (5, 2))
            marker = "o" if len(line.x) <= 12 else None
            (drawn,) = plot.plot(line.x, line.y, color=colour, linewidth=1.8, ls=dashes, marker=marker, markersize=3.5)
            drawn.set_gid(f"of-run:{line.run}")
        for level in axes.levels.values():
            plot.axhline(level, color=_COLOURS["soft"], linewidth=1.2, linestyle=(0, (4, 3)))
        plot.margins(y=0.12)
        if axes.log:
            plot.set_yscale("log")
            plot.yaxis.set_major_locator(LogLocator(10))
            plot.yaxis.set_minor_locator(NullLocator())
            plot.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        if axes.floor is not None:
            plot.set_ylim(bottom=axes.floor)
        right = max(max(line.x) for line in lines)
        plot.xaxis.set_major_locator(MaxNLocator(6, integer=right > 4))
        if right >= 10_000:
            plot.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:,.0f}k" if value else "0"))
        plot.set_xlabel(axes.x)
        return _svg(figure, "curve" + name)


def feature_maps(features: dict[str, Tensor], labels: Tensor, n_classes: int) -> tuple[dict[str, str], tuple[str, ...]]:
    """Each representation [N, D] laid out in the plane by t-SNE (PCA below 50 points): SVGs, and class colours."""
    colours = class_colours(n_classes)
    maps = {}
    for name, rows in features.items():
        points = _plane(rows)
        with matplotlib.rc_context(_STYLE):
            figure = Figure(figsize=(3.6, 3.6), layout="constrained")
            plot = figure.add_subplot()
            plot.set_axis_off()
            point_colours = [colours[label] for label in labels.tolist()]
            plot.scatter(points[:, 0], points[:, 1], s=9, c=point_colours, linewidths=0, alpha=0.85)
            maps[name] = _svg(figure, "map" + name)
    return maps, colours


def class_colours(n: int) -> tuple[str, ...]:
    """n colours that can be told apart on light and dark alike; beyond ten, steps around the hue circle."""
    if n <= len(_CLASSES):
        return tuple(_CLASSES[:n])
    from matplotlib.colors import hsv_to_rgb, to_hex

    return tuple(to_hex(tuple(hsv_to_rgb((i / n, 0.62 if i % 2 else 0.8, 0.85 if i % 2 else 0.7)))) for i in range(n))


def _plane(features: Tensor) -> np.ndarray:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from torch.nn.functional import normalize

    rows = normalize(features.float(), dim=1).numpy()  # cosine is what the evaluation goes by
    if len(rows) < 50:
        return PCA(2).fit_transform(rows)
    reduced = PCA(min(50, *rows.shape), random_state=0).fit_transform(rows)
    return TSNE(init="pca", perplexity=30 if len(rows) > 100 else 10, random_state=0).fit_transform(reduced)


def _svg(figure: Figure, salt: str) -> str:
    buffer = io.StringIO()
    # Several SVGs share a page: without a salt each, their clip paths and markers would share ids.
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="of-run:(\d+)"', r'<g class="r\1"', svg)
    # matplotlib's own group ids repeat from figure to figure and nothing refers to them.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for name, stand_in in _COLOURS.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    return svg
