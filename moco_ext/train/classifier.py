"""Supervised training on top of an encoder: linear classification (main_lincls.py) and fine-tuning in one loop."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints.training import check_classes, check_finite, load_checkpoint, load_into, save_checkpoint
from ..data import EvalTransform, ImageData, SupervisedLoader, eval_batches
from ..data.images import check_readable
from ..data.seeds import hash_seeds
from ..distributed import all_reduce, rank, world_size
from ..encoders import AUTOCAST, autocast, backbone
from ..evaluate.features import rank_share, to_device
from ..runs.directory import exclusive
from ..runs.files import remove_temporaries, write_atomically
from ..runs.metrics import RunLog
from ..runs.options import RunOptions
from ..runs.settings import (
    BELOW_1,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    at_least,
    changed_settings,
    check_settings,
    one_of,
    setting,
)
from .optimizer import warn_of_late_drops
from .parallel import images_per_process
from .preemption import Interrupts

M = TypeVar("M", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """How a classifier is trained.

    Attributes:
        batch_size: images per node, over all its processes.
        lr: learning rate of the pretrained layers, if they are trained, and of the new ones unless ``lr_head`` is set.
        lr_head: learning rate of the new layers; None: ``lr``.
        schedule: epochs at which both rates fall tenfold.
        fraction: share of each class's training labels that is used.
        labels_per_class: number of each class's training labels that is used, instead of ``fraction``.
        crop_min: smallest share of a training image's area that a view shows.
        precision: of the encoder, which runs under autocast in "bf16" and "fp16"; the new layers are float32.

    Raises:
        ValueError: a setting outside its range.
    """

    epochs: int = setting(valid=at_least(1), help="number of epochs")
    lr: float = setting(flags=("--lr", "--learning-rate"), metavar="LR", valid=POSITIVE, help="learning rate")
    lr_head: float | None = setting(None, metavar="LR", valid=POSITIVE, help="learning rate of the new layers")
    schedule: tuple[int, ...] = setting(
        (), metavar="E", valid=NOT_NEGATIVE, help="epochs at which the learning rate drops by 10x"
    )
    batch_size: int = setting(
        256, flags=("-b", "--batch-size"), valid=at_least(1), help="images per node, over all its processes"
    )
    momentum: float = setting(0.9, metavar="M", valid=BELOW_1, help="momentum of SGD")
    weight_decay: float = setting(
        0.0, flags=("--wd", "--weight-decay"), metavar="W", valid=NOT_NEGATIVE, help="weight decay"
    )
    fraction: float = setting(1.0, metavar="F", valid=SHARE, help="fraction of each class's labels to train on")
    labels_per_class: int | None = setting(
        None, valid=at_least(1), shown="all", help="labeled images of each class to train on"
    )
    crop_min: float = setting(
        0.08, metavar="A", valid=SHARE, help="smallest fraction of the image's area in a training view"
    )
    precision: str = setting(
        "fp32", valid=one_of("fp32", *AUTOCAST), help="autocast of the encoder; fp16 uses loss scaling in training"
    )
    seed: int = setting(0, help="seed of new weights, order, augmentations and the labeled subset")

    def __post_init__(self) -> None:
        check_settings(self)

    def decay(self, epoch: int) -> float:
        """Factor of both learning rates in 0-based ``epoch``."""
        return 0.1 ** sum(epoch >= milestone for milestone in self.schedule)


class Classifier(nn.Module):
    """A new linear layer (weights from normal(0, 0.01), bias 0) on an encoder's pooled features.

    Args:
        encoder: an encoder with a head that :func:`moco_ext.encoders.backbone` finds and replaces.
        classes: number of classes.
        size: height and width of the images in pixels.
        frozen: keep the encoder fixed and in evaluation mode, for linear classification.
        head_bn: add a BatchNorm before the linear layer, as pretrained features can have any scale.

    Attributes:
        precision: of the encoder, as in :class:`ClassifierConfig`.
    """

    precision = "fp32"

    def __init__(
        self, encoder: nn.Module, classes: int, size: int, *, frozen: bool = False, head_bn: bool = False
    ) -> None:
        super().__init__()
        self.frozen = frozen
        self.backbone: nn.Module
        if hasattr(encoder, "reset_classifier"):  # timm: removes the head without leaving unused parameters
            encoder.reset_classifier(0)  # type: ignore[operator]
            self.backbone = encoder
        else:
            self.backbone = backbone(encoder)
        self.backbone.requires_grad_(not frozen)
        with torch.no_grad():
            self.backbone.eval()
            features = self.backbone(torch.zeros(1, 3, size, size)).flatten(1).shape[1]
        linear = nn.Linear(features, classes)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        self.fc = nn.Sequential(nn.BatchNorm1d(features), linear) if head_bn else linear
        self.register_state_dict_post_hook(_to_official)
        self.register_load_state_dict_pre_hook(_from_official)
        self.train()

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, 3, size, size]."""
        trained = torch.is_grad_enabled() and not self.frozen
        with torch.set_grad_enabled(trained), autocast(images.device, self.precision):
            features = self.backbone(images).flatten(1)
        return self.fc(features.to(images.dtype))

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self


def _to_official(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    """Rename to the encoder's own names, with this head as its head, so that torchvision's models load the file."""
    for name in list(state):
        state[prefix + name.removeprefix(prefix).removeprefix("backbone.")] = state.pop(name)


def _from_official(module: nn.Module, state: dict[str, Any], prefix: str, *rest: object) -> None:
    for name in [name for name in state if not name.startswith(f"{prefix}fc.")]:
        state[f"{prefix}backbone.{name.removeprefix(prefix)}"] = state.pop(name)


def check_unchanged(model: nn.Module, reference: Mapping[str, Tensor]) -> None:
    """Check that a frozen encoder's tensors equal ``reference``, those of its weights file, bit for bit.

    Raises:
        ValueError: a tensor has changed.
    """
    state = model.state_dict()
    changed = [name for name, value in state.items() if not torch.equal(value.cpu(), reference[name])]
    if changed:
        raise ValueError(
            f"encoder: expected all {len(state)} frozen tensors as in the weights file, got {len(changed)} changed, "
            f"{changed[0]} the first: the result would not be that of the pretrained features"
        )


def evaluate(
    model: nn.Module, data: ImageData, *, batch_size: int = 256, device: torch.device | str = "cpu", workers: int = 0
) -> dict[str, float]:
    """Mean cross-entropy ``loss`` and accuracies ``acc1``, ``acc5`` in percent on the test split.

    In a process group every rank must call it: each classifies its share, and all return the metrics of the whole
    split. Unreadable images are left out. The model's mode is restored.

    Raises:
        UnreadableImageError: more than half of the images cannot be decoded.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    share = rank_share(data.splits[1])
    try:
        with torch.no_grad():
            for images, index in eval_batches(data, share, batch_size, workers):
                labels = share.labels[index].to(device, non_blocking=True)
                sums += _sums(model(to_device(images, device)), labels)
    finally:
        model.train(training)
    total = all_reduce(sums)
    expected = len(data.splits[1])
    check_readable(expected - int(total[3]), expected)
    return _means(total)


def synchronize_batchnorm(model: M, device: torch.device) -> M:
    """Share the statistics of every BatchNorm between the processes, in place; on CPUs, a warning that they differ."""
    if world_size() > 1 and device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if world_size() > 1 and rank() == 0:
        warnings.warn("SyncBatchNorm needs GPUs: each process normalizes its own images", stacklevel=3)
    return model


def train_classifier(
    model: Classifier,
    data: ImageData,
    config: ClassifierConfig,
    options: RunOptions,
    *,
    name: str,
    arch: str,
    reference: Mapping[str, Tensor] | None = None,
) -> list[dict[str, Any]]:
    """Train by SGD, in place, on one process or in a process group; all records, one an epoch.

    A record has epoch (from 1), step, lr (of the new layers), loss, acc1, acc5 (of the training views), val_loss,
    val_acc1, val_acc5, best_acc1 (the highest val_acc1 so far), images_per_second and seconds. A checkpoint in the
    official layout is written after each epoch, and copied as the best if val_acc1 has never been higher.

    If several processes train BatchNorm, its statistics are synchronized on GPUs. On CPUs, where torch does not support
    that, each process has its own, and those of rank 0 are evaluated and saved.

    Args:
        name: name of the files in ``options.output``: ``NAME.pth``, ``NAME_best.pth``, ``NAME/metrics.jsonl`` and
            ``NAME/tensorboard/``. Existing ones are replaced.
        arch: name of the encoder's architecture, for the checkpoint.
        reference: tensors of a frozen encoder, which must still be equal after each epoch (:func:`check_unchanged`).

    Raises:
        FloatingPointError: the loss or the weights are not finite.
        ValueError: a frozen encoder has changed; no epochs are left to train; another process trains the same files.
    """
    device, world = options.device, world_size()
    model = model.to(device)
    model.precision = config.precision
    if device.type == "cpu":  # the memory format of the images, or DDP has to copy each gradient
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if not model.frozen:
        model = synchronize_batchnorm(model, device)
    batch_size = images_per_process(config.batch_size, options)
    loader = SupervisedLoader(
        data,
        batch_size,
        seed=config.seed,
        rank=rank(),
        world=world,
        workers=options.workers,
        device=device,
        fraction=config.fraction,
        labels_per_class=config.labels_per_class,
        crop_min=config.crop_min,
    )
    optimizer = _optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    done, best = options.start_epoch, -math.inf
    path, best_path = options.output / f"{name}.pth", options.output / f"{name}_best.pth"
    if options.resume is not None:
        checkpoint = restore(model, data, Path(options.resume), arch, optimizer)
        done, best = checkpoint["epoch"], float(checkpoint["best_acc1"])
        if scaler.is_enabled() and "scaler" in checkpoint:
            scaler.load_state_dict(checkpoint["scaler"])
        if rank() == 0 and (changed := changed_settings(checkpoint["config"], config)):
            options.console.print(f"resumed with changed settings: {', '.join(changed)}", highlight=False)
        del checkpoint  # as large as the model and its optimizer
    if done >= config.epochs:
        raise ValueError(f"epochs: expected more than the {done} already done, got {config.epochs}; see --evaluate")
    if rank() == 0:
        warn_of_late_drops(config.schedule, config.epochs, "epochs")
    folder = options.output / name
    with (
        exclusive(folder, lambda: remove_temporaries(options.output, f"{name}*")),
        RunLog(
            folder,
            options,
            total_steps=config.epochs * loader.steps_per_epoch,
            steps_per_epoch=loader.steps_per_epoch,
            done_steps=done * loader.steps_per_epoch,
            chance_loss=math.log(len(data.classes)),
            config=dataclasses.asdict(config) | {"arch": arch},
            enabled=rank() == 0,
        ) as log,
        Interrupts() as interrupts,
    ):
        seconds = log.records[-1]["seconds"] if log.records else 0.0
        train_epoch = _Epochs(model, loader, optimizer, scaler, config, options, log, interrupts)
        for epoch in range(done, config.epochs):
            started = time.perf_counter()
            record = train_epoch(epoch)
            seconds += time.perf_counter() - started
            if world > 1 and not model.frozen:
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)
            val = evaluate(model, data, batch_size=batch_size, device=device, workers=options.workers)
            record |= {f"val_{name}": value for name, value in val.items()} | {"seconds": round(seconds, 3)}
            if reference is not None:
                check_unchanged(model.backbone, reference)
            is_best = val["acc1"] > best
            best = max(best, val["acc1"])
            unreadable = len(data.unite_unreadable())
            log.record(record | {"best_acc1": best} | ({"skipped_images": unreadable} if unreadable else {}))
            check_finite(model, optimizer)
            if rank() == 0:
                save_checkpoint(
                    path,
                    epoch=epoch + 1,
                    arch=arch,
                    model=model,
                    optimizer=optimizer,
                    best_acc1=best,
                    transform=EvalTransform.of(data).as_dict(),
                    classes=list(data.classes),
                    config=dataclasses.asdict(config),
                    **({"scaler": scaler.state_dict()} if scaler.is_enabled() else {}),
                )
                if is_best:
                    write_atomically(best_path, lambda file: file.write(path.read_bytes()))
    return log.records


def restore(
    model: Classifier, data: ImageData, path: Path, arch: str, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Load a checkpoint of :func:`train_classifier` and return it: epoch (completed ones), best_acc1, config.

    Raises:
        ValueError: the checkpoint is damaged, or of another architecture, image size or configuration, or of other
            classes.
    """
    checkpoint = load_checkpoint(path)
    best = checkpoint.get("best_acc1", "no")
    if not isinstance(best, (int, float)):
        raise ValueError(f"resume: expected a classifier's checkpoint, got {best} best_acc1 in {path}")
    if not isinstance(checkpoint.setdefault("config", {}), dict):  # main_lincls.py records none
        raise ValueError(f"resume: expected settings by name as config in {path}, got {checkpoint['config']}")
    recorded = checkpoint.get("transform")
    if isinstance(recorded, dict) and recorded.get("size") != data.size:  # its weights fit images of any size
        raise ValueError(
            f"image_size: expected {recorded.get('size')}, that of the images which {path} was trained on, "
            f"got {data.size}"
        )
    if isinstance(checkpoint.get("classes"), list):  # main_lincls.py records none
        check_classes(checkpoint, data.classes, path)
    load_into(model, checkpoint, path, arch=arch, optimizer=optimizer)
    return checkpoint


class _Epochs:
    """Trains one epoch after another."""

    def __init__(
        self,
        model: Classifier,
        loader: SupervisedLoader,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        config: ClassifierConfig,
        options: RunOptions,
        log: RunLog,
        interrupts: Interrupts,
    ) -> None:
        self.loader, self.optimizer, self.config, self.options, self.log = loader, optimizer, config, options, log
        self.scaler, self.interrupts = scaler, interrupts
        self.rates = [group["lr"] for group in _optimizer(model, config).param_groups]
        self.model: nn.Module = model
        if world_size() > 1:
            devices = [options.device] if options.device.type == "cuda" else None
            # In training mode BatchNorm does not read its buffers, so they need not be broadcast at each step.
            self.model = nn.parallel.DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)

    def __call__(self, epoch: int) -> dict[str, Any]:
        """The record of 0-based ``epoch``."""
        self.model.train()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.config.decay(epoch)
        lr = self.optimizer.param_groups[-1]["lr"]
        torch.manual_seed(int(hash_seeds(self.config.seed, epoch, rank())))  # the same dropout after resuming
        device, first = self.options.device, epoch * self.loader.steps_per_epoch
        sums, recent = (torch.zeros(4, dtype=torch.float64, device=device) for _ in range(2))
        started = before = time.perf_counter()
        step = 0
        for step, (images, labels) in enumerate(self.loader.epoch(epoch), 1):
            wait = time.perf_counter() - before
            logits = self.model(to_device(images, device))
            loss = F.cross_entropy(logits, labels)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            counted = _sums(logits.detach(), labels)
            sums += counted
            recent += counted
            metrics = {"images": len(labels) * world_size(), "wait": wait, "lr": lr}
            if (first + step) % self.options.print_freq == 0:  # only here the host waits for the device
                metrics |= self._finite(_means(recent), epoch, step)
                recent.zero_()
            self.log.step(first + step, metrics)
            self.interrupts.check()
            before = time.perf_counter()
        seconds = time.perf_counter() - started
        total = all_reduce(sums)
        means = self._finite(_means(total), epoch, step)
        speed = total[3].item() / seconds
        return {"epoch": epoch + 1, "step": first + step, "lr": lr, **means, "images_per_second": speed}

    def _finite(self, means: dict[str, float], epoch: int, step: int) -> dict[str, float]:
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(
                f"loss: expected a finite number, got {means['loss']} by epoch {epoch + 1}, step {step} "
                f"(lr {self.config.lr:g}); a lower learning rate may help"
            )
        return means


def _optimizer(model: Classifier, config: ClassifierConfig) -> torch.optim.SGD:
    """SGD over the head and, unless it is frozen, the encoder."""
    groups = [{"params": list(model.fc.parameters()), "lr": config.lr_head or config.lr}]
    if not model.frozen:
        groups.insert(0, {"params": list(model.backbone.parameters()), "lr": config.lr})
    return torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay)


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Float64 [4] on the device: sums of cross-entropy, top-1 hits, top-5 hits and images."""
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # [N, 5], at most one a row
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.ones_like(labels).sum()]).double()


def _means(sums: Tensor) -> dict[str, float]:
    loss, hit1, hit5, n = sums.tolist()
    return {"loss": loss / n, "acc1": 100 * hit1 / n, "acc5": 100 * hit5 / n}
