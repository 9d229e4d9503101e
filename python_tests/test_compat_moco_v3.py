"""compat.moco_v3 compared with the official formula; in one process and in two."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import leave_group

from moco_ext.compat.moco_v3 import contrastive_loss

DIM = 8


def features(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def formulation(q, keys, T, rank=0):
    """2 T times the cross-entropy, from the logits of this rank's queries and all ranks' keys."""
    logits = F.normalize(q, dim=1) @ F.normalize(keys, dim=1).t() / T
    return 2 * T * F.cross_entropy(logits, rank * len(q) + torch.arange(len(q), device=q.device))


def check(q, k, T, keys, rank=0):
    q, k, wide = q.clone().requires_grad_(), k.clone().requires_grad_(), q.double().requires_grad_()
    loss, want = contrastive_loss(q, k, T), formulation(wide, keys.double(), T, rank)
    loss.backward()
    want.backward()
    assert k.grad is None
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    rtol = 1e-4 if q.dtype == torch.float32 else 2e-2  # the gradient is rounded to 16 bits
    torch.testing.assert_close(q.grad.double(), wide.grad, rtol=rtol, atol=rtol * wide.grad.abs().max().item() + 1e-7)


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("T", [0.2, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradient(n, T, dtype):
    q, k = (3 * features(1, n, DIM)).to(dtype), features(2, n, DIM).to(dtype)
    check(q, k, T, k)


def test_errors_name_the_argument():
    x = features(1, 4, DIM)
    with pytest.raises(ValueError, match=r"^q: expected \[N, C\], got \[2, 4, 8\]"):
        contrastive_loss(torch.stack([x, x]), x, 0.2)
    with pytest.raises(ValueError, match=r"^k: expected \[4, 8\] as q, got \[5, 8\]"):
        contrastive_loss(x, features(1, 5, DIM), 0.2)
    with pytest.raises(TypeError, match=r"^k: expected a tensor, got NoneType"):
        contrastive_loss(x, None, 0.2)
    for T in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"^T: expected"):
            contrastive_loss(x, x, T)


def run_rank(rank, world, path):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    keys = features(1, world * 5, DIM)
    check(features(2 + rank, 5, DIM), keys[5 * rank :][:5], 0.2, keys, rank)
    leave_group()


def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(run_rank, (2, tmp_path / "rendezvous"), nprocs=2)
