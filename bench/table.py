"""Prints Markdown tables from benchmark JSON: python bench/table.py bench/results/*.json"""

import json
import statistics
import sys
from pathlib import Path

HEAD = "| | ms | 10 to 90 % | time / ours | GFLOP | MB | over limit | extra MB | error |\n" + "|---" * 9 + "|"


def commits(report: dict) -> str:
    """The commit of a report, or several if it combines runs of several commits (extra_info has each one's)."""
    return ", ".join(commit[:10] for commit in report["commit_info"]["id"].split(", "))


def heading(report: dict) -> str:
    """The machine, the versions and the commit of a report."""
    machine, commit = report["machine_info"], report["commit_info"]
    name = machine["gpu"] or f"{machine['cpu'].get('brand_raw', machine['machine'])} ({machine['cpu_capability']})"
    commit = f"{commits(report)}{'+' if commit['dirty'] else ''}"
    threads = f"{machine['threads']} CPU threads"
    return f"{name}, {threads}, torch {machine['torch']}, commit {commit}, {report['datetime'][:10]}"


def tables(path: Path) -> str:
    """One table per benchmark of the file, after a line with the machine and the versions."""
    report = json.loads(path.read_text())
    parts = [
        f"{heading(report)}. Medians of interleaved runs; ratios are medians within rounds. GFLOP and MB: the FLOPs "
        "and the least memory traffic of the problem. Over limit: time divided by the time at the limit's rate."
    ]
    for benchmark in sorted(report["benchmarks"], key=lambda b: b["group"]):
        parts.append(f"**{benchmark['group']}**\n\n{table(benchmark['extra_info'])}")
    return "\n\n".join(parts)


def table(found: dict) -> str:
    """The rows of one benchmark, then wall-clock times and skipped rows."""
    if "peaks" in found:
        lines = [f"| {way} | {peak['mb']:.1f} |" if "mb" in peak else f"| {way} | {peak['why']} |"
                 for way, peak in found["peaks"].items()]  # fmt: skip
        return "\n".join(["| | MB beyond the inputs |", "|---|---|", *lines])
    rows = found["rows"]
    skipped = dict(found.get("skipped") or {})
    wrong = [f"| {name} | {skipped.pop(name)} {'|' * 8}" for name in list(skipped) if skipped[name].startswith("wrong")]
    parts = ["\n".join([HEAD, *(_line(name, rows) for name in rows), *wrong])]
    if any(row["wall_ms"] != row["ms"] for row in rows.values()):
        walls = (f"{name} {statistics.median(row['wall_ms']):.3g}" for name, row in rows.items())
        parts.append("Wall clock, ms: " + ", ".join(walls) + ".")
    for name in rows:
        if name.startswith("encoders alone"):
            own = name.replace("encoders alone", "ours")
            share = 1 - statistics.median(ratios(rows[name], rows[own]))
            parts.append(f"Not encoder of *{own}*: {100 * share:.1f} %.")
    if skipped:
        reasons: dict[str, list[str]] = {}
        for name, why in skipped.items():
            reasons.setdefault("not installed" if why.startswith("pip install") else why, []).append(name)
        parts.append(" ".join(f"Skipped ({why}): {'; '.join(names)}." for why, names in reasons.items()))
    return "\n\n".join(parts)


def ratios(row: dict, to: dict) -> list[float]:
    return [a / b for a, b in zip(row["ms"], to["ms"], strict=True)]


def _line(name: str, rows: dict) -> str:
    row = rows[name]
    ratio = statistics.median(ratios(row, next(iter(rows.values()))))  # each bench lists ours first
    deciles = statistics.quantiles(row["ms"], n=10, method="inclusive")
    limits = [other for label, other in rows.items() if label.startswith("limit")]
    over = ""
    if limits and not name.startswith("limit") and (row["flops"] or row["bytes"]):
        rounds = range(len(row["ms"]))
        over = f"{statistics.median(row['ms'][i] / max(_limit_ms(row, x, i) for x in limits) for i in rounds):.2f}"
    cells = [
        name,
        f"{statistics.median(row['ms']):.3g}",
        f"{deciles[0]:.3g} to {deciles[-1]:.3g}",
        f"{ratio:.2f}",
        f"{row['flops'] / 1e9:.3g}" if row["flops"] else "",
        f"{row['bytes'] / 1e6:.3g}" if row["bytes"] else "",
        over,
        "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}",
        "" if row["error"] is None else f"{row['error']:.0e}",
    ]
    return "| " + " | ".join(cells) + " |"


def _limit_ms(row: dict, limit: dict, i: int) -> float:
    """The row's work at the rate the limit reached in the same round."""
    work = "flops" if limit["flops"] else "bytes"
    return row[work] / limit[work] * limit["ms"][i]


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    print("\n\n".join(tables(Path(argument)) for argument in sys.argv[1:]))
