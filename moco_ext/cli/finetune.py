"""``moco-ext finetune``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from . import classify
from .evaluate import add_source_flags, find_source, load_source

if TYPE_CHECKING:
    from .launch import Process

# Of the order published for fine-tuning on 1 % or 10 % of ImageNet's labels (SwAV, arXiv 2006.09882, and its code):
# some tens of epochs with two tenfold falls, lr 0.01 for what is pretrained and must not be forgotten at once, and a
# larger one for the new layers, which start from nothing.
_DEFAULTS: dict[str, Any] = {"epochs": 30, "lr": 0.01, "schedule": (18, 24), "weight_decay": 1e-4}
_HEAD_FACTOR = 10


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "finetune",
        help="classification with all layers trained, on all labels or a fraction",
        description="Train all layers for classification, from a trained encoder (of MoCo, the query encoder) or, as "
        "the comparison, from scratch. BatchNorm is trained too, and synchronised between GPUs; the new linear layer "
        "gets one before it.",
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(run=run)
    add_source_flags(parser)
    classify.add_training_flags(parser, _DEFAULTS)
    add = parser.add_argument
    add("--lr-head", type=float, metavar="LR", help=f"of the new layers (default: {_HEAD_FACTOR} times --lr)")
    add("--fraction", type=float, metavar="F", help="share of each class's labels to train on (default: 1)")
    add("--head-bn", action=argparse.BooleanOptionalAction, help="BatchNorm before the linear layer (default: yes)")
    scratch = "from random weights: of RUN's architecture, or with -a on DATA; results are named scratch"
    add("--scratch", action="store_true", help=scratch)


def run(args: argparse.Namespace) -> int:
    from . import launch

    return launch.run(_work, args)


def _work(args: argparse.Namespace, process: Process) -> int:
    import torch

    from ..data import load
    from ..encoders import build

    given = vars(args)
    source, scratch = find_source(given), given.get("scratch", False)
    if source.weights is None:
        arch, data = given["arch"], load(source.data, given.get("data_root", "data"))
    else:
        encoder, arch, data = load_source(given, source)
    if scratch:
        torch.manual_seed(given.get("seed", 0))
        encoder = build(arch, 1)
    lr_head = _HEAD_FACTOR * given.get("lr", _DEFAULTS["lr"])
    protocol = classify.protocol(given, data, _DEFAULTS | {"lr_head": lr_head})
    name, bn = "scratch" if scratch else "finetune", given.get("head_bn", True)
    return classify.train(given, source, process, name, encoder, arch, data, protocol, head_bn=bn)
