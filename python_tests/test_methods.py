"""Each row of the table in docs/methods.md: its code, run as it is written, against its formula in plain torch."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moco_ext import expected_key, info_nce, nearest_keys

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
N, C, K, CLASSES = 6, 8, 40, 3


def unit(x):
    return F.normalize(x, dim=-1)


def table():
    """Method -> its code: the code spans of the last cell, one a line."""
    rows = re.findall(r"^\| (.+?) \| .+ \| (.+) \|$", PAGE.read_text(), flags=re.MULTILINE)
    return {method: re.findall(r"`([^`]+)`", code) for method, code in rows if "`" in code}


def problem():
    """Every name in the table, in float64. Teachers and queues have no gradient."""

    def rows(n, gradient=True):
        return torch.randn(n, C, dtype=torch.float64).requires_grad_(gradient)

    names = ("q", "z", "z1", "z2", "p", "image", "text", "anchor", "positive", "hard_negative")
    tensors = {name: rows(N) for name in names}
    teachers = {name: rows(N, False) for name in ("k", "image_m", "text_m")} | {"all_keys": rows(3 * N, False)}
    return tensors | teachers | {
        "queue": unit(rows(K, False)),
        "labels": torch.arange(N) % CLASSES,
        "queue_labels": torch.arange(K) % (CLASSES + 1) - 1,  # -1: unknown, equal to none
        "scale": torch.tensor(8.0, dtype=torch.float64, requires_grad=True),
        "T_rows": (0.1 + torch.rand(N, dtype=torch.float64)).requires_grad_(),
        "margins": torch.rand(N, dtype=torch.float64),
        "bias": torch.randn(K, dtype=torch.float64),
        "T_keys": 0.1 + torch.rand(K, dtype=torch.float64),
        "T": 0.2, "T_q": 0.1, "T_k": 0.04, "alpha": 0.4, "epsilon": 0.1, "rank": 1, "N": N,
        "torch": torch, "F": F, "unit": unit,
        "info_nce": info_nce, "expected_key": expected_key, "nearest_keys": nearest_keys,
    }  # fmt: skip


def mean_of_positives(scores, positive, candidate):
    """-log p, averaged over each row's positives, then over the rows that have any."""
    log_p = scores - scores.masked_fill(~candidate, -torch.inf).logsumexp(1, keepdim=True)
    losses = -torch.where(positive, log_p, 0).sum(1) / positive.sum(1).clamp_min(1)
    return losses.mean()


def cross_entropy(scores, first=0):
    return F.cross_entropy(scores, first + torch.arange(len(scores)))


class Formulas:
    """The formula of each row, by a word of its name. x has the tensors of ``problem``."""

    def __init__(self, x):
        self.__dict__.update(x)
        key = (unit(self.q) * unit(self.k)).sum(1, keepdim=True)
        self.own_and_queue = torch.cat([key, unit(self.q) @ self.queue.t()], 1)  # [N, 1 + K] cosines
        self.same = self.labels[:, None] == self.queue_labels  # [N, K]
        self.is_positive = torch.cat([torch.ones(N, 1, dtype=torch.bool), self.same], 1)
        both = unit(torch.cat([self.z1, self.z2]))
        self.both_views = (both @ both.t() / self.T).masked_fill(torch.eye(2 * N, dtype=torch.bool), -torch.inf)

    def moco_v1(self):
        return F.cross_entropy(self.own_and_queue / self.T, torch.zeros(N, dtype=torch.long))

    def moco_v3(self):
        return 2 * self.T * cross_entropy(unit(self.q) @ unit(self.all_keys).t() / self.T, self.rank * N)

    def simclr(self):
        return F.cross_entropy(self.both_views, torch.arange(2 * N).roll(N))

    def clip(self):
        scores = self.scale * unit(self.image) @ unit(self.text).t()
        return (cross_entropy(scores) + cross_entropy(scores.t())) / 2

    def albef(self):
        candidates = torch.cat([unit(self.text_m), self.queue])
        teacher = (unit(self.image_m) @ candidates.t() / self.T).softmax(1)
        labels = (1 - self.alpha) * torch.eye(N, N + K, dtype=torch.float64) + self.alpha * teacher
        return F.cross_entropy(unit(self.image) @ candidates.t() / self.T, labels)

    def ressl(self):
        teacher = (unit(self.k) @ self.queue.t() / self.T_k).softmax(1)
        return F.cross_entropy(unit(self.q) @ self.queue.t() / self.T_q, teacher)

    def isd(self):
        student, teacher = ((unit(x) @ self.queue.t() / self.T).log_softmax(1) for x in (self.q, self.k))
        return F.kl_div(student, teacher, log_target=True, reduction="batchmean")

    def seed(self):
        teacher = torch.cat([torch.ones(N, 1), unit(self.k) @ self.queue.t()], 1) / self.T_k
        return F.cross_entropy(self.own_and_queue / self.T_q, teacher.softmax(1))

    def supcon(self):
        scores, others = unit(self.z) @ unit(self.z).t() / self.T, ~torch.eye(N, dtype=torch.bool)
        return mean_of_positives(scores, (self.labels[:, None] == self.labels) & others, others)

    def supmoco(self):
        return mean_of_positives(self.own_and_queue / self.T, self.is_positive, torch.ones_like(self.is_positive))

    def mil_nce(self):
        p = (self.own_and_queue / self.T).softmax(1)
        return -(p * self.is_positive).sum(1).log().mean()

    def unimoco(self):
        s = self.own_and_queue / self.T
        return torch.log1p((s.exp() * ~self.is_positive).sum(1) * ((-s).exp() * self.is_positive).sum(1)).mean()

    def dcl(self):
        rows = torch.arange(2 * N)
        own = self.both_views[rows, rows.roll(N)]
        negatives = self.both_views.masked_fill(torch.eye(2 * N, dtype=torch.bool).roll(N, 1), -torch.inf)
        return (negatives.logsumexp(1) - own).mean()

    def nnclr(self):
        nearest = self.queue[(unit(self.z) @ self.queue.t()).argmax(1)]
        return cross_entropy(nearest @ unit(self.p).t() / self.T)

    def msf(self):
        nearest = self.queue[(unit(self.k) @ self.queue.t()).topk(5).indices]  # [N, 5, C]
        return (unit(self.q)[:, None] - nearest).square().sum(2).mean()

    def xbm(self):
        others = torch.cat([~torch.eye(N, dtype=torch.bool), torch.ones(N, K, dtype=torch.bool)], 1)
        same = torch.cat([self.labels[:, None] == self.labels, self.same], 1)
        scores = unit(self.z) @ torch.cat([unit(self.z), self.queue]).t() / self.T
        return mean_of_positives(scores, same & others, others)

    def multiple_negatives_ranking_loss(self):
        keys = torch.cat([unit(self.positive), unit(self.hard_negative)])
        return cross_entropy(self.scale * unit(self.anchor) @ keys.t())

    def false_negatives(self):
        masked = torch.cat([torch.zeros(N, 1, dtype=torch.bool), self.same], 1)
        scores = (self.own_and_queue / self.T).masked_fill(masked, -torch.inf)
        return F.cross_entropy(scores, torch.zeros(N, dtype=torch.long))

    def label_smoothing(self):
        scores = torch.cat([(self.q * self.k).sum(1, keepdim=True), self.q @ self.queue.t()], 1) / self.T
        return F.cross_entropy(scores, torch.zeros(N, dtype=torch.long), label_smoothing=self.epsilon)

    def temperature_per_row(self):
        return F.cross_entropy(self.own_and_queue / self.T_rows[:, None], torch.zeros(N, dtype=torch.long))

    def margin(self):
        scores = self.own_and_queue / self.T
        scores = torch.cat([scores[:, :1] - self.margins[:, None], scores[:, 1:]], 1)
        return F.cross_entropy(scores, torch.zeros(N, dtype=torch.long))

    def bias_per_key(self):
        scores = self.own_and_queue / self.T + F.pad(self.bias, (1, 0))
        return F.cross_entropy(scores, torch.zeros(N, dtype=torch.long))

    def temperature_per_key(self):
        scores = self.own_and_queue / F.pad(self.T_keys, (1, 0), value=self.T)
        return F.cross_entropy(scores, torch.zeros(N, dtype=torch.long))


FORMULAS = [name for name in vars(Formulas) if not name.startswith("_")]


def of(method):
    """The name of a method's formula: the first one that its words begin with."""
    words = re.sub(r"\W+", "", method.replace("_", "")).lower()
    return next(name for name in FORMULAS if words.startswith(name.replace("_", "")))


def test_every_row_has_a_formula():
    assert sorted(of(method) for method in table()) == sorted(FORMULAS)


@pytest.mark.parametrize("method", table(), ids=of)
def test_code_is_the_formula(method):
    x = problem()
    inputs = [value for value in x.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    want = getattr(Formulas(x), of(method))()
    want_grads = torch.autograd.grad(want, inputs, allow_unused=True)
    *lines, last = table()[method]
    exec("\n".join(lines), x)
    got = eval(last, x)
    grads = torch.autograd.grad(got, inputs, allow_unused=True)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)  # float64, with sums in another order
    assert any(grad is not None and grad.abs().max() > 1e-3 for grad in want_grads)
    for grad, reference in zip(grads, want_grads, strict=True):
        if reference is None:
            assert grad is None
        else:
            torch.testing.assert_close(grad, reference, rtol=1e-8, atol=1e-9)
