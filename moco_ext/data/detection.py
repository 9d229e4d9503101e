"""Object detection data sets: folders in the layout of PASCAL VOC or of COCO."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from .files import few
from .images import UnreadableImageError, read_image
from .items import ItemData
from .seeds import uniforms

LAYOUTS = ("voc", "coco")
Item = tuple[Tensor, dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class DetectionSplit:
    """Images on disk and their objects.

    Attributes:
        paths: N image files.
        objects: float32 [n, 6] of each image: x1, y1, x2, y2 in pixels, label from 1 (0 is the background), and 1 if
            the evaluation ignores the object (VOC: difficult, COCO: crowd).
        sizes: width and height of each image, as annotated; None: unknown.
    """

    paths: list[str]
    objects: list[np.ndarray]
    sizes: list[tuple[int, int] | None]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, position: int, flip: bool = False) -> Item:
        """An image uint8 [3, H, W], mirrored if ``flip``, and its target for torchvision's detectors and torchmetrics:
        ``boxes`` float32 [n, 4], ``labels`` and ``iscrowd`` int64 [n].

        Raises:
            UnreadableImageError: the file cannot be decoded, or the annotations are of another size of image.
        """
        path, annotated = self.paths[position], self.sizes[position]
        image = read_image(path)
        height, width = image.shape[1:]
        objects = torch.from_numpy(self.objects[position])
        boxes, labels, ignored = objects[:, :4].clone(), objects[:, 4].long(), objects[:, 5].long()
        outside = (boxes[:, 2:] <= 0).any(1) | (boxes[:, :2] >= torch.tensor([width, height])).any(1)
        if annotated is not None and annotated != (width, height):
            raise UnreadableImageError(
                f"data: expected {annotated[0]} x {annotated[1]} pixels, as annotated, got {width} x {height} in {path}"
            )
        if outside.any():
            raise UnreadableImageError(
                f"data: expected boxes in the {width} x {height} pixels of {path}, got {boxes[outside][0].tolist()}"
            )
        if flip:
            image = image.flip(-1)
            boxes[:, [0, 2]] = image.shape[-1] - boxes[:, [2, 0]]
        return image, {"boxes": boxes, "labels": labels, "iscrowd": ignored}

    def view(self, position: int, seed: int) -> Item:
        """The item for training: half of them are mirrored."""
        return self.read(position, bool(uniforms(np.array([seed]), 1)[0, 0] < 0.5))


class DetectionData(ItemData[DetectionSplit]):
    """A detection data set; label ``i`` is ``classes[i - 1]``. Training images without objects are left out."""


def load_detection(folder: str | Path, layout: str | None = None) -> DetectionData:
    """Read the annotations of a detection data set.

    - ``"voc"``: folders with ``JPEGImages``, ``Annotations`` and ``ImageSets/Main``: ``folder`` itself, or all such in
      it, like ``VOC2007`` and ``VOC2012`` in ``VOCdevkit``. If one has annotated images in ``test.txt``, ``trainval``
      of all is for training and ``test`` for evaluation, else ``train`` and ``val``.
    - ``"coco"``: ``annotations/instances_NAME.json`` with the images in ``NAME``, one of whose names starts with
      ``train`` and one with ``val``.

    Args:
        layout: None: inferred from the names of the folders.

    Raises:
        ValueError: a folder of another layout, without images or objects, or with damaged annotations.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"data: expected a folder in the layout of VOC or COCO, got {root}")
    is_coco = (root / "annotations").is_dir()
    parts = [] if is_coco else [part for part in (root, *sorted(root.iterdir())) if (part / "ImageSets/Main").is_dir()]
    found = "coco" if is_coco else "voc" if parts else None
    if found is None or layout not in (None, found):
        names = few([path.name for path in root.iterdir()]) or "nothing"
        wanted = {"voc": "ImageSets/Main, or folders with it,", "coco": "annotations"}
        of = wanted[layout] if layout in LAYOUTS else f"{wanted['coco']} (COCO) or {wanted['voc']} (VOC)"
        raise ValueError(f"data: expected {of} in {root}, got {names}")
    try:
        classes, train, test = _coco(root) if is_coco else _voc(parts)
    except (ElementTree.ParseError, json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"data: expected annotations of {found} in {root}, got {error!r}") from None
    some = [bool(len(objects)) for objects in train.objects]
    train = DetectionSplit(
        list(itertools.compress(train.paths, some)),
        list(itertools.compress(train.objects, some)),
        list(itertools.compress(train.sizes, some)),
    )
    for name, split in (("training", train), ("test", test)):
        if not any(map(len, split.objects)):
            raise ValueError(f"data: expected {name} images with objects in {root}, got none")
    if all(objects[:, 5].all() for objects in test.objects):
        kind = "of a crowd" if is_coco else "difficult"
        raise ValueError(f"data: expected test objects that count in {root}, got none that is not {kind}")
    return DetectionData(str(folder), found, classes, train, test)


def _voc(parts: Sequence[Path]) -> tuple[tuple[str, ...], DetectionSplit, DetectionSplit]:
    def listed(name: str) -> list[tuple[Path, str]]:
        files = [(part, part / "ImageSets/Main" / f"{name}.txt") for part in parts]
        return [(part, line.split()[0]) for part, file in files if file.is_file() for line in _lines(file)]

    def annotated(part: Path, name: str) -> Path:
        return part / "Annotations" / f"{name}.xml"

    has_test = [item for item in listed("test") if annotated(*item).is_file()]  # VOC2012's test set has none
    names = listed("trainval" if has_test else "train"), has_test or listed("val")
    tags = [[ElementTree.parse(_existing(annotated(*item))).findall("object") for item in split] for split in names]
    classes = tuple(sorted({_text(tag, "name") for split in tags for objects in split for tag in objects}))
    train, test = (
        DetectionSplit(
            [str(part / "JPEGImages" / f"{name}.jpg") for part, name in items],
            [
                _array([_voc_row(tag, classes, annotated(*item)) for tag in objects])
                for item, objects in zip(items, split, strict=True)
            ],
            [None] * len(items),  # their sizes are wrong in some data sets
        )
        for items, split in zip(names, tags, strict=True)
    )
    return classes, train, test


def _voc_row(tag: ElementTree.Element, classes: Sequence[str], file: Path) -> list[float]:
    corners = [_text(tag, f"bndbox/{name}") for name in ("xmin", "ymin", "xmax", "ymax")]
    x1, y1, x2, y2 = _numbers(corners, 4, f"xmin, ymin, xmax and ymax in {file}")
    label = classes.index(_text(tag, "name")) + 1
    [difficult] = _numbers([tag.findtext("difficult", "0")], 1, f"a number as difficult in {file}")
    return [x1 - 1, y1 - 1, x2, y2, label, difficult]  # VOC counts pixels from 1


def _text(tag: ElementTree.Element, path: str) -> str:
    text = tag.findtext(path, "").strip()
    if not text:
        raise KeyError(path)
    return text


def _numbers(values: Any, count: int, expected: str) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"data: expected {expected}, got {values}")
    return numbers


def _coco(root: Path) -> tuple[tuple[str, ...], DetectionSplit, DetectionSplit]:
    files = [sorted((root / "annotations").glob(f"instances_{name}*.json")) for name in ("train", "val")]
    for name, matching in zip(("train", "val"), files, strict=True):
        if len(matching) != 1:
            raise ValueError(
                f"data: expected one instances_{name}*.json in {root / 'annotations'}, got {len(matching)}"
            )
    contents = [json.loads(matching[0].read_text()) for matching in files]
    categories = sorted(
        (category["id"], category["name"]) for content in contents for category in content["categories"]
    )
    categories = list(dict.fromkeys(categories))
    label_of = {number: label for label, (number, _) in enumerate(categories, 1)}
    if len(label_of) < len(categories):
        raise ValueError(f"data: expected one name for each category's id in {root / 'annotations'}, got {categories}")
    splits = []
    for [file], content, training in zip(files, contents, (True, False), strict=True):
        images = root / file.stem.removeprefix("instances_")
        rows: dict[int, list[list[float]]] = {image["id"]: [] for image in content["images"]}
        if len(rows) < len(content["images"]):
            raise ValueError(
                f"data: expected an id for each image in {file}, got {len(rows):,} of {len(content['images']):,} images"
            )
        for entry in content["annotations"]:
            box, crowd = entry["bbox"], entry.get("iscrowd", 0)
            x, y, width, height = _numbers(box, 4, f"x, y, width and height as each bbox in {file}")
            if not (training and crowd):  # a box around a crowd is not an object
                rows[entry["image_id"]].append([x, y, x + width, y + height, label_of[entry["category_id"]], crowd])
        splits.append(
            DetectionSplit(
                [str(images / image["file_name"]) for image in content["images"]],
                list(map(_array, rows.values())),
                [_size(image) for image in content["images"]],
            )
        )
    train, test = splits
    return tuple(name for _, name in categories), train, test


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    width, height = image.get("width"), image.get("height")
    return (width, height) if width and height else None


def _array(rows: list[list[float]]) -> np.ndarray:
    """Float32 [n, 6], without the boxes that have no area, which some data sets contain."""
    objects = np.array(rows, np.float32).reshape(-1, 6)
    return objects[(objects[:, 2] > objects[:, 0]) & (objects[:, 3] > objects[:, 1])]


def _lines(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line.strip()]


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"data: expected annotations in {path}, got no such file")
    return path
