"""A trained encoder with its preprocessing: :func:`load_encoder`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import files
from ..checkpoints.convert import query_encoder, read_checkpoint
from ..checkpoints.fit import backbone_tensors, head_prefixes
from ..checkpoints.pretrained import TIMM, TORCHVISION, load_pretrained, timm_configuration
from ..data import EvalTransform, ImageData
from ..encoders import backbone, build, restored_modes, set_image_size
from ..runs.files import read_json
from . import hub
from .model_card import model_card


class Encoder(nn.Module):
    """A trained encoder: normalized images [N, 3, H, W] -> features [N, D], float32 like its weights.

    :func:`load_encoder` makes it, in eval mode. ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` work as in
    other packages that use the Hugging Face hub.

    Args:
        module: an encoder with a head, which is removed (the argument keeps its own) unless ``head``.
        arch: its architecture, a name for :func:`moco_ext.encoders.resolve`.
        transform: from an image to its input.
        head: keep the head.
        source: where the weights come from.
    """

    def __init__(
        self, module: nn.Module, arch: str, transform: EvalTransform, *, head: bool = False, source: str = ""
    ) -> None:
        super().__init__()
        self._heads = head_prefixes(module)
        self.model = module if head else backbone(module)
        self.arch, self.transform, self.head, self.source = arch, transform, head, source

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).flatten(1)

    @functools.cached_property
    def num_features(self) -> int:
        """D."""
        size = self.transform.size
        with torch.no_grad(), restored_modes(self):
            return self.eval()(next(self.parameters()).new_zeros(1, 3, size, size)).shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by the names in the architecture's own code, without a head that is not used."""
        named = files.without_prefix("encoder.", self.model.state_dict())  # of timm's models, see encoders.backbone
        return {name: tensor for name, tensor in named.items() if self.head or not name.startswith(self._heads)}

    def fingerprint(self) -> str:
        """Hash of the weights: equal for encoders with equal features."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors().items()):
            if tensor.is_floating_point():
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def save_pretrained(self, folder: str | Path, *, card: str | None = None) -> None:
        """Write ``config.json``, ``model.safetensors`` and ``README.md``, in the layout of the Hugging Face hub.

        timm reads the folder too, if it has the architecture under the same name, with the same names of layers.

        Args:
            card: content of ``README.md``; by default a description of the encoder.

        Raises:
            FileExistsError: the folder has a ``README.md`` of another kind.
        """
        classes = self.num_features if self.head else 0
        card = card or self.card()
        hub.write(Path(folder), self.tensors(), self.arch, self.num_features, self.transform, classes, card)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None, **options: Any) -> Encoder:
        """An encoder of a folder written by :meth:`save_pretrained`, or of the hub's repository ``USER/NAME``."""
        if not Path(name).is_dir():
            name = f"{hub.PREFIX}{name}" + (f"@{revision}" if revision else "")
        return load_encoder(name, **options)[0]

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, message: str = "Upload encoder") -> str:
        """Upload the encoder to the hub's repository ``USER/NAME``, which is created if needed; returns its address."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, card=self.card(f"{hub.PREFIX}{repo_id}"))
            return hub.upload(Path(folder), repo_id, private, message)

    def card(self, name: str = "", training: str = "") -> str:
        """A model card; ``training`` is a section about the run."""
        return model_card(self.arch, self.num_features, self.transform.as_dict(), name, training)


def load_encoder(
    source: str | Path, arch: str | None = None, *, head: bool = False, image_size: int | None = None
) -> tuple[Encoder, EvalTransform]:
    """A trained encoder in eval mode, without its head, and the transform from an image to its input.

    ::

        encoder, transform = moco_ext.load_encoder("runs/photos")
        features = encoder(transform("photo.jpg")[None])  # [1, D]

    Args:
        source: a run directory; weights that :func:`moco_ext.checkpoints.pretrained.load_pretrained` reads; a folder
            that ``moco-ext export --format hub`` has written; or ``"hf:USER/NAME"`` or ``"hf:USER/NAME@REVISION"``, a
            repository of the Hugging Face hub with such a folder.
        arch: architecture, if the source does not name it.
        head: keep the head that the source holds.
        image_size: side of the images to encode; None: that of the preprocessing.

    Returns:
        (encoder, transform). Runs, exported folders and timm record their preprocessing; for other weights it is
        ImageNet's, with 224 pixels.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the source cannot be read, is of another architecture, or has no head to keep.
    """
    source = str(source)
    folder = hub.find(source)
    if folder is None:
        weights = str(files.newest(Path(source))) if Path(source).is_dir() else source
        recorded = files.read_metadata(Path(weights))
    else:
        weights, recorded = str(folder / hub.WEIGHTS), hub.read_config(folder)
    said = recorded.get("arch")
    if said is not None and arch not in (None, said):
        raise ValueError(f"arch: expected {said}, which {source} holds, got {arch}")
    module, arch = load_pretrained(weights, arch or said)
    if head:
        module = _with_head(weights, arch)
    transform = recorded_transform(weights) or EvalTransform(recorded_size(weights) or EvalTransform.size)
    if image_size is not None:
        set_image_size(module, image_size)
        transform = dataclasses.replace(transform, size=image_size)
    return Encoder(module, arch, transform, head=head, source=source).eval(), transform


def recorded_transform(weights: str) -> EvalTransform | None:
    """The preprocessing that weights were trained with, if it is known: a run, an export or timm has recorded it."""
    if weights.startswith(TIMM):
        known = timm_configuration(weights)
        return EvalTransform(known.input_size[-1], known.mean, known.std)
    if weights.startswith(TORCHVISION):
        return EvalTransform()
    path = files.newest(Path(weights))
    if not files.exists(path):
        return None
    found = files.read_metadata(path).get("transform")
    if path.suffix not in (".safetensors", ".pkl"):
        content = files.read_saved(path, inert=True, mmap=True)
        found = content.get("transform") if isinstance(content, dict) else None
    if found is None:
        found = read_json(path.parent / "config.json").get("transform")  # of a folder for the hub
    return EvalTransform.from_dict(found) if isinstance(found, dict) else None


def recorded_size(weights: str) -> int | None:
    """The side of the images that a run or an export was trained on; None for weights that do not say it."""
    if weights.startswith((TIMM, TORCHVISION)):
        return None
    transform = recorded_transform(weights)
    if transform is not None:
        return transform.size
    size = read_json(files.newest(Path(weights)).parent / "config.json").get("image_size")  # of a run
    return size if isinstance(size, int) else None  # other packages have a list


def normalized_for(weights: str, data: ImageData) -> ImageData:
    """The data, with the normalization that the weights were trained with, if it is known."""
    known = recorded_transform(weights)
    return data if known is None else dataclasses.replace(data, mean=known.mean, std=known.std)


def _with_head(source: str, arch: str) -> nn.Module:
    """The encoder of ``source`` with its own head, of one layer or of MoCo v2."""
    path = Path(source)
    if not files.exists(path):
        raise ValueError(f"head: expected weights in a file, got {source}")
    tensors = query_encoder(read_checkpoint(path, otherwise="timm").tensors)
    found = {name.removeprefix("fc."): tensor for name, tensor in tensors.items() if name.startswith("fc.")}
    mlp = "2.weight" in found
    last = found.get("2.weight" if mlp else "weight")
    if last is None:
        raise ValueError(
            f"head: expected a head of one layer, or of two as in MoCo v2, in {path}, got {', '.join(found) or 'none'}"
        )
    module = build(arch, len(last), mlp)
    state = module.state_dict()
    first = "0.weight" if mlp else "weight"
    heads = [name for name in state if name.startswith(head_prefixes(module)) and name.endswith(first)]
    named = {heads[-1].removesuffix(first) + name: tensor for name, tensor in found.items()}
    unfit = [name for name, tensor in named.items() if name not in state or state[name].shape != tensor.shape]
    if unfit:
        raise ValueError(f"head: expected layers that fit {arch} in {path}, got {', '.join(unfit)}")
    module.load_state_dict(backbone_tensors(module, tensors, arch, path) | named, strict=False)
    return module
