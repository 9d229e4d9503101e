"""Training for a number of iterations: the loop that object detection and semantic segmentation share."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checkpoints.training import check_classes, check_finite, load_checkpoint, load_into, save_checkpoint
from ..data.items import ItemData, training_items
from ..data.seeds import hash_seeds
from ..distributed import all_reduce, rank, world_size
from ..evaluate.features import averaged_batchnorm
from ..runs.directory import exclusive
from ..runs.files import remove_temporaries
from ..runs.metrics import RunLog
from ..runs.options import RunOptions
from ..runs.settings import BELOW_1, NOT_NEGATIVE, POSITIVE, at_least, changed_settings, check_settings, setting
from .classifier import synchronize_batchnorm
from .optimizer import warn_of_late_drops
from .parallel import images_per_process
from .preemption import Preemption

_NO_PROGRESS = {"loss": 0.0, "counted": 0, "seconds": 0.0}


@dataclasses.dataclass(frozen=True)
class IterationsConfig:
    """How a model is trained for a number of iterations.

    Attributes:
        schedule: iterations at which the learning rate drops by 10x.
        bn_batches: training batches that the statistics of BatchNorm are averaged over before each evaluation.

    Raises:
        ValueError: a setting outside its range.
    """

    iterations: int = setting(valid=at_least(1), help="number of iterations")
    schedule: tuple[int, ...] = setting(
        metavar="I", valid=NOT_NEGATIVE, help="iterations at which the learning rate drops by 10x"
    )
    lr: float = setting(flags=("--lr", "--learning-rate"), metavar="LR", valid=POSITIVE, help="learning rate")
    warmup: int = setting(0, valid=NOT_NEGATIVE, help="iterations in which the learning rate rises linearly")
    batch_size: int = setting(
        16, flags=("-b", "--batch-size"), valid=at_least(1), help="images per node, over all its processes"
    )
    momentum: float = setting(0.9, metavar="M", valid=BELOW_1, help="momentum of SGD")
    weight_decay: float = setting(
        1e-4,
        flags=("--wd", "--weight-decay"),
        metavar="W",
        valid=NOT_NEGATIVE,
        help="weight decay, except for BatchNorm",
    )
    bn_batches: int = setting(
        200, valid=NOT_NEGATIVE, help="batches to average BatchNorm's statistics over before an evaluation; 0: none"
    )
    eval_every: int = setting(0, valid=NOT_NEGATIVE, help="iterations between evaluations; 0: only after the last")
    seed: int = setting(0, help="seed of new weights, order and views")

    def __post_init__(self) -> None:
        check_settings(self)

    def lr_at(self, iteration: int) -> float:
        """Learning rate of a 0-based iteration; the warm-up starts at a thousandth."""
        done = min(1.0, iteration / self.warmup) if self.warmup else 1.0
        return self.lr * (0.001 * (1 - done) + done) * 0.1 ** sum(iteration >= milestone for milestone in self.schedule)


def train_iterations(
    model: nn.Module,
    data: ItemData[Any],
    config: IterationsConfig,
    options: RunOptions,
    *,
    name: str,
    arch: str,
    head: str,
    mean: Sequence[float],
    std: Sequence[float],
    view: Callable[[int, int], Any],
    loss_of: Callable[[nn.Module, list[Any]], Tensor],
    evaluate: Callable[..., dict[str, float]],
) -> list[dict[str, Any]]:
    """Train by SGD, in place, on one process or in a process group; all records, one an evaluation.

    A record has epoch, step (iterations), lr, loss (mean over all processes since the last record), the scores of
    ``evaluate`` and seconds. A checkpoint is written with each record, and every ``options.save_every`` iterations.

    Several processes synchronize BatchNorm as in :func:`moco_ext.train.classifier.train_classifier`.

    Args:
        name: name of the files in ``options.output``: ``NAME.pth``, ``NAME/metrics.jsonl`` and ``NAME/tensorboard/``.
            Existing ones are replaced.
        arch: name of the encoder's architecture. That of the checkpoint is ``ARCH-HEAD``.
        mean, std: normalization of the model's images, for the checkpoint.
        view: as for :func:`moco_ext.data.items.training_items`.
        loss_of: loss of a model in training mode on a batch of views.
        evaluate: ``evaluate(model, data.test, device=..., workers=...)``: scores in percent, the same on all ranks.

    Raises:
        FloatingPointError: the loss or the weights are not finite.
        ValueError: too few images for one batch; no iterations are left; another process trains the same files.
    """
    device, world = options.device, world_size()
    batch_size = images_per_process(config.batch_size, options)

    def batches(start: int, stop: int) -> Iterator[list[Any]]:
        """This rank's batches of the iterations ``start`` to ``stop - 1``."""
        order = {"start": start, "stop": stop, "seed": config.seed, "rank": rank(), "world": world}
        return training_items(view, len(data.train), batch_size, workers=options.workers, **order)

    model = synchronize_batchnorm(model.to(device), device)
    norms = {p for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if p not in norms], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p in norms], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, config.lr, config.momentum)
    done, progress = 0, _NO_PROGRESS
    if options.resume is not None:
        checkpoint = read(options.resume, data.classes)
        load_into(model, checkpoint, Path(options.resume), arch=f"{arch}-{head}", optimizer=optimizer)
        done, progress = checkpoint["iteration"], _NO_PROGRESS | checkpoint["progress"]
        if rank() == 0 and (changed := changed_settings(checkpoint["config"], config)):
            options.console.print(f"resumed with changed settings: {', '.join(changed)}", highlight=False)
        del checkpoint  # as large as the model and its optimizer
    if done >= config.iterations:
        raise ValueError(
            f"iterations: expected more than the {done} already done, got {config.iterations}; see --evaluate"
        )
    if rank() == 0:
        warn_of_late_drops(config.schedule, config.iterations, "iterations")
    if config.warmup >= config.iterations and rank() == 0:
        warnings.warn(
            f"warmup: all of the {config.iterations} iterations are in the warm-up of {config.warmup}, so the learning "
            f"rate stays below {config.lr:g}; see --warmup",
            stacklevel=3,
        )
    remaining = batches(done, config.iterations)
    replica: nn.Module = model
    if world > 1:
        devices = [device] if device.type == "cuda" else None
        replica = nn.parallel.DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
    per_epoch = len(data.train) // (batch_size * world)
    folder = options.output / name
    with (
        exclusive(folder, lambda: remove_temporaries(options.output, f"{name}*")),
        RunLog(
            folder,
            options,
            total_steps=config.iterations,
            steps_per_epoch=per_epoch,
            done_steps=done,
            config=dataclasses.asdict(config) | {"arch": arch},
            enabled=rank() == 0,
        ) as log,
        Preemption() as preemption,
    ):
        before = time.perf_counter()
        started, counted = before - progress["seconds"], progress["counted"]
        total = torch.tensor(progress["loss"], dtype=torch.float64, device=device)  # since the last record
        for iteration, batch in enumerate(remaining, done):
            wait = time.perf_counter() - before
            torch.manual_seed(int(hash_seeds(config.seed, iteration, rank())))  # the same choices after resuming
            for group in optimizer.param_groups:
                group["lr"] = lr = config.lr_at(iteration)
            loss = loss_of(replica, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, counted, step = total + loss.detach(), counted + 1, iteration + 1
            metrics = {"images": len(batch) * world, "wait": wait, "lr": lr}
            is_last = step == config.iterations
            if step % options.print_freq == 0 or is_last:  # only here the host waits for the device
                metrics["loss"] = _finite(loss.item(), step, config.lr)
            log.step(step, metrics)
            is_record = is_last or (config.eval_every and step % config.eval_every == 0)
            if is_record:
                if config.bn_batches:
                    with torch.no_grad(), averaged_batchnorm(model):
                        for sample in batches(0, config.bn_batches):
                            loss_of(model, sample)
                if world > 1:
                    for buffer in model.buffers():
                        dist.broadcast(buffer, 0)
                scores = evaluate(model, data.test, device=device, workers=options.workers)
                epoch, seconds = step / per_epoch, time.perf_counter() - started
                mean_loss = all_reduce(total).item() / (world * counted)
                record = {"epoch": epoch, "step": step, "lr": lr, "loss": mean_loss, **scores}
                log.record(record | {"seconds": round(seconds, 3)})
                total, counted = torch.zeros_like(total), 0
            # After the evaluation, which several ranks finish together. After the last one nothing is left to stop.
            stopped = not is_last and preemption.agreed(step % options.print_freq == 0)
            if is_record or stopped or (options.save_every and step % options.save_every == 0):
                check_finite(model, optimizer)
                loss_so_far = all_reduce(total.clone()).item() / world
                if rank() == 0:
                    save_checkpoint(
                        options.output / f"{name}.pth",
                        epoch=step // per_epoch,
                        arch=f"{arch}-{head}",
                        model=model,
                        optimizer=optimizer,
                        iteration=step,
                        progress={"loss": loss_so_far, "counted": counted, "seconds": time.perf_counter() - started},
                        classes=list(data.classes),
                        config=dataclasses.asdict(config),
                        transform={"mean": list(mean), "std": list(std)},
                    )
            if stopped:
                preemption.stop(options.console, step)
            before = time.perf_counter()
    return log.records


def read(path: str | Path, classes: Sequence[str]) -> dict[str, Any]:
    """A checkpoint of :func:`train_iterations`: that of :func:`moco_ext.checkpoints.training.load_checkpoint`, with
    iteration (completed ones), config, transform, classes and progress (since the last record).

    Raises:
        ValueError: the checkpoint is damaged, or of another kind or other classes.
    """
    checkpoint = {"progress": {}} | load_checkpoint(path)  # older ones have none
    kinds = {"iteration": int, "config": dict, "transform": dict, "classes": list, "progress": dict}
    for entry, kind in kinds.items():
        if not isinstance(checkpoint.get(entry), kind):
            got = checkpoint.get(entry, "no")
            raise ValueError(f"resume: expected a checkpoint of detect or segment, got {got} {entry} in {path}")
    check_classes(checkpoint, classes, path)
    return checkpoint


def _finite(loss: float, step: int, lr: float) -> float:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"loss: expected a finite number, got {loss} by iteration {step} (lr {lr:g}); a lower lr may help"
        )
    return loss
