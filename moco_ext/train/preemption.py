"""SIGTERM: finish the step under way, save, stop."""

from __future__ import annotations

import contextlib
import signal
from typing import Any

import torch
import torch.distributed as dist

from .. import distributed


class Preemption:
    """Takes note of SIGTERM, so that the step under way is finished and saved."""

    name = "SIGTERM"

    def __init__(self) -> None:
        self._received = False

    def __enter__(self) -> Preemption:
        self._before: Any = None
        with contextlib.suppress(ValueError):  # signals belong to the main thread; elsewhere they are not ours
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def agreed(self, ask: bool) -> bool:
        """Whether to stop here. Several ranks ask each other, at steps where all of them ``ask``."""
        if distributed.world_size() == 1:
            return self._received
        if not ask:
            return False
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return bool(distributed.all_reduce(torch.tensor(float(self._received), device=device)).item())

    def _note(self, *_: Any) -> None:
        self._received = True
