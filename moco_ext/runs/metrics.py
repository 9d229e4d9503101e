"""What a person sees while it trains, and what is kept: a progress bar, JSON lines, TensorBoard."""

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

_WINDOW = 50  # steps over which the speed and the wait for data are taken


class Averages:
    """Image-weighted running means of figures, each over the steps that had it.

    Its state is plain floats, so that it travels in a checkpoint and a resumed run goes on to the same means.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._images: dict[str, int] = {}

    def add(self, n: int, **figures: float) -> None:
        """Take in a step's ``figures``, means over its ``n`` images."""
        for name, value in figures.items():
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
    """A run's ``metrics.jsonl``, TensorBoard events and progress; a context manager.

    In a terminal, a bar over all steps and a line of figures; elsewhere (a log file, a pipe) a line a record. The loss
    stands beside ``chance``, that of a model that cannot tell the positive from the negatives: log(K + 1).

    Args:
        output: the run directory; gets ``metrics.jsonl`` and ``tensorboard/``.
        total_steps: of the whole run. If it is a whole number of epochs, progress counts epochs, else steps.
        done_steps: those behind a run that is resumed. Records up to there stay; later ones, which it will write anew,
            go.
        chance: in nats.
        print_freq: steps from one set of figures to the next, in the terminal and in TensorBoard.
        enabled: False on ranks other than 0, where nothing is shown, read or written.

    Attributes:
        records: what ``metrics.jsonl`` holds, one dictionary a line.
    """

    def __init__(
        self,
        output: Path,
        console: Console,
        *,
        total_steps: int,
        steps_per_epoch: int,
        done_steps: int = 0,
        chance: float | None = None,
        print_freq: int = 10,
        enabled: bool = True,
    ) -> None:
        self.records: list[dict[str, Any]] = []
        self._enabled, self._console, self._chance, self._print_freq = enabled, console, chance, print_freq
        self._total, self._per_epoch = total_steps, steps_per_epoch
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._path = output / "metrics.jsonl"
        self.records = [r for r in read_metrics(self._path) if self._step_of(r) <= done_steps]
        kept = "".join(json.dumps(record) + "\n" for record in self.records)
        write_atomically(self._path, lambda file: file.write(kept.encode()))
        self._board = SummaryWriter(output / "tensorboard", purge_step=done_steps + 1)

        self._figures = Averages()
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

    def step(self, step: int, figures: dict[str, float]) -> None:
        """A step is done.

        Args:
            step: counted from 1.
            figures: floats. ``images``, of all ranks in this step; ``wait``, seconds this step waited for its images;
                ``lr``; and, where they are known, ``loss``, ``acc1``, ``acc5`` and any others, means over the images.
        """
        if not self._enabled:
            return
        now = time.perf_counter()
        images = int(figures["images"])
        self._window.append((now - self._last, images, figures.get("wait", 0.0)))
        self._last = now
        self._figures.add(images, **{name: v for name, v in figures.items() if name not in ("images", "wait")})
        if step % self._print_freq and step != self._total:
            self._bar.update(self._task, completed=step)
            return
        shown = self._figures.means() | self._speed()
        self._figures.clear()
        for name, value in shown.items():
            self._board.add_scalar(f"train/{name}", value, step)
        self._bar.figures = Text(self._line(shown | {"knn_top1": self._knn}), style="dim")
        self._bar.update(self._task, completed=step, position=self._position(step))

    def record(self, record: dict[str, Any]) -> None:
        """Keep a record: ``epoch`` (from 1; a fraction within an epoch), ``step``, and averages since the one before.

        A figure that is not finite is kept as null: JSON has no word for it.
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
        self._last = time.perf_counter()  # an evaluation before the record is not part of the next step

    def _step_of(self, record: dict[str, Any]) -> int:
        return record.get("step", round(record["epoch"] * self._per_epoch))

    def _position(self, step: int) -> str:
        if self._total % self._per_epoch:
            return f"step {step:,}/{self._total:,}"
        return f"epoch {math.ceil(step / self._per_epoch):,}/{self._total // self._per_epoch:,}"

    def _speed(self) -> dict[str, float]:
        seconds, images, wait = (sum(column) for column in zip(*self._window, strict=True))
        return {"images_per_second": images / seconds, "wait": min(1.0, wait / seconds)}

    def _line(self, figures: Mapping[str, Any]) -> str:
        chance = "" if self._chance is None else f" (chance {self._chance:.2f})"
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
        return "  ".join(text(figures[name]) for name, text in formats.items() if figures.get(name) is not None)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; none if there is no such file. A last line cut short is left out."""
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
    """The bar with a line of its own for the figures, which would leave it no room in 80 columns."""

    figures = Text()

    def get_renderables(self):
        yield from super().get_renderables()
        yield self.figures
