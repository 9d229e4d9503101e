"""Is it learning well? A few figures about queries, queue and key encoder, cheap enough to be always on."""

from __future__ import annotations

import collections
import math
import warnings

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .. import distributed
from ..encoders import encode, restored_modes
from ..mechanism import Mechanism

_QUERIES = 32  # whose softmax over the queue is looked at: [32, K] logits are small beside a step's own work
_COLLAPSED_STD, _COLLAPSED_RANK = 0.1, 2.0


class Diagnostics:
    """Figures of every ``every``-th step; training is bit for bit the same with and without them.

    ::

        diagnostics.before(step)          # step counts from 1
        loss = model(im_q, im_k).loss
        loss.backward()
        figures = diagnostics.after(step, im_k)    # {} when not due
        optimizer.step()

    With q [N, dim] the raw queries of the step's first forward pass, q̂ their unit rows, n the queue's K keys:

    - ``query_norm``: mean ‖q‖. The loss does not depend on it, its gradient falls as 1 / ‖q‖.
    - ``query_grad_norm``: N · mean over rows of ‖∂loss/∂q‖; the factor N undoes the loss's mean over the batch.
    - ``feature_std``: √dim · mean over dimensions of the standard deviation of q̂ over the batch. About 1 when the
      directions are spread evenly, 0 when all are the same.
    - ``effective_rank``: exp(-Σ pᵢ log pᵢ), pᵢ = σᵢ / Σ σⱼ over the singular values of q̂ (Roy & Vetterli, EUSIPCO
      2007): from 1 to min(N, dim).
    - ``effective_negatives``: exp(-Σ pⱼ log pⱼ), p = softmax(q̂·n / T), mean over up to 32 queries: K when all negatives
      count the same, 1 when a single one counts.
    - ``key_drift``: 1 - cosine, mean over a fixed few images, between the key that the key encoder (in eval mode) gave
      some steps ago and the one it gives now; ``key_age``: how many steps. The oldest such key that would still be in
      the queue is taken, so this is how inconsistent the dictionary is at its far end. At a run's start it is high
      while BatchNorm's running statistics settle.

    The last three are of a queue, so of ``MoCo`` alone. A figure that is not finite (16-bit gradients that overflow, in
    a step that the scaler will skip) is left out.

    A first collapse (``feature_std`` under 0.1 or ``effective_rank`` under 2) is warned of, once. Nothing here is in a
    checkpoint: after a resume the keys probed begin anew, and ``key_age`` with them.

    Args:
        model: a ``MoCo``, ``EndToEnd`` or ``MemoryBank`` itself, not its DistributedDataParallel: its ``query_hook`` is
            called with q in forward.
        every: steps from one set of figures to the next; 0 for none.
        probe: images whose keys are followed.
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
        self._warned = False

    def before(self, step: int) -> None:
        """Step ``step`` (from 1) is about to run: watch its queries if it is due."""
        if self._images is not None and step == self._next_probe:
            self._probes.append((step, self._probe_keys()))
        if self.due(step):
            self._query, self._grad, self._rows = None, None, 0
            self.model.query_hook = self._watch

    def after(self, step: int, im_k: Tensor, *, grad_scale: float | Tensor = 1.0) -> dict[str, float]:
        """The figures of a due step, else nothing. Call after the backward pass, before the model's update.

        Args:
            im_k: [N, ...] images as the key encoder takes them; those of the first call are probed from then on.
            grad_scale: what the loss was multiplied by before its backward pass (a scaler's factor, 1 / the number of
                accumulated batches); a 0-dim tensor is not fetched from its device.
        """
        if not self.due(step):
            return {}
        self.model.query_hook = None
        if self._query is None:
            raise RuntimeError(f"query_hook: expected a forward pass of the model between before({step}) and after")
        with torch.no_grad():
            figures = self._figures(step, im_k, grad_scale)
        self._query = self._grad = None
        self._warn_of_collapse(figures, step)
        return figures

    def due(self, step: int) -> bool:
        """Whether step ``step`` (from 1) is one whose figures are wanted."""
        return self.every > 0 and step % self.every == 0

    def _watch(self, query: Tensor) -> None:
        self._rows += len(query)
        if self._query is None:
            self._query = query.detach()
            if query.requires_grad:
                query.register_hook(self._keep_grad)

    def _keep_grad(self, grad: Tensor) -> None:
        self._grad = grad.detach()

    def _figures(self, step: int, im_k: Tensor, grad_scale: float | Tensor) -> dict[str, float]:
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
        # One copy to the host for everything; in float64, since squaring halves the digits of small singular values.
        rows = unit.double()
        gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
        values = torch.cat([gram.flatten(), torch.stack(list(on_device.values())).double()]).cpu()
        figures = dict(zip(on_device, values[gram.numel() :].tolist(), strict=True))
        figures["effective_rank"] = _effective_rank(values[: gram.numel()].view(gram.shape))
        if age is not None:
            figures["key_age"] = float(age)
        return {name: value for name, value in figures.items() if math.isfinite(value)}

    def _drift(self, step: int, im_k: Tensor, lifetime: float) -> tuple[int | None, Tensor]:
        """Encode the probe images anew: the age in steps of the oldest earlier keys in the queue, and their drift."""
        if self._images is None:
            self._images = im_k[: self.probe].clone()
        keys = self._probe_keys()
        while self._probes and step - self._probes[0][0] > lifetime:
            self._probes.popleft()
        age = step - self._probes[0][0] if self._probes else None
        drift = 1 - (keys * (self._probes[0][1] if self._probes else keys)).sum(1).mean()
        self._probes.append((step, keys))
        # Where keys do not live from one due step to the next, they are probed once more in between.
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

    def _warn_of_collapse(self, figures: dict[str, float], step: int) -> None:
        spread, rank = figures.get("feature_std", math.inf), figures.get("effective_rank", math.inf)
        if self._warned or (spread >= _COLLAPSED_STD and rank >= _COLLAPSED_RANK):
            return
        self._warned = True
        warnings.warn(
            f"features are collapsing: at step {step} the queries' spread is {spread:.3f} (about 1 is even, 0 is none) "
            f"and their effective rank {rank:.1f}",
            stacklevel=3,
        )


def _effective_negatives(unit: Tensor, queue: Tensor, temperature: float) -> Tensor:
    log_p = torch.log_softmax(unit @ queue.to(unit.dtype).T / temperature, dim=1)  # [<= 32, K]
    return (-(log_p.exp() * log_p).sum(1)).exp().mean()


def _effective_rank(gram: Tensor) -> float:
    """exp of the entropy of the normalized singular values of a matrix, from its Gram matrix; NaN where that is."""
    if not bool(gram.isfinite().all()):
        return math.nan
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    return torch.special.entr(singular / singular.sum()).sum().exp().item()
