"""The nearest images of a file of features: :func:`neighbors`."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..data import EvalTransform, UnreadableImageError
from ..data.files import LISTS, find_images
from ..data.images import read_image
from ..runs.files import write_atomically
from .embed import encoded_batches
from .encoder import Encoder, load_encoder
from .feature_files import FeatureFile
from .knn import nearest_in

_QUERIES = 4096  # compared with a block of the file at a time


class Neighbor(NamedTuple):
    """An image of the file: its row, path, cosine similarity to the query, and label if it has one."""

    row: int
    path: str
    similarity: float
    label: str | None


class Result(NamedTuple):
    """A query image and its neighbors, nearest first."""

    query: str
    neighbors: list[Neighbor]


def neighbors(
    features: str | Path | FeatureFile,
    queries: Sequence[str | Path],
    k: int = 10,
    *,
    weights: str | Path | Encoder | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    workers: int = 0,
) -> tuple[list[Result], list[str]]:
    """The k images of a file of features with the highest cosine similarity to each query image.

    The file is read a block at a time: neither it nor the similarities of all its rows are in memory. A query that is
    itself in the file, under the same path, is not its own neighbor.

    Args:
        features: written by :func:`moco_ext.embed`.
        queries: image files, folders or lists of images.
        weights: of the encoder that computed the features; by default those that the file names.

    Returns:
        The results in the order of the queries, and the query files that could not be decoded.

    Raises:
        FileNotFoundError: no such file.
        UnreadableImageError: none of the queries can be decoded.
        ValueError: an argument out of range, no images, or weights that are not those of the features.
    """
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    bank = features if isinstance(features, FeatureFile) else FeatureFile(features)
    paths = find_queries(queries)
    encoder = find_encoder(bank, weights).to(device)
    found, rows, unreadable = [], [], []
    for kept, block, others in encoded_batches(
        encoder,
        paths,
        range(len(paths)),
        batch_size=batch_size,
        device=torch.device(device),
        workers=min(workers, len(paths) // batch_size),
    ):
        found += [paths[row] for row in kept]
        unreadable += [paths[row] for row in others]
        rows += [] if block is None else [block.cpu()]
    if not found:
        read_image(unreadable[0])  # says why
        raise UnreadableImageError(f"queries: expected images, got none of {len(unreadable):,} that can be decoded")
    return list(_results(found, torch.cat(rows).to(device), bank, k)), unreadable


def _results(queries: list[str], rows: Tensor, bank: FeatureFile, k: int) -> list[Result]:
    results = []
    for start in range(0, len(rows), _QUERIES):
        similarity, index = nearest_in(rows[start : start + _QUERIES], bank.blocks(), k + 1)
        for query, scores, found in zip(queries[start:], similarity.tolist(), index.tolist(), strict=False):
            itself = os.path.abspath(query)
            nearest = [
                Neighbor(row, bank.paths[row], score, bank.labels[row] if bank.labels else None)
                for row, score in zip(found, scores, strict=True)
                if bank.paths[row] != itself
            ]
            results.append(Result(query, nearest[:k]))
    return results


def find_queries(queries: Sequence[str | Path]) -> list[str]:
    """The image files of queries: files, and the images of folders and lists."""
    paths: list[str] = []
    for query in map(Path, queries):
        if query.is_dir() or query.suffix.lower() in LISTS:
            paths += find_images([query]).paths
        elif query.is_file():
            paths.append(str(query))
        else:
            raise FileNotFoundError(f"queries: no such file or folder: {query}")
    if not paths:
        raise ValueError("queries: expected images, got none")
    return paths


def find_encoder(bank: FeatureFile, weights: str | Path | Encoder | None = None) -> Encoder:
    """The encoder that computed the features.

    Raises:
        FileNotFoundError: the weights are not where the file says.
        ValueError: they are not those of the features.
    """
    recorded = bank.metadata
    named, transform = recorded["weights"], EvalTransform.from_dict(recorded["transform"])
    if weights is None and not (":" in named or (named and Path(named).exists())):
        raise FileNotFoundError(
            f"weights: expected the encoder of {bank.path} in {named or 'a file'}, got none there; --weights names it"
        )
    if isinstance(weights, Encoder):
        encoder = copy.copy(weights)  # as its transform is set
    else:
        options = {"head": recorded["head"], "image_size": transform.size}
        encoder = load_encoder(weights or named, recorded["arch"], **options)[0]
    fingerprint = encoder.fingerprint()
    if fingerprint != recorded["fingerprint"]:
        raise ValueError(
            f"weights: expected those that {bank.path} was computed with ({recorded['fingerprint']}), got "
            f"{encoder.source} ({fingerprint}), which may have been trained since; embed the images again"
        )
    encoder.transform = transform
    return encoder


def write_faiss_index(features: FeatureFile, output: str | Path) -> None:
    """Write a FAISS index of the unit rows of a file of features, atomically: inner products are cosines.

    Its ids are the rows of the file.
    """
    import faiss

    output = Path(output)
    if not output.parent.is_dir():
        raise FileNotFoundError(f"faiss: no such folder: {output.parent}")
    index = faiss.IndexFlatIP(features.dim)
    for block in features.blocks():
        index.add(torch.nn.functional.normalize(block, dim=1).numpy())
    write_atomically(output, lambda file: file.write(faiss.serialize_index(index).data))
