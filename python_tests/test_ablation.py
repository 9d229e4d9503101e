"""Grids of runs: their configurations, the results that are kept, and their tables."""

import dataclasses
import json
import math

import pytest
import torch
from training import few_digits, run_in, tiny

from moco_ext import cli, data
from moco_ext.experiments import ablation
from moco_ext.experiments.ablation import make_grid, run_grid, subset

pytest.importorskip("matplotlib")
from moco_ext.report.ablation import markdown, write_report

BASE = tiny(epochs=1, moco_k=48)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_one_at_a_time_changes_one_thing_and_goes_seed_by_seed():
    base = tiny(moco_m=0.99)
    axes = {"dictionary": ["queue", "memory-bank"], "moco_m": [0.999, 0.0, 0.99], "shuffle_bn": ["auto", "none"]}
    grid = make_grid(base, axes, [3, 4], groups=4)
    names = ["base", "dictionary=memory-bank", "moco_m=0.999", "moco_m=0", "shuffle_bn=auto", "shuffle_bn=none"]
    assert [run.name for run in grid.runs] == [f"{name},seed={seed}" for seed in (3, 4) for name in names]
    changed = [
        {k: v for k, v in dataclasses.asdict(run.config).items() if v != getattr(base, k) and k != "seed"}
        for run in grid.runs[:6]
    ]
    assert changed == [
        {},
        {"dictionary": "memory-bank", "moco_m": 0.5},  # m of the features, as published
        {"moco_m": 0.999},
        {"moco_m": 0.0},
        {"split_bn": 4},
        {"shuffle_bn": "none", "split_bn": 4},
    ]
    assert {run.config.seed for run in grid.runs[6:]} == {4}
    assert grid.tables["moco_m"] == [("0", "moco_m=0"), ("0.99", "base"), ("0.999", "moco_m=0.999")]
    assert grid.tables["dictionary"] == [("queue", "base"), ("memory-bank", "dictionary=memory-bank")]
    assert grid.tables["shuffle_bn"] == [
        ("4 groups, auto", "shuffle_bn=auto"),
        ("4 groups, none", "shuffle_bn=none"),
        ("one group", "base"),
    ]


def test_a_default_queue_dtype_follows_the_mechanism():
    axes = {"dictionary": ["queue", "memory-bank"]}
    assert [r.config.queue_dtype for r in make_grid(tiny(precision="bf16"), axes, [0]).runs] == ["bf16", "fp32"]
    explicit = make_grid(tiny(precision="bf16", queue_dtype="fp16"), axes, [0])
    assert [run.config.queue_dtype for run in explicit.runs] == ["fp16", "fp16"]


def test_another_mechanism_loses_what_it_does_not_have():
    axes = {"dictionary": ["queue", "end-to-end"], "batch_size": [8, 16]}
    runs = make_grid(tiny(same_image="mask", lr_base=0.12), axes, [0], full=True).runs
    assert [(r.config.dictionary, r.config.batch_size, r.config.same_image) for r in runs] == [
        ("queue", 8, "mask"), ("queue", 16, "mask"), ("end-to-end", 8, "negative"), ("end-to-end", 16, "negative"),
    ]  # fmt: skip
    assert [r.config.learning_rate(0, 1) for r in runs[:2]] == [0.12 * 8 / 256, 0.12 * 16 / 256]
    one = make_grid(tiny(), {"batch_size": [64, 16]}, [0])
    assert one.tables["batch_size"] == [("16", "batch_size=16"), ("32", "base"), ("64", "batch_size=64")]


def test_the_base_is_in_every_table_even_if_unlisted():
    grid = make_grid(tiny(moco_k=100, split_bn=8), {"moco_k": [200, 50], "shuffle_bn": ["auto", "none"]}, [0])
    assert grid.tables["moco_k"] == [("50", "moco_k=50"), ("100", "base"), ("200", "moco_k=200")]
    assert [name for _, name in grid.tables["shuffle_bn"]] == ["base", "shuffle_bn=none"]  # auto is the base


def test_full_grid_leaves_out_axes_that_do_not_apply_to_a_mechanism():
    axes = {"dictionary": ["queue", "end-to-end", "memory-bank"], "moco_m": [0.9, 0.99], "moco_k": [50, 200]}
    grid = make_grid(BASE, axes, [0], full=True)
    assert [run.name.removesuffix(",seed=0") for run in grid.runs] == [
        "dictionary=queue,moco_m=0.9,moco_k=50",
        "dictionary=queue,moco_m=0.9,moco_k=200",
        "dictionary=queue,moco_m=0.99,moco_k=50",
        "dictionary=queue,moco_m=0.99,moco_k=200",
        "dictionary=end-to-end",
        "dictionary=memory-bank,moco_k=50",
        "dictionary=memory-bank,moco_k=200",
    ]
    assert [name for _, name in grid.tables["all combinations"]] == [run.name[: -len(",seed=0")] for run in grid.runs]


def test_invalid_values_are_refused_before_anything_runs():
    with pytest.raises(ValueError, match="moco_m: expected an axis of dictionary end-to-end"):
        make_grid(tiny(dictionary="end-to-end"), {"moco_m": [0.9]}, [0])
    with pytest.raises(ValueError, match="moco_t: expected a positive number, got 0"):
        make_grid(BASE, {"moco_t": [0.0]}, [0])


def test_finished_runs_are_kept_and_only_new_ones_run(tmp_path, monkeypatch):
    few, run = few_digits(64), run_in(tmp_path)
    grid = make_grid(BASE, {"moco_t": [0.2]}, [0])
    first = run_grid(grid, BASE, few, run)
    names = ["pixels", "untrained,seed=0", "base,seed=0", "moco_t=0.2,seed=0"]
    assert [result["name"] for result in first["runs"]] == names
    for result in first["runs"][2:]:
        assert result["status"] == "finished"
        assert result["loss"] == result["records"][-1]["loss"]
        assert 0 < result["knn_top1"] <= 100
        assert 0 < result["linear_top1"] <= 100
        assert result["curves"]["step"][-1] == 2  # two batches of 32
        assert len(result["curves"]["acc1"]) == len(result["curves"]["loss"]) == len(result["curves"]["step"])

    trained = []

    def spy(config, *rest):
        trained.append(config.moco_t)
        return genuine(config, *rest)

    genuine = ablation.pretrain
    monkeypatch.setattr(ablation, "pretrain", spy)
    assert run_grid(grid, BASE, few, run) == first
    assert trained == []
    more = run_grid(make_grid(BASE, {"moco_t": [0.2, 0.5]}, [0]), BASE, few, run)
    assert trained == [0.5]
    assert more["runs"][:4] == first["runs"]

    changed = dataclasses.replace(BASE, lr=0.5)
    with pytest.raises(ValueError, match=r"expected runs of this configuration or none, got another lr in .*base"):
        run_grid(make_grid(changed, {"moco_t": [0.2]}, [0]), changed, few, run)
    other = dataclasses.replace(BASE, arch="resnet18-small")
    with pytest.raises(ValueError, match=r"got another arch in .*pixels"):  # none of its runs is there
        run_grid(make_grid(other, {"moco_t": [0.7]}, [1], full=True), other, few, run)
    assert not list(tmp_path.glob("*seed=1"))
    with pytest.raises(ValueError, match="got another images"):
        run_grid(grid, BASE, few_digits(65), run)


def test_an_interrupted_run_resumes(tmp_path, monkeypatch):
    """Stopped after training, before its evaluation: it is not trained again, and nothing differs."""
    few, grid = few_digits(64), make_grid(BASE, {"moco_m": [BASE.moco_m]}, [0])
    expected = run_grid(grid, BASE, few, run_in(tmp_path / "whole"))["runs"][-1]

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ablation, "_curves", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_grid(grid, BASE, few, run_in(tmp_path / "broken"))
    state = tmp_path / "broken" / "base,seed=0" / "checkpoint.pth"
    written = state.stat().st_mtime_ns
    with pytest.warns(UserWarning, match="has completed all of its 2 steps"):
        found = run_grid(grid, BASE, few, run_in(tmp_path / "broken"))["runs"][-1]
    assert state.stat().st_mtime_ns == written
    for name in ("loss", "acc1", "knn_top1", "linear_top1", "curves"):
        assert found[name] == expected[name], name


def test_a_failed_run_is_recorded_and_the_next_one_runs(tmp_path):
    """A learning rate beyond float32 makes the second loss not finite, whatever the temperature."""
    base = dataclasses.replace(BASE, lr=1e30)
    grid = make_grid(base, {"moco_t": [0.2]}, [0])
    results = run_grid(grid, base, few_digits(64), run_in(tmp_path))
    failed = results["runs"][2:]
    assert [run["status"] for run in failed] == ["failed", "failed"]
    assert "loss: expected a finite number, got nan in epoch 1, step 2" in failed[0]["error"]
    assert str(tmp_path) not in failed[0]["error"]
    assert "| 0.2 |  |  |  |  |  |  |  |  (failed: 0) |" in markdown(results)
    assert run_grid(grid, base, few_digits(64), run_in(tmp_path)) == results  # failed is an outcome: it is kept


def test_a_run_whose_features_are_not_finite_is_recorded_as_failed(tmp_path, monkeypatch):
    def diverging(config, data, options, model):
        records = genuine(config, data, options, model)
        if config.moco_t == 0.2:
            model.encoder_q.conv1.weight.data.fill_(math.nan)
        return records

    genuine = ablation.pretrain
    monkeypatch.setattr(ablation, "pretrain", diverging)
    results = run_grid(make_grid(BASE, {"moco_t": [0.2]}, [0]), BASE, few_digits(64), run_in(tmp_path))
    assert [run["status"] for run in results["runs"][2:]] == ["finished", "failed"]
    assert "features of trained encoder (training images): expected finite values" in results["runs"][3]["error"]


def test_tables_say_mean_and_standard_error(tmp_path):
    """Of 1 and 3 the mean is 2 and the standard error sqrt(2) / sqrt(2) = 1."""
    made = {"device": "D", "threads": 1, "torch": "2", "moco_ext": "0", "commit": "c0ffee", "changed": False}
    curves = {"step": [10, 20], "loss": [3.0, 2.0], "acc1": [1.0, 2.0]}
    runs = [
        {"name": f"{name},seed={seed}", "seed": seed, "status": "finished", "made_with": made, "curves": curves}
        | {"records": [{"feature_std": value + 9}, {"feature_std": value}]}
        | {"loss": value, "acc1": value, "knn_top1": value, "linear_top1": value, "seconds": value}
        for seed, value in ((0, 1.0), (1, 3.0))
        for name in ("base", "shuffle_bn=none")
    ][:3]
    pixels = {"name": "pixels", "status": "untrained", "knn_top1": 70.0, "linear_top1": 80.0, "made_with": made}
    results = {
        "data": "digits",
        "images": 64,
        "base": dataclasses.asdict(BASE),
        "tables": {"shuffle_bn": [("one group", "base"), ("8 groups, none", "shuffle_bn=none")]},
        "runs": [pixels, *runs],
    }
    lines = markdown(results).splitlines()
    assert (
        "| one group (base) | 2.00 ± 1.00 | 2.00 ± 1.00 | 2.0 ± 1.0 | 2.000 ± 1.000 | 2.00 ± 1.00 |  | 2 ± 1 | 0, 1 |"
        in lines  # no drift: of a mechanism without a queue
    )
    assert "| 8 groups, none | 1.00 | 1.00 | 1.0 | 1.000 | 1.00 |  | 1 | 0 |" in lines
    assert "Raw pixels: kNN 70.00 %, linear 80.00 %." in lines[0]
    runs[0]["acc1"] = runs[1]["acc1"] = None  # NaN in the file
    nan = markdown(results).splitlines()
    assert (
        "| one group (base) | 2.00 ± 1.00 | 2.00 ± 1.00 | NaN | 2.000 ± 1.000 | 2.00 ± 1.00 |  | 2 ± 1 | 0, 1 |" in nan
    )
    assert "| 8 groups, none | 1.00 | 1.00 | NaN | 1.000 | 1.00 |  | 1 | 0 |" in nan
    write_report(results, tmp_path)
    page = (tmp_path / "results.md").read_text()
    for plot in ("accuracy.svg", "shuffling-bn.svg"):
        assert f"]({plot})" in page
        assert "8 groups, none" in (tmp_path / plot).read_text()  # text stays text
    assert json.loads((tmp_path / "results.json").read_text())["runs"] == results["runs"]


def test_a_subset_is_the_same_every_time():
    digits = data.load("digits")
    one, other = subset(digits, 50), subset(digits, 50)
    assert torch.equal(one.train.images, other.train.images)
    assert len(one.train) == len(one.train.labels) == 50
    assert one.test is digits.test
    positions = [(digits.train.images == image).flatten(1).all(1).nonzero()[0].item() for image in one.train.images]
    assert torch.equal(digits.train.labels[positions], one.train.labels)  # each image has kept its label
    with pytest.raises(ValueError, match=r"images: expected 1 to 1[0-9]{3} .* got 9999 of digits"):
        subset(digits, 9999)


def test_command(tmp_path, capsys):
    grid = ["--data", "digits", "--output", str(tmp_path), "--images", "96", "--epochs", "1", "--threads", "1"]
    command = ["ablate", *grid, "-j", "0", "--moco-m", "0", "0.99", "--seeds", "1", "2"]
    (tmp_path / "file.json").write_text('{"epochs": 7, "steps": 1000}')
    assert cli.main([*command, "--", "--moco-k", "32", "-b", "48", "--config", str(tmp_path / "file.json")]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["base"]["epochs"], results["base"]["steps"]) == (1, 0)  # as the flag says
    assert (results["base"]["moco_k"], results["base"]["batch_size"], results["images"]) == (32, 48, 96)
    trained = [run["name"] for run in results["runs"] if "seed" in run]
    assert trained == ["base,seed=1", "moco_m=0,seed=1", "base,seed=2", "moco_m=0,seed=2"]
    assert "| 0.99 (base) |" in (tmp_path / "results.md").read_text()
    assert "run 4 of 4: moco_m=0,seed=2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "axes: expected at least one"),
        (["--moco-m", "0", "--", "--seed", "3"], "--: expected flags of moco-ext pretrain that all runs share, got"),
        (["--moco-m", "0", "--", "--resume", "auto", "--output", "x"], "--: expected flags of moco-ext pretrain that"),
        (["--shuffle-bn", "on"], "shuffle_bn: expected one of auto, gather"),
        (["--grid", "full", "--dictionary", "heap"], "dictionary: expected one of queue"),
    ],
)
def test_command_refuses(arguments, message, tmp_path, capsys):
    assert cli.main(["ablate", "--output", str(tmp_path), *arguments]) == 1
    assert f"moco-ext: error: {message}" in capsys.readouterr().err
