"""``moco-ext neighbors``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.table import Table
from rich.text import Text

from ..evaluate.feature_files import FeatureFile
from ..evaluate.neighbors import Result, neighbors, write_faiss_index
from ..runs.console import make_console
from ..runs.options import RunOptions
from ..runs.settings import settings
from . import launch
from .flags import add_data_root, add_settings

_SHOWN = 20  # queries, in the terminal


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Find the nearest images, by cosine similarity, in a file of moco-ext embed. The queries are encoded with the "
        "encoder recorded in the file."
    )
    add = parser.add_argument
    add("features", metavar="FEATURES", help="file of moco-ext embed")
    add("queries", nargs="*", metavar="QUERY", help="image files, folders or lists of images")
    add("-k", type=int, default=10, metavar="N", help="neighbors (default: 10)")
    add("--weights", metavar="RUN|WEIGHTS", help="path of the encoder, if it has moved")
    add("--gallery", metavar="FILE", help="write an HTML page with the images")
    add("--faiss", metavar="FILE", help="write a FAISS index of the normalized features (needs faiss-cpu)")
    add("--json", action="store_true", help="print one JSON object")
    add_data_root(parser)
    add_settings(parser, settings(RunOptions, "workers") | settings(launch.LaunchOptions, "device", "threads"))


def run(args: argparse.Namespace) -> int:
    if not args.queries and (args.faiss is None or args.gallery):
        raise ValueError("queries: expected images, got none")
    for name in ("gallery", "faiss"):  # before anything is computed
        path = getattr(args, name)
        if path and not Path(path).parent.is_dir():
            raise FileNotFoundError(f"{name}: no such folder: {Path(path).parent}")
    options = launch.options_of(args, Path())
    features = FeatureFile(args.features)
    if args.faiss:
        write_faiss_index(features, args.faiss)
    results: list[Result] = []
    unreadable: list[str] = []
    if args.queries:
        results, unreadable = neighbors(
            features, args.queries, args.k, weights=args.weights, device=options.device, workers=options.workers
        )
    if args.gallery:
        from ..report.neighbors import write_neighbors

        write_neighbors(args.gallery, features, results, data_root=args.data_root)
    if args.json:
        queries = [{"query": r.query, "neighbors": [n._asdict() for n in r.neighbors]} for r in results]
        print(json.dumps({"features": args.features, "k": args.k, "queries": queries, "unreadable": unreadable}))
    else:
        _show(results, unreadable, args)
    return 0


def _show(results: list[Result], unreadable: list[str], args: argparse.Namespace) -> None:
    console = make_console(highlight=False, soft_wrap=True)
    for result in results[:_SHOWN]:
        table = Table("cosine", title=result.query, title_justify="left", box=None)
        labels = any(found.label is not None for found in result.neighbors)
        for name in ("image", *(("label",) if labels else ())):
            table.add_column(name, overflow="fold")
        for found in result.neighbors:
            cells = (f"{found.similarity:.4f}", found.path, *((found.label or "",) if labels else ()))
            table.add_row(*cells)
        console.print(table, soft_wrap=False)
    if len(results) > _SHOWN:
        console.print(f"{len(results) - _SHOWN:,} more queries: --json or --gallery shows them")
    for path in unreadable:
        console.print(Text.assemble(("unreadable", "yellow"), f" {path}"))
    for path in filter(None, (args.gallery, args.faiss)):
        console.print(path)
