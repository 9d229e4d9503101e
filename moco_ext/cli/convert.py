"""``moco-ext convert``."""

from __future__ import annotations

import argparse

# Those of moco_ext.checkpoints.FORMATS, which is too much to import for a help text.
FORMATS = "moco, moco-v3, lightly, solo-learn, mmselfsup, mmpretrain, vissl, torchvision, timm, detectron2, safetensors"


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="a checkpoint of one package as another's",
        description=f"A checkpoint of one package as another's own code would have saved it. Formats: {FORMATS}. "
        "Nothing in the source is executed.",
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("source", metavar="IN", help="the checkpoint to read")
    add("output", metavar="OUT", help="the file to write; .safetensors and .pkl (detectron2's) by suffix")
    add("--to", required=True, metavar="FORMAT", help="the format to write")
    add("--from", dest="from_format", metavar="FORMAT", help="the format of IN (default: detected)")
    add("--encoder", choices=("q", "k"), help="this encoder alone (default: both where OUT holds both, else q)")
    add("--head", choices=("keep", "drop"), help="layers after pooling (default: kept in whole models)")
    add("-a", "--arch", metavar="ARCH", help="the encoder's architecture: checked, and recorded where OUT names it")
    add("--force", action="store_true", help="overwrite OUT")
    add("--report", metavar="FILE", help="the account of every tensor as JSON")
    add("-q", "--quiet", action="store_true", help="only the totals")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape

    from ..checkpoints import convert
    from ..runs.files import write_json

    given = vars(args)
    report = convert(
        given["source"],
        given["output"],
        given["to"],
        from_format=given.get("from_format"),
        encoder=given.get("encoder"),
        keep_head={"keep": True, "drop": False}.get(given.get("head", "")),
        arch=given.get("arch"),
        overwrite=given.get("force", False),
    )
    if "report" in given:
        write_json(given["report"], report.as_dict())
    console = Console(highlight=False, soft_wrap=True)
    if not given.get("quiet"):
        for old, new, shape, dtype in report.mapped:
            console.print(f"  {escape(old)} -> {escape(new)} {escape(str(shape))} {dtype}")
        for name, why in report.left.items():
            console.print(f"[yellow]left[/] {escape(name)}: {escape(why)}")
        for name in report.missing:
            console.print(f"[yellow]missing[/] {escape(name)}")
    console.print(
        f"{given['output']}: {report.from_format} -> {report.to}, {len(report.mapped)} tensors mapped, "
        f"{len(report.left)} left, {len(report.missing)} missing",
        markup=False,
    )
    return 0
