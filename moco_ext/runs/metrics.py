"""Metrics of a run: a progress bar, ``metrics.jsonl`` and TensorBoard."""

from __future__ import annotations

import collections
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from .files import write_atomically

_WINDOW = 50  # steps over which throughput and data loading time are averaged


class Averages:
    """Running means of metrics, weighted by images; each metric over the steps that reported it.

    The state is plain floats, so that a checkpoint can hold it and a resumed run arrives at the same means.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._images: dict[str, int] = {}

    def add(self, n: int, **metrics: float) -> None:
        """Add a step's ``metrics``, means over its ``n`` images."""
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + n * value
            self._images[name] = self._images.get(name, 0) + n

    def means(self) -> dict[str, float]:
        return {name: total / self._images[name] for name, total in self._sums.items() if self._images[name]}

    def clear(self) -> None:
        self._sums, self._images = {}, {}

    def state_dict(self) -> dict[str, dict[str, float]]:
        return {"sums": dict(self._sums), "images": dict(self._images)}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        self._sums = dict(state["sums"])
        self._images = {name: int(n) for name, n in state["images"].items()}


class RunLog:
    """Logs a run to ``metrics.jsonl``, TensorBoard and the console; a context manager.

    A terminal shows a progress bar with the current metrics below it; a log file or a pipe gets one line per record.

    Args:
        output: run directory, for ``metrics.jsonl`` and ``tensorboard/``.
        total_steps: steps of the whole run. Progress is shown in epochs if this is a whole number of them, else in
            steps.
        done_steps: steps completed before a resumed run starts. Earlier records are kept, later ones dropped, since the
            run writes them again.
        chance_loss: loss of a model that cannot tell the positive from the negatives, log(K + 1); shown next to the
            loss.
        print_freq: steps between metrics in the terminal and in TensorBoard.
        enabled: False on ranks other than 0, which show, read and write nothing.

    Attributes:
        records: the content of ``metrics.jsonl``, one dictionary per line.
    """

    def __init__(
        self,
        output: Path,
        console: Console,
        *,
        total_steps: int,
        steps_per_epoch: int,
        done_steps: int = 0,
        chance_loss: float | None = None,
        print_freq: int = 10,
        enabled: bool = True,
    ) -> None:
        self.records: list[dict[str, Any]] = []
        self._enabled, self._console, self._chance_loss, self._print_freq = enabled, console, chance_loss, print_freq
        self._total, self._per_epoch = total_steps, steps_per_epoch
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._path = output / "metrics.jsonl"
        self.records = [r for r in read_metrics(self._path) if self._step_of(r) <= done_steps]
        kept = "".join(json.dumps(record) + "\n" for record in self.records)
        write_atomically(self._path, lambda file: file.write(kept.encode()))
        self._board = SummaryWriter(output / "tensorboard", purge_step=done_steps + 1)

        self._averages = Averages()
        self._window: collections.deque[tuple[float, int, float]] = collections.deque(maxlen=_WINDOW)
        self._last = time.perf_counter()
        self._knn = next((r["knn_top1"] for r in reversed(self.records) if "knn_top1" in r), None)
        self._bar = _Bar(
            TextColumn("{task.fields[position]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:3.0f} %"),
            TextColumn("eta"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
            expand=True,
            speed_estimate_period=300,  # a step may take longer than rich's 30 s
        )
        position = self._position(done_steps)
        self._task = self._bar.add_task("train", total=total_steps, completed=done_steps, position=position)

    def __enter__(self) -> RunLog:
        if self._enabled:
            self._bar.start()
            self._last = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._enabled:
            self._bar.stop()
            self._board.close()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Log a step.

        Args:
            step: number of the step, from 1.
            metrics: ``images``, processed by all ranks in this step; ``wait``, seconds spent waiting for them; ``lr``;
                and, where they are known, ``loss``, ``acc1``, ``acc5`` and any others, means over the images.
        """
        if not self._enabled:
            return
        now = time.perf_counter()
        images = int(metrics["images"])
        self._window.append((now - self._last, images, metrics.get("wait", 0.0)))
        self._last = now
        self._averages.add(images, **{name: v for name, v in metrics.items() if name not in ("images", "wait")})
        if step % self._print_freq and step != self._total:
            self._bar.update(self._task, completed=step)
            return
        shown = self._averages.means() | self._speed()
        self._averages.clear()
        for name, value in shown.items():
            self._board.add_scalar(f"train/{name}", value, step)
        self._bar.metrics = Text(self._line(shown | {"knn_top1": self._knn}), style="dim")
        self._bar.update(self._task, completed=step, position=self._position(step))

    def record(self, record: dict[str, Any]) -> None:
        """Write a record: ``epoch`` (from 1; a fraction within an epoch), ``step``, and means since the last record.

        NaN and infinity, which JSON does not have, are written as null.
        """
        if not self._enabled:
            return
        record = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in record.items()}
        self.records.append(record)
        with open(self._path, "a") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name not in ("step", "epoch") and value is not None:
                self._board.add_scalar(f"epoch/{name}", value, self._step_of(record))
        self._board.flush()
        self._knn = record.get("knn_top1", self._knn)
        if not self._console.is_terminal:
            position = self._position(self._step_of(record))
            line = f"{time.strftime('%H:%M:%S')}  {position}  {self._line(record)}"
            self._console.print(line, soft_wrap=True, highlight=False)
        self._last = time.perf_counter()  # an evaluation before the record does not count as time of the next step

    def _step_of(self, record: dict[str, Any]) -> int:
        return record.get("step", round(record["epoch"] * self._per_epoch))

    def _position(self, step: int) -> str:
        if self._total % self._per_epoch:
            return f"step {step:,}/{self._total:,}"
        return f"epoch {math.ceil(step / self._per_epoch):,}/{self._total // self._per_epoch:,}"

    def _speed(self) -> dict[str, float]:
        seconds, images, wait = (sum(column) for column in zip(*self._window, strict=True))
        return {"images_per_second": images / seconds, "wait": min(1.0, wait / seconds)}

    def _line(self, metrics: Mapping[str, Any]) -> str:
        chance = "" if self._chance_loss is None else f" (chance {self._chance_loss:.2f})"
        formats = {
            "loss": lambda v: f"loss {v:.3f}{chance}",
            "acc1": lambda v: f"acc@1 {v:.1f}",
            "acc5": lambda v: f"acc@5 {v:.1f}",
            "val_acc1": lambda v: f"val acc@1 {v:.2f} %",
            "val_acc5": lambda v: f"val acc@5 {v:.2f} %",
            "images_per_second": lambda v: f"{v:,.0f} images/s" if v >= 10 else f"{v:.2f} images/s",
            "wait": lambda v: f"wait {100 * v:.0f} %",
            "knn_top1": lambda v: f"kNN {v:.1f} %",
        }
        return "  ".join(text(metrics[name]) for name, text in formats.items() if metrics.get(name) is not None)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, none if there is no such file. A truncated last line is ignored."""
    if not Path(path).is_file():
        return []
    records = []
    for line in Path(path).read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class _Bar(Progress):
    """A progress bar with the metrics on a second line: 80 columns cannot hold both."""

    metrics = Text()

    def get_renderables(self):
        yield from super().get_renderables()
        yield self.metrics
