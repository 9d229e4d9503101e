"""A whole training step with images on the device: ours, the published formulation, and only the encoders."""

from __future__ import annotations

import copy

import official
import pytest
import torch
import torch.nn.functional as F
from conftest import Row

from moco_ext import MoCo
from moco_ext.encoders import resolve

# arch, images of a batch, their side, K, whether it is a GPU's size
CASES = [
    ("resnet18-small", 32, 32, 65536, False),
    ("resnet50", 32, 224, 65536, True),
    ("resnet50", 256, 224, 65536, True),
]


class Official:
    """The published step: momentum update, shuffle, logits, enqueue in forward; then the loss, backward, SGD."""

    def __init__(self, model: MoCo) -> None:
        dim = model.queue.shape[1]
        self.model = official.MoCo(lambda num_classes: copy.deepcopy(model.encoder_q), dim, model.K, model.m, model.T)
        self.model = self.model.to(model.queue.device)
        self.model.load_state_dict(model.state_dict())
        self.encoder = self.model.encoder_q

    def loss(self, im_q, im_k):
        return F.cross_entropy(*self.model(im_q, im_k)), None

    def update(self, _):
        pass


class Ours:
    def __init__(self, model: MoCo) -> None:
        self.model = copy.deepcopy(model)
        self.encoder = self.model.encoder_q

    def loss(self, im_q, im_k):
        out = self.model(im_q, im_k)
        return out.loss, out.keys

    def update(self, keys):
        self.model.update(keys)


class Encoders(Ours):
    """Two forward passes, one backward pass and SGD: what no implementation of the rest can make faster."""

    def loss(self, im_q, im_k):
        with torch.no_grad():
            self.model.encoder_k(im_k)
        return self.encoder(im_q).square().mean(), None

    def update(self, _):
        pass


def step_of(trainer, im_q, im_k, precision: torch.dtype | None, graphs: bool = False):
    optimizer = torch.optim.SGD(trainer.encoder.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)

    def step():
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(im_q.device.type, precision, enabled=precision is not None):
            loss, keys = trainer.loss(im_q, im_k)
        loss.backward()
        optimizer.step()
        trainer.update(keys)
        return loss.detach()

    return step


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}x{c[2]}")
def bench_step(compare, device, case):
    arch, batch, side, K, gpu_only = case
    if gpu_only and device.type == "cpu":
        pytest.skip("a GPU's size")
    torch.manual_seed(0)
    model = MoCo(resolve(arch), K=K).to(device)
    images = [torch.randn(batch, 3, side, side).to(device) for _ in range(2)]

    def make(kind, precision=None, channels_last=False, compiled=None):
        trainer = kind(model)
        views = images
        if channels_last:
            trainer.model.to(memory_format=torch.channels_last)
            views = [x.contiguous(memory_format=torch.channels_last) for x in images]
        if compiled:
            trainer.model.encoder_q.compile(mode=compiled)
            trainer.model.encoder_k.compile(mode=compiled)
        return step_of(trainer, *views, precision, graphs=compiled == "reduce-overhead")

    def first_loss(kind, **options):
        return lambda: make(kind, **options)()

    want = first_loss(Official)().double()
    tolerance = 1e-3 if device.type == "cuda" else 1e-5  # cuDNN multiplies in tf32
    rows = [
        Row("ours", make(Ours), value=first_loss(Ours), tolerance=tolerance),
        Row("official", make(Official), value=first_loss(Official), tolerance=tolerance),
        Row("encoders alone", make(Encoders)),
    ]
    fast = {"precision": torch.bfloat16, "channels_last": True}
    rows += [
        Row("ours, bf16, channels_last", make(Ours, **fast), value=first_loss(Ours, **fast), tolerance=2e-2),
        Row("official, bf16 autocast", make(Official, precision=torch.bfloat16)),
    ]
    if device.type == "cuda":
        rows += [
            Row("ours, bf16, channels_last, compiled", make(Ours, compiled="default", **fast)),
            Row(
                "ours, bf16, channels_last, CUDA graphs", make(Ours, compiled="reduce-overhead", **fast), captured=False
            ),
            Row("encoders alone, bf16, channels_last, compiled", make(Encoders, compiled="default", **fast)),
        ]
    compare(f"step {arch} {batch} images of {side}², K={K}", rows, want)
