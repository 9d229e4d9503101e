"""What a pre-training run is made of: the published defaults, and a preset for each small data set."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ..data import Augmentation, ImageData


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Defaults are those of the published ImageNet training (MoCo v1); ``preset`` changes them for small
    sets.

    ``lr`` is the rate for the whole batch; it falls tenfold at each epoch of ``schedule``, or along half a
    cosine if ``cos``. ``crop_min`` is the smallest share of the image's area that a view shows. ``knn_k`` is
    the number of neighbours in the kNN evaluation, ``knn_every`` the epochs from one to the next (0: only at
    the end).
    """

    data: str
    arch: str = "resnet50"
    epochs: int = 200
    batch_size: int = 256
    lr: float = 0.03
    schedule: tuple[int, ...] = (120, 160)
    cos: bool = False
    momentum: float = 0.9
    weight_decay: float = 1e-4
    moco_dim: int = 128
    moco_k: int = 65536
    moco_m: float = 0.999
    moco_t: float = 0.07
    mlp: bool = False
    aug_plus: bool = False
    crop_min: float = 0.2
    knn_k: int = 200
    knn_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "moco_dim", "moco_k", "knn_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("lr", "moco_t"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("moco_m", "crop_min"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, got {getattr(self, name)}")
        if self.batch_size < 2:
            raise ValueError("batch_size: expected at least 2 (batch normalisation needs company), got 1")

    def augmentation(self, data: ImageData) -> Augmentation:
        """MoCo v1's views or, with ``aug_plus``, v2's, at the data's size; mirrored only if ``data.flip``."""
        published = Augmentation.v2 if self.aug_plus else Augmentation.v1
        return published(data.size, scale=(self.crop_min, 1.0), flip_p=0.5 if data.flip else 0.0)

    def learning_rate(self, epoch: int) -> float:
        """The rate of 0-based ``epoch``."""
        if self.cos:
            return self.lr * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        return self.lr * 0.1 ** sum(epoch >= milestone for milestone in self.schedule)


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
        "knn_every": 3,
    },
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
}


def resolve_config(data: str, explicit: dict[str, Any]) -> PretrainConfig:
    """The configuration of a run on ``data``: what is explicit, else the data set's preset, else as
    published.

    An explicit ``schedule`` without an explicit ``cos`` turns a preset's cosine off.
    """
    if "schedule" in explicit and "cos" not in explicit:
        explicit = explicit | {"cos": False}
    return PretrainConfig(**({"data": data} | _PRESETS.get(data, {}) | explicit))
