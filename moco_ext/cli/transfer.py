"""What ``moco-ext detect`` and ``moco-ext segment`` share: flags, the encoder to start from, and the training."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from ..data import EvalTransform
from ..data.items import ItemData
from ..distributed import rank
from ..encoders import build
from ..evaluate.encoder import load_encoder
from ..runs.options import RunOptions
from ..runs.settings import settings
from ..train.iterations import IterationsConfig, restore
from . import launch
from .classify import RUN_SETTINGS, resolve_resume
from .config_file import add_config_flag
from .evaluate import percent, show, write_result
from .flags import add_settings, given, name_of

C = TypeVar("C", bound=IterationsConfig)
_SAVE_EVERY = 1000


class Task(NamedTuple):
    """What is trained.

    Attributes:
        name: of the files written; ``-scratch`` is added for random weights.
        model: kind of the model, for the console.
        head: ending of the architecture in checkpoints.
        train: ``train(model, data, config, options, name=..., arch=...)`` -> records.
        evaluate: ``evaluate(model, data.test, device=..., workers=...)`` -> scores.
        scores: names of the scores in the result, some of which ``evaluate`` may leave out.
        columns: those in the table.
    """

    name: str
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
        name: "of the recipe"
        for name, setting in own.items()
        if any(getattr(recipe, name) != setting.default for recipe in recipes.values())
    }
    shown |= {"schedule": "of the recipe, scaled to --iterations", "save_every": _SAVE_EVERY}
    declared = own | RUN_SETTINGS | settings(RunOptions, "workers", "save_every")
    del declared["start_epoch"]
    add_settings(parser, declared | settings(launch.LaunchOptions), shown)


def run(work: launch.Work, args: argparse.Namespace) -> int:
    if args.scratch == (args.pretrained is not None) or (args.scratch and args.arch is None):
        got = "both" if args.pretrained else "--scratch alone" if args.scratch else "neither"
        raise ValueError(f"pretrained: expected --pretrained WEIGHTS, or --scratch with --arch ARCH, got {got}")
    return launch.run(work, args, Path(args.output or f"runs/{args.command}-{name_of(args.data)}"))


def load_start(args: argparse.Namespace) -> tuple[nn.Module, str, EvalTransform]:
    """The encoder of --pretrained, or a new one, its architecture, and the transform of its images."""
    if args.scratch:
        torch.manual_seed(getattr(args, "seed", 0))
        return build(args.arch, 1), args.arch, EvalTransform()
    loaded, transform = load_encoder(args.pretrained, args.arch)
    return getattr(loaded.model, "encoder", loaded.model), loaded.arch, transform  # timm's are wrapped


def configuration(args: argparse.Namespace, recipe: C) -> C:
    """The recipe and the flags given; its schedule is scaled to the number of iterations."""
    flags = given(args, type(recipe))
    share = flags.get("iterations", recipe.iterations) / recipe.iterations
    schedule = tuple(round(share * milestone) for milestone in recipe.schedule)
    return dataclasses.replace(recipe, **{"schedule": schedule} | flags)


def train(
    task: Task,
    args: argparse.Namespace,
    options: RunOptions,
    model: nn.Module,
    arch: str,
    data: ItemData[Any],
    config: IterationsConfig,
    finish: Callable[[], None] = lambda: None,
) -> int:
    """Train ``model``, or with --evaluate only evaluate it; print and write its scores.

    Args:
        finish: what rank 0 does before it prints the scores.
    """
    name = f"{task.name}-scratch" if args.scratch else task.name
    options.save_every = getattr(args, "save_every", _SAVE_EVERY)
    resolve_resume(options, name, args.evaluate)
    if args.evaluate:
        assert options.resume is not None
        step = restore(model, Path(options.resume), f"{arch}-{task.head}")
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
