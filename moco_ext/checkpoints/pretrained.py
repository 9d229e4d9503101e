"""Encoders from files: ours, the official ones, torchvision's, plain state dictionaries."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from ..encoders import HEADS, resolve
from .convert import read_checkpoint

_BY_NAME = "torchvision:"
_AUXILIARY = ("aux1", "aux2", "AuxLogits")  # heads of GoogLeNet and Inception, which encoders lack


def load_pretrained(source: str | Path, arch: str | None = None) -> tuple[nn.Module, str]:
    """An encoder with pretrained weights under a head that means nothing, and its architecture's name.

    :func:`moco_ext.encoders.backbone` takes the head off. All layers under it come from the file, or it is an error.

    Args:
        source: a run directory (its ``checkpoint.pth``); a checkpoint of any format that ``moco-ext convert`` reads
            (the query encoder is taken), or of linear evaluation or fine-tuning; a state dictionary of the encoder
            alone, as torchvision's files are, pickled or ``.safetensors``; or ``"torchvision:NAME"``, the weights that
            torchvision knows by that name for ``arch`` (``"torchvision:IMAGENET1K_V2"``), which it downloads.
        arch: a name for :func:`moco_ext.encoders.resolve`; needed where the source does not say.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, of another architecture, or no architecture known; the message says how many of its
            layers were found.
    """
    if str(source).startswith(_BY_NAME):
        return _torchvision(str(source).removeprefix(_BY_NAME), arch)
    path = Path(source)
    if path.is_dir():
        path = path / "checkpoint.pth"
    found, said = _read(path)
    if said is not None and arch not in (None, said):
        raise ValueError(f"arch: expected {said}, which {path} holds, got {arch}")
    name = arch or said
    if name is None:
        raise ValueError(f"arch: expected --arch, as {path} holds a state dictionary without a name, got none")
    encoder = resolve(name)(num_classes=1)
    _fill(encoder, found, name, path)
    return encoder, name


def _read(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The query encoder's tensors, and the architecture if the file names it."""
    found = read_checkpoint(path, otherwise="timm")
    query = {name: tensor for name, tensor in found.tensors.items() if name.startswith("encoder_q.")}
    return {name.removeprefix("encoder_q."): tensor for name, tensor in query.items()}, found.about.get("arch")


def _fill(encoder: nn.Module, found: dict[str, Tensor], arch: str, path: Path) -> None:
    heads = _head_names(encoder)
    wanted = {name: value for name, value in encoder.state_dict().items() if not name.startswith(heads)}
    fitting = {
        name: found[name] for name, value in wanted.items() if name in found and found[name].shape == value.shape
    }
    # Files older than this counter, which only cumulative averages read, lack it.
    needed = [name for name in wanted if not name.endswith("num_batches_tracked")]
    unfit = [name for name in needed if name not in fitting]
    # A deeper network holds a shallower one's layers.
    foreign = [name for name in found if name not in wanted and not name.startswith((*heads, *_prefixes(_AUXILIARY)))]
    if unfit or foreign:
        name = (unfit or foreign)[0]
        expected, got = (list(state[name].shape) if name in state else "none" for state in (wanted, found))
        raise ValueError(
            f"checkpoint: expected the {len(needed)} tensors of {arch} in {path}, got "
            f"{len(needed) - len(unfit)} that fit, {len(unfit)} missing or of another shape, {len(foreign)} foreign: "
            f"{name}, expected {expected}, got {got}"
        )
    encoder.load_state_dict(fitting, strict=False)


def _head_names(encoder: nn.Module) -> tuple[str, ...]:
    """Prefixes of names that belong to no backbone."""
    classifier = getattr(encoder, "pretrained_cfg", {}).get("classifier")  # timm: its `head` may hold a norm to keep
    if classifier is None:
        return _prefixes(HEADS)
    return _prefixes(("fc", *([classifier] if isinstance(classifier, str) else classifier)))


def _prefixes(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{name}." for name in names)


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
