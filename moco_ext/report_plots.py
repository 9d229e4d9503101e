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
from matplotlib.ticker import MaxNLocator
from torch import Tensor

# matplotlib knows no CSS variables: these stand for them until the SVG is written.
_STAND_INS = {
    "#010101": "var(--ink)",
    "#020202": "var(--soft)",
    "#030303": "var(--line)",
    "#040404": "var(--pixels)",
    "#050505": "var(--untrained)",
    "#060606": "var(--trained)",
}
_COLOURS = {variable[6:-1]: stand_in for stand_in, variable in _STAND_INS.items()}
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
    """One curve; ``colour`` is pixels, untrained or trained."""

    x: Sequence[float]
    y: Sequence[float]
    colour: str
    label: str


def curves(lines: Sequence[Line], levels: dict[str, float]) -> str:
    """Lines over epochs, and dashed horizontal levels, each labelled where it stands; an SVG."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.9, 2.7), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="x", visible=False)
        for line in lines:
            marker = "o" if len(line.x) <= 12 else None
            axes.plot(line.x, line.y, color=_COLOURS[line.colour], linewidth=2, marker=marker, markersize=4)
            beside: Any = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
            if len(lines) > 1:
                axes.annotate(line.label, (line.x[-1], line.y[-1]), color=_COLOURS[line.colour], **beside)
        right = max(max(line.x) for line in lines)
        for label, level in levels.items():
            axes.axhline(level, color=_COLOURS["soft"], linewidth=1.2, linestyle=(0, (4, 3)))
            axes.annotate(
                label,
                (right, level),
                xytext=(0, 4),
                textcoords="offset points",
                ha="right",
                color=_COLOURS["soft"],
            )
        axes.margins(y=0.12)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        return _svg(figure, "curve" + lines[0].label)


def feature_maps(features: dict[str, Tensor], labels: Tensor, n_classes: int) -> tuple[dict[str, str], tuple[str, ...]]:
    """Each representation [N, D] laid out in the plane by t-SNE (PCA below 50 points): SVGs, and class colours."""
    colours = class_colours(n_classes)
    maps = {}
    for name, rows in features.items():
        points = _plane(rows)
        with matplotlib.rc_context(_STYLE):
            figure = Figure(figsize=(3.6, 3.6), layout="constrained")
            axes = figure.add_subplot()
            axes.set_axis_off()
            axes.scatter(
                points[:, 0],
                points[:, 1],
                s=9,
                c=[colours[label] for label in labels.tolist()],
                linewidths=0,
                alpha=0.85,
            )
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
    for stand_in, variable in _STAND_INS.items():
        svg = svg.replace(stand_in, variable)
    return svg
