"""``moco-ext segment``."""

from __future__ import annotations

import argparse

import torch

from ..data.segmentation import load_segmentation
from ..evaluate.segmentation import evaluate_segmenter
from ..runs.options import RunOptions
from ..train.segmenter import HEAD, RECIPES, build_segmenter, train_segmenter
from . import transfer

_COLUMNS = ("mIoU", "pixel_accuracy")


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train an FCN for semantic segmentation on a ResNet, from a trained encoder (for MoCo, the query encoder) or, "
        "for comparison, from scratch, as in section 4.2 of the MoCo paper: all layers are trained, and BatchNorm "
        "is synchronized between GPUs."
    )
    data = "folder in the layout of VOC or Cityscapes, or with images/{train,val} and masks/{train,val}"
    transfer.add_flags(parser, "segment", RECIPES, data=data, recipe="cityscapes for its layout, else voc")


def run(args: argparse.Namespace) -> int:
    return transfer.run(_work, args)


def _work(args: argparse.Namespace, options: RunOptions) -> int:
    data = load_segmentation(args.data)
    recipe = RECIPES[args.recipe or (data.layout if data.layout in RECIPES else "voc")]
    start = transfer.load_start(args, options, recipe, data.classes)
    torch.manual_seed(start.config.seed)
    model = build_segmenter(start.encoder, len(data.classes), start.config, start.transform.mean, start.transform.std)
    scores = (*_COLUMNS, *(f"IoU/{name}" for name in data.classes))
    task = transfer.Task("FCN", HEAD, train_segmenter, evaluate_segmenter, scores, _COLUMNS)
    return transfer.train(task, args, options, model, start, data)
