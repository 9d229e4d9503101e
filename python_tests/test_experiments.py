"""A whole run of ``moco-ext pretrain``: evaluation, summary and report after training."""

import dataclasses
import io
import json
import math

import pytest
from rich.console import Console

pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

from training import few_digits, run_in, tiny

from moco_ext.experiments import pretrain as experiment
from moco_ext.experiments.pretrain import pretrain_and_evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """matplotlib takes a second per page."""
    monkeypatch.setattr("moco_ext.report.page.curves", lambda *chart: "<svg></svg>")


def output_of(config, data, options) -> str:
    """What a run prints, on a terminal of 200 columns."""
    options.console = Console(file=io.StringIO(), width=200)
    pretrain_and_evaluate(config, data, options)
    return options.console.file.getvalue()


def test_a_run_prints_its_accuracies(tmp_path, monkeypatch):
    monkeypatch.setattr("moco_ext.report.gallery._MAP_POINTS", 40)
    text = output_of(tiny(epochs=1), few_digits(), run_in(tmp_path))
    summary = json.loads((tmp_path / "summary.json").read_text())
    for name, label in (("pixels", "raw pixels"), ("untrained", "untrained encoder"), ("trained", "trained encoder")):
        assert summary["knn_top1"].keys() == summary["linear_top1"].keys() >= {name}
        scores = [f"{summary[protocol][name]:.1f}" for protocol in ("knn_top1", "linear_top1")]
        few = summary["few_labels"]
        scores.append(f"{few['linear_top1'][name]:.1f} ± {few['linear_std'][name]:.1f}")
        row = next(line for line in text.splitlines() if f" {label} " in line)
        assert [cell.strip() for cell in row.split("│")[1:-1]] == [label, *scores]
    assert "linear, 10 labels per class" in text
    assert f"trained in {summary['seconds']:.0f} s" in text


@pytest.mark.parametrize(
    ("images", "reason", "how"),
    [
        (None, "digits has no val/ folder and val_fraction is 0: accuracy not measured", " --data DATA\n"),
        (100, "digits has more than 100 images: accuracy not measured", "\n"),
    ],
)
def test_a_run_that_is_not_evaluated_says_how_to(tmp_path, monkeypatch, images, reason, how):
    data = few_digits()
    if images is None:
        data = dataclasses.replace(data, test=None)
    else:
        monkeypatch.setattr(experiment, "_EVALUATED", images)
    with pytest.warns(UserWarning, match=f"data: {reason}"):
        text = output_of(tiny(epochs=1), data, run_in(tmp_path))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary.keys() == {"data", "seconds"} | ({"label_free"} if images is None else set())
    assert f"trained in {summary['seconds']:.0f} s; to evaluate: moco-ext linear {tmp_path}{how}" in text
    assert f"{tmp_path}/: checkpoint.pth, metrics.jsonl, summary.json, report.html" in text
    assert ("│" in text) == ("Without labels" in (tmp_path / "report.html").read_text()) == (images is None)


def test_an_encoder_that_diverged_at_the_end_is_an_error(tmp_path, monkeypatch):
    def diverging(trainer):
        trainer.model.encoder_q.conv1.weight.data.fill_(math.nan)
        return []

    monkeypatch.setattr(experiment.Trainer, "train", diverging)
    with pytest.raises(FloatingPointError, match=r"features of trained encoder .* expected finite values"):
        pretrain_and_evaluate(tiny(), few_digits(), run_in(tmp_path))
