"""The transforms of the official implementation's ``moco/loader.py``."""

from __future__ import annotations

import random
from collections.abc import Sequence

from PIL import Image, ImageFilter

from ...data import TwoCropsTransform

__all__ = ["GaussianBlur", "TwoCropsTransform"]


class GaussianBlur:
    """Gaussian blur of a PIL image with a random sigma (SimCLR, arXiv 2002.05709, App. A).

    Args:
        sigma: range of the standard deviation, in pixels.

    Raises:
        ValueError: not a range.
    """

    def __init__(self, sigma: Sequence[float] = (0.1, 2.0)) -> None:
        if len(sigma) != 2 or not 0 <= sigma[0] <= sigma[1]:
            raise ValueError(f"sigma: expected 0 <= low <= high, in pixels, got {sigma}")
        self.sigma = sigma

    def __call__(self, x: Image.Image) -> Image.Image:
        return x.filter(ImageFilter.GaussianBlur(radius=random.uniform(self.sigma[0], self.sigma[1])))
