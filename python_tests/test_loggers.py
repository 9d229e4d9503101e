"""Loggers: one interface, their files and services, failures, and runs that continue."""

import csv
import importlib.machinery
import io
import json
import sys
import types
import warnings
from typing import ClassVar

import pytest

pytest.importorskip("rich")

from rich.console import Console

from moco_ext.runs import loggers
from moco_ext.runs.loggers import LOGGERS, Logger, Loggers
from moco_ext.runs.metrics import RunLog
from moco_ext.runs.options import RunOptions


class Recorder(Logger):
    """Keeps the calls in ``made``; its service knows a run as "r" and its number."""

    made: ClassVar[list["Recorder"]] = []

    def __init__(self, output, config, run_id, done_steps):
        self.config, self.done_steps, self.calls = config, done_steps, []
        self.run_id = run_id or f"r{len(self.made)}"
        self.made.append(self)

    def log(self, step, metrics):
        self.calls.append((step, dict(metrics)))

    def flush(self):
        self.calls.append("flush")

    def close(self, failed):
        self.calls.append(("close", failed))


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setitem(LOGGERS, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "made", [])
    return Recorder.made


def open_log(folder, logger, *, done_steps=0, enabled=True):
    options = RunOptions(folder, print_freq=2, logger=logger, console=Console(file=io.StringIO()))
    config = {"lr": 0.1, "schedule": (3, 6), "arch": "resnet18"}
    return RunLog(
        folder, options, total_steps=8, steps_per_epoch=4, done_steps=done_steps, config=config, enabled=enabled
    )


def train(log, first=1, last=4):
    for step in range(first, last + 1):
        log.step(step, {"loss": float(step), "images": 8, "lr": 0.1})
    log.record({"step": last, "epoch": last / 4, "loss": 2.5, "knn_top1": None})


# --- the interface ------------------------------------------------------------------------------------------


def test_what_loggers_get(tmp_path, recorder):
    with open_log(tmp_path, "recorder") as log:
        train(log)
    (logger,) = recorder
    assert logger.config == {"lr": 0.1, "schedule": (3, 6), "arch": "resnet18"}
    assert [call[0] for call in logger.calls] == [2, 4, 4, "f", "close"]
    (_, at_2), _, (_, record), _, closed = logger.calls
    assert at_2.items() >= {"train/loss": 1.5, "train/lr": 0.1}.items()
    assert record == {"epoch/loss": 2.5}
    assert closed == ("close", False)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1  # always there


def test_a_logger_knows_that_a_run_failed(tmp_path, recorder):
    with pytest.raises(FloatingPointError), open_log(tmp_path, "recorder"):
        raise FloatingPointError
    assert recorder[0].calls == [("close", True)]


def test_only_a_resumed_run_continues_the_services_run(tmp_path, recorder):
    for done in (0, 4, 0):
        with open_log(tmp_path, "recorder", done_steps=done):
            pass
    assert [(logger.run_id, logger.done_steps) for logger in recorder] == [("r0", 0), ("r0", 4), ("r2", 0)]
    assert json.loads((tmp_path / "loggers.json").read_text()) == {"recorder": "r2"}


def test_other_ranks_log_nothing(tmp_path, recorder):
    with open_log(tmp_path, "recorder,csv", enabled=False) as log:
        train(log)
    assert recorder == []
    assert list(tmp_path.iterdir()) == []


def test_no_loggers(tmp_path):
    with open_log(tmp_path, "none") as log:
        train(log)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_failing_logger_is_reported_once_and_then_given_up(tmp_path, recorder, monkeypatch):
    tries = []

    def log(self, step, metrics):
        tries.append(step)
        if step not in (2, 20):
            raise ConnectionError("no network")

    monkeypatch.setattr(Recorder, "log", log)
    several = Loggers(["recorder", "csv"], tmp_path, {}, 0)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        for step in range(1, 40):
            several.log(step, {"train/loss": 1.0})
        several.close(failed=False)
    assert [str(warning.message) for warning in shown] == [
        "logger: recorder failed, training continues (5 failures in a row end the logging): no network"
    ]
    assert tries == [1, 2, 3, 4, 5, 6, 7]
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 40  # the other one goes on


def test_a_logger_that_cannot_start(tmp_path, recorder, monkeypatch):
    (tmp_path / "loggers.json").write_text('{"recorder": "kept"}')

    def refuse(self, *arguments):
        raise PermissionError("not logged in")

    monkeypatch.setattr(Recorder, "__init__", refuse)
    with pytest.warns(UserWarning, match="logger: recorder could not be started, .* not logged in"):
        log = open_log(tmp_path, "recorder,csv", done_steps=4)
    with log:
        train(log, 5, 8)
    assert json.loads((tmp_path / "loggers.json").read_text()) == {"recorder": "kept"}


def test_names_are_checked():
    with pytest.raises(
        ValueError, match=r"logger: expected none, or names .*: tensorboard, csv, .* got 'csv,tensorbord'"
    ):
        RunOptions("runs", logger="csv,tensorbord")


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_missing_package_is_named_before_the_run(name, monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=f"^logger: {name} needs {name}, which is not installed: pip install {name}$"):
        RunOptions("runs", logger=f"csv,{name}")


# --- metrics.csv --------------------------------------------------------------------------------------------


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_csv_has_a_column_for_each_metric(tmp_path):
    logger = LOGGERS["csv"](tmp_path, {}, None, 0)
    logger.log(2, {"train/loss": 1.5})
    logger.log(4, {"train/loss": 0.1 + 0.2, "train/lr": 0.03})
    logger.log(4, {"epoch/loss": 1.0})
    assert rows_of(tmp_path) == [
        {"step": 2, "train/loss": 1.5},
        {"step": 4, "train/loss": 0.1 + 0.2, "train/lr": 0.03},
        {"step": 4, "epoch/loss": 1.0},
    ]


def test_a_resumed_csv_drops_what_is_logged_again(tmp_path):
    logger = LOGGERS["csv"](tmp_path, {}, None, 0)
    for step in (2, 4, 6):
        logger.log(step, {"train/loss": 1.0 * step, "train/lr": 0.1})
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("8,")  # killed
    resumed = LOGGERS["csv"](tmp_path, {}, None, 5)
    resumed.log(6, {"train/loss": 6.0})
    expected = [{"step": s, "train/loss": 1.0 * s, "train/lr": 0.1} for s in (2, 4)]
    assert rows_of(tmp_path) == [*expected, {"step": 6, "train/loss": 6.0}]
    LOGGERS["csv"](tmp_path, {}, None, 0)
    assert rows_of(tmp_path) == []


@pytest.mark.parametrize(("per_epoch", "done_steps"), [(2, 2), (8, 8)])
def test_a_run_resumed_with_another_number_of_steps_an_epoch_keeps_its_points(
    tmp_path, recorder, per_epoch, done_steps
):
    """Those up to the checkpoint, which was saved at step 4: after epoch 1."""
    with open_log(tmp_path, "csv") as log:
        for step in range(1, 7):  # what follows the checkpoint is lost with the process
            log.step(step, {"loss": float(step), "images": 8})
            if step == 4:
                log.record({"step": 4, "epoch": 1, "loss": 2.5})
    assert [row["step"] for row in rows_of(tmp_path)] == [2, 4, 4, 6]
    options = RunOptions(tmp_path, logger="csv,recorder", console=Console(file=io.StringIO()))
    with RunLog(
        tmp_path, options, total_steps=2 * per_epoch, steps_per_epoch=per_epoch, done_steps=done_steps
    ) as resumed:
        assert [record["step"] for record in resumed.records] == [4]
    assert [row["step"] for row in rows_of(tmp_path)] == [2, 4, 4]
    assert recorder[0].done_steps == 4


# --- services -----------------------------------------------------------------------------------------------


def fake_module(monkeypatch, name, **content):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


def test_calls_to_wandb(tmp_path, monkeypatch):
    """Without the package; test_wandb_offline has it."""
    calls = []

    class Run:
        def define_metric(self, *arguments, **options):
            calls.append(("define", arguments, options))

        def log(self, metrics):
            calls.append(("log", metrics))

        def finish(self, exit_code):
            calls.append(("finish", exit_code))

    def init(**options):
        calls.append(("init", options))
        return Run()

    fake_module(monkeypatch, "wandb", init=init, Settings=lambda **options: options)
    monkeypatch.setenv("WANDB_PROJECT", "photos")
    for done in (0, 4):
        with open_log(tmp_path, "wandb", done_steps=done) as log:
            train(log, done + 1, done + 4)
    (_, first), (_, second) = (call for call in calls if call[0] == "init")
    assert first["id"] == second["id"]
    assert (first["project"], first["resume"], first["dir"]) == ("photos", "allow", str(tmp_path))
    assert first["config"]["lr"] == 0.1
    assert ("define", ("*",), {"step_metric": "step"}) in calls
    assert [call[1]["step"] for call in calls if call[0] == "log"] == [2, 4, 4, 6, 8, 8]
    assert [call for call in calls if call[0] == "finish"] == [("finish", 0)] * 2


@pytest.mark.slow
def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for done in (0, 4):
        with open_log(tmp_path, "wandb", done_steps=done) as log:
            train(log, done + 1, done + 4)
    run_id = json.loads((tmp_path / "loggers.json").read_text())["wandb"]
    files = list(tmp_path.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert files
    assert any(b"train/loss" in file.read_bytes() for file in files)


@pytest.mark.slow
def test_mlflow_in_a_local_store(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    for done in (0, 4):
        with open_log(tmp_path / "run", "mlflow", done_steps=done) as log:
            train(log, done + 1, done + 4)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("moco_ext")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params == {"lr": "0.1", "schedule": "(3, 6)", "arch": "resnet18"}
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(2, 1.5), (4, 3.5), (6, 5.5), (8, 7.5)]


@pytest.mark.slow
def test_trackio_in_its_local_store(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    pytest.importorskip("trackio")
    (tmp_path / "run").mkdir()
    for done in (0, 4):
        with open_log(tmp_path / "run", "trackio", done_steps=done) as log:
            train(log, done + 1, done + 4)
    from trackio.sqlite_storage import SQLiteStorage

    name = json.loads((tmp_path / "run" / "loggers.json").read_text())["trackio"]
    assert SQLiteStorage.get_runs("moco_ext") == [name]
    logged = SQLiteStorage.get_logs("moco_ext", name)
    assert [(row["step"], row["train/loss"]) for row in logged if "train/loss" in row] == [
        (2, 1.5),
        (4, 3.5),
        (6, 5.5),
        (8, 7.5),
    ]
