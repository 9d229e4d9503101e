"""The nearest keys: against a stable sort in float64, with ties, on every device."""

import math

import pytest
import torch
from cases import HALF, LAYOUTS, restrided, unit_rows
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

import moco_ext
from moco_ext.ops import nearest_keys_in_pieces


def in_pieces(query, queue, k=1, *, normalize=True, num_valid=None):
    tensor, number = (num_valid, None) if isinstance(num_valid, torch.Tensor) else (None, num_valid)
    return nearest_keys_in_pieces(query, queue, k, normalize, tensor, number)


IMPLEMENTATIONS = pytest.mark.parametrize("nearest", [moco_ext.nearest_keys, in_pieces], ids=["operator", "pieces"])


def whole(n, k, c, device, dtype=torch.float32):
    """Rows of small whole numbers: scores are exact, and many are equal."""
    return (torch.randint(-2, 3, (rows, c), device=device).to(dtype) for rows in (n, k))


def sorted_keys(query, queue, k):
    return (query.double() @ queue.double().t()).sort(dim=1, descending=True, stable=True).indices[:, :k]


@IMPLEMENTATIONS
@given(data=st.data())
def test_is_a_stable_sort(device, nearest, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    n, K, c = draw(st.integers(0, 150)), draw(st.integers(1, 2000)), draw(st.integers(1, 40))
    dtypes = st.sampled_from([torch.float32, *HALF])
    query, queue = whole(n, K, c, device)
    query, queue = restrided(query.to(draw(dtypes)), draw(st.sampled_from(LAYOUTS))), queue.to(draw(dtypes))
    k = draw(st.integers(1, K))
    got = nearest(query, queue, k, normalize=False)
    want = sorted_keys(query, queue, k)
    assert torch.equal(got[1], want)
    assert torch.equal(got[0], (query.double() @ queue.double().t()).gather(1, want).float())


@IMPLEMENTATIONS
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("n", "K", "k"), [(1, 100_000, 3), (300, 5000, 200), (1100, 700, 5), (40, 64, 64)])
def test_similarities_match_float64(device, nearest, threads, n, K, k):
    before = torch.get_num_threads()
    query, queue = torch.randn(n, 48, device=device), unit_rows(K, 48, device=device)
    try:
        torch.set_num_threads(threads)
        similarity, index = nearest(query, queue, k)
    finally:
        torch.set_num_threads(before)
    scores = torch.nn.functional.normalize(query.double(), dim=1) @ queue.double().t()
    torch.testing.assert_close(similarity.double(), scores.topk(k).values, rtol=0, atol=1e-6)
    torch.testing.assert_close(similarity.double(), scores.gather(1, index), rtol=0, atol=1e-6)
    assert (index.sort(dim=1).values.diff(dim=1) > 0).all()  # none twice
    assert not similarity.requires_grad


@IMPLEMENTATIONS
def test_autocast_rounds_no_scores(device, nearest):
    query, queue = torch.randn(20, 64, device=device), unit_rows(3000, 64, device=device)
    want = nearest(query, queue, 7)
    with torch.autocast(device.type, torch.bfloat16):
        got = nearest(query, queue, 7)
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[0], want[0])


def test_threads_do_not_change_a_bit():
    query, queue = torch.randn(200, 64), unit_rows(9000, 64)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(moco_ext.nearest_keys(query, queue, 50))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result.index, results[0].index)
        assert torch.equal(result.similarity, results[0].similarity)


def test_float64_on_cpu():
    query, queue = torch.randn(9, 17).double(), unit_rows(500, 17)
    got = moco_ext.nearest_keys(query, queue, 4)
    want = (torch.nn.functional.normalize(query, dim=1) @ queue.double().t()).topk(4)
    torch.testing.assert_close(got.similarity, want.values, rtol=1e-12, atol=0)
    assert torch.equal(got.index, want.indices)


@IMPLEMENTATIONS
@pytest.mark.parametrize("num_valid", [0, 1, 7, 300])
def test_a_queue_that_fills(device, nearest, num_valid):
    query, queue = whole(5, 300, 8, device)
    queue[num_valid:] = math.nan
    for given_as in (num_valid, torch.tensor([num_valid], device=device)):
        similarity, index = nearest(query, queue, 10, normalize=False, num_valid=given_as)
        found = min(num_valid, 10)
        assert torch.equal(index[:, :found], sorted_keys(query, queue[:num_valid], found))
        assert (index[:, found:] == -1).all()
        assert (similarity[:, found:] == -math.inf).all()


@IMPLEMENTATIONS
def test_nan_is_seen(device, nearest):
    query, queue = whole(5, 3000, 8, device)
    queue[[2500, 70]] = math.nan
    similarity, index = nearest(query, queue, 3, normalize=False)
    assert index[:, :2].tolist() == [[70, 2500]] * 5
    assert similarity[:, :2].isnan().all()
    assert similarity[:, 2].isfinite().all()
    query[1] = math.nan
    assert nearest(query, queue, 4, normalize=False)[1][1].tolist() == [0, 1, 2, 3]


@IMPLEMENTATIONS
def test_infinite_and_signed_zero_scores(device, nearest):
    query = torch.tensor([[1.0], [-1.0]], device=device)
    queue = torch.tensor([[0.0], [-0.0], [math.inf], [-math.inf], [0.0]], device=device)
    similarity, index = nearest(query, queue, 5, normalize=False)
    assert index.tolist() == [[2, 0, 1, 4, 3], [3, 0, 1, 4, 2]]
    assert similarity[:, 4].tolist() == [-math.inf, -math.inf]


def test_opcheck(device):
    operator = torch.ops.moco_ext.nearest_keys.default
    opcheck(operator, (torch.randn(4, 8, device=device), unit_rows(30, 8, device=device), 5, True, None, 20))


def test_compiles_without_a_graph_break(device):
    query, queue = torch.randn(8, 16, device=device), unit_rows(100, 16, device=device)

    def step(query):
        return queue[moco_ext.nearest_keys(query, queue).index[:, 0]] * 2

    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(query), step(query))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k: expected 1 to 300 keys of the queue, got 0"),
        ({"k": 301}, "k: expected 1 to 300 keys of the queue, got 301"),
        ({"num_valid": 301}, "num_valid: expected 0 to 300 keys of the queue, got 301"),
        ({"query": torch.ones(8, 31)}, "query: expected"),
        ({"query": torch.ones(32)}, "query: expected"),
        ({"query": torch.ones(8, 32).long()}, "query: expected float32"),
        ({"query": [1.0]}, "query: expected a tensor, got list"),
    ],
)
@IMPLEMENTATIONS
def test_bad_arguments_are_named(nearest, change, message):
    if nearest is in_pieces and isinstance(change.get("query"), list):
        pytest.skip("checked before an implementation is chosen")
    with pytest.raises((ValueError, TypeError), match=message):
        nearest(**{"query": torch.ones(8, 32), "queue": unit_rows(300, 32)} | change)
