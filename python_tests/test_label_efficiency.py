"""bench/label_efficiency.py at tiny size: its parts, resuming, and the page."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
from training import few_digits

from moco_ext.runs.options import RunOptions

pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

pytestmark = pytest.mark.usefixtures("one_thread")

spec = importlib.util.spec_from_file_location(
    "label_efficiency", Path(__file__).parents[1] / "bench" / "label_efficiency.py"
)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

TINY = "--epochs 1 --moco-k 64 --batch-size 32"


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs a subcommand on few digits; returns the result."""
    small = {"VIEWS": 60, "RATES": (0.03, 0.1), "PENALTIES": (0.01, 1.0), "COMPONENTS": (5, 10), "VALIDATED": 1.0}
    for name, value in small.items():
        monkeypatch.setattr(bench, name, value)

    def run(name, *arguments, data=None):
        monkeypatch.setattr(bench, "load", lambda _: data or few_digits())
        shared = ["--data", "digits", "--work", str(tmp_path / "work")] if name != "table" else []
        out = tmp_path / "result.json"
        monkeypatch.setattr(sys, "argv", ["label_efficiency.py", name, *arguments, *shared, "--out", str(out)])
        assert bench.main() == 0
        return json.loads(out.read_text())["digits"]

    return run


def test_search_needs_no_test_images(command):
    data = dataclasses.replace(few_digits(), test=None)
    found = command("search", TINY, f"{TINY} --rotate 10", "--epochs", "1", data=data)["search"]
    assert [trial["settings"] for trial in found.values()] == [TINY, f"{TINY} --rotate 10"]
    assert all(trial["knn_top1"].keys() == {"pixels", "trained"} for trial in found.values())


def test_final_keeps_its_parts_and_writes_the_page(command, tmp_path, monkeypatch):
    arguments = ("--settings", TINY, "--budgets", "3", "--epochs", "2", "--seeds")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- labels:start -->\n<!-- labels:end -->\nafter\n")
    command("final", *arguments, "0", "--parts", "scratch")
    with pytest.raises(SystemExit, match=r"final: expected a pretrain part of digits, .* got only scratch,seed=0,lab"):
        command("table", "--page", str(page))
    some = command("final", *arguments, "0", "--parts", "pretrain", "scratch")["final"]
    assert some.keys() == {"pretrain,seed=0", "scratch,seed=0,labels=3"}
    one = command("final", *arguments, "0")["final"]
    assert {name: one[name] for name in some} == some
    assert len(one) == 4
    assert {content["steps"] for content in one.values() if "steps" in content} == {6}  # of 4 x 30 views
    assert one["linear,seed=0"].keys() == {"moco", "untrained", "pca", "pixels", "made_with"}
    part = one["finetune,seed=0,labels=3"]
    assert part["validation_top1"][str(part["lr"])] == max(part["validation_top1"].values())
    both = command("final", *arguments, "0", "1")["final"]
    assert len(both) == 8
    assert {name: both[name] for name in one} == one

    config = bench.configuration("digits", f"{TINY} --rotate 5", 0)
    with pytest.raises(SystemExit, match=r"settings: expected those of the run in .*, got another rotate"):
        bench.pretrained(config, few_digits(), RunOptions(tmp_path / "work/digits/moco,seed=0"))

    command("table", "--page", str(page))
    values = [both[f"scratch,seed={seed},labels=3"]["top1"] for seed in (0, 1)]
    assert f"| the same network from scratch | {bench.spread(values)} |" in page.read_text()
    plot = tmp_path / "learning" / "labels-digits.svg"
    before = page.read_text(), plot.read_text()
    command("table", "--page", str(page))
    assert (page.read_text(), plot.read_text()) == before


def test_a_rate_that_diverges_is_not_chosen(command, tmp_path):
    data = few_digits()
    found = bench.tune(data, "resnet8-small", None, 3, RunOptions(tmp_path), rates=(1e30, 0.05), epochs=1, seed=0)
    assert (found["lr"], found["validation_top1"].keys()) == (0.05, {"0.05"})
