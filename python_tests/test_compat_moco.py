"""compat.moco compared with the official formulation, in an unchanged trainer."""

import copy
import os

import official
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import leave_group
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moco_ext.compat import moco
from moco_ext.compat.moco.logits import LazyLogits, Scores

DIM, K, N = 8, 70, 6  # K is not a multiple of the batch, nor of the groups and tiles of topk


class Encoder(nn.Module):
    """Smooth, so that rounding does not grow from step to step as it does over the kinks of a ReLU."""

    def __init__(self, num_classes=DIM):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), nn.AdaptiveAvgPool2d(2))
        self.fc = nn.Linear(24, num_classes)

    def forward(self, x):
        return self.fc(self.body(x).flatten(1))


def pair(k=K, **options):
    torch.manual_seed(0)
    theirs = official.MoCo(Encoder, DIM, k, **options)
    ours = moco.builder.MoCo(Encoder, DIM, k, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def images(seed=1, n=N):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.randn(n, 3, 8, 8, generator=generator)


def accuracy(output, target, topk=(1, 5)):
    """As the official trainer computes it."""
    with torch.no_grad():
        maxk = max(topk)
        _, pred = output.topk(maxk, 1, True, True)
        correct = pred.t().eq(target.view(1, -1).expand_as(pred.t()))
        return [correct[:k].reshape(-1).float().sum(0, keepdim=True) * (100.0 / target.size(0)) for k in topk]


def train(model, steps, k=K):
    """The official trainer's loop. The batch size divides K, as the official queue requires."""
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    seen = []
    for step in range(steps):
        output, target = model(*images(step, 7))
        loss = criterion(output, target)
        acc1, acc5 = accuracy(output, target)
        seen.append((loss.item(), acc1.item(), acc5.item()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.tensor(seen)


def test_fifty_steps_of_the_official_trainer():
    ours, theirs = pair()
    mine, published = train(ours, 50), train(theirs, 50)
    torch.testing.assert_close(mine[:, 0], published[:, 0], rtol=0, atol=1e-5)  # float32 rounding over 50 steps
    assert torch.equal(mine[:, 1:], published[:, 1:])
    assert mine[:, 1].max() > mine[:, 1].min()  # not always 0 or 100 %
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=1e-5, msg=name)


def test_the_state_dict_loads_both_ways():
    ours, theirs = pair()
    train(ours, 2)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.queue, ours.queue.t())
    assert int(theirs.queue_ptr) == 14


def test_metadata_needs_no_logits(monkeypatch):
    ours, _ = pair()
    output, _ = ours(*images())
    monkeypatch.setattr(Scores, "compute", lambda self: pytest.fail("the logits were computed"))
    assert isinstance(output, LazyLogits)
    assert output.shape == (N, 1 + K)
    assert output.size(0) == len(output) == N
    assert (output.device.type, output.dtype, output.requires_grad) == ("cpu", torch.float32, True)
    assert not output.detach().requires_grad
    assert output.detach().shape == output.shape
    assert "LazyLogits" in repr(output)


def test_loss_and_topk_need_no_logits(monkeypatch):
    ours, theirs = pair()
    output, target = ours(*images())
    published, _ = theirs_without_enqueue(theirs)
    monkeypatch.setattr(Scores, "compute", lambda self: pytest.fail("the logits were computed"))
    for reduction in ("mean", "sum", "none"):
        loss = F.cross_entropy(output, target, reduction=reduction)
        torch.testing.assert_close(loss, F.cross_entropy(published, target, reduction=reduction), rtol=0, atol=1e-5)
    torch.testing.assert_close(nn.CrossEntropyLoss()(output.detach(), target), F.cross_entropy(published, target))
    assert torch.equal(torch.topk(output, 5).indices, published.topk(5).indices)


def theirs_without_enqueue(model):
    """The official logits for any batch size: the official enqueue requires a divisor of K."""
    model.enqueue = lambda k: None
    return model(*images())


TILINGS = [(70, 8192), (70, 32), (131, 48), (16, 8192), (3, 2)]


@pytest.mark.parametrize(("size", "tile", "k"), [(*t, k) for t in TILINGS for k in (1, 5, 17, 64) if k <= t[0]])
def test_topk(monkeypatch, size, tile, k):
    monkeypatch.setattr("moco_ext.compat.moco.logits.TILE", tile)
    ours, theirs = pair(size)
    values, columns = ours(*images())[0].topk(k, 1, True, True)
    published = theirs_without_enqueue(theirs)[0].topk(k, 1, True, True)
    torch.testing.assert_close(values, published.values, rtol=0, atol=2e-5)  # logits up to 14
    assert torch.equal(columns, published.indices)


def test_gradient_through_topk():
    ours, theirs = pair()
    ours(*images())[0].topk(5).values.sum().backward()
    theirs_without_enqueue(theirs)[0].topk(5).values.sum().backward()
    compare_gradients(ours, theirs)


def compare_gradients(ours, theirs):
    for mine, published in zip(ours.encoder_q.parameters(), theirs.encoder_q.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, published.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "use",
    [
        lambda output, target: output.softmax(1)[:, :3].sum(),
        lambda output, target: (output * 2.0)[:, 0].mean(),
        lambda output, target: (torch.exp(output / 10) - 1).mean(),
        lambda output, target: F.cross_entropy(output, target + 1),
        lambda output, target: F.cross_entropy(output, target, label_smoothing=0.1),
        lambda output, target: F.cross_entropy(output, target, weight=torch.linspace(1, 2, 1 + K)),
        lambda output, target: F.cross_entropy(output.float(), target),
        lambda output, target: output.logsumexp(1).sum() - output.amax(1).sum(),
        lambda output, target: output.topk(2, largest=False).values.sum(),
    ],
)
@pytest.mark.parametrize("start", [0, K - 2])  # the second: forward's own enqueue wraps
def test_other_uses_have_the_official_values_and_gradients(use, start):
    ours, theirs = pair()
    ours.queue_ptr.fill_(start)
    output, target = ours(*images())
    published, _ = theirs_without_enqueue(theirs)
    assert not torch.equal(ours.queue.t(), theirs.queue)  # which has changed since
    torch.testing.assert_close(output.detach().clone(), published.detach(), rtol=0, atol=2e-5)
    mine, expected = use(output, target), use(published, target)
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    mine.backward()
    expected.backward()
    compare_gradients(ours, theirs)


def test_edited_labels():
    ours, theirs = pair()
    output, target = ours(*images())
    target.fill_(2)
    torch.testing.assert_close(
        F.cross_entropy(output, target), F.cross_entropy(theirs_without_enqueue(theirs)[0], target)
    )


def test_a_batch_larger_than_the_queue():
    ours, theirs = pair(4)
    output, target = ours(*images())
    published, _ = theirs_without_enqueue(theirs)
    torch.testing.assert_close(output + 0, published, rtol=0, atol=2e-5)
    assert torch.equal(output.topk(3).indices, published.topk(3).indices)
    torch.testing.assert_close(F.cross_entropy(output, target), F.cross_entropy(published, target))


@pytest.mark.parametrize("use", [lambda output: output + 1, lambda output: output.topk(5)])
def test_after_another_step_the_logits_are_refused(use):
    ours, _ = pair()
    output, target = ours(*images())
    loss = F.cross_entropy(output, target)
    ours(*images(2))
    with pytest.raises(RuntimeError, match="before the next forward pass"):
        use(output)
    torch.testing.assert_close(F.cross_entropy(output, target), loss)  # computed in forward


def test_one_loss_for_two_uses_of_the_logits():
    ours, theirs = pair()
    for output, target in (ours(*images()), theirs_without_enqueue(theirs)):
        (F.cross_entropy(output, target) + 0.1 * output.square().mean()).backward()
    compare_gradients(ours, theirs)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_autocast_and_a_scaled_loss(scale):
    ours, theirs = pair()
    losses = []
    for model, forward in ((ours, ours), (theirs, lambda *_: theirs_without_enqueue(theirs))):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.03)
        with torch.autocast("cpu", torch.bfloat16):
            output, target = forward(*images())
            assert output.dtype == torch.bfloat16
            loss = F.cross_entropy(output, target)
        assert loss.dtype == torch.float32
        losses.append(loss.item())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert losses[0] == pytest.approx(losses[1], abs=0.05)  # the official logits are rounded to 8 bits: up to 0.03
    for mine, published in zip(ours.encoder_q.parameters(), theirs.encoder_q.parameters(), strict=True):
        torch.testing.assert_close(mine, published, rtol=0, atol=5e-3)


def test_a_copy_is_independent():
    ours, _ = pair()
    other = copy.deepcopy(ours)
    first = ours(*images())[0] + 0
    torch.testing.assert_close(other(*images())[0] + 0, first)


def test_the_official_methods():
    ours, _ = pair()
    x = torch.arange(12.0).view(6, 2)
    shuffled, order = ours._batch_shuffle_ddp(x)
    assert torch.equal(shuffled.sort(0).values, x)
    assert torch.equal(ours._batch_unshuffle_ddp(shuffled, order), x)
    assert torch.equal(moco.builder.concat_all_gather(x), x)
    keys = F.normalize(torch.randn(3, DIM), dim=1)
    ours._dequeue_and_enqueue(keys)
    assert torch.equal(ours.queue[:3], keys)
    assert int(ours.queue_ptr) == 3
    with torch.no_grad():
        ours.encoder_q.fc.bias.add_(1)
    before = ours.encoder_k.fc.bias.clone()
    ours._momentum_update_key_encoder()
    torch.testing.assert_close(ours.encoder_k.fc.bias, before + 0.001)


def test_the_loader():
    from PIL import Image

    image = Image.effect_noise((16, 16), 50).convert("RGB")
    blur = moco.loader.GaussianBlur([0.1, 2.0])
    query, key = moco.loader.TwoCropsTransform(blur)(image)
    assert query.size == key.size == (16, 16)
    assert query.tobytes() != key.tobytes()
    with pytest.raises(ValueError, match="sigma"):
        moco.loader.GaussianBlur([2.0, 0.1])


def run_rank(rank, world, path, unused):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    ours, theirs = pair()
    for model in (ours, theirs):
        for batch_norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            batch_norm.eval()  # the two models shuffle differently, so batch statistics would differ
    ddp = [DistributedDataParallel(m, find_unused_parameters=unused) for m in (ours, theirs)]
    optimizers = [torch.optim.SGD(m.encoder_q.parameters(), 0.03, momentum=0.9) for m in (ours, theirs)]
    for step in range(10):
        losses = []
        for model, optimizer in zip(ddp, optimizers, strict=True):
            output, target = model(*images(10 * step + rank, 5))
            assert isinstance(output, LazyLogits) == (model is ddp[0] and not unused)  # otherwise DDP copies it
            loss = nn.CrossEntropyLoss()(output, target)
            losses.append((loss.item(), *(a.item() for a in accuracy(output, target))))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.queue.t(), theirs.queue, rtol=0, atol=1e-5)
    for model in ddp:  # edited logits
        output, target = model(*images(rank, 5))
        output[:, 3:9] = -1e4
        model.zero_grad()
        F.cross_entropy(output, target).backward()
    compare_gradients(ours, theirs)
    x = torch.arange(8.0).view(4, 2) + 8 * rank
    shuffled, undo = ours._batch_shuffle_ddp(x)
    assert torch.equal(ours._batch_unshuffle_ddp(shuffled, undo), x)
    leave_group()


@pytest.mark.parametrize("unused", [False, True])
def test_two_processes_under_ddp(tmp_path, unused):
    torch.multiprocessing.spawn(run_rank, (2, tmp_path / "rendezvous", unused), nprocs=2)
