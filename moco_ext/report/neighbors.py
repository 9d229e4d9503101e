"""A page of query images and their nearest neighbors: the pictures of ``moco-ext neighbors``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..data import BUILT_IN, FolderSplit, ImageData, UnreadableImageError, load
from ..evaluate.feature_files import FeatureFile
from ..evaluate.neighbors import Result
from ..runs.files import write_atomically
from .gallery import image_source
from .page import environment

SHOWN = 100  # queries; more make a page of many megabytes


class _Picture(NamedTuple):
    """An image as a data URI, empty if its file is gone."""

    source: str
    name: str
    title: str
    similarity: str


def write_neighbors(
    path: str | Path, features: FeatureFile, results: Sequence[Result], *, data_root: str | Path = "data"
) -> None:
    """Write a self-contained page about the first 100 queries, atomically."""
    pictures = _Pictures(features, data_root)
    rows = [
        (
            pictures.of(result.query),
            [pictures.of(found.path, f"{found.similarity:.3f}", found.label) for found in result.neighbors],
        )
        for result in results[:SHOWN]
    ]
    page = (
        environment()
        .get_template("neighbors.html.j2")
        .render(
            title=f"Nearest neighbors in {features.path.name}",
            lead=f"{len(features):,} images · {features.metadata['arch']} · {features.metadata['weights']}",
            rows=rows,
            left=len(results) - len(rows),
        )
    )
    write_atomically(path, lambda file: file.write(page.encode(errors="replace")))  # names of files may be no text


class _Pictures:
    def __init__(self, features: FeatureFile, data_root: str | Path) -> None:
        name = features.metadata["data"]
        self._data: ImageData | None = load(name, data_root) if name in BUILT_IN else None

    def of(self, path: str, similarity: str = "", label: str | None = None) -> _Picture:
        name = Path(path).stem if label is None else label
        try:
            return _Picture(self._source(path), name, path, similarity)
        except UnreadableImageError as error:
            return _Picture("", name, str(error), similarity)

    def _source(self, path: str) -> str:
        if self._data is not None and path.startswith(f"{self._data.name}/"):
            _, part, row = path.split("/")
            split = self._data.train if part == "train" else self._data.test
            assert split is not None
            return image_source(split, int(row))
        return image_source(FolderSplit([path], torch.tensor([-1])), 0)
