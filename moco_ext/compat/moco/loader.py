"""The official implementation's ``moco/loader.py``: what its trainer composes transforms of."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image, ImageFilter

__all__ = ["GaussianBlur", "TwoCropsTransform"]


class TwoCropsTransform:
    """``[query, key]``: two random crops of one image, by one transform."""

    def __init__(self, base_transform: Callable[[Any], Any]) -> None:
        self.base_transform = base_transform

    def __call__(self, x: Any) -> list[Any]:
        return [self.base_transform(x), self.base_transform(x)]


class GaussianBlur:
    """A Gaussian blur of a PIL image, its sigma in pixels drawn from a range (SimCLR, arXiv 2002.05709, App. A)."""

    def __init__(self, sigma: Sequence[float] = (0.1, 2.0)) -> None:
        if len(sigma) != 2 or not 0 <= sigma[0] <= sigma[1]:
            raise ValueError(f"sigma: expected a range of pixels, got {sigma}")
        self.sigma = sigma

    def __call__(self, x: Image.Image) -> Image.Image:
        return x.filter(ImageFilter.GaussianBlur(radius=random.uniform(self.sigma[0], self.sigma[1])))
