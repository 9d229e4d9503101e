"""``moco-ext convert``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.text import Text

from ..checkpoints import FORMATS, convert
from ..runs.console import make_console
from ..runs.files import write_json


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Convert a checkpoint to the layout that another package's own code would have saved. Formats: "
        f"{', '.join(FORMATS)}. No code in the source file is executed."
    )
    add = parser.add_argument
    add("source", metavar="IN", help="the checkpoint to read, a file or a folder of --checkpoint-format dcp")
    add("output", metavar="OUT", help="the file to write; the suffix selects .safetensors, or .pkl for detectron2")
    add("--to", required=True, metavar="FORMAT", help="format of OUT")
    add("--from", dest="from_format", metavar="FORMAT", help="format of IN (default: detected)")
    add("--encoder", choices=("q", "k"), help="only this encoder (default: both where OUT holds both, else q)")
    add("--head", choices=("keep", "drop"), help="layers after pooling (default: drop if OUT is one encoder)")
    add("-a", "--arch", metavar="ARCH", help="architecture of the encoder: checked, and recorded where OUT names it")
    add("--force", action="store_true", help="overwrite OUT")
    add("--report", metavar="FILE", help="write the report about every tensor as JSON")
    add("-q", "--quiet", action="store_true", help="print only the totals")


def run(args: argparse.Namespace) -> int:
    if args.report and not Path(args.report).parent.is_dir():  # before anything is written
        raise FileNotFoundError(f"report: no such folder: {Path(args.report).parent}")
    report = convert(
        args.source,
        args.output,
        args.to,
        from_format=args.from_format,
        encoder=args.encoder,
        keep_head=None if args.head is None else args.head == "keep",
        arch=args.arch,
        overwrite=args.force,
    )
    if args.report:
        write_json(args.report, report.as_dict())
    console = make_console(highlight=False, soft_wrap=True)
    if not args.quiet:
        for old, new, shape, dtype in report.mapped:
            console.print(f"  {old} -> {new} {shape} {dtype}")
        for name, why in report.left.items():
            console.print(Text.assemble(("left", "yellow"), f" {name}: {why}"))
        for name in report.missing:
            console.print(Text.assemble(("missing", "yellow"), f" {name}"))
    console.print(
        f"{args.output}: {report.from_format} -> {report.to}, {len(report.mapped)} tensors mapped, "
        f"{len(report.left)} left, {len(report.missing)} missing"
    )
    return 0
