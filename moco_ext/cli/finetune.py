"""``moco-ext finetune``."""

from __future__ import annotations

import argparse
import dataclasses

import torch

from ..encoders import build
from ..runs.options import RunOptions
from ..runs.settings import settings
from ..train.classifier import ClassifierConfig
from . import classify, evaluate
from .evaluate import Inputs, load_inputs

# Similar to what is published for fine-tuning on 1 % or 10 % of ImageNet's labels (SwAV, arXiv 2006.09882, and its
# code): some tens of epochs with two tenfold falls, lr 0.01 for the pretrained layers, which should not be forgotten at
# once, and a larger one for the new layers, which are random.
_DEFAULTS = ClassifierConfig(epochs=30, lr=0.01, schedule=(18, 24), weight_decay=1e-4)
_HEAD_FACTOR = 10


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train all layers for classification, from a trained encoder (for MoCo, the query encoder) or, for comparison, "
        "from scratch. BatchNorm is trained too, and synchronized between GPUs; another BatchNorm precedes the new "
        "linear layer."
    )
    evaluate.add_input_flags(parser)
    declared = settings(ClassifierConfig) | classify.RUN_SETTINGS
    declared["lr_head"] = declared["lr_head"]._replace(shown=f"{_HEAD_FACTOR} times --lr")
    classify.add_training_flags(parser, declared, _DEFAULTS)
    add = parser.add_argument
    add(
        "--head-bn",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="BatchNorm before the linear layer (default: yes)",
    )
    scratch = "start from random weights, with the architecture of RUN, or on DATA with -a; results are named scratch"
    add("--scratch", action="store_true", help=scratch)


def run(args: argparse.Namespace) -> int:
    return evaluate.run(_work, args)


def _work(inputs: Inputs, args: argparse.Namespace, options: RunOptions) -> int:
    if inputs.weights is None:
        arch, data = args.arch, evaluate.load_labeled(inputs, args)
    else:
        encoder, arch, data = load_inputs(inputs, args)
    config = classify.configuration(args, data, _DEFAULTS)
    if config.lr_head is None:
        config = dataclasses.replace(config, lr_head=_HEAD_FACTOR * config.lr)
    if args.scratch:
        torch.manual_seed(config.seed)
        encoder = build(arch, 1)
    name = "scratch" if args.scratch else "finetune"
    return classify.train(inputs, args, options, name, encoder, arch, data, config, head_bn=args.head_bn)
