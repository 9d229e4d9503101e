"""The circular queue write: slots, rounding and the pointer."""

import official
import pytest
import torch
from cases import HALF, LAYOUTS, powers, restrided, sizes_c, unit_rows
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

import moco_ext
import moco_ext.reference

DTYPES = st.sampled_from([torch.float32, *HALF])


def pointer(value: int, device="cpu"):
    return torch.tensor([value], dtype=torch.int64, device=device)


@given(data=st.data())
def test_matches_the_reference(device, data):
    """Without normalization a write is a cast and bitwise exact; with it, float32 rows differ by rounding."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    K, B, C = draw(st.integers(1, 40)), draw(st.integers(0, 100)), draw(sizes_c)
    queue = unit_rows(K, C, draw(DTYPES), device)
    keys_dtype = draw(DTYPES)
    scale = draw(powers(-1, 3) if keys_dtype == torch.float16 else powers(-4, 4))
    keys = (torch.randn(B, C, device=device) / C**0.5 * scale).to(keys_dtype)
    if B and draw(st.booleans()):
        keys[draw(st.integers(0, B - 1))] = 0
    keys = restrided(keys, draw(st.sampled_from(LAYOUTS)))
    normalize = draw(st.booleans())
    queue_ptr = pointer(draw(st.integers(-3 * K, 3 * K)), device)  # outside [0, K): taken modulo K

    want, want_ptr = queue.double(), queue_ptr.clone()
    moco_ext.reference.enqueue_(want, want_ptr, keys.double(), normalize=normalize)
    assert moco_ext.enqueue_(queue, queue_ptr, keys, normalize=normalize) is None
    assert torch.equal(queue_ptr, want_ptr)
    if not normalize:
        assert torch.equal(queue, want.to(queue.dtype))
        return
    # 1e-6: a few float32 roundings of values up to 1; a 16-bit queue rounds once more, by half an eps
    half_ulp = torch.finfo(queue.dtype).eps / 2 if queue.dtype in HALF else 0.0
    assert ((queue.double() - want).abs() <= 1e-6 + half_ulp * want.abs()).all()


def test_float64_on_cpu():
    queue, queue_ptr, keys = torch.zeros(5, 3).double(), pointer(4), torch.randn(2, 3).double()
    moco_ext.enqueue_(queue, queue_ptr, keys)
    assert torch.equal(queue[[4, 0]], keys)
    assert not queue[1:4].any()
    assert queue_ptr.item() == 1


@pytest.mark.parametrize("B", [0, 1, 4, 5, 6, 10, 13])
def test_successive_writes_equal_a_loop(device, B):
    """K = 5: rows wrap around for any batch size; the last row written to a slot remains."""
    queue, queue_ptr = torch.full((5, 3), -1.0, device=device), pointer(2, device)
    want, slot = queue.clone(), 2
    for step in range(3):
        keys = torch.arange(B * 3, device=device).view(B, 3) + 100.0 * step
        moco_ext.enqueue_(queue, queue_ptr, keys)
        for row in keys:
            want[slot] = row
            slot = (slot + 1) % 5
    assert torch.equal(queue, want)
    assert queue_ptr.item() == slot


def test_equals_the_official_write(device):
    ours, theirs = torch.zeros(12, 4, device=device), torch.zeros(4, 12, device=device)
    our_ptr, their_ptr = pointer(0, device), pointer(0, device)
    for _ in range(5):
        keys = torch.randn(4, 4, device=device)
        moco_ext.enqueue_(ours, our_ptr, keys)
        official.enqueue(theirs, their_ptr, keys)
    assert torch.equal(ours.t(), theirs)
    assert torch.equal(our_ptr, their_ptr)


@pytest.mark.parametrize("view", [slice(2, 9), slice(None, None, 3), slice(None)], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("start", [0, 4, 11])
def test_keys_in_the_queue_are_read_before_any_row_is_written(device, start, normalize, view):
    queue = torch.randn(12, 5, device=device)
    want, want_ptr, queue_ptr = queue.clone(), pointer(start, device), pointer(start, device)
    moco_ext.enqueue_(want, want_ptr, queue[view].clone(), normalize=normalize)
    moco_ext.enqueue_(queue, queue_ptr, queue[view], normalize=normalize)
    assert torch.equal(queue, want)
    assert torch.equal(queue_ptr, want_ptr)


def test_keys_on_the_pointer_are_read_before_it_moves(device):
    memory = torch.tensor([3, 7, 7, 7], device=device)
    queue, want = torch.zeros(5, 4, device=device), torch.zeros(5, 4, device=device)
    keys = memory.view(torch.float32).view(2, 4)
    moco_ext.enqueue_(want, pointer(3, device), keys.clone())
    moco_ext.enqueue_(queue, memory[:1], keys)
    assert torch.equal(queue, want)
    assert memory.tolist() == [0, 7, 7, 7]


def test_a_pointer_in_the_memory_of_the_queue_is_refused(device):
    memory = torch.zeros(6, dtype=torch.int64, device=device)
    queue = memory.view(torch.float32).view(4, 3)
    with pytest.raises(ValueError, match="queue_ptr: expected memory outside queue"):
        moco_ext.enqueue_(queue, memory[4:5], torch.ones(2, 3, device=device))
    assert not memory.any()


def test_negative_pointers_count_from_the_end(device):
    """Modulo K, like an index in Python; the new pointer is in [0, K)."""
    queue, queue_ptr, keys = torch.zeros(5, 3, device=device), pointer(-6, device), torch.randn(2, 3, device=device)
    moco_ext.enqueue_(queue, queue_ptr, keys)  # -6 mod 5 = 4
    assert torch.equal(queue[[4, 0]], keys)
    assert not queue[1:4].any()
    assert queue_ptr.item() == 1


def test_values_beyond_float16_become_infinite(device):
    """Like in any cast. A silent clamp would hide a diverging encoder."""
    queue = torch.zeros(2, 2, dtype=torch.float16, device=device)
    moco_ext.enqueue_(queue, pointer(0, device), torch.tensor([[1e6, -1e6]], device=device))
    assert queue.tolist() == [[float("inf"), float("-inf")], [0.0, 0.0]]


@pytest.mark.parametrize("normalize", [True, False])
def test_nan_stays_nan(device, normalize):
    queue = torch.zeros(2, 3, dtype=torch.bfloat16, device=device)
    moco_ext.enqueue_(queue, pointer(0, device), torch.full((1, 3), torch.nan, device=device), normalize=normalize)
    assert queue[0].isnan().all()
    assert not queue[1].any()


def test_keys_with_gradient_are_written_without_it(device):
    queue, keys = torch.zeros(4, 3, device=device), torch.randn(2, 3, device=device, requires_grad=True)
    moco_ext.enqueue_(queue, pointer(0, device), keys)
    assert not queue.requires_grad
    assert torch.equal(queue[:2], keys.detach())


def test_writes_are_seen_by_autograd(device):
    """A graph that saved the queue or the pointer must detect that they changed."""
    queue, queue_ptr = torch.zeros(4, 3, device=device), pointer(0, device)
    x = torch.randn(4, 3, device=device, requires_grad=True)
    y = (x * queue).sum()
    versions = queue._version, queue_ptr._version
    moco_ext.enqueue_(queue, queue_ptr, torch.randn(2, 3, device=device))
    assert queue._version > versions[0]
    assert queue_ptr._version > versions[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("start", [0, 5, 9])
@pytest.mark.parametrize("batch", [0, 1, 4, 10, 23])
@pytest.mark.parametrize("shards", [[10], [5, 5], [3, 4, 3], [1, 9]], ids=str)
def test_shards_are_parts_of_the_queue(device, start, batch, shards):
    whole, at = torch.randn(10, 3, device=device), pointer(start, device)
    parts, pointers = [part.clone() for part in whole.split(shards)], [at.clone() for _ in shards]
    keys, offset = torch.randn(batch, 3, device=device), 0
    for part, own in zip(parts, pointers, strict=True):
        moco_ext.enqueue_(part, own, keys, normalize=True, row_offset=offset, K=10)
        offset += len(part)
    moco_ext.enqueue_(whole, at, keys, normalize=True)
    assert torch.equal(torch.cat(parts), whole)
    assert all(torch.equal(own, at) for own in pointers)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"K": 4}, "K: expected at least the 5 rows of queue, got 4"),
        ({"K": 2**63 - 1}, r"K: expected less than 2\^39 rows, got 9223372036854775807"),
        ({"K": 8, "row_offset": 4}, r"row_offset: expected 0 to 3 .*, got 4"),
        ({"row_offset": -1}, r"row_offset: expected 0 to 0 .*, got -1"),
    ],
)
def test_shard_outside_the_queue(device, rows, message):
    queue, queue_ptr = torch.zeros(5, 3, device=device), pointer(0, device)
    with pytest.raises(ValueError, match=message):
        moco_ext.enqueue_(queue, queue_ptr, torch.ones(2, 3, device=device), **rows)
    assert queue.eq(0).all()
    assert queue_ptr.item() == 0


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(device, dtype, normalize):
    queue = unit_rows(7, 5, dtype, device)
    opcheck(
        torch.ops.moco_ext.enqueue_.default,
        (queue, pointer(5, device), torch.randn(4, 5, device=device), normalize, 2, 12),
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(device, backend):
    def step(queue, queue_ptr, x):
        moco_ext.enqueue_(queue, queue_ptr, x * 2, normalize=True)
        return queue.sum()

    x, results = torch.randn(3, 4, device=device), []
    for run in (step, torch.compile(step, fullgraph=True, backend=backend)):
        queue, queue_ptr = torch.ones(5, 4, device=device), pointer(3, device)
        total = run(queue, queue_ptr, x)
        results.append((queue, queue_ptr, total))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)
    assert results[1][1].item() == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_neither_waits_nor_leaves_the_graph():
    """The pointer is on the device: no synchronization, and a replayed graph reads its current value."""
    queue, queue_ptr = torch.zeros(5, 3, device="cuda"), pointer(0, "cuda")
    keys = torch.randn(2, 3, device="cuda")
    moco_ext.enqueue_(queue, queue_ptr, keys)  # slots 0, 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            moco_ext.enqueue_(queue, queue_ptr, keys)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(2):  # slots 2, 3 and 4, 0
        keys.normal_()
        graph.replay()
    assert queue_ptr.item() == 1
    assert torch.equal(queue[[4, 0]], keys)
    assert queue[1:4].ne(0).all()
