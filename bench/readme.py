"""Writes the measured numbers of README.md and docs/, between their markers, from the JSON in bench/results.

python bench/readme.py                     updates the pages
python bench/readme.py --check             fails if a page is out of date
python bench/readme.py --record NAME RUN   saves a run's summary, made on this commit, as bench/results/NAME.json
"""

import argparse
import json
import re
import shlex
import statistics
import sys
from functools import partial
from pathlib import Path

from table import commits, heading, ratios, table

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RESULTS = ROOT / "bench" / "results"
# Group of a benchmark, on any device that has it -> its name in the README
WORK = {
    "info_nce N=256 K=65536 C=128 float32 queue": "InfoNCE and gradient, N = 256, K = 65,536, C = 128",
    "info_nce N=256 K=65536 C=128 bfloat16 queue": "the same, bfloat16 queue",
    "info_nce N=32 K=65536 C=128 float32 queue": "the same, N = 32",
    "info_nce N=4096 K=65536 C=128 bfloat16 queue": "InfoNCE, N = 4,096, bfloat16 queue",
    "momentum_update resnet50": "momentum update of a ResNet-50",
    "enqueue B=256 C=128 float32 queue": "enqueue of 256 keys",
    "step resnet18-small 32 images of 32², K=65536": "whole step, ResNet-18, 32 images of 32²",
}
BASELINES = {  # column of the README's table -> how benchmarks name that row
    "official": ("official, eager", "official loop", "official, slice of columns", "official"),
    "torch.compile": ("official, torch.compile",),
    "Lightly": ("Lightly",),
    "flash attention": ("flash attention, V = K",),
}
RUNS = {"demo": "digits", "fashion": "fashion-mnist"}  # marker in README.md -> file in bench/results


def record(name: str, run: Path) -> None:
    summary, made = (json.loads((run / f"{part}.json").read_text()) for part in ("summary", "environment"))
    threads = f"{made['threads']} thread{'s' * (made['threads'] > 1)}"
    summary["machine"] = f"{made['device']}, {threads}, torch {made['torch']}"
    summary["commit"] = made["commit"]
    (RESULTS / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n")


def run_section(summary: dict) -> str:
    columns = {"pixels": "raw pixels", "untrained": "untrained encoder", "trained": "trained encoder"}
    seconds = summary["seconds"]
    time = f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.1f} minutes"
    lines = [
        f"`{shlex.join(['moco-ext', 'pretrain', '--data', summary['data'], '--output', 'RUN'])}`: "
        f"{time} of training on {summary['machine']} (commit {summary['commit']}).",
        "",
        "| top-1 on test images, % | " + " | ".join(columns.values()) + " |",
        "|---" * 4 + "|",
    ]
    for key, label in (("knn_top1", "weighted kNN"), ("linear_top1", "linear probe")):
        lines.append(f"| {label} | " + " | ".join(f"{summary[key][column]:.1f}" for column in columns) + " |")
    if few := summary.get("few_labels"):
        cells = [f"{few['linear_top1'][column]:.1f} ± {few['linear_std'][column]:.1f}" for column in columns]
        label = f"linear probe, {few['labels_per_class']} labels per class (mean ± sd of {few['subsets']} subsets)"
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary_section(report: dict) -> str:
    """One line per operator: our time, and the time of each baseline divided by ours."""
    lines = [
        f"{heading(report)}. The columns of the baselines are their time divided by ours (medians of interleaved "
        "runs). Memory is the peak beyond the inputs.",
        "",
        f"| | ours, ms | {' | '.join(BASELINES)} | memory, ours / official, MB |",
        "|---|--:|" + "--:|" * (len(BASELINES) + 1),
    ]
    groups = {benchmark["group"]: benchmark["extra_info"] for benchmark in report["benchmarks"]}
    device = "cuda" if report["machine_info"]["gpu"] else "cpu"
    for group, work in WORK.items():
        if f"{group}, {device}" not in groups:
            continue
        rows = groups[f"{group}, {device}"]["rows"]
        ours = next(iter(rows.values()))
        found = [next((rows[name] for name in names if name in rows), None) for names in BASELINES.values()]
        cells = [f"{statistics.median(ours['ms']):.3g}"]
        cells += ["" if row is None else f"{statistics.median(ratios(row, ours)):.2f}x" for row in found]
        memory = [row["peak_bytes"] for row in (ours, found[0]) if row is not None and row["peak_bytes"] is not None]
        cells.append(" / ".join(f"{peak / 2**20:.1f}" for peak in memory))
        lines.append(f"| {work} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report_section(report: dict) -> str:
    """Every benchmark of a report under its own heading."""
    parts = [f"{heading(report)}."]
    for benchmark in sorted(report["benchmarks"], key=lambda b: b["group"]):
        if not benchmark["group"].startswith("loader"):
            parts.append(f"### {benchmark['group']}\n\n{table(benchmark['extra_info'])}")
    return "\n\n".join(parts)


def sweep_section(report: dict) -> str:
    """One line per shape; the sweep has one benchmark for each."""
    lines = [
        f"{heading(report)}.",
        "",
        "| N | K | C | queue | threads | ours, ms | GFLOP/s | eager / ours | GEMMs / ours |",
    ]
    lines.append("|--:" * 9 + "|")
    for benchmark in report["benchmarks"]:
        shape = re.match(r"sweep N=(\d+) K=(\d+) C=(\d+) (\w+) queue, (\d+) threads", benchmark["group"])
        if shape is None:
            continue
        rows = benchmark["extra_info"]["rows"]
        ours = rows["ours"]
        ms = statistics.median(ours["ms"])
        cells = [f"{statistics.median(ratios(rows[name], ours)):.1f}" if name in rows else ""
                 for name in ("official, eager", "limit: two GEMMs in cache")]  # fmt: skip
        n, k, c, queue, threads = shape.groups()
        cells = [n, f"{int(k):,}", c, queue, threads, f"{ms:.3g}", f"{ours['flops'] / ms / 1e6:.0f}", *cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def linear_section(report: dict) -> str:
    """One line per shape and number of threads, against torch's fused loss of a linear layer."""
    loads = [load for b in report["benchmarks"] for load in b["extra_info"].get("load", ())]
    columns = {
        "same problem": "ours, in_batch",
        "reference": "reference",
        "chunks": "chunks",
        "chunks of 64": "chunks of 64",
    }
    lines = [
        f"{heading(report)}; load average {min(loads):.0f} to {max(loads):.0f}.",
        "",
        f"| N | work | threads | ours, ms | {' | '.join(columns)} |",
        "|--:|---|--:|--:|" + "--:|" * len(columns),
    ]
    for benchmark in report["benchmarks"]:
        shape = re.match(
            r"linear_cross_entropy N=(\d+) K=65536 C=128 float32 queue, (\w+), (\d+) threads", benchmark["group"]
        )
        if shape is None:
            continue
        rows, skipped = benchmark["extra_info"]["rows"], benchmark["extra_info"]["skipped"]
        n, mode, threads = shape.groups()
        work = "loss and gradient" if mode == "gradient" else "loss"
        cells = [f"{statistics.median(ratios(rows[name], rows['ours'])):.2f}" if name in rows else skipped[name]
                 for name in columns.values()]  # fmt: skip
        ours = f"{statistics.median(rows['ours']['ms']):.3g}"
        lines.append("| " + " | ".join([n, work, threads, ours, *cells]) + " |")
    return "\n".join(lines)


def shards_section(report: dict) -> str:
    return loader_section(
        report,
        prefix="shards",
        base="limit",
        what="in one process, from the page cache; moco_ext reads in random order, the others sequentially",
        file="bench/bench_loader.py -k shards",
    )


def loader_section(
    report: dict,
    prefix: str = "loader",
    base: str = "official",
    what: str = "two views of each image",
    file: str = "bench/bench_loader.py",
) -> str:
    machine, commit = report["machine_info"], commits(report)
    loads = [
        load for b in report["benchmarks"] if b["group"].startswith(prefix) for load in b["extra_info"].get("load", ())
    ]
    what += f"; load average at most {max(loads):.1f}" if loads else ""
    name = machine["cpu"].get("brand_raw", machine["machine"])
    lines = [
        f"Images per second on one core ({name}, torch {machine['torch']}, commit {commit}; {what}; a "
        f"ratio is the median within rounds). `pytest {file}` repeats the measurement.",
        "",
        f"| work | implementation | images/s | speed / {base} |",
        "|---|---|---|---|",
    ]
    for benchmark in report["benchmarks"]:
        rows, group = benchmark["extra_info"]["rows"], benchmark["group"]
        if not group.startswith(prefix):
            continue
        images = int(re.search(r"(\d+) (?:JPEGs|views)", group)[1])
        first = next((row for label, row in rows.items() if base in label), None)
        for i, (label, row) in enumerate(rows.items()):
            ratio = (
                ""
                if first is None
                else f"{statistics.median(b / a for a, b in zip(row['ms'], first['ms'], strict=True)):.2f}"
            )
            speed = 1e3 * images / statistics.median(row["ms"])
            lines.append(f"| {'' if i else group.rsplit(',', 2)[0]} | {label} | {speed:.0f} | {ratio} |")
    return "\n".join(lines)


def compat_sections(report: dict) -> dict[str, str]:
    """For each peer's page, its training step before and after the change of import."""
    steps: dict[str, list[str]] = {}
    for benchmark in report["benchmarks"]:
        if (match := re.match(r"compat (\w+): (.*), cpu", benchmark["group"])) is None:
            continue
        rows = benchmark["extra_info"]["rows"]
        if not {"before", "after"} <= rows.keys():  # why is in "skipped"
            continue
        cells = [f"{statistics.median(rows[name]['ms']):.3g}" for name in ("before", "after")]
        cells.append(f"{statistics.median(ratios(rows['before'], rows['after'])):.2f}")
        cells += [f"{rows[name]['peak_bytes'] / 2**20:.0f}" for name in ("before", "after")]
        steps.setdefault(f"compat-{match[1]}", []).append(f"| {match[2]} | " + " | ".join(cells) + " |")
    head = [
        f"A training step before and after, {heading(report)} (`pytest bench/bench_compat.py`):",
        "",
        "| encoder, batch, queue | before, ms | after, ms | ratio | before, MB | after, MB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    return {marker: "\n".join([*head, *lines]) for marker, lines in steps.items()}


def transfer_section(report: dict, *, model: str, scores: tuple[str, ...]) -> str:
    """Scores of each start by iteration, mean and standard deviation over the seeds."""
    runs = report["runs"]
    starts = list(dict.fromkeys(run["start"] for run in runs))
    seeds = {start: sorted(run["seed"] for run in runs if run["start"] == start) for start in starts}
    first = runs[0]
    lines = [
        f"{model} on {first['arch']}, `{first['flags']}`; {first['device']}, torch {first['torch']}, commit "
        f"{', '.join(sorted({run['commit'] for run in runs}))}. Mean ± standard deviation over "
        f"{len(seeds[starts[0]])} seeds, %.",
        "",
        "| iterations | "
        + " | ".join(f"{name.replace('_', ' ')}, {start}" for name in scores for start in starts)
        + " |",
        "|--:" * (1 + len(scores) * len(starts)) + "|",
    ]
    for number, record in enumerate(first["records"]):
        cells = [
            spread([run["records"][number][name] for run in runs if run["start"] == start])
            for name in scores
            for start in starts
        ]
        lines.append(f"| {record['step']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def sections() -> dict[str, str]:
    filled = {}
    for name in ("compat", "compat-family"):
        if (RESULTS / f"{name}.json").is_file():
            filled |= compat_sections(json.loads((RESULTS / f"{name}.json").read_text()))
    if (RESULTS / "label-efficiency.json").is_file():
        import label_efficiency  # it needs the training dependencies

        filled["labels"] = label_efficiency.sections(json.loads((RESULTS / "label-efficiency.json").read_text()))
    for marker, name in RUNS.items():
        if (RESULTS / f"{name}.json").is_file():
            filled[marker] = run_section(json.loads((RESULTS / f"{name}.json").read_text()))
    makers = {
        "bench-summary": ("cpu", summary_section),
        "bench-gpu": ("h200", summary_section),
        "cpu": ("cpu", report_section),
        "sweep": ("sweep", sweep_section),
        "linear": ("linear-cross-entropy", linear_section),
        "family": ("family", report_section),
        "h200": ("h200", report_section),
        "loader": ("loader", loader_section),
        "shards": ("shards", shards_section),
        "detection": ("detection", partial(transfer_section, model="Faster R-CNN", scores=("AP", "AP50", "AP75"))),
        "segmentation": ("segmentation", partial(transfer_section, model="FCN", scores=("mIoU", "pixel_accuracy"))),
    }
    for marker, (name, make) in makers.items():
        if (RESULTS / f"{name}.json").is_file():
            filled[marker] = make(json.loads((RESULTS / f"{name}.json").read_text()))
    return filled


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--record", nargs=2, metavar=("NAME", "RUN"))
    arguments = parser.parse_args()
    if arguments.record:
        record(arguments.record[0], Path(arguments.record[1]))
    found, stale = sections(), []
    for page in PAGES:
        text = filled = page.read_text()
        for marker, section in found.items():
            pattern = rf"(<!-- {marker}:start -->\n).*?(<!-- {marker}:end -->)"
            filled = re.sub(pattern, lambda match, s=section: f"{match[1]}{s}\n{match[2]}", filled, flags=re.DOTALL)
        if filled != text:
            stale.append(page.name)
            if not arguments.check:
                page.write_text(filled)
    if arguments.check and stale:
        print(f"{', '.join(stale)}: numbers differ from bench/results; run bench/readme.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
