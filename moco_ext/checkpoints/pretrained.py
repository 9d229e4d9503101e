"""Pretrained encoders from checkpoints of any format, plain state dictionaries, torchvision and timm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..encoders import set_image_size
from .convert import query_encoder, read_checkpoint
from .files import newest
from .fit import backbone_tensors, encoder_of

TORCHVISION, TIMM = "torchvision:", "timm:"


def load_pretrained(
    source: str | Path, arch: str | None = None, image_size: int | None = None
) -> tuple[nn.Module, str]:
    """An encoder with pretrained weights and a randomly initialized head, and the name of its architecture.

    :func:`moco_ext.encoders.backbone` removes the head. All layers below it are loaded from the source.

    Args:
        source: a run directory (its ``checkpoint.pth``); a checkpoint of any format that ``moco-ext convert`` reads
            (its query encoder is used), or of linear evaluation or fine-tuning; a state dictionary of an encoder, like
            torchvision's files, pickled or ``.safetensors``; or weights to download: ``"timm:NAME"``,
            ``"torchvision:IMAGENET1K_V2"`` for ``arch``, or ``"torchvision:ResNet50_Weights.IMAGENET1K_V2"``.
        arch: a name for :func:`moco_ext.encoders.resolve`; required if the source does not contain it.
        image_size: side of the images to encode, for encoders that are built for one size; None: that of training.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the source cannot be read, is of another architecture, or its architecture is unknown; the message
            says how many layers fit.
    """
    name = str(source)
    if name.startswith(TORCHVISION):
        encoder, arch = _torchvision(name.removeprefix(TORCHVISION), arch)
    elif name.startswith(TIMM):
        encoder, arch = _of_timm(name, arch)
    else:
        encoder, arch = _saved(newest(Path(source)), arch)
    if image_size is not None:
        set_image_size(encoder, image_size)
    return encoder, arch


def _saved(path: Path, arch: str | None) -> tuple[nn.Module, str]:
    checkpoint = read_checkpoint(path, otherwise="timm")
    said = checkpoint.about.get("arch")
    if said is not None and arch not in (None, said):
        raise ValueError(f"arch: expected {said}, which {path} holds, got {arch}")
    name = arch or said
    if name is None:
        raise ValueError(f"arch: expected --arch, as {path} holds a state dictionary without a name, got none")
    tensors = query_encoder(checkpoint.tensors)
    encoder = encoder_of(name, tensors, checkpoint.about.get("image_size"))
    encoder.load_state_dict(backbone_tensors(encoder, tensors, name, path), strict=False)
    return encoder, name


def read_weights(source: str, arch: str) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of pretrained weights to start from, and the architecture that the source names.

    Args:
        source: as for :func:`load_pretrained`; also ``"timm:"``, the default weights of ``arch``, and torchvision's
            names without ``torchvision:``.
        arch: the architecture to initialize.

    Returns:
        The tensors by their names in an encoder's own state dict, the head under ``fc``, and those of a MoCo v3
        predictor under ``predictor``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the source cannot be read, or there are no such weights.
    """
    if source.startswith(TIMM):
        name = source.removeprefix(TIMM) or arch.removeprefix(TIMM)
        return dict(_timm(name).state_dict()), f"{TIMM}{name.partition('.')[0]}"
    name = source.removeprefix(TORCHVISION)
    if source.startswith(TORCHVISION) or (not Path(source).exists() and name in _torchvision_names(arch)):
        return dict(_torchvision_weights(name, arch).get_state_dict(progress=False, check_hash=True)), arch
    checkpoint = read_checkpoint(newest(Path(source)), otherwise="timm")
    predictor = {name: value for name, value in checkpoint.tensors.items() if name.startswith("predictor.")}
    return query_encoder(checkpoint.tensors) | predictor, checkpoint.about.get("arch")


def timm_configuration(source: str) -> Any:
    """timm's description of the weights ``"timm:NAME"``: ``input_size`` (C, H, W), ``mean``, ``std`` and more."""
    import timm

    return timm.get_pretrained_cfg(source.removeprefix(TIMM))


def _of_timm(source: str, arch: str | None) -> tuple[nn.Module, str]:
    name = source.removeprefix(TIMM)
    own = f"{TIMM}{name.partition('.')[0]}"
    if arch not in (None, own):
        raise ValueError(f"arch: expected {own}, which {source} holds, got {arch}")
    return _timm(name), own


def _timm(name: str) -> nn.Module:
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise ValueError(f"pretrained: expected the name of a timm model with {TIMM}, got {name!r}")
    try:
        return timm.create_model(name, pretrained=True)
    except RuntimeError as error:  # no weights of that name
        raise ValueError(f"pretrained: expected weights that timm has, got {name!r}: {error}") from None


def _torchvision(name: str, arch: str | None) -> tuple[nn.Module, str]:
    from torchvision import models

    name, arch = _of_class(name, arch)
    if arch is None:
        raise ValueError(
            f"arch: expected --arch with {TORCHVISION}{name}, as several architectures have such weights; "
            f"or {TORCHVISION}CLASS.{name}, such as {TORCHVISION}ResNet50_Weights.{name}"
        )
    return models.get_model(arch, weights=_torchvision_weights(name, arch)), arch


def _of_class(name: str, arch: str | None) -> tuple[str, str | None]:
    """The name of torchvision's weights and their architecture, which CLASS.NAME implies."""
    from torchvision import models

    kind, _, member = name.rpartition(".")  # ResNet50_Weights.IMAGENET1K_V2
    if not kind:
        return name, arch
    named = {models.get_model_weights(model).__name__: model for model in models.list_models(module=models)}
    if kind not in named:
        raise ValueError(f"pretrained: expected a class of torchvision.models such as ResNet50_Weights, got {kind!r}")
    if arch not in (None, named[kind]):
        raise ValueError(f"arch: expected {named[kind]}, which {TORCHVISION}{name} is for, got {arch}")
    return member, named[kind]


def _torchvision_weights(name: str, arch: str) -> Any:
    from torchvision import models

    name, _ = _of_class(name, arch)
    if arch not in models.list_models(module=models):
        raise ValueError(f"arch: expected a torchvision model with {TORCHVISION}{name}, got {arch!r}")
    known = _torchvision_names(arch)
    if name not in known:
        raise ValueError(f"pretrained: expected one of {', '.join(known)} of {arch}, got {name!r}")
    return known[name]


def _torchvision_names(arch: str) -> Mapping[str, Any]:
    from torchvision import models

    return models.get_model_weights(arch).__members__ if arch in models.list_models(module=models) else {}
