"""color_steps: wrapper and fake kernel."""

import torch
from torch import Tensor

from .checks import native


def color_steps(images: Tensor, steps: Tensor, factors: Tensor, kernels: Tensor) -> Tensor:
    """What follows the crop in an augmentation, in one pass a view: the kernel of ``color_transform`` on a CPU.

    Args:
        images: uint8 [N, 3, H, W], on the CPU.
        steps: int64 [N, S] the steps of each image, in order. -1: none, 0: brightness, 1: contrast, 2: saturation,
            3: hue, 4: grayscale, 5: blur, 6: solarization, 7: horizontal flip.
        factors: float32 [N, 4] of brightness, contrast and saturation, and the shift of the hue in turns.
        kernels: float32 [N, T] of the blur, T odd.

    Returns:
        New images of the same shape, rounded once.

    Raises:
        ValueError: an argument of another shape or dtype, or an unknown step.
    """
    return native(torch.ops.moco_ext.color_steps.default, images, steps, factors, kernels)


@torch.library.register_fake("moco_ext::color_steps")
def _(images, steps, factors, kernels):
    return images.new_empty(images.shape)
