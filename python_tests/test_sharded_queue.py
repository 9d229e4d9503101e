"""A queue divided among processes gives the losses, gradients and states of one queue."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import rel_error
from ranks import leave_group
from torch import nn
from torch.distributed.tensor import DTensor

import moco_ext
from moco_ext import KeyQueue, MoCo
from moco_ext.sharded_queue import sharded_info_nce

pytest.importorskip("torchvision")
pytest.importorskip("tensorboard")
from test_distributed import in_two_processes
from training import few_digits, run_in, tiny

from moco_ext.checkpoints.training import load_checkpoint
from moco_ext.train import PretrainConfig, pretrain

N, C, K = 6, 16, 40


def encoder(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, num_classes))


def model(**options):
    torch.manual_seed(0)
    return MoCo(encoder, C, K, m=0.9, T=0.1, **options)


def images(step, view):
    return torch.randn(4 * N, 3, 2, 2, generator=torch.Generator().manual_seed(2 * step + view))


def ids(step):
    return torch.arange(4 * N) % 17 + step % 2  # images come again while their keys are in the queue


def train(moco, rank, world, steps=14, first=0):
    """Steps of SGD on this rank's part of 24 images a step, which enqueue 24 keys in a queue of 40."""
    optimizer = torch.optim.SGD(moco.encoder_q.parameters(), 0.1)
    rows, losses, ranks = slice(rank * 4 * N // world, (rank + 1) * 4 * N // world), [], []
    for step in range(first, first + steps):
        own = ids(step) if moco.same_id else None
        out = moco(images(step, 0)[rows], images(step, 1)[rows], ids=None if own is None else own[rows])
        optimizer.zero_grad()
        out.loss.backward()
        for p in moco.encoder_q.parameters():
            dist.all_reduce(p.grad)
            p.grad /= world
        optimizer.step()
        moco.update(out.keys, own)
        losses.append(out.loss.detach())
        ranks.append(out.stats.rank)
    return torch.stack(losses), torch.stack(ranks)


def check_training(rank, world):
    for options in ({}, {"empty": True}, {"same_id": "mask", "empty": True}, {"queue_dtype": torch.bfloat16}):
        one, sharded = model(**options), model(**options, queue_sharding=True)
        assert sharded.K == one.K == K
        assert len(sharded.queue) == K // world
        assert torch.equal(sharded.queue, one.queue.chunk(world)[rank])  # from the start
        (want, want_ranks), (got, got_ranks) = train(one, rank, world), train(sharded, rank, world)
        rounding = 100 if options.get("queue_dtype") else 1  # a key may round to the next bfloat16
        assert rel_error(got, want) <= rounding * 1e-5, options
        assert (got_ranks != want_ranks).float().mean() <= (0.05 if rounding > 1 else 0.01), (
            options
        )  # swapped neighbors
        for a, b in zip(sharded.encoder_q.parameters(), one.encoder_q.parameters(), strict=True):
            assert rel_error(a, b) <= rounding * 1e-4, options
        assert rel_error(sharded.queue, one.queue.chunk(world)[rank]) <= rounding * 1e-4, options
        for name, value in one.named_buffers(recurse=False):
            if name != "queue":
                assert torch.equal(getattr(sharded, name), value), (options, name)


def check_checkpoints(rank, world, folder):
    one, sharded = model(empty=True), model(empty=True, queue_sharding=True)
    train(sharded, rank, world)
    state = sharded.state_dict()
    assert isinstance(state["queue"], DTensor)
    assert state["queue"].shape == (C, K)
    full = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in state.items()}
    if rank == 0:
        torch.save(full, folder / "one.pth")
    dist.barrier()
    one.load_state_dict(torch.load(folder / "one.pth", weights_only=True))  # sharded -> one
    again = model(empty=True, queue_sharding=True)
    again.load_state_dict(one.state_dict())  # one -> sharded
    other = model(empty=True, queue_sharding=True)
    other.load_state_dict(state)  # sharded -> sharded
    for restored in (again, other):
        assert torch.equal(restored.queue, sharded.queue)
    want, _ = train(sharded, rank, world, steps=3, first=20)
    for restored in (one, again, other):
        assert rel_error(train(restored, rank, world, steps=3, first=20)[0], want) <= 1e-5
    for size in (2 * K, K // world):
        with pytest.raises(RuntimeError, match="size mismatch for queue"):
            again.load_state_dict(MoCo(encoder, C, size, empty=True).state_dict())
    early = model(queue_sharding=True)
    early.shards = 1  # as if it had been made before the process group
    with pytest.raises(RuntimeError, match=r"queue_sharding: expected the 1 processes .* got"):
        early(images(0, 0), images(0, 1))


def check_float64(rank, world):
    """Values and gradients of the operator; keys that are NaN in one shard reach every loss."""
    generator = torch.Generator().manual_seed(0)
    query, keys, queue = (
        torch.randn(n, C, dtype=torch.float64, generator=generator) for n in (world * N, world * N, K)
    )
    queue = nn.functional.normalize(queue, dim=1)
    rows = slice(rank * N, (rank + 1) * N)
    for T in (0.01, 0.07, 1.0):
        for scale in (1.0, 1e12):
            a, b = ((scale * query[rows]).requires_grad_() for _ in range(2))
            want, want_stats = moco_ext.info_nce(a, keys[rows], queue, T, return_stats=True)
            got, stats = sharded_info_nce(b, keys, queue.chunk(world)[rank].contiguous(), T)
            (2 * want).backward()
            (2 * got).backward()
            assert rel_error(got, want) <= 1e-12
            assert rel_error(b.grad, a.grad) <= 1e-9
            for x, y in zip(stats, want_stats, strict=True):
                assert torch.allclose(x, y, rtol=1e-12)
    shard = queue.chunk(world)[rank].contiguous()
    (grad,) = torch.autograd.grad(sharded_info_nce(b, keys, shard, 1.0)[0], b, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.sum().backward()
    if rank == 0:
        shard[0, 0] = torch.nan
    assert sharded_info_nce(query[rows], keys, shard, 1.0)[0].isnan()


def check_errors(rank, world):
    with pytest.raises(
        ValueError, match=f"K: expected a multiple of the {world} processes that share the queue, got 41"
    ):
        MoCo(encoder, C, 41, queue_sharding=True)
    for options in ({"label_smoothing": 0.1}, {"in_batch": True}, {"same_id": "positive"}, {"objective": "ressl"}):
        with pytest.raises(ValueError, match="queue_sharding: expected False with"):
            MoCo(encoder, C, K, queue_sharding=True, **options)


def run_rank(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    check_float64(rank, world)
    check_errors(rank, world)
    check_training(rank, world)
    check_checkpoints(rank, world, folder)
    leave_group()


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_equals_one_queue(tmp_path, world):
    torch.multiprocessing.spawn(run_rank, (world, tmp_path), nprocs=world)


def test_one_process_has_it_whole():
    one, sharded = model(), model(queue_sharding=True)
    assert sharded.shards == 1
    assert torch.equal(sharded(images(0, 0), images(0, 1)).loss, one(images(0, 0), images(0, 1)).loss)
    assert not isinstance(sharded.state_dict()["queue"], DTensor)


def test_first_keys_do_not_depend_on_the_shards(monkeypatch):
    """Blocks of several seeds, cut by the shards."""
    monkeypatch.setattr(moco_ext.queue, "_BLOCK", 7)
    whole = KeyQueue(3, 20).queue
    monkeypatch.setattr(moco_ext.distributed, "world_size", lambda: 4)
    parts = []
    for rank in range(4):
        monkeypatch.setattr(moco_ext.distributed, "rank", lambda rank=rank: rank)
        parts.append(KeyQueue(3, 20, sharded=True).queue)
    assert torch.equal(torch.cat(parts), whole)
    assert torch.allclose(whole.norm(dim=1), torch.ones(20))
    assert len(whole.unique(dim=0)) == 20


COMMAND = [sys.executable, "-m", "moco_ext", "pretrain", "--data", "digits", "--epochs", "1", "--workers", "0"]
COMMAND += ["--threads", "1", "--shard-queue", "--online-knn", "0", "--arch", "resnet8-small"]


def test_dry_run_divides_the_queue(tmp_path):
    for world, expected in ((1, "5.1"), (2, "2.6")):
        run = [*COMMAND, "--dry-run", "--moco-k", "10000", "--precision", "fp32", "--output", str(tmp_path / "run")]
        torchrun = {"RANK": "0", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        done = subprocess.run(run, capture_output=True, text=True, timeout=120, env=os.environ | torchrun)
        assert done.returncode == 0, done.stderr
        memory = [line for line in done.stdout.splitlines() if "dictionary" in line][-1]  # the first is the setting
        assert expected in memory
        assert ("queue of 10,000 keys over 2 processes" in done.stdout) == (world > 1)


def test_config_of_another_mechanism():
    with pytest.raises(ValueError, match="shard_queue: expected False with dictionary end-to-end, got True"):
        PretrainConfig("digits", dictionary="end-to-end", shard_queue=True)


# --- the trainer ------------------------------------------------------------------------------------------------------

RUNS = {
    "whole": {},
    "sharded": {"shard_queue": True},
    "sharded, folder": {"shard_queue": True, "checkpoint_format": "dcp"},
    "sharded, fsdp, folder": {"shard_queue": True, "checkpoint_format": "dcp", "parallel": "fsdp"},
}


def configured(name, epochs):
    settings = dict(RUNS[name])
    options = {option: settings.pop(option) for option in ("checkpoint_format", "parallel") if option in settings}
    return tiny(epochs=epochs, empty_queue=True, same_image="mask", **settings), options


def pretrain_both(args, options):
    for name in RUNS:
        config, parallel = configured(name, 1)
        pretrain(config, few_digits(), run_in(Path(args.arguments[0]) / name, local_world=2, print_freq=2, **parallel))
    return 0


@pytest.mark.slow
def test_runs_and_their_checkpoints(tmp_path):
    """Equal to a run with a whole queue; one process resumes from each."""
    in_two_processes(pretrain_both, str(tmp_path))
    want = load_checkpoint(tmp_path / "whole" / "checkpoint.pth")["state_dict"]
    for name in RUNS:
        got = load_checkpoint(tmp_path / name / "checkpoint.pth")["state_dict"]
        assert got.keys() == want.keys()
        for key, value in want.items():
            torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-4, msg=f"{name}: {key}")
    after = []
    for name in RUNS:
        for shard_queue in (True, False):
            config = dataclasses.replace(configured(name, 2)[0], shard_queue=shard_queue)
            run = tmp_path / f"{name}, {shard_queue}"
            after.append(pretrain(config, few_digits(), run_in(run, resume=tmp_path / name))[-1]["loss"])
    assert after == pytest.approx([after[0]] * len(after), rel=1e-4)
