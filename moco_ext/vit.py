"""The vision transformers of MoCo v3 (arXiv 2104.02057, section 4), on timm's."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

# Width by published name. Both have patches of 16, 12 layers and 12 heads (timm's ViT-S has 6).
WIDTHS = {"vit_small": 384, "vit_base": 768}


def moco_v3_vit(name: str, num_classes: int, image_size: int = 224, **options: int) -> nn.Module:
    """A vision transformer with MoCo v3's initialization and fixed 2-d sin-cos position embedding.

    Args:
        name: ``"vit_small"`` or ``"vit_base"``, with the tensors of the published checkpoints.
        image_size: side of the images in pixels, a multiple of the patch size.
        options: other arguments of timm's ``VisionTransformer``: ``depth``, ``patch_size``, ...

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "timm":
            raise
        message = f"arch: {name} needs timm, which is not installed: pip install timm"
        raise ModuleNotFoundError(message, name="timm") from None
    shape = {"patch_size": 16, "embed_dim": WIDTHS[name], "depth": 12, "num_heads": 12} | options
    vit: Any = VisionTransformer(
        img_size=image_size,
        num_classes=num_classes,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        weight_init="moco",
        **shape,  # type: ignore[arg-type]
    )
    projection = vit.patch_embed.proj
    bound = math.sqrt(6 / (projection.weight[0].numel() + vit.embed_dim))
    nn.init.uniform_(projection.weight, -bound, bound)
    nn.init.zeros_(projection.bias)
    height, width = vit.patch_embed.grid_size
    embedding = sin_cos_embedding(height, width, vit.embed_dim)
    vit.pos_embed = nn.Parameter(torch.cat([torch.zeros(1, vit.embed_dim), embedding])[None], requires_grad=False)
    return vit


def sin_cos_embedding(height: int, width: int, dim: int, temperature: float = 10000.0) -> Tensor:
    """Position embedding [height * width, dim] of a grid: sines and cosines of one coordinate, then of the other.

    Raises:
        ValueError: ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"dim: expected a multiple of 4 for two coordinates, got {dim}")
    frequencies = temperature ** -(torch.arange(dim // 4) / (dim // 4))
    # The published code numbers the grid column by column.
    x, y = torch.meshgrid(torch.arange(width).float(), torch.arange(height).float(), indexing="ij")
    angles = [coordinate.flatten()[:, None] * frequencies for coordinate in (x, y)]
    return torch.cat([wave(of_axis) for of_axis in angles for wave in (torch.sin, torch.cos)], dim=1)
