"""InfoNCE, from raw queries to loss and gradient: ours, every installed baseline, and the limit."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from threading import Barrier
from typing import NamedTuple

import peers
import pytest
import torch
import torch.nn.functional as F
from conftest import Row

import moco_ext

TILE_LOGITS = 65536  # of one tile, which stay in cache with their keys, where GEMMs run fastest
T = 0.07
ROUNDED = 2e-2  # what rounding to 8 bits of mantissa costs, relative to the gradient

# N, K, C, queue's dtype; the large ones are for GPUs
CASES = [
    (32, 65536, 128, torch.float32, False),
    (256, 65536, 128, torch.float32, False),
    (256, 65536, 128, torch.bfloat16, False),
    (32, 65536, 128, torch.bfloat16, True),
    (1024, 65536, 128, torch.bfloat16, True),
    (4096, 65536, 128, torch.bfloat16, True),
    (256, 1048576, 128, torch.bfloat16, True),
    (256, 65536, 768, torch.bfloat16, True),
]


class Peer(NamedTuple):
    """How to make a peer, whether the other rows' positives are among its negatives, and whether it rounds to 16 bits
    even where the queue is float32."""

    make: Callable[[peers.Problem], peers.Gradient]
    in_batch: bool = False
    rounds: bool = False


PEERS = {
    "official, eager": Peer(peers.eager),
    "official, torch.compile": Peer(peers.compiled),
    "official, torch.compile max-autotune": Peer(peers.max_autotune),
    "official, bf16 autocast": Peer(peers.autocast, rounds=True),
    "Lightly": Peer(peers.lightly),
    "flash attention, V = K": Peer(peers.flash_attention),
    "Inf-CL": Peer(peers.inf_cl),
    "torch linear_cross_entropy": Peer(peers.torch_linear, True),
    "torch linear_cross_entropy, chunks": Peer(partial(peers.torch_linear, chunked=True), True),
    "torch linear_cross_entropy, chunks of 64": Peer(partial(peers.torch_linear, chunked=True, rows=64), True),
    "Cut Cross-Entropy, exact": Peer(peers.cut_cross_entropy, True, True),
    "Liger": Peer(peers.liger, True, True),
    "Liger, chunk x 8": Peer(partial(peers.liger, chunks=8), True, True),
    "Liger, chunk x 64": Peer(partial(peers.liger, chunks=64), True, True),
    "Liger, chunk x 512": Peer(partial(peers.liger, chunks=512), True, True),
    "Liger, CuTe": Peer(peers.liger_hopper, True, True),
    "Liger, CuTe scaled": Peer(peers.liger_hopper_scaled, True, True),
    "QuACK": Peer(peers.quack, True, True),
    "QuACK, scaled exp": Peer(partial(peers.quack, scaled_exp=True), True, True),
}


def problem_of(N, K, C, dtype, device) -> peers.Problem:
    # drawn on the CPU: the same on every device
    query, key, queue = (torch.randn(rows, C).to(device) for rows in (N, N, K))
    return peers.Problem(query.requires_grad_(), key, F.normalize(queue, dim=1).to(dtype), T)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"N{c[0]}-K{c[1]}-C{c[2]}-{str(c[3])[6:]}")
def bench_info_nce(compare, device, case):
    N, K, C, queue_dtype, gpu_only = case
    if gpu_only and device.type == "cpu":
        pytest.skip("a GPU's size")
    problem = problem_of(N, K, C, queue_dtype, device)
    product = 2 * N * K * C
    least = problem.queue.nbytes + 4 * problem.query.nbytes  # read query, key and queue, write the gradient
    both = {"flops": 2 * product, "bytes": least}

    # In training, keys score above most negatives; random ones do not, and the kernels have more to count.
    near = replace(problem, key=problem.query.detach() + 0.5 * torch.randn(N, C).to(device))

    def ours(of=problem):
        return of.gradient(moco_ext.info_nce(of.query, of.key, of.queue, T))

    def ours_forward():
        with torch.no_grad():
            return moco_ext.info_nce(problem.query, problem.key, problem.queue, T)

    # tensor cores round their operands to the queue's mantissa, and the softmax weights with them
    rounded = ROUNDED if device.type == "cuda" and queue_dtype != torch.float32 else 1e-5
    rows = [
        Row("ours", ours, value=ours, tolerance=rounded, **both),
        Row("ours, forward only", ours_forward, flops=product, bytes=least),
        Row(
            "ours, keys near the queries",
            partial(ours, near),
            value=partial(ours, near),
            want=near.exact,
            tolerance=rounded,
            **both,
        ),
    ]
    if device.type == "cuda" and queue_dtype == torch.float32:
        rows.append(Row("ours, tf32", _in_tf32(ours), value=_in_tf32(ours), tolerance=ROUNDED, **both))
    skipped = {}
    for name, peer in PEERS.items():
        tolerance = 1e-5 if queue_dtype == torch.float32 and not peer.rounds else ROUNDED
        want = problem.exact_of_classes if peer.in_batch else problem.exact
        add_peer(rows, skipped, name, partial(peer.make, problem), want, tolerance, **both)
    if device.type == "cuda":
        rows += _device_limits(device, queue_dtype)
    else:
        rows.append(cache_limit(problem.query.detach(), K, 2 * product))
    compare(f"info_nce N={N} K={K} C={C} {str(queue_dtype)[6:]} queue", rows, problem.exact, skipped)


def add_peer(rows, skipped, name, make: Callable[[], Callable[[], torch.Tensor]], want, tolerance, **work) -> None:
    """Add the row of a peer that ``make`` makes. A peer that fails, or is wrong, costs its own row only."""
    try:
        run = make()
        first = run()  # what is checked: Lightly's next call has these keys in its queue
        run()
        error = ((first.double() - want).norm() / want.norm()).item()
    except peers.Unavailable as why:
        skipped[name] = str(why)
    except Exception as failure:
        skipped[name] = f"{type(failure).__name__}: {str(failure).split(chr(10))[0][:200]}"
    else:
        if error <= tolerance:
            rows.append(Row(name, run, value=lambda: first, want=want, tolerance=tolerance, **work))
        else:
            skipped[name] = f"wrong: relative error {error:.0e}, expected at most {tolerance:.0e}"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "forward"])
@pytest.mark.parametrize("N", [32, 256], ids=lambda N: f"N{N}")
def bench_linear_cross_entropy(compare, device, N, gradient, threads):
    """Against torch's own fused loss of a linear layer, for whose problem ours takes the keys of the batch, too."""
    if device.type == "cuda":
        pytest.skip("CPU threads; bench_info_nce has it on a GPU")
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("needs torch 2.13")
    K, C = 65536, 128
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        problem = problem_of(N, K, C, torch.float32, device)
        work = {"flops": (2 + 2 * gradient) * N * K * C, "bytes": problem.queue.nbytes + 4 * problem.query.nbytes}
        want = [getattr(problem, name) if gradient else problem.exact_loss(name != "exact")
                for name in ("exact", "exact_of_classes")]  # fmt: skip

        def ours(in_batch: bool = False) -> torch.Tensor:
            return moco_ext.info_nce(problem.query, problem.key, problem.queue, T, in_batch=in_batch)

        def timed(loss: peers.Loss) -> Callable[[], torch.Tensor]:
            if gradient:
                return lambda: problem.gradient(loss())
            return torch.no_grad()(loss)

        both = {"ours": timed(ours), "ours, in_batch": timed(partial(ours, True))}
        rows = [Row(name, run, value=run, want=want[i], **work) for i, (name, run) in enumerate(both.items())]
        ways = {"reference": {}, "chunks": {"chunked": True}, "chunks of 64": {"chunked": True, "rows": min(N, 64)}}
        skipped = {}
        for name, options in ways.items():
            make = partial(peers.torch_linear_loss, problem, **options)
            add_peer(rows, skipped, name, lambda make=make: timed(make()), want[1], 1e-5, **work)
        mode = "gradient" if gradient else "forward"
        group = f"linear_cross_entropy N={N} K={K} C={C} float32 queue, {mode}, {threads} threads"
        compare(group, rows, want[0], skipped)
    finally:
        torch.set_num_threads(before)


def _in_tf32(run):
    def switched():
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return run()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return switched


def cache_limit(query, K, flops) -> Row:
    """The same products on one tile that never leaves the cache: what torch's GEMMs take at their best."""
    N, C = query.shape
    size = min(max(TILE_LOGITS // N, 256), 2048)  # keys
    threads = torch.get_num_threads()
    # Threads that meet once, at the end: GEMMs that share each tile would also time the wake-ups between them.
    ready = Barrier(threads + 1)

    def alone():
        torch.set_num_threads(1)
        torch.mm(query, query.t())  # a thread keeps the setting that it first computes under
        ready.wait()

    pool = ThreadPoolExecutor(threads, initializer=alone)
    for _ in range(threads):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(threads)  # without this the other rows would run on one thread

    def share(tiles):
        tile, logits, gradient = torch.full((size, C), 0.1), torch.empty(N, size), torch.zeros(N, C)
        for _ in range(tiles):
            torch.mm(query, tile.t(), out=logits)
            torch.addmm(gradient, logits, tile, out=gradient, alpha=1e-6)

    tiles = K // size
    shares = [tiles // threads + (i < tiles % threads) for i in range(threads)]
    return Row("limit: two GEMMs in cache", lambda: list(pool.map(share, shares)), flops=flops)


def _device_limits(device, dtype) -> list[Row]:
    """A large GEMM in the queue's dtype and a large copy: the rates no kernel exceeds."""
    side, count = 8192, 2**28
    a, b, out = (torch.randn(side, side).to(device, dtype) for _ in range(3))
    source, target = (torch.empty(count, device=device) for _ in range(2))
    return [
        Row("limit: dense GEMM", lambda: torch.mm(a, b, out=out), flops=2 * side**3),
        Row("limit: copy", lambda: target.copy_(source), bytes=2 * source.nbytes),
    ]
