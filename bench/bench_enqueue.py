"""enqueue_, compared with the published slice write (columns, pointer read on the host)."""

import official
import pytest
import torch
from conftest import Row

import moco_ext

K = 65536


@pytest.mark.parametrize("queue_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("B", "C"), [(256, 128), (4096, 128), (65536, 128)])
def bench_enqueue(compare, device, B, C, queue_dtype):
    keys = torch.randn(B, C).to(device)
    calls = max(1, 8192 // B)

    def row(name, shape, write, rows_of=lambda queue: queue):
        """A write moves on through its own queue; the checked value is the first one's."""
        queue = torch.zeros(shape, dtype=queue_dtype, device=device)
        queue_ptr = torch.zeros(1, dtype=torch.int64, device=device)

        def first_write():
            fresh = torch.zeros_like(queue)
            write(fresh, torch.zeros_like(queue_ptr))
            return rows_of(fresh)[:B]

        least = keys.nbytes + B * C * queue.element_size()
        # the queue's dtype rounds once
        tolerance = 1e-5 if queue_dtype == torch.float32 else 4e-3
        return Row(
            name,
            lambda: write(queue, queue_ptr),
            bytes=least,
            value=first_write,
            tolerance=tolerance,
            calls=calls,
        )

    def slice_rows(queue, queue_ptr):
        start = int(queue_ptr)
        queue[start : start + B] = keys
        queue_ptr[0] = (start + B) % K

    source, target = torch.randn(B * C).to(device), torch.empty(B * C, device=device, dtype=queue_dtype)
    least = source.nbytes + target.nbytes
    rows = [
        row("ours", (K, C), lambda q, p: moco_ext.enqueue_(q, p, keys)),
        row(
            "official, slice of columns",
            (C, K),
            lambda q, p: official.enqueue(q, p, keys),
            lambda queue: queue.t(),
        ),
        row("slice of rows, pointer on the host", (K, C), slice_rows),
        Row("limit: copy and cast", lambda: target.copy_(source), bytes=least, calls=calls),
    ]
    compare(f"enqueue B={B} C={C} {str(queue_dtype)[6:]} queue", rows, keys.double())
