"""The family of InfoNCE: soft labels, a teacher's expected key, other positives, a temperature for each row."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import HALF, check_info_nce, double, rel_error, run_info_nce, unit_rows
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.library import opcheck

import moco_ext


def problem(n=8, k=300, c=32, device="cpu", dtype=torch.float32):
    query, key = (torch.randn(n, c, device=device, dtype=torch.float64) for _ in range(2))
    return query.to(dtype), (key + 0.5 * query).to(dtype), unit_rows(k, c, dtype, device)


def unit(x):
    return F.normalize(x, dim=1)


def soft_cross_entropy(scores, probabilities):
    return -(probabilities * F.log_softmax(scores, dim=1)).sum(1).mean()


# ---- soft labels ----


@pytest.mark.parametrize("with_key", [True, False])
def test_any_soft_label_is_its_mean_key(device, with_key):
    """Cross-entropy with probabilities, as torch has it, without the scores; gradients to queries and keys."""
    query, key, queue = problem(device=device)
    inputs = [x.requires_grad_() for x in ((query, key) if with_key else (query,))]
    candidates = torch.cat([unit(key)[:, None], queue.expand(8, -1, -1)], 1) if with_key else queue.expand(8, -1, -1)
    probabilities = torch.randn(8, candidates.shape[1], device=device).softmax(1)
    scores = torch.einsum("nc,nkc->nk", unit(query), candidates) / 0.1
    want = soft_cross_entropy(scores, probabilities)
    target = torch.einsum("nk,nkc->nc", probabilities, candidates).detach()
    got = moco_ext.info_nce(query, key if with_key else None, queue, 0.1, target=target)
    assert rel_error(got, want) <= 1e-5
    got_grads = torch.autograd.grad(got, inputs)
    # Torch's gradient has the key in the target too, which is a constant here.
    constant = (unit(query) * (unit(key) * probabilities[:, :1] if with_key else 0)).sum(1).mean() / 0.1
    for a, b in zip(got_grads, torch.autograd.grad(want, inputs, retain_graph=True), strict=True):
        if a is got_grads[0]:
            assert rel_error(a, b) <= 1e-5
    if with_key:
        (of_key,) = torch.autograd.grad(want + constant, key)
        assert rel_error(got_grads[1], of_key) <= 1e-5


def test_momentum_distillation(device):
    """ALBEF's: batch and queue are the candidates, the hard label is mixed with the teacher's softmax."""
    query, key, queue = problem(16, 200, 24, device)
    teacher = query + 0.3 * torch.randn_like(query)
    candidates = torch.cat([unit(key), queue])
    soft = (unit(teacher) @ candidates.t() / 0.07).softmax(1)
    labels = 0.4 * soft + 0.6 * torch.eye(16, 216, device=device)
    query.requires_grad_()
    want = soft_cross_entropy(unit(query) @ candidates.t() / 0.07, labels)
    expected = moco_ext.expected_key(teacher, key, queue, 0.07, in_batch=True)
    target = 0.4 * expected.keys + 0.6 * unit(key)
    got = moco_ext.info_nce(query, key, queue, 0.07, in_batch=True, target=target)
    assert rel_error(got, want) <= 1e-5
    assert rel_error(torch.autograd.grad(got, query)[0], torch.autograd.grad(want, query)[0]) <= 1e-5


def test_relations_to_a_queue(device):
    """ReSSL's: no positive, a sharper teacher; the KL divergence with the teacher's entropy."""
    query, teacher, queue = problem(16, 200, 24, device)
    query.requires_grad_()
    soft = (unit(teacher) @ queue.t() / 0.04).log_softmax(1)
    want = F.kl_div((unit(query) @ queue.t() / 0.1).log_softmax(1), soft, log_target=True, reduction="batchmean")
    keys, lse = moco_ext.expected_key(teacher, None, queue, 0.04)
    negative_entropy = ((unit(teacher) * keys).sum(1) / 0.04 - lse).mean()
    got = moco_ext.info_nce(query, None, queue, 0.1, target=keys) + negative_entropy
    assert abs(got - want) <= 1e-5 * max(1, want)
    assert rel_error(torch.autograd.grad(got, query)[0], torch.autograd.grad(want, query)[0]) <= 1e-5


def test_a_hard_label_is_a_target(device):
    query, key, queue = problem(device=device)
    want = run_info_nce(moco_ext.info_nce, query, key, queue, 0.07)
    got = run_info_nce(moco_ext.info_nce, query, key, queue, 0.07, target=unit(key))
    assert rel_error(got[0], want[0]) <= 1e-5
    assert torch.equal(got[1].rank, want[1].rank)
    assert rel_error(got[2]["query"], want[2]["query"]) <= 1e-5


@given(data=st.data())
def test_expected_key_matches_float64(device, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    n, c, k = draw(st.integers(0, 40)), draw(st.sampled_from([1, 17, 64, 128])), draw(st.sampled_from([1, 64, 999]))
    dtype = draw(st.sampled_from([torch.float32, *HALF, torch.float64 if device.type == "cpu" else torch.float32]))
    query, key, queue = problem(n, k, c, device, dtype)
    in_batch = draw(st.booleans())
    options = {"in_batch": in_batch, "normalize": draw(st.booleans())}
    if draw(st.booleans()):
        options |= {
            "query_ids": torch.arange(n, device=device) % 5,
            "queue_ids": torch.arange(k, device=device) % 7 - 1,
        }
    if in_batch and n > 5 and draw(st.booleans()):
        options["own_key"] = "excluded"
    query, key = query / math.sqrt(c), key / math.sqrt(c)
    temperature = draw(st.sampled_from([0.07, 1.0]))
    temperature = draw(st.sampled_from([temperature, temperature + torch.rand(n, device=device)]))
    got = moco_ext.expected_key(query, key, queue, temperature, **options)
    want = moco_ext.reference.expected_key(*map(double, (query, key, queue, temperature)), **options)
    eps = 1e-5 if device.type == "cpu" or dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    scale = max(1.0, float(query.double().norm(dim=1).amax())) if n and not options["normalize"] else 1.0
    assert got.keys.dtype == got.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=eps, atol=eps * 20 * scale)


def test_expected_key_of_no_candidates(device):
    query, _, queue = problem(device=device)
    keys, lse = moco_ext.expected_key(query, None, queue, num_valid=0)
    assert not keys.any()
    assert (lse == -math.inf).all()


def test_expected_key_records_no_gradient(device):
    query, key, queue = problem(device=device)
    keys, lse = moco_ext.expected_key(query.requires_grad_(), key.requires_grad_(), queue)
    assert not keys.requires_grad
    assert not lse.requires_grad


# ---- other positives ----


def test_the_positive_outside_the_denominator(device):
    """Decoupled contrastive learning, with gradients to both sides."""
    query, key, queue = problem(device=device)
    inputs = [x.requires_grad_() for x in (query, key)]
    positive = (unit(query) * unit(key)).sum(1) / 0.1
    want = ((unit(query) @ queue.t() / 0.1).logsumexp(1) - positive).mean()
    got = moco_ext.info_nce(query, key, queue, 0.1, own_key="decoupled")
    assert rel_error(got, want) <= 1e-5
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        assert rel_error(a, b) <= 1e-5


@pytest.mark.parametrize("positives", ["mean", "sum"])
@pytest.mark.parametrize("in_batch", [True, False])
def test_supervised_contrast(device, in_batch, positives):
    """SupCon: positives by label, a row is neither its own positive nor its own negative; its queue has labels too."""
    features, _, queue = problem(24, 60, 16, device)
    labels, queue_labels = torch.arange(24, device=device) % 7, torch.arange(60, device=device) % 9
    labels[5] = 100  # no positive
    features.requires_grad_()
    rows = unit(features)
    keys, ids = (torch.cat([rows, queue]), torch.cat([labels, queue_labels])) if in_batch else (queue, queue_labels)
    itself = torch.eye(24, len(keys), dtype=torch.bool, device=device) & in_batch
    scores = (rows @ keys.t() / 0.2).masked_fill(itself, -math.inf)
    positive = (labels[:, None] == ids) & ~itself
    log_p = scores.log_softmax(1)
    if positives == "mean":
        want = -(torch.where(positive, log_p, 0.0).sum(1) / positive.sum(1).clamp_min(1)).mean()
    else:
        has_one = positive.any(1)
        want = -log_p[has_one].masked_fill(~positive[has_one], -math.inf).logsumexp(1).sum() / 24
    options = {"query_ids": labels, "queue_ids": queue_labels, "same_id": "positive", "return_stats": True}
    options["positives"] = positives
    if in_batch:
        got, stats = moco_ext.info_nce(features, features, queue, 0.2, in_batch=True, own_key="excluded", **options)
    else:
        got, stats = moco_ext.info_nce(features, None, queue, 0.2, **options)
    assert rel_error(got, want) <= 1e-5
    assert stats.loss[5] == 0
    assert (stats.rank == -1).all()
    grad, want_grad = (torch.autograd.grad(x, features)[0] for x in (got, want))
    assert rel_error(grad, want_grad) <= 1e-5
    assert in_batch or not grad[5].any()


def test_ids_of_the_keys_apart_from_those_of_the_queries(device):
    """A key may be known under another id than its query: here each query's key is a decoy for the next one."""
    query, key, queue = problem(8, 50, 16, device)
    ids = torch.arange(8, device=device)
    options = {"query_ids": ids, "key_ids": (ids + 1) % 8, "queue_ids": torch.arange(50, device=device)}
    check_info_nce(query, key, queue, 0.1, in_batch=True, **options)
    masked = moco_ext.info_nce(query, key, queue, 0.1, in_batch=True, **options)
    assert masked != moco_ext.info_nce(
        query, key, queue, 0.1, in_batch=True, query_ids=ids, queue_ids=ids.new_full([50], 9)
    )


# ---- a temperature for each row ----


@pytest.mark.parametrize("normalize", [True, False])
def test_row_temperatures(device, normalize):
    query, key, queue = problem(device=device)
    temperature = 0.05 + torch.rand(8, device=device)
    for reduction in ("mean", "none"):
        upstream = torch.randn(8 if reduction == "none" else (), device=device)
        check_info_nce(
            query, key, queue, temperature, upstream, normalize=normalize, reduction=reduction, in_batch=True
        )
    alone = [moco_ext.info_nce(query[i : i + 1], key[i : i + 1], queue, temperature[i]) for i in range(8)]
    assert rel_error(moco_ext.info_nce(query, key, queue, temperature, reduction="none"), torch.stack(alone)) <= 1e-5


def test_row_temperatures_of_groups(device):
    pairs = [problem(device=device) for _ in range(2)]
    query, key = (torch.stack([pair[i] for pair in pairs]) for i in range(2))
    temperature = 0.1 + torch.rand(2, 8, device=device)
    loss = moco_ext.info_nce(query, key, pairs[0][2], temperature, reduction="none")
    alone = [moco_ext.info_nce(query[g], key[g], pairs[0][2], temperature[g], reduction="none") for g in range(2)]
    assert rel_error(loss, torch.stack(alone)) <= 1e-5


# ---- autograd, torch.library, torch.compile ----


@pytest.mark.parametrize("kind", ["target", "no key", "decoupled", "excluded", "rows"])
def test_gradcheck(kind):
    query, key, queue = problem(4, 9, 5, dtype=torch.float64)
    target = torch.randn(4, 5, dtype=torch.float64)
    labels = {"query_ids": torch.tensor([0, 0, 1, 1]), "queue_ids": torch.arange(9) % 3, "same_id": "positive"}
    options = {
        "target": {"target": target},
        "no key": {"target": target},
        "decoupled": {"own_key": "decoupled", "in_batch": True},
        "excluded": {"own_key": "excluded", "in_batch": True, **labels},
        "rows": {},
    }[kind]
    temperature = torch.rand(4, dtype=torch.float64) + 0.2 if kind == "rows" else torch.tensor(0.3).double()

    def loss(query, temperature, key=None):
        return moco_ext.info_nce(query, key, queue, temperature, reduction="none", **options)

    inputs = [query, temperature] if kind == "no key" else [query, temperature, key]
    assert gradcheck(loss, [x.requires_grad_() for x in inputs])


def test_the_default_device_may_be_another(device):
    query, key, queue = problem(4, 9, 5, device=device)
    expected = moco_ext.expected_key(query, key, queue)
    with torch.device("meta"):
        got = moco_ext.expected_key(query, key, queue)
    assert torch.equal(got.keys, expected.keys)


def test_func_grad(device):
    query, key, queue = problem(device=device)
    target = torch.randn(8, 32, device=device)

    def loss(query, key):
        soft = moco_ext.info_nce(query, key, queue, 0.1, target=target)
        return soft + moco_ext.info_nce(query, key, queue, 0.1, own_key="decoupled")

    inputs = [x.clone().requires_grad_() for x in (query, key)]
    want = torch.autograd.grad(loss(*inputs), inputs)
    for got, value in zip(torch.func.grad(loss, argnums=(0, 1))(query, key), want, strict=True):
        assert rel_error(got, value) <= 1e-6


@pytest.mark.parametrize("own_key", [0, 1, 2])
def test_opcheck(device, own_key):
    query, key, queue = problem(4, 30, 8, device)
    target = torch.randn(4, 8, device=device)
    head = (None, 0.2, True, 1, True, own_key == 1, False, 3, own_key == 2, 0, None, None, 0.0, None, None, False, None)
    operator = torch.ops.moco_ext.info_nce_forward.default
    opcheck(operator, (query, key, queue, *head, target if own_key != 1 else None, own_key))
    opcheck(operator, (query, None, queue, *head[:5], False, *head[6:8], False, *head[9:], target, 0))


def test_compiles_without_a_graph_break(device):
    query, key, queue = problem(device=device)
    temperature = 0.1 + torch.rand(8, device=device)

    def step(query, key):
        target = moco_ext.expected_key(key, None, queue, 0.05).keys
        loss = moco_ext.info_nce(query, None, queue, temperature, target=target)
        return loss + moco_ext.info_nce(query, key, queue, 0.1, own_key="decoupled")

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        inputs = [x.clone().requires_grad_() for x in (query, key)]
        results.append(torch.autograd.grad(run(*inputs), inputs))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_never_waits_for_the_device():
    query, key, queue = problem(32, 4096, 128, "cuda")
    query.requires_grad_()

    def step():
        teacher = moco_ext.expected_key(key, None, queue, 0.04).keys
        loss = moco_ext.info_nce(query, key, queue, torch.full((32,), 0.1, device="cuda"), target=teacher)
        return torch.autograd.grad(loss, query)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- errors ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": None}, "key: expected a positive key, a target, or ids with same_id='positive', got none of them"),
        ({"key": None, "target": torch.ones(8, 31)}, "target: expected 32 features as in query, got shape"),
        ({"target": torch.ones(7, 32)}, r"target: expected the shape of query \[8, 32\], got \[7, 32\]"),
        ({"target": torch.ones(8, 32, requires_grad=True)}, "target: expected a tensor without gradient"),
        ({"target": torch.ones(8, 32), "label_smoothing": 0.1}, "label_smoothing: expected 0 with a target"),
        (
            {"key": None, "in_batch": True, "target": torch.ones(8, 32)},
            "key: expected the keys of the batch with in_batch",
        ),
        (
            {"key": torch.ones(8, 32, requires_grad=True), "in_batch": True, "target": torch.ones(8, 32)},
            "key: expected no",
        ),
        (
            {
                "target": torch.ones(8, 32),
                "positives": "sum",
                "same_id": "positive",
                "query_ids": torch.arange(8),
                "queue_ids": torch.arange(300),
            },
            "target: expected none with positives='sum'",
        ),
        ({"positives": "max"}, "positives: expected 'mean' or 'sum', got 'max'"),
        ({"positives": "sum"}, "positives: expected 'mean' without"),
        ({"own_key": "none"}, "own_key: expected 'positive', 'decoupled' or 'excluded', got 'none'"),
        ({"own_key": "decoupled", "target": torch.ones(8, 32)}, "own_key: expected no target"),
        ({"own_key": "excluded", "in_batch": True}, "own_key: expected a positive key, a target, or ids"),
        ({"own_key": "excluded", "target": torch.ones(8, 32)}, "own_key: expected 'excluded' only with in_batch"),
        ({"key_ids": torch.arange(8)}, "key_ids: expected none without in_batch"),
        ({"key_ids": torch.arange(8), "in_batch": True}, "query_ids: expected together with key_ids"),
        ({"temperature": torch.ones(7)}, r"temperature: expected a number, or one for each row \[8\], got shape \[7\]"),
        ({"temperature": torch.ones(8).long()}, "temperature: expected a floating point tensor"),
        ({"temperature": torch.tensor([0.1] * 7 + [-1])}, "temperature: expected a positive number, got -1"),
        ({"temperature": torch.tensor([0.1] * 7 + [math.nan])}, "temperature: expected a positive number, got nan"),
    ],
)
def test_bad_arguments_are_named(options, message):
    query, key, queue = problem()
    inputs = {"query": query, "key": key, "queue": queue} | options
    with pytest.raises((ValueError, TypeError), match=message):
        moco_ext.info_nce(**inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0"),
        ({"own_key": "decoupled"}, "own_key: expected 'positive' or 'excluded'"),
        ({"query": torch.ones(2, 8, 32)}, r"query: expected \[N, C\], got \[2, 8, 32\]"),
        ({"queue": None}, "queue: expected a tensor, or in_batch keys"),
    ],
)
def test_bad_arguments_of_expected_key_are_named(options, message):
    query, key, queue = problem()
    with pytest.raises((ValueError, TypeError), match=message):
        moco_ext.expected_key(**{"query": query, "key": key, "queue": queue} | options)
