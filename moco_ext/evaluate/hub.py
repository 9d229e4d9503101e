"""The layout of a model on the Hugging Face hub: ``config.json``, ``model.safetensors``, ``README.md``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoints import files
from ..data import EvalTransform
from ..runs.files import read_json, write_json
from .model_card import check_replaceable, write_card

PREFIX = "hf:"
WEIGHTS = "model.safetensors"


def find(source: str) -> Path | None:
    """The folder of an exported encoder: ``source``, or a copy of the hub's repository that it names; else None."""
    if source.startswith(PREFIX):
        from huggingface_hub import snapshot_download

        name, _, revision = source.removeprefix(PREFIX).partition("@")
        wanted = ["config.json", WEIGHTS]
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    is_run = files.exists(files.newest(Path(source)))  # which may have an exported encoder beside its checkpoints
    return Path(source) if Path(source, WEIGHTS).is_file() and not is_run else None


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of an exported encoder.

    Raises:
        ValueError: it is missing, or of another package.
    """
    config = read_json(folder / "config.json")
    if not isinstance(config.get("arch"), str) or not isinstance(config.get("transform"), dict):
        raise ValueError(
            f"source: expected a config.json with arch and transform, as moco-ext export writes it, in "
            f"{folder}, got {', '.join(config) or 'none'}"
        )
    return config


def check_folder(folder: Path) -> None:
    """Raise FileExistsError if a folder has a README or a configuration, as of a run, that an export would replace."""
    check_replaceable(folder / "README.md")
    config = read_json(folder / "config.json")
    if config and "transform" not in config:
        raise FileExistsError(
            f"output: {folder / 'config.json'} exists and is not of an exported encoder; export to another folder"
        )


def write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    arch: str,
    num_features: int,
    transform: EvalTransform,
    num_classes: int,
    card: str,
) -> None:
    """Write an encoder; each file atomically, the configuration last."""
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    size, channels = transform.size, 3 // len(transform.mean)
    config = {
        "arch": arch,
        "transform": transform.as_dict(),
        # What timm reads:
        "architecture": arch.removeprefix("timm:"),
        "num_features": num_features,
        "num_classes": num_classes,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "mean": list(transform.mean) * channels,
            "std": list(transform.std) * channels,
            "crop_pct": transform.crop_pct,
            "interpolation": "bilinear",
            "num_classes": num_classes,
        },
    }
    files.write(folder / WEIGHTS, {name: tensor.detach().cpu() for name, tensor in tensors.items()})
    write_card(folder / "README.md", card)
    write_json(folder / "config.json", config)


def upload(folder: Path, repo_id: str, private: bool | None, message: str) -> str:
    """Upload a folder to the hub; its address."""
    from huggingface_hub import create_repo, upload_folder

    address = create_repo(repo_id, private=private, exist_ok=True)
    upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    return str(address)
