"""The page about runs: it shows what the runs recorded, and it is self-contained."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

from training import few_digits, tiny

from moco_ext import cli
from moco_ext import data as mdata
from moco_ext.checkpoints.training import save_checkpoint
from moco_ext.cli.report import distinct_names
from moco_ext.data import FolderSplit, ImageData
from moco_ext.evaluate import encoder_features
from moco_ext.evaluate.scores import LABELS
from moco_ext.report import Gallery, ReportedRun, compose, galleries, read_run, write_report
from moco_ext.report import gallery as pictures
from moco_ext.runs.environment import environment
from moco_ext.train import build_model

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {
    "data": "digits",
    "arch": "resnet8-small",
    "epochs": 3,
    "moco_k": 100,
    "moco_t": 0.2,
    "knn_k": 20,
    "seed": 0,
}
SUMMARY = {
    "data": "digits",
    "seconds": 90.0,
    "knn_top1": {"pixels": 92.5, "untrained": 91.0, "trained": 97.6},
    "linear_top1": {"pixels": 93.25, "untrained": 94.0, "trained": 98.75},
}


def record(epoch, **figures):
    base = {"loss": 4.0 / epoch, "acc1": 10.0 * epoch, "acc5": 20.0 * epoch, "lr": 0.03, "images_per_second": 500.0}
    return {"step": 10 * epoch, "epoch": epoch, **base, "wait": 0.25, "seconds": 30.0 * epoch, **figures}


def reported(name="run", summary=SUMMARY, records=None, **settings):
    return ReportedRun(name, SETTINGS | settings, records or [record(e) for e in (1, 2, 3)], summary)


def directory(folder, summary=SUMMARY, records=None, **settings):
    """A run directory without checkpoint."""
    run = reported(summary=summary, records=records, **settings)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(run.config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in run.records))
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def charts(page):
    """Caption -> SVG."""
    return {
        re.sub(r"<small>.*", "", caption): svg
        for caption, svg in re.findall(r"<figcaption>(.*?)</figcaption>(<svg.*?</svg>)", page, re.DOTALL)
    }


def drawn(svg, run):
    """The points of a run's curve in the SVG."""
    (path,) = re.findall(rf'<g class="r{run}">\s*<path d="([^"]*)"', svg)
    return [tuple(map(float, point)) for point in re.findall(r"[ML] (\S+) (\S+)", path)]


def cells(page, row):
    """The texts of a table's row, by its heading."""
    found = re.search(rf'<tr[^>]*><th scope="row">(?:<i[^>]*></i>)?{re.escape(row)}</th>(.*?)</tr>', page)
    return [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<td.*?>(.*?)</td>", found[1])]


@pytest.fixture(scope="module")
def digits():
    return mdata.load("digits")


@pytest.fixture
def no_curves(monkeypatch):
    """For tests that do not look at curves: matplotlib takes a second per page."""
    monkeypatch.setattr("moco_ext.report.page.curves", lambda *chart: "<svg></svg>")


@pytest.fixture
def with_pictures(digits, monkeypatch):
    """A gallery of three representations; too few points for t-SNE, which takes seconds."""
    monkeypatch.setattr(pictures, "_MAP_POINTS", 40)
    sizes = [len(split) for split in digits.splits]
    features = {name: tuple(torch.randn(n, 8) for n in sizes) for name in ("pixels", "untrained", "trained")}
    return Gallery(digits, features)


# --- a self-contained page ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 3])
def test_nothing_is_requested(with_pictures, number):
    page = compose([reported(f"run {i}") for i in range(number)], [with_pictures])
    # No address but the namespaces of SVG, and no file: everything is in the page.
    addresses = set(re.findall(r"(?:https?:)?//[\w./-]+", re.sub(r'"data:[^"]*"', "", page)))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert not re.findall(r"url\((?!#)|@import|<script|<link", page)


@pytest.mark.parametrize("number", [1, 3])
def test_colors_and_ids(with_pictures, number):
    page = compose([reported(f"run {i}") for i in range(number)], [with_pictures])
    light, dark = (set(re.findall(r"(--\w+):", rules)) for rules in re.findall(r":root \{(.*?)\}", page, re.DOTALL))
    assert set(re.findall(r"var\((--\w+)\)", page)) <= light == dark
    assert "#0102" not in page  # a placeholder of a variable
    ids = Counter(re.findall(r'\sid="([^"]*)"', page))
    assert set(ids.values()) == {1}
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', page)) <= ids.keys()


@pytest.mark.usefixtures("no_curves")
def test_names_are_text_not_markup():
    page = compose([reported("<b>&</b>"), reported("other", arch="<i>")], [])
    assert "<b>&</b>" not in page
    assert "&lt;b&gt;&amp;&lt;/b&gt;" in page
    assert '<td class="r1">&lt;i&gt;</td>' in page


@pytest.mark.usefixtures("no_curves")
def test_every_color_is_defined_for_many_runs():
    page = compose([reported(f"run {i}") for i in range(10)], [])
    assert set(re.findall(r"var\((--\w+)\)", page)) <= set(re.findall(r"(--\w+):", page))


# --- the answers at the top ---------------------------------------------------------------------------------


def answers(page):
    """[(class, verdict, reason)] of the two questions."""
    return re.findall(r'<b class="(\w+)">([\w ]+)</b><p>(.*?)</p>', page)


def scored(untrained, trained, images=1000):
    names = ("untrained", "trained")
    return SUMMARY | {
        "knn_top1": dict(zip(names, (untrained, trained), strict=True)),
        "linear_top1": dict.fromkeys(names, 90.0),
        "test_images": images,
    }


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize(
    ("summary", "verdict"),
    [
        (scored(91.0, 97.6), "Yes"),
        (scored(97.6, 91.0), "No"),
        (scored(91.0, 92.0), "Unclear"),  # the standard error of the difference is 1.25
        (scored(91.0, 92.0, images=100_000), "Yes"),
        (scored(90.0, 90.0), "Unclear"),
        (scored(91.0, 97.6) | {"linear_top1": {"untrained": 95.0, "trained": 80.0}}, "Unclear"),  # one rose, one fell
        ({"data": "d", "seconds": 1.0}, "Not measured"),
    ],
)
def test_did_it_learn(summary, verdict):
    (_, found, reason), _ = answers(compose([reported(summary=summary)], []))
    assert found == verdict
    if "knn_top1" in summary:
        assert f"kNN {summary['knn_top1']['trained']:.1f} %" in reason


@pytest.mark.usefixtures("no_curves")
def test_did_it_learn_without_labels():
    scores = {name: {"contrast_top1": top1, "alignment": 0.5, "uniformity": -2.0, "rankme": 9.0}
              for name, top1 in (("untrained", 40.0), ("trained", 85.0))}  # fmt: skip
    summary = {"data": "photos", "seconds": 1.0, "label_free": scores | {"images": 300, "split": "held-out"}}
    learned, _ = answers(compose([reported(summary=summary)], []))
    assert learned == ("good", "Yes", "Contrast accuracy 85.0 % (untrained 40.0 %).")


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize(("spread", "rank", "verdict"), [(0.9, 30.0, "No"), (0.05, 30.0, "Yes"), (0.9, 1.4, "Yes")])
def test_has_it_collapsed(spread, rank, verdict):
    records = [record(1, feature_std=0.9, effective_rank=30.0), record(2, feature_std=spread, effective_rank=rank)]
    runs = [reported("a", records=[*records, record(3)])]  # the last record has none
    _, collapsed = answers(compose(runs, []))
    assert collapsed[1] == verdict
    table = compose([*runs, reported("b")], [])
    assert f">{verdict}</b><small>Spread of the queries {spread:.2f}" in table
    assert ">Not measured</b><small>The run has recorded no diagnostics." in table


@pytest.mark.usefixtures("no_curves")
def test_the_command_and_the_versions(tmp_path):
    folder = directory(tmp_path / "run")
    assert "<h2>Command</h2>" not in compose([read_run(folder, "run")], [])
    made = environment(torch.device("cpu")) | {"command": "moco-ext pretrain 'a b' --mlp", "commit": "c0ffee"}
    (folder / "environment.json").write_text(json.dumps(made))
    page = compose([read_run(folder, "run")], [])
    assert "<pre>moco-ext pretrain &#39;a b&#39; --mlp</pre>" in page
    assert f"(commit c0ffee{', with changes' if made['changed'] else ''}), torch {torch.__version__}" in page


# --- scores -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_curves")
def test_scores_of_one_run():
    page = compose([reported()], [])
    assert cells(page, "raw pixels") == ["92.5", "93.2"]
    assert cells(page, "untrained encoder") == ["91.0", "94.0"]
    assert cells(page, "trained encoder") == ["97.6", "98.8"]
    assert "bars from 90 to 100" in page
    widths = [float(w) for w in re.findall(r'<div class="bar"><i style="width:(\S+?)%', page)]
    # (score - 90) / 10, printed to a tenth
    assert widths == pytest.approx([25.0, 32.5, 10.0, 40.0, 76.0, 87.5], abs=0.051)


@pytest.mark.usefixtures("no_curves")
def test_scores_of_several_runs():
    better = SUMMARY | {"knn_top1": SUMMARY["knn_top1"] | {"trained": 99.0}}
    page = compose([reported("a"), reported("b", better)], [])
    page = page[page.index("<h2>kNN and linear accuracy") :]
    assert cells(page, "raw pixels") == ["92.5", "93.2"]  # once: the runs agree
    assert cells(page, "a") == ["97.6", "98.8"]
    assert cells(page, "b") == ["99.0", "98.8"]
    marks = [float(m) for m in re.findall(r'<s style="left:(\S+?)%', page)]
    assert marks == pytest.approx([10.0, 40.0, 10.0, 40.0], abs=0.051)  # untrained: 91 and 94 on bars from 90


@pytest.mark.usefixtures("no_curves")
def test_runs_that_disagree_on_pixels():
    other = SUMMARY | {"knn_top1": SUMMARY["knn_top1"] | {"pixels": 90.0}}
    page = compose([reported("a"), reported("b", other, knn_k=5)], [])
    assert cells(page, "raw pixels, as in a") == ["92.5", "93.2"]
    assert cells(page, "raw pixels, as in b") == ["90.0", "93.2"]
    assert "nearest (5, 20: see knn_k)" in page


@pytest.mark.usefixtures("no_curves")
def test_a_floor_is_below_every_bar():
    low = SUMMARY | {"knn_top1": {"pixels": 90.0, "untrained": 90.0, "trained": 90.0}}
    assert "bars from 80 to 100" in compose([reported(summary=low)], [])  # a bar of length 0 would say "nothing"


@pytest.mark.usefixtures("no_curves")
def test_scores_of_the_commands(tmp_path):
    folder = directory(tmp_path / "run", summary={})
    (folder / "knn.json").write_text(json.dumps({"knn_top1": {"pixels": 50.0, "trained": 60.0}}))
    (folder / "linear.json").write_text(json.dumps({"solver": "sgd", "top1": 67.5}))
    (folder / "finetune.json").write_text(json.dumps({"fraction": 0.01, "top1": 71.25}))
    page = compose([read_run(folder, "run")], [])
    assert "<th>linear, SGD</th><th>fine-tuned, 1 % of labels</th>" in page
    assert cells(page, "trained encoder") == ["60.0", "&ndash;", "67.5", "71.2"]
    (folder / "linear.json").write_text(json.dumps({"linear_top1": {"trained": 50.0}, "labels_per_class": 3}))
    (folder / "finetune.json").write_text(json.dumps({"fraction": 1.0, "labels_per_class": 3, "top1": 40.0}))
    page = compose([read_run(folder, "run")], [])
    assert "<th>fine-tuned, 3 labels per class</th>" in page
    assert cells(page, "trained encoder") == ["60.0", "&ndash;", "40.0"]  # the linear column is that of all labels


@pytest.mark.usefixtures("no_curves")
def test_the_images_of_a_run_that_was_started_elsewhere(tmp_path, monkeypatch):
    """A folder of that name in the working directory may hold other images."""
    here, there = (tmp_path / name for name in ("here", "there"))
    runs = []
    for place in (here, there):
        folder = directory(place / "run", data="photos")
        (folder / "environment.json").write_text(json.dumps({"directory": str(place)}))
        (folder / "knn.json").write_text(json.dumps({"data": str(place / "photos"), "knn_top1": {"trained": 60.0}}))
        runs.append(read_run(folder, place.name))
    monkeypatch.chdir(here)
    assert [run.images.data for run in runs] == ["photos", str(there / "photos")]
    assert [run.other_data("knn") for run in runs] == ["", ""]
    gone = dataclasses.replace(runs[1], environment={"directory": str(tmp_path / "gone")})
    assert gone.images.data == "photos"  # copied from another machine, perhaps with its images


def test_scores_on_other_data_say_so(tmp_path):
    folder = directory(tmp_path / "run", summary={})
    elsewhere = {"data": "/data/labeled"}
    (folder / "knn.json").write_text(json.dumps(elsewhere | {"knn_top1": {"pixels": 50.0, "trained": 60.0}}))
    (folder / "linear.json").write_text(json.dumps(elsewhere | {"solver": "sgd", "top1": 67.5}))
    (folder / "finetune.json").write_text(json.dumps(elsewhere | {"fraction": 1.0, "top1": 71.25}))
    run = read_run(folder, "run")
    assert run.top1("knn") == {}
    page = compose([run], [])
    headings = ("kNN on labeled", "linear, SGD on labeled", "fine-tuned, 100 % of labels on labeled")
    assert "".join(f"<th>{heading}</th>" for heading in headings) in page
    assert cells(page, "trained encoder") == ["&ndash;", "&ndash;", "60.0", "67.5", "71.2"]
    assert cells(page, "raw pixels") == ["&ndash;", "&ndash;", "50.0", "&ndash;", "&ndash;"]


@pytest.mark.usefixtures("no_curves")
def test_few_labels_have_a_column():
    means, stds = {"pixels": 65.0, "untrained": 60.0, "trained": 75.25}, dict.fromkeys(LABELS, 1.5)
    few = {"labels_per_class": 10, "subsets": 5, "linear_top1": means, "linear_std": stds}
    page = compose([reported(summary=SUMMARY | {"few_labels": few})], [])
    assert "<th>linear, 10 labels per class</th>" in page
    assert "over random subsets" in page
    assert cells(page, "untrained encoder")[-1] == "60.0 ± 1.5"
    both = compose([reported("a", summary=SUMMARY | {"few_labels": few}), reported("b")], [])
    assert re.findall(r"<td><b>(\d\d.\d ± 1.5|&ndash;)</b></td>", both) == ["65.0 ± 1.5", "75.2 ± 1.5", "&ndash;"]


@pytest.mark.usefixtures("no_curves")
def test_a_run_without_scores():
    assert "Not evaluated" in compose([reported(summary={"data": "digits", "seconds": 1.0})], [])


@pytest.mark.usefixtures("no_curves")
def test_data_sets_have_tables_of_their_own():
    page = compose([reported("a"), reported("b", data="cifar10")], [])
    assert "kNN and linear accuracy<small>digits</small>" in page
    assert "kNN and linear accuracy<small>cifar10</small>" in page


# --- curves -------------------------------------------------------------------------------------------------


def test_curves_are_the_records():
    """Each curve is an affine image of its figures, the same in x and y for both runs (SVG has six decimals)."""
    records = [record(e, loss=loss) for e, loss in ((1, 3.0), (2, 2.5), (3, 0.5))]
    svg = charts(compose([reported("a"), reported("b", records=records)], []))["Contrastive loss (nats)"]
    expected = [[(e, 4.0 / e) for e in (1, 2, 3)], [(1, 3.0), (2, 2.5), (3, 0.5)]]
    points = [drawn(svg, run) for run in (0, 1)]
    for axis in (0, 1):
        seen, told = ([p[axis] for line in lines for p in line] for lines in (points, expected))
        scale = (seen[2] - seen[0]) / (told[2] - told[0])
        assert seen == pytest.approx([seen[0] + scale * (value - told[0]) for value in told], abs=1e-4)
    assert points[0][0][1] < points[0][2][1]  # y of SVG grows downwards: the higher loss is higher up


def test_figures_that_some_runs_lack():
    records = [record(1, feature_std=0.5), record(2), record(3, feature_std=None)]
    page = compose([reported("a"), reported("b", records=records)], [])
    svg = charts(page)["Spread of queries (0 none, 1 even)"]
    assert 'class="r0"' not in svg
    assert len(drawn(svg, 1)) == 1
    assert "Key drift" not in "".join(charts(page))
    assert "<h2>Diagnostics</h2>" not in compose([reported()], [])


def test_diagnostics():
    figures = {
        "feature_std": 0.9,
        "effective_rank": 30.0,
        "effective_negatives": 12.0,
        "key_drift": 0.1,
        "key_age": 4.0,
    }
    records = [record(e, query_norm=5.0, query_grad_norm=0.1, **figures) for e in (1, 2, 3)]
    page = compose([reported(records=records)], [])
    assert len(charts(page)) == 11  # all but kNN, which no record has
    assert "Key drift (1 - cosine, 4 steps)" in charts(page)
    assert "<small>all K = 100</small>" in page


@pytest.mark.usefixtures("no_curves")
def test_levels():
    page = compose([reported("a"), reported("b", moco_k=200), reported("c", moco_k=10, dictionary="end-to-end")], [])
    levels = re.findall(r"<small>chance loss: log\(K \+ 1\) = (\S+?)</small>", page)
    assert levels == [f"{math.log(k + 1):.2f}" for k in (100, 200)]  # the batch, not K, is end-to-end's dictionary


def test_the_online_knn_starts_at_the_untrained_encoder():
    records = [record(1), record(2, knn_top1=95.0), record(3, knn_top1=97.6)]
    svg = charts(compose([reported(records=records)], []))["kNN top-1 on test images (%)"]
    x = [point[0] for point in drawn(svg, 0)]
    assert (x[1] - x[0]) / (x[2] - x[1]) == pytest.approx(2, abs=1e-4)  # epochs 0, 2, 3


@pytest.mark.usefixtures("no_curves")
def test_empty_sections_say_so_or_are_absent():
    """A first record without any metric (all of them not finite), of a version without knn_k."""
    empty = {"step": 1, "epoch": 1, "loss": None, "seconds": 1.0}
    run = ReportedRun("run", {"data": "digits", "arch": "resnet8-small", "moco_k": 100}, [empty], {})
    page = compose([run], [])
    assert "<h2>Training</h2>\n<p>No metrics are recorded yet.</p>" in page
    assert "<p>Not evaluated" in page
    assert page.count(">Not measured</b>") == 2
    assert "<h2>Diagnostics" not in page
    for element in ("figure", "table", "nav"):
        assert f"<{element}" not in page
    other = ReportedRun("other", {"data": "mnist", "arch": "resnet10", "moco_k": 50}, [empty], {})
    assert "Common settings" not in compose([run, other], [])  # there are none


def test_short_runs_go_by_steps():
    records = [record(1) | {"step": step, "epoch": step / 1000} for step in (100, 200)]
    page = compose([reported(records=records, steps=200)], [])
    assert ">step</text>" in page
    assert "200 steps in 30 s" in page
    assert ">epoch</text>" in compose([reported()], [])


@pytest.mark.usefixtures("no_curves")
def test_runs_that_cannot_be_compared():
    page = compose([reported("a"), reported("b", moco_t=0.07, seed=1)], [])
    assert "of runs that differ in moco_t are not comparable" in page
    assert "are not comparable" not in compose([reported("a"), reported("b", seed=1)], [])


@pytest.mark.usefixtures("no_curves")
def test_where_runs_ended():
    slow = [record(1, images_per_second=v) for v in (100.0, 300.0, 2000.0)]
    page = compose([reported("a"), reported("b", summary={}, records=slow)], [])
    table = page[page.index("data wait") :]
    assert cells(table, "a") == ["3 epochs", "90 s", "1.333", "30.0", "60.0", "500", "25 %"]
    assert cells(table, "b")[5] == "300"  # the median


@pytest.mark.usefixtures("no_curves")
def test_records_of_former_versions():
    """No step, wait or diagnostics, and settings of other names."""
    old = [{n: v for n, v in record(e).items() if n not in ("step", "wait")} for e in (1, 2, 3)]
    page = compose([reported("a"), reported("b", records=old, knn_every=3)], [])
    assert "Not recorded by a: knn_every." in page
    assert "Their configurations are the same." in page
    assert cells(page[page.index("data wait") :], "b")[-1] == "&ndash;"


# --- settings -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_curves")
def test_only_settings_that_differ_are_compared():
    others = [reported("b", seed=1, moco_t=0.07), reported("c", schedule=[120, 160])]
    page = compose([reported("a", schedule=[60]), *others], [])
    section = re.search(r"<h2>Settings that differ</h2>.*?</section>", page, re.DOTALL)[0]
    assert re.findall(r'<th scope="row">(.*?)</th>', section) == ["moco_t", "seed", "schedule"]
    assert cells(section, "moco_t") == ["0.2", "0.07", "0.2"]
    assert cells(section, "schedule") == ["60", "&ndash;", "120 160"]
    assert "Not recorded by b: schedule." in section
    same = re.findall(r"<dt>(.*?)</dt>", page)
    assert same == ["data", "arch", "epochs", "moco_k", "knn_k"]
    assert "They differ in moco_t, seed, schedule." in page


@pytest.mark.usefixtures("no_curves")
def test_one_run_lists_all_settings():
    assert re.findall(r"<dt>(.*?)</dt>", compose([reported()], [])) == list(SETTINGS)


def test_switches_hide_every_run():
    page = compose([reported(f"run {i}") for i in range(10)], [])
    assert re.findall(r'id="show(\d)" checked', page) == list("0123456789")
    for i in range(10):
        assert f"body:has(#show{i}:not(:checked)) .r{i} " in page
    assert "stroke-dasharray" in re.search(r'<g class="r9">.*?</g>', page, re.DOTALL)[0]  # run 1's color, dashed
    assert "show0" not in compose([reported()], [])


# --- pictures -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_curves")
def test_pictures(with_pictures):
    page = compose([reported()], [with_pictures])
    assert page.count("data:image/png;base64,") == 10 * (1 + 3 * 7) + 1 + 5  # the last in the answers at the top
    assert {"pixels", "untrained", "trained"} <= charts(page).keys()
    # the percentage, by brute force
    (train, test), (train_split, test_split) = with_pictures.features["trained"], with_pictures.data.splits
    train, test = (torch.nn.functional.normalize(rows, dim=1) for rows in (train, test))
    near = (test @ train.T).topk(7, dim=1).indices
    same = 100 * (train_split.labels[near] == test_split.labels[:, None]).double().mean().item()
    assert f"<th>trained<small>{same:.1f} % of the same class</small></th>" in page


@pytest.mark.usefixtures("no_curves")
def test_photographs(tmp_path, monkeypatch):
    paths = []
    for name, color in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        (tmp_path / name).mkdir()
        for i in range(3):
            paths.append(str(tmp_path / name / f"{i}.jpg"))
            Image.new("RGB", (400, 300), color).save(paths[-1])
    split = FolderSplit(paths, torch.arange(6) // 3)
    data = ImageData(str(tmp_path), ("blue", "red"), 224, (0.5,) * 3, (0.2,) * 3, True, split, split)
    page = compose([reported(data=str(tmp_path))], [Gallery(data, {"raw pixels": (torch.eye(6), torch.eye(6))})])
    thumbnails = re.findall(r"data:image/jpeg;base64,([^\"]*)", page)
    assert len(thumbnails) == 2 * (1 + 6) + 1 + 5
    assert max(map(len, thumbnails)) < 8000  # no photograph is there in full


@pytest.mark.usefixtures("no_curves")
def test_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"h\xf4tel")
    Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    split = FolderSplit([str(tmp_path / f"{name}.png")] * 3, torch.full((3,), -1))
    data = ImageData(name, (), 8, (0.5,) * 3, (0.2,) * 3, True, split, None)
    page = compose([reported(data=name)], [Gallery(data, {"raw pixels": (torch.eye(3), torch.eye(3))})])
    assert "MoCo on h?tel" in page
    assert 'alt="h?tel"' in page
    page.encode()


@pytest.mark.parametrize(("one", "other"), [({"image_size": 16}, {"image_size": 32}), ({}, {"val_fraction": 0.25})])
def test_runs_on_other_images_of_the_same_data_are_not_compared(tmp_path, one, other):
    """Nor are the features of one run computed from the images of the other."""
    for i in range(8):
        (tmp_path / "data" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (30 * i, 0, 0)).save(tmp_path / "data" / str(i % 2) / f"{i}.png")
    settings = ({"data": str(tmp_path / "data"), "val_fraction": 0.5} | changes for changes in (one, other))
    folders = [directory(tmp_path / f"run{i}", **changes) for i, changes in enumerate(settings)]
    for folder in folders:
        checkpoint(folder, 0)
    runs = [read_run(folder, folder.name) for folder in folders]
    found = galleries(runs, folders, data_root=tmp_path, device=torch.device("cpu"), workers=0)
    assert [list(gallery.features) for gallery in found] == [["raw pixels", "run0"], ["raw pixels", "run1"]]
    assert [(gallery.data.size, len(gallery.data.test)) for gallery in found] == [
        (changes.get("image_size", 224), 8 * changes.get("val_fraction", 0.5)) for changes in (one, other)
    ]
    page = compose(runs, [])
    for changes in (one, other):
        size, fraction = changes.get("image_size", "default"), changes.get("val_fraction", 0.5)
        assert f"{tmp_path / 'data'}, val_fraction {fraction:g}, image_size {size}" in page
    assert page.count("<h2>kNN and linear accuracy") == 2


@pytest.fixture
def few(monkeypatch):
    """Fewer images under the name "digits", quick to encode."""
    data = few_digits()
    monkeypatch.setattr("moco_ext.report.read.load", lambda *arguments, **keywords: data)
    return data


def checkpoint(folder, seed):
    model = build_model(tiny(seed=seed))
    model(torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8))  # statistics that are not those of the start
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.03)
    save_checkpoint(folder / "checkpoint.pth", epoch=1, arch="resnet8-small", model=model, optimizer=optimizer)
    return model.encoder_q


def test_features_of_several_runs(tmp_path, few):
    folders = [directory(tmp_path / name, seed=i) for i, name in enumerate(["one", "data", "three", "four"])]
    encoders = [checkpoint(folder, i) for i, folder in enumerate(folders)]
    runs = [read_run(folder, folder.name) for folder in folders]
    (gallery,) = galleries(runs, folders, data_root=tmp_path, device=torch.device("cpu"), workers=0)
    assert list(gallery.features) == ["raw pixels", "one", "data", "three"]  # the first few
    for name, encoder in zip(("one", "data"), encoders, strict=False):
        torch.testing.assert_close(gallery.features[name][1], encoder_features(encoder, few, few.test))


def test_features_of_one_run(tmp_path, few):
    """Also those of the untrained encoder, as pre-training would have computed them."""
    from moco_ext.evaluate import estimate_batchnorm_

    folder = directory(tmp_path / "one", moco_dim=16)
    checkpoint(folder, 0)
    run = read_run(folder, "one")
    (gallery,) = galleries([run], [folder], data_root=tmp_path, device=torch.device("cpu"), workers=0)
    assert list(gallery.features) == ["raw pixels", "untrained encoder", "trained encoder"]
    untrained = build_model(tiny()).encoder_q
    estimate_batchnorm_(untrained, few, few.train)
    torch.testing.assert_close(gallery.features["untrained encoder"][1], encoder_features(untrained, few, few.test))


# --- in a browser -------------------------------------------------------------------------------------------

# Written to the document by the page itself: what is wider than the window, not drawn, or drawn in the paper's color.
_MEASURE = """<script>addEventListener("load", () => {
  const faults = [], root = document.documentElement;
  if (root.scrollWidth > innerWidth) faults.push(`page ${root.scrollWidth} wide in ${innerWidth}`);
  for (const image of document.images) if (!image.naturalWidth) faults.push("image not decoded");
  for (const box of document.querySelectorAll("section, svg, figure, td b, h2")) {
    const { width, height } = box.getBoundingClientRect();
    if (width < 8 || height < 8) faults.push(`${box.tagName} of ${width} x ${height}`);
  }
  const paper = getComputedStyle(document.body).backgroundColor;
  for (const text of document.querySelectorAll("h1, h2, p, b, th, svg text")) {
    const style = getComputedStyle(text);
    if ((text.closest("svg") ? style.fill : style.color) === paper) faults.push(`${text.tagName} is invisible`);
  }
  document.title = JSON.stringify({ faults, paper, width: innerWidth });
})</script>"""


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_in_a_browser(tmp_path, with_pictures, runs, width, scheme):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs Chromium")
    records = [record(e, feature_std=0.9, effective_rank=30.0, knn_top1=90.0 + e) for e in (1, 2, 3)]
    page = compose([reported(f"run {i}" * 8, records=records) for i in range(runs)], [with_pictures])
    frame = tmp_path / "frame.html"  # a headless window is at least 500 pixels wide; a frame is not
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{_MEASURE}</body>"))
    frame.write_text(
        f'<style>iframe {{ border: 0; color-scheme: {scheme} }}</style><iframe src="page.html" width="{width}" '
        'height="900"></iframe><script>addEventListener("load", () => { document.body.textContent = '
        "frames[0].document.title })</script>"
    )
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    done = subprocess.run(
        [browser, *flags, *dark, "--virtual-time-budget=5000", "--dump-dom", f"file://{frame}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    measured = json.loads(re.search(r"<body>(.*?)</body>", done.stdout, re.DOTALL)[1])
    assert measured == {
        "faults": [],
        "paper": "rgb(251, 251, 250)" if scheme == "light" else "rgb(18, 22, 28)",
        "width": width,
    }


# --- as it is called ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_curves")
def test_write_report_is_the_page_of_one_run(tmp_path, with_pictures):
    config, records = tiny(), [record(1)]
    write_report(tmp_path / "report.html", config, with_pictures.data, records, SUMMARY, with_pictures.features)
    page = (tmp_path / "report.html").read_text()
    assert "<h1>MoCo on digits</h1>" in page
    assert "resnet8-small · 1,258 training images, 539 test images · 1 epoch in 30 s · queue of 100 keys" in page
    assert {"raw pixels", "untrained encoder", "trained encoder"} <= charts(page).keys()
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.usefixtures("no_curves")
def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = [str(directory(tmp_path / name, seed=i)) for i, name in enumerate("ab")]
    assert cli.main(["report", folders[0], "--no-features"]) == 0  # there is no checkpoint
    assert "<h1>MoCo on digits</h1>" in (tmp_path / "a" / "report.html").read_text()
    assert cli.main(["report", *folders, "--no-features"]) == 0
    assert "<h1>2 runs on digits</h1>" in (tmp_path / "report.html").read_text()
    assert cli.main(["report", *folders, "--no-features", "--output", "c.html"]) == 0
    assert (tmp_path / "c.html").read_text() == (tmp_path / "report.html").read_text()
    assert re.search(r"c\.html: 0\.\d MB", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "run: expected a run directory, with config.json and a line in metrics.jsonl, got nowhere"),
        (["a", "./a"], "run: expected different directories, got a, a"),
        (["a"], "checkpoint: no such file: a/checkpoint.pth; --no-features needs neither data nor checkpoints"),
        (["a", "--output", "b/c.html"], "output: no such folder: b"),
    ],
)
def test_errors(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.delenv("MOCO_EXT_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    directory(tmp_path / "a")
    assert cli.main(["report", *arguments]) == 1
    assert capsys.readouterr().err == f"moco-ext: error: {message}\n"


@pytest.mark.parametrize(("content", "got"), [(b'{"a": ', "Expecting value"), (b"\xff", "'utf-8'"), (b"[1]", "list")])
def test_a_damaged_file_is_named(tmp_path, content, got):
    folder = directory(tmp_path / "run")
    (folder / "linear.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^expected a JSON object in .*run/linear.json, got {got}"):
        read_run(folder, "run")


def test_names_tell_runs_apart():
    assert distinct_names([Path("x/a"), Path("x/b")]) == ["a", "b"]
    assert distinct_names([Path("x/a"), Path("y/a"), Path("x/b")]) == ["x/a", "y/a", "x/b"]
