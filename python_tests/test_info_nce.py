"""The fused loss: its value, statistics and gradients against float64, and its promises to autograd."""

import contextlib
import math
import os
import subprocess
import sys

import official
import pytest
import torch
from cases import (
    HALF,
    LAYOUTS,
    check_info_nce,
    laid_out,
    powers,
    rel_error,
    restrided,
    run_info_nce,
    sizes_c,
    unit_rows,
)
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import moco_ext

QUEUE_DTYPES = st.sampled_from([torch.float32, torch.float32, *HALF])
SIZES_K = st.one_of(st.sampled_from([1, 2, 63, 64, 65, 128, 257, 1000]), st.integers(1, 3000))


def problem(n=8, k=300, c=32, device="cpu", dtype=torch.float32, queue_dtype=None):
    """Random raw queries and keys, the key near its query, and a queue of unit rows."""
    query = torch.randn(n, c, device=device, dtype=torch.float64)
    key = 0.5 * query + torch.randn_like(query)
    return query.to(dtype), key.to(dtype), unit_rows(k, c, queue_dtype or dtype, device)


# ---- value and gradients ----


@given(data=st.data())
def test_matches_float64(device, data):
    """Any shape, stride, dtype, temperature and norm; zero rows; the positive waiting in the queue."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    n, k, c = draw(st.integers(0, 70)), draw(SIZES_K), draw(sizes_c)
    normalize = draw(st.booleans())
    dtype = draw(st.sampled_from([torch.float32, torch.float32, *HALF]))
    # float16 has no room for the gradient of shorter rows; unnormalized logits grow with the norms
    low, high = (-1, 1) if not normalize else (-1, 3) if dtype == torch.float16 else (-4, 4)

    query, key, queue = problem(n, k, c, device, queue_dtype=draw(QUEUE_DTYPES))
    if normalize and dtype != torch.float16 and n and draw(st.booleans()):
        query[draw(st.integers(0, n - 1))] = 0
        key[draw(st.integers(0, n - 1))] = 0
    if n and draw(st.booleans()):
        queue[draw(st.integers(0, k - 1))] = torch.nn.functional.normalize(key[:1], dim=1)[0].to(queue.dtype)
    query, key = (
        restrided((x / math.sqrt(c) * draw(powers(low, high))).to(dtype), draw(st.sampled_from(LAYOUTS)))
        for x in (query, key)
    )

    temperature = draw(powers(-2, 1))
    if draw(st.booleans()):
        temperature = torch.tensor(temperature, device=device)
    reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    upstream = torch.randn(n if reduction == "none" else (), device=device)
    check_info_nce(query, key, queue, temperature, upstream, normalize=normalize, reduction=reduction)


@pytest.mark.parametrize("queue_dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_mixed_dtypes_match_float64(device, dtype, queue_dtype):
    check_info_nce(*problem(33, 500, 128, device, dtype, queue_dtype), 0.07)


@pytest.mark.parametrize("normalize", [True, False])
def test_float64_on_cpu(normalize):
    check_info_nce(*problem(9, 333, 17, dtype=torch.float64), 0.07, normalize=normalize)


@pytest.mark.parametrize("temperature", [0.01, 0.02, 0.024, 0.025, 0.026, 0.03, 0.07, 0.2, 1.0, 10.0])
@pytest.mark.parametrize("c", [1, 31, 96, 128, 520])
def test_both_sides_of_any_fixed_shift(device, c, temperature):
    """2 / T leaves float32's exponent near T = 0.025; opposite and equal vectors reach the ends of it."""
    query, key, queue = problem(16, 700, c, device)
    unit = torch.nn.functional.normalize(query, dim=1)
    queue[:4], queue[4:8] = unit[:4], -unit[:4]
    key[0], key[1] = query[0], -query[1]
    check_info_nce(query, key, queue, temperature)


@pytest.mark.parametrize(
    ("n", "k", "c"), [(1, 1, 1), (1, 1, 128), (5, 1, 33), (1, 4097, 128), (0, 7, 16), (130, 64, 520)]
)
def test_edge_shapes(device, n, k, c):
    for reduction in ("mean", "sum", "none"):
        upstream = torch.ones(n if reduction == "none" else (), device=device)
        check_info_nce(*problem(n, k, c, device), 0.07, upstream, reduction=reduction)


def test_paper_size_is_exact_to_1e_5(device):
    """The promised figure, without allowances: relative error in norm at C = 128, T = 0.07."""
    query, key, queue = problem(64, 16384, 128, device)
    temperature = torch.tensor(0.07, device=device)
    loss, stats, grads = run_info_nce(moco_ext.info_nce, query, key, queue, temperature)
    want, want_stats, want_grads = run_info_nce(
        moco_ext.reference.info_nce, query.double(), key.double(), queue.double(), temperature.double()
    )
    errors = {"loss": rel_error(loss, want)} | {n: rel_error(g, want_grads[n]) for n, g in grads.items()}
    errors |= {n: rel_error(getattr(stats, n), getattr(want_stats, n)) for n in ("loss", "lse")}
    assert max(errors.values()) <= 1e-5, errors
    assert torch.equal(stats.rank, want_stats.rank)


def test_equals_the_official_formulation(device):
    """Same loss and gradient as the published code; 1e-5 because that one, too, computes in float32."""
    query, key, queue = problem(32, 4096, 128, device)
    query.requires_grad_()
    ours = torch.autograd.grad(moco_ext.info_nce(query, key, queue), query)[0]
    theirs = torch.autograd.grad(official.info_nce(query, key, queue.t()), query)[0]
    assert rel_error(ours, theirs) <= 1e-5


def test_huge_unnormalized_logits(device):
    """Logits of 1e5: the softmax is a hard maximum, the loss the gap to it; nothing overflows."""
    query, key, queue = problem(6, 100, 64, device)
    query, key = query * 1e2, key * 1e1
    _, stats, grads = run_info_nce(moco_ext.info_nce, query, key, queue, 0.01, normalize=False)
    scores = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.t()], 1).double() / 0.01
    gap = scores.amax(1) - scores[:, 0]
    # a float32 logit of size L is known to a few times 2^-24 L
    assert (stats.loss - gap).abs().le(1e-6 * scores.abs().amax(1)).all()
    assert grads["query"].isfinite().all()
    assert grads["key"].isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["query", "key"])
def test_a_bad_row_stays_alone(device, where, bad):
    query, key, queue = problem(12, 500, 32, device)
    upstream = torch.ones(12, device=device)
    clean = run_info_nce(moco_ext.info_nce, query, key, queue, 0.07, upstream, reduction="none")
    {"query": query, "key": key}[where][5, 3] = bad
    loss, stats, grads = run_info_nce(moco_ext.info_nce, query, key, queue, 0.07, upstream, reduction="none")
    others = torch.arange(12, device=device) != 5
    assert loss[5].isnan()
    assert stats.loss[5].isnan()
    assert torch.equal(loss[others], clean[0][others])
    for name in ("query", "key"):
        assert torch.equal(grads[name][others], clean[2][name][others])


def test_a_nan_in_the_queue_is_not_hidden(device):
    query, key, queue = problem(4, 500, 32, device)
    queue[77, 5] = math.nan
    assert moco_ext.info_nce(query, key, queue, reduction="none").isnan().all()


def test_bitwise_repeatable(device):
    query, key, queue = problem(64, 5000, 128, device)
    first, second = (run_info_nce(moco_ext.info_nce, query, key, queue, 0.07) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert all(torch.equal(first[2][name], second[2][name]) for name in first[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="tf32 is a CUDA format")
def test_tf32_follows_torchs_switch():
    """tf32 rounds operands to 11 bits: 5e-3 covers that at L = 14; without it the float32 bound holds."""
    query, key, queue = problem(128, 8192, 128, "cuda")
    want = run_info_nce(moco_ext.reference.info_nce, query.double(), key.double(), queue.double(), 0.07)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed, bound in ((True, 5e-3), (False, 1e-5)):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            got = run_info_nce(moco_ext.info_nce, query, key, queue, 0.07)
            assert rel_error(got[2]["query"], want[2]["query"]) <= bound
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# ---- statistics ----


def test_accuracy_counts_what_topk_would(device):
    query, key, queue = problem(200, 50, 8, device)
    _, stats = moco_ext.info_nce(query, key, queue, return_stats=True)
    q, k = (torch.nn.functional.normalize(x.double(), dim=1) for x in (query, key))
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.double().t()], 1)
    for got, best in zip(stats.accuracy((1, 5, 51)), (1, 5, 51), strict=True):
        want = (logits.topk(best, dim=1).indices == 0).any(1).double().mean() * 100
        assert got.shape == ()
        assert abs(got.item() - want.item()) < 1e-3
    assert 0 < stats.accuracy()[0] < 100  # the case says something


def test_accuracy_is_nan_where_it_is_not_known(device):
    """Nothing scores above a NaN, and positives that are known by their ids alone have no rank."""
    query, queue = torch.randn(4, 8, device=device), torch.randn(9, 8, device=device)
    ids = {"query_ids": torch.arange(4, device=device), "queue_ids": torch.arange(9, device=device) % 4}
    _, stats = moco_ext.info_nce(query, None, queue, return_stats=True, same_id="positive", **ids)
    assert stats.accuracy()[0].isnan()
    query[0] = torch.nan
    _, stats = moco_ext.info_nce(query, torch.randn_like(query), queue, return_stats=True)
    assert stats.accuracy()[0].isnan()


def test_rank_ties_do_not_count(device):
    """Small integers have exact products: negatives equal to the positive are not above it."""
    query = torch.tensor([[1.0, 2.0], [1.0, 0.0]], device=device)
    key = torch.tensor([[2.0, 1.0], [0.0, 3.0]], device=device)  # scores 4 and 0
    queue = torch.tensor([[4.0, 0.0], [0.0, 2.0], [5.0, 0.0], [-1.0, 9.0]], device=device)
    _, stats = moco_ext.info_nce(query, key, queue, 0.5, normalize=False, return_stats=True)
    # row 0 scores 4 4 5 17, row 1 scores 4 0 5 -1
    assert stats.rank.tolist() == [2, 2]
    assert stats.positive_logit.tolist() == [8.0, 0.0]


def test_forward_alone_equals_forward_with_gradient(device):
    """Without gradient the second product is skipped, which must not change what is returned."""
    query, key, queue = problem(40, 3000, 64, device)
    with torch.no_grad():
        loss, stats = moco_ext.info_nce(query, key, queue, return_stats=True)
    with_grad = run_info_nce(moco_ext.info_nce, query, key, queue, 0.07)
    assert not loss.requires_grad
    assert rel_error(loss, with_grad[0]) <= 1e-6
    assert torch.equal(stats.rank, with_grad[1].rank)


# ---- autograd ----


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(normalize, reduction):
    query, key, queue = problem(4, 9, 5, dtype=torch.float64)
    temperature = torch.tensor(0.3, dtype=torch.float64)

    def loss(query, key, temperature):
        return moco_ext.info_nce(query, key, queue, temperature, normalize=normalize, reduction=reduction)

    assert gradcheck(loss, [x.requires_grad_() for x in (query, key, temperature)])


@pytest.mark.parametrize("wanted", ["query", "key", "temperature"])
def test_each_input_may_be_the_only_one_with_gradient(device, wanted):
    query, key, queue = problem(8, 100, 16, device)
    inputs = {"query": query, "key": key, "temperature": torch.tensor(0.07, device=device)}
    all_grads = run_info_nce(moco_ext.info_nce, query, key, queue, inputs["temperature"])[2]
    inputs[wanted].requires_grad_()
    loss = moco_ext.info_nce(inputs["query"], inputs["key"], queue, inputs["temperature"])
    loss.backward()
    assert all((x.grad is not None) == (name == wanted) for name, x in inputs.items())
    assert rel_error(inputs[wanted].grad, all_grads[wanted]) <= 1e-6


def test_second_derivative_raises(device):
    """A gradient penalty on a once-differentiable op must fail, not train on a wrong gradient."""
    query, key, queue = problem(4, 50, 8, device)
    query.requires_grad_()

    def penalized_step():
        loss = moco_ext.info_nce(query, key, queue)
        (grad,) = torch.autograd.grad(loss, query, create_graph=True)
        (loss + grad.square().sum()).backward()

    with pytest.raises(RuntimeError, match="second derivative"):
        penalized_step()


def test_function_transforms(device):
    """torch.func.grad and vjp work; a second derivative and forward mode, which would be 0, are errors."""
    query, key, queue = problem(4, 50, 8, device)

    def loss(query):
        return moco_ext.info_nce(query, key, queue)

    want = run_info_nce(moco_ext.info_nce, query, key, queue, 0.07)[2]["query"]
    assert torch.equal(torch.func.grad(loss)(query), want)
    _, pull = torch.func.vjp(loss, query)
    assert rel_error(pull(torch.tensor(3.0, device=device))[0], 3 * want) <= 1e-6
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.func.grad(lambda query: torch.func.grad(loss)(query).sum())(query)
    with pytest.raises(RuntimeError, match="info_nce: forward-mode differentiation is not implemented"):
        torch.func.jvp(loss, (query,), (torch.ones_like(query),))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="l2_normalize: forward-mode differentiation is not implemented"),
    ):
        moco_ext.l2_normalize(torch.autograd.forward_ad.make_dual(query, torch.ones_like(query)))


def test_one_float64_input_makes_all_float64():
    """What torch.set_default_dtype(torch.float64) leads to: float64 features, a float32 queue."""
    query, key, queue = problem(6, 40, 8, torch.device("cpu"))
    want = run_info_nce(moco_ext.info_nce, query.double(), key.double(), queue.double(), 0.2)
    mixed = [(query.double(), key, queue), (query, key.double(), queue), (query, key, queue.double())]
    for inputs in mixed:
        loss, _, grads = run_info_nce(moco_ext.info_nce, *inputs, 0.2)
        assert loss.dtype == torch.float64
        assert rel_error(loss, want[0]) <= 1e-12
        for name, value in zip(("query", "key"), inputs, strict=False):
            assert grads[name].dtype == value.dtype
            assert rel_error(grads[name], want[2][name]) <= 1e-6


def test_a_temperature_of_one_element(device):
    query, key, queue = problem(6, 40, 8, device)
    temperature = torch.full((1,), 0.2, device=device, requires_grad=True)
    loss = moco_ext.info_nce(query, key, queue, temperature)
    loss.backward()
    want = run_info_nce(moco_ext.info_nce, query, key, queue, torch.tensor(0.2, device=device))
    assert torch.equal(loss.detach(), want[0])
    assert torch.equal(temperature.grad, want[2]["temperature"].view(1))


def test_out_of_memory_is_torchs_own_error():
    """[N, C] gradients of 2^62 elements, from an expanded query that itself takes a few bytes."""
    query = torch.zeros(1, 1).expand(2**40, 2**12).requires_grad_()
    with pytest.raises((RuntimeError, torch.OutOfMemoryError), match=r"(?i)not enough memory|out of memory|allocate"):
        moco_ext.info_nce(query, query.detach(), torch.zeros(1, 2**12))


def test_queue_may_change_between_forward_and_backward(device):
    query, key, queue = problem(8, 100, 16, device)
    want = run_info_nce(moco_ext.info_nce, query, key, queue, 0.07)[2]["query"]
    query.requires_grad_()
    loss = moco_ext.info_nce(query, key, queue)
    moco_ext.enqueue_(queue, torch.zeros(1, dtype=torch.int64, device=device), key, normalize=True)
    queue.fill_(math.nan)
    loss.backward()
    assert torch.equal(query.grad, want)


def test_inputs_are_left_alone(device):
    query, key, queue = problem(8, 100, 16, device)
    inputs = (query, key, queue)
    before = [(x.clone(), x._version) for x in inputs]
    run_info_nce(moco_ext.info_nce, query, key, queue, 0.07)
    for x, (value, version) in zip(inputs, before, strict=True):
        assert torch.equal(x, value)
        assert x._version == version


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("wanted", [["query"], ["query", "key", "temperature"]], ids=str)
def test_backward_is_one_multiplication_an_input(reduction, wanted):
    inputs = dict(zip(("query", "key", "queue"), problem(), strict=True)) | {"temperature": torch.tensor(0.1)}
    for name in wanted:
        inputs[name].requires_grad_()
    upstream = torch.tensor(2.0)
    with Spy() as spy:
        moco_ext.info_nce(**inputs, reduction=reduction).backward(upstream)
    work = [name for name in spy.operators if name not in ("aten::detach", "aten::view")]
    assert work == ["moco_ext::info_nce_forward"] + ["aten::mul"] * len(wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts CUDA kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_of_a_step(dtype):
    """prepare, pass, combine, and in backward one multiplication, which also rounds to query's dtype. The Hopper pass
    prepares its queries itself."""
    query, key, queue = problem(32, 4096, 128, "cuda", dtype)
    query.requires_grad_()
    upstream = torch.ones((), device="cuda")

    def step():
        return torch.autograd.grad(moco_ext.info_nce(query, key, queue), query, upstream)

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    on_device = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    hopper = torch.cuda.get_device_capability() == (9, 0) and os.environ.get("MOCO_EXT_SM90") != "0"
    assert len(on_device) == (3 if hopper else 4), on_device


# ---- torch.library and torch.compile ----


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(device, backend):
    query, key, queue = problem(8, 300, 32, device)
    weight = torch.randn(32, 32, device=device)

    def step(raw, key, temperature):
        loss, stats = moco_ext.info_nce(raw @ weight, key, queue, temperature, return_stats=True)
        return loss * 2, stats.rank, stats.accuracy((1,))[0]

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend=backend)):
        raw, temperature = (
            query.clone().requires_grad_(),
            torch.tensor(0.1, device=device, requires_grad=True),
        )
        loss, rank, accuracy = run(raw, key, temperature)
        loss.backward()
        results.append((loss.detach(), rank, accuracy, raw.grad, temperature.grad))
    eager, compiled = results
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)  # fusion may reorder float32 sums


# ---- memory and host synchronization ----

PEAK_PROBE = """
import ctypes, re, torch, moco_ext

def memory(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

def step(query, key, queue):
    moco_ext.info_nce(query, key, queue).backward()

def inputs(n, k, c=128):
    rows = [torch.nn.functional.normalize(torch.randn(s, c), dim=1) for s in (n, n, k)]
    return rows[0].requires_grad_(), rows[1].requires_grad_(), rows[2]

step(*inputs(8, 2048))  # libraries, threads
args = inputs(256, 65536)
args[0].grad, args[1].grad = torch.zeros(256, 128), torch.zeros(256, 128)
ctypes.CDLL("libc.so.6").malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = memory("VmRSS")
step(*args)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_peak_memory_on_cpu():
    """N x K floats would be 64 MiB, a clone of the queue 32 MiB: 16 MiB rules out both."""
    probe = subprocess.run([sys.executable, "-c", PEAK_PROBE], capture_output=True, text=True, check=False)
    assert probe.returncode == 0, probe.stderr
    assert float(probe.stdout) <= 16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_on_cuda():
    """The same limits as on the CPU; 24 MiB leaves room for one partial sum a streaming multiprocessor."""
    query, key, queue = problem(256, 65536, 128, "cuda")
    query.requires_grad_()
    moco_ext.info_nce(query, key, queue).backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    moco_ext.info_nce(query, key, queue).backward()
    assert torch.cuda.max_memory_allocated() - before <= 24 * 2**20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_never_waits_for_the_device():
    query, key, queue = problem(32, 4096, 128, "cuda")
    query.requires_grad_()
    temperature = torch.tensor(0.07, device="cuda", requires_grad=True)
    moco_ext.info_nce(query, key, queue, temperature).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moco_ext.info_nce(query, key, queue, temperature).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replays_in_a_cuda_graph():
    """A captured step, replayed on other inputs and another queue, gives what an eager one gives."""
    query, key, queue = problem(32, 4096, 128, "cuda")
    query.requires_grad_()
    moco_ext.info_nce(query, key, queue).backward()
    graph = torch.cuda.CUDAGraph()
    query.grad = None
    with torch.cuda.graph(graph):
        loss = moco_ext.info_nce(query, key, queue)
        loss.backward()
    with torch.no_grad():
        for old, new in zip((query, key, queue), problem(32, 4096, 128, "cuda"), strict=True):
            old.copy_(new)
    graph.replay()
    want = run_info_nce(moco_ext.info_nce, query, key, queue, 0.07)
    assert torch.equal(loss.detach(), want[0])
    assert torch.equal(query.grad, want[2]["query"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_stride_gives_the_same_bits(device, layout):
    """Strides are a matter of copying, not of arithmetic."""
    raw = laid_out(16, 24, layout, device=device)
    _, key, queue = problem(16, 200, 24, device)
    strided, plain = (
        run_info_nce(moco_ext.info_nce, q, restrided(key, layout), queue, 0.07) for q in (raw, raw.contiguous())
    )
    assert torch.equal(strided[0], plain[0])
    assert torch.equal(strided[2]["query"], plain[2]["query"])


PLAIN = (False, 0, None, None, 0.0, None, None, False, None, None, 0)  # the schema's options, not used


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float16)], ids=str)
@pytest.mark.parametrize(("learn_temperature", "reduction"), [(True, 0), (False, 1), (True, 2)])
def test_opcheck(device, learn_temperature, reduction, dtypes):
    query, key, queue = problem(4, 30, 8, device, *dtypes)
    temperature = torch.tensor(0.2, device=device) if learn_temperature else None
    arguments = (query, key, queue, temperature, 0.2, True, reduction, True, True, learn_temperature, 3)
    opcheck(torch.ops.moco_ext.info_nce_forward.default, (*arguments, *PLAIN))


@contextlib.contextmanager
def cuda_autocast(dtype):
    """torch.autocast("cuda") without a GPU, where torch would disable it."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or before[1])
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


PRECISIONS = [  # autocast, allow_tf32, precision
    (None, False, 3),
    (None, True, 2),
    (torch.float32, False, 3),
    (torch.float16, False, 2),
    (torch.bfloat16, True, 1),
]


class Spy(TorchDispatchMode):
    """The operators that run, and the precision that this package's are called with."""

    def __init__(self):
        super().__init__()
        self.operators, self.precisions = [], []

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        self.operators.append(operator._schema.name)
        if operator.namespace == "moco_ext":
            names = [argument.name for argument in operator._schema.arguments]
            self.precisions.append(arguments[names.index("precision")])
        return operator(*arguments, **keywords or {})


@pytest.mark.parametrize(("autocast", "allow_tf32", "precision"), PRECISIONS)
def test_precision_asked_of_the_operator(autocast, allow_tf32, precision):
    """On fake CUDA tensors; on a CPU always float32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.allow_tf32 = allow_tf32
    try:
        with FakeTensorMode(), Spy() as spy, cuda_autocast(autocast):
            for device in ("cuda", "cpu"):
                query, key, queue = (torch.empty(rows, 8, device=device) for rows in (4, 4, 30))
                moco_ext.info_nce(query, key, queue)
        assert spy.precisions == [precision, 3]
    finally:
        matmul.fp32_precision = before


def test_backward_has_the_precision_of_forward(monkeypatch):
    """Whatever the mode at the time of backward, which usually runs outside of autocast."""
    query, key, queue = problem(4, 30, 8)
    key.requires_grad_()
    with Spy() as spy:
        monkeypatch.setattr("moco_ext.ops._info_nce.current_precision", lambda cuda: 2)
        loss = moco_ext.info_nce(query, key, queue, in_batch=True)
        monkeypatch.undo()
        loss.backward()
    assert spy.precisions == [2, 2]


def test_precision_is_traced_and_guarded():
    """Old and new tf32 switch, mixed too, and autocast; compiled code is traced anew when they change."""
    from moco_ext.ops.info_nce_operator import current_precision

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    compiled = torch.compile(lambda x: x + current_precision(True), fullgraph=True, backend="eager")
    try:
        for autocast, allow_tf32, precision in PRECISIONS:
            matmul.allow_tf32 = allow_tf32
            with cuda_autocast(autocast):
                assert current_precision(True) == precision
                assert compiled(torch.zeros(1)).item() == precision
        for setting, precision in (("ieee", 3), ("tf32", 2), ("ieee", 3)):
            matmul.fp32_precision = setting
            assert current_precision(True) == precision
            assert compiled(torch.zeros(1)).item() == precision
            torch.compiler.reset()  # or it would find the code that it traced for the old switch
            assert compiled(torch.zeros(1)).item() == precision
    finally:
        matmul.fp32_precision = before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU the products are float32")
@pytest.mark.parametrize(("autocast", "bound"), [(torch.bfloat16, 3e-2), (torch.float16, 5e-3)], ids=str)
def test_autocast_on_cuda(autocast, bound):
    """Operands rounded to 8 or 11 bits, at L = 14, and a float32 loss."""
    query, key, queue = problem(128, 8192, 128, "cuda")
    want = run_info_nce(moco_ext.reference.info_nce, query.double(), key.double(), queue.double(), 0.07)
    with torch.autocast("cuda", autocast):
        got = run_info_nce(moco_ext.info_nce, query, key, queue, 0.07)
    assert got[0].dtype == torch.float32
    assert rel_error(got[2]["query"], want[2]["query"]) <= bound
