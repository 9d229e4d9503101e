"""``moco-ext distill``: moco-ext pretrain from a teacher."""

from __future__ import annotations

import argparse

from ..evaluate.encoder import load_encoder
from . import pretrain


def add_flags(parser: argparse.ArgumentParser) -> None:
    teacher = (
        "a run, a checkpoint that names its architecture, an exported folder, hf:USER/NAME, timm:NAME, or "
        "torchvision:CLASS.NAME, such as torchvision:ResNet50_Weights.IMAGENET1K_V2"
    )
    parser.add_argument("teacher", metavar="TEACHER", help=teacher)
    pretrain.add_flags(parser)
    parser.description = (
        "Train an encoder of any architecture, without labels, to reproduce the similarities between images that a "
        "frozen teacher computes. The loss is the KL divergence between their softmaxes over a queue of the teacher's "
        "features. The flags are those of moco-ext pretrain."
    )


def run(args: argparse.Namespace) -> int:
    if getattr(args, "dictionary", "distillation") != "distillation":
        raise ValueError(f"dictionary: expected distillation, got {args.dictionary}")
    args.dictionary = "distillation"
    if not hasattr(args, "moco_dim"):
        args.moco_dim = load_encoder(args.teacher)[0].num_features
    return pretrain.run(args)
