"""What ``moco-ext linear`` and ``moco-ext finetune`` share: the flags of main_lincls.py, and the training."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ..data import ImageData, TensorSplit
from ..distributed import rank
from ..runs.directory import report_unreadable
from ..runs.options import RunOptions
from ..runs.settings import Setting, settings
from ..train.classifier import Classifier, ClassifierConfig, check_unchanged, evaluate, restore, train_classifier
from ..train.recipes import resolve_config
from .evaluate import Inputs, percent, show, write_result
from .flags import add_settings, given

RUN_SETTINGS = {
    name: setting._replace(group="")
    for name, setting in settings(RunOptions, "start_epoch", "print_freq", "log_seconds", "logger", "resume").items()
}


def add_training_flags(
    parser: argparse.ArgumentParser, declared: Mapping[str, Setting], defaults: ClassifierConfig
) -> None:
    shown = {name: getattr(defaults, name) for name in declared if hasattr(defaults, name)}
    shown["lr_head"] = declared["lr_head"].shown if "lr_head" in declared else None
    shown["crop_min"] = f"{defaults.crop_min}; the small built-in sets: as in pre-training"
    add_settings(parser, declared, shown)
    parser.add_argument(
        "-e", "--evaluate", action="store_true", help="only evaluate the classifier of --resume, or of the output"
    )


def configuration(args: argparse.Namespace, data: ImageData, defaults: ClassifierConfig) -> ClassifierConfig:
    """The defaults and the flags given; views of a small set are cropped as in its pre-training preset."""
    preset = {"crop_min": resolve_config(data.name, {}).crop_min} if isinstance(data.train, TensorSplit) else {}
    return dataclasses.replace(defaults, **preset | given(args, ClassifierConfig))


def resolve_resume(options: RunOptions, name: str, evaluate: bool) -> None:
    """Replace ``auto``, or no ``--resume`` of a command that only evaluates, by the checkpoint of the output."""
    if options.resume == "auto" or (evaluate and options.resume is None):
        checkpoint = options.output / f"{name}.pth"
        options.resume = checkpoint if evaluate or checkpoint.is_file() else None


def train(
    inputs: Inputs,
    args: argparse.Namespace,
    options: RunOptions,
    name: str,
    encoder: nn.Module,
    arch: str,
    data: ImageData,
    config: ClassifierConfig,
    *,
    reference: nn.Module | None = None,
    head_bn: bool = False,
) -> int:
    """Train a classifier on ``encoder``, or with --evaluate only evaluate one; print and write its accuracy.

    Args:
        name: of the files written.
        reference: for a frozen encoder, a second one loaded from the same file; None: the encoder is trained too.
    """
    torch.manual_seed(config.seed)
    model = Classifier(encoder, len(data.classes), data.size, frozen=reference is not None, head_bn=head_bn)
    resolve_resume(options, name, args.evaluate)
    result = {"data": inputs.data, "arch": arch, "solver": "sgd", **dataclasses.asdict(config)}
    title = f"{data.name}: {name}, %"
    columns = ("", "top-1", "top-5")
    # Loaded again, not copied: it is the file that the encoder is compared with.
    frozen = None if reference is None else Classifier(reference, 1, data.size).backbone.state_dict()
    if args.evaluate:
        assert options.resume is not None
        checkpoint = restore(model, data, Path(options.resume), arch)
        epoch, trained = checkpoint["epoch"], checkpoint["config"]
        if frozen is not None:
            check_unchanged(model.backbone, frozen)
        model.precision = config.precision
        scores = evaluate(model.to(options.device), data, device=options.device, workers=options.workers)
        report_unreadable(options, data.unite_unreadable())
        if rank() == 0:
            result |= trained | {"epochs": epoch, "top1": percent(scores["acc1"]), "top5": percent(scores["acc5"])}
            show(result, title, columns, [(f"epoch {epoch}", scores["acc1"], scores["acc5"])], as_json=args.json)
        return 0

    options.console.print(
        f"{data.name}: {name} of {arch} by SGD, {config.epochs} epochs of batch {config.batch_size}, lr "
        f"{config.lr:g}, on {options.device}",
        highlight=False,
    )
    records = train_classifier(model, data, config, options, name=name, arch=arch, reference=frozen)
    report_unreadable(options, data.unite_unreadable())
    if rank() == 0:
        last, best = records[-1], max(records, key=lambda record: record["val_acc1"])
        result |= {"top1": percent(last["val_acc1"]), "top5": percent(last["val_acc5"])}
        result |= {"best_top1": percent(last["best_acc1"]), "seconds": last["seconds"]}
        write_result(options.output, name, result)
        rows = [
            (f"epoch {record['epoch']}, {which}", record["val_acc1"], record["val_acc5"])
            for which, record in (("last", last), ("best", best))
        ]
        show(result, title, columns, rows, as_json=args.json)
        options.console.print(f"{options.output}/: {name}.json, {name}.pth, {name}_best.pth", highlight=False)
    return 0
