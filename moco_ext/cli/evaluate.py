"""What ``moco-ext knn``, ``linear`` and ``finetune`` share: weights and data to evaluate, and the result."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table
from torch import nn

from ..checkpoints.pretrained import TIMM, TORCHVISION, load_pretrained
from ..data import ImageData, load, seen_from_here
from ..encoders import set_image_size
from ..evaluate.encoder import normalized_for, recorded_size
from ..runs.console import make_console
from ..runs.files import read_json, write_json
from ..runs.options import RunOptions
from ..runs.settings import settings
from . import launch
from .config_file import add_config_flag
from .flags import add_data_flags, add_settings, name_of

_CAPTION = ("solver", "k", "temperature", "C", "fraction", "labels_per_class")


class Inputs(NamedTuple):
    """What is evaluated.

    Attributes:
        weights: for :func:`moco_ext.checkpoints.pretrained.load_pretrained`; None: from scratch.
        data: name or folder.
        config: of the pre-training run; empty if there is none.
        output: where results go.
    """

    weights: str | None
    data: str
    config: dict[str, Any]
    output: Path


def add_input_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "source",
        metavar="RUN|DATA",
        help="run directory or weights; with --pretrained, the data: an image folder or a name, as for --data",
    )
    add(
        "--pretrained",
        metavar="WEIGHTS",
        help="run directory, checkpoint of any known format, state dict (pickled or .safetensors), or "
        "torchvision:NAME such as torchvision:IMAGENET1K_V2, or timm:NAME",
    )
    add("-a", "--arch", metavar="ARCH", help="architecture of the encoder, if the weights do not name it")
    add_data_flags(parser, "that of the run")
    add(
        "--val-fraction",
        type=float,
        metavar="F",
        help="fraction of the images to hold out, if there is no val/ (default: that of the run)",
    )
    add("--image-size", type=int, metavar="N", help="side of the images in pixels (default: as in training, or 224)")
    add("--output", metavar="DIR", help="where results go (default: the run directory, else runs/COMMAND-DATA)")
    add_config_flag(parser)
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add_settings(parser, settings(RunOptions, "workers") | settings(launch.LaunchOptions))


def run(work: Callable[[Inputs, argparse.Namespace, RunOptions], int], args: argparse.Namespace) -> int:
    """Call ``work`` in every process of the command; the exit status."""
    inputs = find_inputs(args)
    return launch.run(partial(work, inputs), args, inputs.output)


def find_inputs(args: argparse.Namespace) -> Inputs:
    """The inputs that the flags name; a ValueError if they name no data, or two."""
    names_data = args.pretrained is not None or (getattr(args, "scratch", False) and args.arch is not None)
    weights = args.pretrained if names_data else args.source
    config, run = _configuration(weights)
    data = args.source if names_data else args.data or config.get("data")
    if names_data and args.data not in (None, data):
        raise ValueError(f"data: expected DATA or --data, got both: {data} and {args.data}")
    if data is None:
        raise ValueError(f"data: expected --data, as there is no config.json next to {weights} that names it")
    return Inputs(weights, data, config, Path(args.output or run or f"runs/{args.command}-{name_of(data)}"))


def _configuration(weights: str | None) -> tuple[dict[str, Any], Path | None]:
    """The configuration of the pre-training run that wrote the weights, and its directory."""
    if weights is None or weights.startswith((TORCHVISION, TIMM)):
        return {}, None
    folder = Path(weights) if Path(weights).is_dir() else Path(weights).parent
    config = read_json(folder / "config.json")
    if "data" in config:
        directory = read_json(folder / "environment.json").get("directory")
        config["data"] = seen_from_here(config["data"], directory)
    return config, folder if config else None


def load_inputs(inputs: Inputs, args: argparse.Namespace) -> tuple[nn.Module, str, ImageData]:
    """Encoder, its architecture, and data, normalized as in its training; the encoder first, as data may have to be
    downloaded."""
    assert inputs.weights is not None
    encoder, arch = load_pretrained(inputs.weights, args.arch)
    data = normalized_for(inputs.weights, load_labeled(inputs, args))
    set_image_size(encoder, data.size)
    return encoder, arch, data


def load_labeled(inputs: Inputs, args: argparse.Namespace) -> ImageData:
    """The data; a ValueError, before anything is computed, if it has no labeled test images."""
    size = args.image_size
    if size is None and inputs.weights is not None:
        size = recorded_size(inputs.weights)
    data = load(
        inputs.data,
        args.data_root,
        val_fraction=inputs.config.get("val_fraction", 0.0) if args.val_fraction is None else args.val_fraction,
        image_size=size,
    )
    assert data.splits
    return data


def percent(value: float) -> float:
    return round(value, 2)


def write_result(output: Path, name: str, result: dict[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / f"{name}.json", result)


def show(
    result: dict[str, Any], title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, as_json: bool
) -> None:
    """Print ``result`` as JSON, or a table of rows (label, numbers...) with the options in its caption."""
    if as_json:
        print(json.dumps(result))
        return
    options = {name: result[name] for name in _CAPTION if result.get(name) is not None}
    table = Table(columns[0], title=title, caption=" ".join(f"{name}={value}" for name, value in options.items()))
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for label, *numbers in rows:
        table.add_row(label, *(f"{number:.2f}" for number in numbers))
    make_console().print(table)
