"""FSDP2 (``fully_shard``) around both encoders: the training of DistributedDataParallel, in shards."""

import os
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

pytest.importorskip("torch.distributed.fsdp")
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

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
