"""The momentum update of lists of tensors: values, rounding, in place."""

import math

import official
import pytest
import torch
from cases import HALF
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

import moco_ext
import moco_ext.reference

SHAPES = st.lists(st.lists(st.sampled_from([0, 1, 2, 3, 7, 64, 129]), max_size=3).map(tuple), min_size=0, max_size=8)
DTYPES = st.sampled_from([torch.float32, torch.float32, *HALF])


def pairs(shapes, device, key_dtype=torch.float32, query_dtype=torch.float32):
    """(key tensors, query tensors) of these shapes."""
    keys = [torch.randn(s, device=device).to(key_dtype) for s in shapes]
    return keys, [torch.randn(s, device=device).to(query_dtype) for s in shapes]


def assert_close_to(keys, want, before, queries):
    """One float32 rounding of each product, of m and of the sum, then one in the key's dtype."""
    for key, value, old, query in zip(keys, want, before, queries, strict=True):
        size = old.double().abs() + query.double().abs()
        unit = {torch.float64: 2.0**-52}.get(key.dtype, 2.0**-23)
        rounding = torch.finfo(key.dtype).eps / 2 * value.abs() if key.dtype in HALF else 0.0
        # the smallest step of float16, for results among its subnormals
        floor = 2.0**-24 if key.dtype == torch.float16 else 0.0
        assert ((key.double() - value).abs() <= 2 * unit * size + rounding + floor).all()


@given(data=st.data())
def test_matches_float64(device, data):
    """Lists of any shapes, including empty and 0-dim tensors, and any mix of dtypes."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    keys, queries = pairs(draw(SHAPES), device)
    keys = [x.to(draw(DTYPES)) for x in keys]
    queries = [x.to(draw(DTYPES)) for x in queries]
    m = draw(st.one_of(st.sampled_from([0.0, 0.5, 0.99, 0.999, 1.0]), st.floats(0, 1)))
    before = [x.clone() for x in keys]
    want = [x.double() for x in keys]
    moco_ext.reference.momentum_update_(want, [x.double() for x in queries], m)
    as_tensor = draw(st.booleans())
    assert moco_ext.momentum_update_(keys, queries, torch.tensor(m, device=device) if as_tensor else m) is None
    assert_close_to(keys, want, before, queries)


def test_float64_on_cpu():
    keys, queries = pairs([(100,), (3, 5)], "cpu", torch.float64, torch.float64)
    before, want = [x.clone() for x in keys], [x.clone() for x in keys]
    moco_ext.reference.momentum_update_(want, queries, 0.999)
    moco_ext.momentum_update_(keys, queries, 0.999)
    assert_close_to(keys, want, before, queries)


@pytest.mark.parametrize("sizes", [[1_000_003], [4095, 4096, 4097], [17] * 1500])
def test_large_and_many(device, sizes):
    """More elements than one thread handles, sizes that no vector width divides, more tensors than fit in one table."""
    keys, queries = pairs([(s,) for s in sizes], device)
    before = [x.clone() for x in keys]
    want = [x.double() for x in keys]
    moco_ext.reference.momentum_update_(want, [x.double() for x in queries], 0.99)
    moco_ext.momentum_update_(keys, queries, 0.99)
    assert_close_to(keys, want, before, queries)


def test_many_small_steps_do_not_drift(device):
    """1,000 steps at m = 0.999 towards a fixed query: (1 - 0.999^1000) of the way, in float32."""
    key, query = torch.zeros(256, device=device), torch.ones(256, device=device)
    for _ in range(1000):
        moco_ext.momentum_update_([key], [query], 0.999)
    # each step's rounding, at most 2^-24, decays by m: they add up to less than 1000 * 2^-24
    assert (key - (1 - 0.999**1000)).abs().max() < 6e-5


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("query_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_copies_are_the_rounded_keys(device, query_dtype, dtype):
    keys, queries = pairs([(100_003,), (64, 3, 7, 7), (), (0,), (5, 1)], device, query_dtype=query_dtype)
    low_precision = [torch.full_like(x, math.nan, dtype=dtype) for x in keys]
    alone = [x.clone() for x in keys]
    moco_ext.momentum_update_(keys, queries, 0.9, low_precision=low_precision)
    moco_ext.momentum_update_(alone, queries, 0.9)
    for key, other, copy in zip(keys, alone, low_precision, strict=True):
        assert torch.equal(key, other)
        assert torch.equal(copy, key.to(dtype))


def test_16_bit_keys_stall_where_a_float32_master_with_a_copy_moves(device):
    """A step of (1 - m) (q - k) = 0.001 is below half of bfloat16's spacing at 1, 2^-8: such keys do not change."""
    query = torch.full((64,), 2.0, device=device)
    alone, master = torch.ones(64, dtype=torch.bfloat16, device=device), torch.ones(64, device=device)
    copy = master.bfloat16()
    for _ in range(500):
        moco_ext.momentum_update_([alone], [query], 0.999)
        moco_ext.momentum_update_([master], [query], 0.999, low_precision=[copy])
    assert (alone == 1).all()
    want = 2 - 0.999**500
    assert (copy.float() - want).abs().max() <= 2**-8


@pytest.mark.parametrize(
    ("low_precision", "message"),
    [
        ([], None),
        ([torch.zeros(3)], r"low_precision\[0\]: expected bfloat16 or float16, got float32"),
        (
            [torch.zeros(4).bfloat16()],
            r"low_precision\[0\]: expected shape and strides of key_params\[0\] \[3\], got \[4\]",
        ),
        ([torch.zeros(3).bfloat16()] * 2, "low_precision: expected none, or 1 tensors as in key_params, got 2"),
    ],
)
def test_bad_low_precision_copies_are_named(low_precision, message):
    key, query = torch.zeros(3), torch.ones(3)
    if message is None:
        moco_ext.momentum_update_([key], [query], 0.5, low_precision=low_precision)
        return
    with pytest.raises(ValueError, match=message):
        moco_ext.momentum_update_([key], [query], 0.5, low_precision=low_precision)
    assert not key.any()
    with pytest.raises(
        ValueError, match=r"key_params\[0\]: expected float32, the master of low_precision\[0\], got bfloat16"
    ):
        moco_ext.momentum_update_([key.bfloat16()], [query], 0.5, low_precision=[torch.zeros(3).bfloat16()])


def test_m_0_copies_and_m_1_keeps(device):
    keys, queries = pairs([(33,), (2, 3)], device)
    before = [x.clone() for x in keys]
    moco_ext.momentum_update_(keys, queries, 1.0)
    assert all(map(torch.equal, keys, before))
    moco_ext.momentum_update_(keys, queries, 0.0)
    assert all(map(torch.equal, keys, queries))


def test_m_is_checked_without_parameters_too():
    moco_ext.momentum_update_([], [], 0.5)
    with pytest.raises(ValueError, match=r"m: expected a momentum in \[0, 1\], got 7.0"):
        moco_ext.momentum_update_([], [], 7.0)


def test_equals_the_official_loop(device):
    ours, queries = pairs([(64, 3, 7, 7), (64,), (10, 64)], device)
    theirs, before = [x.clone() for x in ours], [x.clone() for x in ours]
    moco_ext.momentum_update_(ours, queries, 0.999)
    official.momentum_update(theirs, queries, 0.999)
    assert_close_to(ours, [x.double() for x in theirs], before, queries)


def test_views_and_their_base_change_together(device):
    """Offsets of one element: views are aligned only to the element size; elements around a view do not change."""
    buffer, query = torch.randn(100, device=device), torch.randn(50, device=device)
    before, address = buffer.clone(), buffer.data_ptr()
    moco_ext.momentum_update_([buffer[1:51]], [query], 0.5)
    assert buffer.data_ptr() == address
    torch.testing.assert_close(buffer[1:51], 0.5 * before[1:51] + 0.5 * query, rtol=1e-6, atol=1e-6)
    assert torch.equal(buffer[:1], before[:1])
    assert torch.equal(buffer[51:], before[51:])


def test_channels_last_weights(device):
    """Both sides are dense with the same order of dimensions."""
    key, query = (torch.randn(8, 5, 3, 3, device=device) for _ in range(2))
    key, query = (x.contiguous(memory_format=torch.channels_last) for x in (key, query))
    want = 0.9 * key.double() + 0.1 * query.double()
    moco_ext.momentum_update_([key], [query], 0.9)
    assert key.is_contiguous(memory_format=torch.channels_last)
    assert (key - want).abs().max() < 1e-6


def test_layouts_that_overlap_themselves_are_refused(device):
    """Strides (2, 2) span nine elements and reach five of them: the span of a dense tensor, but not dense."""
    buffer = torch.zeros(9, device=device)
    key, query = buffer.as_strided((3, 3), (2, 2)), torch.ones(9, device=device).as_strided((3, 3), (2, 2))
    with pytest.raises(ValueError, match=r"key_params\[0\] and query_params\[0\]: expected both contiguous, or"):
        moco_ext.momentum_update_([key], [query], 0.5)
    assert not buffer.any()


@pytest.mark.parametrize("case", ["same key", "keys", "key and its query", "key and other query", "key and m"])
def test_overlaps_with_a_key_are_refused(device, case):
    """The result would depend on the order of the threads."""
    x, y = torch.randn(40, device=device), torch.randn(30, device=device)
    keys, queries, m, names = {
        "same key": ([x[:20], x[:20]], [y[:20], y[:20]], 0.5, ("key_params[0]", "key_params[1]")),
        "keys": ([x[:20], x[19:39]], [y[:20], y[:20]], 0.5, ("key_params[0]", "key_params[1]")),
        "key and its query": ([x[:20]], [x[1:21]], 0.5, ("key_params[0]", "query_params[0]")),
        "key and other query": ([x[:20], x[20:30]], [y[:20], x[:10]], 0.5, ("key_params[0]", "query_params[1]")),
        "key and m": ([x[:20]], [y[:20]], x[3], ("key_params[0]", "m")),
    }[case]
    before = x.clone()
    with pytest.raises(ValueError, match="expected memory that is not shared") as error:
        moco_ext.momentum_update_(keys, queries, m)
    assert all(name in str(error.value) for name in names)
    assert torch.equal(x, before)


@pytest.mark.parametrize("case", ["same copy", "copy and key", "copy and query"])
def test_low_precision_copies_share_no_memory(device, case):
    x, half = torch.randn(2, 16, device=device), torch.zeros(2, 16, dtype=torch.bfloat16, device=device)
    y = half.new_zeros(2, 16)
    low_precision, queries, names = {
        "same copy": ([half[0], half[0]], [y[0], y[1]], ("low_precision[0]", "low_precision[1]")),
        "copy and key": (
            [half[0], x[0].view(torch.bfloat16)[:16]],
            [y[0], y[1]],
            ("key_params[0]", "low_precision[1]"),
        ),
        "copy and query": ([half[0], half[1]], [y[0], half[0]], ("query_params[1]", "low_precision[0]")),
    }[case]
    before = x.clone()
    with pytest.raises(ValueError, match="expected memory that is not shared") as error:
        moco_ext.momentum_update_(list(x), queries, 0.5, low_precision=low_precision)
    assert all(name in str(error.value) for name in names)
    assert torch.equal(x, before)


def test_memory_that_is_only_read_may_be_shared(device):
    """Neighbors in one buffer, one query for several keys, a query that is its own key, tensors without elements."""
    buffer, query = torch.randn(40, device=device), torch.randn(10, device=device)
    before = buffer.clone()
    keys = [buffer[10:20], buffer[:10], buffer[30:], buffer[20:30], buffer[5:5]]
    moco_ext.momentum_update_(keys, [query, query, query, buffer[20:30], buffer[7:7]], 0.5)
    want = 0.5 * before + 0.5 * torch.cat([query, query, before[20:30], query])
    torch.testing.assert_close(buffer, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("key_dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_queries_show(device, value, key_dtype):
    key = torch.ones(40, device=device, dtype=key_dtype)
    query = torch.zeros(40, device=device)
    query[7] = value
    moco_ext.momentum_update_([key], [query], 0.999)
    assert not key[7].isfinite()
    assert key[8:].isfinite().all()
    assert key[:7].isfinite().all()


def test_queries_with_gradient_record_nothing(device):
    key, query = torch.zeros(5, device=device), torch.nn.Parameter(torch.ones(5, device=device))
    moco_ext.momentum_update_([key], [query], 0.5)
    assert not key.requires_grad
    assert key.tolist() == [0.5] * 5


@pytest.mark.parametrize("given", [list, iter])
def test_accepts_lists_and_iterators_of_parameters(device, given):
    key, query = (torch.nn.Linear(3, 4, device=device) for _ in range(2))
    key.requires_grad_(False)
    want = [0.5 * k + 0.5 * q.detach() for k, q in zip(key.parameters(), query.parameters(), strict=True)]
    copies = [p.to(torch.bfloat16) for p in key.parameters()]
    moco_ext.momentum_update_(given(key.parameters()), given(query.parameters()), 0.5, low_precision=given(copies))
    torch.testing.assert_close([p.detach() for p in key.parameters()], want, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(copy, p.to(torch.bfloat16)) for copy, p in zip(copies, key.parameters(), strict=True))


def test_writes_are_seen_by_autograd(device):
    key = torch.ones(4, device=device)
    x = torch.randn(4, device=device, requires_grad=True)
    y, version = (x * key).sum(), key._version
    moco_ext.momentum_update_([key], [torch.zeros(4, device=device)], 0.5)
    assert key._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("as_tensor", [True, False])
def test_opcheck(device, as_tensor):
    keys, queries = pairs([(4, 3), (7,)], device, torch.float32, torch.bfloat16)
    m_tensor, m = (torch.tensor(0.9, device=device), math.nan) if as_tensor else (None, 0.9)
    opcheck(torch.ops.moco_ext.momentum_update_.default, (keys, queries, m_tensor, m, []))
    low_precision = [x.bfloat16() for x in keys]
    opcheck(torch.ops.moco_ext.momentum_update_.default, (keys, queries, m_tensor, m, low_precision))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(device, backend):
    def step(keys, queries, m):
        moco_ext.momentum_update_(keys, [q * 2 for q in queries], m)
        return keys[0].sum()

    start, queries = pairs([(4, 3), (7,)], device)
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend=backend)):
        keys = [x.clone() for x in start]
        total = run(keys, queries, torch.tensor(0.9, device=device))
        results.append((keys, total))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_neither_waits_nor_leaves_the_graph():
    """A replay reads the current parameters and the current m."""
    keys, queries = pairs([(1000,), (3, 5)], "cuda")
    m = torch.tensor(1.0, device="cuda")
    moco_ext.momentum_update_(keys, queries, m)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            moco_ext.momentum_update_(keys, queries, m)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    m.fill_(0.25)
    for query in queries:
        query.normal_()
    want = [0.25 * k + 0.75 * q for k, q in zip(keys, queries, strict=True)]
    graph.replay()
    torch.testing.assert_close(keys, want, rtol=1e-6, atol=1e-6)
