"""The page's pictures: nearest neighbours and maps of the features."""

from __future__ import annotations

import base64
import html
import io

import torch

from ..data import FolderSplit, ImageData, Split
from ..data.images import read_image
from ..evaluate import nearest
from .plots import feature_maps
from .read import Gallery
from .style import section

_QUERIES, _NEIGHBOURS, _MAP_POINTS, _PRECISION_ROWS = 10, 7, 1000, 2000
_THUMBNAIL = 96  # pixels, of photographs: twice the size they are shown at


def neighbours(gallery: Gallery) -> str:
    data, features = gallery.data, gallery.features
    train_split, test_split = data.splits
    train_labels, test_labels = train_split.labels, test_split.labels
    queries = [int((test_labels == label).nonzero()[0]) for label in test_labels.unique()[:_QUERIES]]
    sample = torch.linspace(0, len(test_labels) - 1, min(_PRECISION_ROWS, len(test_labels))).long()
    shown = _NEIGHBOURS if len(features) <= 3 else _NEIGHBOURS - 2  # so that a fourth fits beside the others
    found, heads = {}, ""
    for name, (train, test) in features.items():
        found[name] = nearest(train, test[queries], shown)
        closest = nearest(train, test[sample], _NEIGHBOURS)
        same = 100 * (train_labels[closest] == test_labels[sample, None]).double().mean().item()
        heads += f"<th>{html.escape(name)}<small>{same:.1f} % of the same class</small></th>"
    rows = ""
    for row, query in enumerate(queries):
        label = int(test_labels[query])
        caption = html.escape(data.classes[label])
        cells = f'<th scope="row"><div>{_thumbnail(test_split, query, caption)}<small>{caption}</small></div></th>'
        for name in features:
            thumbnails = "".join(
                _thumbnail(
                    train_split,
                    int(index),
                    html.escape(data.classes[int(train_labels[index])]),
                    wrong=int(train_labels[index]) != label,
                )
                for index in found[name][row]
            )
            cells += f'<td><div class="strip">{thumbnails}</div></td>'
        rows += f"<tr>{cells}</tr>"
    return section(
        f"Nearest neighbours{_of(data)}",
        f'<div class="scroll"><table class="neighbours"><tr><th>test image</th>{heads}</tr>{rows}</table></div>',
        f"The first test image of each class and its {shown} nearest training images by cosine, nearest first; "
        f"those of another class are framed. Percentages: of the {_NEIGHBOURS} nearest of {len(sample):,} test images.",
    )


def feature_map(gallery: Gallery) -> str:
    data = gallery.data
    labels = data.splits[1].labels
    sample = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:_MAP_POINTS]
    maps, colours = feature_maps(
        {name: test[sample] for name, (_, test) in gallery.features.items()}, labels[sample], len(data.classes)
    )
    figures = "".join(
        f"<figure><figcaption>{html.escape(name)}</figcaption>{svg}</figure>" for name, svg in maps.items()
    )
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>'
        for name, colour in zip(data.classes, colours, strict=True)
    )
    legend = f'<p class="legend">{legend}</p>' if len(data.classes) <= 20 else ""
    return section(
        f"Map of the features{_of(data)}",
        f'{legend}<div class="charts of{len(maps)}">{figures}</div>',
        f"t-SNE of {len(sample):,} test images, coloured by class; no representation has seen a label. Who is near "
        "whom means something; axes, distances between groups and the groups' sizes do not.",
    )


def _of(data: ImageData) -> str:
    return f"<small>{html.escape(data.name)}</small>"


def _thumbnail(split: Split, index: int, caption: str, wrong: bool = False) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    if isinstance(split, FolderSplit):
        image = Image.fromarray(read_image(split.paths[index]).permute(1, 2, 0).numpy())
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        kind = "jpeg"
        image.save(buffer, kind, quality=85)
    else:
        kind = "png"
        Image.fromarray(split.images[index].permute(1, 2, 0).squeeze(-1).numpy()).save(buffer, kind)
    source = base64.b64encode(buffer.getvalue()).decode()
    mark = ' class="wrong"' if wrong else ""
    return f'<img{mark} src="data:image/{kind};base64,{source}" alt="{caption}" title="{caption}">'
