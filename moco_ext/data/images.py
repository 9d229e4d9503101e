"""Decode image files: torchvision's decoders where they apply, PIL for the other formats."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 178_956_970  # PIL's limit too; 0.5 GB decoded. Larger images end a worker, or the machine.

_TORCHVISION_FORMATS = ("JPEG", "PNG", "WEBP")  # not GIF: torchvision decodes all frames


class UnreadableImageError(ValueError):
    """An image file could not be decoded; the message names it.

    A DataLoader re-raises a worker's exception with the worker's traceback as its message. Only the error itself is
    kept, so that users see one line whatever the number of workers.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].rstrip())


def check_readable(unreadable: int, files: int) -> None:
    """Raise an UnreadableImageError if more than half of the files could not be decoded."""
    if unreadable > files / 2:
        raise UnreadableImageError(f"data: expected images, got {files:,} files of which {unreadable:,} are unreadable")


def read_image(path: str | Path) -> Tensor:
    """Read an image file as uint8 [3, H, W].

    Raises:
        UnreadableImageError: not a regular file, missing, or as for :func:`decode`.
    """
    return decode(lambda: open_regular(path), lambda: os.fsdecode(path))


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading; an error if it is no regular file: opening a FIFO would block."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    return open(path, "rb")


def decode(open_file: Callable[[], BinaryIO], name: Callable[[], str]) -> Tensor:
    """Decode an encoded image to uint8 [3, H, W].

    The image is turned as its EXIF orientation says, unlike in the official training code. Grayscale is repeated to
    three channels, transparency is dropped, channels of 12 or 16 bits keep their upper 8, and an animation gives its
    first frame.

    Raises:
        UnreadableImageError: cannot be opened, empty, truncated, not an image, of more than ``MAX_PIXELS`` pixels, or
            of floating-point, signed or 32-bit values, whose range is unknown. The message has ``name()``.
    """
    from torchvision.io import ImageReadMode, decode_image

    def by_torchvision(file: BinaryIO) -> Tensor:
        content = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
        pixels = decode_image(content, ImageReadMode.RGB, apply_exif_orientation=True)
        return pixels if pixels.dtype == torch.uint8 else (pixels.int() >> 8).to(torch.uint8)

    try:
        with open_file() as file:
            if 0 < _jpeg_pixels(file) <= MAX_PIXELS:
                with contextlib.suppress(RuntimeError):  # as below
                    return by_torchvision(file)
                file.seek(0)
            with _pil().open(file) as image:
                if image.width * image.height > MAX_PIXELS:  # PIL has read no more than the header
                    raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
                if image.format not in _TORCHVISION_FORMATS or (image.format == "WEBP" and image.info.get("exif")):
                    return from_pil(image)  # torchvision turns JPEG and PNG only
                after_header = file.tell()
                file.seek(0)
                try:
                    return by_torchvision(file)
                except RuntimeError:  # a variant that torchvision does not support, or a damaged file: PIL says why
                    file.seek(after_header)
                    return from_pil(image)
    except Exception as error:  # decoders raise anything on damaged files, which must not end a long run
        reason = str(error).partition(" <_io.")[0]  # PIL shows the file object
        if name().lower().endswith((".heic", ".heif")) and "pillow_heif" not in sys.modules:
            reason = "needs pillow-heif: pip install pillow-heif"
        raise UnreadableImageError(
            f"data: expected an image, got {type(error).__name__} in {name()}: {reason}"
        ) from None


def _jpeg_pixels(file: BinaryIO) -> int:
    """Width times height of a JPEG, from its header; 0 if PIL, which takes ten times as long, should look at it.

    The file is at its start, before and after.
    """
    pixels, at = 0, 2
    if file.read(2) == b"\xff\xd8":
        while len(segment := file.read(9)) == 9 and segment[0] == 0xFF:  # type, length, content
            if 0xC0 <= segment[1] <= 0xC2:  # a frame: precision, height, width
                pixels = int.from_bytes(segment[5:7], "big") * int.from_bytes(segment[7:9], "big")
            if segment[1] != 0xC4 and not 0xDB <= segment[1] <= 0xFE:  # of these the length is known
                break
            at += 2 + int.from_bytes(segment[2:4], "big")
            file.seek(at)
    file.seek(0)
    return pixels


@functools.cache
def _pil() -> Any:
    """PIL's module Image, with a plugin for HEIC, the photos of iPhones, if it is installed."""
    from PIL import Image

    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return Image


def from_pil(image: Image.Image) -> Tensor:
    """A PIL image as uint8 [3, H, W], like :func:`read_image`."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    # PIL has 16-bit PNG and PGM in mode I, too. Of other formats the range is unknown: 0 to 255 would be black.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(f"pixels of unknown range (PIL's mode {image.mode}); expected 8 or 16 bits, unsigned")
    turned = upright(image)
    if turned.mode.startswith("I"):  # which PIL would clip to 8 bits
        bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # of TIFF: 12, as of some cameras, or 16
        return torch.from_numpy((np.asarray(turned) >> (bits - 8)).astype(np.uint8)).expand(3, -1, -1)
    return pil_to_tensor(turned.convert("RGB"))


def upright(image: Image.Image) -> Image.Image:
    """A PIL image, turned as its EXIF orientation says."""
    from PIL import ImageOps

    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF data, of an image that can be read
        return ImageOps.exif_transpose(image)
    return image
