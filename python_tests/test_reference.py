"""The oracle itself, against loops over Python floats that share no torch operation with it."""

import math

import pytest
import torch
from torch import nn

from moco_ext import reference
from moco_ext.stats import InfoNCEStats


def unit(row):
    length = max(math.sqrt(math.fsum(x * x for x in row)), 1e-12)
    return [x / length for x in row]


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def loop_info_nce(query, key, queue, temperature, normalize):
    """One (loss, lse, positive logit, rank) a row of nested lists."""
    rows = []
    for q, k in zip(query, key, strict=True):
        if normalize:
            q, k = unit(q), unit(k)
        positive = dot(q, k) / temperature
        negatives = [dot(q, n) / temperature for n in queue]
        top = max([positive, *negatives])
        lse = top + math.log(math.fsum(math.exp(s - top) for s in [positive, *negatives]))
        rows.append((lse - positive, lse, positive, sum(s > positive for s in negatives)))
    return rows


def example(n=5, k=11, c=3):
    tensors = [torch.randn(rows, c, dtype=torch.float64) for rows in (n, n, k)]
    tensors[0][1] = 0  # a zero row
    return tensors


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0, 10.0])
def test_info_nce(temperature, normalize):
    tensors = example()
    rows = loop_info_nce(*(t.tolist() for t in tensors), temperature, normalize)
    losses, lses, positives, ranks = zip(*rows, strict=True)
    for reduction, want in (("none", losses), ("sum", math.fsum(losses)), ("mean", math.fsum(losses) / 5)):
        loss, stats = reference.info_nce(
            *tensors, temperature, normalize=normalize, reduction=reduction, return_stats=True
        )
        # 1e-12: float64, with logits up to some hundreds
        assert loss.tolist() == pytest.approx(want, rel=1e-12, abs=1e-12)
        assert stats.loss.tolist() == pytest.approx(losses, rel=1e-12, abs=1e-12)
        assert stats.lse.tolist() == pytest.approx(lses, rel=1e-12)
        assert stats.positive_logit.tolist() == pytest.approx(positives, rel=1e-12, abs=1e-12)
        assert stats.rank.tolist() == list(ranks)


@pytest.mark.parametrize("normalize", [True, False])
def test_info_nce_gradients_are_difference_quotients(normalize):
    tensors = example(3, 4, 3)
    tensors[0][1] = 0.5  # a zero row has no derivative to take differences of
    temperature = 0.3

    def total(query, key, temperature):
        return math.fsum(row[0] for row in loop_info_nce(query, key, queue, temperature, normalize))

    queue = tensors[2].tolist()
    inputs = [t.clone().requires_grad_() for t in (*tensors[:2], torch.tensor(temperature).double())]
    reference.info_nce(*inputs[:2], tensors[2], inputs[2], normalize=normalize, reduction="sum").backward()
    step = 1e-5
    for x in inputs:
        for i in range(x.numel()):
            ends = []
            for sign in (1, -1):
                moved = [t.detach().clone() for t in inputs]
                moved[[x is t for t in inputs].index(True)].view(-1)[i] += sign * step
                ends.append(total(moved[0].tolist(), moved[1].tolist(), moved[2].item()))
            # central differences: step^2 times a third derivative of some hundreds
            assert x.grad.view(-1)[i].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-6)


def test_dtypes_and_empty_batches():
    query, key, queue = (t.float() for t in example())
    assert reference.info_nce(query.bfloat16(), key.half(), queue.bfloat16()).dtype == torch.float32
    assert reference.info_nce(query, key, queue.double()).dtype == torch.float64
    none = query[:0]
    assert reference.info_nce(none, none, queue).isnan()
    assert reference.info_nce(none, none, queue, reduction="sum").item() == 0
    assert reference.info_nce(none, none, queue, reduction="none").shape == (0,)


def test_a_learnable_queue_is_refused():
    query, key, queue = example()
    with pytest.raises(ValueError, match="EndToEnd"):
        reference.info_nce(query, key, queue.requires_grad_())
    with pytest.raises(ValueError, match="reduction"):
        reference.info_nce(query, key, queue.detach(), reduction="max")


def test_accuracy():
    rank = torch.tensor([0, 0, 3, 9])
    stats = InfoNCEStats(*[torch.zeros(4)] * 3, rank)
    assert [a.item() for a in stats.accuracy((1, 4, 10))] == [50.0, 75.0, 100.0]
    assert stats.accuracy()[0].shape == ()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("batch", [0, 1, 3, 4, 7, 9])
@pytest.mark.parametrize("start", [0, 3, 6, -1])
def test_enqueue(start, batch, normalize):
    queue = [[float(-i)] * 2 for i in range(4)]
    got, got_ptr = torch.tensor(queue, dtype=torch.float64), torch.tensor([start])
    keys = [[i + 1.0, 2.0] for i in range(batch)]
    slot = start % 4
    for row in keys:
        queue[slot] = unit(row) if normalize else row
        slot = (slot + 1) % 4
    reference.enqueue_(got, got_ptr, torch.tensor(keys, dtype=torch.float64).view(batch, 2), normalize=normalize)
    assert got.tolist() == [pytest.approx(row, rel=1e-15) for row in queue]
    assert got_ptr.tolist() == [slot]


def test_momentum_update():
    key, query = torch.randn(6, dtype=torch.float64), torch.randn(6)
    want = [0.75 * k + 0.25 * q for k, q in zip(key.tolist(), query.tolist(), strict=True)]
    small = torch.tensor([1.0], dtype=torch.bfloat16)
    # computed in float32, so that only the result is rounded: 0.999 + 0.001 * 9 = 1.008 -> 1.0078125
    reference.momentum_update_([key, small], [query, torch.tensor([9.0]).bfloat16()], torch.tensor(0.75))
    assert key.tolist() == pytest.approx(want, rel=1e-15)
    assert small.item() == 3.0
    small.fill_(1.0)
    reference.momentum_update_([small], [torch.tensor([9.0])], 0.999)
    assert small.item() == 1.0078125


def test_l2_normalize():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]])
    assert reference.l2_normalize(x).tolist() == [pytest.approx(unit(row), rel=1e-6) for row in x.tolist()]
    assert reference.l2_normalize(x, 0.5)[2].tolist() == pytest.approx([2e-3, 0.0])
    assert reference.l2_normalize(x.half()).dtype == torch.float16


def test_flatten_parameters_order():
    net = nn.Linear(2, 3)
    want = net.weight.flatten().tolist() + net.bias.tolist()
    assert reference.flatten_parameters_(net).tolist() == want
