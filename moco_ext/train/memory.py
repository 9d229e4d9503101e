"""Memory of a run, estimated before it starts: the model is built on the meta device, without data."""

from __future__ import annotations

import dataclasses
import os

import torch
from torch import Tensor

from ..encoders import autocast, encode
from .config import PretrainConfig
from .model import build_model
from .optimizer import state_size


def estimate(config: PretrainConfig, size: int, images: int, batch_size: int, world: int = 1) -> dict[str, int]:
    """Bytes of each part of a training step on one device.

    Args:
        size: side of the views, in pixels.
        images: size of the training set; a memory bank stores a feature of each image.
        batch_size: images per device.
        world: number of processes, among which the queue is divided with ``config.shard_queue``.

    Returns:
        Bytes of the encoders' parameters, gradients, optimizer state, dictionary, images of a batch, and
        activations that the query encoder saves for backward. Library overhead is not included (cuDNN workspaces,
        allocator fragmentation, the CUDA context).
    """
    with torch.device("meta"):
        model = build_model(dataclasses.replace(config, shard_queue=False), images, size)
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

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast("cpu", config.precision):
        encode(model.encoder_q, views)
    dictionary = sum(b.nbytes for b in model.buffers(recurse=False))
    if config.shard_queue:
        queue = model.get_buffer("queue").nbytes
        dictionary -= queue - queue // world
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return {
        "encoders": sum(p.nbytes for p in model.parameters()),
        "gradients": trained,
        "optimizer": round(trained * state_size(config.optimizer)),
        "dictionary": dictionary,
        "images": 2 * views.nbytes,
        "activations": sum(t.nbytes for t in kept.values()) * (1 + (config.symmetric or model.symmetric)),
    }


def device_memory(device: torch.device) -> int:
    """Bytes of memory of a GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
