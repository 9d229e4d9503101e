"""The baselines of bench_info_nce.py, other implementations of InfoNCE's gradient, called as their users call them.

A baseline takes a :class:`Problem`, prepares its data layout, and returns a function that computes one gradient of the
mean loss, [N, C] with respect to the raw queries. It raises :class:`Unavailable` where it cannot run.

siglip-kernel is not a baseline: its loss is a sigmoid of each pair, without a softmax over the queue.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import official
import torch
import torch.nn.functional as F
from torch import Tensor

import moco_ext.reference


class Unavailable(RuntimeError):
    """Why a peer cannot take part."""


@dataclass
class Problem:
    """Queries [N, C] that require a gradient, their keys [N, C], and a queue [K, C] of unit rows."""

    query: Tensor
    key: Tensor
    queue: Tensor
    T: float

    @cached_property
    def columns(self) -> Tensor:  # [C, K] float32, the published layout
        return self.queue.float().t().contiguous()

    @cached_property
    def classes(self) -> Tensor:  # [K + N, C]: for losses of linear layers, the queue and each row's positive after it
        return torch.cat([self.queue, F.normalize(self.key, dim=1).to(self.queue.dtype)])

    @cached_property
    def targets(self) -> Tensor:  # [N] each row's class among those
        return len(self.queue) + torch.arange(len(self.query), device=self.query.device)

    def unit(self) -> Tensor:
        return F.normalize(self.query, dim=1)

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.query)[0]

    @cached_property
    def exact(self) -> Tensor:  # the gradient in float64
        return self._exact(in_batch=False)

    @cached_property
    def exact_of_classes(self) -> Tensor:  # the same with the other rows' positives among the negatives
        return self._exact(in_batch=True)

    def exact_loss(self, in_batch: bool, query: Tensor | None = None) -> Tensor:  # in float64
        query = self.query.detach().double() if query is None else query
        return moco_ext.reference.info_nce(query, self.key.double(), self.queue.double(), self.T, in_batch=in_batch)

    def _exact(self, in_batch: bool) -> Tensor:
        wide = self.query.detach().double().requires_grad_()
        return torch.autograd.grad(self.exact_loss(in_batch, wide), wide)[0]


Loss = Callable[[], Tensor]
Gradient = Callable[[], Tensor]


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"pip install {package} ({error})") from None


def _needs_cuda(problem: Problem) -> None:
    if not problem.query.is_cuda:
        raise Unavailable("needs a GPU")


def _needs_hopper(problem: Problem) -> None:
    if not problem.query.is_cuda or torch.cuda.get_device_capability(problem.query.device) != (9, 0):
        raise Unavailable("needs a Hopper GPU")
    if problem.queue.dtype != torch.bfloat16:
        raise Unavailable("needs a bfloat16 queue")


# --- the published formulation ----------------------------------------------------------------------------------------


def eager(p: Problem) -> Gradient:
    columns = p.columns
    return lambda: p.gradient(official.info_nce(p.query, p.key, columns, p.T))


def autocast(p: Problem) -> Gradient:
    columns = p.columns

    def run():
        with torch.autocast(p.query.device.type, torch.bfloat16):
            loss = official.info_nce(p.query, p.key, columns, p.T)
        return p.gradient(loss)

    return run


def compiled(p: Problem, mode: str | None = None) -> Gradient:
    torch.compiler.reset()  # else the second size would get code for any size, which is slower
    columns, loss = p.columns, torch.compile(official.info_nce, dynamic=False, mode=mode)
    return lambda: p.gradient(loss(p.query, p.key, columns, p.T))


def max_autotune(p: Problem) -> Gradient:
    _needs_cuda(p)
    if (*p.query.shape, len(p.queue)) != (256, 128, 65536):
        raise Unavailable("tunes for a minute a shape: only N=256 K=65536 C=128")
    return compiled(p, "max-autotune-no-cudagraphs")  # the timing replays its own graph


# --- libraries for contrastive learning -------------------------------------------------------------------------------


def lightly(p: Problem) -> Gradient:
    """Its loss enqueues the keys, too."""
    loss = _module("lightly.loss", "lightly").NTXentLoss(temperature=p.T, memory_bank_size=tuple(p.queue.shape))
    loss = loss.to(p.query.device)
    loss.memory_bank.bank.copy_(p.queue)
    loss.memory_bank.bank_ptr.zero_()
    return lambda: p.gradient(loss(p.query, p.key))


def inf_cl(p: Problem) -> Gradient:
    """Its logsumexp over the queue; the positive joins outside. It always computes the queue's gradient."""
    _needs_cuda(p)
    flash = _module("inf_cl.flash", "inf-cl").FlashProb
    n, c = p.query.shape
    queue, key = p.queue.float().view(-1, 1, c), F.normalize(p.key, dim=1)

    def run():
        unit = p.unit()
        lse = flash.apply((unit / p.T).view(n, 1, c), queue).view(n)
        positive = (unit * key).sum(1) / p.T
        return p.gradient((torch.logaddexp(lse, positive) - positive).mean())

    return run


# --- losses of linear layers: the classes are the queue's keys and all positives --------------------------------------


def torch_linear_loss(p: Problem, chunked: bool = False, rows: int | None = None) -> Loss:
    """torch's own: its reference implementation, or chunks of that many rows (None: its default, from the shape)."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable("needs torch 2.13")
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows) if chunked else None
    classes, targets = p.classes, p.targets
    return lambda: F.linear_cross_entropy((p.unit() / p.T).to(classes.dtype), classes, targets, options=options)


def torch_linear(p: Problem, chunked: bool = False, rows: int | None = None) -> Gradient:
    loss = torch_linear_loss(p, chunked, rows)
    return lambda: p.gradient(loss())


def cut_cross_entropy(p: Problem) -> Gradient:
    """Without its filter, which drops the gradient of small probabilities: here all are small."""
    _needs_cuda(p)
    loss = _module("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    classes, targets = p.classes, p.targets
    return lambda: p.gradient(loss((p.unit() / p.T).to(classes.dtype), classes, targets, impl="cce", filter_eps=None))


def liger(p: Problem, chunks: int = 1) -> Gradient:
    _needs_cuda(p)
    functional = _module("liger_kernel.transformers.functional", "liger-kernel")
    classes, targets = p.classes, p.targets

    def run():
        rows = (p.unit() / p.T).to(classes.dtype)
        return p.gradient(functional.liger_fused_linear_cross_entropy(rows, classes, targets, chunk_mem_const=chunks))

    return run


def liger_hopper(p: Problem) -> Gradient:
    """Liger's CuTe kernels; the classes are padded beforehand to the 256 columns that each call would pad them to."""
    _needs_hopper(p)
    if len(p.query) % 128 or len(p.classes) % 256:
        raise Unavailable("needs N divisible by 128, K + N by 256")
    kernels = _module("liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90", "liger-kernel[cutedsl]")
    pad, targets = (0, -p.query.shape[1] % 256), p.targets
    classes = F.pad(p.classes, pad)

    def run():
        rows = F.pad((p.unit() / p.T).to(classes.dtype), pad)
        return p.gradient(kernels.liger_fused_linear_cross_entropy_sm90(rows, classes, targets))

    return run


def liger_hopper_scaled(p: Problem) -> Gradient:
    """Liger's CuTe kernels that never write the logits; without their check of the targets, which synchronizes."""
    _needs_hopper(p)
    kernels = _module("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90", "liger-kernel[cutedsl]")
    os.environ["LIGER_SCALED_CE_SM90_VALIDATE_TARGETS"] = "0"
    loss, classes, targets = kernels.LigerFusedScaledCrossEntropySM90Function.apply, p.classes, p.targets
    return lambda: p.gradient(loss(p.unit().to(classes.dtype), classes, targets, p.T).mean())


def quack(p: Problem, scaled_exp: bool = False) -> Gradient:
    _needs_cuda(p)
    if len(p.query) % 8:
        raise Unavailable("needs N divisible by 8")
    loss = _module("quack.linear_cross_entropy", "quack-kernels").chunked_linear_cross_entropy
    classes, targets = p.classes, p.targets
    return lambda: p.gradient(loss((p.unit() / p.T).to(classes.dtype), classes, targets, use_scaled_exp=scaled_exp))


# --- attention whose values are its keys ------------------------------------------------------------------------------


def flash_attention(p: Problem, splits: int = 64) -> Gradient:
    """torch's flash attention over the queue in `splits` batches (one would keep most of a GPU idle), then merged."""
    n, c = p.query.shape
    if len(p.queue) % splits:
        raise Unavailable(f"needs K divisible by {splits}")
    if p.query.is_cuda and p.queue.dtype == torch.float32:
        raise Unavailable("needs 16-bit inputs on a GPU")
    if p.query.is_cuda and c > 256:
        raise Unavailable("needs C up to 256")
    aten = torch.ops.aten
    attend = aten._scaled_dot_product_flash_attention if p.query.is_cuda else (
        aten._scaled_dot_product_flash_attention_for_cpu
    )  # fmt: skip
    keys, key = p.queue.view(splits, 1, -1, c), F.normalize(p.key, dim=1)

    @torch.no_grad()
    def run():
        norm = p.query.norm(dim=1, keepdim=True)
        unit = p.query / norm
        rows = unit.to(keys.dtype).expand(splits, 1, n, c)
        mean, lse, *_ = attend(rows, keys, keys, scale=1 / p.T)
        positive = (unit * key).sum(1) / p.T
        lse = lse.view(splits, n).float()
        total = torch.logaddexp(lse.logsumexp(0), positive)
        g = ((lse - total).exp()[..., None] * mean.view(splits, n, c)).sum(0)
        g = (g + ((positive - total).exp() - 1)[:, None] * key) / (p.T * n)
        return (g - (g * unit).sum(1, keepdim=True) * unit) / norm

    return run
