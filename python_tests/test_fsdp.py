"""FSDP2 (``fully_shard``) around both encoders: the training of DistributedDataParallel, in shards."""

import copy
import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import leave_group
from test_moco import Tiny
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import moco_ext

pytest.importorskip("torchvision")
pytest.importorskip("tensorboard")
from test_distributed import in_two_processes as run_in_two_processes
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from training import assert_equal_states, few_digits, run_in, tiny

from moco_ext.checkpoints.training import load_checkpoint
from moco_ext.train import build_model, pretrain
from moco_ext.train.parallel import filled, hollow_copy, shard_

WORLD, STEPS, N = 2, 50, 6


def join(rank: int, path: Path) -> DeviceMesh:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=WORLD)
    return init_device_mesh("cpu", (WORLD,))


def in_two_processes(work, folder: Path) -> list[dict]:
    """``work(rank, folder)``, which saves its results as ``rankR.pt``, in two processes."""
    torch.multiprocessing.spawn(work, (folder,), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


class Wide(Tiny):
    """With a head of 9 rows, which two ranks share unevenly, and a norm of 1 feature, of which one rank has none."""

    def __init__(self, num_classes: int = 8) -> None:
        super().__init__(num_classes)
        self.fc = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 1), nn.BatchNorm1d(1), nn.Linear(1, 8))


def made(encoder: type[nn.Module] = Wide, **options) -> moco_ext.MoCo:
    torch.manual_seed(0)
    return moco_ext.MoCo(encoder, dim=8, K=48, m=0.9, **options)


def sharded(model: moco_ext.MoCo, mesh: DeviceMesh, policy: MixedPrecisionPolicy | None = None) -> moco_ext.MoCo:
    """Shard the body apart; with a policy, leave norms in float32, as autocast does."""
    for encoder in (model.encoder_q, model.encoder_k):
        options = {} if policy is None else {"mp_policy": policy}
        if policy is not None:
            norms = [layer for layer in encoder.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
            fully_shard(norms, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
        fully_shard(encoder.body, mesh=mesh, **options)
        fully_shard(encoder, mesh=mesh, **options)
    return model


def full(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone() for name, value in state.items()
    }


def steps(model: moco_ext.MoCo, forward: nn.Module, rank: int, count: int = STEPS, autocast: bool = False) -> dict:
    """The losses of ``count`` steps on this rank's images, and the gathered state after them."""
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.05, momentum=0.9)
    generator, losses = torch.Generator().manual_seed(7), []
    for _ in range(count):
        im_q, im_k = torch.randn(2, WORLD * N, 3, 8, 8, generator=generator)[:, rank * N :][:, :N].unbind()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = forward(im_q, im_k)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        model.update(out.keys)
        losses.append(out.loss.item())
    return {"losses": losses, "state": full(model.state_dict())}


class Launches(TorchDispatchMode):
    """Counts the momentum update's operator."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "moco_ext::momentum_update_" in str(function.name())
        return function(*args, **(kwargs or {}))


def one_update(model: moco_ext.MoCo, rank: int) -> dict:
    """Launches and collectives of one update; collectives of the forward pass before it."""
    images = torch.randn(2, N, 3, 8, 8, generator=torch.Generator().manual_seed(rank)).unbind()
    with CommDebugMode() as forward:
        out = model(*images)
    out.loss.backward()
    with CommDebugMode() as update, Launches() as launches:
        model.update(out.keys)
    return {
        "launches": launches.count,
        "in_forward": forward.get_total_counts(),
        "in_update": update.get_total_counts(),
        "sharded": all(isinstance(parameter, DTensor) for parameter in model.parameters()),
    }


def train(rank: int, folder: Path) -> None:
    mesh = join(rank, folder / "rendezvous")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    results = {}
    for name, mixed in (("fp32", False), ("bf16", True)):
        model = made()
        results[f"ddp {name}"] = steps(
            model, DistributedDataParallel(model, broadcast_buffers=False), rank, autocast=mixed
        )
        model = sharded(made(), mesh, policy if mixed else None)
        results[f"fsdp {name}"] = steps(model, model, rank, autocast=mixed)
        results[f"update {name}"] = one_update(model, rank)
    model = made(shuffle_bn="none")
    results["no shuffling"] = steps(sharded(model, mesh), model, rank)
    model = made()
    fully_shard(model, mesh=mesh)  # all in one group
    results["whole"] = steps(model, model, rank)
    torch.save(results, folder / f"rank{rank}.pt")
    leave_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return in_two_processes(train, tmp_path_factory.mktemp("fsdp"))


def difference(one: dict, other: dict) -> float:
    """The largest over losses and state."""
    assert one["state"].keys() == other["state"].keys()
    pairs = [(torch.tensor(one["losses"]), torch.tensor(other["losses"]))]
    pairs += [(value, other["state"][name]) for name, value in one["state"].items()]
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("run", ["fsdp fp32", "whole"])
def test_as_many_steps_as_with_ddp(trained, run):
    """Only the order in which gradients are summed differs, and from two ranks even that does not."""
    for results in trained:
        assert difference(results["ddp fp32"], results[run]) < 1e-5
    assert len(set(trained[0][run]["losses"])) == STEPS


def test_shuffling_bn_is_in_effect(trained):
    assert difference(trained[0]["fsdp fp32"], trained[0]["no shuffling"]) > 1e-2


def test_ranks_agree(trained):
    """On everything but BatchNorm's running statistics, which are each rank's own."""
    one, other = (results["fsdp fp32"]["state"] for results in trained)
    for name, value in one.items():
        assert torch.equal(value, other[name]) or "running" in name, name


def test_mixed_precision_is_that_of_autocast(trained):
    """The policy rounds weights to bfloat16 as autocast does, and sums gradients in float32 as DDP does."""
    for results in trained:
        assert difference(results["ddp bf16"], results["fsdp bf16"]) < 1e-5
    assert difference(trained[0]["fsdp fp32"], trained[0]["fsdp bf16"]) > 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_update_is_one_launch_and_gathers_nothing(trained, precision):
    for results in trained:
        counts = results[f"update {precision}"]
        assert (counts["launches"], counts["in_update"], counts["sharded"]) == (1, 0, True)
        assert counts["in_forward"] > 0


def refuse(rank: int, folder: Path) -> None:
    """Uneven shardings, and options that FSDP2 excludes; the state before and after."""
    mesh = join(rank, folder / "rendezvous")
    model = made()
    fully_shard(model.encoder_q, mesh=mesh)
    before = full(model.state_dict())
    with pytest.raises(ValueError, match=r"query_params\[0\]: expected the sharding of key_params\[0\], none, got"):
        model.update(torch.randn(N, 8))
    for name, value in full(model.state_dict()).items():
        assert torch.equal(value, before[name]), name

    model = sharded(made(Tiny, low_precision=torch.bfloat16), mesh)
    with pytest.raises(TypeError, match=r"module: expected plain tensors, got DTensor; .* MixedPrecisionPolicy"):
        model(torch.randn(N, 3, 8, 8), torch.randn(N, 3, 8, 8))
    with pytest.raises(TypeError, match="module: expected plain tensors, got DTensor"):
        moco_ext.flatten_parameters_(model.encoder_q)

    model = sharded(made(), mesh).to(torch.float64)  # moved, and still in shards
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())

    whole = torch.arange(10.0).view(5, 2)
    key, query = (distribute_tensor(whole * factor, mesh) for factor in (1.0, 3.0))
    moco_ext.momentum_update_([key], [query], 0.5)
    assert torch.equal(key.full_tensor(), whole * 2)
    leave_group()


def test_what_cannot_be_sharded_is_refused(tmp_path):
    torch.multiprocessing.spawn(refuse, (tmp_path,), nprocs=WORLD)


def train_compiled(rank: int, folder: Path) -> None:
    mesh = join(rank, folder / "rendezvous")
    model = made()
    results = {"ddp": steps(model, DistributedDataParallel(model, broadcast_buffers=False), rank, 10)}
    model = sharded(made(), mesh)
    for encoder in (model.encoder_q, model.encoder_k):
        encoder.compile()
    results["compiled"] = steps(model, model, rank, 10)
    torch.save(results, folder / f"rank{rank}.pt")
    leave_group()


@pytest.mark.slow
def test_compiled_encoders(tmp_path):
    """Compiled kernels round differently."""
    for results in in_two_processes(train_compiled, tmp_path):
        assert difference(results["ddp"], results["compiled"]) < 1e-3


# --- the trainer ------------------------------------------------------------------------------------------------------

RUNS = {
    "accumulated": {"precision": "bf16", "accumulate": 2, "batch_size": 16, "symmetric": True, "clip_grad": 0.5},
    "scaled": {"precision": "fp16"},  # whose first steps overflow and are skipped
    "batch": {"dictionary": "batch", "moco_mlp_dim": 32, "optimizer": "adamw", "lr": 0.001, "online_knn": 1},
}


def pretrain_sharded(args, options) -> int:
    (folder,) = args.arguments
    data, results = few_digits(), {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, settings in RUNS.items():
            for parallel in ("ddp", "fsdp"):
                run = run_in(Path(folder) / name / parallel, local_world=2, parallel=parallel, print_freq=2)
                results[f"{name} {parallel}"] = pretrain(tiny(epochs=1, **settings), data, run)
    results["warnings"] = [str(warning.message) for warning in caught]

    config = tiny(key_encoder="partial")
    with pytest.raises(ValueError, match="parallel: expected ddp with encoders that share layers, got fsdp"):
        pretrain(config, data, run_in(Path(folder) / "partial", local_world=2, parallel="fsdp"))
    config = tiny(compile=True, compile_mode="reduce-overhead")
    with pytest.raises(ValueError, match=r"compile_mode: expected default or .* with parallel fsdp"):
        pretrain(config, data, run_in(Path(folder) / "graphs", local_world=2, parallel="fsdp"))

    model = build_model(tiny())
    hollow, before = hollow_copy(model.encoder_q), copy.deepcopy(model.encoder_q.state_dict())
    assert all(parameter.is_meta for parameter in hollow.parameters())
    shard_(model, torch.device("cpu"), torch.bfloat16)
    groups = [name for name, layer in model.encoder_q.named_modules() if isinstance(layer, FSDPModule)]
    results["groups"] = [name for name in groups if "bn" not in name and "downsample" not in name]
    assert_equal_states(before, filled(hollow, model.encoder_q).state_dict())
    torch.save(results, f"{folder}/rank{dist.get_rank()}.pt")
    return 0


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    run_in_two_processes(pretrain_sharded, str(folder))
    return folder, torch.load(folder / "rank0.pt")


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_the_trainer_equals_ddp(pretrained, run):
    """In checkpoint and metrics; 16-bit weights may round the other way after a difference in the last bit."""
    folder, results = pretrained
    ddp, fsdp = (load_checkpoint(folder / run / parallel / "checkpoint.pth") for parallel in ("ddp", "fsdp"))
    tolerance = 1e-3 if RUNS[run].get("precision") else 1e-5
    assert ddp["state_dict"].keys() == fsdp["state_dict"].keys()
    for name, value in ddp["state_dict"].items():
        torch.testing.assert_close(fsdp["state_dict"][name], value, rtol=tolerance, atol=tolerance)
    assert ddp["trainer"]["updates"] == fsdp["trainer"]["updates"]
    assert ddp["trainer"]["scaler"] == fsdp["trainer"]["scaler"]
    one, other = results[f"{run} ddp"][0], results[f"{run} fsdp"][0]
    assert one.keys() == other.keys()
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert one["knn_top1"] == pytest.approx(other["knn_top1"], abs=4)  # two of 60 images
    assert one.get("skipped_steps") == other.get("skipped_steps")
    assert (one.get("skipped_steps", 0) > 0) == (run == "scaled")


@pytest.mark.slow
def test_sharding_causes_no_warnings(pretrained):
    """Such as that the update was forgotten, as the parameters of a root module change their identity."""
    assert not [message for message in pretrained[1]["warnings"] if "update" in message]


@pytest.mark.slow
def test_each_block_is_a_group(pretrained):
    assert pretrained[1]["groups"] == ["", "layer1.0", "layer2.0", "layer3.0"]
