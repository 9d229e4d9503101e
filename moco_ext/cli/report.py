"""``moco-ext report``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .flags import add_machine_flags, workers


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "report",
        help="one HTML page about a run, or comparing several",
        description="A self-contained HTML page: curves, health and scores of all runs, the settings in which they "
        "differ, and, from the checkpoints and the data, nearest neighbours and maps of the features.",
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run directories")
    add("--output", metavar="FILE", help="(default: RUN/report.html; of several runs, report.html here)")
    add("--no-features", action="store_true", help="neither neighbours nor maps; needs neither data nor checkpoints")
    add("--data-root", metavar="DIR", help="where downloaded data sets are kept (default: data)")
    add_machine_flags(parser)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from ..report import compose, galleries, read_run
    from ..runs.files import write_atomically
    from .launch import local_device

    given = vars(args)
    folders = [Path(folder) for folder in given["runs"]]
    runs = [read_run(folder, name) for folder, name in zip(folders, distinct_names(folders), strict=True)]
    output = Path(given.get("output", folders[0] / "report.html" if len(runs) == 1 else "report.html"))
    console = Console()
    shown = []
    if not given.get("no_features"):
        with console.status("computing features"):
            data_root, device = given.get("data_root", "data"), local_device(given)
            shown = galleries(runs, folders, data_root=data_root, device=device, workers=workers(given))
    with console.status("writing the report"):
        page = compose(runs, shown)
        write_atomically(output, lambda file: file.write(page.encode()))
    console.print(f"{output}: {len(page) / 2**20:.1f} MB", highlight=False)
    return 0


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as few as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise ValueError(f"run: expected different directories, got {', '.join(map(str, folders))}")
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names
