"""Memory of a run, estimated before it starts: the model is built on the meta device, without data."""

from __future__ import annotations

import dataclasses

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..data import load
from ..encoders import encode
from .config import DTYPES, PretrainConfig
from .model import build_model
from .optimizer import state_size


def estimate(config: PretrainConfig, size: int, images: int, batch_size: int) -> dict[str, int]:
    """Bytes of each part of a training step on one device.

    Args:
        size: side of the views, in pixels.
        images: size of the training set; a memory bank stores a feature of each image.
        batch_size: images per device.

    Returns:
        Bytes of the encoders' parameters, gradients, optimizer state, dictionary, images of a batch, and
        activations that the query encoder saves for backward. Library overhead is not included (cuDNN workspaces,
        allocator fragmentation, the CUDA context).
    """
    with torch.device("meta"):
        model = build_model(config, images, size)
        shape: tuple[int, ...] = (batch_size, 3, size, size)
        if config.views == "patches":
            grid = round(config.patches**0.5)
            shape = (batch_size, config.patches, 3, size // grid, size // grid)
        views = torch.empty(shape)
    known = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        memory = tensor if tensor._base is None else tensor._base  # a view needs no memory
        if id(memory) not in known:
            kept[id(memory)] = memory  # a reference, so that no id is reused
        return tensor

    dtype = DTYPES[config.precision]
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        encode(model.encoder_q, views)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return {
        "encoders": sum(p.nbytes for p in model.parameters()),
        "gradients": trained,
        "optimizer": round(trained * state_size(config.optimizer)),
        "dictionary": sum(b.nbytes for b in model.buffers(recurse=False)),
        "images": 2 * views.nbytes,
        "activations": sum(t.nbytes for t in kept.values()) * (1 + (config.symmetric or model.symmetric)),
    }


def print_plan(config: PretrainConfig, data_root: str, device: torch.device) -> int:
    """Print the resolved configuration, the number of steps, and :func:`estimate` for this machine (``--dry-run``)."""
    data = load(config.data, data_root, val_fraction=config.val_fraction, image_size=config.image_size)
    console = Console()
    settings = Table("setting", "value", title=f"pretrain on {data.name}", title_justify="left")
    for name, value in dataclasses.asdict(config).items():
        settings.add_row(name, str(value))
    console.print(settings)
    steps = config.total_steps(max(1, len(data.train) // (config.batch_size * config.accumulate)))
    console.print(f"{len(data.train):,} training images of {data.size} pixels, about {steps:,} steps", highlight=False)
    gpus = max(1, torch.cuda.device_count()) if device.type == "cuda" else 1
    parts = estimate(config, data.size, len(data.train), config.batch_size // gpus)
    table = Table("memory", "MB", title=f"per device, {config.batch_size // gpus} images each", title_justify="left")
    table.columns[1].justify = "right"
    for name, size in parts.items():
        table.add_row(name, f"{size / 1e6:,.1f}")
    table.add_row("all", f"{sum(parts.values()) / 1e6:,.1f}", style="bold")
    console.print(table)
    return 0
