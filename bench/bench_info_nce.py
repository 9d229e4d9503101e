"""InfoNCE, raw queries to loss and gradient: ours, every peer that is installed, and the limit."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

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

# name -> how to make it, and whether the other rows' positives are among its negatives
PEERS = {
    "official, eager": (peers.eager, False),
    "official, torch.compile": (peers.compiled, False),
    "official, torch.compile max-autotune": (peers.max_autotune, False),
    "official, bf16 autocast": (peers.autocast, False),
    "Lightly": (peers.lightly, False),
    "flash attention, V = K": (peers.flash_attention, False),
    "Inf-CL": (peers.inf_cl, False),
    "Cut Cross-Entropy, exact": (peers.cut_cross_entropy, True),
    "Liger": (peers.liger, True),
    "Liger, chunk x 8": (partial(peers.liger, chunks=8), True),
    "Liger, chunk x 64": (partial(peers.liger, chunks=64), True),
    "Liger, chunk x 512": (partial(peers.liger, chunks=512), True),
    "QuACK": (peers.quack, True),
    "QuACK, scaled exp": (partial(peers.quack, scaled_exp=True), True),
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

    def ours():
        return problem.gradient(moco_ext.info_nce(problem.query, problem.key, problem.queue, T))

    def ours_forward():
        with torch.no_grad():
            return moco_ext.info_nce(problem.query, problem.key, problem.queue, T)

    # tensor cores round their operands to the queue's mantissa, and the softmax weights with them
    rounded = ROUNDED if device.type == "cuda" and queue_dtype != torch.float32 else 1e-5
    rows = [
        Row("ours", ours, value=ours, tolerance=rounded, **both),
        Row("ours, forward only", ours_forward, flops=product, bytes=least),
    ]
    if device.type == "cuda" and queue_dtype == torch.float32:
        rows.append(Row("ours, tf32", _in_tf32(ours), value=_in_tf32(ours), tolerance=ROUNDED, **both))
    skipped = {}
    for name, (make, others_too) in PEERS.items():
        try:
            run = make(problem)
            first = run()  # what is checked: Lightly's next call has these keys in its queue
        except peers.Unavailable as why:
            skipped[name] = str(why)
            continue
        except Exception as error:  # a peer's own failure is a finding, not ours
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            continue
        tolerance = 1e-5 if queue_dtype == torch.float32 and "autocast" not in name else ROUNDED
        if "Liger" in name or "QuACK" in name or "Cut" in name:
            tolerance = ROUNDED
        want = problem.exact_of_classes if others_too else problem.exact
        rows.append(Row(name, run, value=lambda first=first: first, want=want, tolerance=tolerance, **both))
    if device.type == "cuda":
        rows += _device_limits(device, queue_dtype)
    else:
        rows.append(cache_limit(problem.query.detach(), K, 2 * product))
    compare(f"info_nce N={N} K={K} C={C} {str(queue_dtype)[6:]} queue", rows, problem.exact, skipped)


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
