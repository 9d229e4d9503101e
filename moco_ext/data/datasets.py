"""Data sets as records: small sets whole in memory as uint8 tensors, image folders from disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

from .idx import read_idx
from .images import UnreadableImageError, read_image
from .workers import leave_signals_to_parent

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder

BUILT_IN = ("digits", "fashion-mnist", "cifar10", "cifar100")
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist

_FASHION_CLASSES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class TensorSplit:
    """Images of a small set, in memory: ``images`` uint8 [N, C, H, W], ``labels`` int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class FolderSplit:
    """Images on disk, ``root/CLASS/image``: ``dataset`` is a torchvision ``ImageFolder`` without transform."""

    dataset: ImageFolder
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


Split = TensorSplit | FolderSplit


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A data set: what training and evaluation need to know about it.

    ``size`` is the side in pixels of the square the encoder sees; ``mean`` and ``std`` are per channel, of
    values in [0, 1], one or three entries; ``flip`` says whether a mirrored image keeps its meaning (digits
    do not). ``test`` is None where an image folder has no ``val/``: then there is nothing to evaluate on.
    """

    name: str
    classes: tuple[str, ...]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    train: Split
    test: Split | None

    @property
    def splits(self) -> tuple[Split, Split]:
        """(train, test), for evaluation; a ValueError where there is no test split."""
        if self.test is None:
            raise ValueError(f"data: expected train/ and val/ in {self.name} to evaluate on, got no val/")
        return self.train, self.test


def load(name: str, data_root: str | Path = "data") -> ImageData:
    """A data set by name, or an image folder by its path.

    Args:
        name: ``"digits"`` (1,797 images of 8x8, shipped with scikit-learn), ``"fashion-mnist"``, ``"cifar10"``,
            ``"cifar100"``, or the path of an image folder in torchvision's ``ImageFolder`` layout, with
            ``train/`` and ``val/`` inside or class folders directly.
        data_root: where torchvision downloads go and are looked for.

    Raises:
        ValueError: neither a known name nor a folder with images in class folders.
    """
    match name:
        case "digits":
            return _digits()
        case "fashion-mnist":
            return _fashion_mnist(Path(data_root))
        case "cifar10" | "cifar100":
            return _cifar(name, Path(data_root))
    if not Path(name).is_dir():
        raise ValueError(f"data: expected one of {', '.join(BUILT_IN)} or an image folder, got {name!r}")
    return _folder(Path(name))


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Images in [0, 1], [N, C, H, W], standardised per channel; grey ones are repeated to three channels."""
    shape = (1, -1, 1, 1)
    images = (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)
    return images.expand(-1, 3, -1, -1)


def plain_batches(
    data: ImageData, split: Split, batch_size: int = 512, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images of ``split`` in order, without augmentation: float32 [B, 3, size, size] and labels int64 [B]."""
    if isinstance(split, TensorSplit):
        for images, labels in zip(split.images.split(batch_size), split.labels.split(batch_size), strict=True):
            yield normalize(images.float() / 255, data.mean, data.std), labels
        return
    loader = DataLoader(
        _PlainImages(split, data.size),
        batch_sampler=BatchSampler(SequentialSampler(split.labels), batch_size, drop_last=False),
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=leave_signals_to_parent,
    )
    for batch in loader:
        if isinstance(batch, ValueError):
            raise batch
        images, labels = batch
        yield normalize(images / 255, data.mean, data.std), labels


class _PlainImages(Dataset):
    """Centre crops of image files, a batch at a time: uint8 [B, 3, size, size] and labels [B]; or an error to raise."""

    def __init__(self, split: FolderSplit, size: int) -> None:
        self.split, self.size = split, size

    def __getitems__(self, index: list[int]) -> tuple[Tensor, Tensor] | ValueError:
        try:
            return torch.stack([self._image(position) for position in index]), self.split.labels[index]
        except UnreadableImageError as error:  # another in its place would change what is measured
            return ValueError(f"data: {error}")

    def _image(self, position: int) -> Tensor:
        from torchvision.transforms.v2 import functional

        image = read_image(self.split.dataset.samples[position][0])
        image = functional.resize(image, [round(self.size * 256 / 224)], antialias=True)
        return functional.center_crop(image, [self.size, self.size])


def _as_it_is(batch: Any) -> Any:
    return batch


def stratified_split(labels: Tensor, test_fraction: float, seed: int = 0, at_least: int = 0) -> tuple[Tensor, Tensor]:
    """Indices (train, test), sorted: of every class of n images ``round(test_fraction * n)`` are test images.

    But not fewer than ``at_least`` of a class.
    """
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        chosen = torch.randperm(len(members), generator=generator)
        held_out[members[chosen[: max(at_least, round(test_fraction * len(members)))]]] = True
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


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
    if DEBIAN_FASHION_MNIST.is_dir():
        files = {
            part: [DEBIAN_FASHION_MNIST / f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
            for part in ("train", "t10k")
        }
        splits = (TensorSplit(read_idx(images)[:, None], read_idx(labels).long()) for images, labels in files.values())
    else:
        from torchvision.datasets import FashionMNIST

        downloaded = (FashionMNIST(data_root, train=train, download=True) for train in (True, False))
        splits = (TensorSplit(part.data[:, None], part.targets.long()) for part in downloaded)
    return _in_memory("fashion-mnist", _FASHION_CLASSES.split(","), *splits, flip=True)


def _cifar(name: str, data_root: Path) -> ImageData:
    from torchvision import datasets

    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    parts = [source(data_root, train=train, download=True) for train in (True, False)]
    splits = (
        TensorSplit(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    )
    return _in_memory(name, parts[0].classes, *splits, flip=True)


def _folder(root: Path) -> ImageData:
    from torchvision.datasets import ImageFolder

    def split(folder: Path) -> FolderSplit:
        try:
            dataset = ImageFolder(folder)
        except FileNotFoundError as error:
            raise ValueError(f"data: expected images in class folders, {folder}/CLASS/IMAGE; {error}") from None
        return FolderSplit(dataset, torch.tensor(dataset.targets))

    train = split(root / "train" if (root / "train").is_dir() else root)
    test = split(root / "val") if (root / "train").is_dir() and (root / "val").is_dir() else None
    if test is not None and test.dataset.classes != train.dataset.classes:
        raise ValueError(f"data: expected the same class folders in {root}/train and {root}/val")
    classes = tuple(train.dataset.classes)
    return ImageData(str(root), classes, 224, _IMAGENET_MEAN, _IMAGENET_STD, True, train, test)
