"""InfoNCE, raw queries to loss and gradient: ours, the published formulation eager and compiled, the limit."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import official
import pytest
import torch
import torch.nn.functional as F
from conftest import Row

import moco_ext
import moco_ext.reference

TILE_LOGITS = 65536  # of one tile, which stay in cache with their keys, where GEMMs run fastest
T = 0.07

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


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"N{c[0]}-K{c[1]}-C{c[2]}-{str(c[3])[6:]}")
def bench_info_nce(compare, device, case):
    N, K, C, queue_dtype, gpu_only = case
    if gpu_only and device.type == "cpu":
        pytest.skip("a GPU's size")
    query = torch.randn(N, C, device=device, requires_grad=True)
    key = torch.randn(N, C, device=device)
    queue = F.normalize(torch.randn(K, C, device=device), dim=1).to(queue_dtype)
    columns = queue.float().t().contiguous()  # [C, K], as published
    torch.compiler.reset()  # else the second size would get code for any size, which is slower
    compiled = torch.compile(official.info_nce, dynamic=False)

    def gradient_of(loss):
        return torch.autograd.grad(loss, query)[0]

    def ours():
        return gradient_of(moco_ext.info_nce(query, key, queue, T))

    def ours_forward():
        with torch.no_grad():
            return moco_ext.info_nce(query, key, queue, T)

    def eager():
        return gradient_of(official.info_nce(query, key, columns, T))

    def eager_compiled():
        return gradient_of(compiled(query, key, columns, T))

    def eager_autocast():
        with torch.autocast("cuda", torch.bfloat16):
            return gradient_of(official.info_nce(query, key, columns, T))

    product, least = 2 * N * K * C, queue.nbytes + 4 * query.nbytes
    both = {"flops": 2 * product, "bytes": least}
    # tensor cores round their operands to 8 bits of mantissa, and the softmax weights with them
    rounded = 2e-2 if device.type == "cuda" and queue_dtype != torch.float32 else 1e-5
    rows = [
        Row("ours", ours, value=ours, tolerance=rounded, **both),
        Row("ours, forward only", ours_forward, flops=product, bytes=least),
        Row("official, eager", eager, value=eager, **both),
        Row("official, torch.compile", eager_compiled, value=eager_compiled, **both),
    ]
    if device.type == "cuda":
        rows.append(Row("official, bf16 autocast", eager_autocast, value=eager_autocast, tolerance=2e-2, **both))
        rows += _device_limits(device, queue_dtype)
    else:
        rows.append(_cache_limit(query.detach(), K, 2 * product))

    wide = query.detach().double().requires_grad_()
    loss = moco_ext.reference.info_nce(wide, key.double(), queue.double(), T)
    compare(f"info_nce N={N} K={K} C={C} {str(queue_dtype)[6:]} queue", rows, torch.autograd.grad(loss, wide)[0])


def _cache_limit(query, K, flops) -> Row:
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
    a, b, out = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(3))
    source, target = (torch.empty(count, device=device) for _ in range(2))
    return [
        Row("limit: dense GEMM", lambda: torch.mm(a, b, out=out), flops=2 * side**3),
        Row("limit: copy", lambda: target.copy_(source), bytes=2 * source.nbytes),
    ]
