"""Other operators, compared with plain torch: soft labels with the teacher's pass, nearest keys, and the CLIP loss."""

import pytest
import torch
import torch.nn.functional as F
from conftest import Row

import moco_ext

T = 0.07


@pytest.mark.parametrize("N", [32, 256], ids=lambda N: f"N{N}")
def bench_soft_labels(compare, device, N):
    """Momentum distillation: raw queries, keys and teacher to loss and gradient. The hard loss is what it may cost."""
    K, C = 65536, 128
    query, key, teacher, queue = (torch.randn(rows, C).to(device) for rows in (N, N, N, K))
    query.requires_grad_()
    queue = F.normalize(queue, dim=1)

    def gradient(loss):
        return torch.autograd.grad(loss, query)[0]

    def ours():
        soft = moco_ext.expected_key(teacher, key, queue, T).keys
        target = 0.6 * F.normalize(key, dim=1) + 0.4 * soft
        return gradient(moco_ext.info_nce(query, key, queue, T, target=target))

    def scores(x):
        q, k = F.normalize(x, dim=1), F.normalize(key, dim=1)
        return torch.cat([(q * k).sum(1, keepdim=True), q @ queue.t()], dim=1) / T

    def eager():
        with torch.no_grad():
            labels = 0.4 * scores(teacher).softmax(1)
            labels[:, 0] += 0.6
        return gradient(F.cross_entropy(scores(query), labels))

    flops, least = 2 * N * K * C, queue.nbytes
    want = eager().double()
    rows = [
        Row("ours, soft labels and teacher", ours, value=ours, flops=4 * flops, bytes=2 * least),
        Row(
            "ours, hard labels",
            lambda: gradient(moco_ext.info_nce(query, key, queue, T)),
            flops=2 * flops,
            bytes=least,
        ),
        Row("eager", eager, value=eager, flops=4 * flops, bytes=2 * least),
    ]
    compare(f"soft labels N={N} K={K} C={C}", rows, want)


@pytest.mark.parametrize("N", [256, 4096], ids=lambda N: f"N{N}")
def bench_clip_loss(compare, device, N):
    """Images and text, gradients to both."""
    C = 512
    image, text = (F.normalize(torch.randn(N, C), dim=1).to(device).requires_grad_() for _ in range(2))
    scale, labels = torch.tensor(20.0, device=device), torch.arange(N, device=device)

    def gradients(loss):
        return torch.cat(torch.autograd.grad(loss, [image, text]))

    def eager():
        logits = scale * image @ text.t()
        return gradients((F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2)

    def ours():
        return gradients(moco_ext.clip_loss(image, text, scale, normalize=False))

    work = {"flops": 6 * N * N * C, "bytes": 4 * image.nbytes}
    rows = [Row(name, run, value=run, **work) for name, run in (("ours", ours), ("eager", eager))]
    compare(f"clip_loss N={N} C={C}", rows, eager().double())


@pytest.mark.parametrize("k", [1, 200], ids=lambda k: f"k{k}")
def bench_nearest_keys(compare, device, k):
    N, K, C = 256, 1_000_000, 128
    query, queue = torch.randn(N, C).to(device), F.normalize(torch.randn(K, C), dim=1).to(device)

    def matmul():
        return (F.normalize(query, dim=1) @ queue.t()).topk(k)

    work = {"flops": 2 * N * K * C, "bytes": queue.nbytes}
    rows = [
        Row(name, run, value=lambda run=run: run()[0], **work)
        for name, run in (("ours", lambda: moco_ext.nearest_keys(query, queue, k)), ("matmul, topk", matmul))
    ]
    compare(f"nearest keys N={N} K={K} C={C} k={k}", rows, matmul()[0].double())
