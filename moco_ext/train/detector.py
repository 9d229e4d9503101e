"""Object detection on top of an encoder: Faster R-CNN as in the MoCo paper (section 4.2), all of it trained."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign, roi_align

from ..checkpoints.training import check_finite, load_checkpoint, load_into, save_checkpoint
from ..data.datasets import IMAGENET_MEAN, IMAGENET_STD
from ..data.detection import DetectionData, Item, detection_batches
from ..data.seeds import hash_seeds
from ..distributed import rank, world_size
from ..evaluate.detection import evaluate_detector
from ..evaluate.features import averaged_batchnorm
from ..runs.directory import exclusive
from ..runs.files import remove_temporaries
from ..runs.metrics import RunLog
from ..runs.options import RunOptions
from ..runs.settings import BELOW_1, NOT_NEGATIVE, POSITIVE, at_least, check_settings, one_of, setting
from .classifier import synchronize_batchnorm
from .preemption import Preemption

_RATIOS = (0.5, 1.0, 2.0)  # height / width of the anchors
_STAGES = ("layer1", "layer2", "layer3", "layer4")


@dataclasses.dataclass(frozen=True)
class DetectorConfig:
    """How a detector is built and trained.

    Attributes:
        neck: ``"c4"``: RPN and RoIs on layer3, layer4 in the box head. ``"fpn"``: a feature pyramid on all stages.
        schedule: iterations at which the learning rate falls tenfold.
        min_size: shorter sides of the training images in pixels, one drawn for each; the last is also for tests.
        bn_batches: training batches that the statistics of BatchNorm are averaged over before each evaluation.

    Raises:
        ValueError: a setting outside its range.
    """

    iterations: int = setting(valid=at_least(1), help="number of iterations")
    schedule: tuple[int, ...] = setting(
        metavar="I", valid=NOT_NEGATIVE, help="iterations at which the learning rate falls tenfold"
    )
    min_size: tuple[int, ...] = setting(
        metavar="N", valid=at_least(32), help="shorter sides of training images in pixels; the last is also for tests"
    )
    warmup: int = setting(valid=NOT_NEGATIVE, help="iterations in which the learning rate rises linearly")
    neck: str = setting("c4", valid=one_of("c4", "fpn"), help="features between the encoder and the box head")
    lr: float = setting(0.02, flags=("--lr", "--learning-rate"), metavar="LR", valid=POSITIVE, help="learning rate")
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
    max_size: int = setting(1333, valid=at_least(32), help="largest longer side of an image in pixels")
    anchors: tuple[int, ...] = setting(
        (32, 64, 128, 256, 512), metavar="N", valid=at_least(1), help="sizes of the anchors in pixels"
    )
    rois: int = setting(512, valid=at_least(1), help="regions per image that the box head is trained on")
    proposals: int = setting(1000, valid=at_least(1), help="regions per image for the box head in tests")
    roi_size: int | None = setting(
        None, valid=at_least(2), shown="14 for c4, 7 for fpn", help="side of the pooled features of a region"
    )
    bn_batches: int = setting(
        200, valid=NOT_NEGATIVE, help="batches to average BatchNorm's statistics over before an evaluation; 0: none"
    )
    eval_every: int = setting(0, valid=NOT_NEGATIVE, help="iterations between evaluations; 0: only after the last")
    seed: int = setting(0, help="seed of new weights, order, views and regions")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.neck == "fpn" and len(self.anchors) != 5:
            raise ValueError(f"anchors: expected 5 sizes, one for each level of fpn, got {len(self.anchors)}")

    def lr_at(self, iteration: int) -> float:
        """Learning rate of a 0-based iteration; the warm-up starts at a thousandth."""
        done = min(1.0, iteration / self.warmup) if self.warmup else 1.0
        return self.lr * (0.001 * (1 - done) + done) * 0.1 ** sum(iteration >= milestone for milestone in self.schedule)


# The published configurations: detection/configs of the official repository and the defaults of detectron2.
RECIPES = {
    "voc": DetectorConfig(24_000, (18_000, 22_000), tuple(range(480, 801, 32)), warmup=100),
    "coco-1x": DetectorConfig(90_000, (60_000, 80_000), tuple(range(640, 801, 32)), warmup=1000),
    "coco-2x": DetectorConfig(180_000, (120_000, 160_000), tuple(range(640, 801, 32)), warmup=1000),
}


class _AlignedRoIAlign(MultiScaleRoIAlign):
    """RoIAlign on one feature map, with boxes shifted by half a pixel, as in detectron2."""

    def __init__(self, output_size: int, scale: float) -> None:
        super().__init__(["0"], output_size, sampling_ratio=0)
        self.scale = scale

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        return roi_align(x["0"], boxes, self.output_size, self.scale, aligned=True)


def build_detector(
    encoder: nn.Module,
    classes: int,
    config: DetectorConfig,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> FasterRCNN:
    """Faster R-CNN on a ResNet, whose layers it shares; none is frozen, and new layers have BatchNorm.

    With ``neck="c4"`` another BatchNorm follows layer4 (res5). With ``"fpn"`` the pyramid has BatchNorm, and the box
    head is four convolutions with BatchNorm and a linear layer.

    Args:
        classes: number of classes without the background.
        mean, std: per channel of pixel values in [0, 1], as in pre-training; one or three entries.

    Raises:
        ValueError: the encoder is no ResNet with four stages.
    """
    found = [isinstance(getattr(encoder, name, None), nn.Sequential) for name in _STAGES]
    if not all(found):
        raise ValueError(
            f"arch: expected a ResNet with {', '.join(_STAGES)} for detection, got {type(encoder).__name__} with "
            f"{sum(found)} of them"
        )
    encoder.requires_grad_(True).eval()
    levels = {name: str(number) for number, name in enumerate(_STAGES)}
    with torch.no_grad():
        maps = IntermediateLayerGetter(encoder, levels)(torch.zeros(1, 3, 64, 64))
    channels = [features.shape[1] for features in maps.values()]
    options: dict[str, Any]
    backbone: nn.Module
    box_head: nn.Module
    if config.neck == "c4":
        backbone = IntermediateLayerGetter(encoder, {"layer3": "0"})
        backbone.out_channels = channels[2]  # type: ignore[assignment]
        sizes, features = [config.anchors], channels[3]
        layer4 = encoder.get_submodule("layer4")
        box_head = nn.Sequential(layer4, nn.BatchNorm2d(features), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        pool: MultiScaleRoIAlign = _AlignedRoIAlign(config.roi_size or 14, maps["2"].shape[-1] / 64)
        options = {"rpn_pre_nms_top_n_train": 12_000, "rpn_pre_nms_top_n_test": 6000}
    else:
        backbone = BackboneWithFPN(encoder, levels, channels, 256, norm_layer=nn.BatchNorm2d)
        sizes, features, side = [(size,) for size in config.anchors], 1024, config.roi_size or 7
        box_head = FastRCNNConvFCHead((256, side, side), [256] * 4, [features], norm_layer=nn.BatchNorm2d)
        pool = MultiScaleRoIAlign(list(levels.values()), side, sampling_ratio=0)
        options = {"rpn_post_nms_top_n_train": 1000}
    predictor = FastRCNNPredictor(features, classes + 1)
    for layer, deviation in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)
    nn.init.zeros_(predictor.bbox_pred.weight[:4].detach())  # the background has no box: never used, never trained
    return FasterRCNN(
        backbone,
        min_size=config.min_size,
        max_size=config.max_size,
        image_mean=(list(mean) * 3)[:3],
        image_std=(list(std) * 3)[:3],
        rpn_anchor_generator=AnchorGenerator(tuple(sizes), (_RATIOS,) * len(sizes)),
        rpn_post_nms_top_n_test=config.proposals,
        box_roi_pool=pool,
        box_head=box_head,
        box_predictor=predictor,
        box_batch_size_per_image=config.rois,
        **options,
    ).train()


def train_detector(
    model: FasterRCNN, data: DetectionData, config: DetectorConfig, options: RunOptions, *, name: str, arch: str
) -> list[dict[str, Any]]:
    """Train by SGD, in place, on one process or in a process group; all records, one an evaluation.

    A record has epoch, step (iterations), lr, loss (mean since the last record), AP, AP50, AP75 (percent) and seconds.
    A checkpoint is written with each record, and every ``options.save_every`` iterations.

    Several processes synchronize BatchNorm as in :func:`moco_ext.train.classifier.train_classifier`.

    Args:
        name: name of the files in ``options.output``: ``NAME.pth``, ``NAME/metrics.jsonl`` and ``NAME/tensorboard/``.
            Existing ones are replaced.
        arch: name of the encoder's architecture, for the checkpoint.

    Raises:
        FloatingPointError: the loss or the weights are not finite.
        ValueError: too few images for one batch; no iterations are left; another process trains the same files.
    """
    device, world = options.device, world_size()
    model = synchronize_batchnorm(model.to(device), device)
    norms = {p for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if p not in norms], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p in norms], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, config.lr, config.momentum)
    done = 0 if options.resume is None else restore(model, Path(options.resume), f"{arch}-{config.neck}", optimizer)
    if done >= config.iterations:
        raise ValueError(
            f"iterations: expected more than the {done} already done, got {config.iterations}; see --evaluate"
        )
    batches = _batches(data, config, options, done, config.iterations)
    replica: nn.Module = model
    if world > 1:
        devices = [device] if device.type == "cuda" else None
        replica = nn.parallel.DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
    per_epoch = len(data.train) // (config.batch_size // options.local_world * world)
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
        started = time.perf_counter() - (log.records[-1]["seconds"] if log.records else 0.0)
        total, counted, before = torch.zeros((), dtype=torch.float64, device=device), 0, time.perf_counter()
        for iteration, batch in enumerate(batches, done):
            wait = time.perf_counter() - before
            torch.manual_seed(int(hash_seeds(config.seed, iteration, rank())))  # the same regions after resuming
            for group in optimizer.param_groups:
                group["lr"] = lr = config.lr_at(iteration)
            loss = sum(replica(*to_device(batch, device)).values())
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
                scores = _evaluate(model, data, config, options)
                epoch, seconds = step / per_epoch, time.perf_counter() - started
                record = {"epoch": epoch, "step": step, "lr": lr, "loss": total.item() / counted, **scores}
                log.record(record | {"seconds": round(seconds, 3)})
                total, counted = torch.zeros_like(total), 0
            # After the evaluation, which several ranks finish together.
            stopped = preemption.agreed(is_last or step % options.print_freq == 0)
            if is_record or stopped or (options.save_every and step % options.save_every == 0):
                check_finite(model, optimizer)
                if rank() == 0:
                    save_checkpoint(
                        options.output / f"{name}.pth",
                        epoch=step // per_epoch,
                        arch=f"{arch}-{config.neck}",
                        model=model,
                        optimizer=optimizer,
                        iteration=step,
                        classes=list(data.classes),
                    )
            if stopped:
                preemption.stop(options.console, step)
            before = time.perf_counter()
    return log.records


def _batches(
    data: DetectionData, config: DetectorConfig, options: RunOptions, start: int, stop: int
) -> Iterator[list[Item]]:
    """This rank's batches of the iterations ``start`` to ``stop - 1``."""
    return detection_batches(
        data.train,
        config.batch_size // options.local_world,
        start=start,
        stop=stop,
        seed=config.seed,
        rank=rank(),
        world=world_size(),
        workers=options.workers,
    )


def _evaluate(model: FasterRCNN, data: DetectionData, config: DetectorConfig, options: RunOptions) -> dict[str, float]:
    """Average precision on the test images, with statistics of BatchNorm averaged over training batches."""
    if config.bn_batches:
        with torch.no_grad(), averaged_batchnorm(model):
            for batch in _batches(data, config, options, 0, config.bn_batches):
                model(*to_device(batch, options.device))
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    return evaluate_detector(model, data.test, device=options.device, workers=options.workers)


def restore(model: nn.Module, path: Path, arch: str, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Load a checkpoint of :func:`train_detector`; returns its completed iterations.

    Raises:
        ValueError: the checkpoint is damaged, or of another architecture, neck, number of classes or kind.
    """
    checkpoint = load_checkpoint(path)
    iteration = checkpoint.get("iteration", "no")
    if not isinstance(iteration, int):
        raise ValueError(f"resume: expected a detector's checkpoint, got {iteration} iteration in {path}")
    load_into(model, checkpoint, path, arch=arch, optimizer=optimizer)
    return iteration


def to_device(batch: list[Item], device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images float32 [3, H, W] in [0, 1] and targets, as torchvision's detectors take them."""
    return (
        [image.to(device, non_blocking=True) / 255 for image, _ in batch],
        [{name: value.to(device, non_blocking=True) for name, value in target.items()} for _, target in batch],
    )


def _finite(loss: float, step: int, lr: float) -> float:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"loss: expected a finite number, got {loss} by iteration {step} (lr {lr:g}); a lower lr may help"
        )
    return loss
