"""From images on disk to tar shards: :func:`write_shards`."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from ..runs.files import read_json, remove_temporaries, write_atomically, write_json
from .datasets import FileSplit, FolderSplit, ImageData, TensorSplit
from .files import IMAGES
from .seeds import hash_seeds
from .shards import MANIFEST
from .tar_shards import index_of


class WrittenShards(NamedTuple):
    """The result of :func:`write_shards`: images, shards (also those of an interrupted call), and what is not in them.

    Attributes:
        missing: paths of files that are gone; their images are empty, and count as unreadable when they are read.
    """

    images: int
    shards: int
    missing: list[str]


def write_shards(
    data: ImageData,
    output: str | Path,
    *,
    images_per_shard: int = 10_000,
    shuffle: int | None = None,
    advance: Callable[[int], object] = lambda images: None,
) -> WrittenShards:
    """Write the images of folders, lists or other shards to ``output/shard-000000.tar`` and so on, in their order.

    The files are copied as they are. With classes each image has a ``.cls`` member, the number of its class, for
    WebDataset too; their names are in ``shards.json``. Test images are written to ``output/val``, next to
    ``output/train``. Each shard appears under its name when it is complete, with its index. A repeated call writes
    the shards that are missing; the bytes depend only on the images and the arguments.

    Args:
        shuffle: seed of a random order; None keeps the order.
        advance: called with the number of images that have been written.

    Raises:
        ValueError: an argument out of range, images in memory, an output with shards of other images, or an image that
            exists but cannot be read.
        OSError: a shard cannot be written.
    """
    return ShardWriter(data, output, images_per_shard=images_per_shard, shuffle=shuffle).write(advance)


class ShardWriter:
    """What :func:`write_shards` will write. The constructor checks everything and writes nothing."""

    def __init__(
        self, data: ImageData, output: str | Path, *, images_per_shard: int = 10_000, shuffle: int | None = None
    ) -> None:
        if images_per_shard < 1:
            raise ValueError(f"images_per_shard: expected at least 1, got {images_per_shard}")
        root, parts = Path(output), [data.train, data.test]
        folders = [root] if data.test is None else [root / "train", root / "val"]
        self.images_per_shard, self.labeled = images_per_shard, bool(data.classes)
        self.parts: list[tuple[Path, FileSplit, dict[str, object]]] = []
        for folder, split in zip(folders, parts, strict=False):
            if split is None or isinstance(split, TensorSplit):
                raise ValueError(f"data: expected a folder, a list or shards of images, got {data.name}, in memory")
            if shuffle is not None:
                generator = torch.Generator().manual_seed(int(hash_seeds(shuffle)))
                split = split.take(torch.randperm(len(split), generator=generator))
            manifest = _manifest(split, data.classes, images_per_shard)
            _check_same(folder, manifest)
            self.parts.append((folder, split, manifest))
        others = [path for path in (*root.glob("*.tar"), *root.glob("*/*.tar")) if path.parent not in folders]
        if others:  # which would be read instead of these, or not at all
            raise ValueError(f"output: expected no other shards in {root}, got {others[0]}")

    def write(self, advance: Callable[[int], object] = lambda images: None) -> WrittenShards:
        images = shards = 0
        missing: list[str] = []
        for folder, split, manifest in self.parts:
            folder.mkdir(parents=True, exist_ok=True)
            remove_temporaries(folder, "shard-*.tar", MANIFEST)
            write_json(folder / MANIFEST, manifest)
            for number, start in enumerate(range(0, len(split), self.images_per_shard)):
                path = folder / f"shard-{number:06}.tar"
                positions = range(start, min(start + self.images_per_shard, len(split)))
                if path.exists():
                    advance(len(positions))
                else:
                    shard = _Shard(split, positions, self.labeled, missing, advance)
                    write_atomically(path, shard.write)
                index_of(str(path))
                shards += 1
            images += len(split)
        return WrittenShards(images, shards, missing)


class _Shard(NamedTuple):
    split: FileSplit
    positions: range
    labeled: bool
    missing: list[str]
    advance: Callable[[int], object]

    def write(self, file: BinaryIO) -> None:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for position in self.positions:
                name, content = self.split.name(position), self._content(position)
                stem, suffix = os.path.splitext(os.path.basename(name))
                if suffix.lower() not in IMAGES:
                    stem, suffix = os.path.basename(name), _suffix_of(content)
                key = f"{position:09}-{stem.replace('.', '_')}"  # unique, as WebDataset needs it
                _add(tar, key + suffix.lower(), content)
                if self.labeled:
                    _add(tar, f"{key}.cls", b"%d" % int(self.split.labels[position]))
                self.advance(1)

    def _content(self, position: int) -> bytes:
        try:
            with self.split.open(position) as file:
                return file.read()
        except (FileNotFoundError, ValueError):  # a dangling link, not a regular file, a row without bytes
            self.missing.append(self.split.name(position))
            return b""
        except OSError as error:  # write_atomically would blame the shard
            raise ValueError(f"data: expected to read {self.split.name(position)}, got {error}") from None


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # with no time and no owner: the bytes depend on the images only
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _suffix_of(content: bytes) -> str:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            return f".{image.format.lower()}" if image.format else ".jpg"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ".jpg"  # a damaged image stays one: decoders go by the content


def _manifest(split: FileSplit, classes: tuple[str, ...], images_per_shard: int) -> dict[str, object]:
    names = split.paths if isinstance(split, FolderSplit) else split.shards.urls
    known = hashlib.sha256(split.labels.contiguous().numpy().tobytes())
    if not isinstance(split, FolderSplit) and split.rows is not None:
        known.update(split.rows.numpy().tobytes())
    for name in names:
        known.update(os.fsencode(os.path.basename(name)) + b"\0")
    return {
        "images": len(split),
        "images_per_shard": images_per_shard,
        "shards": -(-len(split) // images_per_shard),
        "classes": list(classes),
        "fingerprint": known.hexdigest(),
    }


def _check_same(folder: Path, manifest: dict[str, object]) -> None:
    found = read_json(folder / MANIFEST)
    changed = [name for name, value in manifest.items() if found.get(name) != value]
    if changed and (found or any(folder.glob("*.tar"))):
        raise ValueError(
            f"output: expected no shards, or those of an interrupted command, in {folder}, got shards with another "
            f"{changed[0]}; delete them or choose another folder"
        )
