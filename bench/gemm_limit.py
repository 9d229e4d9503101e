"""Measures the rate of large GEMMs, an upper limit for tensor-core kernels, and prints TFLOP/s as JSON (`make gpu`)."""

import json
import statistics
import sys
import time

import torch

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
side = int(sys.argv[1]) if len(sys.argv) > 1 else 8192


def seconds(run) -> float:
    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    run()
    samples = []
    for _ in range(10):
        start = clock()
        run()
        samples.append(clock() - start)
    return statistics.median(samples)


rates = {}
for name, dtype, tf32 in (("bfloat16", torch.bfloat16, False), ("tf32", torch.float32, True)):
    torch.backends.cuda.matmul.allow_tf32 = tf32
    a, b, out = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(3))
    rates[name] = round(2 * side**3 / seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)) / 1e12, 1)
print(json.dumps(rates))
