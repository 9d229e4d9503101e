"""compat.solo_learn compared with solo-learn's formulas, and with solo-learn if it is importable."""

import copy
import math
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import leave_group
from torch import nn

from moco_ext.compat import solo_learn as ours

DIM, K, N = 8, 40, 5


def features(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss_func(query, key, queue, temperature=0.1):
    """The (K + 1)-way cross-entropy of features that are not normalized, from its logits."""
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))


def in_batch(query, key, temperature):
    """Cross-entropy of unit rows with the key of the same row, among all keys, from its logits."""
    logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).t() / temperature
    return F.cross_entropy(logits, torch.arange(len(query), device=query.device))


def mocov3_loss_func(query, key, temperature=0.2):
    return in_batch(query, key, temperature) * 2 * temperature


def nnclr_loss_func(nn, p, temperature=0.1):
    return in_batch(nn, p, temperature)


def ressl_loss_func(q, k, queue, temperature_q=0.1, temperature_k=0.04):
    teacher = (k.detach() @ queue.t() / temperature_k).softmax(1)
    return F.cross_entropy(q @ queue.t() / temperature_q, teacher)


class Published:
    """solo-learn's part of a training step: its formulas."""

    mocov2plus_loss_func = staticmethod(loss_func)
    mocov3_loss_func = staticmethod(mocov3_loss_func)
    nnclr_loss_func = staticmethod(nnclr_loss_func)
    ressl_loss_func = staticmethod(ressl_loss_func)

    @staticmethod
    @torch.no_grad()
    def find_nn(z, queue):
        index = (z @ queue.t()).max(dim=1)[1]
        return index, queue[index]

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
    nn.init.constant_(momentum.weight, torch.nan)  # of a network that has diverged
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


# ---- MoCo v3, NNCLR, ReSSL ----


LOSSES = ("mocov3_loss_func", "nnclr_loss_func", "ressl_loss_func")


def problem(name, n, dtype=torch.float32):
    """The tensors of a loss of that name; ReSSL's are unit rows, as its trainer has them."""
    x, y, queue = features(1, n, DIM), features(2, n, DIM), F.normalize(features(3, K, DIM), dim=1)
    if name == "ressl_loss_func":
        return [F.normalize(x, dim=1).to(dtype), F.normalize(y, dim=1).to(dtype), queue.to(dtype)]
    return [(3 * x).to(dtype), y.to(dtype)]


def loss_and_gradients(function, inputs, **options):
    first, second, *rest = inputs
    first, second = (x.detach().clone().requires_grad_() for x in (first, second))
    loss = function(first, second, *rest, **options)
    loss.backward()
    return loss.detach().double(), [None if x.grad is None else x.grad.double() for x in (first, second)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("options", [{}, {"other": 0.5}], ids=["defaults", "other temperature"])
@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_match_float64(name, options, n, dtype):
    if options:
        options = {"temperature_k" if name == "ressl_loss_func" else "temperature": options["other"]}
    inputs = problem(name, n, dtype)
    loss, grads = loss_and_gradients(getattr(ours, name), inputs, **options)
    want, want_grads = loss_and_gradients(getattr(Published, name), [x.double() for x in inputs], **options)
    rtol = 1e-4 if dtype == torch.float32 else 2e-2  # the gradient is rounded to 16 bits
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    for grad, reference in zip(grads, want_grads, strict=True):
        assert (grad is None) == (reference is None)
        if grad is not None:
            torch.testing.assert_close(grad, reference, rtol=rtol, atol=rtol * reference.abs().max().item() + 1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_match_solo_learn(name):
    theirs = getattr(pytest.importorskip("solo.losses"), name)
    inputs = problem(name, 6)
    loss, grads = loss_and_gradients(getattr(ours, name), inputs)
    want, want_grads = loss_and_gradients(theirs, inputs)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    for grad, reference in zip(grads, want_grads, strict=True):
        assert (grad is None) == (reference is None)
        if grad is not None:
            torch.testing.assert_close(grad, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_find_nn(dtype):
    queue = F.normalize(features(1, K, DIM), dim=1).to(dtype)
    queue[7] = queue[3]  # the first of equal neighbors
    z = torch.cat([features(2, N, DIM), queue[3:4].float()]).requires_grad_()
    index, nearest = ours.find_nn(z, queue)
    assert torch.equal(index, Published.find_nn(z.double(), queue.double())[0])
    assert index[-1] == 3
    assert torch.equal(nearest, queue[index])
    assert not nearest.requires_grad
    assert torch.equal(ours.find_nn(z, queue.t().contiguous().t())[0], index)  # of any layout


def test_find_nn_matches_solo_learn():
    methods = pytest.importorskip("solo.methods")
    z, queue = (F.normalize(features(seed, n, DIM), dim=1) for seed, n in ((1, 20), (2, K)))
    for got, want in zip(ours.find_nn(z, queue), methods.NNCLR.find_nn(SimpleNamespace(queue=queue), z), strict=True):
        assert torch.equal(got, want)


def test_errors_name_the_argument():
    x, queue = features(1, N, DIM), features(2, K, DIM)
    for function, names in ((ours.mocov3_loss_func, ("query", "key")), (ours.nnclr_loss_func, ("nn", "p"))):
        with pytest.raises(ValueError, match=rf"^{names[0]}: expected \[N, C\], got \[{DIM}\]"):
            function(x[0], x)
        with pytest.raises(ValueError, match=rf"^{names[1]}: expected \[{N}, {DIM}\] as {names[0]}, got \[2, {DIM}\]"):
            function(x, x[:2])
        with pytest.raises(ValueError, match=r"^temperature: expected"):
            function(x, x, temperature=0.0)
    with pytest.raises(TypeError, match=r"^k: expected a tensor, got list"):
        ours.ressl_loss_func(x, [1.0], queue)
    with pytest.raises(ValueError, match=f"expected {K} features as in queue"):
        ours.ressl_loss_func(x, x, queue.t())  # MoCo v2+'s layout
    with pytest.raises(ValueError, match=f"expected {K} features as in queue"):
        ours.find_nn(x, queue.t())
    for name in ("temperature_q", "temperature_k"):
        with pytest.raises(ValueError, match=f"^{name}: expected a positive number, got -1"):
            ours.ressl_loss_func(x, x, queue, **{name: -1.0})


def run_rank(rank, world, path):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    both = features(1, 2, world * N, DIM)
    mine = both[:, rank * N :][:, :N]
    for name, temperature in (("mocov3_loss_func", 0.2), ("nnclr_loss_func", 0.1)):
        loss, grads = loss_and_gradients(getattr(ours, name), list(mine))
        total = loss.clone()
        dist.all_reduce(total)
        # The mean over the ranks is the loss of the whole batch, and its gradient is theirs, as DDP averages it.
        want, want_grads = loss_and_gradients(getattr(Published, name), list(both.double()), temperature=temperature)
        torch.testing.assert_close(total / world, want, rtol=1e-5, atol=1e-6)
        for grad, reference in zip(grads, want_grads, strict=True):
            if grad is None:
                assert name == "mocov3_loss_func"  # no gradient of the gathered keys
            else:
                torch.testing.assert_close(grad / world, reference[rank * N :][:N], rtol=1e-4, atol=1e-6)
        assert (grads[1] is None) == (name == "mocov3_loss_func")
    leave_group()


def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(run_rank, (2, tmp_path / "rendezvous"), nprocs=2)
