"""One optimizer step: forward and backward over its micro-batches, then the optimizer, then the model's update."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from .. import distributed
from ..data import Batch
from ..encoders import autocast, convert_sync_batchnorm
from ..mechanism import Mechanism
from ..stats import InfoNCEStats


class NonFiniteLoss(FloatingPointError):
    """The loss is not finite. The step has changed neither parameters nor dictionary.

    Attributes:
        batches: the step's micro-batches.
    """

    batches: Sequence[Batch] = ()


class Objective(nn.Module):
    """What DistributedDataParallel wraps: a model's forward pass on a batch, in both directions if symmetric."""

    def __init__(self, model: Mechanism, symmetric: bool = False) -> None:
        super().__init__()
        self.model, self.symmetric = model, symmetric

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The loss (0-dim), the metrics [loss, acc1, acc5], and the arguments of the model's ``update``."""
        views = [(batch.im_q, batch.im_k), (batch.im_k, batch.im_q)][: 1 + self.symmetric]
        passes = [self.model.forward_batch(*pair, index=batch.index, key_order=batch.key_order) for pair in views]
        losses, stats, arguments = zip(*passes, strict=True)
        loss = torch.stack(losses).mean()
        metrics = torch.stack([_metrics(of_pass) for of_pass in stats]).mean(0)
        return loss, metrics, tuple(map(torch.cat, zip(*arguments, strict=True)))


class StepResult(NamedTuple):
    """The result of one optimizer step.

    Attributes:
        metrics: of this rank: ``loss`` in nats, ``acc1`` and ``acc5`` (contrast accuracy) in percent.
        images: number of images, of all ranks.
        skipped: whether the gradient scaler skipped the step.
    """

    metrics: dict[str, float]
    images: int
    skipped: bool


class OptimizerStep:
    """One optimizer step at a time: ``step(batches)``, in one process or in a process group.

    The loss is copied to the host while the backward pass runs, so checking that it is finite does not stall the GPU.
    When the gradient scaler skips a step (an overflow in float16), the model's update is skipped too. Several processes
    train with DistributedDataParallel, unless FSDP2 has sharded the model's networks (:mod:`moco_ext.train.parallel`).

    Args:
        precision: "fp32", "bf16" or "fp16".
        symmetric: use each view as query and as key.
        clip_grad: largest norm of the gradient of all parameters, after unscaling; None: any.
    """

    def __init__(
        self,
        model: Mechanism,
        optimizer: torch.optim.Optimizer,
        precision: str,
        symmetric: bool,
        clip_grad: float | None = None,
    ) -> None:
        self.model, self.optimizer, self.clip_grad = model, optimizer, clip_grad
        self._device = next(model.parameters()).device
        self._precision = precision
        self.scaler = torch.amp.GradScaler(self._device.type, enabled=precision == "fp16")
        self._objective: nn.Module = Objective(model, symmetric)
        self._sharded = [network for network in model.children() if isinstance(network, FSDPModule)]
        if distributed.world_size() > 1 and not self._sharded:
            if model.sync_batchnorm and self._device.type == "cuda":
                convert_sync_batchnorm(model)
            # The queue is equal on all ranks by construction, and each rank trains with its own BatchNorm statistics
            # (rank 0's are saved, as published), so no buffer needs to be broadcast.
            self._objective = DistributedDataParallel(
                self._objective, broadcast_buffers=False, gradient_as_bucket_view=True
            )
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.shape[2:] == (1, 1) and parameter.is_contiguous():
                    parameter.register_hook(_contiguous_strides)
        self._stepped = False
        optimizer.register_step_post_hook(self._note)

    def __call__(self, batches: Sequence[Batch], after_backward: Any = None) -> StepResult:
        """Train for one step.

        Args:
            batches: the micro-batches of the step, the last of them marked ``last``.
            after_backward: if given, called with the gradient scale before the optimizer steps.

        Raises:
            NonFiniteLoss: the loss is NaN or infinite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        metrics, pending = torch.zeros(3, device=self._device), []
        arrived = None
        for batch in batches:
            with contextlib.ExitStack() as stack:
                if not batch.last and isinstance(self._objective, DistributedDataParallel):
                    stack.enter_context(self._objective.no_sync())
                for network in self._sharded:
                    network.set_requires_gradient_sync(batch.last)
                with autocast(self._device, self._precision):
                    loss, of_batch, arguments = self._objective(batch)
                pending.append(arguments)
                metrics += batch.share * of_batch
                if batch.last:
                    host, arrived = _to_host(metrics)
                self.scaler.scale(loss * batch.share).backward()
        if arrived is not None:
            arrived.synchronize()
        values = dict(zip(("loss", "acc1", "acc5"), host.tolist(), strict=True))
        if not math.isfinite(values["loss"]):
            error = NonFiniteLoss(f"loss: expected a finite number, got {values['loss']}")
            error.batches = batches
            raise error
        if after_backward is not None:
            after_backward(self.scaler.get_scale())
        if self.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self._stepped = False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self._stepped:
            self.model.update(*map(torch.cat, zip(*pending, strict=True)))
        images = distributed.world_size() * sum(len(batch.im_q) for batch in batches)
        return StepResult(values, images, not self._stepped)

    def _note(self, *_: Any) -> None:
        self._stepped = True


def _contiguous_strides(gradient: Tensor) -> Tensor:
    """The gradient of a 1x1 kernel [O, I, 1, 1] with the strides of a contiguous one.

    In channels_last it is the same memory with other strides than the weight's, at which DDP warns and copies.
    """
    return gradient.flatten(1).view(gradient.shape)


def _metrics(stats: InfoNCEStats) -> Tensor:
    with torch.no_grad():
        return torch.stack([stats.loss.mean(), *stats.accuracy((1, 5))])


def _to_host(metrics: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if metrics.device.type != "cuda":
        return metrics, None
    host = torch.empty(metrics.shape, dtype=metrics.dtype, pin_memory=True)
    host.copy_(metrics, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(metrics.device))  # which may not be the current device
    return host, arrived
