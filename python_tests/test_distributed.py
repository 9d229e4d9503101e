"""The trainer in several processes (gloo): every shuffling mode trains alike, and failing ranks end the run."""

import argparse
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip("torchvision")
pytest.importorskip("tensorboard")
from test_moco import Tiny
from training import assert_equal_states, environment, few_digits, run_in, tiny, torchrun

from moco_ext import EndToEnd, MoCo, info_nce
from moco_ext.cli import launch as launching
from moco_ext.runs.options import RunOptions
from moco_ext.train import build_model, pretrain

WORLD = 2
MODES = ("gather", "all_to_all", "loader", "none")


def of_a_group(rank: int, port: int, work, *arguments: object) -> None:
    """Run ``work`` as a process of a group of two, with torchrun's environment variables."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", RANK=str(rank), LOCAL_RANK=str(rank)
    )
    os.environ.update(WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    args = argparse.Namespace(arguments=arguments, device="cpu")
    launching.run(work, args, Path())


def in_two_processes(work, *arguments: object) -> None:
    port = 31500 + os.getpid() % 2000
    mp.start_processes(of_a_group, args=(port, work, *arguments), nprocs=WORLD, start_method="spawn")


# --- the model ------------------------------------------------------------------------------------------------------


def batches(steps: int, n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [(torch.randn(n, 3, 8, 8, generator=generator), torch.randn(n, 3, 8, 8, generator=generator))] * steps


def model_steps(args: argparse.Namespace, options: RunOptions) -> int:
    """Ten steps on every second image of each batch; the losses, averaged over the ranks."""
    rank, (folder,) = dist.get_rank(), args.arguments
    torch.manual_seed(0)
    model = MoCo(Tiny, dim=8, K=48, m=0.9)
    ddp = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    losses = []
    for step, (im_q, im_k) in enumerate(batches(10, 12)):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(step))
        out = ddp(im_q[rank::WORLD], im_k[rank::WORLD], key_order=order)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        model.update(out.keys)
        loss = out.loss.detach()
        dist.all_reduce(loss)
        losses.append(loss.item() / WORLD)

    torch.manual_seed(
        1
    )  # end to end: every rank's keys are negatives of all, gradients go back to where they came from
    both = EndToEnd(Tiny, dim=8, key_encoder="different", shuffle_bn="all_to_all")
    ddp = torch.nn.parallel.DistributedDataParallel(both, broadcast_buffers=False)
    im_q, im_k = batches(1, 12)[0]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    ddp(im_q.chunk(WORLD)[rank], im_k.chunk(WORLD)[rank], key_order=order).loss.backward()
    grads = {name: parameter.grad for name, parameter in both.named_parameters()}
    torch.save({"losses": losses, "grads": grads}, f"{folder}/model{rank}.pt")
    return 0


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    in_two_processes(model_steps, str(folder))
    return [torch.load(folder / f"model{rank}.pt") for rank in range(WORLD)]


def test_split_bn_on_one_device_equals_as_many_processes(of_ranks):
    """Group g of a batch holds the images i with i mod G = g, as process g does above."""
    torch.manual_seed(0)
    model = MoCo(Tiny, dim=8, K=48, m=0.9, split_bn=WORLD)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    n = 12 // WORLD
    slots = torch.arange(12)
    strided = WORLD * (slots % n) + slots // n  # row r * n + i of the processes' batch is image i * WORLD + r
    losses = []
    for step, (im_q, im_k) in enumerate(batches(10, 12)):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(step))
        here = torch.empty_like(order)
        here[strided] = strided[order]
        out = model(im_q, im_k, key_order=here)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        model.update(out.keys)
        losses.append(out.loss.item())
    assert len(set(losses)) == 10
    assert of_ranks[0]["losses"] == of_ranks[1]["losses"]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(of_ranks[0]["losses"]), rtol=1e-5, atol=1e-5)


def test_end_to_end_gradients_cross_processes(of_ranks):
    torch.manual_seed(1)
    model = EndToEnd(Tiny, dim=8, key_encoder="different", shuffle_bn="all_to_all")
    im_q, im_k = batches(1, 12)[0]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    queries = torch.cat([model.encoder_q(part) for part in im_q.chunk(WORLD)])
    keys = torch.cat([model.encoder_k(im_k[part]) for part in order.chunk(WORLD)])[order.argsort()]
    info_nce(queries, keys, None, model.T, in_batch=True).backward()
    for name, parameter in model.named_parameters():
        for results in of_ranks:
            torch.testing.assert_close(results["grads"][name], parameter.grad, rtol=1e-3, atol=1e-5)


# --- the trainer ------------------------------------------------------------------------------------------------------


def train_in_every_mode(args: argparse.Namespace, options: RunOptions) -> int:
    """Losses and this rank's state for each mode of shuffling BN, and for a run resumed in the middle."""
    (folder,) = args.arguments
    data, results = few_digits(), {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for mode in (*MODES, "masked"):
            own = {"same_image": "mask", "in_batch": True} if mode == "masked" else {"shuffle_bn": mode}
            config = tiny(epochs=1, **own)
            model = build_model(config)
            run = run_in(Path(folder) / mode, local_world=options.local_world, save_every=3, keep=9)
            records = pretrain(config, data, run, model)
            results[mode] = {"state": model.state_dict(), "losses": [record["loss"] for record in records]}
    results["warnings"] = [str(warning.message) for warning in caught]
    config = tiny(epochs=1, shuffle_bn="gather")
    model = build_model(config)
    middle = Path(folder) / "gather" / "checkpoint_00000003.pth"
    run = run_in(Path(folder) / "resumed", local_world=options.local_world, resume=middle)
    records = pretrain(config, data, run, model)
    results["resumed"] = {"state": model.state_dict(), "losses": [record["loss"] for record in records]}
    torch.save(results, f"{folder}/rank{dist.get_rank()}.pt")
    return 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    in_two_processes(train_in_every_mode, str(folder))
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


def learned(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state without BatchNorm's running statistics, which differ between ranks."""
    return {name: value for name, value in state.items() if "running" not in name}


@pytest.mark.parametrize("mode", [*MODES, "masked"])
def test_ranks_agree(trained, mode):
    assert_equal_states(*(learned(results[mode]["state"]) for results in trained))
    # 150 images: four batches of 32 and one of 22, eleven a rank; K = 100
    assert trained[0][mode]["state"]["queue_ptr"].item() == 50


def test_gradients_have_the_strides_that_ddp_expects(trained):
    """Images are channels_last by default, so the gradients of 1x1 kernels are, too."""
    assert not [message for results in trained for message in results["warnings"] if "Grad strides" in message]


@pytest.mark.parametrize("mode", ["all_to_all", "loader"])
def test_modes_are_the_same_training(trained, mode):
    """The permutation is the same, so the keys and their groups are: only how images are sent differs."""
    assert_equal_states(trained[0]["gather"]["state"], trained[0][mode]["state"])


def test_every_rank_knows_the_ids_of_all_keys(trained):
    """An epoch shows each image once, so 100 keys have 100 ids; half of each batch came from the other rank."""
    state = trained[0]["masked"]["state"]
    assert len(set(state["queue_ids"].tolist())) == 100
    assert state["queue_ids"].min() >= 0
    assert trained[0]["masked"]["losses"] != trained[0]["gather"]["losses"]


def test_without_shuffling_it_is_another_training(trained):
    assert trained[0]["gather"]["losses"] != trained[0]["none"]["losses"]


def test_resumed_in_a_group(trained):
    """Equal on rank 0, whose statistics are in the checkpoint; on other ranks, equal learned parameters."""
    assert_equal_states(trained[0]["gather"]["state"], trained[0]["resumed"]["state"])
    assert_equal_states(learned(trained[1]["gather"]["state"]), learned(trained[1]["resumed"]["state"]))
    # The epoch's mean, of which the checkpoint has a part: that of both ranks.
    assert trained[0]["resumed"]["losses"] == trained[0]["gather"]["losses"]


# --- failures and flags -----------------------------------------------------------------------------------------------

FAILING = """
import os, signal, sys
from pathlib import Path
import torch
from moco_ext import distributed
from moco_ext.cli.errors import guarded
from moco_ext.cli import launch
from moco_ext.train import build_model, pretrain
from moco_ext.train.trainer import Trainer
from training import few_digits, run_in, tiny
import argparse

def work(args, options):
    train_step = Trainer._train_step
    def fail(self, batches, *rest):
        if self.step == 7 and distributed.rank() == 1:
            if sys.argv[2] == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            batches[0].im_q.fill_(float("nan"))
        train_step(self, batches, *rest)
    Trainer._train_step = fail
    run = run_in(Path(sys.argv[1]), local_world=options.local_world, save_every=1)
    pretrain(tiny(shuffle_bn="none"), few_digits(), run)
    return 0

sys.exit(guarded(lambda: launch.run(work, argparse.Namespace(device="cpu"), Path())))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dies", "nan"])
def test_a_lost_rank_ends_the_run_and_loses_nothing(tmp_path, how):
    """The other rank ends too, and the last checkpoint is from before the bad step."""
    program = tmp_path / "failing.py"
    program.write_text(FAILING)
    done = torchrun(WORLD, program, tmp_path / "run", how)
    assert done.returncode != 0
    message = {
        "dies": "process group: rank 0 has lost contact with another rank",
        "nan": "loss: expected a finite number, got nan in epoch 2, step 3",
    }[how]
    assert message in done.stderr
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    assert checkpoint["trainer"]["step"] == 7
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


@pytest.mark.slow
def test_multiprocessing_distributed_on_a_machine_without_gpus(tmp_path):
    """One process is started, trains on the CPU, and evaluates."""
    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    command = [sys.executable, "-m", "moco_ext", "pretrain", "--data", "digits", "--multiprocessing-distributed"]
    flags = ["--world-size", "1", "--rank", "0", "--steps", "2", "--output", str(tmp_path), "-j", "0"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120, env=environment())
    assert done.returncode == 0, done.stderr
    assert "no GPU that torch can use: training on the CPU" in done.stdout
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"multiprocessing_distributed": True, "world_size": 2},
            "dist_url: expected where the 2 nodes find",
        ),
        ({"world_size": 2, "rank": 0}, "rank, dist_url: expected both with --world-size 2, got --rank"),
        ({"device": "gpu"}, "device: "),
    ],
)
def test_flags_that_do_not_fit(flags, message):
    with pytest.raises(ValueError, match=message):
        launching.run(lambda args, options: 0, argparse.Namespace(**flags), Path())


def test_nccl_needs_gpus(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match="dist_backend: expected gloo on cpu, got nccl"):
        launching.run(lambda args, options: 0, argparse.Namespace(device="cpu", dist_backend="nccl"), Path())


@pytest.mark.parametrize(("flags", "current"), [({}, None), ({"gpu": 1}, 1), ({"device": "cuda:1"}, 1)])
def test_the_chosen_gpu_is_the_current_one(monkeypatch, tmp_path, flags, current):
    """Without a process group too, where pinned memory and its context went to the first GPU."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert launching.run(lambda args, options: 0, argparse.Namespace(**flags), tmp_path) == 0
    assert chosen == ([] if current is None else [torch.device("cuda", current)])


@pytest.mark.slow
def test_sigterm_is_agreed_on_by_all_ranks(tmp_path):
    """One rank gets the signal; both end after the same step, which is in the checkpoint."""
    program = tmp_path / "stopped.py"
    program.write_text(
        FAILING.replace("os.kill(os.getpid(), signal.SIGKILL)", "os.kill(os.getpid(), signal.SIGTERM)")
        .replace("save_every=1", "print_freq=4")
        .replace("batches[0].im_q.fill_", "batches[0].share == 0 and batches[0].im_q.fill_")
    )
    done = torchrun(WORLD, program, tmp_path / "run", "dies")
    assert done.returncode != 0
    assert torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)["trainer"]["step"] == 8
    assert "exitcode" in done.stderr or signal.SIGTERM.name in done.stderr
