"""What ``moco-ext detect`` and ``moco-ext segment`` share: flags, the encoder to start from, and the training."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..checkpoints.training import load_into
from ..data import EvalTransform
from ..data.items import ItemData
from ..distributed import rank
from ..encoders import build
from ..evaluate.encoder import load_encoder
from ..runs.options import RunOptions
from ..runs.settings import settings
from ..train.iterations import IterationsConfig, read
from . import launch
from .classify import RUN_SETTINGS, resolve_resume
from .config_file import add_config_flag
from .evaluate import percent, show, write_result
from .flags import add_settings, given, name_of

_SAVE_EVERY = 1000


class Start(NamedTuple):
    """What a model is built from, and with --evaluate its checkpoint."""

    encoder: nn.Module
    arch: str
    transform: EvalTransform
    config: Any
    checkpoint: dict[str, Any] | None = None


class Task(NamedTuple):
    """What is trained.

    Attributes:
        model: kind of the model, for the console.
        head: ending of the architecture in checkpoints.
        train: ``train(model, data, config, options, name=..., arch=...)`` -> records.
        evaluate: ``evaluate(model, data.test, device=..., workers=...)`` -> scores.
        scores: names of the scores in the result, some of which ``evaluate`` may leave out.
        columns: those in the table.
    """

    model: str
    head: str
    train: Callable[..., list[dict[str, Any]]]
    evaluate: Callable[..., dict[str, float]]
    scores: Sequence[str]
    columns: Sequence[str]


def add_flags(
    parser: argparse.ArgumentParser, name: str, recipes: Mapping[str, IterationsConfig], *, data: str, recipe: str
) -> None:
    """The flags of a task with these ``recipes``; ``data`` and ``recipe`` are help texts."""
    add = parser.add_argument
    add("data", metavar="DATA", help=data)
    add("--pretrained", metavar="WEIGHTS", help="encoder to start from: a run directory or weights, as for finetune")
    add("--scratch", action="store_true", help=f"start from random weights; results are named {name}-scratch")
    add("-a", "--arch", metavar="ARCH", help="architecture of the encoder, if the weights do not name it")
    add("--recipe", choices=recipes, help=f"published values for unspecified options (default: {recipe})")
    add("--output", metavar="DIR", help=f"where results go (default: runs/{name}-DATA)")
    add_config_flag(parser)
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add("-e", "--evaluate", action="store_true", help="only evaluate the model of --resume, or of the output")
    own = settings(type(next(iter(recipes.values()))))
    shown: dict[str, Any] = {
        name: "from the recipe"
        for name, setting in own.items()
        if any(getattr(recipe, name) != setting.default for recipe in recipes.values())
    }
    shown |= {"schedule": "from the recipe, scaled to --iterations", "save_every": _SAVE_EVERY}
    declared = own | RUN_SETTINGS | settings(RunOptions, "workers", "save_every")
    del declared["start_epoch"]
    add_settings(parser, declared | settings(launch.LaunchOptions), shown)


def run(work: launch.Work, args: argparse.Namespace) -> int:
    both = args.scratch and args.pretrained is not None
    started = args.pretrained is not None or (args.scratch and args.arch is not None)
    if both or not (started or args.evaluate):
        got = "both" if args.pretrained else "--scratch alone" if args.scratch else "neither"
        raise ValueError(f"pretrained: expected --pretrained WEIGHTS, or --scratch with --arch ARCH, got {got}")
    return launch.run(work, args, Path(args.output or f"runs/{args.command}-{name_of(args.data)}"))


def load_start(
    args: argparse.Namespace, options: RunOptions, recipe: IterationsConfig, classes: Sequence[str]
) -> Start:
    """The encoder of --pretrained, or a new one; with --evaluate, that of the checkpoint and the settings it records.

    Flags override the settings. A recipe's schedule is scaled to the number of iterations.
    """
    resolve_resume(options, _name(args), args.evaluate)
    flags = given(args, type(recipe))
    if args.evaluate:
        assert options.resume is not None
        checkpoint = read(options.resume, classes)
        arch = checkpoint["arch"].rpartition("-")[0]
        if args.arch not in (None, arch):
            raise ValueError(f"resume: expected a checkpoint of {args.arch}, got one of {arch}: {options.resume}")
        try:
            config = type(recipe)(**checkpoint["config"] | flags)
        except TypeError:
            raise ValueError(
                f"resume: expected a checkpoint of {args.command}, got one of {checkpoint['arch']}: {options.resume}"
            ) from None
        return Start(build(arch, 1), arch, EvalTransform.from_dict(checkpoint["transform"]), config, checkpoint)
    share = flags.get("iterations", recipe.iterations) / recipe.iterations
    schedule = tuple(round(share * milestone) for milestone in recipe.schedule)
    config = dataclasses.replace(recipe, **{"schedule": schedule} | flags)
    if args.scratch:
        torch.manual_seed(config.seed)
        return Start(build(args.arch, 1), args.arch, EvalTransform(), config)
    loaded, transform = load_encoder(args.pretrained, args.arch)
    encoder = getattr(loaded.model, "encoder", loaded.model)  # timm's are wrapped
    return Start(encoder, loaded.arch, transform, config)


def _name(args: argparse.Namespace) -> str:
    return f"{args.command}-scratch" if args.scratch else args.command


def train(
    task: Task,
    args: argparse.Namespace,
    options: RunOptions,
    model: nn.Module,
    start: Start,
    data: ItemData[Any],
    finish: Callable[[], None] = lambda: None,
) -> int:
    """Train ``model``, or with --evaluate only evaluate it; print and write its scores.

    Args:
        finish: what rank 0 does before it prints the scores.
    """
    name, arch, config = _name(args), start.arch, start.config
    options.save_every = getattr(args, "save_every", _SAVE_EVERY)
    if start.checkpoint is not None:
        assert options.resume is not None
        load_into(model, start.checkpoint, Path(options.resume), arch=f"{arch}-{task.head}")
        step = start.checkpoint["iteration"]
        scores = task.evaluate(model.to(options.device), data.test, device=options.device, workers=options.workers)
    else:
        options.console.print(
            f"{data.name}: {len(data.train):,} images, {len(data.classes)} classes, {task.model} {arch}-{task.head}, "
            f"{config.iterations:,} iterations of batch {config.batch_size}, lr {config.lr:g}, on {options.device}",
            highlight=False,
        )
        records = task.train(model, data, config, options, name=name, arch=arch)
        scores, step = records[-1] if rank() == 0 else {}, config.iterations
    if rank() == 0:
        found = {score: percent(scores[score]) for score in task.scores if score in scores}
        result = {"data": args.data, "arch": arch, "pretrained": args.pretrained, **dataclasses.asdict(config)}
        result |= {"iterations": step} | found
        if not args.evaluate:
            write_result(options.output, name, result | {"seconds": scores["seconds"]})
            options.console.print(f"{options.output}/: {name}.json, {name}.pth", highlight=False)
        finish()
        numbers = [found[score] for score in task.columns]
        title = f"{name_of(data.name)}: {name}, %"
        show(
            result,
            title,
            ("", *(column.replace("_", " ") for column in task.columns)),
            [(f"iteration {step:,}", *numbers)],
            as_json=args.json,
        )
    return 0
