"""Paths and URLs of shards: patterns, listings and byte ranges. URLs are read through fsspec, which is optional."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

_SEPARATOR = re.compile(rf"(?<!:){re.escape(os.pathsep)}(?!:|//)")  # not the colon of s3://, nor fsspec's ::
_AUTHORITY = re.compile(r"(?<=://)(?:[^/@]*@)?(?:\[[^]/]*\]|[^/:@]*)(?::\d+)?(?=/)")  # user:password@host:port
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class Stamp(NamedTuple):
    """What shows that a file has changed; ``mtime_ns`` is 0 at URLs, where it is not known everywhere."""

    size: int
    mtime_ns: int


def is_url(source: str) -> bool:
    return "://" in source


def split_sources(name: str) -> list[str]:
    """The paths and URLs in ``name``, which ``os.pathsep`` separates unless it is the path of a file."""
    if os.path.exists(name):
        return [name]
    marked = _AUTHORITY.sub(lambda match: match[0].replace(":", "\0"), name)
    return [part.replace("\0", ":") for part in _SEPARATOR.split(marked) if part]


def expand(source: str) -> list[str]:
    """The paths or URLs that a pattern names: ``{000..999}``, ``{a,b}``, ``*``, ``?`` and ``[ab]``.

    Braces name files that must exist; what the wildcards match is sorted.

    Raises:
        ValueError: a range that counts down, or no file that matches.
    """
    if not is_url(source) and os.path.exists(source):
        return [source]
    found: list[str] = []
    for pattern in _expand_braces(source):
        matches = _matching(pattern) if glob.has_magic(pattern) else [pattern]
        if not matches:
            raise ValueError(f"data: expected files that match {pattern}, got none")
        found += matches
    return found


def _expand_braces(pattern: str) -> list[str]:
    parts = _BRACES.split(pattern)  # text, braces, text, ...
    choices = [_choices(part, pattern) if place % 2 else [part] for place, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(inner: str, pattern: str) -> list[str]:
    numbers = _RANGE.fullmatch(inner)
    if numbers is None:
        return inner.split(",") if "," in inner else [f"{{{inner}}}"]
    first, last = numbers.groups()
    if int(last) < int(first):
        raise ValueError(f"data: expected a range that counts up, got {{{inner}}} in {pattern}")
    return [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it.

    Ask for it again in every process: file systems do not survive a fork. fsspec keeps its instances.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ValueError(f"data: reading {url} needs fsspec: pip install fsspec") from None
    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:  # a protocol whose package is not installed, or an unknown one
        raise ValueError(f"data: expected a URL that fsspec can read, got {url}: {error}") from None


@contextlib.contextmanager
def _named(url: str) -> Iterator[None]:
    """An error that names the URL: file systems raise errors of their own packages, without credentials for example."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise OSError(f"data: expected to read {url}, got {type(error).__name__}: {error}") from error


def files_in(folder: str) -> list[str]:
    """Sorted paths or URLs of what is directly in a folder, without hidden names; empty if there is no such folder."""
    if not is_url(folder):
        names = os.listdir(folder) if os.path.isdir(folder) else []
        return sorted(os.path.join(folder, name) for name in names if not name.startswith("."))
    return [path for path in _matching(f"{folder.rstrip('/')}/*") if not path.rpartition("/")[2].startswith(".")]


def _matching(pattern: str) -> list[str]:
    if not is_url(pattern):
        return sorted(glob.glob(pattern))
    files, path = filesystem(pattern)
    with _named(pattern):
        return [files.unstrip_protocol(found) for found in sorted(files.glob(path))]


def stamp(path: str) -> Stamp:
    """Raises a FileNotFoundError if there is no such file."""
    if is_url(path):
        files, inner = filesystem(path)
        with _named(path):
            return Stamp(int(files.size(inner)), 0)
    status = os.stat(path)
    return Stamp(status.st_size, status.st_mtime_ns)


def open_file(path: str) -> BinaryIO:
    if not is_url(path):
        return open(path, "rb")
    files, inner = filesystem(path)
    return files.open(inner, "rb")


def read_file(path: str) -> bytes | None:
    """The content of a small file; None if there is none."""
    try:
        with open_file(path) as file:
            return file.read()
    except FileNotFoundError:
        return None


def read_range(url: str, start: int, end: int) -> bytes:
    """Bytes ``start`` to ``end - 1`` at a URL.

    Raises:
        OSError: the server sends more, because it does not know byte ranges.
    """
    files, inner = filesystem(url)
    content = files.cat_file(inner, start=start, end=end)
    if len(content) > end - start:
        raise OSError(f"data: expected a server that sends ranges of bytes of {url}, got the whole file")
    return content
