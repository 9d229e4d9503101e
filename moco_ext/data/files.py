"""Find image files: in folders, with or without classes, or in a list."""

from __future__ import annotations

import csv
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

LISTS = (".txt", ".csv", ".tsv", ".parquet")
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "image")
_LABEL_COLUMNS = ("label", "class", "target")


class ImageFiles(NamedTuple):
    """Paths of image files, and the class of each; ``classes`` is None if they have none."""

    paths: list[str]
    classes: list[str] | None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.classes or ())))


def find_images(sources: Sequence[Path]) -> ImageFiles:
    """The images of folders and lists, in the given order; without classes if one of them has none.

    Raises:
        ValueError: a source does not exist, holds no image, or is a list that cannot be read.
    """
    found = [_of_list(source) if source.suffix.lower() in LISTS else _of_folder(source) for source in sources]
    paths = [path for files in found for path in files.paths]
    if any(files.classes is None for files in found):
        return ImageFiles(paths, None)
    return ImageFiles(paths, [name for files in found for name in files.classes or ()])


def _of_folder(root: Path) -> ImageFiles:
    """In the order of torchvision's ``ImageFolder``. Classes are the folders in ``root``, if all images are in two or
    more of them."""
    if not root.is_dir():
        raise ValueError(f"data: expected a folder of images, got {root}, which is none")
    depth = len(root.parts)
    found = [(Path(folder).parts[depth : depth + 1], folder, names) for folder, names in _walk(root).items() if names]
    if not found:
        raise ValueError(f"data: expected images in {root}, got none")
    found.sort()
    paths = [os.path.join(folder, name) for _, folder, names in found for name in names]
    if all(top for top, *_ in found) and len({top for top, *_ in found}) > 1:
        return ImageFiles(paths, [top[0] for top, _, names in found for _ in names])
    return ImageFiles(paths, None)


def _walk(root: Path) -> dict[str, list[str]]:
    """Sorted names of the image files in each folder below ``root``; links are followed, to each folder once.

    ``ImageFolder`` follows a link to a folder around it until the system refuses, and lists its images each time. It
    lists FIFOs and devices too. A dangling link is listed: it counts as an unreadable image, not as none.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    files: dict[str, list[str]] = {}
    seen = {root.resolve(), *root.resolve().parents}
    pending = [str(root)]
    while pending:
        current = pending.pop()
        files[current] = names = []
        for entry in os.scandir(current):
            if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
                real = Path(entry.path).resolve()
                if real not in seen:
                    seen.add(real)
                    pending.append(entry.path)
            elif entry.name.lower().endswith(IMG_EXTENSIONS) and (entry.is_symlink() or entry.is_file()):
                names.append(entry.name)
        names.sort()
    return files


def _of_list(path: Path) -> ImageFiles:
    """A text file with a path per line, or a table with a column of paths and perhaps one of classes.

    Relative paths are relative to the list. A path may be a folder: its images take its place.
    """
    if not path.is_file():
        raise ValueError(f"data: expected a list of image files, got {path}, which is none")
    try:
        rows, names = _read_list(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"data: expected a list of image files in {path}, got {error}") from None
    paths: list[str] = []
    classes: list[str] = []
    for row, name in zip(rows, names or [""] * len(rows), strict=True):
        item = path.parent / row
        found = find_images([item]).paths if item.is_dir() else [str(item)]
        paths += found
        classes += [name] * len(found)
    if not paths:
        raise ValueError(f"data: expected image files in {path}, got none")
    return ImageFiles(paths, classes if names and all(classes) else None)


def _read_list(path: Path) -> tuple[list[str], list[str] | None]:
    """The paths in a list, and its classes if it has them."""
    suffix = path.suffix.lower()
    if suffix == ".txt":
        lines = path.read_text(encoding="utf-8").splitlines()
        return [line.strip() for line in lines if line.strip()], None
    if suffix == ".parquet":
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise ValueError(f"data: reading {path} needs pyarrow: pip install pyarrow") from None
        names = parquet.read_schema(path).names
        place, label = _columns(path, names)
        columns = [place] if label is None else [place, label]
        table = parquet.read_table(path, columns=columns).to_pydict()
        return table[place], None if label is None else [str(value) for value in table[label]]
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",")
        place, label = _columns(path, table.fieldnames or [])
        rows = list(table)
    return [row[place] for row in rows], None if label is None else [row[label] or "" for row in rows]


def _columns(path: Path, names: Sequence[str]) -> tuple[str, str | None]:
    place = next((name for name in names if name.lower() in _PATH_COLUMNS), None)
    if place is None:
        raise ValueError(
            f"data: expected a column of paths in {path}, named {' or '.join(_PATH_COLUMNS)}, got {few(names)}"
        )
    return place, next((name for name in names if name.lower() in _LABEL_COLUMNS), None)


def few(names: Collection[str]) -> str:
    """The first of many names, for a message."""
    return ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
