"""Which tensors fit an encoder."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import sys
from collections import OrderedDict
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
    heads = head_prefixes(encoder)
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


@dataclasses.dataclass
class Loaded:
    """What became of pretrained weights.

    Attributes:
        loaded: names in the model.
        skipped: name in the source -> why.
        left: names in the model that keep their values.
        share: share of the encoder's weights below the head that were loaded.
    """

    loaded: list[str]
    skipped: dict[str, str]
    left: list[str]
    share: float


def load_fitting(encoder: nn.Module, found: Mapping[str, Tensor], arch: str, source: str) -> Loaded:
    """Load the tensors that fit an encoder, in place. Those of a timm encoder go through timm's own conversion, which
    knows the layouts of DINOv2, DINOv3 and others, and resamples position embeddings.

    Args:
        found: tensors by the names in the encoder's own state dict, or in a layout that timm converts.

    Raises:
        ValueError: less than half of the weights below the head fit.
    """
    try:
        converted = _converted(encoder, found)
    except Exception as error:  # names and shapes of any file
        raise ValueError(f"init: expected weights of {arch} in {source}, got what timm cannot use: {error!r}") from None
    kept = {id(value) for value in converted.values()}
    dropped = [name for name, value in found.items() if name not in converted and id(value) not in kept]
    skipped = dict.fromkeys(dropped, "not used by timm's encoder")
    own = encoder.state_dict()
    fitting = {}
    for name, value in converted.items():
        if name not in own:
            skipped[name] = f"not in {arch}"
        elif own[name].shape != value.shape:
            skipped[name] = f"shape {list(value.shape)}, expected {list(own[name].shape)}"
        else:
            fitting[name] = value
    heads = head_prefixes(encoder)
    sizes = {name: p.numel() for name, p in encoder.named_parameters() if not name.startswith(heads)}
    share = sum(size for name, size in sizes.items() if name in fitting) / max(1, sum(sizes.values()))
    if share < 0.5:
        first = next((f"{name}: {why}" for name, why in skipped.items()), "none")
        raise ValueError(
            f"init: expected weights of {arch} in {source}, got {share:.0%} of its weights below the head; not loaded: "
            f"{first}"
        )
    encoder.load_state_dict(fitting, strict=False)
    left = [name for name in own if name not in fitting and not name.endswith("num_batches_tracked")]
    return Loaded(list(fitting), skipped, left, share)


def _converted(encoder: nn.Module, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    convert = getattr(sys.modules.get(type(encoder).__module__), "checkpoint_filter_fn", None)
    if convert is not None:  # of timm's module
        found = dict(found)
        registers = found.get("register_tokens")
        if getattr(encoder, "reg_token", None) is None:  # else timm would also take the class token's position away
            found.pop("register_tokens", None)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            converted = dict(convert(found, encoder))
        if registers is not None and "reg_token" not in converted:
            converted["register_tokens"] = registers
        return converted
    positions = found.get("encoder.pos_embedding")
    if positions is not None and positions.shape != encoder.state_dict()["encoder.pos_embedding"].shape:
        from torchvision.models.vision_transformer import interpolate_embeddings

        return dict(interpolate_embeddings(encoder.image_size, encoder.patch_size, OrderedDict(found)))
    return dict(found)


def head_prefixes(encoder: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of an encoder's head."""
    classifier = getattr(encoder, "pretrained_cfg", {}).get("classifier")  # timm: `head` may contain a norm to keep
    if classifier is None:
        return _prefixes(HEADS)
    return _prefixes(("fc", *([classifier] if isinstance(classifier, str) else classifier)))


def _prefixes(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{name}." for name in names)
