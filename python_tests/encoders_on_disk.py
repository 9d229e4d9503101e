"""Shared by the tests of load_encoder, embed, neighbors and export: small encoders and images on disk."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from test_pretrained import settled

import moco_ext
from moco_ext.checkpoints.training import save_checkpoint
from moco_ext.data import EvalTransform

ARCH = "resnet8-small"
TRANSFORM = EvalTransform(16, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def write_run(folder: Path, transform: EvalTransform | None = TRANSFORM, mlp: bool = True, **config) -> moco_ext.MoCo:
    """A run directory like that of pre-training, with an untrained encoder."""
    folder.mkdir(parents=True, exist_ok=True)
    model = settled(moco_ext.MoCo(ARCH, dim=8, K=16, mlp=mlp))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    more = {} if transform is None else {"transform": transform.as_dict()}
    save_checkpoint(folder / "checkpoint.pth", epoch=1, arch=ARCH, model=model, optimizer=optimizer, **more)
    (folder / "config.json").write_text(json.dumps({"data": "photos", "arch": ARCH, **config}))
    return model.eval()


def write_photos(folder: Path, n: int = 11, sizes=((40, 30), (24, 24), (20, 50))) -> list[Path]:
    """Smooth pictures of several sizes, PNG and JPEG."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    paths = []
    for i in range(n):
        coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        path = folder / f"{i:03d}.{'jpg' if i % 3 == 0 else 'png'}"
        coarse.resize(sizes[i % len(sizes)], Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths
