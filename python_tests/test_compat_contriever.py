"""compat.contriever compared with the published step of Contriever's MoCo; in one process and in two."""

import copy
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import leave_group
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moco_ext.compat.contriever import MoCo

DIM, K, N, WORDS = 8, 24, 6, 50


class Retriever(nn.Module):
    """The mean of a layer over the words, called as Contriever's encoders are."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, 16)
        self.layer = nn.Linear(16, DIM)

    def forward(self, input_ids, attention_mask, normalize=False):
        hidden = self.layer(torch.tanh(self.words(input_ids))) * attention_mask[..., None]
        mean = hidden.sum(1) / attention_mask.sum(1)[:, None]
        return F.normalize(mean, dim=-1) if normalize else mean


def options(**changes):
    defaults = {
        "queue_size": K, "projection_size": DIM, "momentum": 0.9, "temperature": 1.0, "label_smoothing": 0.0,
        "norm_query": False, "norm_doc": False, "moco_train_mode_encoder_k": False,
        "retriever_model_id": "bert-base-uncased", "pooling": "average", "random_init": False,
    }  # fmt: skip
    return SimpleNamespace(**defaults | changes)


def make(opt=None):
    torch.manual_seed(0)
    return MoCo(opt or options(), Retriever(), "tokenizer")


def batch(step, n=N):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(WORDS, (2, n, 7), generator=generator)
    mask = (torch.arange(7) < torch.randint(3, 8, (2, n, 1), generator=generator)).long()
    return {"q_tokens": tokens[0], "q_mask": mask[0], "k_tokens": tokens[1], "k_mask": mask[1]}


class Published(nn.Module):
    """Contriever's step, with its logits [N, 1 + K] and a queue [DIM, K]."""

    def __init__(self, opt, retriever):
        super().__init__()
        self.opt, self.encoder_q = opt, retriever
        self.encoder_k = copy.deepcopy(retriever).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(opt.projection_size, opt.queue_size), dim=0))
        self.ptr = 0

    def forward(self, q_tokens, q_mask, k_tokens, k_mask):
        opt, n = self.opt, len(q_tokens)
        q = self.encoder_q(q_tokens, q_mask, normalize=opt.norm_query)
        with torch.no_grad():
            for slow, fast in zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True):
                slow.data = opt.momentum * slow.data + (1 - opt.momentum) * fast.data
            k = self.encoder_k(k_tokens, k_mask, normalize=opt.norm_doc)
        negatives = q @ self.queue.clone()
        logits = torch.cat([(q * k).sum(1, keepdim=True), negatives], 1) / opt.temperature
        labels = torch.zeros(n, dtype=torch.long, device=q.device)
        loss = F.cross_entropy(logits, labels, label_smoothing=opt.label_smoothing)
        end = self.ptr + n
        slots = slice(self.ptr, end) if end <= opt.queue_size else torch.arange(self.ptr, end) % opt.queue_size
        self.queue[:, slots] = k.t()
        self.ptr = end % opt.queue_size
        accuracy = 100 * (logits.argmax(1) == 0).float().mean()
        stats = {"loss": loss.item(), "accuracy": accuracy}
        return loss, stats | {"stdq": q.std(0).mean().item(), "stdk": k.std(0).mean().item()}


def in_float64(model, opt):
    """The published step from the model's state."""
    published = Published(opt, copy.deepcopy(model.encoder_q))
    published.encoder_k.load_state_dict(model.encoder_k.state_dict())
    published.queue = model.queue.contiguous()
    return published.double()


@pytest.mark.parametrize("n", [N, 5])  # 5 does not divide the queue's size: the write wraps around
@pytest.mark.parametrize(
    "changes", [{}, {"norm_query": True, "norm_doc": True, "temperature": 0.05, "label_smoothing": 0.1}]
)
def test_thirty_steps_match_float64(n, changes):
    opt = options(**changes)
    model = make(opt)
    published = in_float64(model, opt)
    optimizers = [torch.optim.SGD(encoder.parameters(), 0.1) for encoder in (model.encoder_q, published.encoder_q)]
    losses = []
    for step in range(30):
        loss, stats = model(**batch(step, n), stats_prefix="train", words=None)
        want, want_stats = published(**batch(step, n))
        for optimizer, value in zip(optimizers, (loss, want), strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        assert list(stats) == [f"train/{name}" for name in want_stats]
        for name, value in want_stats.items():
            got, weight = stats[f"train/{name}"]
            assert float(got) == pytest.approx(float(value), rel=1e-4, abs=1e-5)
            assert weight == n
        losses.append(loss.item())
    torch.testing.assert_close(model.queue.double(), published.queue, rtol=1e-4, atol=1e-5)
    assert int(model.queue_ptr) == published.ptr
    for encoder, reference in ((model.encoder_q, published.encoder_q), (model.encoder_k, published.encoder_k)):
        for a, b in zip(encoder.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    assert losses[0] != losses[-1]


def test_statistics():
    model, mine = make(), {"other": (1.0, 1)}
    _, stats = model(**batch(0), iter_stats=mine)
    assert stats is mine
    assert list(stats) == ["other", "loss", "accuracy", "stdq", "stdk"]
    _, again = model(**batch(1))
    assert "other" not in again
    assert all(isinstance(again[name][0], float) for name in ("loss", "stdq", "stdk"))


def test_attributes():
    retriever = Retriever()
    model = MoCo(options(), retriever, "tokenizer")
    assert model.tokenizer == "tokenizer"
    assert model.get_encoder() is retriever
    assert model.get_encoder(return_encoder_k=True) is model.encoder_k
    assert not any(p.requires_grad for p in model.encoder_k.parameters())
    assert all(p.requires_grad for p in model.encoder_q.parameters())
    assert (model.queue_size, model.momentum, model.temperature, model.label_smoothing) == (K, 0.9, 1.0, 0.0)
    torch.testing.assert_close(model.queue.norm(dim=0), torch.ones(K))
    assert torch.equal(model.queue, MoCo(options(), Retriever()).queue)  # the same on all ranks, whatever their seeds


@pytest.mark.parametrize("assign", [False, True])
def test_published_checkpoints_load(assign):
    """Contriever's state dict has the queue as contiguous [DIM, K]."""
    checkpoint = {name: torch.randn_like(value.float()).to(value.dtype) for name, value in make().state_dict().items()}
    checkpoint["queue"] = torch.randn(DIM, K)
    checkpoint["queue_ptr"] = torch.tensor([7])
    model = make()
    model.load_state_dict({name: value.clone() for name, value in checkpoint.items()}, strict=True, assign=assign)
    for name, value in model.state_dict().items():
        assert torch.equal(value, checkpoint[name])
    published = in_float64(model, options())
    published.ptr = 7
    assert model(**batch(0))[0].item() == pytest.approx(published(**batch(0))[0].item(), rel=1e-5)
    torch.testing.assert_close(model.queue.double(), published.queue, rtol=1e-5, atol=1e-6)
    assert model.queue.t().is_contiguous()
    assert copy.deepcopy(model).queue.t().is_contiguous()


def test_loads_contrievers_own_retriever(monkeypatch):
    class Original:
        def _load_retriever(self, model_id, pooling, random_init):
            return Retriever(), (model_id, pooling, random_init)

    monkeypatch.setitem(sys.modules, "src", ModuleType("src"))
    monkeypatch.setitem(sys.modules, "src.moco", SimpleNamespace(MoCo=Original))
    model = MoCo(options())
    assert isinstance(model.encoder_q, Retriever)
    assert model.tokenizer == ("bert-base-uncased", "average", False)
    for missing in (None, SimpleNamespace()):
        monkeypatch.setitem(sys.modules, "src.moco", missing)
        with pytest.raises(ImportError, match=r"^retriever: expected an encoder, or Contriever's src.moco"):
            MoCo(options())


def test_errors_name_the_argument():
    with pytest.raises(TypeError, match=r"^_compute_logits: expected no override.*Sub"):
        type("Sub", (MoCo,), {"_compute_logits": lambda self, q, k: None})
    type("Sub", (MoCo,), {"get_encoder": lambda self: None})
    for changes, message in (
        ({"temperature": 0.0}, "^temperature: expected"),
        ({"label_smoothing": 1.0}, "^label_smoothing: expected"),
        ({"momentum": 1.5}, r"^m: expected a momentum in \[0, 1\], got 1.5"),
        ({"projection_size": DIM + 1}, f"features as in queue, got shape .*{DIM}"),
    ):
        with pytest.raises(ValueError, match=message):
            make(options(**changes))(**batch(0))


def run_rank(rank, world, path):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    opt = options(temperature=0.5)
    model = make(opt)
    published = in_float64(model, opt)
    wrapped = DistributedDataParallel(model)
    optimizers = [torch.optim.SGD(encoder.parameters(), 0.1) for encoder in (model.encoder_q, published.encoder_q)]
    for step in range(3):  # the same as one process with the batches of all ranks: no query sees the keys of its batch
        parts = [batch(10 * step + r, 4) for r in range(world)]
        loss, _ = wrapped(**parts[rank])
        want, _ = published(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        for optimizer, value in zip(optimizers, (loss, want), strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        mean = loss.detach().double()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / world, want.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.queue.double(), published.queue, rtol=1e-5, atol=1e-6)
        for a, b in zip(model.encoder_q.parameters(), published.encoder_q.parameters(), strict=True):
            torch.testing.assert_close(a.detach().double(), b.detach(), rtol=1e-4, atol=1e-6)
    assert int(model.queue_ptr) == published.ptr == 0
    leave_group()


def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(run_rank, (2, tmp_path / "rendezvous"), nprocs=2)
