"""Datasets: small ones in memory as uint8 tensors, image folders on disk."""

from __future__ import annotations

import dataclasses
import gzip
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

from ..distributed import unite
from .files import ImageFiles, Paths, few, find_images, images_below, scan
from .images import UnreadableImageError, open_regular, read_image
from .seeds import hash_seeds
from .shards import ShardSplit, find_shards, open_shards
from .urls import is_url, split_sources
from .workers import leave_signals_to_parent, sigterm_held

BUILT_IN = ("digits", "fashion-mnist", "cifar10", "cifar100")
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist

_FASHION_CLASSES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class TensorSplit:
    """Images in memory: ``images`` uint8 [N, C, H, W], ``labels`` int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> TensorSplit:
        """The images at the positions ``rows``, int64 [M]."""
        return TensorSplit(self.images[rows], self.labels[rows])


@dataclasses.dataclass(frozen=True)
class FolderSplit:
    """Images on disk: ``paths`` of the N files, ``labels`` int64 [N], -1 where there are no classes."""

    paths: Sequence[str]
    labels: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.paths, Paths):
            object.__setattr__(self, "paths", Paths(self.paths))

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, position: int) -> str:
        """The path of an image."""
        return self.paths[position]

    def checksum(self) -> int:
        """Of the file names in their order, or of 100,000 among more; not of the folders, which may move."""
        rows = range(0, len(self), len(self) // 100_000 + 1)
        return zlib.crc32("\0".join(os.path.basename(self.paths[row]) for row in rows).encode(errors="surrogateescape"))

    def open(self, position: int) -> BinaryIO:
        """The encoded image."""
        return open_regular(self.paths[position])

    def read(self, position: int) -> Tensor:
        """Decode an image: uint8 [3, H, W]. Raises an :class:`UnreadableImageError` if it cannot be."""
        return read_image(self.paths[position])

    def take(self, rows: Tensor) -> FolderSplit:
        """The images at the positions ``rows``, int64 [M]."""
        assert isinstance(self.paths, Paths)
        return FolderSplit(self.paths.take(rows), self.labels[rows])


FileSplit = FolderSplit | ShardSplit  # decoded when they are read
Split = TensorSplit | FileSplit


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A dataset for training and evaluation.

    Attributes:
        name: a built-in name, or the path of a folder, list or shards.
        classes: class names; a label is an index into them. Empty without classes.
        size: side of the square images the encoder takes, in pixels.
        mean: per channel, of pixel values in [0, 1]; one or three entries.
        std: standard deviation per channel, likewise.
        flip: whether a mirrored image keeps its meaning (a digit does not).
        train: training images.
        test: test images, or None.
        unreadable: paths of the files that could not be decoded so far; copies by ``dataclasses.replace`` share it.
    """

    name: str
    classes: tuple[str, ...]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    train: Split
    test: Split | None
    unreadable: set[str] = dataclasses.field(default_factory=set, compare=False, repr=False)
    _unsent: set[str] = dataclasses.field(default_factory=set, compare=False, repr=False)  # of them, to other ranks

    @property
    def why_not_scored(self) -> str:
        """Why accuracy cannot be measured on this data; empty if it can."""
        if self.test is None:
            return f"{self.name} has no val/ folder and val_fraction is 0"
        return "" if self.classes else f"{self.name} has no labels"

    @property
    def splits(self) -> tuple[Split, Split]:
        """(train, test), for evaluation; raises ValueError without a test split or without labels."""
        if self.why_not_scored:
            raise ValueError(f"data: expected labeled training and test images, but {self.why_not_scored}")
        assert self.test is not None
        return self.train, self.test

    def skip(self, unreadable: Mapping[str, str]) -> None:
        """Note files that could not be decoded, and why, by path; the first causes a warning."""
        if unreadable and not self.unreadable:
            reason = next(iter(unreadable.values()))
            warnings.warn(f"{reason}; it is skipped (further ones are counted, not named)", stacklevel=3)
        self._unsent.update(unreadable.keys() - self.unreadable)
        self.unreadable.update(unreadable)

    def unite_unreadable(self) -> set[str]:
        """``unreadable``, with the files that the other ranks could not decode. Every rank must call it."""
        self.unreadable.update(unite(self._unsent))
        self._unsent.clear()
        return self.unreadable


def seen_from_here(data: str, directory: str | None) -> str:
    """``data`` of a run that was started in ``directory``: a folder of that name here may hold other images.

    Unchanged if that is the working directory, unknown, or gone, as for a run that was copied to another machine.
    """
    if directory is None or not os.path.isdir(directory) or os.path.samefile(directory, os.curdir):
        return data
    sources = [data] if os.path.exists(os.path.join(directory, data)) else split_sources(data)
    return os.pathsep.join(
        source if source in BUILT_IN or is_url(source) else os.path.join(directory, source) for source in sources
    )


def load(
    name: str | Path, data_root: str | Path = "data", *, val_fraction: float = 0.0, image_size: int | None = None
) -> ImageData:
    """Load a built-in dataset by name, or images by path.

    Args:
        name: ``"digits"`` (1,797 images of 8x8, included in scikit-learn), ``"fashion-mnist"``, ``"cifar10"``,
            ``"cifar100"``, or a path: a folder of images at any depth; a list of them (``.txt`` with a path per line;
            ``.csv``, ``.tsv`` or ``.parquet`` with a column ``path`` and perhaps ``label``); or shards, tar or Parquet
            files in a folder or named by a pattern such as ``shards-{000..999}.tar``, or a folder that
            ``litdata.optimize`` has written, on disk or at a URL. Several paths are separated by ``os.pathsep``.
            Training and test images may be in ``train/`` and ``val/``, ``valid/`` or ``validation/``. Folders are
            classes, as for torchvision's ``ImageFolder``, if all images are in two or more of them.
        data_root: torchvision's download folder.
        val_fraction: share of the images, of each class if there are classes, to hold out as test images; not used if
            the data has test images.
        image_size: side of the images that the encoder takes, in pixels; by default 224, or that of the built-in set.

    Raises:
        ValueError: an unknown name, no images, or a list or a shard that cannot be read.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: expected a number of pixels of at least 1, got {image_size}")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction: expected a share of the images in [0, 1), got {val_fraction}")
    data = _load(str(name), Path(data_root), val_fraction)
    return data if image_size is None else dataclasses.replace(data, size=image_size)


def _load(name: str, data_root: Path, val_fraction: float) -> ImageData:
    match name:
        case "digits":
            return _digits()
        case "fashion-mnist":
            return _fashion_mnist(data_root)
        case "cifar10" | "cifar100":
            return _cifar(name, data_root)
    parts = split_sources(name)
    found = [find_shards(part) for part in parts]
    if found and all(found):
        return _shards(name, [shards for shards in found if shards], val_fraction)
    sources = [Path(part) for part in parts]
    absent = [part for part, shards in zip(parts, found, strict=True) if not (shards or os.path.exists(part))]
    if absent or not parts:
        raise ValueError(
            f"data: expected one of {', '.join(BUILT_IN)}, or a folder, list or shards of images, got "
            f"{os.pathsep.join(absent or [name])!r}"
        )
    if any(found):
        raise ValueError(f"data: expected only shards, or only folders and lists, got {name!r}")
    return _files(name, sources, val_fraction)


class Normalization(Protocol):
    """Per-channel constants: an :class:`ImageData` or a transform."""

    @property
    def mean(self) -> tuple[float, ...]: ...

    @property
    def std(self) -> tuple[float, ...]: ...


class Normalize:
    """Normalize images with the dataset's mean and standard deviation, and repeat grayscale to three channels.

    Takes uint8 images, or floating-point ones in [0, 1], [N, C, H, W]; returns float32 [N, 3, H, W]. The constants are
    kept on ``device``: creating them at every call would make a GPU wait.
    """

    def __init__(self, data: Normalization, device: torch.device | str = "cpu") -> None:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (data.mean, data.std))
        self.shift, self.scale = (-mean / std).to(device), (1 / std).to(device)
        self.byte_scale = self.scale / 255

    def __call__(self, images: Tensor) -> Tensor:
        scale = self.byte_scale if images.dtype == torch.uint8 else self.scale
        values = images.float()
        # In place, unless these are the caller's, or one channel becomes three.
        own = None if values is images or len(scale[0]) > images.shape[1] else values
        return torch.addcmul(self.shift, values, scale, out=own).expand(-1, 3, -1, -1)


def eval_batches(
    data: ImageData, split: Split, batch_size: int = 512, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over a split in order, without augmentation: resized and center-cropped to ``data.size``.

    Files that cannot be decoded are left out and added to ``data.unreadable``.

    Yields:
        Normalized images float32 [B, 3, size, size] and their positions in the split, int64 [B], B at least 1.
    """
    normalize = Normalize(data)
    if isinstance(split, TensorSplit):
        for index in torch.arange(len(split)).split(batch_size) if len(split) else ():
            yield _resized(normalize(split.images[index]), data.size), index
        return
    batches = BatchSampler(SequentialSampler(range(len(split))), batch_size, drop_last=False)
    dataset, start = _EvalImages(split, data.size), leave_signals_to_parent
    with sigterm_held():
        loader = iter(DataLoader(dataset, None, sampler=batches, num_workers=workers, worker_init_fn=start))
    for images, index, unreadable in loader:
        data.skip(unreadable)
        if len(index):
            yield normalize(images), index


def _resized(images: Tensor, size: int) -> Tensor:
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)


class _EvalImages(Dataset):
    """Resized center crops of image files, a batch at a time.

    An item is uint8 [B, 3, size, size], the positions [B] of these images, and why the others are unreadable, by path.
    """

    def __init__(self, split: FileSplit, size: int) -> None:
        self.split, self.size = split, size

    def __getitem__(self, index: list[int]) -> tuple[Tensor, Tensor, dict[str, str]]:
        images = torch.empty(len(index), 3, self.size, self.size, dtype=torch.uint8)
        read: list[int] = []
        unreadable: dict[str, str] = {}
        for position in index:
            try:
                images[len(read)] = eval_crop(self.split.read(position), self.size)
                read.append(position)
            except UnreadableImageError as error:
                unreadable[self.split.name(position)] = str(error)
        return images[: len(read)], torch.tensor(read, dtype=torch.int64), unreadable


def eval_crop(image: Tensor, size: int) -> Tensor:
    """The center of an image [..., H, W]: resized to a shorter side of ``size`` * 256 / 224, cropped to ``size``."""
    from torchvision.transforms.v2 import functional

    height, width = image.shape[-2:]
    image = functional.center_crop(image, [min(height, 16 * width), min(width, 16 * height)])  # bounds the next
    image = functional.resize(image, [round(size * 256 / 224)], antialias=True)
    return functional.center_crop(image, [size, size])


def stratified_split(labels: Tensor, test_fraction: float, seed: int = 0, at_least: int = 0) -> tuple[Tensor, Tensor]:
    """Split each class's images at random: ``round(test_fraction * n)`` of its n are test images.

    Args:
        labels: int64 [N].
        at_least: test images of a class, at least.

    Returns:
        Sorted indices of the training images and of the test images.
    """
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    counts = labels.unique(return_counts=True)[1].tolist()
    for members in labels.argsort(stable=True).split(counts):  # one pass, also of thousands of classes
        chosen = torch.randperm(len(members), generator=generator)
        held_out[members[chosen[: max(at_least, round(test_fraction * len(members)))]]] = True
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def labeled_subset(labels: Tensor, *, fraction: float = 1.0, per_class: int | None = None, seed: int = 0) -> Tensor:
    """Draw images of each class at random: ``per_class`` of them, or a share, at least one.

    At the same seed, a larger subset contains a smaller one.

    Args:
        labels: int64 [N].

    Returns:
        Sorted indices.

    Raises:
        ValueError: both a share and a number are given, or a class has fewer images.
    """
    if per_class is None:
        return stratified_split(labels, fraction, int(hash_seeds(seed)), at_least=1)[1]
    if fraction < 1:
        raise ValueError(f"labels_per_class: expected no fraction with it, got {per_class} and fraction {fraction:g}")
    least = int(labels.unique(return_counts=True)[1].min())
    if not 1 <= per_class <= least:
        raise ValueError(f"labels_per_class: expected 1 to {least}, the images of the smallest class, got {per_class}")
    return stratified_split(labels, 0.0, int(hash_seeds(seed)), at_least=per_class)[1]


def _in_memory(name: str, classes, train: TensorSplit, test: TensorSplit, *, flip: bool) -> ImageData:
    pixels = train.images.float().div_(255)
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    size = train.images.shape[-1]
    return ImageData(name, tuple(classes), size, tuple(mean.tolist()), tuple(std.tolist()), flip, train, test)


def _digits() -> ImageData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images / 16 * 255).round().to(torch.uint8)[:, None]  # values 0..16
    labels = torch.from_numpy(digits.target).long()
    train, test = stratified_split(labels, 0.3)
    splits = (TensorSplit(images[part], labels[part]) for part in (train, test))
    return _in_memory("digits", [str(d) for d in digits.target_names], *splits, flip=False)


def _fashion_mnist(data_root: Path) -> ImageData:
    folder = DEBIAN_FASHION_MNIST
    if folder.is_dir():
        splits = (
            TensorSplit(
                _read_idx(folder / f"{part}-images-idx3-ubyte.gz")[:, None],
                _read_idx(folder / f"{part}-labels-idx1-ubyte.gz").long(),
            )
            for part in ("train", "t10k")
        )
    else:
        from torchvision.datasets import FashionMNIST

        downloaded = (FashionMNIST(data_root, train=train, download=True) for train in (True, False))
        splits = (TensorSplit(part.data[:, None], part.targets.long()) for part in downloaded)
    return _in_memory("fashion-mnist", _FASHION_CLASSES.split(","), *splits, flip=True)


def _read_idx(path: Path) -> Tensor:
    """Read a gzip-compressed IDX file of unsigned bytes, the format of MNIST.

    Layout: 00 00 08, the number of dimensions, each dimension as a big-endian uint32, then the values.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
        if raw[:3] != b"\0\0\x08":
            raise ValueError(f"a header of {raw[:3].hex(' ') or 'no bytes'}, not 00 00 08")
        shape = np.frombuffer(raw, ">u4", raw[3], offset=4)
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + shape.nbytes).reshape(shape).copy())
    except (ValueError, IndexError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"data: expected a gzip-compressed IDX file of bytes in {path}, got {error}") from None


def _cifar(name: str, data_root: Path) -> ImageData:
    from torchvision import datasets

    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    parts = [source(data_root, train=train, download=True) for train in (True, False)]
    splits = (
        TensorSplit(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    )
    return _in_memory(name, parts[0].classes, *splits, flip=True)


def _files(name: str, sources: list[Path], val_fraction: float) -> ImageData:
    """Images on disk. The labels of training and test images are known only if both have classes."""
    root, val = _split_folders(sources[0]) if len(sources) == 1 else (None, None)
    train = find_images([root] if root else sources)
    test = find_images([val]) if val else None
    classes = train.names
    if test is not None and test.names and classes and classes != test.names:
        raise ValueError(
            f"data: expected the same class folders in {root} and {val}, got "
            f"{few(set(classes) ^ set(test.names))} in only one of them"
        )
    if len(classes) < 2 or (test is not None and not test.names):  # one class says nothing
        classes = ()
    held_out = None if test is None else _folder_split(test, classes)
    return _on_disk(name, classes, _folder_split(train, classes), held_out, val_fraction)


def _shards(name: str, found: list[tuple[list[str], list[str]]], val_fraction: float) -> ImageData:
    """Images in shards. Few test images may lack a class; one that the training images lack cannot be learned."""
    # Patterns may overlap, and images of a shard that is there twice would be in both splits.
    train, test = (list(dict.fromkeys(url for part in parts for url in part)) for parts in zip(*found, strict=True))
    opened = [open_shards(urls) for urls in (train, test) if urls]
    classes = opened[0].names
    unknown = {name for part in opened for name in part.names}.difference(classes)
    if classes and unknown:
        raise ValueError(f"data: expected test images of the classes {few(classes)} in {test[0]}, got {few(unknown)}")
    if len(classes) < 2 or not all(part.names for part in opened):
        classes = ()
    images, *held_out = (part.split(classes) for part in opened)
    return _on_disk(name, classes, images, held_out[0] if held_out else None, val_fraction)


def _on_disk(
    name: str, classes: tuple[str, ...], images: FileSplit, held_out: FileSplit | None, val_fraction: float
) -> ImageData:
    """Without test images, hold some out."""
    if held_out is None and val_fraction > 0:
        images, held_out = (images.take(rows) for rows in stratified_split(images.labels, val_fraction))
        if not len(held_out):
            raise ValueError(
                f"val_fraction: expected a share that holds out an image of {len(images):,}, got {val_fraction}"
            )
    return ImageData(name, classes, 224, IMAGENET_MEAN, IMAGENET_STD, True, images, held_out)


def _split_folders(source: Path) -> tuple[Path | None, Path | None]:
    """The folders of training and of test images in ``source``, if it has them; a class may be named train."""
    train = source / "train"
    if not train.is_dir():
        return None, None
    val = next((source / name for name in ("val", "valid", "validation") if (source / name).is_dir()), None)
    if val is None:
        loose, folders = scan(str(source))
        others = (source / name for name in folders if name not in ("train", "test"))
        train = source if loose or any(images_below(folder) for folder in others) else train
    return train, val


def _folder_split(files: ImageFiles, classes: tuple[str, ...]) -> FolderSplit:
    index = {name: label for label, name in enumerate(classes)}
    if not (classes and files.classes):
        return FolderSplit(files.paths, torch.tensor([-1]).expand(len(files.paths)))
    labels = np.fromiter((index[name] for name in files.classes), np.int64, len(files.classes))
    return FolderSplit(files.paths, torch.from_numpy(labels))
