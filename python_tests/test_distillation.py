"""Distillation through a queue of the teacher's features, and the objectives of MoCo, against plain formulas."""

import dataclasses
import json
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import rel_error
from ranks import leave_group
from torch import nn

from moco_ext import MoCo
from moco_ext.distillation import Distillation

DIM, K, N = 16, 40, 8


def linear(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, num_classes))


def images(seed: int, n: int = N) -> torch.Tensor:
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def unit(x):
    return F.normalize(x, dim=1)


# ---- distillation ----


def student(**changes) -> Distillation:
    torch.manual_seed(0)
    return Distillation(linear, DIM, K, 0.1, **{"teacher": linear(DIM), "teacher_T": 0.05} | changes)


def divergence(model, batch, stored):
    """KL of the student's softmax from the teacher's, over the teacher's feature of the image and those stored."""
    own = unit(model.teacher(batch).double())
    q = unit(model.encoder_q(batch).double())

    def log_p(rows, T):
        return torch.cat([(rows * own).sum(1, keepdim=True), rows @ stored.double().t()], 1).div(T).log_softmax(1)

    return F.kl_div(log_p(q, model.T), log_p(own, model.teacher_T), log_target=True, reduction="batchmean")


def test_is_the_divergence_of_two_softmaxes_while_the_queue_fills(device):
    model = student().to(device)
    stored = torch.empty(0, DIM, device=device)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.1)
    for step in range(8):  # the queue is full after five
        batch = images(step).to(device)
        out = model(batch)
        want = divergence(model, batch, stored)
        assert abs(out.loss - want) <= 1e-5 * max(1, want)
        assert rel_error(out.stats.loss.mean(), out.loss.detach()) <= 1e-5 or abs(out.loss) < 1e-5
        parameters = list(model.encoder_q.parameters())
        if step:
            got = torch.autograd.grad(out.loss, parameters, retain_graph=True)
            for a, b in zip(got, torch.autograd.grad(want, parameters), strict=True):
                assert rel_error(a, b) <= 2e-5
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        model.update(out.keys)
        stored = torch.cat([stored, unit(model.teacher(batch).detach())])[-K:]
        assert model.queue_valid == len(stored)


def test_a_copy_of_the_teacher_has_no_loss(device):
    model = student(teacher_T=0.1).to(device)
    model.encoder_q.load_state_dict(model.teacher.state_dict())
    model.enqueue(torch.randn(K, DIM, device=device))
    assert model(images(0).to(device)).loss.abs() <= 1e-5


def test_the_teacher_is_frozen_not_saved_and_moves_along():
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(48, DIM), nn.BatchNorm1d(DIM))
    model = student(teacher=teacher)
    nn.ModuleList([model, teacher]).train()
    before = [x.clone() for x in teacher.state_dict().values()]
    out = model(images(0))
    out.loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.state_dict().values(), strict=True))
    assert not any("teacher" in name for name in [*model.state_dict(), *dict(model.named_parameters())])
    assert next(model.to(torch.float64).teacher.parameters()).dtype == torch.float64


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="teacher: expected a module, got None"):
        student(teacher=None)(images(0))
    with pytest.raises(ValueError, match=r"teacher: expected features \[8, 16\], got \[8, 5\]"):
        student(teacher=linear(5))(images(0))
    with pytest.raises(ValueError, match=r"^teacher_T: expected a positive, finite temperature, got 0\.0"):
        student(teacher_T=0.0)
    with pytest.raises(TypeError, match=r"^teacher_T: expected a number, got None"):
        moco("ressl", teacher_T=None)


# ---- objectives of MoCo ----


def moco(objective: str, **changes) -> MoCo:
    torch.manual_seed(0)
    return MoCo(linear, DIM, K, 0.9, 0.1, objective=objective, **{"teacher_T": 0.05} | changes)


def test_relations(device):
    model = moco("ressl").to(device)
    im_q, im_k = images(0).to(device), images(1).to(device)
    q, k, queue = (unit(x.double()) for x in (model.encoder_q(im_q), model.encoder_k(im_k).detach(), model.queue))
    want = -((k @ queue.t() / 0.05).softmax(1) * (q @ queue.t() / 0.1).log_softmax(1)).sum(1).mean()
    out = model(im_q, im_k)
    assert rel_error(out.loss, want) <= 1e-5
    parameters = list(model.encoder_q.parameters())
    for a, b in zip(torch.autograd.grad(out.loss, parameters), torch.autograd.grad(want, parameters), strict=True):
        assert rel_error(a, b) <= 1e-5


def neighbor_loss(q, neighbors, T=0.1):
    return F.cross_entropy(neighbors @ q.t() / T, torch.arange(len(q), device=q.device))


def test_nearest_neighbors(device):
    model = moco("nnclr").to(device)
    im_q, im_k = images(0).to(device), images(1).to(device)
    q, k = unit(model.encoder_q(im_q).double()), unit(model.encoder_k(im_k).double())
    want = neighbor_loss(q, model.queue.double()[(k @ model.queue.double().t()).argmax(1)])
    out = model(im_q, im_k)
    assert rel_error(out.loss, want) <= 1e-5
    parameters = list(model.encoder_q.parameters())
    for a, b in zip(torch.autograd.grad(out.loss, parameters), torch.autograd.grad(want, parameters), strict=True):
        assert rel_error(a, b) <= 1e-5


def run_rank(rank, world, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    mine = slice(4 * rank, 4 * rank + 4)
    for objective in ("nnclr", "ressl"):
        model, whole = moco(objective, shuffle_bn="none"), moco(objective)
        im_q, im_k = images(0), images(1)
        out = model(im_q[mine], im_k[mine])
        grads = torch.autograd.grad(out.loss, list(model.encoder_q.parameters()))
        # The reference is one process with the whole batch, whose group of one rank it has to itself.
        q, k = unit(whole.encoder_q(im_q)), unit(whole.encoder_k(im_k).detach())
        if objective == "nnclr":
            want = neighbor_loss(q, whole.queue[(k @ whole.queue.t()).argmax(1)])
        else:
            log_p = (q @ whole.queue.t() / 0.1).log_softmax(1)
            want = -((k @ whole.queue.t() / 0.05).softmax(1) * log_p).sum(1).mean()
        want_grads = torch.autograd.grad(want, list(whole.encoder_q.parameters()))
        for mean, exact in zip((out.loss.detach(), *grads), (want.detach(), *want_grads), strict=True):
            dist.all_reduce(mean)
            assert rel_error(mean / world, exact) <= 1e-5, objective
    model = student()
    stored = torch.randn(K // 2, DIM, generator=torch.Generator().manual_seed(2))
    model.enqueue(stored)
    out = model(im_q[mine])
    mean = out.loss.detach()
    dist.all_reduce(mean)
    assert rel_error(mean / world, divergence(model, im_q, unit(stored))) <= 1e-5
    assert torch.equal(out.keys, model.teacher(im_q))  # of all ranks, in order
    leave_group()


def test_two_processes_have_the_losses_of_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(run_rank, (2, tmp_path / "rendezvous"), nprocs=2)


@pytest.mark.parametrize("option", [{"in_batch": True}, {"same_id": "mask"}, {"label_smoothing": 0.1}, {"empty": True}])
def test_objectives_refuse_options_of_the_loss(option):
    with pytest.raises(ValueError, match="objective: expected 'infonce' with"):
        moco("ressl", **option)


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="objective: expected one of 'infonce', 'nnclr', 'ressl', got 'byol'"):
        moco("byol")


# ---- the trainer ----


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    pytest.importorskip("torchvision")
    from training import few_digits, run_in, tiny

    from moco_ext.train import pretrain

    folder = tmp_path_factory.mktemp("teacher")
    config = tiny(epochs=1)
    pretrain(config, few_digits(), run_in(folder))
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    return folder


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("objective", ["nnclr", "ressl"])
def test_trains_with_an_objective(tmp_path, objective):
    pytest.importorskip("torchvision")
    from training import few_digits, run_in, tiny

    from moco_ext.train import pretrain

    records = pretrain(tiny(objective=objective, epochs=4), few_digits(), run_in(tmp_path))
    assert all(math.isfinite(record["loss"]) for record in records)
    if objective == "nnclr":  # with ressl the target changes too
        assert records[-1]["loss"] < records[0]["loss"]


@pytest.mark.usefixtures("one_thread")
def test_distills_a_run_and_resumes(teacher, tmp_path, monkeypatch):
    """Interrupted and resumed, it ends with the same student, to the bit; its checkpoint has no teacher."""
    from test_resume import Interrupted, interrupt_at, same_records
    from training import assert_equal_states, few_digits, run_in, state_of, tiny

    from moco_ext.train import pretrain

    config = tiny(dictionary="distillation", teacher=str(teacher), moco_dim=256, epochs=3)
    records = pretrain(config, few_digits(), run_in(tmp_path / "whole"))
    assert records[-1]["loss"] < records[1]["loss"]  # in the first epoch the queue is nearly empty
    with monkeypatch.context() as patch:
        interrupt_at(patch, 8)
        with pytest.raises(Interrupted):
            pretrain(config, few_digits(), run_in(tmp_path / "parts", save_every=7))
    resumed = pretrain(config, few_digits(), run_in(tmp_path / "parts", save_every=7, resume="auto"))
    same_records(records, resumed)
    assert_equal_states(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
    assert not any("teacher" in name for name in state_of(tmp_path / "whole"))


@pytest.mark.usefixtures("one_thread")
def test_the_command_on_a_folder_of_photos(teacher, tmp_path, capsys):
    """Color images with another normalization than the teacher's, a student of another architecture."""
    from PIL import Image

    from moco_ext.cli import main

    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(16):
        Image.effect_noise((20, 20), number + 1).convert("RGB").save(photos / f"{number}.png")
    flags = [str(photos), "-a", "resnet18-small", "-b", "8", "--epochs", "1", "--image-size", "16", "--workers", "0"]
    assert main(["distill", str(teacher), *flags, "--output", str(tmp_path / "run")]) == 0
    assert f"warning: teacher: its images have 8 pixels and those of {photos} 16" in capsys.readouterr().err
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["dictionary"], config["moco_dim"], config["arch"]) == ("distillation", 256, "resnet18-small")
    assert main(["distill", str(teacher), *flags, "--moco-dim", "5", "--output", str(tmp_path / "other")]) == 1
    assert "moco_dim: expected the teacher's 256 features, got 5" in capsys.readouterr().err
    assert main(["distill", str(tmp_path / "gone"), *flags]) == 1
    assert "no such file" in capsys.readouterr().err
    assert main(["distill", str(teacher), *flags, "--dictionary", "queue"]) == 1
    assert "dictionary: expected distillation, got queue" in capsys.readouterr().err


def test_a_teacher_sees_its_own_normalization():
    pytest.importorskip("torchvision")
    from moco_ext.train.teacher import Renormalized

    images = torch.rand(2, 3, 5, 5)
    own, given = (
        (torch.tensor([0.2]), torch.tensor([0.5])),
        (torch.tensor([0.1, 0.3, 0.5]), torch.tensor([0.9, 0.7, 0.4])),
    )

    def normalized(mean, std):
        return (images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)

    torch.testing.assert_close(Renormalized(nn.Identity(), own, given)(normalized(*given)), normalized(*own))
