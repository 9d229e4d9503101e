"""What a run will take in memory, known before it starts: tensors without data are sent through the encoder."""

from __future__ import annotations

import dataclasses

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .. import encoders
from ..data import load
from .config import DTYPES, PretrainConfig


def estimate(config: PretrainConfig, size: int, images: int, batch_size: int) -> dict[str, int]:
    """Bytes of the parts of a training step on one device.

    Args:
        size: side of the views, in pixels.
        images: in the training set; a memory bank has a feature of each.
        batch_size: of this device.

    Returns:
        Parameters of both encoders, gradients, the optimizer's momentum, the dictionary, the images of a batch, and the
        activations that the query encoder's forward pass keeps for its backward pass. What libraries set aside for
        themselves (cuDNN's workspace, the allocator's gaps, the CUDA context) comes on top.
    """
    with torch.device("meta"):
        encoder = encoders.build(config.arch, config.moco_dim, config.mlp).train()
        shape: tuple[int, ...] = (batch_size, 3, size, size)
        if config.views == "patches":
            grid = round(config.patches**0.5)
            shape = (batch_size, config.patches, 3, size // grid, size // grid)
        views = torch.empty(shape)
    parameters = sum(p.numel() * p.element_size() for p in encoder.parameters())
    both = parameters * (1 if config.dictionary == "memory-bank" or config.key_encoder == "identical" else 2)
    trained = both if config.dictionary == "end-to-end" else parameters
    rows = {"queue": config.moco_k, "end-to-end": 0, "memory-bank": images}[config.dictionary]
    known = {id(tensor) for tensor in [*encoder.parameters(), *encoder.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        memory = tensor if tensor._base is None else tensor._base  # a view takes none of its own
        if id(memory) not in known:
            kept[id(memory)] = memory  # held, so that no id is given twice
        return tensor

    dtype = DTYPES[config.precision]
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        encoders.encode(encoder, views)
    return {
        "encoders": both,
        "gradients": trained,
        "optimizer": trained,
        "dictionary": rows * config.moco_dim * DTYPES[config.queue_dtype].itemsize,
        "images": 2 * views.numel() * 4,
        "activations": sum(t.numel() * t.element_size() for t in kept.values()) * (1 + config.symmetric),
    }


def print_plan(config: PretrainConfig, data_root: str, device: torch.device) -> int:
    """What ``--dry-run`` shows: the configuration as resolved, the steps, and :func:`estimate` for this machine."""
    data = load(config.data, data_root)
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
