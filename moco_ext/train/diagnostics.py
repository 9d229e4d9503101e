"""Metrics that show whether training is healthy: cheap statistics of queries, queue and key encoder."""

from __future__ import annotations

import collections
import math
import warnings

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .. import distributed
from ..encoders import encode, restored_modes
from ..evaluate.label_free import effective_rank
from ..mechanism import Mechanism

_QUERIES = 32  # for the effective negatives: [32, K] logits cost little compared with a step
COLLAPSED_STD, COLLAPSED_RANK = 0.1, 2.0


class Diagnostics:
    """Metrics of every ``every``-th step. They do not change training, bit for bit.

    ::

        diagnostics.before(step)          # step counts from 1
        loss = model(im_q, im_k).loss
        loss.backward()
        metrics = diagnostics.after(step, im_k)    # {} if the step is not due
        optimizer.step()

    With the raw queries q [N, dim] of the step's first forward pass, their unit rows q̂, and the K keys n of the queue:

    - ``query_norm``: mean ‖q‖. The loss does not depend on it; its gradient is proportional to 1 / ‖q‖.
    - ``query_grad_norm``: N · mean over rows of ‖∂loss/∂q‖; the factor N cancels the mean of the loss over the batch.
    - ``feature_std``: √dim · mean over dimensions of the standard deviation of q̂ over the batch. About 1 if the
      directions are evenly spread, 0 if they are all the same.
    - ``effective_rank``: exp(-Σ pᵢ log pᵢ), pᵢ = σᵢ / Σ σⱼ over the singular values of q̂ (Roy & Vetterli, EUSIPCO
      2007): from 1 to min(N, dim).
    - ``effective_negatives``: exp(-Σ pⱼ log pⱼ), p = softmax(q̂·n / T), mean over up to 32 queries: K if all negatives
      count equally, 1 if one dominates.
    - ``key_drift``: 1 - cosine between an image's earlier key and the key encoder's current output (in eval mode), mean
      over a few fixed images; ``key_age``: the age of that earlier key in steps. It is the oldest one that would still
      be in the queue, so this measures how inconsistent the dictionary is. It is high early in training, while the
      running statistics of BatchNorm settle.

    The last three need a queue, so only ``MoCo`` has them. Values that are not finite are left out (float16 gradients
    that overflow, in a step that the gradient scaler skips).

    The first collapse (``feature_std`` below 0.1 or ``effective_rank`` below 2) causes one warning. Nothing is saved in
    checkpoints, so ``key_age`` starts at 0 after resuming.

    Args:
        model: the model itself, not its DistributedDataParallel wrapper; its ``query_hook`` is used.
        every: steps between measurements; 0: never.
        probe: number of images whose keys are followed.
    """

    def __init__(self, model: Mechanism, *, every: int, probe: int = 32) -> None:
        if every < 0 or probe < 1:
            raise ValueError(f"every, probe: expected at least 0 and 1, got {every} and {probe}")
        self.model, self.every, self.probe = model, every, probe
        self._query: Tensor | None = None  # [N, dim] of the first forward pass of a due step
        self._grad: Tensor | None = None
        self._rows = 0  # queries of all forward passes of a due step: as many keys enter the queue
        self._images: Tensor | None = None
        self._next_probe = -1
        self._probes: collections.deque[tuple[int, Tensor]] = collections.deque()  # (step, unit keys [probe, dim])
        self._warned = distributed.rank() > 0

    def before(self, step: int) -> None:
        """Call before step ``step`` (from 1), whose queries are watched if it is due."""
        if self._images is not None and step == self._next_probe:
            self._probes.append((step, self._probe_keys()))
        if self.due(step):
            self._query, self._grad, self._rows = None, None, 0
            self.model.query_hook = self._watch

    def after(self, step: int, im_k: Tensor, *, grad_scale: float | Tensor = 1.0) -> dict[str, float]:
        """The metrics of a due step, else {}. Call after the backward pass, before the model's update.

        Args:
            im_k: [N, ...] images for the key encoder; those of the first call are followed from then on.
            grad_scale: factor of the loss in the backward pass (of a gradient scaler, or 1 / the number of accumulated
                batches). A 0-dim tensor stays on its device.
        """
        if not self.due(step):
            return {}
        self.model.query_hook = None
        if self._query is None:
            raise RuntimeError(f"query_hook: expected a forward pass of the model between before({step}) and after")
        with torch.no_grad():
            metrics = self._measure(step, im_k, grad_scale)
        self._query = self._grad = None
        self._warn_of_collapse(metrics, step)
        return metrics

    def due(self, step: int) -> bool:
        """Whether the metrics of step ``step`` (from 1) are measured."""
        return self.every > 0 and step % self.every == 0

    def _watch(self, query: Tensor) -> None:
        self._rows += len(query)
        if self._query is None:
            self._query = query.detach()
            if query.requires_grad:
                query.register_hook(self._keep_grad)

    def _keep_grad(self, grad: Tensor) -> None:
        self._grad = grad.detach()

    def _measure(self, step: int, im_k: Tensor, grad_scale: float | Tensor) -> dict[str, float]:
        assert self._query is not None
        query = self._query.float()
        unit = normalize(query, dim=1)
        on_device = {
            "query_norm": query.norm(dim=1).mean(),
            "feature_std": unit.std(0, correction=0).mean() * math.sqrt(unit.shape[1]),
        }
        if self._grad is not None:
            on_device["query_grad_norm"] = self._grad.float().norm(dim=1).sum() / grad_scale
        age = None
        queue = self.model.key_queue()
        if queue is not None:
            keys_per_step = distributed.world_size() * self._rows
            on_device["effective_negatives"] = _effective_negatives(unit[:_QUERIES], queue, self.model.T)
            age, drift = self._drift(step, im_k, lifetime=len(queue) / keys_per_step)
            if age is not None:
                on_device["key_drift"] = drift
        # One copy to the host for everything. In float64, since the Gram matrix squares small singular values.
        rows = unit.double()
        gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
        values = torch.cat([gram.flatten(), torch.stack(list(on_device.values())).double()]).cpu()
        metrics = dict(zip(on_device, values[gram.numel() :].tolist(), strict=True))
        metrics["effective_rank"] = effective_rank(values[: gram.numel()].view(gram.shape))
        if age is not None:
            metrics["key_age"] = float(age)
        return {name: value for name, value in metrics.items() if math.isfinite(value)}

    def _drift(self, step: int, im_k: Tensor, lifetime: float) -> tuple[int | None, Tensor]:
        """Encode the probe images again: the age in steps of their oldest keys still in the queue, and the drift."""
        if self._images is None:
            self._images = im_k[: self.probe].clone()
        keys = self._probe_keys()
        while self._probes and step - self._probes[0][0] > lifetime:
            self._probes.popleft()
        age = step - self._probes[0][0] if self._probes else None
        drift = 1 - (keys * (self._probes[0][1] if self._probes else keys)).sum(1).mean()
        self._probes.append((step, keys))
        # If keys leave the queue before the next due step, probe once more in between.
        self._next_probe = step + self.every - int(lifetime) if 1 <= lifetime < self.every else -1
        return age, drift

    @torch.no_grad()
    def _probe_keys(self) -> Tensor:
        """The key encoder's unit keys [probe, dim] of the probe images, now."""
        assert self._images is not None
        encoder = self.model.get_submodule("encoder_k")
        with restored_modes(encoder):
            encoder.eval()
            return normalize(encode(encoder, self._images).float(), dim=1)

    def _warn_of_collapse(self, metrics: dict[str, float], step: int) -> None:
        spread, rank = metrics.get("feature_std", math.inf), metrics.get("effective_rank", math.inf)
        if self._warned or (spread >= COLLAPSED_STD and rank >= COLLAPSED_RANK):
            return
        self._warned = True
        warnings.warn(
            f"features are collapsing: at step {step} the spread of the queries is {spread:.3f} (1: even, 0: none) "
            f"and their effective rank {rank:.1f}; a warm-up (warmup_epochs) or a lower learning rate may help",
            stacklevel=3,
        )


def _effective_negatives(unit: Tensor, queue: Tensor, temperature: float) -> Tensor:
    log_p = torch.log_softmax(unit @ queue.to(unit.dtype).T / temperature, dim=1)  # [<= 32, K]
    return (-(log_p.exp() * log_p).sum(1)).exp().mean()
