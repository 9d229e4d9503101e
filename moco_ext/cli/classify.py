"""What ``moco-ext linear`` and ``moco-ext finetune`` share: the flags of main_lincls.py, and one training."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .evaluate import Source, percent, process_workers, show, write_result

if TYPE_CHECKING:
    from torch import nn

    from ..data import ImageData
    from ..train.classifier import ClassifierConfig
    from .launch import Process

# Flags that only a training by SGD has.
SGD_FLAGS = (
    *("epochs", "start_epoch", "batch_size", "lr", "schedule", "momentum", "weight_decay"),
    *("crop_min", "seed", "print_freq", "resume", "evaluate"),
)


def add_training_flags(parser: argparse.ArgumentParser, defaults: dict[str, Any]) -> None:
    add = parser.add_argument
    add("--epochs", type=int, metavar="N", help=f"(default: {defaults['epochs']})")
    add("--start-epoch", type=int, metavar="N", help="number of the first, without --resume (default: 0)")
    add("-b", "--batch-size", type=int, metavar="N", help="of a node, all its processes together (default: 256)")
    add("--lr", "--learning-rate", type=float, dest="lr", metavar="LR", help=f"(default: {defaults['lr']:g})")
    schedule = " ".join(map(str, defaults["schedule"]))
    add("--schedule", type=int, nargs="*", metavar="E", help=f"epochs at which lr falls tenfold (default: {schedule})")
    add("--momentum", type=float, metavar="M", help="of SGD (default: 0.9)")
    decay = f"(default: {defaults['weight_decay']:g})"
    add("--wd", "--weight-decay", type=float, dest="weight_decay", metavar="W", help=decay)
    crop = "least share of an image's area in a training view (default: 0.08; small sets: as in pre-training)"
    add("--crop-min", type=float, metavar="A", help=crop)
    add("--seed", type=int, metavar="N", help="of new weights, order and views (default: 0)")
    add("-p", "--print-freq", type=int, metavar="N", help="steps between the figures shown (default: 10)")
    add("--resume", metavar="FILE|auto", help="checkpoint of this command to go on from; auto: the output's, if any")
    add("-e", "--evaluate", action="store_true", help="only score the classifier of --resume, or the output's")


def protocol(given: dict[str, Any], data: ImageData, defaults: dict[str, Any]) -> ClassifierConfig:
    """The defaults and what is given; views of a small set are cropped as its preset has them."""
    from ..data import TensorSplit
    from ..train.classifier import ClassifierConfig
    from ..train.config import resolve_config

    explicit = {field.name: given[field.name] for field in dataclasses.fields(ClassifierConfig) if field.name in given}
    if "schedule" in explicit:
        explicit["schedule"] = tuple(explicit["schedule"])
    preset = {"crop_min": resolve_config(data.name, {}).crop_min} if isinstance(data.train, TensorSplit) else {}
    return ClassifierConfig(**(defaults | preset | explicit))


def train(
    given: dict[str, Any],
    source: Source,
    process: Process,
    name: str,
    encoder: nn.Module,
    arch: str,
    data: ImageData,
    protocol: ClassifierConfig,
    *,
    reference: nn.Module | None = None,
    head_bn: bool = False,
) -> int:
    """Train a classifier on ``encoder``, or with --evaluate only score one; say and write how good it is.

    Args:
        name: of the files written.
        reference: the frozen encoder once more, from its file; None: the encoder is trained too.
    """
    import torch
    from rich.console import Console

    from ..distributed import rank
    from ..runs.options import RunOptions
    from ..train.classifier import Classifier, check_unchanged, evaluate, restore, train_classifier

    torch.manual_seed(protocol.seed)
    model = Classifier(encoder, len(data.classes), data.size, frozen=reference is not None, head_bn=head_bn)
    options = RunOptions(
        source.output,
        process.device,
        workers=process_workers(given, process),
        local_world=process.local_world,
        start_epoch=given.get("start_epoch", 0),
        print_freq=max(1, given.get("print_freq", 10)),
        console=Console(quiet=rank() > 0, stderr=given.get("json", False)),
    )
    checkpoint = source.output / f"{name}.pth"
    resume, only_score = given.get("resume"), given.get("evaluate", False)
    if resume is not None and resume != "auto":
        options.resume = Path(resume)
    elif only_score or (resume == "auto" and checkpoint.is_file()):
        options.resume = checkpoint

    result = {"data": source.data, "arch": arch, "solver": "sgd", **dataclasses.asdict(protocol)}
    title = f"{data.name}: {name}, %"
    columns = ("", "top-1", "top-5")
    # Read again, not copied, so that what it is compared with is the file.
    frozen = None if reference is None else Classifier(reference, 1, data.size).backbone.state_dict()
    if only_score:
        epoch, _ = restore(model, Path(options.resume or checkpoint), arch)
        if frozen is not None:
            check_unchanged(model.backbone, frozen)
        scores = evaluate(model.to(process.device), data, device=process.device, workers=options.workers)
        if rank() == 0:
            result |= {"epochs": epoch, "top1": percent(scores["acc1"]), "top5": percent(scores["acc5"])}
            show(given, result, title, columns, [(f"epoch {epoch}", scores["acc1"], scores["acc5"])])
        return 0

    options.console.print(
        f"{data.name}: {name} of {arch} by SGD, {protocol.epochs} epochs of batch {protocol.batch_size}, lr "
        f"{protocol.lr:g}, on {process.device}",
        highlight=False,
    )
    records = train_classifier(model, data, protocol, options, name=name, arch=arch, reference=frozen)
    if rank() == 0:
        last, best = records[-1], max(records, key=lambda record: record["val_acc1"])
        result |= {"top1": percent(last["val_acc1"]), "top5": percent(last["val_acc5"])}
        result |= {"best_top1": percent(last["best_acc1"]), "seconds": last["seconds"]}
        write_result(source, name, result)
        rows = [
            (f"epoch {r['epoch']}, {which}", r["val_acc1"], r["val_acc5"])
            for which, r in (("last", last), ("best", best))
        ]
        show(given, result, title, columns, rows)
        options.console.print(f"{source.output}/: {name}.json, {name}.pth, {name}_best.pth", highlight=False)
    return 0
