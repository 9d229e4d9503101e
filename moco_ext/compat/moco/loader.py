"""The official implementation's ``moco/loader.py``: what its trainer composes transforms of."""

from __future__ import annotations

import random
from collections.abc import Sequence

from PIL import Image, ImageFilter

from ...data import TwoCropsTransform

__all__ = ["GaussianBlur", "TwoCropsTransform"]


class GaussianBlur:
    """A Gaussian blur of a PIL image, its sigma in pixels drawn from a range (SimCLR, arXiv 2002.05709, App. A)."""

    def __init__(self, sigma: Sequence[float] = (0.1, 2.0)) -> None:
        if len(sigma) != 2 or not 0 <= sigma[0] <= sigma[1]:
            raise ValueError(f"sigma: expected a range of pixels, got {sigma}")
        self.sigma = sigma

    def __call__(self, x: Image.Image) -> Image.Image:
        return x.filter(ImageFilter.GaussianBlur(radius=random.uniform(self.sigma[0], self.sigma[1])))
