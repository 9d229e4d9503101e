"""``moco-ext detect``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from ..checkpoints import files
from ..checkpoints.detectron2 import detector_to_detectron2
from ..data import EvalTransform
from ..data.detection import LAYOUTS, load_detection
from ..distributed import rank
from ..encoders import build
from ..evaluate.detection import average_precision, evaluate_detector
from ..evaluate.encoder import load_encoder
from ..runs.options import RunOptions
from ..runs.settings import settings
from ..train.detector import RECIPES, DetectorConfig, build_detector, train_detector
from ..train.iterations import restore
from . import launch
from .classify import RUN_SETTINGS, resolve_resume
from .config_file import add_config_flag
from .evaluate import percent, show, write_result
from .flags import add_settings, given, name_of

_SAVE_EVERY = 1000
_SCORES = ("AP", "AP50", "AP75")


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train Faster R-CNN on a ResNet, from a trained encoder (for MoCo, the query encoder) or, for comparison, from "
        "scratch, as in section 4.2 of the MoCo paper: all layers are trained, BatchNorm is synchronized between GPUs."
    )
    add = parser.add_argument
    add("data", metavar="DATA", help="folder in the layout of VOC (VOCdevkit, or a year of it) or of COCO")
    add("--pretrained", metavar="WEIGHTS", help="encoder to start from: a run directory or weights, as for finetune")
    add("--scratch", action="store_true", help="start from random weights; results are named detect-scratch")
    add("-a", "--arch", metavar="ARCH", help="architecture of the encoder, if the weights do not name it")
    add("--layout", choices=LAYOUTS, help="layout of DATA (default: inferred from its folders)")
    add("--recipe", choices=RECIPES, help="published values for unspecified options (default: voc or coco-1x)")
    add("--output", metavar="DIR", help="where results go (default: runs/detect-DATA)")
    add_config_flag(parser)
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add("-e", "--evaluate", action="store_true", help="only evaluate the detector of --resume, or of the output")
    add("--export", metavar="FILE.pkl", help="also write the detector with detectron2's names (--neck c4)")
    declared = settings(DetectorConfig) | RUN_SETTINGS | settings(RunOptions, "workers", "save_every")
    del declared["start_epoch"]
    shown = {name: "of the recipe" for name in ("iterations", "schedule", "min_size", "warmup")}
    shown["schedule"] = "of the recipe, scaled to --iterations"
    add_settings(parser, declared | settings(launch.LaunchOptions), shown | {"save_every": _SAVE_EVERY})


def run(args: argparse.Namespace) -> int:
    if args.scratch == (args.pretrained is not None) or (args.scratch and args.arch is None):
        got = "both" if args.pretrained else "--scratch alone" if args.scratch else "neither"
        raise ValueError(f"pretrained: expected --pretrained WEIGHTS, or --scratch with --arch ARCH, got {got}")
    if args.export is not None and Path(args.export).suffix != ".pkl":
        raise ValueError(f"export: expected a name that ends in .pkl, got {args.export}")
    output = Path(args.output or f"runs/detect-{name_of(args.data)}")
    return launch.run(_work, args, output)


def configuration(args: argparse.Namespace, layout: str) -> DetectorConfig:
    """The recipe and the flags given; its schedule is scaled to the number of iterations."""
    recipe = RECIPES[args.recipe or {"voc": "voc", "coco": "coco-1x"}[layout]]
    flags = given(args, DetectorConfig)
    share = flags.get("iterations", recipe.iterations) / recipe.iterations
    schedule = tuple(round(share * milestone) for milestone in recipe.schedule)
    return dataclasses.replace(recipe, **{"schedule": schedule} | flags)


def _work(args: argparse.Namespace, options: RunOptions) -> int:
    average_precision([], [])  # a missing package is an error before training
    if args.scratch:
        torch.manual_seed(getattr(args, "seed", 0))
        encoder, arch, transform = build(args.arch, 1), args.arch, EvalTransform()
    else:
        loaded, transform = load_encoder(args.pretrained, args.arch)
        encoder, arch = getattr(loaded.model, "encoder", loaded.model), loaded.arch  # timm's are wrapped
    data = load_detection(args.data, args.layout)
    config = configuration(args, data.layout)
    torch.manual_seed(config.seed)
    model = build_detector(encoder, len(data.classes), config, transform.mean, transform.std)
    name = "detect-scratch" if args.scratch else "detect"
    options.save_every = getattr(args, "save_every", _SAVE_EVERY)
    resolve_resume(options, name, args.evaluate)
    if args.evaluate:
        assert options.resume is not None
        step = restore(model, Path(options.resume), f"{arch}-{config.neck}")
        model.to(options.device)
        scores = evaluate_detector(model, data.test, device=options.device, workers=options.workers)
    else:
        options.console.print(
            f"{data.name}: {len(data.train):,} images, {len(data.classes)} classes, Faster R-CNN {arch}-{config.neck}, "
            f"{config.iterations:,} iterations of batch {config.batch_size}, lr {config.lr:g}, on {options.device}",
            highlight=False,
        )
        records = train_detector(model, data, config, options, name=name, arch=arch)
        scores, step = records[-1] if rank() == 0 else {}, config.iterations
    if rank() == 0:
        found = {name: percent(scores[name]) for name in _SCORES}
        result = {"data": args.data, "arch": arch, "pretrained": args.pretrained, **dataclasses.asdict(config)}
        result |= {"iterations": step} | found
        if not args.evaluate:
            write_result(options.output, name, result | {"seconds": scores["seconds"]})
            options.console.print(f"{options.output}/: {name}.json, {name}.pth", highlight=False)
        if args.export is not None:
            state = {name: value.cpu() for name, value in model.state_dict().items()}
            files.write(Path(args.export), detector_to_detectron2(state))
        show(
            result,
            f"{name_of(data.name)}: {name}, %",
            ("", *_SCORES),
            [(f"iteration {step:,}", *found.values())],
            as_json=args.json,
        )
    return 0
