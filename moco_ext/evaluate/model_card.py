"""The model card of an exported encoder: ``README.md`` beside its weights."""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Any

from .. import __version__
from ..runs.files import write_atomically

_TEMPLATE = Path(__file__).with_name("model_card.md")
_MARK = "library_name: moco_ext"


def model_card(arch: str, num_features: int, transform: dict[str, Any], name: str = "", training: str = "") -> str:
    """A model card with front matter; the license is left to its author.

    Args:
        name: what ``load_encoder`` takes, the path or the hub's name.
        training: a section in Markdown.
    """
    how = "whole image" if transform["crop_pct"] == 1 else f"center crop, {transform['crop_pct']:g} of the resized side"
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        arch=arch,
        num_features=f"{num_features:,}",
        name=name or "this folder",
        size=transform["size"],
        how=how,
        mean=", ".join(f"{value:.4g}" for value in transform["mean"]),
        std=", ".join(f"{value:.4g}" for value in transform["std"]),
        version=__version__,
        training=training.strip() or "Not recorded.",
    )


def check_replaceable(path: Path) -> None:
    """Raise FileExistsError if ``path`` is another README than a model card of this package."""
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace")[:1000]:
        raise FileExistsError(f"output: {path} exists and is no model card of moco_ext; export to another folder")


def write_card(path: Path, card: str) -> None:
    check_replaceable(path)
    write_atomically(path, lambda file: file.write(card.encode()))
