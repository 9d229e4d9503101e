"""The pictures of a page: nearest neighbors and maps of the features."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..data import Split, TensorSplit
from ..evaluate import nearest
from .plots import TSNE_POINTS, feature_maps
from .read import Gallery

_QUERIES, _NEIGHBORS, _MAP_POINTS, _PRECISION_ROWS = 10, 7, 1000, 2000
_THUMBNAIL = 96  # pixels, of photographs: twice their size on the page


class _Thumbnail(NamedTuple):
    """An image as a data URI; ``wrong`` if it is of another class than the query."""

    source: str
    caption: str
    wrong: bool


class _Neighbors(NamedTuple):
    """The nearest training images of a few test images, or without test images, of a few training images.

    Attributes:
        rows: of each query, its thumbnail and one strip of neighbors per representation.
        same_class: by representation, percentage of the ``counted`` nearest of ``sample`` test images that are of the
            same class; None without classes.
        queries: what the queries are.
        shown: neighbors per strip.
    """

    rows: list[tuple[_Thumbnail, list[list[_Thumbnail]]]]
    same_class: dict[str, float | None]
    queries: str
    shown: int
    counted: int
    sample: int


def neighbors(gallery: Gallery) -> _Neighbors:
    """A test image of each class (without classes, some images) and its nearest training images."""
    data, features = gallery.data, gallery.features
    train_split, test_split = data.train, data.test or data.train
    train_labels, test_labels = train_split.labels, test_split.labels
    labeled, itself = bool(data.classes), int(data.test is None)  # a training image is its own nearest
    queries = [int((test_labels == label).nonzero()[0]) for label in test_labels.unique()[:_QUERIES]]
    if not labeled:
        queries = torch.linspace(0, len(test_labels) - 1, min(_QUERIES, len(test_labels))).long().tolist()
    sample = torch.linspace(0, len(test_labels) - 1, min(_PRECISION_ROWS, len(test_labels))).long()
    shown = _NEIGHBORS if len(features) <= 3 else _NEIGHBORS - 2  # so that a fourth strip fits into the row

    def thumbnail(split: Split, index: int, query: int) -> _Thumbnail:
        label = int(split.labels[index])
        caption = data.classes[label] if labeled else _name(split, index)
        return _Thumbnail(image_source(split, index), caption, wrong=label != int(test_labels[query]))

    found: dict[str, Tensor] = {}
    same_class: dict[str, float | None] = {}
    for name, (train, test) in features.items():
        found[name] = nearest(train, test[queries], shown + itself)[:, itself:]
        closest = nearest(train, test[sample], _NEIGHBORS + itself)[:, itself:]
        same = (train_labels[closest] == test_labels[sample, None]).double().mean().item()
        same_class[name] = 100 * same if labeled else None
    rows = [
        (
            thumbnail(test_split, query, query),
            [[thumbnail(train_split, i, query) for i in found[name][row].tolist()] for name in features],
        )
        for row, query in enumerate(queries)
    ]
    kind = "training" if itself else "test"
    what = f"The first {kind} image of each class" if labeled else f"{len(queries)} {kind} images, evenly spaced,"
    return _Neighbors(rows, same_class, what, shown, _NEIGHBORS, len(sample))


def feature_map(gallery: Gallery) -> dict[str, Any]:
    """A map of each representation of the test images, and the colors of the classes."""
    data = gallery.data
    labels = (data.test or data.train).labels.clamp(min=0)
    sample = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:_MAP_POINTS]
    maps, colors = feature_maps(
        {name: test[sample] for name, (_, test) in gallery.features.items()}, labels[sample], max(1, len(data.classes))
    )
    return {
        "figures": [{"title": name, "levels": (), "svg": svg} for name, svg in maps.items()],
        "legend": list(zip(data.classes, colors, strict=bool(data.classes))),
        "method": "t-SNE" if len(sample) >= TSNE_POINTS else "PCA",
        "points": len(sample),
    }


def _name(split: Split, index: int) -> str:
    return str(index) if isinstance(split, TensorSplit) else Path(split.name(index)).stem


def image_source(split: Split, index: int) -> str:
    """A data URI: a small JPEG of a photograph, a PNG of an image held in memory."""
    buffer = io.BytesIO()
    if not isinstance(split, TensorSplit):
        image = Image.fromarray(split.read(index).permute(1, 2, 0).numpy())
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        kind = "jpeg"
        image.save(buffer, kind, quality=85)
    else:
        kind = "png"
        Image.fromarray(split.images[index].permute(1, 2, 0).squeeze(-1).numpy()).save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
