"""Where metrics go besides ``metrics.jsonl``: TensorBoard, a CSV file, Weights & Biases, MLflow, Trackio."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import read_json, write_atomically, write_json

_PROJECT = "moco_ext"
_IDS = "loggers.json"  # the runs' names at the services, so that a resumed run goes on there
_PATIENCE = 5  # failures in a row


class Logger:
    """Sends a run's metrics somewhere. Add a subclass to :data:`LOGGERS`, and ``--logger NAME`` selects it.

    Args:
        output: run directory.
        config: settings of the run.
        run_id: of the run to continue; None: a new run.
        done_steps: steps completed before a resumed run starts; later ones will be logged again.

    Attributes:
        package: module that the logger needs.
        run_id: name of the run at a service; None: it needs none.
    """

    package = ""
    run_id: str | None = None

    def __init__(self, output: Path, config: Mapping[str, Any], run_id: str | None, done_steps: int) -> None:
        raise NotImplementedError

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics of 1-based ``step``. Names begin with ``train/`` or, of a record, with ``epoch/``."""
        raise NotImplementedError

    def flush(self) -> None:
        """Write what a killed run should not lose; called at each record."""

    def close(self, failed: bool) -> None:
        """End the run; ``failed``: by an error or a signal."""


class TensorBoard(Logger):
    """Event files in ``tensorboard/``."""

    package = "tensorboard"

    def __init__(self, output: Path, config: Mapping[str, Any], run_id: str | None, done_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(output / "tensorboard", purge_step=done_steps + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class Csv(Logger):
    """``metrics.csv``: a row per call of ``log``, a column per metric."""

    def __init__(self, output: Path, config: Mapping[str, Any], run_id: str | None, done_steps: int) -> None:
        self._path = output / "metrics.csv"
        self._columns = ["step"]
        rows: list[dict[str, Any]] = []
        if done_steps and self._path.is_file():
            with open(self._path, newline="") as file:
                reader = csv.DictReader(file)
                # A killed run may have left half a row.
                rows = [row for row in reader if None not in row.values() and int(row["step"]) <= done_steps]
                self._columns = list(reader.fieldnames or self._columns)
        self._rewrite(rows)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        new = [name for name in metrics if name not in self._columns]
        if new:
            with open(self._path, newline="") as file:
                rows = list(csv.DictReader(file))
            self._columns += new
            self._rewrite(rows)
        with open(self._path, "a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow({"step": step, **metrics})

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self._path, lambda file: file.write(text.getvalue().encode()))


class WandB(Logger):
    """Weights & Biases, with the modes and names of its environment variables; its files are in ``wandb/``."""

    package = "wandb"

    def __init__(self, output: Path, config: Mapping[str, Any], run_id: str | None, done_steps: int) -> None:
        import wandb

        self.run_id = run_id or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=os.environ.get("WANDB_NAME", output.name),
            id=self.run_id,
            resume="allow",
            dir=str(output),
            config=dict(config),
            settings=wandb.Settings(console="off"),
        )
        # A resumed run repeats steps, which W&B's own step counter does not allow.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow(Logger):
    """MLflow, at ``MLFLOW_TRACKING_URI`` or in its local store in the current folder."""

    package = "mlflow"

    def __init__(self, output: Path, config: Mapping[str, Any], run_id: str | None, done_steps: int) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self._client.get_experiment_by_name(name)
        if run_id is None:
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            run_id = self._client.create_run(experiment, run_name=output.name).info.run_id
            params = [Param(name, str(value)) for name, value in config.items()]
            self._client.log_batch(run_id, params=params)
        else:
            self._client.update_run(run_id, status="RUNNING")
        self.run_id: str = run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        points = [Metric(name, float(value), now, step) for name, value in metrics.items()]
        self._client.log_batch(self.run_id, metrics=points)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


class Trackio(Logger):
    """Trackio, in its local store."""

    package = "trackio"

    def __init__(self, output: Path, config: Mapping[str, Any], run_id: str | None, done_steps: int) -> None:
        import trackio

        self.run_id = run_id or f"{output.name}-{uuid.uuid4().hex[:8]}"
        project = os.environ.get("TRACKIO_PROJECT", _PROJECT)
        self._run = trackio.init(project=project, name=self.run_id, config=dict(config), resume="allow")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish()


LOGGERS: dict[str, type[Logger]] = {
    "tensorboard": TensorBoard,
    "csv": Csv,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def logger_names(text: str) -> list[str]:
    """The names in a comma-separated list; ``"none"``: no names."""
    return [] if text == "none" else [name.strip() for name in text.split(",")]


def check_installed(text: str) -> None:
    """Raise a ValueError if the package of a logger is missing."""
    for name in logger_names(text):
        package = LOGGERS[name].package
        if package and importlib.util.find_spec(package) is None:
            raise ValueError(f"logger: {name} needs {package}, which is not installed: pip install {package}")


class Loggers:
    """Several loggers. One that fails is no reason to end a run: it is reported once, and given up if it keeps failing.

    Args:
        names: of :data:`LOGGERS`.
        output: as for :class:`Logger`, like ``config`` and ``done_steps``.
    """

    def __init__(self, names: Sequence[str], output: Path, config: Mapping[str, Any], done_steps: int) -> None:
        self._loggers: dict[str, Logger] = {}
        self._failures = dict.fromkeys(names, 0)  # in a row
        self._reported: set[str] = set()
        known = read_json(output / _IDS) if done_steps else {}
        for name in names:
            try:
                self._loggers[name] = LOGGERS[name](output, config, known.get(name), done_steps)
            except ImportError:
                raise
            except Exception as error:
                warnings.warn(
                    f"logger: {name} could not be started, the run is not logged there: {error}", stacklevel=3
                )
        ids = known | {name: logger.run_id for name, logger in self._loggers.items() if logger.run_id}
        if ids:
            write_json(output / _IDS, ids)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._each("log", step, metrics)

    def flush(self) -> None:
        self._each("flush")

    def close(self, failed: bool) -> None:
        self._each("close", failed)

    def _each(self, method: str, *arguments: Any) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                getattr(logger, method)(*arguments)
            except Exception as error:
                self._failed(name, error)
            else:
                if method == "log":
                    self._failures[name] = 0

    def _failed(self, name: str, error: Exception) -> None:
        if name not in self._reported:
            self._reported.add(name)
            warnings.warn(
                f"logger: {name} failed, training continues ({_PATIENCE} failures in a row end the logging): {error}",
                stacklevel=5,
            )
        self._failures[name] += 1
        if self._failures[name] == _PATIENCE:
            del self._loggers[name]
