"""What a person sees while it trains, and what is kept: a progress bar, JSON lines, TensorBoard."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class MetricLog:
    """One record an epoch, to ``metrics.jsonl`` and to TensorBoard's ``tensorboard/`` in the run directory.

    Records up to ``keep_epochs`` of a run that is resumed stay; later ones, which it will write anew, go.
    """

    def __init__(self, output: Path, keep_epochs: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = output / "metrics.jsonl"
        self.records = [record for record in read_metrics(self.path) if record["epoch"] <= keep_epochs]
        self.path.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        self._board = SummaryWriter(output / "tensorboard", purge_step=keep_epochs + 1)

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name != "epoch":
                self._board.add_scalar(name, value, record["epoch"])

    def close(self) -> None:
        self._board.close()


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


class TrainingProgress:
    """A bar over all steps of a run in a terminal; elsewhere (a log file, a pipe) one line an epoch.

    The loss stands beside log(K+1), that of a model that cannot tell the positive from the K negatives.
    """

    def __init__(self, console: Console, *, epochs: int, steps: int, done_epochs: int, K: int) -> None:
        self.console, self.epochs, self.steps = console, epochs, steps
        self._chance = math.log(K + 1)
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:3.0f}%"),
            TextColumn("{task.fields[figures]}"),
            TextColumn("eta"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
            expand=True,
        )
        self._task = self._bar.add_task(
            "train",
            total=epochs * steps,
            completed=done_epochs * steps,
            epoch=done_epochs,
            epochs=epochs,
            figures="",
        )

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def step(self, epoch: int, step: int, figures: dict[str, float] | None) -> None:
        """0-based ``step`` of 1-based ``epoch`` is done; ``figures`` are the epoch's so far, None to leave as is."""
        self._bar.update(self._task, completed=(epoch - 1) * self.steps + step + 1, epoch=epoch)
        if figures:
            self._bar.update(self._task, figures=self._format(figures))

    def epoch_done(self, record: dict[str, Any]) -> None:
        if not self.console.is_terminal:
            knn = f"  kNN {record['knn_top1']:.1f} %" if "knn_top1" in record else ""
            stamp = time.strftime("%H:%M:%S")
            line = f"{stamp}  epoch {record['epoch']}/{self.epochs}  {self._format(record)}{knn}"
            self.console.print(line, soft_wrap=True, highlight=False)

    def _format(self, figures: dict[str, float]) -> str:
        return (
            f"loss {figures['loss']:.3f} (chance {self._chance:.3f})  "
            f"acc@1 {figures['acc1']:.1f}  acc@5 {figures['acc5']:.1f}  {figures['images_per_second']:,.0f} images/s"
        )
