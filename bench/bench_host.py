"""The host time of a call: with so few rows, nearly all of it is checks, dispatch and autograd."""

import pytest
import torch
import torch.nn.functional as F
from conftest import Row

import moco_ext.reference

CALLS = 200


@pytest.mark.parametrize("N", [1, 32])
def bench_host(compare, device, N):
    K, C = 256, 128
    query = torch.randn(N, C).to(device)
    trained, key = query.clone().requires_grad_(), torch.randn(N, C).to(device)
    queue = F.normalize(torch.randn(K, C).to(device), dim=1)
    ids = torch.arange(N, device=device), torch.arange(K, device=device)
    columns = queue.t().contiguous()
    labels = torch.zeros(N, dtype=torch.long, device=device)
    operator = torch.ops.moco_ext.info_nce_forward.default
    no_options = (False, 0, None, None, 0.0, None, None, False, None, None, 0)
    plain = (query, key, queue, None, 0.07, True, 1, False, False, False, 3, *no_options)

    def gradient(loss):
        return torch.autograd.grad(loss, trained)[0]

    def official():
        q, k = F.normalize(trained, dim=1), F.normalize(key, dim=1)
        logits = torch.cat([torch.einsum("nc,nc->n", q, k).unsqueeze(1), q @ columns], dim=1) / 0.07
        return gradient(F.cross_entropy(logits, labels))

    def ours():
        return gradient(moco_ext.info_nce(trained, key, queue))

    rows = [
        Row("ours, forward and gradient", ours, value=ours, calls=CALLS),
        Row("ours, forward that saves for it", lambda: moco_ext.info_nce(trained, key, queue), calls=CALLS),
        Row("ours, forward only", lambda: moco_ext.info_nce(query, key, queue), calls=CALLS),
        Row("the operator alone", lambda: operator(*plain), calls=CALLS),
        Row(
            "ours, with ids, forward and gradient",
            lambda: gradient(moco_ext.info_nce(trained, key, queue, query_ids=ids[0], queue_ids=ids[1])),
            calls=CALLS,
        ),
        Row("official, forward and gradient", official, value=official, calls=CALLS),
        Row("one multiplication and its gradient", lambda: gradient((trained * 2).sum()), calls=CALLS),
    ]
    wide = trained.detach().double().requires_grad_()
    loss = moco_ext.reference.info_nce(wide, key.double(), queue.double())
    compare(f"host N={N} K={K} C={C}", rows, torch.autograd.grad(loss, wide)[0])
