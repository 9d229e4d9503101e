"""One optimizer step: forward and backward over its micro-batches, then the optimizer, then the model's update."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import distributed
from ..data import Batch
from ..end_to_end import EndToEnd
from ..memory_bank import MemoryBank
from ..moco import MoCo

Model = MoCo | EndToEnd | MemoryBank
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLoss(FloatingPointError):
    """The loss is not a finite number; nothing of its step has entered parameters or dictionary.

    Attributes:
        batches: those of the step.
    """

    batches: Sequence[Batch] = ()


class Objective(nn.Module):
    """What DistributedDataParallel wraps: one forward pass of any of the mechanisms, or both ways if symmetric."""

    def __init__(self, model: Model, symmetric: bool = False) -> None:
        super().__init__()
        self.model, self.symmetric = model, symmetric

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The loss (0-dim), its figures [loss, acc@1, acc@5], and what the model's ``update`` wants."""
        if isinstance(self.model, MemoryBank):
            stored = self.model(batch.im_q, batch.index)
            return stored.loss, _figures(stored), (stored.keys, stored.images)
        options: dict[str, Any] = {"key_order": batch.key_order}
        ids: tuple[Tensor, ...] = ()  # of all ranks' images, where the model wants to know
        if isinstance(self.model, MoCo) and self.model.same_id is not None:
            options["ids"] = batch.index.to(batch.im_q.device, non_blocking=True)
            ids = (distributed.all_gather(options["ids"]),)
        one = self.model(batch.im_q, batch.im_k, **options)
        if not self.symmetric:
            return one.loss, _figures(one), (one.keys, *ids)
        other = self.model(batch.im_k, batch.im_q, **options)
        both = (torch.cat([one.keys, other.keys]), *(x.repeat(2) for x in ids))
        return (one.loss + other.loss) / 2, (_figures(one) + _figures(other)) / 2, both


class StepResult(NamedTuple):
    """What a step did.

    Attributes:
        figures: of this rank: ``loss`` in nats, ``acc1`` and ``acc5`` (contrast accuracy) in percent.
        images: of all ranks.
        skipped: the gradient scaler left it out.
    """

    figures: dict[str, float]
    images: int
    skipped: bool


class OptimizerStep:
    """``step(batches)`` trains the model by one step, in the precision asked for, on one process or in a group.

    The loss comes to the host while the backward pass runs, so looking whether it is finite costs no waiting. A step
    that the gradient scaler skips (an overflow in float16) skips the model's update, too.
    """

    def __init__(self, model: Model, optimizer: torch.optim.Optimizer, precision: str, symmetric: bool) -> None:
        self.model, self.optimizer = model, optimizer
        self._device = next(model.parameters()).device
        self._autocast = AUTOCAST.get(precision)
        self.scaler = torch.amp.GradScaler(self._device.type, enabled=precision == "fp16")
        self._objective: nn.Module = Objective(model, symmetric)
        if distributed.world_size() > 1:
            # The queue is equal on all ranks by construction and BatchNorm's statistics are each rank's own in training
            # (rank 0's are saved, as published): no buffer is ever broadcast.
            self._objective = DistributedDataParallel(
                self._objective, broadcast_buffers=False, gradient_as_bucket_view=True
            )
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.shape[2:] == (1, 1) and parameter.is_contiguous():
                    parameter.register_hook(_contiguous_strides)
        self._stepped = False
        optimizer.register_step_post_hook(self._note)

    def __call__(self, batches: Sequence[Batch], after_backward: Any = None) -> StepResult:
        """Train by one step.

        Args:
            batches: the micro-batches of the step, the last of them marked ``last``.
            after_backward: called, if given, with the scale of the gradients, before the optimizer's step.

        Raises:
            NonFiniteLoss: see there.
        """
        self.optimizer.zero_grad(set_to_none=True)
        figures, pending = torch.zeros(3, device=self._device), []
        arrived = None
        for batch in batches:
            with contextlib.ExitStack() as stack:
                if not batch.last and isinstance(self._objective, DistributedDataParallel):
                    stack.enter_context(self._objective.no_sync())
                with torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None):
                    loss, of_batch, wanted = self._objective(batch)
                pending.append(wanted)
                figures += batch.share * of_batch
                if batch.last:
                    host, arrived = _to_host(figures)
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


def _figures(out: Any) -> Tensor:
    with torch.no_grad():
        return torch.stack([out.stats.loss.mean(), *out.stats.accuracy((1, 5))])


def _to_host(figures: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if figures.device.type != "cuda":
        return figures, None
    host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
    host.copy_(figures, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived
