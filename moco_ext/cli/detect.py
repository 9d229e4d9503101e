"""``moco-ext detect``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..checkpoints import files
from ..checkpoints.detectron2 import detector_to_detectron2
from ..data.detection import LAYOUTS, load_detection
from ..evaluate.detection import average_precision, evaluate_detector
from ..runs.options import RunOptions
from ..train.detector import RECIPES, build_detector, train_detector
from . import transfer

_SCORES = ("AP", "AP50", "AP75")


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train Faster R-CNN on a ResNet, from a trained encoder (for MoCo, the query encoder) or, for comparison, from "
        "scratch, as in section 4.2 of the MoCo paper: all layers are trained, and BatchNorm is synchronized between "
        "GPUs."
    )
    data = "folder in the layout of VOC (VOCdevkit, or a year of it) or of COCO"
    transfer.add_flags(parser, "detect", RECIPES, data=data, recipe="voc or coco-1x")
    add = parser.add_argument
    add("--layout", choices=LAYOUTS, help="layout of DATA (default: inferred from its folders)")
    add("--export", metavar="FILE.pkl", help="also write the detector with detectron2's names (--neck c4)")


def run(args: argparse.Namespace) -> int:
    if args.export is not None and Path(args.export).suffix != ".pkl":
        raise ValueError(f"export: expected a name that ends in .pkl, got {args.export}")
    if args.export is not None and not Path(args.export).parent.is_dir():  # before hours of training
        raise FileNotFoundError(f"export: no such folder: {Path(args.export).parent}")
    return transfer.run(_work, args)


def _work(args: argparse.Namespace, options: RunOptions) -> int:
    average_precision([], [])  # a missing package is an error before training
    data = load_detection(args.data, args.layout)
    recipe = RECIPES[args.recipe or {"voc": "voc", "coco": "coco-1x"}[data.layout]]
    start = transfer.load_start(args, options, recipe, data.classes)
    if args.export is not None and start.config.neck != "c4":
        raise ValueError(f"export: expected --neck c4, whose layers detectron2 has names for, got {start.config.neck}")
    torch.manual_seed(start.config.seed)
    model = build_detector(start.encoder, len(data.classes), start.config, start.transform.mean, start.transform.std)

    def export() -> None:
        if args.export is not None:
            state = {name: value.cpu() for name, value in model.state_dict().items()}
            files.write(Path(args.export), detector_to_detectron2(state))

    neck = start.config.neck
    task = transfer.Task("Faster R-CNN", neck, train_detector, evaluate_detector, _SCORES, _SCORES)
    return transfer.train(task, args, options, model, start, data, export)
