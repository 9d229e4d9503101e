"""``moco-ext linear``: main_lincls.py, and a solver for data sets that fit in memory."""

from __future__ import annotations

import argparse

from torch import nn

from ..checkpoints.pretrained import load_pretrained
from ..data import ImageData, TensorSplit
from ..distributed import rank
from ..evaluate.scores import all_features, linear_score
from ..runs.directory import report_unreadable
from ..runs.options import RunOptions
from ..runs.settings import settings
from ..train.classifier import ClassifierConfig
from . import classify, evaluate
from .evaluate import Inputs, load_inputs, percent, show, write_result
from .flags import given

# Those of main_lincls.py.
_DEFAULTS = ClassifierConfig(epochs=100, lr=30.0, schedule=(60, 80), weight_decay=0.0)
# All layers that are trained are new.
_SETTINGS = {
    name: setting
    for name, setting in (settings(ClassifierConfig) | classify.RUN_SETTINGS).items()
    if name not in ("lr_head", "fraction")
}
_SUBSET = ("labels_per_class", "seed")  # which images are labeled, for both solvers


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train a linear classifier on the pooled features of a frozen encoder (for MoCo, the query encoder): by SGD on "
        "augmented images, with the flags and defaults of main_lincls.py, or by L-BFGS on images without augmentation, "
        "compared with raw pixels."
    )
    evaluate.add_input_flags(parser)
    which = "optimizer (default: lbfgs for the built-in data sets if no flag of SGD is given, else sgd)"
    parser.add_argument("--solver", choices=("sgd", "lbfgs"), help=which)
    parser.add_argument("-C", type=float, metavar="C", help="inverse L2 penalty of lbfgs (default: 1)")
    classify.add_training_flags(parser, _SETTINGS, _DEFAULTS)


def run(args: argparse.Namespace) -> int:
    return evaluate.run(_work, args)


def _work(inputs: Inputs, args: argparse.Namespace, options: RunOptions) -> int:
    encoder, arch, data = load_inputs(inputs, args)
    if _solver(args, data) == "lbfgs":
        return _solve(inputs, args, options, encoder, arch, data)
    assert inputs.weights is not None
    again, _ = load_pretrained(inputs.weights, arch, data.size)
    config = classify.configuration(args, data, _DEFAULTS)
    return classify.train(inputs, args, options, "linear", encoder, arch, data, config, reference=again)


def _solver(args: argparse.Namespace, data: ImageData) -> str:
    shared = ("precision", *(_SUBSET if hasattr(args, "labels_per_class") else ()))
    of_sgd = [f"--{name.replace('_', '-')}" for name in _SETTINGS if hasattr(args, name) and name not in shared]
    of_sgd += ["--evaluate"] if args.evaluate else []
    small = isinstance(data.train, TensorSplit)
    solver = args.solver or ("lbfgs" if args.C is not None or (small and not of_sgd) else "sgd")
    unused = of_sgd if solver == "lbfgs" else ["-C"] if args.C is not None else []
    if unused:
        raise ValueError(f"solver: expected no {', '.join(unused)} with {solver}, which does not use it")
    return solver


def _solve(
    inputs: Inputs, args: argparse.Namespace, options: RunOptions, encoder: nn.Module, arch: str, data: ImageData
) -> int:
    C = 1.0 if args.C is None else args.C
    subset = given(args, ClassifierConfig)
    precision = subset.pop("precision", "fp32")
    features = all_features(data, options, trained=encoder, precision=precision)
    report_unreadable(options, data.unite_unreadable())
    if rank() == 0:  # the problem has one solution: the other ranks need not find it too
        scores = {name: percent(linear_score(data, rows, C=C, **subset)) for name, rows in features.items()}
        result = {"data": inputs.data, "arch": arch, "solver": "lbfgs", "precision": precision, "C": C, **subset}
        result |= {"linear_top1": scores}
        write_result(options.output, "linear", result)
        rows = [("raw pixels", scores["pixels"]), ("encoder", scores["trained"])]
        show(result, f"{data.name}: linear top-1, %", ("features", "linear"), rows, as_json=args.json)
    return 0
