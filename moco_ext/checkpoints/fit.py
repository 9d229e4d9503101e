"""Do these tensors fit this architecture?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from ..encoders import HEADS, resolve


def encoder_of(arch: str, found: Mapping[str, Tensor], image_size: int | None = None) -> nn.Module:
    """An encoder of an architecture, for images of the size that it was trained on.

    Args:
        found: tensors of such an encoder, by the names in its own state dict.
        image_size: side of the images it was trained on; None: inferred from the position embedding, if there is one.
    """
    if image_size is not None:
        return resolve(arch, image_size)(num_classes=1)
    encoder = resolve(arch)(num_classes=1)
    for name in ("pos_embed", "encoder.pos_embedding"):
        own, trained = encoder.state_dict().get(name), found.get(name)
        if own is None or trained is None or own.shape == trained.shape or own.ndim != 3 or trained.ndim != 3:
            continue
        patches = encoder.get_parameter("patch_embed.proj.weight" if name == "pos_embed" else "conv_proj.weight")
        extra = own.shape[1] - math.isqrt(own.shape[1]) ** 2  # class and register tokens
        return resolve(arch, math.isqrt(trained.shape[1] - extra) * patches.shape[-1])(num_classes=1)
    return encoder


_AUXILIARY = ("aux1", "aux2", "AuxLogits")  # heads of GoogLeNet and Inception, which encoders lack


def backbone_tensors(encoder: nn.Module, found: Mapping[str, Tensor], arch: str, path: str | Path) -> dict[str, Tensor]:
    """The tensors of ``found`` for the layers of ``encoder`` below its head.

    Args:
        encoder: of the architecture ``arch``.
        found: tensors of an encoder in ``path``, by the names in the encoder's own state dict.

    Raises:
        ValueError: a layer is missing or has another shape, or ``found`` has layers that the encoder lacks.
    """
    heads = _head_prefixes(encoder)
    wanted = {name: value for name, value in encoder.state_dict().items() if not name.startswith(heads)}
    fitting = {
        name: found[name] for name, value in wanted.items() if name in found and found[name].shape == value.shape
    }
    # Old files lack this counter, which only cumulative averages read.
    needed = [name for name in wanted if not name.endswith("num_batches_tracked")]
    unfit = [name for name in needed if name not in fitting]
    # A deeper network contains the layers of a shallower one.
    foreign = [name for name in found if name not in wanted and not name.startswith((*heads, *_prefixes(_AUXILIARY)))]
    if unfit or foreign:
        name = (unfit or foreign)[0]
        expected, got = (list(state[name].shape) if name in state else "none" for state in (wanted, found))
        raise ValueError(
            f"checkpoint: expected the {len(needed)} tensors of {arch} in {path}, got "
            f"{len(needed) - len(unfit)} that fit, {len(unfit)} missing or of another shape, {len(foreign)} foreign: "
            f"{name}, expected {expected}, got {got}"
        )
    return fitting


def _head_prefixes(encoder: nn.Module) -> tuple[str, ...]:
    classifier = getattr(encoder, "pretrained_cfg", {}).get("classifier")  # timm: `head` may contain a norm to keep
    if classifier is None:
        return _prefixes(HEADS)
    return _prefixes(("fc", *([classifier] if isinstance(classifier, str) else classifier)))


def _prefixes(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{name}." for name in names)
