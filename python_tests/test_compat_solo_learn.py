"""compat.solo_learn compared with the formulas of solo-learn's MoCo v2+; the package itself is not installed."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moco_ext.compat import solo_learn as ours

DIM, K, N = 8, 40, 5


def features(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss_func(query, key, queue, temperature=0.1):
    """The (K + 1)-way cross-entropy of features that are not normalized, from its logits."""
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))


class Published:
    """solo-learn's part of a training step."""

    mocov2plus_loss_func = staticmethod(loss_func)

    class MomentumUpdater:
        def __init__(self, base_tau, final_tau):
            self.base_tau = self.cur_tau = base_tau
            self.final_tau = final_tau

        @torch.no_grad()
        def update(self, online, momentum):
            for p, k in zip(online.parameters(), momentum.parameters(), strict=True):
                k.data = self.cur_tau * k.data + (1 - self.cur_tau) * p.data

        def update_tau(self, step, steps):
            self.cur_tau = (
                self.final_tau - (self.final_tau - self.base_tau) * (math.cos(math.pi * step / steps) + 1) / 2
            )

    @staticmethod
    def initialize_momentum_params(online, momentum):
        momentum.load_state_dict(online.state_dict())
        momentum.requires_grad_(False)

    @staticmethod
    def dequeue_and_enqueue_(queue, pointer, keys):
        start = int(pointer)
        queue[:, :, start : start + keys.shape[1]] = keys.permute(0, 2, 1)
        pointer[0] = (start + keys.shape[1]) % queue.shape[2]


def train(package, queue, steps=50):
    """The symmetric step of MoCo v2+, on a small smooth network."""
    torch.manual_seed(0)
    online, momentum = (nn.Sequential(nn.Linear(10, 16), nn.SiLU(), nn.Linear(16, DIM)) for _ in range(2))
    package.initialize_momentum_params(online, momentum)
    updater = package.MomentumUpdater(0.9, 1.0)
    optimizer = torch.optim.SGD(online.parameters(), 0.06, momentum=0.9)
    pointer, losses = torch.zeros(1, dtype=torch.long), []
    for step in range(steps):
        x1, x2 = features(step, 2, N, 10)
        q1, q2 = (F.normalize(online(x), dim=-1) for x in (x1, x2))
        with torch.no_grad():
            k1, k2 = (F.normalize(momentum(x), dim=-1) for x in (x1, x2))
        before = queue.clone().detach()  # as its trainer does
        loss = sum(package.mocov2plus_loss_func(*x, 0.2) for x in ((q1, k2, before[1]), (q2, k1, before[0]))) / 2
        package.dequeue_and_enqueue_(queue, pointer, torch.stack([k1, k2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        updater.update(online, momentum)
        updater.update_tau(step, steps)
        losses.append(loss.item())
    return torch.tensor(losses), queue


@pytest.mark.parametrize("contiguous", [False, True], ids=["made here", "made by solo-learn"])
def test_fifty_steps(contiguous):
    torch.manual_seed(1)
    queue = ours.init_queue(DIM, K)
    published, want = train(Published, queue.contiguous())
    mine, got = train(ours, queue.contiguous() if contiguous else queue.clone())
    torch.testing.assert_close(mine, published, rtol=0, atol=2e-5)  # float32 rounding over 50 steps
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert mine[-1] != mine[0]


@pytest.mark.parametrize("norm", [1, 20])  # solo-learn's own test uses features that are not unit vectors
def test_loss_and_both_gradients(norm):
    inputs = [(norm * features(seed, 7, DIM)).requires_grad_() for seed in (1, 2)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    queue = features(3, DIM, 33)
    loss, want = ours.mocov2plus_loss_func(*inputs, queue), loss_func(*wide, queue.double())
    loss.backward()
    want.backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    for x, reference in zip(inputs, wide, strict=True):
        torch.testing.assert_close(x.grad.double(), reference.grad, rtol=1e-4, atol=1e-5)


def test_loss_takes_autocast_dtypes():
    query, key = features(1, 4, DIM).bfloat16(), features(2, 4, DIM)
    queue = features(3, DIM, 33)
    want = loss_func(query.double(), key.bfloat16().double(), queue.double())
    torch.testing.assert_close(ours.mocov2plus_loss_func(query, key, queue).double(), want, rtol=1e-5, atol=0)


def test_queue_keeps_its_layout():
    queue = ours.init_queue(DIM, K)
    assert queue.shape == (2, DIM, K)
    torch.testing.assert_close(queue.norm(dim=1), torch.ones(2, K))
    module = nn.Module()
    module.register_buffer("queue", queue)
    module.load_state_dict({"queue": features(0, 2, DIM, K)})
    for kept in (module.queue, module.queue.clone(), copy.deepcopy(module).double().queue):
        assert kept[1].t().is_contiguous()


@pytest.mark.parametrize("contiguous", [False, True])
def test_enqueue_wraps_around(contiguous):
    queue, pointer = ours.init_queue(DIM, 7), torch.tensor([5])
    want = queue.clone().contiguous()
    if contiguous:
        queue = queue.contiguous()
    keys = features(1, 2, 4, DIM)
    want[:, :, [5, 6, 0, 1]] = keys.transpose(1, 2)
    ours.dequeue_and_enqueue_(queue, pointer, keys)
    assert torch.equal(queue, want)
    assert pointer.tolist() == [2]


def test_momentum_updater():
    updater = ours.MomentumUpdater(0.9, 1.0)
    taus = [updater.cur_tau]
    for step in range(11):
        updater.update_tau(step, 10)
        taus.append(updater.cur_tau)
    assert taus[:2] == [0.9, 0.9]
    assert taus[6] == pytest.approx(0.95)
    assert taus[-1] == pytest.approx(1.0)
    assert taus == sorted(taus)
    with pytest.raises(ValueError, match="base_tau, final_tau"):
        ours.MomentumUpdater(0.99, 0.9)
    with pytest.raises(ValueError, match="expected the same parameters"):
        updater.update(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))


def test_networks_without_parameters():
    """A projector may be an nn.Identity."""
    ours.initialize_momentum_params(nn.Identity(), nn.Identity())
    ours.MomentumUpdater().update(nn.Identity(), nn.Identity())
    with pytest.raises(ValueError, match="only the query encoder has weight"):
        ours.MomentumUpdater().update(nn.Linear(2, 2), nn.Identity())


def test_initialize_momentum_params():
    online, momentum = nn.Linear(3, 3), nn.Linear(3, 3)
    ours.initialize_momentum_params(online, momentum)
    assert torch.equal(online.weight, momentum.weight)
    assert online.weight.requires_grad
    assert not momentum.weight.requires_grad


@pytest.mark.parametrize("shape", [(2, 3, DIM + 1), (3, 3, DIM), (3, DIM)])
def test_keys_of_the_wrong_shape(shape):
    queue, pointer = ours.init_queue(DIM, K), torch.zeros(1, dtype=torch.long)
    before = queue.clone()
    with pytest.raises(ValueError, match="keys: expected"):
        ours.dequeue_and_enqueue_(queue, pointer, torch.zeros(shape))
    assert torch.equal(queue, before)
    assert int(pointer) == 0
