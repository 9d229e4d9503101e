"""What a pre-training run is made of: the published defaults, and a preset for each small data set."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from ..data import Augmentation, ImageData
from ..shuffle_bn import MODES

_CHOICES = {
    "precision": ("fp32", "bf16", "fp16"),
    "dictionary": ("queue", "end-to-end", "memory-bank"),
    "views": ("image", "patches"),
    "shuffle_bn": MODES,
    "queue_dtype": ("fp32", "bf16", "fp16"),
    "momentum_schedule": ("constant", "cosine"),
    "augment_on": ("loader", "device"),
    "same_image": ("negative", "mask", "positive"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Defaults are those of the published ImageNet training (MoCo v1); recipes and presets change them.

    Attributes:
        data: name or folder.
        steps: train for so many optimizer steps instead of ``epochs``, if not 0.
        batch_size: images of a node (all its processes) in one forward pass; ``accumulate`` of these make a step.
        lr: for the whole batch; falls tenfold at each epoch of ``schedule``, or along half a cosine if ``cos``, or by
            ``lr_gamma`` every ``lr_every`` steps if that is not 0.
        moco_m: momentum of the key encoder (of the features, in a memory bank); with ``momentum_schedule`` "cosine" it
            rises from there to 1.
        dictionary: the mechanism, and ``key_encoder`` how keys are encoded; None is the mechanism's own default.
        same_image: what another view of the query's image is that is still in the queue: a negative like any, as
            published; masked out; or a further positive.
        in_batch: the batch's other keys are negatives too.
        empty_queue: the queue begins without keys, not with random ones.
        symmetric: each view is a query once and a key once; the loss is the mean of both.
        views: whole images, or sets of ``patches`` patches of them.
        crop_min: the smallest share of the image's area that a view shows.
        drop_last: leave out an epoch's last partial batch, as the published trainer does.
        knn_k: neighbours in the kNN evaluation; ``online_knn``: epochs (by steps: steps) from one to the next; 0: only
            at the end.
        log_every: steps from one record of metrics to the next, when training by steps; else a record is an epoch.
    """

    data: str
    arch: str = "resnet50"
    epochs: int = 200
    steps: int = 0
    batch_size: int = 256
    accumulate: int = 1
    lr: float = 0.03
    schedule: tuple[int, ...] = (120, 160)
    cos: bool = False
    lr_gamma: float = 0.9
    lr_every: int = 0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    moco_dim: int = 128
    moco_k: int = 65536
    moco_m: float = 0.999
    moco_t: float = 0.07
    momentum_schedule: str = "constant"
    mlp: bool = False
    dictionary: str = "queue"
    key_encoder: str | None = None
    same_image: str = "negative"
    label_smoothing: float = 0.0
    in_batch: bool = False
    empty_queue: bool = False
    symmetric: bool = False
    queue_dtype: str = "fp32"
    shuffle_bn: str = "auto"
    split_bn: int = 1
    aug_plus: bool = False
    crop_min: float = 0.2
    views: str = "image"
    patches: int = 9
    augment_on: str = "loader"
    drop_last: bool = False
    precision: str = "fp32"
    channels_last: bool | None = None
    compile: bool = False
    knn_k: int = 200
    online_knn: int = 10
    log_every: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        positive = "epochs batch_size accumulate moco_dim moco_k knn_k split_bn patches log_every"
        for name in positive.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("lr", "moco_t", "lr_gamma"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("moco_m", "crop_min"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, got {getattr(self, name)}")
        for name in ("steps", "lr_every", "online_knn"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.batch_size < 2:
            raise ValueError("batch_size: expected at least 2 (batch normalisation needs company), got 1")
        if self.symmetric and self.dictionary == "memory-bank":
            raise ValueError("symmetric: expected a mechanism with two views, got dictionary memory-bank")
        if self.symmetric and self.shuffle_bn == "loader":
            raise ValueError(
                "symmetric: expected both views on the same rank, got shuffle_bn loader, which sends keys elsewhere"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: expected a number from 0 to below 1, got {self.label_smoothing}")
        of_queue = {"same_image": "negative", "label_smoothing": 0.0, "in_batch": False, "empty_queue": False}
        for name, default in of_queue.items():
            if self.dictionary != "queue" and getattr(self, name) != default:
                raise ValueError(
                    f"{name}: expected {default!r} with dictionary {self.dictionary}, got {getattr(self, name)!r}"
                )
        if self.key_encoder and self.dictionary == "memory-bank":
            raise ValueError("key_encoder: expected none with dictionary memory-bank, whose keys are stored features")

    def augmentation(self, data: ImageData) -> Augmentation:
        """MoCo v1's views or, with ``aug_plus``, v2's, at the data's size; mirrored only if ``data.flip``."""
        published = Augmentation.v2 if self.aug_plus else Augmentation.v1
        return published(data.size, scale=(self.crop_min, 1.0), flip_p=0.5 if data.flip else 0.0)

    def total_steps(self, steps_per_epoch: int) -> int:
        return self.steps or self.epochs * steps_per_epoch

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The rate of 0-based ``step``; constant within an epoch, as published, unless training goes by steps."""
        if self.lr_every:
            return self.lr * self.lr_gamma ** (step // self.lr_every)
        epoch = step // steps_per_epoch
        if self.cos:
            progress = step / self.steps if self.steps else epoch / self.epochs
            return self.lr * 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * 0.1 ** sum(epoch >= milestone for milestone in self.schedule)

    def key_momentum(self, step: int, steps_per_epoch: int) -> float:
        """m of 0-based ``step``; the cosine is 1 - (1 - m) (cos(pi t) + 1) / 2 (BYOL, arXiv 2006.07733)."""
        if self.momentum_schedule == "constant":
            return self.moco_m
        progress = step / self.total_steps(steps_per_epoch)
        return 1 - (1 - self.moco_m) * (math.cos(math.pi * progress) + 1) / 2


RECIPES: dict[str, dict[str, Any]] = {
    "moco-v1": {},
    "moco-v2": {"mlp": True, "moco_t": 0.2, "aug_plus": True, "cos": True},
    # Section 4 of the MoCo paper, for a billion images: 64 GPUs, about 1.4 epochs.
    "moco-v1-1b": {"batch_size": 1024, "lr": 0.12, "steps": 1_250_000, "lr_gamma": 0.9, "lr_every": 62_500},
}

# Short runs need a key encoder that moves faster than m = 0.999 lets it, and K well under the number of images:
# every other view of an image that is still in the queue counts as a negative of that image.
_SHORT = {"mlp": True, "moco_t": 0.2, "aug_plus": True, "cos": True, "lr": 0.06, "moco_m": 0.99}
_CIFAR = _SHORT | {"arch": "resnet18-small", "batch_size": 512, "moco_k": 4096}
_PRESETS: dict[str, dict[str, Any]] = {
    "digits": _SHORT
    | {
        "arch": "resnet8-small",
        "epochs": 80,
        "batch_size": 128,
        "mlp": False,
        "moco_k": 512,
        "crop_min": 0.5,  # a fifth of an 8x8 digit is no digit
        "knn_k": 20,  # a class has about 125 training images: 200 neighbours would be of several classes
    },
    "fashion-mnist": _SHORT
    | {
        "arch": "resnet10",
        "epochs": 18,
        "batch_size": 128,
        "moco_k": 4096,
        "crop_min": 0.5,
        "online_knn": 3,
    },
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
}


def resolve_config(data: str, explicit: dict[str, Any], recipe: str | None = None) -> PretrainConfig:
    """The configuration of a run on ``data``: what is explicit, else the recipe, else the data set's preset, else as
    published. With a recipe, the preset gives only what belongs to the data: ``arch`` and ``crop_min``.

    An explicit ``schedule`` without an explicit ``cos`` turns a preset's cosine off.
    """
    if recipe is not None and recipe not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {recipe!r}")
    if "schedule" in explicit and "cos" not in explicit:
        explicit = explicit | {"cos": False}
    preset = _PRESETS.get(data, {})
    if recipe is not None:
        preset = {name: preset[name] for name in ("arch", "crop_min") if name in preset} | RECIPES[recipe]
    if explicit.get("dictionary") == "memory-bank" and "moco_m" not in explicit:
        preset = preset | {"moco_m": 0.5}  # of the features, as in the paper's comparison
    return PretrainConfig(**({"data": data} | preset | explicit))
