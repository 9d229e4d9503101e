"""compat.albef against the formulas of ALBEF and BLIP, with the matrices of similarities, in float64."""

import pytest
import torch
import torch.nn.functional as F
from cases import rel_error
from torch import nn

from moco_ext.compat.albef import ImageTextContrast

N, C, K = 6, 16, 40


class Model(ImageTextContrast):
    def __init__(self, ids=False, pointer="queue_ptr"):
        super().__init__()
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.make_queues(C, K, ids, pointer)


class Published(nn.Module):
    """The part of the published models, with queues of columns."""

    def __init__(self, ids=False, pointer="queue_ptr"):
        super().__init__()
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.pointer = pointer
        for name in ("image_queue", "text_queue"):
            self.register_buffer(name, F.normalize(torch.randn(C, K), dim=0))
        if ids:
            self.register_buffer("idx_queue", torch.full((1, K), -100))
        self.register_buffer(pointer, torch.zeros(1, dtype=torch.long))

    def contrastive_loss(self, image, text, image_m, text_m, alpha, idx):
        def direction(query, query_m, key_m, queue):
            keys = torch.cat([key_m.t(), queue.to(query.dtype)], dim=1)
            labels = torch.eye(N, N + K, dtype=query.dtype)
            if idx is not None:
                same = (idx.view(-1, 1) == torch.cat([idx.view(1, -1), self.idx_queue], dim=1)).to(query.dtype)
                labels = same / same.sum(1, keepdim=True)
            with torch.no_grad():
                labels = alpha * (query_m @ keys / self.temp).softmax(1) + (1 - alpha) * labels
            return -((query @ keys / self.temp).log_softmax(1) * labels).sum(1).mean()

        i2t = direction(image, image_m, text_m, self.text_queue)
        return (i2t + direction(text, text_m, image_m, self.image_queue)) / 2

    def enqueue(self, image_m, text_m, idx):
        start = int(getattr(self, self.pointer))
        slots = (start + torch.arange(len(image_m))) % K
        self.image_queue[:, slots], self.text_queue[:, slots] = image_m.t(), text_m.t()
        if idx is not None:
            self.idx_queue[:, slots] = idx.view(1, -1)
        getattr(self, self.pointer)[0] = (start + len(image_m)) % K


def features():
    image = torch.randn(N, C)
    raw = (image, image + torch.randn(N, C), image + 0.1 * torch.randn(N, C), image + torch.randn(N, C))
    return [F.normalize(x, dim=1) for x in raw]


@pytest.mark.parametrize("pointer", ["queue_ptr", "ptr_queue"])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_steps_equal_the_published_loss(alpha, ids, pointer):
    """Over steps that wrap around; value, gradients, and the state dict both ways."""
    published, model = Published(ids, pointer), Model(ids, pointer)
    model.load_state_dict(published.state_dict())
    for step in range(9):
        idx = torch.arange(N) % 4 + step if ids else None
        inputs = features()
        online = [x.requires_grad_() for x in inputs[:2]]
        loss = model.contrastive_loss(*inputs, model.temp, alpha, idx)
        wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
        want = published.contrastive_loss(*wide, alpha, idx)
        assert rel_error(loss, want) <= 1e-5
        got = torch.autograd.grad(loss, [*online, model.temp])
        for a, b in zip(got, torch.autograd.grad(want, [*wide[:2], published.temp]), strict=True):
            assert rel_error(a, b) <= 2e-5
        model._dequeue_and_enqueue(*inputs[2:], idx)
        published.enqueue(*(x.detach() for x in inputs[2:]), idx)
    state, wanted = model.state_dict(), published.state_dict()
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(state[name], value), name


def test_misuse_is_named():
    model = Model()
    with pytest.raises(ValueError, match=r"alpha: expected a number in \[0, 1\], got 1.5"):
        model.contrastive_loss(*features(), 0.07, 1.5)
    with pytest.raises(ValueError, match="idx: expected none for queues made without ids"):
        model.contrastive_loss(*features(), 0.07, idx=torch.arange(N))
    before = model.state_dict()
    with pytest.raises(ValueError, match=r"text_feat: expected \[6, 16\], got \[5, 16\]"):
        model._dequeue_and_enqueue(torch.ones(N, C), torch.ones(N - 1, C))
    with pytest.raises(ValueError, match="idx: expected none, got shape"):
        model._dequeue_and_enqueue(torch.ones(N, C), torch.ones(N, C), torch.arange(N))
    with pytest.raises(ValueError, match=r"text_feat: expected features for a queue of torch.float32, got torch\.fl"):
        model._dequeue_and_enqueue(torch.ones(N, C), torch.ones(N, C).double())
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name
