"""A training step of each peer's trainer, before and after the change of import that docs/peers/ describes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import official
import pytest
import torch
import torch.nn.functional as F
from conftest import Row
from test_compat_solo_learn import Published
from torch import Tensor, nn

from moco_ext.compat import lightly, moco, solo_learn
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


def the_peers() -> dict[str, tuple[Callable[..., Step], object, Callable[[], object]]]:
    """Name -> (its step, our stand-in for its package, the package or its formulation)."""

    def original_lightly() -> object:
        loss, utils = pytest.importorskip("lightly.loss"), pytest.importorskip("lightly.models.utils")
        return SimpleNamespace(**vars(utils), NTXentLoss=loss.NTXentLoss)

    return {
        "moco": (moco_step, moco, lambda: SimpleNamespace(builder=official)),
        "lightly": (lightly_step, lightly, original_lightly),
        "solo_learn": (solo_learn_step, solo_learn, lambda: Published),
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
    compare(f"compat {peer}: {size}, K={K}", rows, want)
