"""The pre-training loop: the four lines of a MoCo step, and what a run needs around them."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..data import ImageData, two_crop_batches
from ..data.loader import epoch_seed
from ..encoders import resolve
from ..evaluate import encoder_features, knn_top1
from ..moco import MoCo
from .checkpoint import load_checkpoint, save_checkpoint
from .config import PretrainConfig
from .log import MetricLog, TrainingProgress


@dataclasses.dataclass
class Run:
    """Where a run executes and what it leaves behind; nothing here changes what is learnt."""

    output: Path
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    resume: Path | None = None
    workers: int = 0
    print_freq: int = 10
    console: Console = dataclasses.field(default_factory=Console)


def build_model(config: PretrainConfig) -> MoCo:
    """The model of a run at its first step: the same weights whenever the seed is the same."""
    torch.manual_seed(config.seed)
    return MoCo(
        resolve(config.arch),
        dim=config.moco_dim,
        K=config.moco_k,
        m=config.moco_m,
        T=config.moco_t,
        mlp=config.mlp,
    )


def pretrain(config: PretrainConfig, data: ImageData, run: Run, model: MoCo | None = None) -> list[dict[str, Any]]:
    """Train ``model`` (by default :func:`build_model`'s) in place; one record of metrics an epoch, all
    returned.

    Writes ``checkpoint.pth`` after every epoch, ``metrics.jsonl`` and ``tensorboard/`` to ``run.output``. A
    record has epoch (from 1), loss, acc1 and acc5 (contrast accuracy, percent), lr, images_per_second,
    seconds (training time so far, without evaluations) and, every ``config.knn_every`` epochs and after the
    last, knn_top1.

    One process, one device, float32.

    Raises:
        FloatingPointError: the loss is not finite. Nothing of that step has entered parameters or queue.
    """
    if config.moco_k > len(data.train):
        warnings.warn(
            f"moco_k: {config.moco_k} keys but only {len(data.train)} images in {data.name}: other views of an image "
            "will be among its negatives; a smaller --moco-k is better",
            stacklevel=2,
        )
    model = (model or build_model(config)).to(run.device)
    optimizer = torch.optim.SGD(
        model.encoder_q.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    done = _resume(run.resume, config, model, optimizer) if run.resume else 0
    log = MetricLog(run.output, keep_epochs=done)
    seconds = log.records[-1]["seconds"] if log.records else 0.0
    steps = math.ceil(len(data.train) / config.batch_size)
    bar = TrainingProgress(run.console, epochs=config.epochs, steps=steps, done_epochs=done, K=config.moco_k)
    with bar:
        for epoch in range(done, config.epochs):
            started = time.perf_counter()
            record = _train_epoch(config, data, run, model, optimizer, epoch, bar)
            seconds += time.perf_counter() - started
            record["seconds"] = round(seconds, 3)
            last = epoch + 1 == config.epochs
            if data.test is not None and (last or (config.knn_every and (epoch + 1) % config.knn_every == 0)):
                record["knn_top1"] = encoder_knn(model.encoder_q, data, run, config.knn_k)
            log.write(record)
            bar.epoch_done(record)
            save_checkpoint(
                run.output / "checkpoint.pth",
                epoch=epoch + 1,
                arch=config.arch,
                model=model,
                optimizer=optimizer,
            )
    log.close()
    return log.records


def encoder_knn(encoder: torch.nn.Module, data: ImageData, run: Run, k: int) -> float:
    """kNN top-1 in percent of an encoder's features on the test split."""
    train, test = (
        encoder_features(encoder, data, split, device=run.device, workers=run.workers) for split in data.splits
    )
    train_labels, test_labels = (split.labels for split in data.splits)
    return knn_top1(train, train_labels, test, test_labels, k=k)


def _train_epoch(
    config: PretrainConfig,
    data: ImageData,
    run: Run,
    model: MoCo,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    bar: TrainingProgress,
) -> dict[str, Any]:
    model.train()
    lr = config.learning_rate(epoch)
    for group in optimizer.param_groups:
        group["lr"] = lr
    torch.manual_seed(epoch_seed(config.seed, epoch))  # for the permutations of shuffling BN, should it draw any
    batches = two_crop_batches(
        data, config.augmentation(data), config.batch_size, seed=config.seed, epoch=epoch, workers=run.workers
    )
    # Convolutions on a CPU prefer channels that lie together.
    layout = torch.channels_last if run.device.type == "cpu" else torch.preserve_format
    images, sums, started = 0, torch.zeros(3, dtype=torch.float64), time.perf_counter()

    def figures() -> dict[str, float]:
        loss, acc1, acc5 = (sums / images).tolist()
        speed = images / (time.perf_counter() - started)
        return {"loss": loss, "acc1": acc1, "acc5": acc5, "images_per_second": speed}

    for step, (im_q, im_k) in enumerate(batches):
        im_q, im_k = (view.to(run.device, non_blocking=True, memory_format=layout) for view in (im_q, im_k))
        out = model(im_q, im_k)
        loss = out.loss.item()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"loss: expected a finite number, got {loss} in epoch {epoch + 1}, step {step + 1} "
                f"(lr {lr:g}, moco_t {config.moco_t:g}); a lower learning rate may help"
            )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        model.update(out.keys)

        acc1, acc5 = (float(value) for value in out.stats.accuracy((1, 5)))
        images += len(im_q)
        sums += len(im_q) * torch.tensor([loss, acc1, acc5], dtype=torch.float64)
        bar.step(epoch + 1, step, figures() if step % run.print_freq == 0 else None)
    if images == 0:
        raise ValueError(f"data: expected at least 2 images to train on, got {len(data.train)} in {data.name}")
    return {"epoch": epoch + 1, "lr": lr} | figures()


def _resume(path: Path, config: PretrainConfig, model: MoCo, optimizer: torch.optim.Optimizer) -> int:
    """Load a checkpoint into model and optimizer; the number of epochs it has behind it."""
    checkpoint = load_checkpoint(path)
    if checkpoint["arch"] != config.arch:
        raise ValueError(f"resume: expected a checkpoint of {config.arch}, got one of {checkpoint['arch']}: {path}")
    absent = {"epoch", "optimizer"} - checkpoint.keys()
    if absent:
        raise ValueError(f"resume: expected epoch and optimizer in {path}, got no {' and no '.join(sorted(absent))}")
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"resume: {path} is of another configuration: {reason}") from None
    optimizer.load_state_dict(checkpoint["optimizer"])
    if checkpoint["epoch"] >= config.epochs:
        warnings.warn(f"resume: {path} has {checkpoint['epoch']} epochs of {config.epochs} done", stacklevel=3)
    return checkpoint["epoch"]
