"""Draws the plots of docs/curves.md and docs/moco.md from bench/results/curves.json, or records the runs they show.

    for run in "good" "m0 --moco-m 0" "lr --lr 3"; do set -- $run; moco-ext pretrain --data digits --steps 400 \
        --precision fp32 --log-every 4 --print-freq 1 --online-knn 0 --output runs/curves/$1 ${@:2}; done
    python bench/curves.py runs/curves    # reads the runs
    python bench/curves.py                # draws again
"""

import json
import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS, DRAWN = ROOT / "bench/results/curves.json", ROOT / "docs/curves"
LABELS = {"good": "m = 0.99, lr 0.06", "m0": "m = 0", "lr": "lr 3"}
CHANCE = "chance: log(K + 1)"
COLORS = {"good": "#2f6fdb", "m0": "#d9772b", "lr": "#c8427f"}
METRICS = ("step", "loss", "acc1", "feature_std", "effective_rank")


def main() -> None:
    if len(sys.argv) > 1:
        record(Path(sys.argv[1]))
    runs = json.loads(RESULTS.read_text())
    DRAWN.mkdir(exist_ok=True)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "curves", "axes.spines.top": False, "font.size": 9}):
        start(runs)
        compared(runs, "loss", "loss (nats)", ("good", "m0"), "momentum")
        compared(runs, "feature_std", "spread of the queries", ("good", "m0", "lr"), "collapse")


def record(folder: Path) -> None:
    runs = {}
    for name in LABELS:
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        made = json.loads((folder / name / "environment.json").read_text())
        curves = [{metric: json.loads(line).get(metric) for metric in METRICS} for line in lines]
        chance = json.loads((folder / name / "config.json").read_text())["moco_k"] + 1
        runs[name] = {"made_with": made, "candidates": chance, "records": curves}
    RESULTS.write_text(json.dumps(runs, indent=None) + "\n")


def start(runs: dict) -> None:
    import math

    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    run = runs["good"]
    steps = column(run, "step")
    left.plot(steps, column(run, "acc1"), color=COLORS["good"])
    left.set(xlabel="step", ylabel="contrast accuracy, top-1 (%)", ylim=(0, None))
    right.plot(steps, column(run, "loss"), color=COLORS["good"])
    right.axhline(math.log(run["candidates"]), color="gray", linestyle="--", linewidth=1, label=CHANCE)
    right.set(xlabel="step", ylabel="loss (nats)")
    right.legend(frameon=False)
    save(figure, "start")


def compared(runs: dict, metric: str, label: str, names: tuple[str, ...], file: str) -> None:
    figure = Figure(figsize=(4.6, 2.8), layout="constrained")
    plot = figure.subplots()
    for name in names:
        plot.plot(column(runs[name], "step"), column(runs[name], metric), color=COLORS[name], label=LABELS[name])
    plot.set(xlabel="step", ylabel=label)
    if metric == "feature_std":
        plot.set_ylim(0, None)
    plot.legend(frameon=False)
    save(figure, file)


def column(run: dict, metric: str) -> list[float]:
    return [float("nan") if record[metric] is None else record[metric] for record in run["records"]]


def save(figure: Figure, name: str) -> None:
    for plot in figure.axes:
        plot.spines["right"].set_visible(False)
    figure.savefig(DRAWN / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
