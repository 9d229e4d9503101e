"""What info_nce takes beyond one positive and a queue: smoothing, ids, in-batch keys, a valid count, groups."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import HALF, check_info_nce, powers, rel_error, run_info_nce, unit_rows
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.library import opcheck

import moco_ext
from moco_ext.ops.info_nce_operator import Arguments


def problem(n=8, k=300, c=32, device="cpu", dtype=torch.float32, queue_dtype=None, m=None, key_offset=0):
    """Random raw queries, keys of which [key_offset, key_offset + n) lie near them, and a queue of unit rows."""
    query = torch.randn(n, c, device=device, dtype=torch.float64)
    key = torch.randn(m or n, c, device=device, dtype=torch.float64)
    key[key_offset : key_offset + n] += 0.5 * query
    return query.to(dtype), key.to(dtype), unit_rows(k, c, queue_dtype or dtype, device)


def _candidates(n, m, k, queue, options):
    """The least number of any row's candidates, its own key apart."""
    if n == 0:
        return 1
    k = 0 if queue is None else options.get("num_valid", k)
    in_batch, offset = options["in_batch"], options["key_offset"]
    seen = torch.ones(n, (m if in_batch else 0) + k, dtype=torch.bool)
    if in_batch:
        seen[torch.arange(n), offset + torch.arange(n)] = False
    if options.get("same_id") == "mask":
        own, keys = options["query_ids"].cpu(), options.get("key_ids", options["query_ids"]).cpu()
        if in_batch and "key_ids" not in options:
            own = own[offset : offset + n]
        ids = torch.cat([*([keys] if in_batch else []), *([] if queue is None else [options["queue_ids"][:k].cpu()])])
        seen &= ~((own[:, None] == ids) & (own >= 0)[:, None])
    return int(seen.sum(1).min())


@given(data=st.data())
def test_matches_float64(device, data):
    """Every option with every other, any shape, dtype and temperature."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    n, c = draw(st.integers(0, 70)), draw(st.sampled_from([1, 3, 17, 64, 128, 129, 520]))
    k = draw(st.sampled_from([1, 63, 64, 65, 257, 1500]))
    in_batch = draw(st.booleans())
    m = n + draw(st.integers(0, 70)) if in_batch else n
    key_offset = draw(st.integers(0, m - n))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, *HALF]))
    queue_dtype = draw(st.sampled_from([torch.float32, torch.float32, *HALF]))
    normalize = draw(st.booleans())
    query, key, queue = problem(n, k, c, device, dtype, queue_dtype, m, key_offset)
    query, key = query / math.sqrt(c), key / math.sqrt(c)
    options: dict[str, Any] = {"in_batch": in_batch, "key_offset": key_offset}
    if in_batch and m and draw(st.booleans()):
        queue = None
    elif draw(st.booleans()):
        options["num_valid"] = draw(st.sampled_from([0, 1, k // 2, k]))
    if draw(st.booleans()):
        names = draw(st.sampled_from([1, 5, 100]))  # one name: all are the same
        options["same_id"] = draw(st.sampled_from(["mask", "positive"]))
        if in_batch and draw(st.booleans()):
            options["query_ids"] = torch.randint(-1, names, (n,), device=device)
            options["key_ids"] = torch.randint(-1, names, (m,), device=device)
        else:
            options["query_ids"] = torch.randint(-1, names, (m,), device=device)
        if queue is not None:
            options["queue_ids"] = torch.randint(-1, names, (k,), device=device)
    positives = options.get("same_id") == "positive"
    if positives and draw(st.booleans()):
        options["positives"] = "sum"
    kind = draw(st.sampled_from(["plain", "smooth", "target", "decoupled", "no key"]))
    if kind == "smooth" and "positives" not in options:
        options["label_smoothing"] = draw(st.sampled_from([0.1, 0.9]))
    elif kind == "decoupled" and not positives:
        options["own_key"] = "decoupled"
    elif kind in ("target", "no key"):
        if not positives:
            options["target"] = torch.randn(n, c, device=device, dtype=draw(st.sampled_from([dtype, torch.float32])))
        if kind == "no key":
            options |= {"own_key": "excluded"} if in_batch else {}
            key = key if in_batch else None
    # Of no candidates, the loss is -inf.
    assume(("own_key" not in options and key is not None) or _candidates(n, m, k, queue, options) > 0)
    temperature = torch.tensor(draw(powers(-2, 1)), device=device)
    if draw(st.booleans()) and n != 1:
        temperature = temperature * (0.5 + torch.rand(n, device=device))
    reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    upstream = torch.randn(n if reduction == "none" else (), device=device)
    check_info_nce(query, key, queue, temperature, upstream, normalize=normalize, reduction=reduction, **options)


@pytest.mark.parametrize("queue_dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("c", [64, 128, 256, 512, 96])
def test_everything_at_once_at_the_fast_widths(device, c, queue_dtype):
    query, key, queue = problem(70, 1000, c, device, queue_dtype=queue_dtype, m=150, key_offset=40)
    ids = {"query_ids": torch.arange(150, device=device) % 60, "queue_ids": torch.arange(1000, device=device) % 300}
    for same_id in ("mask", "positive"):
        check_info_nce(
            query,
            key,
            queue,
            0.07,
            in_batch=True,
            key_offset=40,
            label_smoothing=0.1,
            num_valid=900,
            same_id=same_id,
            **ids,
        )


@pytest.mark.parametrize("same_id", ["mask", "positive"])
@pytest.mark.parametrize("in_batch", [False, True])
def test_gradcheck(in_batch, same_id):
    query, key, queue = problem(4, 9, 5, dtype=torch.float64, m=6 if in_batch else 4, key_offset=1 if in_batch else 0)
    options = {"label_smoothing": 0.2, "num_valid": 7, "in_batch": in_batch, "key_offset": int(in_batch)}
    ids = {"query_ids": torch.tensor([0, 1, 2, 0, 1, -1])[: len(key)], "queue_ids": torch.arange(9) % 4}

    def loss(query, key, temperature):
        return moco_ext.info_nce(query, key, queue, temperature, reduction="none", same_id=same_id, **options, **ids)

    temperature = torch.tensor(0.3, dtype=torch.float64)
    assert gradcheck(loss, [x.requires_grad_() for x in (query, key, temperature)])


def test_smoothing_is_that_of_cross_entropy(device):
    query, key, queue = problem(9, 200, 16, device)
    q, k = F.normalize(query, dim=1), F.normalize(key, dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.t()], 1) / 0.2
    want = F.cross_entropy(logits, torch.zeros(9, dtype=torch.long, device=device), label_smoothing=0.3)
    assert rel_error(moco_ext.info_nce(query, key, queue, 0.2, label_smoothing=0.3), want) <= 1e-5


def test_in_batch_alone_is_the_symmetric_batch_loss(device):
    """Without a queue: the two halves of CLIP's loss, gradients to both sides, as plain torch has them."""
    query, key, _ = problem(33, 1, 24, device)
    sides = [x.requires_grad_() for x in (query, key)]
    loss = moco_ext.info_nce(query, key, None, 0.1, in_batch=True)
    loss = loss + moco_ext.info_nce(key, query, None, 0.1, in_batch=True)
    got = torch.autograd.grad(loss, sides)
    logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).t() / 0.1
    labels = torch.arange(33, device=device)
    want_loss = F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)
    assert rel_error(loss, want_loss) <= 1e-5
    for a, b in zip(got, torch.autograd.grad(want_loss, sides), strict=True):
        assert rel_error(a, b) <= 1e-5


def test_a_masked_row_of_the_queue_is_as_if_it_were_not_there(device):
    """Also when it is the query's own key, which would dominate the sum."""
    query, key, queue = problem(1, 100, 16, device)
    queue[17] = F.normalize(key, dim=1)[0]
    queue_ids = torch.arange(100, device=device)
    got = run_info_nce(
        moco_ext.info_nce, query, key, queue, 0.07, query_ids=torch.tensor([17], device=device), queue_ids=queue_ids
    )
    without = torch.cat([queue[:17], queue[18:]])
    want = run_info_nce(moco_ext.info_nce, query, key, without, 0.07)
    assert rel_error(got[0], want[0]) <= 1e-6
    assert torch.equal(got[1].rank, want[1].rank)
    for name in ("query", "key"):
        assert rel_error(got[2][name], want[2][name]) <= 1e-5


@pytest.mark.parametrize("c", [32, 64, 128, 256])
def test_what_lies_beyond_valid_is_never_read(device, c):
    """Within rounding: on CUDA a count on the device does not change how the queue is divided, fewer keys do."""
    query, key, queue = problem(8, 300, c, device)
    want = moco_ext.info_nce(query, key, queue[:100], reduction="none")
    queue[100:] = math.nan
    for num_valid in (100, torch.tensor([100], device=device), torch.tensor(100, device=device)):
        assert rel_error(moco_ext.info_nce(query, key, queue, num_valid=num_valid, reduction="none"), want) <= 1e-5
    nothing = run_info_nce(moco_ext.info_nce, query, key, queue, 0.07, num_valid=0)
    assert nothing[0] == 0
    assert not nothing[2]["query"].any()


@pytest.mark.parametrize("beyond", [-5, 301])
def test_a_num_valid_tensor_out_of_range(device, beyond):
    """An error on the CPU. CUDA would have to wait for the device to see it, and takes the nearest in range."""
    query, key, queue = problem(8, 300, 32, device)
    num_valid = torch.tensor([beyond], device=device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match=f"num_valid: expected 0 to 300 keys of the queue, got {beyond}"):
            moco_ext.info_nce(query, key, queue, num_valid=num_valid)
        return
    got = moco_ext.info_nce(query, key, queue, num_valid=num_valid)
    want = moco_ext.info_nce(query, key, queue, num_valid=min(max(beyond, 0), 300))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_masked_key_that_is_not_finite_is_never_seen(device, label_smoothing, bad):
    query, key, queue = problem(8, 300, 32, device)
    ids = {"query_ids": torch.arange(8, device=device), "queue_ids": torch.arange(300, device=device) + 100}
    ids["queue_ids"][5] = 3
    options = {"label_smoothing": label_smoothing, "reduction": "none"} | ids
    want = moco_ext.info_nce(query, key, queue, **options)
    queue[5] = bad
    got = moco_ext.info_nce(query, key, queue, **options)
    assert got[3] == want[3]
    others = torch.arange(8, device=device) != 3
    assert not got[others].isfinite().any() or bad != math.nan


def test_an_excluded_own_key_that_is_not_finite_is_never_seen():
    """Neither by the loss nor by the gradient of its query; the other queries, whose candidate it is, see it."""
    query, key, queue = problem(8, 300, 32)
    key[3] = math.nan
    options = {"in_batch": True, "own_key": "excluded", "target": queue[:8]}
    query.requires_grad_()
    loss = moco_ext.info_nce(query, key, queue, reduction="none", **options)
    (grad,) = torch.autograd.grad(loss.sum(), query)
    others = torch.arange(8) != 3
    assert loss[3].isfinite()
    assert grad[3].isfinite().all()
    assert loss[others].isnan().all()
    assert moco_ext.expected_key(query, key, queue, in_batch=True, own_key="excluded").keys[3].isfinite().all()


@pytest.mark.parametrize("positives", ["mean", "sum"])
@pytest.mark.parametrize("c", [32, 64])
def test_a_row_without_a_positive_has_no_gradient(device, c, positives):
    """Not even NaN, the gradient of its logsumexp if a key is not finite."""
    query, key, queue = problem(8, 300, c, device)
    queue[5] = math.nan
    ids = {"query_ids": torch.arange(8, device=device), "queue_ids": torch.arange(300, device=device) + 100}
    options = {"same_id": "positive", "positives": positives, "own_key": "excluded", "in_batch": True} | ids
    for reduction in ("mean", "none"):
        loss, _, grads = run_info_nce(
            moco_ext.info_nce,
            query,
            key,
            queue,
            torch.tensor(0.1, device=device),
            torch.ones_like(query[:, 0]) if reduction == "none" else None,
            reduction=reduction,
            **options,
        )
        assert not loss.any()
        assert not any(grad.any() for grad in grads.values())
    ids["queue_ids"][7] = 3  # the others still have none
    loss, _, grads = run_info_nce(moco_ext.info_nce, query, key, queue, 0.1, reduction="sum", **options)
    others = torch.arange(8, device=device) != 3
    assert loss.isnan()
    assert grads["query"][3].isnan().all()
    assert not grads["query"][others].any()


@pytest.mark.parametrize("temperature", [1e-14, 1e-10])
def test_in_batch_keys_at_huge_logits(temperature):
    """The two passes disagree on logits of 1e10 by 1e3, but no probability exceeds 1."""
    query, key, _ = problem(33, 1, 16)
    key.requires_grad_()
    moco_ext.info_nce(query, key, None, temperature, in_batch=True, reduction="sum").backward()
    assert (key.grad.norm(dim=1) * key.norm(dim=1) * temperature <= 33).all()


def test_a_lone_positive_has_no_gradient():
    """N = M = 1 without a queue: the loss is 0 for any key, however short, with label smoothing too."""
    torch.manual_seed(0)
    for _ in range(200):
        query, key = (1e-30 * torch.randn(1, 8) for _ in range(2))
        loss, _, grads = run_info_nce(moco_ext.info_nce, query, key, None, 0.035, in_batch=True, label_smoothing=0.84)
        assert loss == 0
        assert not grads["query"].any()
        assert not grads["key"].any()


def test_int32_ids(device):
    query, key, queue = problem(8, 300, 32, device)
    ids = {"query_ids": torch.arange(8, device=device), "queue_ids": torch.arange(300, device=device) % 30}
    want = moco_ext.info_nce(query, key, queue, **ids)
    assert torch.equal(moco_ext.info_nce(query, key, queue, **{name: x.int() for name, x in ids.items()}), want)


def test_the_forward_operator_wants_ids_of_the_queue_for_the_only_candidates():
    """Without them it would read matches that nothing has counted."""
    query, key, queue = problem(4, 30, 8, torch.device("cpu"))
    ids = torch.arange(4)
    arguments = Arguments(
        query, key, queue, None, 0.2, True, 0, False, False, False, 3, True, 0, None, None, 0.0, ids, None, 2, None,
        torch.zeros_like(query), 0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="queue_ids: expected together with same_id 2"):
        torch.ops.moco_ext.info_nce_forward.default(*arguments)


def test_the_operators_take_one_number_of_valid_keys():
    """A tensor was not compared with the number, which CUDA would have read up to."""
    query, key, queue = problem(4, 30, 8, torch.device("cpu"))
    tensor, number = torch.tensor(20), 1_000_000
    arguments = Arguments(
        query, key, queue, None, 0.2, True, 0, False, False, False, 3, False, 0, tensor, number, 0.0, None, None, 0,
        None, None, 0,
    )  # fmt: skip
    for call in (
        lambda: torch.ops.moco_ext.info_nce_forward.default(*arguments),
        lambda: torch.ops.moco_ext.info_nce_forward_outputs.default(*arguments),
        lambda: torch.ops.moco_ext.nearest_keys.default(query, queue, 1, True, tensor, number),
    ):
        with pytest.raises(ValueError, match="num_valid: expected a tensor or a number, got both"):
            call()


def test_the_backward_operator_checks_for_itself():
    query, key, _ = problem(4, 30, 8, torch.device("cpu"))
    good = [query, key, None, 0.2, True, 3, 0, None, False, None, torch.zeros(4), torch.zeros(4, 3), torch.zeros(4)]
    operator = torch.ops.moco_ext.info_nce_backward.default
    assert operator(*good).shape == (4, 8)
    bad = {0: query[:, :5], 1: key[:2], 3: -1.0, 5: 4, 6: 2**63 - 1, 7: torch.arange(3), 10: torch.zeros(3)}
    bad |= {11: torch.zeros(4, 2), 12: torch.zeros(5)}
    for place, value in bad.items():
        with pytest.raises(ValueError, match="expected"):
            operator(*good[:place], value, *good[place + 1 :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(0, 4, 8), "key": torch.ones(0, 4, 8)}, "query: expected at least one group"),
        ({"query_ids": torch.zeros(3, 4).long(), "queue_ids": torch.arange(30)}, "query_ids: expected one row of ids"),
        ({"query_ids": torch.zeros(4).long(), "queue_ids": torch.zeros(3, 30).long()}, "queue_ids: expected one row"),
        ({"query_ids": torch.zeros(1).long(), "queue_ids": torch.arange(30)}, "query_ids: expected 4 ids"),
        ({"query_ids": torch.zeros(2, 1).long(), "queue_ids": torch.arange(30)}, "query_ids: expected 4 ids"),
    ],
)
def test_bad_groups_are_named(change, message):
    arguments = {"query": torch.ones(2, 4, 8), "key": torch.ones(2, 4, 8), "queue": torch.ones(30, 8)} | change
    with pytest.raises(ValueError, match=message):
        moco_ext.info_nce(**arguments)


def test_a_bad_row_stays_alone(device):
    """But for in-batch keys, which meet every row."""
    query, key, queue = problem(12, 500, 32, device)
    options = {"query_ids": torch.arange(12, device=device), "queue_ids": torch.arange(500, device=device) % 40}
    options |= {"label_smoothing": 0.1, "reduction": "none"}
    clean = moco_ext.info_nce(query, key, queue, **options)
    query[5, 3] = math.nan
    loss = moco_ext.info_nce(query, key, queue, **options)
    others = torch.arange(12, device=device) != 5
    assert loss[5].isnan()
    assert torch.equal(loss[others], clean[others])


# ---- groups ----


def test_groups_with_one_queue_are_the_symmetric_loss(device):
    q1, k2, queue = problem(16, 400, 32, device)
    q2, k1, _ = problem(16, 400, 32, device)
    pair = torch.stack([q1, q2]), torch.stack([k2, k1])
    loss, stats = moco_ext.info_nce(*pair, queue, 0.1, return_stats=True)
    alone = [moco_ext.info_nce(q, k, queue, 0.1, reduction="none") for q, k in zip(*pair, strict=True)]
    assert rel_error(loss, torch.cat(alone).mean()) <= 1e-6
    assert stats.loss.shape == stats.rank.shape == (2, 16)
    assert rel_error(stats.loss, torch.stack(alone)) <= 1e-6
    assert stats.accuracy()[0].shape == ()


@pytest.mark.parametrize("in_batch", [False, True])
def test_groups_with_queues_of_their_own(device, in_batch):
    """Image and text, say: two queues with one set of ids, one learnable temperature, gradients to both sides."""
    query, key, queue = (torch.stack(x) for x in zip(*(problem(8, 100, 16, device) for _ in range(2)), strict=True))
    ids = {"query_ids": torch.arange(8, device=device), "queue_ids": torch.arange(100, device=device) % 20}
    options = {"same_id": "positive", "in_batch": in_batch, "reduction": "sum"} | ids
    temperature = torch.tensor(0.1, device=device)
    loss, stats, grads = run_info_nce(moco_ext.info_nce, query, key, queue, temperature, **options)
    alone = [run_info_nce(moco_ext.info_nce, query[g], key[g], queue[g], temperature, **options) for g in range(2)]
    assert rel_error(loss, alone[0][0] + alone[1][0]) <= 1e-6
    assert torch.equal(stats.rank, torch.stack([a[1].rank for a in alone]))
    for name in ("query", "key"):
        assert rel_error(grads[name], torch.stack([a[2][name] for a in alone])) <= 1e-6
    assert rel_error(grads["temperature"], alone[0][2]["temperature"] + alone[1][2]["temperature"]) <= 1e-5


# ---- torch.library, torch.compile, memory ----


@pytest.mark.parametrize("in_batch", [False, True])
def test_opcheck(device, in_batch):
    query, key, queue = problem(4, 30, 8, device)
    ids = torch.arange(4, device=device), torch.arange(30, device=device) % 6
    temperature = torch.tensor(0.2, device=device)
    arguments = (query, key, queue, temperature, 0.0, True, 1, True, True, True, 3)
    rest = (in_batch, 0, None, 20, 0.1, *ids, False, None, None, 0)
    opcheck(torch.ops.moco_ext.info_nce_forward.default, arguments + rest)
    _, _, lse, *_, weights = torch.ops.moco_ext.info_nce_forward(*arguments, True, *rest[1:])
    opcheck(
        torch.ops.moco_ext.info_nce_backward.default,
        (query, key, None, 0.2, True, 3, 0, ids[0], True, None, lse, weights, torch.ones_like(lse)),
    )


def test_compiles_without_a_graph_break(device):
    query, key, queue = problem(8, 300, 32, device)
    ids = {"query_ids": torch.arange(8, device=device), "queue_ids": torch.arange(300, device=device) % 20}
    num_valid = torch.tensor([200], device=device)

    def step(query, key):
        pair = torch.stack([query, key]), torch.stack([key, query])
        loss = moco_ext.info_nce(*pair, queue, 0.1, label_smoothing=0.1, num_valid=num_valid, **ids)
        return loss + moco_ext.info_nce(query, key, queue, 0.1, in_batch=True)

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        inputs = [x.clone().requires_grad_() for x in (query, key)]
        results.append(torch.autograd.grad(run(*inputs), inputs))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_never_waits_for_the_device():
    query, key, queue = problem(32, 4096, 128, "cuda")
    ids = {"query_ids": torch.arange(32, device="cuda"), "queue_ids": torch.arange(4096, device="cuda")}
    num_valid = torch.tensor([1000], device="cuda")
    inputs = [x.requires_grad_() for x in (query, key)]

    def step():
        loss = moco_ext.info_nce(query, key, queue, num_valid=num_valid, in_batch=True, label_smoothing=0.1, **ids)
        return torch.autograd.grad(loss, inputs)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_repeatable_to_the_bit(device):
    query, key, queue = problem(64, 5000, 128, device)
    ids = {"query_ids": torch.arange(64, device=device), "queue_ids": torch.arange(5000, device=device) % 100}
    first, second = (
        run_info_nce(moco_ext.info_nce, query, key, queue, 0.07, in_batch=True, label_smoothing=0.1, **ids)
        for _ in range(2)
    )
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[2][name], second[2][name]) for name in first[2])


# ---- errors ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing: expected a number in \[0, 1\), got 1"),
        ({"label_smoothing": 1.0 - 1e-9}, r"label_smoothing: expected a number in \[0, 1\), got 1"),  # 1 in float32
        ({"label_smoothing": math.nan}, "label_smoothing: expected a number"),
        ({"num_valid": 301}, "num_valid: expected 0 to 300 keys of the queue, got 301"),
        ({"num_valid": -1}, "num_valid: expected 0 to 300 keys of the queue, got -1"),
        ({"key_offset": 2**63 - 1}, "key_offset: expected 0 to 0 for 8 queries among 8 keys, got 9223372036854775807"),
        ({"temperature": "0.07"}, "temperature: expected a number or a 0-dim tensor, got '0.07'"),
        ({"temperature": 1e-39}, "temperature: expected a positive number from 1.17"),
        ({"queue_ids": torch.zeros(300, 2).long(), "query_ids": torch.arange(8)}, r"queue_ids: expected shape \[300\]"),
        ({"num_valid": torch.tensor([1.0])}, "num_valid: expected int64, got float32"),
        ({"key_offset": 1}, "key_offset: expected 0 to 0 for 8 queries among 8 keys, got 1"),
        ({"same_id": "skip"}, "same_id: expected 'mask' or 'positive', got 'skip'"),
        ({"query_ids": torch.arange(8)}, "queue_ids: expected together with query_ids"),
        ({"queue_ids": torch.arange(300)}, "query_ids: expected together with queue_ids"),
        ({"query_ids": torch.arange(7), "queue_ids": torch.arange(300)}, r"query_ids: expected shape \[8\]"),
        ({"query_ids": torch.arange(8), "queue_ids": torch.arange(9)}, r"queue_ids: expected shape \[300\]"),
        ({"query_ids": torch.ones(8), "queue_ids": torch.arange(300)}, "query_ids: expected int64, got float32"),
        ({"queue": None}, "queue: expected a tensor, or in_batch keys"),
        ({"queue": moco_ext.KeyQueue(32, 300)}, "queue: expected a tensor, got KeyQueue"),
        ({"target": [0.0], "label_smoothing": 0.0}, "target: expected a tensor, got list"),
        ({"key": torch.ones(9, 32)}, r"key: expected the shape of query \[8, 32\], got \[9, 32\]; .* in_batch"),
        ({"query": torch.ones(2, 8, 32)}, r"key: expected \[2, N, C\] as query, got \[8, 32\]"),
    ],
)
def test_bad_arguments_are_named(options, message):
    query, key, queue = problem()
    inputs = {"query": query, "key": key, "queue": queue, "label_smoothing": 0.1} | options
    with pytest.raises((ValueError, TypeError), match=message):
        moco_ext.info_nce(inputs.pop("query"), inputs.pop("key"), inputs.pop("queue"), **inputs)
