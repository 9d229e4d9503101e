"""Weighted kNN, the linear classifier, their features, and the scores of several representations."""

import copy
import dataclasses
import io
import math
import statistics

import pytest
import torch
from torch import nn
from training import few_digits, run_in, tiny

from moco_ext import data as mdata
from moco_ext import encoders
from moco_ext.data.datasets import labeled_subset
from moco_ext.evaluate import (
    encoder_features,
    estimate_batchnorm_,
    knn_predict,
    knn_top1,
    linear_top1,
    nearest,
    pixel_features,
)
from moco_ext.evaluate import features as evaluate_features
from moco_ext.evaluate.features import check_finite
from moco_ext.evaluate.scores import all_features, few_label_top1, representations, split_features, top1
from moco_ext.runs import console
from moco_ext.train import build_model

pytest.importorskip("sklearn")
pytest.importorskip("rich")


def brute_force(train, labels, test, k, temperature):
    """The definition, one vote at a time, in float64."""
    predictions = []
    for row in test.double():
        cosines = [float(row @ other / (row.norm() * other.norm())) for other in train.double()]
        order = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]
        votes = [0.0] * (int(labels.max()) + 1)
        for i in order:
            votes[int(labels[i])] += math.exp(cosines[i] / temperature)
        predictions.append(votes.index(max(votes)))
    return predictions


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("chunk", [7, 16, 1000])
def test_knn_is_the_brute_force_vote(k, temperature, chunk):
    train, labels = torch.randn(40, 6), torch.randint(0, 5, (40,))
    test = torch.randn(23, 6)
    predicted = knn_predict(train, labels, test, k=k, temperature=temperature, chunk=chunk)
    assert predicted.tolist() == brute_force(train, labels, test, k, temperature)


def test_knn_weights_outvote_numbers():
    """Three far neighbors of class 1 against one near neighbor of class 0."""
    near, far = torch.tensor([[1.0, 0.05]]), torch.tensor([[1.0, 1.0]]).repeat(3, 1)
    train, labels = torch.cat([near, far]), torch.tensor([0, 1, 1, 1])
    test = torch.tensor([[1.0, 0.0]])
    assert knn_predict(train, labels, test, k=4, temperature=0.07).tolist() == [0]
    assert knn_predict(train, labels, test, k=4, temperature=10.0).tolist() == [1]


def test_knn_survives_a_tiny_temperature_and_clips_k():
    train, labels = torch.randn(30, 4), torch.randint(0, 3, (30,))
    predicted = knn_predict(train, labels, train * 3, k=1000, temperature=1e-4)
    assert predicted.tolist() == labels.tolist()  # each image's nearest neighbor is itself
    assert knn_top1(train, labels, train, (labels + 1) % 3, k=1) == 0.0
    assert knn_predict(train, labels, train[:0]).tolist() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_features": torch.randn(3, 5)}, r"test_features: expected.*got \[3, 5\]"),
        ({"train_labels": torch.zeros(3, dtype=torch.int64)}, r"train_labels: expected \[8\], got \[3\]"),
        ({"k": 0}, "k, temperature, N: expected all positive, got 0"),
        ({"temperature": -1.0}, "got 200, -1.0, 8"),
        ({"temperature": math.nan}, "got 200, nan, 8"),
    ],
)
def test_knn_errors(changes, message):
    arguments = {
        "train_features": torch.randn(8, 4),
        "train_labels": torch.zeros(8, dtype=torch.int64),
        "test_features": torch.randn(3, 4),
        "k": 200,
        "temperature": 0.07,
    }
    with pytest.raises(ValueError, match=message):
        knn_predict(**(arguments | changes))


@pytest.mark.parametrize("top1", [knn_top1, linear_top1])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("argument", [0, 2])
def test_features_must_be_finite(top1, bad, argument):
    task = [torch.randn(30, 4), torch.arange(30) % 3, torch.randn(9, 4), torch.arange(9) % 3]
    task[argument][3, 2] = bad
    task[argument][5] = torch.tensor([math.inf, -math.inf, 0, 0])  # whose sum is NaN
    name = {0: "train_features", 2: "test_features"}[argument]
    rows = len(task[argument])
    with pytest.raises(ValueError, match=f"{name}: expected finite values, got NaN or infinity in 2 of {rows} rows"):
        top1(*task)


def test_large_features_are_finite():
    check_finite("features", torch.full((2, 4), 3e38))  # whose sum is not, in float32


def test_nearest_orders_by_cosine_whatever_the_chunks():
    bank, rows = torch.randn(50, 8), torch.randn(9, 8)
    cosine = nn.functional.cosine_similarity(rows[:, None], bank[None], dim=2)
    expected = cosine.argsort(dim=1, descending=True)[:, :6]
    for chunk in (6, 11, 4096):
        assert torch.equal(nearest(bank, rows, 6, chunk), expected)


def test_linear_classifier_finds_what_is_linear_and_nothing_else():
    x = torch.randn(400, 6)
    linear = (x[:, 0] - 2 * x[:, 3] > 0).long()
    noise = torch.randint(0, 2, (400,))
    assert linear_top1(x[:300], linear[:300], x[300:], linear[300:]) >= 95
    assert 35 <= linear_top1(x[:300], noise[:300], x[300:], noise[300:]) <= 65  # 3 standard errors of a coin


def test_linear_standardizes_and_ignores_constant_features():
    x = torch.randn(400, 3)
    labels = (x[:, 0] > 0).long()
    score = linear_top1(x[:300], labels[:300], x[300:], labels[300:])
    awkward = torch.cat([x * torch.tensor([1e-3, 1e3, 1.0]) + 50, torch.full((400, 1), 7.0)], 1)
    assert abs(linear_top1(awkward[:300], labels[:300], awkward[300:], labels[300:]) - score) <= 1


def test_encoder_features_are_pooled_eval_mode_features_and_leave_no_trace():
    digits = mdata.load("digits")
    encoder = encoders.resolve("resnet8-small")(num_classes=16)
    encoder.bn1.eval()  # a frozen layer stays frozen
    modes = [module.training for module in encoder.modules()]
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    features = encoder_features(encoder, digits, digits.test, batch_size=100)
    assert [module.training for module in encoder.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
    images = torch.cat([images for images, _ in mdata.eval_batches(digits, digits.test)])
    encoder.eval()
    torch.testing.assert_close(encoder.fc(features), encoder(images).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_features_under_autocast_are_nearly_those_in_float32(precision):
    digits = few_digits()
    encoder = encoders.resolve("resnet8-small")(num_classes=16)
    exact, rounded = (encoder_features(encoder, digits, digits.test, precision=p) for p in ("fp32", precision))
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0, atol=0.02 * exact.abs().max().item())
    estimated = copy.deepcopy(encoder)
    estimate_batchnorm_(estimated, digits, digits.train, precision=precision)
    estimate_batchnorm_(encoder, digits, digits.train)
    assert not torch.equal(estimated.bn1.running_var, encoder.bn1.running_var)
    torch.testing.assert_close(estimated.bn1.running_var, encoder.bn1.running_var, rtol=0.02, atol=1e-4)
    with pytest.raises(ValueError, match=r"^precision: expected one of fp32, bf16, fp16, got 'half'"):
        encoder_features(encoder, digits, digits.test, precision="half")


def test_raw_digits_are_easy():
    digits = mdata.load("digits")
    train, test = pixel_features(digits, digits.train), pixel_features(digits, digits.test)
    assert train.shape == (len(digits.train), 64)
    task = (train, digits.train.labels, test, digits.test.labels)
    assert knn_top1(*task, k=20) > 96
    assert linear_top1(*task) > 96


def test_estimated_batchnorm_statistics_are_those_of_the_images():
    digits = mdata.load("digits")
    encoder = encoders.resolve("resnet8-small")(num_classes=8)
    encoder.bn1.momentum, mode = 0.3, encoder.training
    estimate_batchnorm_(encoder, digits, digits.train, batch_size=len(digits.train))
    with torch.no_grad():
        images = torch.cat([images for images, _ in mdata.eval_batches(digits, digits.train, 100)])
        first = encoder.conv1(images)
    torch.testing.assert_close(encoder.bn1.running_mean, first.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.bn1.running_var, first.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert (encoder.bn1.momentum, encoder.training) == (0.3, mode)


# --- scores of several representations ----------------------------------------------------------------------


def test_every_representation_is_scored_by_both_protocols(tmp_path):
    few, options = few_digits(), run_in(tmp_path)
    untrained, trained = (build_model(tiny(seed=seed)).encoder_q for seed in (0, 1))
    statistics = build_model(tiny()).encoder_q
    estimate_batchnorm_(statistics, few, few.train)
    expected = {
        "pixels": [pixel_features(few, split) for split in few.splits],
        "untrained": [encoder_features(statistics, few, split) for split in few.splits],
        "trained": [encoder_features(trained, few, split) for split in few.splits],
    }
    features = all_features(few, options, untrained=untrained, trained=trained)
    assert list(features) == list(expected)
    scores = top1(few, features, knn_k=5)
    for name, (train, test) in expected.items():
        assert torch.equal(features[name][0], train), name
        assert torch.equal(features[name][1], test), name
        task = (train, few.train.labels, test, few.test.labels)
        assert scores["knn_top1"][name] == round(knn_top1(*task, k=5), 2)
        assert scores["linear_top1"][name] == round(linear_top1(*task), 2)


def test_one_deviation_keeps_the_relative_scales_of_features():
    """A small feature that decides is as good as any if each has its own deviation, and lost if all have one."""
    x = torch.randn(400, 20, generator=torch.Generator().manual_seed(0))
    labels = (x[:, 0] > 0).long()
    x[:, 0] *= 1e-3
    task = x[:300], labels[:300], x[300:], labels[300:]
    assert linear_top1(*task, C=0.01) > 80
    assert linear_top1(*task, C=0.01, per_feature=False) < 65
    whole = linear_top1(*(1000 * part if part.is_floating_point() else part for part in task), per_feature=False)
    assert whole == linear_top1(*task, per_feature=False)


def test_few_labels_per_class(tmp_path):
    """The mean over subsets; every image standardizes the features, labeled or not."""
    from sklearn.linear_model import LogisticRegression

    few = few_digits()
    rows = (torch.cat([few.train.images[:, 0, 0].float(), torch.rand(150, 3)], 1), torch.rand(60, 11))
    scores = few_label_top1(few, {"rows": rows})
    each = []
    for seed in range(5):
        chosen = labeled_subset(few.train.labels, per_class=10, seed=seed)
        assert few.train.labels[chosen].bincount().tolist() == [10] * 10
        standard = [(part - rows[0].mean(0)) / rows[0].std(0).clamp_min(1e-9) for part in rows]
        fitted = LogisticRegression(max_iter=200).fit(standard[0][chosen].numpy(), few.train.labels[chosen])
        each.append(100 * fitted.score(standard[1].numpy(), few.test.labels))
    assert scores["linear_top1"]["rows"] == pytest.approx(statistics.fmean(each), abs=0.4)
    assert scores["linear_std"]["rows"] == pytest.approx(statistics.stdev(each), abs=0.4)
    assert (scores["labels_per_class"], scores["subsets"]) == (10, 5)
    assert few_label_top1(few_digits(90), {"rows": (rows[0][:90], rows[1])}) == {}  # too few images of a class


def test_representations_are_computed_one_at_a_time(tmp_path, monkeypatch):
    """So that the features of two large sets of images need not fit in memory together."""
    asked = []
    monkeypatch.setattr("moco_ext.evaluate.scores.split_features", lambda *arguments, **_: asked.append(arguments[-1]))
    found = representations(few_digits(), run_in(tmp_path), trained=nn.Identity())
    for name in ("pixels", "trained"):
        assert next(found)[0] == name == asked[-1]


def test_an_encoder_that_has_diverged_is_named(tmp_path):
    encoder = build_model(tiny()).encoder_q
    encoder.bn1.running_mean[0] = math.nan
    message = r"features of trained encoder \(training images\): expected finite values, got NaN .* in 150 of 150 rows"
    with pytest.raises(FloatingPointError, match=message):
        all_features(few_digits(), run_in(tmp_path), trained=encoder)
    with pytest.raises(FloatingPointError, match=r"features of run b \(training"):
        split_features(few_digits(), run_in(tmp_path), encoder, "run b")


def test_long_evaluations_report_outside_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr(console, "_LINE_EVERY", -1.0)
    data, out = few_digits(48), io.StringIO()
    encoder = build_model(tiny()).encoder_q
    options = dataclasses.replace(run_in(tmp_path), console=console.make_console(file=out))
    split_features(data, options, encoder, "trained")
    assert out.getvalue().startswith("trained encoder: 48 of 48 images, 0 min left\n")


def test_ranks_gather_features_in_parts_of_one_size(monkeypatch):
    """All features may not fit on a GPU, however many ranks share them."""
    sizes = []
    monkeypatch.setattr(evaluate_features, "world_size", lambda: 256)
    monkeypatch.setattr(evaluate_features, "all_gather", lambda x: sizes.append(256 * len(x)) or x.repeat(256, 1))
    rows = torch.arange(1000.0)[:, None]
    assert torch.equal(evaluate_features._gather(rows, 256_000), rows.repeat(256, 1))
    assert (sum(sizes), max(sizes)) == (256_000, 65_536)
