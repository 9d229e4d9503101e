"""Markdown tables from benchmark JSON: python bench/table.py bench/results/*.json"""

import json
import statistics
import sys
from pathlib import Path

HEAD = "| | ms | 10 to 90 % | time / ours | GFLOP | MB | over limit | extra MB | error |\n" + "|---" * 9 + "|"


def tables(path: Path) -> str:
    """One table a benchmark of the file, under the machine's name."""
    report = json.loads(path.read_text())
    machine, commit = report["machine_info"], report["commit_info"]
    name = machine["gpu"] or machine["cpu"].get("brand_raw", machine["machine"])
    commit = f"{commit['id'][:10]}{'+' if commit['dirty'] else ''}"
    parts = [
        f"{name}, {machine['threads']} CPU threads, torch {machine['torch']}, commit {commit}, "
        f"{report['datetime'][:10]}. Medians of runs in turn; ratios are medians within rounds. GFLOP and MB: "
        "the work's own, and its least memory traffic. Over limit: time over the limit's time for that work."
    ]
    for benchmark in sorted(report["benchmarks"], key=lambda b: b["group"]):
        rows = benchmark["extra_info"]["rows"]
        parts.append(f"**{benchmark['group']}**\n\n{HEAD}\n" + "\n".join(_line(name, rows) for name in rows))
        if any(row["wall_ms"] != row["ms"] for row in rows.values()):
            walls = (f"{name} {statistics.median(row['wall_ms']):.3g}" for name, row in rows.items())
            parts.append("Wall clock, ms: " + ", ".join(walls) + ".")
    return "\n\n".join(parts)


def _line(name: str, rows: dict) -> str:
    row = rows[name]
    ours = next(iter(rows.values()))  # each bench lists ours first
    ratio = statistics.median(a / b for a, b in zip(row["ms"], ours["ms"], strict=True))
    deciles = statistics.quantiles(row["ms"], n=10, method="inclusive")
    limits = [other for label, other in rows.items() if label.startswith("limit")]
    over = statistics.median(
        row["ms"][i] / max(_limit_ms(row, other, i) for other in limits) for i in range(len(row["ms"]))
    )
    cells = [
        name,
        f"{statistics.median(row['ms']):.3g}",
        f"{deciles[0]:.3g} to {deciles[-1]:.3g}",
        f"{ratio:.2f}",
        f"{row['flops'] / 1e9:.3g}" if row["flops"] else "",
        f"{row['bytes'] / 1e6:.3g}" if row["bytes"] else "",
        "" if name.startswith("limit") else f"{over:.2f}",
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
