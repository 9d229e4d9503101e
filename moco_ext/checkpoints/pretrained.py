"""Pretrained encoders from checkpoints of any format, plain state dictionaries and torchvision."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..encoders import set_image_size
from .convert import query_encoder, read_checkpoint
from .fit import backbone_tensors, encoder_of

_BY_NAME = "torchvision:"


def load_pretrained(
    source: str | Path, arch: str | None = None, image_size: int | None = None
) -> tuple[nn.Module, str]:
    """An encoder with pretrained weights and a randomly initialized head, and the name of its architecture.

    :func:`moco_ext.encoders.backbone` removes the head. All layers below it are loaded from the source.

    Args:
        source: a run directory (its ``checkpoint.pth``); a checkpoint of any format that ``moco-ext convert`` reads
            (its query encoder is used), or of linear evaluation or fine-tuning; a state dictionary of an encoder, like
            torchvision's files, pickled or ``.safetensors``; or ``"torchvision:NAME"``, torchvision's weights of that
            name for ``arch`` (``"torchvision:IMAGENET1K_V2"``), which are downloaded.
        arch: a name for :func:`moco_ext.encoders.resolve`; required if the source does not contain it.
        image_size: side of the images to encode, for encoders that are built for one size; None: that of training.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the source cannot be read, is of another architecture, or its architecture is unknown; the message
            says how many layers fit.
    """
    if str(source).startswith(_BY_NAME):
        return _torchvision(str(source).removeprefix(_BY_NAME), arch)
    path = Path(source)
    if path.is_dir():
        path = path / "checkpoint.pth"
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
    if image_size is not None:
        set_image_size(encoder, image_size)
    return encoder, name


def _torchvision(name: str, arch: str | None) -> tuple[nn.Module, str]:
    from torchvision import models

    if arch is None:
        raise ValueError(f"arch: expected --arch with {_BY_NAME}{name}, as several architectures have such weights")
    if arch not in models.list_models(module=models):
        raise ValueError(f"arch: expected a torchvision model with {_BY_NAME}{name}, got {arch!r}")
    known = models.get_model_weights(arch).__members__
    if name not in known:
        raise ValueError(f"pretrained: expected one of {', '.join(known)} of {arch}, got {name!r}")
    return models.get_model(arch, weights=known[name]), arch
