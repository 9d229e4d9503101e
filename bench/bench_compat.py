"""A training step of existing trainers, before and after the changes that docs/peers/ describes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import official
import pytest
import test_compat_contriever
import test_compat_moco_v3
import torch
import torch.nn.functional as F
from conftest import Row
from test_compat_solo_learn import Published
from torch import Tensor, nn

from moco_ext.compat import contriever, lightly, moco, moco_v3, pytorch_metric_learning, solo_learn
from moco_ext.encoders import resolve

DIM, K = 128, 65536


class Flat(nn.Module):
    """A linear encoder: next to nothing, so that a step is what the packages themselves do."""

    def __init__(self, num_classes: int = DIM) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 8 * 8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


# name -> base encoder, images of a batch, their side
SIZES = {
    "ResNet-18, 32 images of 32²": (resolve("resnet18-small"), 32, 32),
    "a linear encoder, 256 images": (Flat, 256, 8),
}
Step = Callable[[], Tensor]


def moco_step(package, base, im_q, im_k, accuracy: bool = True) -> Step:
    """main_moco.py's: forward, criterion, accuracy, backward, SGD."""
    torch.manual_seed(0)
    start = official.MoCo(base, DIM, K).state_dict()
    model = package.builder.MoCo(base, DIM, K).to(im_q.device)
    model.load_state_dict(start)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    criterion = nn.CrossEntropyLoss()

    def step():
        output, target = model(im_q, im_k)
        loss = criterion(output, target)
        if accuracy:
            with torch.no_grad():
                _, best = output.topk(5, 1, True, True)
                best.t().eq(target.view(1, -1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def lightly_step(package, base, im_q, im_k) -> Step:
    """Lightly's example of MoCo: momentum update, query, key, loss with a memory bank, backward, SGD."""
    torch.manual_seed(0)
    model = base(num_classes=DIM).to(im_q.device)
    momentum = copy.deepcopy(model)
    package.deactivate_requires_grad(momentum)
    criterion = package.NTXentLoss(0.07, (K, DIM)).to(im_q.device)
    optimizer = torch.optim.SGD(model.parameters(), 0.06)

    def step():
        package.update_momentum(model, momentum, m=0.99)
        query = model(im_q)
        shuffled, order = package.batch_shuffle(im_k)
        key = package.batch_unshuffle(momentum(shuffled).detach(), order)
        loss = criterion(query, key)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def solo_learn_step(package, base, im_q, im_k) -> Step:
    """solo-learn's MoCo v2+: two views through both networks, the symmetric loss, enqueue, SGD, momentum update."""
    torch.manual_seed(0)
    online, momentum = (base(num_classes=DIM).to(im_q.device) for _ in range(2))
    package.initialize_momentum_params(online, momentum)
    updater = package.MomentumUpdater(0.99, 1.0)
    queue = solo_learn.init_queue(DIM, K).to(im_q.device)
    queue = queue if package is solo_learn else queue.contiguous()
    pointer = torch.zeros(1, dtype=torch.long, device=im_q.device)
    optimizer = torch.optim.SGD(online.parameters(), 0.06)

    def step():
        q1, q2 = (F.normalize(online(x), dim=-1) for x in (im_q, im_k))
        with torch.no_grad():
            k1, k2 = (F.normalize(momentum(x), dim=-1) for x in (im_q, im_k))
        before = queue.clone().detach()
        loss = package.mocov2plus_loss_func(q1, k2, before[1]) + package.mocov2plus_loss_func(q2, k1, before[0])
        loss = loss / 2
        package.dequeue_and_enqueue_(queue, pointer, torch.stack([k1, k2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        updater.update(online, momentum)
        return loss.detach()

    return step


def metric_learning_step(package, base, im_q, im_k) -> Step:
    """PyTorch Metric Learning's example of MoCo: keys enqueued with labels of their own, loss, SGD, momentum update.

    With one positive for each query, SupCon's loss is NT-Xent's, whose matrix of pairs would take 17 GB here.
    """
    torch.manual_seed(0)
    model = base(num_classes=DIM).to(im_q.device)
    momentum = copy.deepcopy(model).requires_grad_(False)
    criterion = package.CrossBatchMemory(package.SupConLoss(0.07), DIM, K)
    criterion.add_to_memory(torch.randn(K, DIM), torch.arange(K), K)
    criterion.to(im_q.device)
    optimizer = torch.optim.SGD(model.parameters(), 0.06)
    mask = torch.arange(2 * len(im_q), device=im_q.device) >= len(im_q)
    labels = K + torch.arange(len(im_q), device=im_q.device).repeat(2)

    def step():
        both = torch.cat([model(im_q), momentum(im_k)])
        loss = criterion(both, labels, enqueue_mask=mask)
        labels.add_(len(im_q))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch._foreach_lerp_(list(momentum.parameters()), list(model.parameters()), 0.01)
        return loss.detach()

    return step


def lightly_nnclr_step(package, base, im_q, im_k) -> Step:
    """Lightly's example of NNCLR: two views, their neighbors in the bank, the symmetric loss in the batch, SGD."""
    torch.manual_seed(0)
    model = base(num_classes=DIM).to(im_q.device)
    predictor = nn.Linear(DIM, DIM).to(im_q.device)
    bank = package.NNMemoryBankModule((K, DIM)).to(im_q.device)
    criterion = package.NTXentLoss(0.1)
    optimizer = torch.optim.SGD([*model.parameters(), *predictor.parameters()], 0.06)

    def step():
        z0, z1 = model(im_q), model(im_k)
        p0, p1 = predictor(z0), predictor(z1)
        z0, z1 = bank(z0.detach(), update=False), bank(z1.detach(), update=True)
        loss = 0.5 * (criterion(z0, p1) + criterion(z1, p0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def solo_learn_nnclr_step(package, base, im_1, im_2) -> Step:
    """solo-learn's NNCLR, with a linear predictor: neighbors of both views, the symmetric loss, enqueue, SGD."""
    torch.manual_seed(0)
    model, predictor = base(num_classes=DIM).to(im_1.device), nn.Linear(DIM, DIM).to(im_1.device)
    queue = F.normalize(torch.randn(K, DIM), dim=1).to(im_1.device)
    optimizer = torch.optim.SGD([*model.parameters(), *predictor.parameters()], 0.06)

    def step():
        z1, z2 = (model(x) for x in (im_1, im_2))
        p1, p2 = predictor(z1), predictor(z2)
        z1, z2 = F.normalize(z1, dim=-1), F.normalize(z2, dim=-1)
        (_, nn1), (_, nn2) = package.find_nn(z1.detach(), queue), package.find_nn(z2.detach(), queue)
        loss = (package.nnclr_loss_func(nn1, p2) + package.nnclr_loss_func(nn2, p1)) / 2
        queue[: len(z1)] = z1.detach()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def ressl_step(package, base, im_1, im_2) -> Step:
    """solo-learn's ReSSL: relations to the queue, enqueue, SGD, momentum update."""
    torch.manual_seed(0)
    online, momentum = (base(num_classes=DIM).to(im_1.device) for _ in range(2))
    package.initialize_momentum_params(online, momentum)
    updater = package.MomentumUpdater(0.99, 1.0)
    queue = F.normalize(torch.randn(K, DIM), dim=1).to(im_1.device)
    optimizer = torch.optim.SGD(online.parameters(), 0.06)

    def step():
        q = F.normalize(online(im_1), dim=-1)
        with torch.no_grad():
            k = F.normalize(momentum(im_2), dim=-1)
        loss = package.ressl_loss_func(q, k, queue.clone().detach())
        queue[: len(k)] = k
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        updater.update(online, momentum)
        return loss.detach()

    return step


def moco_v3_step(package, base, im_1, im_2) -> Step:
    """The official MoCo v3, with a linear predictor: the keys of the batch, without a queue."""
    torch.manual_seed(0)
    model, predictor = base(num_classes=DIM).to(im_1.device), nn.Linear(DIM, DIM).to(im_1.device)
    momentum = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.SGD([*model.parameters(), *predictor.parameters()], 0.06)

    def step():
        q1, q2 = (predictor(model(x)) for x in (im_1, im_2))
        k1, k2 = (momentum(x) for x in (im_1, im_2))
        loss = package.contrastive_loss(q1, k2, 0.2) + package.contrastive_loss(q2, k1, 0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def contriever_step(package, base, im_q, im_k) -> Step:
    """Contriever's train.py, with images as its tokens and 768 features: forward with statistics, backward, AdamW."""

    class Retriever(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = base(num_classes=768)

        def forward(self, input_ids, attention_mask, normalize=False):
            features = self.encoder(input_ids)
            return F.normalize(features, dim=-1) if normalize else features

    torch.manual_seed(0)
    opt = test_compat_contriever.options(queue_size=K, projection_size=768, momentum=0.999)
    model = package.MoCo(opt, Retriever()).to(im_q.device)
    keys = torch.randn(K, 768, generator=torch.Generator().manual_seed(1))
    model.queue.copy_(F.normalize(keys, dim=1).t())
    optimizer = torch.optim.AdamW(model.encoder_q.parameters(), 1e-4)

    def step():
        loss, _ = model(im_q, None, im_k, None)
        loss.backward()
        optimizer.step()
        model.zero_grad()
        return loss.detach()

    step()  # whose loss is 0 for a ResNet: there is nothing to compare
    return step


def the_peers() -> dict[str, tuple[Callable[..., Step], object, Callable[[], object]]]:
    """Name -> (its step, our stand-in for its package, the package or its formulation)."""

    def original_lightly() -> object:
        loss, utils = pytest.importorskip("lightly.loss"), pytest.importorskip("lightly.models.utils")
        bank = pytest.importorskip("lightly.models.modules").NNMemoryBankModule
        return SimpleNamespace(**vars(utils), NTXentLoss=loss.NTXentLoss, NNMemoryBankModule=bank)

    return {
        "moco": (moco_step, moco, lambda: SimpleNamespace(builder=official)),
        "lightly": (lightly_step, lightly, original_lightly),
        "lightly_nnclr": (lightly_nnclr_step, lightly, original_lightly),
        "pytorch_metric_learning": (
            metric_learning_step,
            pytorch_metric_learning,
            lambda: pytest.importorskip("pytorch_metric_learning.losses"),
        ),
        "solo_learn": (solo_learn_step, solo_learn, lambda: Published),
        "solo_learn_nnclr": (solo_learn_nnclr_step, solo_learn, lambda: Published),
        "ressl": (ressl_step, solo_learn, lambda: Published),
        "moco_v3": (moco_v3_step, moco_v3, lambda: SimpleNamespace(contrastive_loss=test_compat_moco_v3.formulation)),
        "contriever": (contriever_step, contriever, lambda: SimpleNamespace(MoCo=test_compat_contriever.Published)),
    }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("peer", the_peers())
def bench_compat(compare, device, peer, size):
    make, ours, original = the_peers()[peer]
    base, batch, side = SIZES[size]
    views = [torch.randn(batch, 3, side, side).to(device) for _ in range(2)]

    def row(name: str, package: object) -> Row:
        return Row(name, make(package, base, *views), value=make(package, base, *views))

    before = original()
    want = make(before, base, *views)().double()  # float32 as well: both sides start from one state
    rows = [row("after", ours), row("before", before)]
    if peer == "moco":
        rows.append(Row("after, without accuracy", make(ours, base, *views, accuracy=False)))
    queue = "no queue" if peer == "moco_v3" else f"K={K}"
    compare(f"compat {peer}: {size}, {queue}", rows, want)


# name -> class, pairs of a batch, arguments
SENTENCE_LOSSES = {
    "a linear encoder, 2048 pairs": ("MultipleNegativesRankingLoss", 2048, {}),
    "a linear encoder, 2048 pairs, four directions": (
        "MultipleNegativesRankingLoss",
        2048,
        {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")},
    ),
    "a linear encoder, 4096 pairs in mini-batches of 256": (
        "CachedMultipleNegativesRankingLoss",
        4096,
        {"mini_batch_size": 256},
    ),
}


class Sentences(nn.Module):
    """Linear embeddings of "texts", which are vectors already, with what the losses ask of a SentenceTransformer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(128, 384)

    def __getitem__(self, index: int) -> nn.Module:
        return self.fc

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": self.fc(features["inputs"])}


@pytest.mark.parametrize("size", SENTENCE_LOSSES)
def bench_sentence_transformers(compare, device, size):
    """Forward, backward, SGD of sentence-transformers' losses."""
    original = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    from moco_ext.compat import sentence_transformers

    name, pairs, options = SENTENCE_LOSSES[size]
    batch = [{"inputs": torch.randn(pairs, 128, device=device)} for _ in range(2)]

    def make(package: object) -> Step:
        torch.manual_seed(0)
        model = Sentences().to(device)
        criterion = getattr(package, name)(model, **options)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)

        def step():
            optimizer.zero_grad()
            loss = criterion(batch, None)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    packages = {"after": sentence_transformers, "before": original}
    rows = [Row(name, make(package), value=make(package)) for name, package in packages.items()]
    compare(f"compat sentence_transformers: {size}, no queue", rows, make(original)().double())
