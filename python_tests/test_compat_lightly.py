"""compat.lightly compared with Lightly, if it is installed, and with its formulas."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import leave_group
from torch import nn

from moco_ext.compat import lightly as ours

DIM, K, N = 8, 40, 6


def encoder():
    """Smooth, so that rounding does not grow from step to step."""
    return nn.Sequential(nn.Linear(10, 16), nn.SiLU(), nn.Linear(16, DIM))


def features(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def formulation(out0, out1, bank, temperature):
    """The loss from its logits, in float64."""
    out0, out1 = (F.normalize(x.double(), dim=1) for x in (out0, out1))
    if bank is not None:
        logits = torch.cat([(out0 * out1).sum(1, keepdim=True), out0 @ bank.double().t()], 1)
        return F.cross_entropy(logits / temperature, torch.zeros(len(out0), dtype=torch.long))
    n = len(out0)
    both = torch.cat([out0, out1])
    logits = (both @ both.t() / temperature).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(2 * n).roll(n))


def train(package, steps=50, bank=(K, DIM), batch=N):
    """Lightly's MoCo example, on a small network: momentum update, query, key, loss, backward, SGD."""
    torch.manual_seed(0)
    model = encoder()
    momentum = copy.deepcopy(model)
    package["deactivate_requires_grad"](momentum)
    criterion = package["NTXentLoss"](0.1, bank)
    if bank:
        criterion.memory_bank.bank = F.normalize(features(5, *bank), dim=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.06, momentum=0.9)
    losses = []
    for step in range(steps):
        images = features(step, 2 * batch, 10)
        package["update_momentum"](model, momentum, m=0.99)
        query = model(images[:batch])
        key = momentum(images[batch:]).detach() if bank else model(images[batch:])
        loss = criterion(query, key)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.tensor(losses), criterion


def lightly():
    loss = pytest.importorskip("lightly.loss")
    utils = pytest.importorskip("lightly.models.utils")
    names = {"update_momentum", "deactivate_requires_grad", "batch_shuffle", "batch_unshuffle"}
    return {"NTXentLoss": loss.NTXentLoss, **{name: getattr(utils, name) for name in names}}


@pytest.mark.parametrize("bank", [(K, DIM), 0], ids=["memory bank", "in batch"])
@pytest.mark.parametrize("batch", [N, 5])  # 5 divides K; with 6, a batch is cut off at the end of the bank
def test_fifty_steps_match_lightly(bank, batch):
    mine, criterion = train(vars(ours), bank=bank, batch=batch)
    theirs, peer = train(lightly(), bank=bank, batch=batch)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5)  # float32 rounding over 50 steps
    assert mine[-1] != mine[0]
    if bank:
        torch.testing.assert_close(criterion.memory_bank.bank, peer.memory_bank.bank, rtol=0, atol=1e-5)
        assert torch.equal(criterion.memory_bank.bank_ptr, peer.memory_bank.bank_ptr)


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("size", [(K, DIM), 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients(n, size, dtype):
    criterion = ours.NTXentLoss(0.2, size)
    bank = criterion.memory_bank.bank.clone() if size else None
    views = [features(seed, n, DIM, dtype=dtype).mul(3).requires_grad_() for seed in (1, 2)]
    wide = [view.detach().double().requires_grad_() for view in views]
    loss, want = criterion(*views), formulation(*wide, bank, 0.2)
    loss.backward()
    want.backward()
    rtol = 1e-5 if dtype == torch.float32 else 1e-2  # the gradient is rounded to bfloat16
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    for view, reference in zip(views, wide, strict=True):
        torch.testing.assert_close(view.grad.double(), reference.grad, rtol=rtol, atol=1e-5)


def test_the_bank_is_updated_in_training_steps_only():
    criterion = ours.NTXentLoss(memory_bank_size=(K, DIM))
    before = criterion.memory_bank.bank.clone()
    criterion(features(1, N, DIM), features(2, N, DIM))
    assert torch.equal(criterion.memory_bank.bank, before)
    criterion(features(1, N, DIM).requires_grad_(), features(2, N, DIM))
    torch.testing.assert_close(criterion.memory_bank.bank[:N], F.normalize(features(2, N, DIM), dim=1))
    assert torch.equal(criterion.memory_bank.bank[N:], before[N:])
    assert not criterion.state_dict()


@pytest.mark.parametrize("first", [False, True])
def test_memory_bank(first):
    bank = ours.MemoryBankModule((5, 2), feature_dim_first=first)
    x0, x1, x2 = (features(seed, 3, 2) for seed in range(3))
    out, copy0 = bank(x0, update=True)
    assert out is x0
    assert copy0.shape == ((2, 5) if first else (5, 2))
    rows = [x.t() if first else x for x in (copy0, bank(x1, update=True)[1], bank(x2, update=True)[1])]
    assert not torch.equal(rows[0][:3], x0)  # returned before the update
    assert torch.equal(rows[1][:3], x0)
    assert torch.equal(rows[2], torch.cat([x0, x1[:2]]))  # cut off at the end
    assert torch.equal(bank.bank, torch.cat([x2, x1[:2]]))  # and started again
    assert int(bank.bank_ptr) == 3
    bank(features(9, 12, 2), update=True)
    assert torch.equal(bank.bank[3:], features(9, 12, 2)[:2])
    assert int(bank.bank_ptr) == 0
    bank(features(9, 0, 2), update=True)
    assert torch.equal(bank(x0)[1].t() if first else bank(x0)[1], bank.bank)


def test_memory_bank_without_size_or_dimension():
    x = features(0, 3, 2)
    assert ours.MemoryBankModule(0)(x, update=True) == (x, None)
    bank = ours.MemoryBankModule(7)
    assert bank(x, update=True)[1].shape == (2, 7)
    assert torch.equal(bank.bank[:3], x)


@pytest.mark.parametrize("size", [-1, (10, -1), (1, 2, 3), ()])
def test_invalid_sizes(size):
    with pytest.raises(ValueError, match="size: expected"):
        ours.MemoryBankModule(size)
    with pytest.raises(ValueError, match="size: expected"):
        ours.NTXentLoss(memory_bank_size=size)


@pytest.mark.parametrize("size", [(K, DIM), 0])
def test_a_negative_temperature_inverts_similarities(size):
    views = [features(seed, 7, DIM) for seed in (1, 2)]
    criterion = ours.NTXentLoss(-0.2, size)
    want = formulation(*views, criterion.memory_bank.bank if size else None, -0.2)
    torch.testing.assert_close(criterion(*views).double(), want, rtol=1e-5, atol=1e-6)


def test_a_bank_made_in_inference_mode_can_be_trained_with():
    """Lightning validates before the first training step."""
    criterion, memory = ours.NTXentLoss(memory_bank_size=K), ours.NNMemoryBankModule(K)
    with torch.inference_mode():
        criterion(*features(1, 2, N, DIM))
        memory(features(1, N, DIM))
    criterion(features(1, N, DIM).requires_grad_(), features(2, N, DIM))
    memory(features(3, N, DIM), update=True)
    torch.testing.assert_close(criterion.memory_bank.bank[:N], F.normalize(features(2, N, DIM), dim=1))
    assert torch.equal(memory.bank[:N], features(3, N, DIM))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_nearest_neighbors(dtype, n):
    memory = ours.NNMemoryBankModule((K, DIM))
    memory.bank = 3 * features(5, K, DIM)  # of any norm, as NNCLR stores them
    before, x = memory.bank.clone(), features(1, n, DIM).to(dtype).requires_grad_()
    similarities = F.normalize(x.double(), dim=1) @ F.normalize(before.double(), dim=1).t()
    got = memory(x)
    assert torch.equal(got, before[similarities.argmax(1)])
    assert not got.requires_grad
    assert torch.equal(memory.bank, before)
    assert torch.equal(memory(x, update=True), got)  # of the bank as it was
    assert torch.equal(memory.bank[:n], x.float())
    if n:
        torch.testing.assert_close(memory(x), x.float(), rtol=0, atol=0)  # each is its own neighbor


def test_nearest_neighbors_match_lightly():
    """NNCLR's step: neighbors, the loss against the other view's predictions, backward."""
    theirs = pytest.importorskip("lightly.models.modules").NNMemoryBankModule((K, DIM))
    mine = ours.NNMemoryBankModule((K, DIM))
    mine.bank = theirs.bank.clone()
    criteria = ours.NTXentLoss(0.2), pytest.importorskip("lightly.loss").NTXentLoss(0.2)
    for step in range(12):  # past the end of the bank
        z0, z1, p0, p1 = features(step, 4, N, DIM)
        results = []
        for memory, criterion in zip((mine, theirs), criteria, strict=True):
            predictions = [p.clone().requires_grad_() for p in (p0, p1)]
            n0, n1 = memory(z0, update=False), memory(z1, update=True)
            loss = 0.5 * (criterion(n0, predictions[1]) + criterion(n1, predictions[0]))
            loss.backward()
            results.append((n0, n1, loss.detach(), *(p.grad for p in predictions)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert torch.equal(mine.bank, theirs.bank)
        assert torch.equal(mine.bank_ptr, theirs.bank_ptr)


def test_a_bank_of_neighbors_needs_a_size():
    for size in (0, (0, DIM)):
        with pytest.raises(ValueError, match="size: expected at least one feature"):
            ours.NNMemoryBankModule(size)
    assert ours.NNMemoryBankModule(7)(features(0, 3, DIM)).shape == (3, DIM)


def test_utils():
    from moco_ext.compat.lightly import utils

    model = encoder()
    utils.deactivate_requires_grad(model)
    assert not any(p.requires_grad for p in model.parameters())
    utils.activate_requires_grad(model)
    assert all(p.requires_grad for p in model.parameters())
    x = features(0, 3, 2).requires_grad_()
    assert torch.equal(utils.concat_all_gather(x), x)
    assert not utils.concat_all_gather(x).requires_grad
    for name, function in vars(utils).items():
        assert function is getattr(ours, name)
    peer = pytest.importorskip("lightly.models.utils")
    assert all(callable(getattr(peer, name)) for name in vars(utils))


def test_gathering_without_distributed_support(monkeypatch):
    monkeypatch.setattr(dist, "is_available", lambda: False)
    with pytest.raises(ValueError, match="gather_distributed: expected False"):
        ours.NTXentLoss(gather_distributed=True)


@pytest.mark.parametrize("temperature", [0.0, 1e-9, -1e-9, float("nan")])
def test_invalid_temperature(temperature):
    with pytest.raises(ValueError, match="temperature: expected"):
        ours.NTXentLoss(temperature)


def test_update_momentum():
    model, ema = encoder(), encoder()
    ours.deactivate_requires_grad(ema)
    assert not any(p.requires_grad for p in ema.parameters())
    want = [0.9 * e + 0.1 * p for e, p in zip(ema.parameters(), model.parameters(), strict=True)]
    ours.update_momentum(model, ema, 0.9)
    for parameter, value in zip(ema.parameters(), want, strict=True):
        torch.testing.assert_close(parameter, value)
    with pytest.raises(ValueError, match="expected the same parameters"):
        ours.update_momentum(model, nn.Linear(2, 2), 0.9)


def test_batch_shuffle():
    x = torch.arange(20.0).view(10, 2)
    torch.manual_seed(0)
    shuffled, shuffle = ours.batch_shuffle(x)
    assert torch.equal(shuffled, x[shuffle])
    assert not torch.equal(shuffled, x)
    assert torch.equal(ours.batch_unshuffle(shuffled, shuffle), x)


def run_rank(rank, world, path):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)

    images = torch.arange(5 * 3.0).view(5, 3) + 100 * rank
    orders = []
    for _ in range(2):
        shuffled, undo = ours.batch_shuffle(images, distributed=True)
        assert undo.shape == (world * 5,)
        assert torch.equal(ours.batch_unshuffle(shuffled * 2, undo, distributed=True), images * 2)
        orders.append(undo)
    assert not torch.equal(*orders)

    views = [features(10 * rank + i, 4, DIM) for i in range(2)]
    gathered = ours.concat_all_gather(views[0].clone().requires_grad_())
    assert torch.equal(gathered, torch.cat([features(10 * r, 4, DIM) for r in range(world)]))
    assert not gathered.requires_grad
    bank = ours.NTXentLoss(0.1, (K, DIM), gather_distributed=True)
    bank(views[0].clone().requires_grad_(), views[1])
    everything = torch.cat([features(10 * r + 1, 4, DIM) for r in range(world)])
    torch.testing.assert_close(bank.memory_bank.bank[: 4 * world], F.normalize(everything, dim=1))

    # Negatives of all ranks: the mean over the ranks is the loss, and the gradient (as DDP averages it) is that, of the
    # whole batch in one process.
    mine = [view.clone().requires_grad_() for view in views]
    loss = ours.NTXentLoss(0.1, gather_distributed=True)(*mine)
    loss.backward()
    whole = [torch.cat([features(10 * r + i, 4, DIM) for r in range(world)]).requires_grad_() for i in range(2)]
    want = formulation(*whole, None, 0.1)
    want.backward()
    dist.all_reduce(loss.detach())
    assert loss.item() / world == pytest.approx(want.item(), rel=1e-5)
    for view, reference in zip(mine, whole, strict=True):
        torch.testing.assert_close(view.grad / world, reference.grad[4 * rank :][:4], rtol=1e-4, atol=1e-6)
    leave_group()


def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(run_rank, (2, tmp_path / "rendezvous"), nprocs=2)
