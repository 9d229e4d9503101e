"""``moco-ext linear``: main_lincls.py, and a solver for what fits in memory."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from . import classify
from .evaluate import add_source_flags, find_source, load_source, percent, process_workers, show, write_result

if TYPE_CHECKING:
    from torch import nn

    from ..data import ImageData
    from .evaluate import Source
    from .launch import Process

# Those of main_lincls.py.
_DEFAULTS: dict[str, Any] = {"epochs": 100, "lr": 30.0, "schedule": (60, 80), "weight_decay": 0.0}


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "linear",
        help="linear classification top-1 of a trained encoder",
        description="Linear classification on the pooled features of a frozen encoder (of MoCo, the query encoder): by "
        "SGD on augmented images, with the flags, names and defaults of main_lincls.py, or solved by L-BFGS on the "
        "features of the images as they are, beside raw pixels.",
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(run=run)
    add_source_flags(parser)
    which = "(default: lbfgs for the small built-in sets if no flag of SGD is given, else sgd)"
    parser.add_argument("--solver", choices=("sgd", "lbfgs"), help=which)
    parser.add_argument("-C", type=float, metavar="C", help="inverse L2 penalty of lbfgs (default: 1)")
    classify.add_training_flags(parser, _DEFAULTS)


def run(args: argparse.Namespace) -> int:
    from . import launch

    return launch.run(_work, args)


def _work(args: argparse.Namespace, process: Process) -> int:
    from ..checkpoints.pretrained import load_pretrained

    given = vars(args)
    source = find_source(given)
    encoder, arch, data = load_source(given, source)
    if _solver(given, data) == "lbfgs":
        return _solve(given, source, process, encoder, arch, data)
    assert source.weights is not None
    again, _ = load_pretrained(source.weights, arch)
    protocol = classify.protocol(given, data, _DEFAULTS)
    return classify.train(given, source, process, "linear", encoder, arch, data, protocol, reference=again)


def _solver(given: dict[str, Any], data: ImageData) -> str:
    from ..data import TensorSplit

    of_sgd = [f"--{flag.replace('_', '-')}" for flag in classify.SGD_FLAGS if flag in given]
    small = isinstance(data.train, TensorSplit)
    solver = given.get("solver", "lbfgs" if "C" in given or (small and not of_sgd) else "sgd")
    foreign = of_sgd if solver == "lbfgs" else ["-C"] if "C" in given else []
    if foreign:
        raise ValueError(f"solver: expected no {', '.join(foreign)} with {solver}, which has no use for it")
    return solver


def _solve(
    given: dict[str, Any], source: Source, process: Process, encoder: nn.Module, arch: str, data: ImageData
) -> int:
    from ..distributed import rank
    from ..evaluate import encoder_features, linear_top1, pixel_features

    workers, C = process_workers(given, process), given.get("C", 1.0)
    encoder.to(process.device)
    train_labels, test_labels = (split.labels for split in data.splits)
    scores = {}
    for name in ("pixels", "trained"):
        train, test = (
            pixel_features(data, split, workers=workers)
            if name == "pixels"
            else encoder_features(encoder, data, split, device=process.device, workers=workers)
            for split in data.splits
        )
        if rank() == 0:  # the problem has one solution; to find it several times is no help
            scores[name] = percent(linear_top1(train, train_labels, test, test_labels, C=C))
    if rank() == 0:
        result = {"data": source.data, "arch": arch, "solver": "lbfgs", "C": C, "linear_top1": scores}
        write_result(source, "linear", result)
        rows = [("raw pixels", scores["pixels"]), ("encoder", scores["trained"])]
        show(given, result, f"{data.name}: linear top-1, %", ("features", "linear"), rows)
    return 0
