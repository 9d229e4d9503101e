"""What a pre-training run will do: its data, and the source of each setting."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.table import Table

from .. import distributed
from ..checkpoints.files import newest
from ..data import ImageData, load
from ..data.sampler import EpochBatchSampler
from ..encoders import build
from ..evaluate.encoder import recorded_size
from ..runs.files import read_json
from ..runs.options import RunOptions
from ..runs.settings import settings
from ..sharded_queue import exchanged_bytes
from ..train import guide
from ..train.config import PretrainConfig
from ..train.guide import Choice, Machine
from ..train.memory import device_memory, estimate
from ..train.recipes import alternatives, layers, resolve_config
from .flags import given


class Plan(NamedTuple):
    """A run before it starts.

    Attributes:
        sources: where each setting comes from; settings with their default value are absent.
        choices: of the size guide, and why.
    """

    config: PretrainConfig
    data: ImageData
    sources: dict[str, str]
    choices: dict[str, Choice]


def configuration(args: argparse.Namespace, guided: dict[str, Any] | None = None) -> PretrainConfig:
    """The configuration of flags and configuration file, with what the size guide chose."""
    return resolve_config(data_of(args), explicit_settings(args), args.recipe, guided)


def data_of(args: argparse.Namespace) -> str:
    """The data that DIR or --data names; a ValueError if both do. DIR wins over a configuration file."""
    if "" in args.dir:  # an empty variable of a script
        raise ValueError(f"data: expected folders of images or lists of them, got {args.dir}")
    folders = os.pathsep.join(args.dir)
    named = None if folders and "data" in _from_file(args) else args.data
    if folders and named not in (None, folders):
        raise ValueError(f"data: expected DIR or --data, got both: {folders} and {named}")
    return folders or named or "digits"


def explicit_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings given by flags or the configuration file; --schedule turns off a cosine of the file, for example."""
    explicit, file = given(args, PretrainConfig), _from_file(args)
    flags = {name: value for name, value in explicit.items() if name not in file}
    return explicit | {name: off for name, off in alternatives(flags).items() if name in file}


def make_plan(args: argparse.Namespace, options: RunOptions) -> Plan:
    """Load the data and resolve every setting. In a process group every rank must call it; all get the same."""
    explicit = explicit_settings(args)
    guided = _of_resumed_run(options, explicit) if args.recipe is None else {}
    if not guide.applies(data_of(args), args.recipe):  # a preset has the rest
        guided = {name: value for name, value in guided.items() if name == "precision"}
    choices: dict[str, Choice] = {}
    first = configuration(args, guided)
    data = load(first.data, args.data_root, val_fraction=first.val_fraction, image_size=first.image_size)
    if args.recipe is None and not guided:
        choices = _choose(first, data, explicit, options)
        if data.why_not_scored:
            choices.pop("knn_k", None)
        guided = {name: choice.value for name, choice in choices.items()}
    config = configuration(args, guided)
    if config.image_size is not None:
        data = dataclasses.replace(data, size=config.image_size)
    sources = {
        name: _source(layer, name, args, resumed=not choices)
        for layer, values in layers(config.data, explicit, args.recipe, guided).items()
        for name in values
    }
    if args.dir or args.data is not None:
        sources["data"] = "flag" if args.dir else _source("given", "data", args)
    return Plan(config, data, sources, choices)


def show_choices(plan: Plan, options: RunOptions) -> None:
    """What the size guide chose, in a small table or, for one choice, in a line."""
    if len(plan.choices) <= 1:
        for name, (value, reason) in plan.choices.items():
            options.console.print(f"chosen: --{name.replace('_', '-')} {_text(value)} ({reason})", highlight=False)
        return
    table = Table("setting", "value", "why", title="chosen for these images and this device", title_justify="left")
    for name, (value, reason) in plan.choices.items():
        table.add_row(f"--{name.replace('_', '-')}", _text(value), reason)
    options.console.print(table, "flags, --config and --recipe override these", highlight=False)


def check_step_memory(plan: Plan, options: RunOptions) -> None:
    """Raise a MemoryError if this machine has no memory for a step on the CPU.

    The system would swap, and end the process without a message; a GPU refuses to allocate.
    """
    if options.device.type != "cpu":
        return
    batch = plan.config.batch_size // options.local_world
    parts = estimate(plan.config, plan.data.size, len(plan.data.train), batch, distributed.world_size())
    needed = options.local_world * sum(parts.values())
    memory = device_memory(options.device)
    if needed > memory:
        raise MemoryError(f"a step needs about {needed / 2**30:.1f} GiB, and there are {memory / 2**30:.1f} GiB")


def print_dry_run(plan: Plan, options: RunOptions) -> None:
    """Print every setting with its source, the number of steps, and the memory of a training step."""
    config, data, console = plan.config, plan.data, options.console
    table = Table("setting", "value", "source", title=f"pretrain on {data.name}", title_justify="left")
    declared = settings(PretrainConfig)
    for name, value in dataclasses.asdict(config).items():
        source = plan.sources.get(name, "default")
        if name in plan.choices and source == "guide":
            source = f"guide: {plan.choices[name].reason}"
        table.add_row(name, declared[name].shown or "none" if value is None else _text(value), source)
    console.print(table)
    world, local = max(distributed.world_size(), options.local_world), options.local_world
    batch = config.batch_size // local
    sampler = EpochBatchSampler(
        len(data.train), batch, accumulate=config.accumulate, world=world, drop_last=config.drop_last
    )
    steps = config.total_steps(sampler.steps_per_epoch)
    console.print(
        f"{len(data.train):,} training images of {data.size} pixels, {sampler.steps_per_epoch:,} steps per epoch, "
        f"{steps:,} steps",
        highlight=False,
    )
    parts = estimate(config, data.size, len(data.train), batch, world)
    memory = Table("memory", "MB", title=f"{options.device}, batch of {batch}", title_justify="left")
    memory.columns[1].justify = "right"
    for name, size in parts.items():
        memory.add_row(name, f"{size / 1e6:,.1f}")
    memory.add_row("all", f"{sum(parts.values()) / 1e6:,.1f}", style="bold")
    memory.add_row("there is", f"{device_memory(options.device) / 1e6:,.1f}")
    console.print(memory)
    if config.shard_queue and world > 1:
        views = batch * (1 + config.symmetric)
        megabytes = exchanged_bytes(world, views, config.moco_dim) / 1e6
        console.print(
            f"queue of {config.moco_k:,} keys over {world} processes: {megabytes:,.1f} MB sent and received by each in "
            "a step, and the keys",
            highlight=False,
        )


def _choose(
    config: PretrainConfig, data: ImageData, explicit: dict[str, Any], options: RunOptions
) -> dict[str, Choice]:
    """The choices of rank 0, as devices may differ."""
    world = distributed.world_size()
    shared: list[Any] = [None]
    if distributed.rank() == 0:
        local = options.local_world
        share = 1 if options.device.type == "cuda" else local
        available, nodes = device_memory(options.device) // share, max(1, world // local)
        machine = Machine(options.device.type, available, local, nodes, _multiplies_bf16(options.device))

        def memory(settings: dict[str, Any], images: int) -> int:
            settings = {name: value for name, value in settings.items() if name != "batch_size"}
            wanted = resolve_config(config.data, settings)
            return sum(estimate(wanted, wanted.image_size or data.size, len(data.train), images, world).values())

        if guide.applies(config.data, None):
            initial = _of_initial_run(explicit)
            explicit = explicit | {name: choice.value for name, choice in initial.items()}
            side, mlp = guide.typical_side(data.train), _takes_mlp(explicit.get("arch"))
            shared = [initial | guide.choose(len(data.train), side, machine, explicit, memory, mlp=mlp)]
        else:
            shared = [guide.choose_for_device(machine, explicit)]
    if world > 1:
        dist.broadcast_object_list(shared)
    return shared[0]


def _of_initial_run(explicit: dict[str, Any]) -> dict[str, Choice]:
    """The encoder of the run whose weights are the start."""
    source = explicit.get("init")
    if source is None or "arch" in explicit:
        return {}
    config = read_json(newest(Path(source)).parent / "config.json")
    found = {"arch": config["arch"], "image_size": recorded_size(source)} if "arch" in config else {}
    return {
        name: Choice(value, "that of --init")
        for name, value in found.items()
        if value is not None and name not in explicit
    }


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in known)


def _takes_mlp(arch: str | None) -> bool:
    if arch is None:
        return True
    try:
        with torch.device("meta"):
            build(arch, 1, mlp=True)
    except ValueError:  # a head that is not one linear layer, or an unknown name, which is reported later
        return False
    return True


def _of_resumed_run(options: RunOptions, explicit: dict[str, Any]) -> dict[str, Any]:
    """What the run to resume has for settings that were not given: its images or its device may have been others."""
    if options.resume is None:
        return {}
    source = options.output if options.resume == "auto" else Path(options.resume)
    config = read_json(newest(source).parent / "config.json")
    known = {field.name for field in dataclasses.fields(PretrainConfig)} - {"data", *explicit}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in config.items()
        if name in known and value is not None
    }


def _source(layer: str, name: str, args: argparse.Namespace, *, resumed: bool = False) -> str:
    if layer == "given":
        return "config file" if name in _from_file(args) else "flag"
    if layer == "guide" and resumed:
        return "resumed run"
    return f"recipe {args.recipe}" if layer == "recipe" else layer


def _from_file(args: argparse.Namespace) -> frozenset[str]:
    return getattr(args, "from_file", frozenset())


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
