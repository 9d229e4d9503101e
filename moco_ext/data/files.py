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
    found = [_of_folder(source) if source.is_dir() else _of_list(source) for source in sources]
    paths = [path for files in found for path in files.paths]
    if any(files.classes is None for files in found):
        return ImageFiles(paths, None)
    return ImageFiles(paths, [name for files in found for name in files.classes or ()])


def _of_folder(root: Path) -> ImageFiles:
    """In the order of torchvision's ``ImageFolder``. Classes are the folders in ``root``, if all images are in them."""
    loose, folders = _scan(str(root))
    files = {folder: _below(Path(root, folder)) for folder in sorted(folders)}
    files = {folder: found for folder, found in files.items() if found}
    paths = [path for found in files.values() for path in found]
    if not (loose or paths):
        raise ValueError(f"data: expected images in {root}, got none")
    if loose:
        return ImageFiles([os.path.join(root, name) for name in loose] + paths, None)
    return ImageFiles(paths, [folder for folder, found in files.items() for _ in found])


def _below(folder: Path) -> list[str]:
    """Image files below ``folder``, by folder and name; links are followed, to each folder once.

    ``ImageFolder`` follows a link to a folder around it until the system refuses, and lists its images each time.
    """
    files: dict[str, list[str]] = {}
    seen = {path for start in (folder.parent.resolve(), folder.resolve()) for path in (start, *start.parents)}
    pending = [str(folder)]
    while pending:
        current = pending.pop()
        names, folders = _scan(current)
        files[current] = [os.path.join(current, name) for name in names]
        for path in (os.path.join(current, name) for name in folders):
            real = Path(path).resolve()
            if real not in seen:
                seen.add(real)
                pending.append(path)
    return [path for _, paths in sorted(files.items()) for path in paths]


def _scan(folder: str) -> tuple[list[str], list[str]]:
    """Sorted names of the image files in a folder, and of its folders.

    ``ImageFolder`` lists FIFOs and devices too. A dangling link is listed: it counts as an unreadable image, not as
    none.
    """
    from torchvision.datasets.folder import is_image_file

    images, folders = [], []
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
            folders.append(entry.name)
        elif is_image_file(entry.name) and (entry.is_symlink() or entry.is_file()):
            images.append(entry.name)
    return sorted(images), sorted(folders)


def _of_list(path: Path) -> ImageFiles:
    """A text file with a path per line, or a table with a column of paths and perhaps one of classes.

    Relative paths are relative to the list. A path may be a folder: its images take its place.
    """
    if not path.is_file() or path.suffix.lower() not in LISTS:
        raise ValueError(f"data: expected a folder of images or a list ({', '.join(LISTS)}), got {path}")
    try:
        rows, names = _read_list(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"data: expected a list of image files in {path}, got {error}") from None
    paths: list[str] = []
    classes: list[str] = []
    for number, (row, name) in enumerate(zip(rows, names or [""] * len(rows), strict=True), 1):
        if not row or (names and not name):
            raise ValueError(f"data: expected a path{' and a class' if names else ''} in row {number} of {path}")
        item = path.parent / row
        found = find_images([item]).paths if item.is_dir() else [str(item)]
        paths += found
        classes += [name] * len(found)
    if not paths:
        raise ValueError(f"data: expected image files in {path}, got none")
    return ImageFiles(paths, classes if names else None)


def _read_list(path: Path) -> tuple[list[str], list[str] | None]:
    """The paths in a list, and its classes if it has them."""
    suffix = path.suffix.lower()
    if suffix == ".txt":
        lines = path.read_text(encoding="utf-8-sig").splitlines()
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
        return table[place], None if label is None else [_text(value) for value in table[label]]
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",")
        place, label = _columns(path, table.fieldnames or [])
        rows = list(table)
    return [row[place] for row in rows], None if label is None else [_text(row[label]) for row in rows]


def _text(value: object) -> str:
    return "" if value is None else str(value)


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
