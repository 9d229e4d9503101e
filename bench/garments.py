"""Writes a small data set for detection or segmentation: Fashion-MNIST garments on textured backgrounds.

    python bench/garments.py build/garments --train 600 --test 200
    moco-ext detect build/garments --pretrained runs/fashion --min-size 96 --anchors 16 24 32 48 64
    python bench/garments.py build/masks --layout folders --side 192
    moco-ext segment build/masks --pretrained runs/fashion --crop 192

Garments have random positions, sizes and colors, some are mirrored, and they overlap by at most a fifth of the smaller
one. Boxes are tight. Training images use the training images of Fashion-MNIST, test images the test images.
"""

import argparse
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from moco_ext import data as datasets

SIZES = (1 / 6, 7 / 12)  # of the garments' images, as a share of the whole image's side
Box = tuple[int, int, int, int, int]  # x1, y1, x2, y2 (exclusive), class from 0
Composed = dict[str, tuple[list[Box], np.ndarray]]  # by name: boxes and mask


def texture(generator: np.random.Generator, side: int) -> np.ndarray:
    """[3, side, side] in [0, 1]: noise at three scales."""
    layers = [
        F.interpolate(torch.from_numpy(generator.random((1, 3, cells, cells))), size=side, mode="bilinear")[0]
        for cells in (2, 8, side)
    ]
    weights = generator.dirichlet((2, 2, 1))
    return sum(weight * layer.numpy() for weight, layer in zip(weights, layers, strict=True)) * generator.uniform(
        0.4, 0.9
    )


def compose(
    split: datasets.TensorSplit, generator: np.random.Generator, side: int
) -> tuple[Image.Image, list[Box], np.ndarray]:
    """An image of one to four garments, their boxes, and a mask uint8 [side, side]: 0, or a garment's class plus 1."""
    canvas, boxes, labels = texture(generator, side), [], np.zeros((side, side), np.uint8)
    sizes = [round(share * side) for share in SIZES]
    for _ in range(generator.integers(1, 5)):
        number = generator.integers(len(split))
        garment = resized(split.images[number], int(generator.integers(*sizes, endpoint=True)))
        garment = garment[:, ::-1] if generator.random() < 0.5 else garment
        rows, columns = (np.flatnonzero((garment > 0.1).any(axis)) for axis in (1, 0))
        garment = garment[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        height, width = garment.shape
        for _ in range(20):
            y, x = generator.integers(side - height + 1), generator.integers(side - width + 1)
            box = (int(x), int(y), int(x) + width, int(y) + height, int(split.labels[number]))
            if all(overlap(box, other) <= 0.2 for other in boxes):
                color = generator.uniform(0.4, 1, 3)[:, None, None]
                place = canvas[:, y : y + height, x : x + width]
                mask = np.clip(garment * 4, 0, 1)  # Fashion-MNIST's background is black
                place += mask * (garment * color - place)
                labels[y : y + height, x : x + width][garment > 0.1] = box[4] + 1
                boxes.append(box)
                break
    return Image.fromarray((canvas.transpose(1, 2, 0) * 255).astype(np.uint8)), boxes, labels


def resized(image: Tensor, side: int) -> np.ndarray:
    return F.interpolate(image[None].float() / 255, size=side, mode="bilinear", antialias=True)[0, 0].numpy()


def overlap(a: Box, b: Box) -> float:
    """Area of the intersection, as a share of the smaller box."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    return max(0, width) * max(0, height) / min((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))


def write(
    root: Path, layout: str, images: dict[str, int], *, side: int = 96, seed: int = 0, objects: str = "fashion-mnist"
) -> None:
    """Write ``images["train"]`` and ``images["val"]`` images of ``side`` pixels; ``objects`` is a built-in data set."""
    data = datasets.load(objects)
    classes = [name.replace("/", "-") for name in data.classes]
    for split, (name, count) in zip(data.splits, images.items(), strict=True):
        generator = np.random.default_rng([seed, len(name)])
        folder = root / {"voc": "JPEGImages", "coco": name, "folders": f"images/{name}"}[layout]
        folder.mkdir(parents=True, exist_ok=True)
        composed: Composed = {}
        for number in range(count):
            image, *composed[f"{name}{number:05}"] = compose(split, generator, side)
            image.save(folder / f"{name}{number:05}.jpg", quality=95)
        {"voc": write_voc, "coco": write_coco, "folders": write_masks}[layout](root, name, composed, classes, side)


def write_masks(root: Path, split: str, composed: Composed, classes: list[str], side: int) -> None:
    folder = root / "masks" / split
    folder.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in ("background", *classes)))
    for name, (_, mask) in composed.items():
        Image.fromarray(mask).save(folder / f"{name}.png")


def write_voc(root: Path, split: str, composed: Composed, classes: list[str], side: int) -> None:
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in composed))
    for name, (boxes, _) in composed.items():
        tree = ElementTree.Element("annotation")
        for x1, y1, x2, y2, label in boxes:
            tag = ElementTree.SubElement(tree, "object")
            ElementTree.SubElement(tag, "name").text = classes[label]
            ElementTree.SubElement(tag, "difficult").text = "0"
            corners = ElementTree.SubElement(tag, "bndbox")
            for corner, value in (("xmin", x1 + 1), ("ymin", y1 + 1), ("xmax", x2), ("ymax", y2)):
                ElementTree.SubElement(corners, corner).text = str(value)
        ElementTree.ElementTree(tree).write(root / "Annotations" / f"{name}.xml")


def write_coco(root: Path, split: str, composed: Composed, classes: list[str], side: int) -> None:
    (root / "annotations").mkdir(exist_ok=True)
    images = [
        {"id": i, "file_name": f"{name}.jpg", "width": side, "height": side} for i, name in enumerate(composed, 1)
    ]
    rows = [(i, box) for i, (boxes, _) in enumerate(composed.values(), 1) for box in boxes]
    annotations = [
        {
            "id": number,
            "image_id": image,
            "category_id": label + 1,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "iscrowd": 0,
        }
        for number, (image, (x1, y1, x2, y2, label)) in enumerate(rows, 1)
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", choices=("voc", "coco", "folders"), default="voc")
    parser.add_argument("--train", type=int, default=600, help="training images")
    parser.add_argument("--test", type=int, default=200, help="test images")
    parser.add_argument("--side", type=int, default=96, help="height and width in pixels")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    images = {"train": arguments.train, "val": arguments.test}
    write(arguments.folder, arguments.layout, images, side=arguments.side, seed=arguments.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
