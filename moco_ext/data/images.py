"""Image files as tensors, without PIL where torchvision's decoders can read them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


class UnreadableImageError(ValueError):
    """A file that holds no image anyone here can decode; the message names it."""


def read_image(path: str | Path) -> Tensor:
    """The image in a file: uint8 [3, H, W], whatever its mode was (transparency is dropped, grey repeated).

    The orientation in EXIF is not applied, as in the published training.

    Raises:
        UnreadableImageError: missing, empty, truncated, or not an image.
    """
    from torchvision.io import ImageReadMode, decode_image, read_file

    try:
        image = decode_image(read_file(str(path)), ImageReadMode.RGB)
    except RuntimeError:
        return _with_pil(path)
    if image.ndim == 4:  # an animation
        image = image[0]
    if image.dtype != torch.uint8:  # 16 bits a channel
        image = (image.int() >> 8).to(torch.uint8)
    return image


def _with_pil(path: str | Path) -> Tensor:
    """What torchvision does not decode: TIFF, BMP, PPM; and PIL's reason where it cannot be done."""
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    try:
        with Image.open(path) as image:
            return pil_to_tensor(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:  # what PIL's decoders raise on broken files
        raise UnreadableImageError(f"expected an image, got {type(error).__name__} in {path}: {error}") from None
