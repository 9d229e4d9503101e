"""``moco-ext report``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..report import compose, galleries, read_run
from ..runs.files import write_atomically
from ..runs.options import RunOptions
from ..runs.settings import settings
from .flags import add_data_root, add_settings
from .launch import LaunchOptions, options_of


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a self-contained HTML page: curves, diagnostics and scores of all runs, the settings that differ, and, "
        "from the checkpoints and the data, nearest neighbors and maps of the features."
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run directories")
    add("--output", metavar="FILE", help="(default: RUN/report.html; of several runs, report.html here)")
    add("--no-features", action="store_true", help="no neighbors and no maps; needs neither data nor checkpoints")
    add_data_root(parser)
    add_settings(parser, settings(RunOptions, "workers") | settings(LaunchOptions, "device", "threads"))


def run(args: argparse.Namespace) -> int:
    folders = [Path(folder) for folder in args.runs]
    runs = [read_run(folder, name) for folder, name in zip(folders, distinct_names(folders), strict=True)]
    output = Path(args.output or (folders[0] / "report.html" if len(runs) == 1 else "report.html"))
    if not output.parent.is_dir():  # before anything is computed
        raise FileNotFoundError(f"output: no such folder: {output.parent}")
    options = options_of(args, output.parent)
    console = options.console
    shown = []
    if not args.no_features:
        try:
            with console.status("computing features"):
                shown = galleries(
                    runs, folders, data_root=args.data_root, device=options.device, workers=options.workers
                )
        except (ValueError, OSError) as error:  # the images may be on another machine
            raise ValueError(f"{error}; --no-features needs neither data nor checkpoints") from None
    with console.status("writing the report"):
        page = compose(runs, shown)
        write_atomically(output, lambda file: file.write(page.encode()))
    console.print(f"{output}: {len(page) / 2**20:.1f} MB", highlight=False)
    return 0


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as needed to distinguish them."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise ValueError(f"run: expected different directories, got {', '.join(map(str, folders))}")
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names
