"""What a run shows and keeps: records, TensorBoard, progress."""

import io
import json
import re
import time
from pathlib import Path

import pytest

pytest.importorskip("tensorboard")

from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moco_ext.runs.console import duration, make_console, phase
from moco_ext.runs.metrics import Averages, RunLog, read_metrics
from moco_ext.runs.options import RunOptions


def open_log(folder, *, terminal=False, width=200, print_freq=10, log_seconds=30.0, logger="tensorboard", **arguments):
    """A log over 3 epochs of 10 steps that writes to a buffer, and the buffer."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)
    options = RunOptions(folder, print_freq=print_freq, log_seconds=log_seconds, logger=logger, console=console)
    arguments = {"total_steps": 30, "steps_per_epoch": 10, "chance_loss": 4.615} | arguments
    return RunLog(folder, options, **arguments), console.file


def scalars(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def figures(loss=2.0, images=32, wait=0.0, **others):
    return {"loss": loss, "acc1": 50.0, "acc5": 75.0, "images": images, "wait": wait, "lr": 0.1, **others}


# --- averages -----------------------------------------------------------------------------------------------


def test_averages_are_weighted_by_images():
    averages = Averages()
    averages.add(32, loss=1.0, acc1=10.0)
    averages.add(8, loss=6.0)
    assert averages.means() == {"loss": 2.0, "acc1": 10.0}  # (32 + 48) / 40; only the steps that had it
    averages.clear()
    assert averages.means() == {}


def test_averages_go_on_from_their_state():
    through, halves = Averages(), Averages()
    for n, loss in ((32, 0.1), (31, 0.7), (5, 1.3)):
        through.add(n, loss=loss)
        halves.add(n, loss=loss)
        state = json.loads(json.dumps(halves.state_dict()))  # plain enough for any file
        halves = Averages()
        halves.load_state_dict(state)
    assert halves.means() == through.means()  # to the last bit
    assert halves.state_dict() == through.state_dict()


# --- metrics.jsonl ------------------------------------------------------------------------------------------


def test_records_are_kept(tmp_path):
    log, _ = open_log(tmp_path)
    records = [{"step": 10 * e, "epoch": e, "loss": 1.5 / e} for e in (1, 2)]
    with log:
        for number, record in enumerate(records, 1):
            log.record(record)
            assert read_metrics(tmp_path / "metrics.jsonl") == records[:number]  # at once: a killed run has it
    assert log.records == records


def test_a_resumed_run_drops_what_it_does_anew(tmp_path):
    lines = [{"step": 5, "epoch": 0.5}, {"step": 10, "epoch": 1}, {"step": 15, "epoch": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"ste')
    with open_log(tmp_path, done_steps=12)[0] as log:
        assert log.records == lines[:2] == read_metrics(tmp_path / "metrics.jsonl")
        log.record({"step": 15, "epoch": 1.5, "loss": 1.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [*lines[:2], {"step": 15, "epoch": 1.5, "loss": 1.0}]


def test_a_fresh_run_keeps_nothing_of_another(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "epoch": 1}\n')
    assert open_log(tmp_path)[0].records == []
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_records_without_steps_count_by_epochs(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')
    assert open_log(tmp_path, done_steps=10)[0].records == [{"epoch": 1}]


def test_what_is_not_finite_is_null(tmp_path):
    log, _ = open_log(tmp_path)
    with log:
        log.record({"step": 10, "epoch": 1, "loss": float("nan"), "acc1": float("inf")})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 10, "epoch": 1, "loss": null, "acc1": null}\n'  # NaN would be no JSON
    assert log.records == read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_a_full_disk_is_said_where_it_is(tmp_path):
    log, _ = open_log(tmp_path)
    log._path = Path("/dev/full")
    with log, pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        log.record({"epoch": 1, "step": 10, "loss": 1.0})


def test_no_metrics_file(tmp_path):
    assert read_metrics(tmp_path / "none.jsonl") == []


# --- TensorBoard --------------------------------------------------------------------------------------------


def test_tensorboard_has_means_since_the_last_point(tmp_path):
    log, _ = open_log(tmp_path, print_freq=4, total_steps=10)
    with log:
        for step in range(1, 11):
            log.step(step, figures(loss=float(step), images=30 if step == 10 else 10))
        log.record({"step": 10, "epoch": 1, "loss": 5.5, "knn_top1": 80.0})
    found = scalars(tmp_path)
    assert found["train/loss"] == [(4, 2.5), (8, 6.5), (10, (9 * 10 + 10 * 30) / 40)]
    assert found["epoch/loss"] == [(10, 5.5)]
    assert found["epoch/knn_top1"] == [(10, 80.0)]
    assert {"train/acc1", "train/acc5", "train/lr", "train/images_per_second", "train/wait"} <= found.keys()
    assert not {"train/images", "epoch/step", "epoch/epoch"} & found.keys()


def test_figures_that_only_some_steps_have(tmp_path):
    """A step that did not fetch its loss, and a figure of a step between two points."""
    log, _ = open_log(tmp_path, print_freq=4)
    with log:
        for step in range(1, 5):
            log.step(step, {"images": 10, "lr": 0.1} | ({"loss": 3.0, "query_norm": 7.0} if step == 3 else {}))
    found = scalars(tmp_path)
    assert found["train/loss"] == [(4, 3.0)]
    assert found["train/query_norm"] == [(4, 7.0)]


def test_speed_and_wait(tmp_path, monkeypatch):
    """By a clock of our own: 100 images in 2 s, a quarter of it waiting; an evaluation of 1,000 s is no training."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    log, _ = open_log(tmp_path, print_freq=1)
    with log:
        for step in (1, 2):
            now[0] += 2.0
            log.step(step, figures(images=100, wait=0.5))
        now[0] += 1000.0
        log.record({"step": 2, "epoch": 0.2})
        now[0] += 2.0
        log.step(3, figures(images=100, wait=0.5))
    found = scalars(tmp_path)
    assert found["train/images_per_second"] == [(1, 50.0), (2, 50.0), (3, 50.0)]
    assert found["train/wait"] == [(1, 0.25), (2, 0.25), (3, 0.25)]


# --- what is shown ------------------------------------------------------------------------------------------


def test_a_line_a_record_where_there_is_no_terminal(tmp_path):
    log, out = open_log(tmp_path, log_seconds=0)
    with log:
        for step in range(1, 11):
            log.step(step, figures())
        assert out.getvalue() == ""
        log.record({"step": 10, "epoch": 1, "loss": 2.0, "acc1": 50.0, "acc5": 75.0, "images_per_second": 1234.5})
        log.record({"step": 20, "epoch": 2, "loss": 1.0, "knn_top1": 81.25})
    first, second = out.getvalue().splitlines()
    line = r"\d\d:\d\d:\d\d  epoch 1/3  loss 2\.000 \(chance 4\.62\)  acc@1 50\.0  acc@5 75\.0  1,234 images/s"
    eta = r"  eta \d+ s \(\d\d:\d\d\)"
    assert re.fullmatch(line + eta, first)
    assert re.fullmatch(rf"\d\d:\d\d:\d\d  epoch 2/3  loss 1\.000 \(chance 4\.62\)  kNN 81\.2 %{eta}", second)


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, in a list, as the log sees it: it starts on 2026-11-26, 12:00."""
    now = [0.0]
    noon = time.mktime((2026, 11, 26, 12, 0, 0, 0, 0, -1))
    local = time.localtime
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: noon + now[0])
    monkeypatch.setattr(time, "localtime", lambda seconds=None: local(noon + now[0] if seconds is None else seconds))
    return now


def test_lines_by_time_where_there_is_no_terminal(tmp_path, clock):
    """Steps of 12 s after a first one of 20 s: a line after it, then one at every third step, with means since then."""
    log, out = open_log(tmp_path, total_steps=1000, steps_per_epoch=100)
    with log:
        for step in range(1, 9):
            clock[0] += 20 if step == 1 else 12
            log.step(step, figures(loss=float(step)))
    first, *others = (line.split("  ", 1)[1] for line in out.getvalue().splitlines())
    assert first == (
        "epoch 1/10  step 1/1,000  loss 1.000 (chance 4.62)  acc@1 50.0  acc@5 75.0  1.60 images/s  wait 0 %  "
        "20.00 s/step  eta 5 h 33 min (17:33)"
    )
    assert [line.split("  ")[1:3] for line in others] == [
        ["step 4/1,000", "loss 3.000 (chance 4.62)"],
        ["step 7/1,000", "loss 6.000 (chance 4.62)"],
    ]
    assert others[-1].endswith("  eta 3 h 19 min (15:20)")  # 993 steps of 12 s; the first one tells little


def test_a_long_first_step_is_not_silent(tmp_path):
    log, out = open_log(tmp_path, log_seconds=0.05)
    with log:
        time.sleep(0.4)
        assert re.search(r"^\d\d:\d\d:\d\d  first step: 0 s so far\n", out.getvalue())
        log.step(1, figures())
    lines = out.getvalue()
    time.sleep(0.2)
    assert out.getvalue() == lines


def test_the_estimate_has_evaluations_and_a_date(tmp_path, clock):
    log, out = open_log(tmp_path, total_steps=4000, steps_per_epoch=100, done_steps=1000)
    with log:
        for step in range(1001, 1101):
            clock[0] += 30
            log.step(step, figures())
        clock[0] += 99 * 30  # an evaluation
        log.record({"step": 1100, "epoch": 11, "loss": 1.0})
    assert (
        out.getvalue().splitlines()[-1].endswith("  epoch 11/40  loss 1.000 (chance 4.62)  eta 2 d 0 h (Nov 28, 13:59)")
    )


def test_a_path_is_printed_as_it_is(capsys):
    make_console().print("runs/[old]:smile:[/x]")
    assert capsys.readouterr().out == "runs/[old]:smile:[/x]\n"


def test_long_lines_are_not_wrapped(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    make_console().print("word " * 60)
    assert capsys.readouterr().out.count("\n") == 1
    monkeypatch.setenv("COLUMNS", "40")
    make_console().print("word " * 60)
    assert capsys.readouterr().out.count("\n") > 5


def test_phases_are_lines_where_there_is_no_terminal(capsys):
    with phase(make_console(), "evaluating"):
        assert re.fullmatch(r"\d\d:\d\d:\d\d  evaluating\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (5399, "1 h 30 min"), (3 * 3600 + 300, "3 h 05 min"), (2e5, "2 d 7 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_steps_are_counted_where_they_make_no_whole_epochs(tmp_path):
    log, out = open_log(tmp_path, total_steps=1250, steps_per_epoch=100_000, chance_loss=None)
    with log:
        log.record({"step": 1000, "epoch": 0.01, "loss": 2.0})
    assert out.getvalue().rstrip().endswith("  step 1,000/1,250  loss 2.000")


@pytest.mark.parametrize("width", [200, 80])
def test_the_bar(tmp_path, width):
    log, out = open_log(tmp_path, terminal=True, width=width, print_freq=5, done_steps=10)
    with log:
        for step in range(11, 17):
            log.step(step, figures(wait=0.001))
        log.record({"step": 16, "epoch": 1.6, "loss": 2.0, "knn_top1": 81.0})
        for step in range(17, 21):
            log.step(step, figures())
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue()).split("epoch 2/3")[-1]
    shown = " ".join(last.split())
    assert "67 % eta" in shown  # 20 steps of 30
    assert "loss 2.000 (chance 4.62) acc@1 50.0 acc@5 75.0" in shown
    assert re.search(r"[\d,]+ images/s wait \d+ % kNN 81\.0 %", shown)
    assert len(last.splitlines()[0]) <= width


def test_other_ranks_do_nothing(tmp_path):
    log, out = open_log(tmp_path, terminal=True, enabled=False)
    with log:
        log.step(1, figures())
        log.record({"step": 1, "epoch": 0.1})
    assert log.records == []
    assert out.getvalue() == ""
    assert not list(tmp_path.iterdir())
