"""InfoNCE over shapes and threads, compared with the baselines and the limit: `pytest bench/bench_sweep.py --sweep`."""

import peers
import pytest
import torch
from bench_info_nce import cache_limit, problem_of
from conftest import Row

import moco_ext

SHAPES = [(N, 65536, 128) for N in (8, 32, 256, 1024)]
SHAPES += [(256, 65536, C) for C in (64, 256, 768)]
SHAPES += [(256, K, 128) for K in (4096, 1048576)]
LOGITS_LIMIT = 2**28  # of the published formulation: it holds three matrices of them


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("N", "K", "C"), SHAPES)
def bench_sweep(compare, device, request, N, K, C, dtype, threads):
    if not request.config.getoption("--sweep"):
        pytest.skip("--sweep")
    if device.type == "cuda":
        pytest.skip("CPU threads")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        problem = problem_of(N, K, C, dtype, device)
        work = {"flops": 4 * N * K * C, "bytes": problem.queue.nbytes + 4 * problem.query.nbytes}

        def ours():
            return problem.gradient(moco_ext.info_nce(problem.query, problem.key, problem.queue, problem.T))

        rows, skipped = [Row("ours", ours, value=ours, **work)], {}
        if N * K <= LOGITS_LIMIT:
            eager = peers.eager(problem)
            rows.append(Row("official, eager", eager, value=eager, **work))
        else:
            skipped["official, eager"] = "too much memory"
        rows.append(cache_limit(problem.query.detach(), K, work["flops"]))
        group = f"sweep N={N} K={K} C={C} {str(dtype)[6:]} queue, {threads} threads"
        compare(group, rows, problem.exact, skipped)
    finally:
        torch.set_num_threads(before)
