"""Updates, stand-ins and whole steps under torch.compile: the same numbers as without, graph breaks allowed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco_ext import MoCo
from moco_ext.compat import lightly, moco, solo_learn

DIM, K, N, STEPS = 8, 16, 4, 3
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]

pytestmark = [
    pytest.mark.parametrize("backend", BACKENDS),
    pytest.mark.filterwarnings("error:Dynamo does not know how to trace"),
]


class Encoder(nn.Module):
    def __init__(self, num_classes: int = DIM) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(6, num_classes), nn.BatchNorm1d(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x))


def images(step: int, like: nn.Module) -> tuple[Tensor, Tensor]:
    """On the device of the model that takes them."""
    views = torch.randn(2, N, 6, generator=torch.Generator().manual_seed(step))
    return views.to(next(like.parameters()).device).unbind()


def moco_steps(compiled, model: MoCo) -> list[Tensor]:
    """Forward and update compiled apart, as with ``torch.compile(model)``."""
    forward, update = compiled(model), compiled(model.update)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.1)
    losses = []
    for step in range(STEPS):
        out = forward(*images(step, model))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        update(out.keys)
        losses.append(out.loss.detach())
    return [*losses, *model.state_dict().values()]


def whole_step(compiled, model: MoCo) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.1)

    @compiled
    def train_step(im_q, im_k):
        out = model(im_q, im_k)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        model.update(out.keys)
        return out.loss.detach()

    return [*(train_step(*images(step, model)) for step in range(STEPS)), *model.state_dict().values()]


def official_trainer(compiled, model: nn.Module) -> list[Tensor]:
    """main_moco.py with ``model = torch.compile(model)``."""
    return _official_steps(compiled(model), model, nn.CrossEntropyLoss(), lambda step: step)


def official_trainer_compiled_whole(compiled, model: nn.Module) -> list[Tensor]:
    return _official_steps(model, model, nn.CrossEntropyLoss(), compiled)


def official_trainer_with_compiled_loss(compiled, model: nn.Module) -> list[Tensor]:
    def penalized(output, target):
        output = output + 0
        return F.cross_entropy(output, target) + 0.01 * output.square().mean()

    plain = _official_steps(model, model, compiled(nn.CrossEntropyLoss()), lambda step: step)
    return plain + _official_steps(model, model, compiled(penalized), lambda step: step)


def _official_steps(forward, model, criterion, wrap) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.1)

    def train_step(im_q, im_k):
        output, target = forward(im_q, im_k)
        loss = criterion(output, target)
        with torch.no_grad():
            best = output.topk(5, 1, True, True)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach(), best

    train_step = wrap(train_step)
    return [x for step in range(STEPS) for x in train_step(*images(step, model))] + [*model.state_dict().values()]


def lightly_steps(compiled, model: nn.Module) -> list[Tensor]:
    momentum = copy.deepcopy(model)
    torch.manual_seed(2)
    criterion = lightly.NTXentLoss(0.1, (K, DIM))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    @compiled
    def train_step(im_q, im_k):
        lightly.update_momentum(model, momentum, m=0.9)
        loss = criterion(model(im_q), momentum(im_k).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    losses = [train_step(*images(step, model)) for step in range(STEPS)]
    compiled(lightly.update_momentum)(model, momentum, 0.5)
    return [*losses, *momentum.state_dict().values(), criterion.memory_bank.bank]


def solo_learn_updates(compiled, model: nn.Module) -> list[Tensor]:
    momentum, updater = copy.deepcopy(model), solo_learn.MomentumUpdater(0.9)
    nn.init.zeros_(momentum.fc.weight)
    compiled(solo_learn.initialize_momentum_params)(model, momentum)
    torch.manual_seed(3)
    queue = solo_learn.init_queue(DIM, K).to(model.fc.weight.device)
    pointer = torch.zeros(1, dtype=torch.long, device=queue.device)
    update, enqueue = compiled(updater.update), compiled(solo_learn.dequeue_and_enqueue_)
    for step in range(STEPS):
        with torch.no_grad():
            model.fc.weight.add_(1)
        update(model, momentum)
        enqueue(queue, pointer, torch.stack([model.fc(x).detach() for x in images(step, model)]))
    return [*momentum.state_dict().values(), queue, pointer]


def a_moco(**options):
    return lambda: MoCo(Encoder, DIM, K, m=0.9, **options)


CASES = {
    "MoCo": (moco_steps, a_moco()),
    "MoCo, empty": (moco_steps, a_moco(empty=True)),
    "MoCo, shared body": (moco_steps, a_moco(key_encoder="partial")),
    "MoCo, not flat": (moco_steps, a_moco(flatten_parameters=False)),
    "MoCo, split BatchNorm": (moco_steps, a_moco(split_bn=2)),
    "MoCo, low precision": (moco_steps, a_moco(low_precision=torch.bfloat16)),
    "MoCo, whole step": (whole_step, a_moco()),
    "official": (official_trainer, lambda: moco.builder.MoCo(Encoder, DIM, K)),
    "official, whole step": (official_trainer_compiled_whole, lambda: moco.builder.MoCo(Encoder, DIM, K)),
    "official, loss": (official_trainer_with_compiled_loss, lambda: moco.builder.MoCo(Encoder, DIM, K)),
    "lightly": (lightly_steps, Encoder),
    "solo-learn": (solo_learn_updates, Encoder),
}


@pytest.mark.parametrize(("steps", "make"), CASES.values(), ids=CASES)
def test_compiled_steps_are_the_same(steps, make, backend, device):
    torch._dynamo.reset()
    results = []
    for compiled in (lambda f: f, lambda f: torch.compile(f, backend=backend)):
        torch.manual_seed(0)
        results.append(steps(compiled, make().to(device)))
    want, got = results
    # BatchNorm over groups of two samples amplifies rounding; in float64, the difference is 1e-13.
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
