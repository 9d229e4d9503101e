"""Semantic segmentation data sets: folders in the layout of PASCAL VOC or Cityscapes, or of images and masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import Cityscapes
from torchvision.models.segmentation import FCN_ResNet50_Weights
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from .files import few, find_images
from .images import UnreadableImageError, read_image, upright
from .items import ItemData
from .seeds import uniforms

IGNORED = 255  # class of pixels without a label
Item = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class SegmentationSplit:
    """Images on disk and their masks.

    Attributes:
        files: N image files and their masks, which hold one number per pixel.
        classes: names of the classes.
        table: int16 [256] class of each number in a mask: 255 if it is ignored, -1 if it is an error.
    """

    files: list[tuple[str, str]]
    classes: tuple[str, ...]
    table: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def read(self, position: int) -> Item:
        """An image uint8 [3, H, W], and the class of each pixel, uint8 [H, W].

        Raises:
            UnreadableImageError: a file cannot be decoded, the sizes differ, or the mask has an unknown number.
        """
        source, path = self.files[position]
        image, numbers = read_image(source), read_mask(path)
        if image.shape[1:] != numbers.shape:
            (height, width), (rows, columns) = image.shape[1:], numbers.shape
            raise UnreadableImageError(
                f"data: expected a mask of {width} x {height} pixels, as {source}, got {columns} x {rows} in {path}"
            )
        mask = self.table[numbers]
        if mask.min() < 0:
            raise UnreadableImageError(
                f"data: expected numbers of {len(self.classes)} classes, or {IGNORED} for ignored pixels, got "
                f"{numbers[mask < 0][0]} in {path}"
            )
        return image, torch.from_numpy(mask.astype(np.uint8))

    def view(self, position: int, seed: int, *, crop: int, scales: tuple[float, ...], fill: Sequence[int]) -> Item:
        """The item for training: :func:`random_view`."""
        return random_view(*self.read(position), seed, crop=crop, scales=scales, fill=fill)


class SegmentationData(ItemData[SegmentationSplit]):
    """A segmentation data set; the pixels of ``classes[i]`` are ``i``."""


def random_view(
    image: Tensor, mask: Tensor, seed: int, *, crop: int, scales: tuple[float, ...], fill: Sequence[int]
) -> Item:
    """A square view of ``crop`` pixels: scaled, cropped at random and, in half of the cases, mirrored.

    What is smaller than the view is padded at the right and at the bottom, with the color ``fill`` and ignored pixels.

    Args:
        image: uint8 [3, H, W].
        mask: uint8 [H, W].
        seed: determines the view.
        scales: smallest and largest ratio of the scaling, uniform in between.
    """
    scale, y, x, flip = uniforms(np.array([seed]), 4)[0].tolist()
    scale = scales[0] + scale * (scales[1] - scales[0])
    size = [max(1, round(scale * side)) for side in mask.shape]
    scaled = resize(image, size, antialias=True), resize(mask[None], size, InterpolationMode.NEAREST_EXACT)
    top, left = (int(draw * (max(0, side - crop) + 1)) for draw, side in zip((y, x), size, strict=True))
    height, width = (min(side, crop) for side in size)
    view = torch.tensor([*fill, IGNORED], dtype=torch.uint8)[:, None, None].repeat(1, crop, crop)
    view[:, :height, :width] = torch.cat(scaled)[:, top : top + crop, left : left + crop]
    if flip < 0.5:
        view = view.flip(-1)
    return view[:3], view[3]


def read_mask(path: str) -> np.ndarray:
    """The numbers of a mask, uint8 [H, W], turned as its EXIF orientation says, like an image.

    Raises:
        UnreadableImageError: cannot be decoded, or is neither grayscale nor of a palette, in 8 bits.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode not in ("1", "L", "P"):
                raise ValueError(f"mode {image.mode}")
            return np.array(upright(image), np.uint8)
    except (OSError, SyntaxError, ValueError) as error:  # PIL's errors for damaged files
        raise UnreadableImageError(
            f"data: expected a mask with one 8-bit number per pixel, got {error} in {path}"
        ) from None


def load_segmentation(folder: str | Path) -> SegmentationData:
    """Find the images and masks of a segmentation data set; the layout follows from the names of the folders.

    - ``"voc"``: ``JPEGImages``, ``SegmentationClass`` and ``ImageSets/Segmentation`` in ``folder``, or in the last such
      folder in it, like ``VOC2012`` in ``VOCdevkit`` (VOC2012 holds the images of earlier years). ``train`` is for
      training; if there is a ``trainaug.txt``, ``trainaug`` with the masks in ``SegmentationClassAug``. ``val`` is for
      evaluation.
    - ``"cityscapes"``: ``leftImg8bit`` and ``gtFine``, of which ``*_labelIds.png`` are mapped to the 19 classes.
    - ``"folders"``: ``images/train``, ``images/val``, and PNG masks of the same names in ``masks/train``,
      ``masks/val``. Class names are the lines of ``classes.txt``; without it, all masks are read for the largest class.

    Pixels of 255 are ignored.

    Raises:
        ValueError: a folder of another layout, without images, with an image without a mask, or with test masks of one
            class.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(
            f"data: expected a folder in the layout of VOC or Cityscapes, or of images and masks, got {root}"
        )
    parts = [part for part in (root, *sorted(root.iterdir())) if (part / "ImageSets/Segmentation").is_dir()]
    if parts:
        layout, (classes, table, *pairs) = "voc", _voc(parts[-1])
    elif (root / "leftImg8bit").is_dir():
        layout, (classes, table, *pairs) = "cityscapes", _cityscapes(root)
    elif (root / "images").is_dir():
        layout, (classes, table, *pairs) = "folders", _folders(root)
    else:
        names = few([path.name for path in root.iterdir()]) or "nothing"
        raise ValueError(
            f"data: expected images and masks, leftImg8bit and gtFine (Cityscapes), or ImageSets/Segmentation or "
            f"folders with it (VOC) in {root}, got {names}"
        )
    for name, found in zip(("training", "test"), pairs, strict=True):
        if not found:
            raise ValueError(f"data: expected {name} images in {root}, got none")
        for path in (path for pair in found for path in pair if not Path(path).is_file()):
            raise ValueError(f"data: expected an image and a mask for each name, got no file {path}")
    train, test = (SegmentationSplit(found, classes, table) for found in pairs)
    _check_two_classes(test)
    return SegmentationData(str(folder), layout, classes, train, test)


def _check_two_classes(split: SegmentationSplit) -> None:
    """Raise a ValueError if all labeled pixels are of one class, of which any model has an mIoU of 100."""
    found: set[int] = set()
    for _, path in split.files:
        found.update(split.table[np.unique(read_mask(path))].tolist())
        if len(found - {IGNORED}) > 1:
            return
    names = few([split.classes[label] for label in found if 0 <= label < IGNORED]) or "none"
    folder = Path(split.files[0][1]).parent
    raise ValueError(
        f"data: expected test masks with pixels of two classes, got {names} in {folder}; pixels "
        f"of {IGNORED} are ignored, so a mask of one object has 0 and 1"
    )


_Pairs = list[tuple[str, str]]  # paths of images and masks
_Found = tuple[tuple[str, ...], np.ndarray, _Pairs, _Pairs]


def _voc(root: Path) -> _Found:
    def pairs(name: str, masks: str) -> _Pairs:
        file = root / "ImageSets/Segmentation" / f"{name}.txt"
        lines = file.read_text().splitlines() if file.is_file() else []
        names = [Path(line.split()[0]).name for line in lines if line.strip()]  # some lists hold paths
        stems = [name.removesuffix(".jpg").removesuffix(".png") for name in names]
        return [(str(root / "JPEGImages" / f"{stem}.jpg"), str(root / masks / f"{stem}.png")) for stem in stems]

    classes = tuple(name.strip("_") for name in FCN_ResNet50_Weights.DEFAULT.meta["categories"])
    train = pairs("trainaug", "SegmentationClassAug") or pairs("train", "SegmentationClass")
    return classes, _table(range(len(classes))), train, pairs("val", "SegmentationClass")


def _cityscapes(root: Path) -> _Found:
    def pairs(name: str) -> _Pairs:
        images = sorted((root / "leftImg8bit" / name).glob("*/*_leftImg8bit.png"))
        masks = [
            root / "gtFine" / name / path.parent.name / path.name.replace("_leftImg8bit", "_gtFine_labelIds")
            for path in images
        ]
        return list(zip(map(str, images), map(str, masks), strict=True))

    trained = {entry.train_id: entry.name for entry in Cityscapes.classes if 0 <= entry.train_id < IGNORED}
    ids = [entry for entry in Cityscapes.classes if entry.id >= 0]
    numbers = [entry.train_id if entry.train_id in trained else IGNORED for entry in ids]
    return tuple(trained[i] for i in sorted(trained)), _table(numbers), pairs("train"), pairs("val")


def _folders(root: Path) -> _Found:
    def pairs(name: str) -> _Pairs:
        images, masks = root / "images" / name, root / "masks" / name
        paths = find_images([images]).paths
        return [(path, str((masks / Path(path).relative_to(images)).with_suffix(".png"))) for path in paths]

    train, test = pairs("train"), pairs("val")
    file = root / "classes.txt"
    if file.is_file():
        classes = tuple(line.strip() for line in file.read_text().splitlines() if line.strip())
    else:
        classes = tuple(map(str, range(1 + max(_largest(path) for _, path in train + test))))
    if not 2 <= len(classes) <= IGNORED or len(set(classes)) < len(classes):
        raise ValueError(
            f"data: expected 2 to {IGNORED} different classes in {file if file.is_file() else root / 'masks'}, got "
            f"{few(classes)}; pixels of {IGNORED} are ignored, so a mask of one object has 0 and 1"
        )
    return classes, _table(range(len(classes))), train, test


def _largest(path: str) -> int:
    numbers = read_mask(path)
    return int(numbers[numbers != IGNORED].max(initial=0))


def _table(classes: Iterable[int]) -> np.ndarray:
    table = np.full(IGNORED + 1, -1, np.int16)
    table[IGNORED] = IGNORED
    for number, label in enumerate(classes):
        table[number] = label
    return table
