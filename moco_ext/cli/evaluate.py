"""What ``moco-ext knn``, ``linear`` and ``finetune`` share: where weights and data come from, where results go."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .flags import add_data_flags, add_launch_flags, add_machine_flags, workers

if TYPE_CHECKING:
    from torch import nn

    from ..data import ImageData
    from .launch import Process


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "source",
        metavar="RUN|DATA",
        help="run directory or weights; with --pretrained, the data: an image folder or a name, as --data takes",
    )
    add(
        "--pretrained",
        metavar="WEIGHTS",
        help="run directory; checkpoint, ours or the official MoCo's; state dict, pickled or .safetensors; "
        "torchvision:NAME, as in torchvision:IMAGENET1K_V2",
    )
    add("-a", "--arch", metavar="ARCH", help="encoder, where the weights do not say")
    add_data_flags(parser, "the run's own")
    add("--output", metavar="DIR", help="where results go (default: the run directory, else runs/COMMAND-DATA)")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add_machine_flags(parser)
    add_launch_flags(parser)


class Source(NamedTuple):
    """What is evaluated.

    Attributes:
        weights: for :func:`moco_ext.evaluate.weights.load_pretrained`; None: from scratch.
        data: name or folder.
        config: of the pre-training run; empty if there is none.
        output: where results go.
    """

    weights: str | None
    data: str
    config: dict[str, Any]
    output: Path


def find_source(given: dict[str, Any]) -> Source:
    """What the flags name; a ValueError if they name no data, or two."""
    named, weights = given["source"], given.get("pretrained")
    names_data = weights is not None or (given.get("scratch", False) and "arch" in given)
    weights = weights if names_data else named
    config, run = _configuration(weights)
    data = named if names_data else given.get("data", config.get("data"))
    if names_data and given.get("data", data) != data:
        raise ValueError(f"data: expected DATA or --data, got both: {data} and {given['data']}")
    if data is None:
        raise ValueError(f"data: expected --data, as {weights} has no config.json beside it that says")
    default = run or Path("runs") / f"{given['command']}-{Path(data).name}"
    return Source(weights, data, config, Path(given.get("output", default)))


def _configuration(weights: str | None) -> tuple[dict[str, Any], Path | None]:
    """The configuration of the pre-training run that the weights are of, and its directory."""
    if weights is None:
        return {}, None
    folder = Path(weights) if Path(weights).is_dir() else Path(weights).parent
    file = folder / "config.json"
    return (json.loads(file.read_text()), folder) if file.is_file() else ({}, None)


def load_source(given: dict[str, Any], source: Source) -> tuple[nn.Module, str, ImageData]:
    """Encoder, its architecture, and data; the encoder first, as data may be a download."""
    from ..checkpoints.pretrained import load_pretrained
    from ..data import load

    assert source.weights is not None
    encoder, arch = load_pretrained(source.weights, given.get("arch"))
    return encoder, arch, load(source.data, given.get("data_root", "data"))


def process_workers(given: dict[str, Any], process: Process) -> int:
    return -(-workers(given) // process.local_world)


def percent(value: float) -> float:
    return round(value, 2)


def write_result(source: Source, name: str, result: dict[str, Any]) -> None:
    from ..runs.files import write_json

    source.output.mkdir(parents=True, exist_ok=True)
    write_json(source.output / f"{name}.json", result)


def show(
    given: dict[str, Any], result: dict[str, Any], title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> None:
    """Print ``result``, or a table: of each row a label and its figures, and a caption of the options."""
    from rich.console import Console
    from rich.table import Table

    if given.get("json"):
        print(json.dumps(result))
        return
    options = {name: result[name] for name in ("solver", "k", "temperature", "C", "fraction") if name in result}
    table = Table(columns[0], title=title, caption=" ".join(f"{name}={value}" for name, value in options.items()))
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for label, *figures in rows:
        table.add_row(label, *(f"{figure:.2f}" for figure in figures))
    Console().print(table)
