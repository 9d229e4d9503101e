"""Ids, ages and the empty start of KeyQueue, MoCo's loss with them, and DDP."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from ranks import leave_group
from test_moco import Tiny
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import moco_ext.reference
from moco_ext import KeyQueue, MemoryBank, MoCo
from moco_ext.distributed import exclude_queues_from_ddp


@pytest.mark.parametrize("batches", [[3, 3, 3, 3], [2, 7, 1], [10, 25, 4]])
def test_ids_and_ages_follow_the_keys(device, batches):
    """With wrap-around, and batches larger than the queue. The reference is a list, written one key at a time."""
    queue = KeyQueue(4, 10, ids=True, empty=True).to(device)
    rows = [(-1, None)] * 10  # (id, number of its enqueue)
    slot = written = 0
    for number, size in enumerate(batches):
        ids = torch.arange(written, written + size, device=device)
        queue.enqueue(torch.randn(size, 4, device=device), ids)
        for i in ids.tolist():
            rows[slot] = (i, number)
            slot = (slot + 1) % 10
        written += size
        assert queue.queue_ids.tolist() == [i for i, _ in rows]
        assert queue.ages.tolist() == [-1 if n is None else number - n for _, n in rows]
        assert queue.queue_valid.item() == min(written, 10)
        assert queue.queue_ptr.item() == slot


def test_keys_of_unknown_ids(device):
    queue = KeyQueue(4, 10, ids=True).to(device)
    queue.enqueue(torch.randn(3, 4, device=device), torch.tensor([5, 6, 7], device=device))
    queue.enqueue(torch.randn(3, 4, device=device))
    assert queue.queue_ids.tolist() == [5, 6, 7] + [-1] * 7
    assert queue.ages.tolist() == [1, 1, 1, 0, 0, 0] + [-1] * 4


def test_a_plain_queue_has_only_the_official_state():
    assert set(KeyQueue(4, 10).state_dict()) == {"queue", "queue_ptr"}
    with pytest.raises(ValueError, match="ids: expected none for a queue made without ids"):
        KeyQueue(4, 10).enqueue(torch.randn(2, 4), torch.arange(2))
    with pytest.raises(ValueError, match="ages: expected a queue made with ids=True"):
        _ = KeyQueue(4, 10).ages
    with pytest.raises(ValueError, match=r"ids: expected int64 \[2\], one id per key, got torch.int64 \[3\]"):
        KeyQueue(4, 10, ids=True).enqueue(torch.randn(2, 4), torch.arange(3))


def test_state_survives_and_official_state_loads(device):
    queue, again = (KeyQueue(4, 10, ids=True, empty=True).to(device) for _ in range(2))
    queue.enqueue(torch.randn(7, 4, device=device), torch.arange(7, device=device))
    again.load_state_dict(queue.state_dict())
    for name, value in queue.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    again.load_state_dict(KeyQueue(4, 10).state_dict())  # full, with unknown ids
    assert again.queue_valid.item() == 10
    assert set(again.queue_ids.tolist()) == set(again.ages.tolist()) == {-1}


def views(device, n=4):
    return torch.randn(n, 3, 8, 8, device=device), torch.randn(n, 3, 8, 8, device=device)


@pytest.mark.parametrize("same_id", ["mask", "positive"])
@pytest.mark.parametrize("in_batch", [False, True])
def test_moco_passes_ids_to_the_loss(device, in_batch, same_id):
    torch.manual_seed(0)
    options = {"same_id": same_id, "in_batch": in_batch, "label_smoothing": 0.1, "empty": True}
    model = MoCo(lambda num_classes: Tiny(num_classes), dim=8, K=12, T=0.2, **options).to(device)
    for step in range(4):
        ids = torch.tensor([0, 1, 2, 2 + step], device=device)  # image 2 twice in the first batch; 0 and 1 in each
        im_q, im_k = views(device)
        out = model(im_q, im_k, ids=ids)
        with torch.no_grad():
            query = model.encoder_q(im_q)
        want = moco_ext.reference.info_nce(
            query.double(),
            out.keys.double(),
            model.queue.double(),
            0.2,
            query_ids=ids,
            queue_ids=model.queue_ids,
            same_id=same_id,
            in_batch=in_batch,
            label_smoothing=0.1,
            num_valid=min(4 * step, 12),
        )
        torch.testing.assert_close(out.loss.double(), want, rtol=1e-5, atol=1e-6)
        out.loss.backward()
        model.update(out.keys, ids)
    with pytest.raises(ValueError, match=f"ids: expected a tensor with same_id '{same_id}'"):
        model(*views(device))
    with pytest.raises(ValueError, match=f"ids: expected a tensor with same_id '{same_id}'"):
        model.update(out.keys)


@pytest.mark.parametrize(
    ("keys", "ids", "message"),
    [
        (torch.randn(4, 5), torch.arange(4), "keys: expected 8 features as in queue"),
        (torch.randn(4, 8), torch.arange(4, dtype=torch.int32), r"ids: expected int64 \[4\], one id per key"),
        (torch.randn(4, 8), torch.arange(4, device="meta"), "ids: expected on the device of queue"),
        (torch.randn(4, 8), None, "ids: expected a tensor with same_id 'mask'"),
    ],
)
def test_an_update_that_is_refused_changes_nothing(keys, ids, message):
    torch.manual_seed(0)
    model = MoCo(Tiny, dim=8, K=12, m=0.5, same_id="mask", empty=True)
    with torch.no_grad():
        model.encoder_q.fc.weight.add_(1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.update(keys, ids)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.updates == 0


def test_an_empty_queue_fills(device):
    """Without negatives the first loss is 0. The second step has the keys of the first batch."""
    torch.manual_seed(0)
    model = MoCo(lambda num_classes: Tiny(num_classes), dim=8, K=12, empty=True).to(device)
    out = model(*views(device))
    assert out.loss.item() == 0
    model.update(out.keys)
    out = model(*views(device))
    assert out.loss.item() > 0
    assert out.stats.rank.max() <= 4


class Trainer(nn.Module):
    """A queue, a MoCo and a memory bank, at different depths, and buffers that DDP does broadcast."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.nested = nn.ModuleDict({"queue": KeyQueue(4, 1000, ids=True, empty=True)})
        self.inner = nn.Sequential(nn.Sequential(MoCo(lambda num_classes: nn.Linear(4, num_classes), 4, 1000)))
        self.bank = MemoryBank(lambda num_classes: nn.Linear(4, num_classes), images=1000, dim=4, K=4)

    def forward(self, x):
        return self.encoder(x).sum() + self.inner[0][0].encoder_q(x).sum() + self.bank.encoder_q(x).sum()


def broadcast_by_ddp(rank, world, path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    sent = []
    broadcast = dist._broadcast_coalesced

    def counting(group, tensors, *args):
        sent.append(sum(x.nbytes for x in tensors))
        return broadcast(group, tensors, *args)

    dist._broadcast_coalesced = counting

    def forward(prepare):
        trainer = Trainer()
        model = DistributedDataParallel(prepare(trainer))
        queues = (trainer.nested["queue"].queue, trainer.inner[0][0].queue, trainer.bank.bank)
        for queue in queues:
            queue.fill_(rank)  # in training they are equal; here, to see whether they are broadcast
        sent.clear()
        for _ in range(2):
            model(torch.randn(3, 4)).backward()
        return sent[-1], [queue.unique().tolist() for queue in queues]

    small = 4 * 4 + 4 * 4 + 8  # BatchNorm's buffers
    assert forward(exclude_queues_from_ddp) == (small, [[rank]] * 3)
    assert forward(lambda trainer: trainer)[0] > 3 * 16_000
    leave_group()


@pytest.mark.slow
def test_ddp_does_not_broadcast_excluded_queues(tmp_path):
    torch.multiprocessing.spawn(broadcast_by_ddp, (2, tmp_path / "rendezvous"), nprocs=2)


def test_excluding_queues_keeps_earlier_exclusions():
    trainer = Trainer()
    trainer._ddp_params_and_buffers_to_ignore = ["encoder.0.bias"]
    assert exclude_queues_from_ddp(trainer) is trainer
    names = set(trainer._ddp_params_and_buffers_to_ignore)
    assert {"encoder.0.bias", "nested.queue.queue_ids", "inner.0.0.queue", "bank.bank"} <= names
    assert all("queue" in name or "bank" in name for name in names - {"encoder.0.bias"})
    assert "queue" in exclude_queues_from_ddp(KeyQueue(4, 10))._ddp_params_and_buffers_to_ignore
