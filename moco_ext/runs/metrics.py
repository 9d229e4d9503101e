"""Metrics of a run: progress on the console, ``metrics.jsonl`` and loggers."""

from __future__ import annotations

import collections
import json
import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from .console import clock, duration
from .files import write_atomically
from .loggers import Loggers, logger_names
from .options import RunOptions

_REFRESH = 2.0  # seconds between metrics in a terminal, if steps take long
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
    """Logs a run to ``metrics.jsonl``, loggers and the console; a context manager.

    A terminal shows a progress bar with the current metrics below it. A log file or a pipe gets a line after the first
    step, then one every ``options.log_seconds`` and one per record, with an estimate of the end.

    Args:
        output: run directory, for ``metrics.jsonl`` and the files of loggers.
        options: console, loggers, and how often metrics are logged.
        total_steps: steps of the whole run. Progress is shown in epochs if this is a whole number of them, else in
            steps.
        done_steps: steps completed before a resumed run starts. Earlier records are kept, later ones dropped, since the
            run writes them again.
        chance_loss: loss of a model that cannot tell the positive from the negatives, log(K + 1); shown next to the
            loss.
        config: settings of the run, which some loggers show.
        enabled: False on ranks other than 0, which show, read and write nothing.

    Attributes:
        records: the content of ``metrics.jsonl``, one dictionary per line.
    """

    def __init__(
        self,
        output: Path,
        options: RunOptions,
        *,
        total_steps: int,
        steps_per_epoch: int,
        done_steps: int = 0,
        chance_loss: float | None = None,
        config: Mapping[str, Any] | None = None,
        enabled: bool = True,
    ) -> None:
        self.records: list[dict[str, Any]] = []
        self._enabled, self._options, self._console = enabled, options, options.console
        self._chance_loss, self._total, self._per_epoch = chance_loss, total_steps, steps_per_epoch
        if not enabled:
            return
        self._path = output / "metrics.jsonl"
        self.records = [r for r in read_metrics(self._path) if self._step_of(r) <= done_steps]
        kept = "".join(json.dumps(record) + "\n" for record in self.records)
        write_atomically(self._path, lambda file: file.write(kept.encode()))
        logged_steps = done_steps
        if self.records and self._step_of(self.records[-1]) == done_steps:
            # In the numbers that the loggers know: an epoch may have had another number of steps.
            logged_steps = max(record.get("step", done_steps) for record in self.records)
        self._loggers = Loggers(logger_names(options.logger), output, config or {}, logged_steps)

        self._averages, self._line_averages = Averages(), Averages()
        self._window: collections.deque[tuple[float, int, float]] = collections.deque(maxlen=_WINDOW)
        self._last = self._started = self._shown = time.perf_counter()
        self._done_before = done_steps
        self._first_step: float | None = None  # its seconds
        self._knn = next((r["knn_top1"] for r in reversed(self.records) if "knn_top1" in r), None)
        self._stepping = threading.Event()  # set once a first step is done, or the run has ended
        self._bar = _Bar(
            SpinnerColumn(),
            TextColumn("{task.fields[position]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:3.0f} %"),
            TextColumn("eta"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not self._console.is_terminal,
            expand=True,
            speed_estimate_period=300,  # a step may take longer than rich's 30 s
        )
        self._bar.metrics = Text("first step", style="dim")  # it may take a while
        position = self._position(min(done_steps + 1, total_steps))
        self._task = self._bar.add_task("train", total=total_steps, completed=done_steps, position=position)

    def __enter__(self) -> RunLog:
        if self._enabled:
            self._bar.start()
            self._last = self._started = self._shown = time.perf_counter()
            if not self._console.is_terminal and self._options.log_seconds:
                threading.Thread(target=self._wait_for_first_step, daemon=True).start()
        return self

    def _wait_for_first_step(self) -> None:
        """A large model can take minutes for it on a CPU."""
        began = time.monotonic()
        while not self._stepping.wait(self._options.log_seconds):
            self._print(f"first step: {duration(time.monotonic() - began)} so far")

    def __exit__(self, *exception: object) -> None:
        if self._enabled:
            self._stepping.set()
            self._bar.stop()
            self._loggers.close(failed=exception[0] is not None)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Log a step.

        Args:
            step: number of the step, from 1.
            metrics: ``images``, processed by all ranks in this step; ``wait``, seconds spent waiting for them; ``lr``;
                and, where they are known, ``loss``, ``acc1``, ``acc5`` and any others, means over the images.
        """
        if not self._enabled:
            return
        self._stepping.set()
        now = time.perf_counter()
        images = int(metrics["images"])
        self._window.append((now - self._last, images, metrics.get("wait", 0.0)))
        self._last = now
        means = {name: value for name, value in metrics.items() if name not in ("images", "wait")}
        self._averages.add(images, **means)
        self._line_averages.add(images, **means)
        if step % self._options.print_freq == 0 or step == self._total:
            self._loggers.log(step, _named("train", self._averages.means() | self._speed()))
            self._averages.clear()
        self._show(step, now, metrics.get("wait", 0.0))

    def _show(self, step: int, now: float, waited: float) -> None:
        first = self._first_step is None
        if first:  # it waits for loader processes to start
            self._first_step, self._started = now - self._started - waited, now
        terminal, seconds = self._console.is_terminal, self._options.log_seconds
        position = self._position(step)
        if terminal:
            self._bar.update(self._task, completed=step, position=position)
            due = first or step % self._options.print_freq == 0 or step == self._total or now - self._shown >= _REFRESH
        else:
            due = seconds > 0 and (first or now - self._shown >= seconds)
        if not due:
            return
        line = self._line(self._line_averages.means() | self._speed() | {"knn_top1": self._knn})
        if terminal:
            self._bar.metrics = Text(line, style="dim")
        else:
            if self._total % self._per_epoch == 0:
                position += f"  step {step:,}/{self._total:,}"
            per_step = sum(seconds for seconds, *_ in self._window) / len(self._window)
            self._print(f"{position}  {line}  {per_step:.2f} s/step{self._remaining(step, now)}")
        self._line_averages.clear()
        self._shown = now

    def record(self, record: dict[str, Any]) -> None:
        """Write a record: ``epoch`` (from 1; a fraction within an epoch), ``step``, and means since the last record.

        NaN and infinity, which JSON does not have, are written as null.

        Raises:
            OSError: ``metrics.jsonl`` cannot be written; the message names it.
        """
        if not self._enabled:
            return
        record = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in record.items()}
        self.records.append(record)
        try:
            with open(self._path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:  # of a write, which names no file
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        step = self._step_of(record)
        values = {name: v for name, v in record.items() if name not in ("step", "epoch") and v is not None}
        self._loggers.log(step, _named("epoch", values))
        self._loggers.flush()
        self._knn = record.get("knn_top1", self._knn)
        self._last = time.perf_counter()  # an evaluation before the record does not count as time of the next step
        if not self._console.is_terminal:
            self._print(f"{self._position(step)}  {self._line(record)}{self._remaining(step, self._last)}")
            self._line_averages.clear()
            self._shown = self._last

    def _print(self, line: str) -> None:
        self._console.print(f"{time.strftime('%H:%M:%S')}  {line}", soft_wrap=True, highlight=False)

    def _remaining(self, step: int, now: float) -> str:
        """Estimated time to the last step, and its time of day; evaluations so far included."""
        if step >= self._total or self._first_step is None:
            return ""
        later = step - self._done_before - 1  # the first step also starts libraries
        seconds = (self._total - step) * ((now - self._started) / later if later > 0 else self._first_step)
        return f"  eta {duration(seconds)} ({clock(time.time() + seconds)})"

    def _step_of(self, record: dict[str, Any]) -> int:
        epoch = record["epoch"]
        if isinstance(epoch, int):  # its number of steps may have changed since
            return epoch * self._per_epoch
        return record.get("step", round(epoch * self._per_epoch))

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
            "AP": lambda v: f"AP {v:.2f} %",
            "AP50": lambda v: f"AP50 {v:.2f} %",
            "mIoU": lambda v: f"mIoU {v:.2f} %",
            "images_per_second": lambda v: f"{v:,.0f} images/s" if v >= 10 else f"{v:.2f} images/s",
            "wait": lambda v: f"wait {100 * v:.0f} %",
            "knn_top1": lambda v: f"kNN {v:.1f} %",
        }
        return "  ".join(text(metrics[name]) for name, text in formats.items() if metrics.get(name) is not None)


def _named(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


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
