"""The charts of the report, as SVG that takes its colors and fonts from the page."""

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

RUN_COLORS = 8  # --run0 ... --run7 in report.css; further runs reuse them, with dashed lines
TSNE_POINTS = 50  # fewer points are mapped by PCA
# matplotlib has no CSS variables: these placeholders are replaced in the written SVG.
_VARIABLES = ("ink", "soft", "line", *(f"run{i}" for i in range(RUN_COLORS)))
_COLORS = {name: f"#0102{i:02x}" for i, name in enumerate(_VARIABLES)}
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
    "text.color": _COLORS["ink"],
    "axes.edgecolor": _COLORS["line"],
    "axes.labelcolor": _COLORS["soft"],
    "xtick.color": _COLORS["soft"],
    "ytick.color": _COLORS["soft"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": _COLORS["line"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
}


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve in the color of run number ``run``."""

    x: Sequence[float]
    y: Sequence[float]
    run: int


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of a chart: ``levels`` are dashed horizontal lines, by label; ``floor`` is the lowest y."""

    x: str = "epoch"
    levels: dict[str, float] = dataclasses.field(default_factory=dict)
    floor: float | None = None
    log: bool = False


def curves(name: str, lines: Sequence[Line], axes: Axes) -> str:
    """Lines over epochs or steps, as SVG.

    The lines of run i are in a group of class ``r<i>``, so that the page can hide them.

    Args:
        name: distinguishes the SVG from others on the page.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.9, 2.6), layout="constrained")
        plot = figure.add_subplot()
        plot.grid(axis="x", visible=False)
        for line in lines:
            color = _COLORS[f"run{line.run % RUN_COLORS}"]
            dashes = "solid" if line.run < RUN_COLORS else (0, (5, 2))
            marker = "o" if len(line.x) <= 12 else None
            (drawn,) = plot.plot(line.x, line.y, color=color, linewidth=1.8, ls=dashes, marker=marker, markersize=3.5)
            drawn.set_gid(f"of-run:{line.run}")
        for level in axes.levels.values():
            plot.axhline(level, color=_COLORS["soft"], linewidth=1.2, linestyle=(0, (4, 3)))
        plot.margins(y=0.12)
        if axes.log:
            plot.set_yscale("log")
            plot.yaxis.set_major_locator(LogLocator(10))
            plot.yaxis.set_minor_locator(NullLocator())
            plot.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        if axes.floor is not None:
            plot.set_ylim(bottom=axes.floor)
        right = max(max(line.x) for line in lines)
        plot.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if right >= 10_000:
            plot.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:,.0f}k" if value else "0"))
        plot.set_xlabel(axes.x)
        return _svg(figure, "curve" + name)


def feature_maps(features: dict[str, Tensor], labels: Tensor, n_classes: int) -> tuple[dict[str, str], tuple[str, ...]]:
    """Map each representation [N, D] to the plane by t-SNE (PCA of fewer than 50 points): SVGs, and class colors."""
    colors = class_colors(n_classes)
    maps = {}
    for name, rows in features.items():
        points = _plane(rows)
        with matplotlib.rc_context(_STYLE):
            figure = Figure(figsize=(3.6, 3.6), layout="constrained")
            plot = figure.add_subplot()
            plot.set_axis_off()
            point_colors = [colors[label] for label in labels.tolist()]
            plot.scatter(points[:, 0], points[:, 1], s=9, c=point_colors, linewidths=0, alpha=0.85)
            maps[name] = _svg(figure, "map" + name)
    return maps, colors


def class_colors(n: int) -> tuple[str, ...]:
    """n colors that are distinct on light and dark backgrounds; beyond ten, steps around the hue circle."""
    if n <= len(_CLASSES):
        return tuple(_CLASSES[:n])
    from matplotlib.colors import hsv_to_rgb, to_hex

    return tuple(to_hex(tuple(hsv_to_rgb((i / n, 0.62 if i % 2 else 0.8, 0.85 if i % 2 else 0.7)))) for i in range(n))


def _plane(features: Tensor) -> np.ndarray:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from torch.nn.functional import normalize

    rows = normalize(features.float(), dim=1).numpy()  # the evaluation compares by cosine
    if len(rows) < TSNE_POINTS:
        return PCA(2).fit_transform(rows)
    reduced = PCA(min(50, *rows.shape), random_state=0).fit_transform(rows)
    return TSNE(init="pca", perplexity=30 if len(rows) > 100 else 10, random_state=0).fit_transform(reduced)


def _svg(figure: Figure, salt: str) -> str:
    buffer = io.StringIO()
    # Several SVGs share a page: without their own salts, their clip paths and markers would share ids.
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="of-run:(\d+)"', r'<g class="r\1"', svg)
    # matplotlib's group ids repeat from figure to figure, and nothing refers to them.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for name, placeholder in _COLORS.items():
        svg = svg.replace(placeholder, f"var(--{name})")
    return svg
