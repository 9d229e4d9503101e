"""Find image files: in folders, with or without classes, or in a list."""

from __future__ import annotations

import codecs
import csv
import itertools
import os
import re
import sys
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

LISTS = (".txt", ".csv", ".tsv", ".parquet")
IMAGES = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
)
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "image")
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "class", "target")
_ROWS = 65536  # of a table at a time


class Paths(Sequence[str]):
    """Paths in one piece of memory, 12 bytes each and their text.

    Of a list, every loader process would get its own copy: reading a string counts a reference to it, in its memory.
    """

    def __init__(self, paths: Iterable[str] = ()) -> None:
        text, ends = bytearray(), array("q", [0])
        for path in paths:
            text += path.encode(errors="surrogatepass")  # a name may be any bytes
            ends.append(len(text))
        # Tensors, as torch shares their memory with workers that are not forked.
        edges = torch.from_numpy(np.frombuffer(ends, np.int64))
        self._text = torch.from_numpy(np.frombuffer(text, np.uint8))
        self._offsets, self._sizes = edges[:-1], edges.diff().int()

    def take(self, rows: Tensor) -> Paths:
        """The paths at the positions ``rows``, int64 [M], in the same memory."""
        taken = Paths()
        taken._text, taken._offsets, taken._sizes = self._text, self._offsets[rows], self._sizes[rows]
        return taken

    def __len__(self) -> int:
        return len(self._sizes)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        rows = range(len(self))[place]
        if isinstance(rows, range):
            return [self[row] for row in rows]
        return self._decoded(int(self._offsets[rows]), int(self._sizes[rows]))

    def __iter__(self) -> Iterator[str]:  # several times as fast as one after the other
        return map(self._decoded, self._offsets.numpy(), self._sizes.numpy())

    def _decoded(self, offset: int, size: int) -> str:
        return self._text.numpy()[offset : offset + size].tobytes().decode(errors="surrogatepass")

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented


class ImageFiles(NamedTuple):
    """Paths of image files, and the class of each; ``classes`` is None if they have none."""

    paths: Paths
    classes: list[str] | None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.classes or ())))


def find_images(sources: Sequence[Path]) -> ImageFiles:
    """The images of folders and lists, in the given order; without classes if one of them has none.

    A path that is there twice is one image: its second copy would be among its negatives, or in both splits.

    Raises:
        ValueError: a source does not exist, holds no image, or is a list that cannot be read; an image has two classes;
            or a class has two names, such as 1, 01 and 1.0, which are text in a list.
    """
    found = [_of_folder(source) if source.is_dir() else _of_list(source) for source in sources]
    if len(sources) == 1 and sources[0].is_dir():
        return found[0]
    labeled = all(files.classes is not None for files in found)
    paths = found[0].paths if len(found) == 1 else Paths(itertools.chain.from_iterable(files.paths for files in found))
    classes = [name for files in found for name in files.classes or ()] if labeled else None
    kept = np.ones(len(paths), bool)
    class_of: dict[str, str] = {}
    for row in _repeated(paths):
        same, name = os.path.abspath(paths[row]), classes[row] if classes else ""
        kept[row] = same not in class_of
        if class_of.setdefault(same, name) != name:
            raise ValueError(f"data: expected one class for {paths[row]}, got {class_of[same]} and {name}")
    spelling: dict[str, str] = {}
    for name in sorted(set(classes or ())):
        number = re.fullmatch(r"0*(\d+)(\.0*)?", name.strip())
        first = spelling.setdefault(number[1] if number else name.strip(), name)
        if first != name:
            raise ValueError(f"data: expected one name for each class, got {first!r} and {name!r}")
    if not kept.all():
        paths = paths.take(torch.from_numpy(np.flatnonzero(kept)))
        classes = classes and list(itertools.compress(classes, kept))
    return ImageFiles(paths, classes)


def _repeated(paths: Paths) -> list[int]:
    """The positions of paths that are there twice, such as ./x.jpg, x.jpg and its absolute path; and perhaps, where
    hashes meet, of a few others. A dictionary of all paths would take several times their memory."""
    hashes = np.fromiter((hash(os.path.abspath(path)) for path in paths), np.int64, len(paths))
    ordered = np.sort(hashes)
    return np.flatnonzero(np.isin(hashes, ordered[1:][ordered[1:] == ordered[:-1]])).tolist()


def _of_folder(root: Path) -> ImageFiles:
    """In the order of torchvision's ``ImageFolder``. Classes are the folders in ``root``, if all images are in them."""
    loose, folders = scan(str(root))
    classes: list[str] = []

    def found() -> Iterator[str]:
        yield from (os.path.join(root, name) for name in loose)
        for folder in sorted(folders):
            below = images_below(Path(root, folder))
            classes.extend([folder] * len(below))
            yield from below

    paths = Paths(found())
    if not paths:
        raise ValueError(f"data: expected images in {root}, got none")
    return ImageFiles(paths, None if loose else classes)


def images_below(folder: Path) -> list[str]:
    """Image files below ``folder``, by folder and name; links are followed, to each folder once.

    ``ImageFolder`` follows a link to a folder around it until the system refuses, and lists its images each time.
    """
    files: dict[str, list[str]] = {}
    seen = {path for start in (folder.parent.resolve(), folder.resolve()) for path in (start, *start.parents)}
    pending = [str(folder)]
    while pending:
        current = pending.pop()
        names, folders = scan(current)
        prefix = os.path.join(current, "")
        files[current] = [prefix + name for name in names]
        for path in (os.path.join(current, name) for name in folders):
            real = Path(path).resolve()
            if real not in seen:
                seen.add(real)
                pending.append(path)
    return [path for _, paths in sorted(files.items()) for path in paths]


def scan(folder: str) -> tuple[list[str], list[str]]:
    """Sorted names of the image files in a folder, and of its folders, without hidden ones.

    Hidden are ``.ipynb_checkpoints``, and the ``._name.jpg`` of macOS, which are no images; and ``@eaDir``, in which a
    Synology NAS keeps thumbnails. ``ImageFolder`` lists FIFOs and devices too. A dangling link is listed: it counts as
    an unreadable image, not as none.
    """
    images, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "@eaDir":
                continue
            if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
                folders.append(entry.name)
            elif entry.name.lower().endswith(IMAGES) and (entry.is_symlink() or entry.is_file()):
                images.append(entry.name)
    return sorted(images), sorted(folders)


def _of_list(path: Path) -> ImageFiles:
    """A text file with a path per line, or a table with a column of paths and perhaps one of classes.

    Relative paths are relative to the list. A path may be a folder: its images take its place.
    """
    if not path.is_file() or path.suffix.lower() not in LISTS:
        raise ValueError(f"data: expected a folder of images or a list ({', '.join(LISTS)}), got {path}")
    classes: list[str] = []

    def found() -> Iterator[str]:
        folder = "" if path.parent == Path() else str(path.parent)
        for number, (row, name) in enumerate(_read_list(path), 1):
            if not row or not isinstance(row, str) or name == "":
                what = "a path" if name is None else "a path and a class"
                raise ValueError(f"data: expected {what} in row {number} of {path}")
            item = os.path.join(folder, row)
            # Of 10^6 files on a network disk, to ask if each is a folder would take minutes.
            is_folder = not row.lower().endswith(IMAGES) and os.path.isdir(item)
            items: Sequence[str] = find_images([Path(item)]).paths if is_folder else (item,)
            classes.extend([] if name is None else [name] * len(items))
            yield from items

    try:
        paths = Paths(found())
    except csv.Error as error:
        raise ValueError(f"data: expected a list of image files in {path}, got {error}") from None
    if not paths:
        raise ValueError(f"data: expected image files in {path}, got none")
    return ImageFiles(paths, classes or None)


def _read_list(path: Path) -> Iterator[tuple[str, str | None]]:
    """The paths in a list; with the class of each, perhaps empty, if it has them."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise ValueError(f"data: reading {path} needs pyarrow: pip install pyarrow") from None
        names = parquet.read_schema(path).names
        place, label = _columns(path, names)
        columns = [names[place]] if label is None else [names[place], names[label]]
        table = parquet.read_table(path, columns=columns).select(columns)
        if label is not None:
            table = table.set_column(1, names[label], whole_numbers(table[names[label]]))
        for batch in table.to_batches(_ROWS):
            paths, *labels = (column.to_pylist() for column in batch.columns)
            texts = (sys.intern("" if value is None else str(value).strip()) for value in itertools.chain(*labels))
            yield from zip(paths, texts if labels else itertools.repeat(None))  # noqa: B905
        return
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError(f"data: expected a list in UTF-8, got UTF-16 in {path}")
    # A name may be any bytes; a line of a text file ends at a line feed only.
    with path.open(newline="\n" if suffix == ".txt" else "", encoding="utf-8-sig", errors="surrogateescape") as file:
        if suffix == ".txt":
            yield from ((line.rstrip("\r\n"), None) for line in file if line.strip())
            return
        delimiter = "\t" if suffix == ".tsv" else ","
        header = next(csv.reader(file, delimiter=delimiter), [])
        place, label = _columns(path, [name.strip() for name in header])
        spaced = any(name.startswith(" ") for name in header)  # "path, label"; else a name may begin with a space
        rows = csv.reader(file, delimiter=delimiter, skipinitialspace=spaced)
        for row in filter(None, rows):
            name = None if label is None else "" if label >= len(row) else sys.intern(row[label].strip())
            yield row[place] if place < len(row) else "", name


def whole_numbers(column: Any) -> Any:
    """A column of Arrow; pandas' integers with gaps, which are floats and NaN, as integers and nulls."""
    import pyarrow as pa
    import pyarrow.compute as compute

    if not pa.types.is_floating(column.type):
        return column
    column = compute.if_else(compute.is_nan(column), pa.scalar(None, column.type), column)
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid:  # a fraction
        return column


def _columns(path: Path, names: Sequence[str]) -> tuple[int, int | None]:
    """Numbers of the column of paths and, if there is one, the column of classes."""
    lower = [name.lower() for name in names]
    place = next((number for number, name in enumerate(lower) if name in _PATH_COLUMNS), None)
    if place is None:
        raise ValueError(
            f"data: expected a column of paths in {path}, named {' or '.join(_PATH_COLUMNS)}, got {few(names)}"
        )
    return place, next((number for number, name in enumerate(lower) if name in LABEL_COLUMNS), None)


def few(names: Collection[str]) -> str:
    """The first of many names, for a message."""
    return ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
