"""Step for step the published MoCo: same start, same batches, 200 steps of training, on one process and on several.

It is compared with `official.py`, our rewrite, and with the published `moco/builder.py` itself if MOCO_BUILDER is the
path of a copy:

    MOCO_BUILDER=.../moco/builder.py pytest python_tests/test_parity.py -k published

The published model moves its key encoder at the start of a forward pass and enqueues at its end; ours does both in
`update`, after the optimizer's step. Both train side by side, each on its own gradients, and must stay together.

Tolerances. Ours and theirs add in different orders, so they part by float32's rounding: over these 200 steps by at most
7e-6 in a loss, 6e-7 in the queue and 2e-6 in a parameter, and it does not grow. That needs an encoder without kinks.
With ReLU an activation within rounding of zero now and then falls on the other side, the gradient jumps, and the losses
part by up to 0.1; nor is that ours: the published model does it to itself when its start is changed by 1e-7. In float64
nothing comes that near to zero, so the encoder with ReLU is compared there, where they stay within 2e-12.
"""

import copy
import os
import runpy
from typing import Any, NamedTuple
from unittest import mock

import official
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from ranks import leave_group
from torch import Tensor, nn

import moco_ext
from moco_ext import data

DIM, K, N, M, T = 32, 512, 16, 0.999, 0.07  # N images a step in all, whatever the number of processes
STEPS = 200  # the queue is overwritten six times
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
STATE_TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-9}
DETECTED = 1e-3  # what a planted fault must exceed


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small take longer on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Encoder(nn.Module):
    """Two convolutions with BatchNorm on 8x8 digits, smooth unless told otherwise: see the tolerances."""

    def __init__(self, num_classes: int = DIM, activation: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            activation(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            activation(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.fc = nn.Linear(32, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.body(images))


def relu_encoder(num_classes: int) -> Encoder:
    return Encoder(num_classes, nn.ReLU)


def global_batch(images: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Two noisy views [N, 1, 8, 8] of N digits, a function of the step."""
    generator = torch.Generator().manual_seed(step)
    chosen = images[torch.randint(len(images), (N,), generator=generator)]
    im_q, im_k = (chosen + 0.3 * torch.randn(chosen.shape, generator=generator) for _ in range(2))
    return im_q, im_k


def digits() -> Tensor:
    split = data.load("digits").train
    assert isinstance(split, data.TensorSplit)
    return split.images.float() / 128 - 1


def sgd(model: moco_ext.MoCo | official.MoCo) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.encoder_q.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)


def pair(encoder=Encoder, dtype: torch.dtype = torch.float32, **ours) -> tuple[moco_ext.MoCo, official.MoCo]:
    """Both models at one start; the published layout of the state carries it over."""
    torch.manual_seed(0)
    mine = moco_ext.MoCo(encoder, **{"dim": DIM, "K": K, "m": M, "T": T} | ours).to(dtype)
    theirs = official.MoCo(encoder, DIM, K, M, T).to(dtype)
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


def published(start: official.MoCo, builder: str) -> nn.Module:
    """The published model at the same start, with the methods of ours. It needs a process group."""
    model = runpy.run_path(builder)["MoCo"]

    class Published(model):
        def forward(self, im_q: Tensor, im_k: Tensor, key_order: Tensor) -> tuple[Tensor, Tensor]:
            # It draws the permutation itself, and moves it and the labels to the GPU.
            with (
                mock.patch.object(torch, "randperm", return_value=key_order.clone()),
                mock.patch.object(Tensor, "cuda", lambda self: self),
            ):
                return super().forward(im_q, im_k)

        def momentum_update(self) -> None:
            self._momentum_update_key_encoder()

    theirs = Published(Encoder, DIM, K, M, T)
    theirs.load_state_dict(start.state_dict())
    return theirs


def step_ours(model: Any, optimizer: torch.optim.Optimizer, *batch: Tensor, **options: Tensor) -> Tensor:
    out = model(*batch, **options)
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    getattr(model, "module", model).update(out.keys)
    return out.loss.detach()


def step_theirs(model: Any, optimizer: torch.optim.Optimizer, *batch: Tensor, **options: Tensor) -> Tensor:
    loss = F.cross_entropy(*model(*batch, **options))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


class Apart(NamedTuple):
    """The largest differences: of the losses, and at the end of the queue and of both encoders' parameters."""

    loss: float
    queue: float
    parameters: float

    def within(self, dtype: torch.dtype) -> bool:
        return self.loss < LOSS_TOLERANCE[dtype] and max(self.queue, self.parameters) < STATE_TOLERANCE[dtype]


def apart(losses: Tensor, ours: moco_ext.MoCo, theirs: official.MoCo) -> Apart:
    """Losses [steps, 2] of ours and theirs, and the models after the last step."""
    assert ours.queue_ptr.item() == theirs.queue_ptr.item() == len(losses) * N % K
    theirs = copy.deepcopy(theirs)
    theirs.momentum_update()  # theirs would move the key encoder at the start of the next step
    parameters = max((a - b).abs().max().item() for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    return Apart(
        (losses[:, 0] - losses[:, 1]).abs().max().item(), (ours.queue - theirs.queue.t()).abs().max().item(), parameters
    )


def train_side_by_side(ours: moco_ext.MoCo, theirs: official.MoCo, step_of_ours=step_ours, steps=STEPS) -> Apart:
    images, dtype = digits(), ours.queue.dtype
    optimizers = sgd(ours), sgd(theirs)
    losses = []
    for step in range(steps):
        batch = [view.to(dtype) for view in global_batch(images, step)]
        losses.append(
            torch.stack([step_of_ours(ours, optimizers[0], *batch), step_theirs(theirs, optimizers[1], *batch)])
        )
    return apart(torch.stack(losses), ours, theirs)


@pytest.mark.parametrize(("encoder", "dtype"), [(Encoder, torch.float32), (relu_encoder, torch.float64)])
def test_200_steps_of_training_match(encoder, dtype):
    ours, theirs = pair(encoder, dtype)
    start = copy.deepcopy(ours.encoder_q.state_dict())
    difference = train_side_by_side(ours, theirs)
    assert difference.within(dtype), difference
    moved = (ours.encoder_q.body[0].weight - start["body.0.weight"]).abs().max().item()
    assert moved > 1e-2  # else nothing was compared


def enqueue_before_loss(model, optimizer, im_q, im_k):
    model.enqueue(model(im_q, im_k).keys)
    loss = model(im_q, im_k).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    moco_ext.momentum_update_(list(model.encoder_k.parameters()), list(model.encoder_q.parameters()), model.m)
    return loss.detach()


def update_before_optimizer(model, optimizer, im_q, im_k):
    out = model(im_q, im_k)
    optimizer.zero_grad()
    out.loss.backward()
    model.update(out.keys)
    optimizer.step()
    return out.loss.detach()


FAULTS = {
    "m = 0.99": ({"m": 0.99}, step_ours),
    "T = 0.0701": ({"T": 0.0701}, step_ours),
    "enqueue before the loss": ({}, enqueue_before_loss),
    "update before the optimizer's step": ({}, update_before_optimizer),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault):
    options, step_of_ours = FAULTS[fault]
    difference = train_side_by_side(*pair(**options), step_of_ours)
    assert difference.loss > DETECTED, difference


def test_key_encoder_moves_after_the_step_as_theirs_before_the_next():
    ours, theirs = pair(dtype=torch.float64)
    start = [parameter.clone() for parameter in theirs.encoder_k.parameters()]
    optimizers = sgd(ours), sgd(theirs)
    batch = [view.double() for view in global_batch(digits(), 0)]
    step_ours(ours, optimizers[0], *batch)
    step_theirs(theirs, optimizers[1], *batch)

    def distance(other: list[Tensor]) -> float:
        return max((a - b).abs().max().item() for a, b in zip(ours.encoder_k.parameters(), other, strict=True))

    # The first update of theirs found two equal encoders; 1e-12: float64's rounding of weights near 1, and room.
    torch.testing.assert_close(list(theirs.encoder_k.parameters()), start, rtol=0, atol=1e-12)
    assert distance(start) > 1e-7
    theirs.momentum_update()
    assert distance(list(theirs.encoder_k.parameters())) < 1e-12


# --- several processes ------------------------------------------------------------------------------------------------

MODES = ("gather", "all_to_all", "loader")


def train_in_rank(
    rank: int, world: int, steps: int, images: Tensor, port: int, folder: str, builder: str | None
) -> None:
    """Theirs, and ours in every way to move images, on the same permutations of the key images; each under DDP."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    n = N // world
    mine = slice(rank * n, (rank + 1) * n)
    ours = {mode: pair(shuffle_bn=mode)[0] for mode in (*MODES, "none")}
    theirs: Any = pair()[1]
    if builder is not None:
        theirs = published(theirs, builder)
    models: dict[str, Any] = ours | {"theirs": theirs}
    ddp = {name: nn.parallel.DistributedDataParallel(model) for name, model in models.items()}
    optimizers = {name: sgd(model) for name, model in models.items()}
    losses: dict[str, list[Tensor]] = {name: [] for name in models}
    for step in range(steps):
        im_q, im_k = global_batch(images, step)
        order = torch.randperm(N, generator=torch.Generator().manual_seed(1000 + step))
        for name in models:
            keys = im_k[order] if name == "loader" else im_k  # there the loader has already permuted them
            step_it = step_theirs if name == "theirs" else step_ours
            losses[name].append(step_it(ddp[name], optimizers[name], im_q[mine], keys[mine], key_order=order))
    stacked = {name: torch.stack(values) for name, values in losses.items()}
    results = {
        name: apart(torch.stack([stacked[name], stacked["theirs"]], 1), model, theirs) for name, model in ours.items()
    }
    torch.save(results, f"{folder}/{rank}.pt")
    leave_group()


BUILDER = os.environ.get("MOCO_BUILDER")
needs_builder = pytest.mark.skipif(BUILDER is None, reason="MOCO_BUILDER is not the path of the published builder.py")
SETTINGS = [
    pytest.param((2, 200, None), id="2 processes"),
    pytest.param((4, 50, None), id="4 processes", marks=pytest.mark.slow),
    pytest.param((1, 200, BUILDER), id="published, 1 process", marks=needs_builder),
    pytest.param((2, 200, BUILDER), id="published, 2 processes", marks=needs_builder),
]


@pytest.fixture(scope="module", params=SETTINGS)
def differences(request, tmp_path_factory) -> list[dict[str, Apart]]:
    """Each rank's, by mode."""
    world, steps, builder = request.param
    folder = tmp_path_factory.mktemp("parity")
    port = 31500 + os.getpid() % 2000 + world
    mp.start_processes(
        train_in_rank, args=(world, steps, digits(), port, str(folder), builder), nprocs=world, start_method="spawn"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.mark.parametrize("mode", MODES)
def test_processes_match(differences, mode):
    for of_rank in differences:
        assert of_rank[mode].within(torch.float32), of_rank[mode]


def test_keys_encoded_where_they_are_would_be_seen(differences):
    """Without shuffling BN only the batch statistics differ, and that is enough."""
    if len(differences) == 1:
        pytest.skip("one process encodes all keys together")
    assert all(of_rank["none"].loss > DETECTED for of_rank in differences)
