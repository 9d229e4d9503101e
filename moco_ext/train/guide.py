"""The size guide: settings for images that have neither a recipe nor a preset, by their number and by the device.

docs/choosing.md explains the choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..data import BUILT_IN, Split, TensorSplit
from .mechanisms import MECHANISMS, has_setting, own_momentum

# Published for ImageNet, 1.28 million images: He et al., arXiv 1911.05722.
_EPOCHS, _BATCH, _LR, _K, _SIZE = 200, 256, 0.03, 65_536, 224
_IMAGENET, _MANY, _LONGEST = 1_281_167, 1_000_000, 800
_SMALL_SIDE = 64  # pixels; for larger images the "-small" encoders take too much time
_SHORT_RUN = 100_000  # steps
_WARMUP = 10.0  # epochs; as in SimCLR and MoCo v3
_MEMORY_SHARE = {"cuda": 0.8, "cpu": 0.5}  # the rest is for libraries, fragmentation and, on a CPU, loader processes
# Training on a CPU for hours, not days: images in all epochs, by whether they are small.
_CPU_EPOCHS, _CPU_IMAGES, _CPU_SMALL_IMAGES, _CPU_SIZE = 200, 200_000, 2_000_000, 128


class Choice(NamedTuple):
    """A value, and the reason for it."""

    value: Any
    reason: str


class Machine(NamedTuple):
    """What a run trains on.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        memory: bytes of each process's device.
        processes: on each node.
        nodes: number of machines.
        bf16: the device has instructions for bfloat16 products.
    """

    device: str
    memory: int
    processes: int = 1
    nodes: int = 1
    bf16: bool = False


def applies(data: str, recipe: str | None) -> bool:
    """Whether a run is without published or preset values."""
    return recipe is None and data not in BUILT_IN


def choose_for_device(machine: Machine, explicit: Mapping[str, Any]) -> dict[str, Choice]:
    """Choose what depends on the device alone, and is not in ``explicit``."""
    if not machine.bf16 or "precision" in explicit:
        return {}
    return {"precision": Choice("bf16", "this device multiplies bfloat16 matrices much faster")}


def choose(
    images: int,
    side: int,
    machine: Machine,
    explicit: Mapping[str, Any],
    memory: Callable[[dict[str, Any], int], int],
    *,
    mlp: bool = True,
) -> dict[str, Choice]:
    """Choose what is not in ``explicit``.

    Args:
        images: number of training images.
        side: shorter side of a typical image, in pixels.
        explicit: settings that were given.
        memory: bytes on a device of a run with these settings and so many images per process.
        mlp: the architecture takes MoCo v2's head.
    """
    chosen = choose_for_device(machine, explicit)

    def add(name: str, value: Any, reason: str) -> None:
        if name not in explicit:
            chosen[name] = Choice(value, reason)

    def value_of(name: str, default: Any) -> Any:
        return chosen[name].value if name in chosen else explicit.get(name, default)

    mechanism = explicit.get("dictionary", "queue")

    def has(name: str) -> bool:
        return mechanism in MECHANISMS and has_setting(mechanism, name)

    cpu, small = machine.device == "cpu", False
    if not {"arch", "init"} & explicit.keys():  # otherwise it may need its own size
        add("image_size", *_image_size(side, cpu))
        small = value_of("image_size", _SIZE) <= _SMALL_SIDE
        add("arch", *_arch(small, cpu))
    if side < 32:
        add("crop_min", 0.5, f"a fifth of {side} x {side} pixels shows too little")
    if images < _MANY:
        if mlp and has("mlp"):
            add("mlp", True, "MoCo v2")
        if "aug_byol" not in explicit:
            add("aug_plus", True, "MoCo v2")
    if images < _MANY and value_of("mlp", False):
        add("moco_t", 0.2, "MoCo v2, with its head")

    settings = dict(explicit) | {name: choice.value for name, choice in chosen.items()}
    if "batch_size" not in explicit:
        chosen["batch_size"] = _batch_size(images, machine, lambda n: memory(settings, n))
    batch = value_of("batch_size", _BATCH) * machine.nodes * explicit.get("accumulate", 1)
    if not {"optimizer", "lr_base"} & explicit.keys():  # the published rate is for SGD
        add("lr", _LR * batch / _BATCH, f"published: {_LR:g} for a batch of {_BATCH}")
    queue = _power_of_two(images / 4)
    reason = "published" if queue >= _K else f"at most a quarter of the {images:,} images"
    if has("moco_k"):
        add("moco_k", max(min(queue, _K), _power_of_two(batch)), reason if queue >= batch else "one batch")

    steps_per_epoch = max(1, -(-images // batch))
    if not explicit.get("steps"):
        add("epochs", *_epochs(images, cpu, small))
    epochs = value_of("epochs", _EPOCHS)
    steps = explicit.get("steps") or epochs * steps_per_epoch
    published = images >= _MANY and ("epochs" not in chosen or epochs == _EPOCHS)
    if not published and not {"schedule", "lr_every"} & explicit.keys():
        add("cos", True, "MoCo v2; it fits any number of epochs")
        warmup = min(_WARMUP, steps / steps_per_epoch / 10)
        add("warmup_epochs", warmup, "at the full rate, the first steps may be too large")
    if steps < _SHORT_RUN and has("moco_m") and not own_momentum(mechanism):
        add("moco_m", 0.99, f"the key encoder has to follow within about {steps:,} steps")
    if images < 64 * 200:
        add("knn_k", max(1, images // 64), "a small share of the images")
    return chosen


def typical_side(split: Split, sample: int = 64) -> int:
    """Median of the shorter sides of some images, in pixels; from their headers. Unreadable ones do not count."""
    if isinstance(split, TensorSplit):
        return min(split.images.shape[-2:])
    from PIL import Image

    sides = []
    for position in range(0, len(split), max(1, len(split) // sample)):
        try:
            with split.open(position) as file, Image.open(file) as image:
                sides.append(min(image.size))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
    return sorted(sides)[len(sides) // 2] if sides else _SIZE


def _image_size(side: int, cpu: bool) -> Choice:
    largest = _CPU_SIZE if cpu else _SIZE
    size = max(32, math.ceil(side / 32) * 32)
    if size >= largest:
        return Choice(largest, "a CPU takes 3 times as long for 224" if cpu else "published")
    return Choice(size, f"the images have about {side} pixels")


def _arch(small: bool, cpu: bool) -> Choice:
    if cpu:
        return Choice("resnet10" if small else "resnet18", "small enough for a CPU; on a GPU: resnet50")
    return Choice("resnet18-small", "for images of up to 64 pixels") if small else Choice("resnet50", "published")


def _batch_size(images: int, machine: Machine, memory: Callable[[int], int]) -> Choice:
    """Images per node, the same number for each of its processes."""
    published = max(1, _BATCH // machine.nodes)
    wanted = min(_power_of_two(max(images / 16, 32)), published, _power_of_two(images))
    reason = "published" if wanted == published else "more steps in an epoch"
    per_process = max(2, wanted // machine.processes)  # BatchNorm needs two samples
    budget = _MEMORY_SHARE[machine.device] * machine.memory
    two, four = memory(2), memory(4)  # linear in the number of images
    while per_process > 2 and two + (four - two) * (per_process - 2) / 2 > budget:
        per_process //= 2
        reason = f"fits in {machine.memory / 2**30:.1f} GiB"
    return Choice(per_process * machine.processes, reason)


def _epochs(images: int, cpu: bool, small: bool) -> Choice:
    if cpu:
        budget = _CPU_SMALL_IMAGES if small else _CPU_IMAGES
        return Choice(min(_CPU_EPOCHS, max(1, budget // images)), "hours, not days, on a CPU; more is better")
    if images > 1.5 * _IMAGENET:
        return Choice(max(1, round(_EPOCHS * _IMAGENET / images)), "as many steps as published")
    epochs = min(_LONGEST, max(_EPOCHS, round(_EPOCHS * math.sqrt(_MANY / images), -1)))
    return Choice(int(epochs), "published" if epochs == _EPOCHS else "an epoch has fewer steps than ImageNet's")


def _power_of_two(number: float) -> int:
    """The largest power of two up to ``number``, at least 1."""
    return 2 ** max(0, math.floor(math.log2(number))) if number >= 1 else 1
