"""Shuffling BN: groups on one device against separate batches, and processes against a simulation in one."""

import contextlib
import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import leave_group
from test_moco import Tiny, tiny_moco
from torch import nn
from torch._subclasses import FakeTensorMode

import moco_ext
from moco_ext.distributed import all_gather
from moco_ext.shuffle_bn import SplitBatchNorm, convert_split_bn, shared_permutation, start_shuffle, unshuffle

LAYERS = {
    "1d": nn.BatchNorm1d(5),
    "2d cumulative": nn.BatchNorm2d(5, momentum=None),
    "2d without affine": nn.BatchNorm2d(5, affine=False),
}
# The last: groups of one image, which only have a variance where an image has many values a channel.
GROUPED = [(name, n, g) for n, g in [(12, 4), (12, 1), (10, 4), (3, 8)] for name in LAYERS if n > g or name != "1d"]


@pytest.mark.parametrize(("layer", "n", "groups"), GROUPED)
def test_each_group_is_normalized_alone(device, layer, n, groups):
    torch.manual_seed(0)
    layer = LAYERS[layer]
    shape = (n, 5) if isinstance(layer, nn.BatchNorm1d) else (n, 5, 3, 4)
    x = torch.randn(shape, device=device, requires_grad=True)
    plain = copy.deepcopy(layer).to(device)
    split = convert_split_bn(copy.deepcopy(layer).to(device), groups)
    weight = torch.randn(shape, device=device)
    out = split(x)
    (grad,) = torch.autograd.grad((out * weight).sum(), x)

    y = x.detach().clone().requires_grad_()
    parts = [plain(y[g::groups]) for g in range(min(n, groups))]
    expected = torch.empty_like(out)
    for g, part in enumerate(parts):
        expected[g::groups] = part
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, torch.autograd.grad((expected * weight).sum(), y)[0], rtol=1e-4, atol=1e-5)


def test_running_statistics_move_once_by_the_mean_of_the_groups(device):
    x = torch.randn(8, 3, 2, 2, device=device)
    split = SplitBatchNorm(3, 2, momentum=0.1).to(device)
    split(x)
    means = torch.stack([x[g::2].mean((0, 2, 3)) for g in range(2)]).mean(0)
    variances = torch.stack([x[g::2].var((0, 2, 3)) for g in range(2)]).mean(0)
    torch.testing.assert_close(split.running_mean, 0.1 * means)
    torch.testing.assert_close(split.running_var, 0.9 + 0.1 * variances)
    assert split.num_batches_tracked.item() == 1


def test_evaluation_and_state_dict_are_plain_batchnorms(device):
    plain = Tiny().to(device)
    split = convert_split_bn(copy.deepcopy(plain), 4)
    assert split.state_dict().keys() == plain.state_dict().keys()
    split.load_state_dict(plain.state_dict())
    x = torch.randn(6, 3, 8, 8, device=device)
    torch.testing.assert_close(split.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "test_byobnet"])
def test_activations_within_timms_batchnorms_are_kept(device, name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=8).to(device)
    split = convert_split_bn(copy.deepcopy(plain), 2)
    assert split.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(4, 3, 32, 32, device=device)
    torch.testing.assert_close(split.eval()(x), plain.eval()(x))
    layer = timm.layers.BatchNormAct2d(3).to(device)
    out = convert_split_bn(copy.deepcopy(layer), 2)(x)
    torch.testing.assert_close(out, torch.stack([layer(x[g::2]) for g in range(2)], dim=1).flatten(0, 1))


def test_a_layer_of_two_names_is_converted_under_both():
    norm = nn.BatchNorm2d(3)
    split = convert_split_bn(nn.Sequential(norm, nn.ReLU(), norm), 2)
    x = torch.randn(4, 3, 5, 5)
    groups = convert_split_bn(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)), 2)(x)
    torch.testing.assert_close(split(x), groups)
    assert split[2].weight is split[0].weight


def test_a_batchnorm_that_does_something_else_is_refused():
    class Scaled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="split_bn: expected BatchNorm layers of torch or timm, got Scaled"):
        convert_split_bn(nn.Sequential(Scaled(3)), 2)


def test_split_keys_are_encoded_in_other_groups_than_queries(device):
    """On one device the model permutes the keys across groups, and puts them back in order."""
    model = tiny_moco(device, split_bn=2)
    images = torch.randn(8, 3, 8, 8, device=device)
    order = torch.randperm(8)
    keys = model(images, images, key_order=order).keys
    shuffled = copy.deepcopy(model.encoder_k)(images[order.to(device)])
    torch.testing.assert_close(keys[order.to(device)], shuffled)
    assert (keys - model.encoder_k(images)).abs().max() > 1e-3


def test_model_with_split_bn_trains_on_any_batch(device):
    model = tiny_moco(device, split_bn=4)
    for n in (8, 10):
        out = model(torch.randn(n, 3, 8, 8, device=device), torch.randn(n, 3, 8, 8, device=device))
        out.loss.backward()
        model.update(out.keys)
    assert model.queue_ptr.item() == 18


# --- several processes ------------------------------------------------------------------------------------------------

WORLD, PER_RANK = 2, 6


def global_images() -> torch.Tensor:
    return torch.randn(WORLD * PER_RANK, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def shuffled_in_one_process(step: int) -> torch.Tensor:
    """What the ranks together must compute: each permuted slice through BatchNorm of its own, put back in order."""
    torch.manual_seed(0)
    encoder = Tiny()
    order = shared_permutation(WORLD * PER_RANK, step)
    keys = torch.cat([encoder(global_images()[part]) for part in order.chunk(WORLD)])
    return keys[order.argsort()].detach()


def encode_shuffled(encoder, images: torch.Tensor, mode: str, order: torch.Tensor | None) -> torch.Tensor:
    arriving = start_shuffle(images, order, mode)
    with torch.no_grad():
        return unshuffle(all_gather(encoder(images if arriving is None else arriving())), order)


@contextlib.contextmanager
def received_bytes():
    """Bytes that collectives write here, one number a call."""
    sizes = []
    originals = {name: getattr(dist, name) for name in ("all_gather_into_tensor", "all_to_all_single")}

    def counted(name):
        def collective(out, *args, **options):
            sizes.append(out.numel() * out.element_size())
            return originals[name](out, *args, **options)

        return collective

    for name in originals:
        setattr(dist, name, counted(name))
    try:
        yield sizes
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def in_rank(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    results = {}
    mine = global_images().chunk(WORLD)[rank]
    for mode in ("gather", "all_to_all", "loader", "none"):
        for step in (0, 1):
            torch.manual_seed(0)
            order = shared_permutation(WORLD * PER_RANK, step)
            given = global_images()[order].chunk(WORLD)[rank] if mode == "loader" else mine
            with received_bytes() as received:
                results[mode, step] = encode_shuffled(Tiny(), given, mode, None if mode == "none" else order)
            results["bytes", mode] = sum(received)

    torch.manual_seed(100 + rank)  # DDP must make the encoders equal; the queues are so by construction
    model = moco_ext.MoCo(Tiny, dim=8, K=30, m=0.9)
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.1)
    for _ in range(4):
        out = ddp(mine, mine + 0.1)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        model.update(out.keys)
    results["state"] = copy.deepcopy(model.state_dict())
    model.queue.fill_(rank)  # a broadcast of buffers in the next forward would make rank 1's queue rank 0's
    ddp(mine, mine)
    results["queue_is_its_own"] = bool((model.queue == rank).all())
    torch.save(results, f"{folder}/{rank}.pt")
    leave_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    port = 29500 + os.getpid() % 2000
    mp.start_processes(in_rank, args=(port, str(folder)), nprocs=WORLD, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("mode", ["gather", "all_to_all", "loader"])
def test_processes_match_a_simulation_in_one(ranks, mode, step):
    for results in ranks:
        torch.testing.assert_close(results[mode, step], shuffled_in_one_process(step), rtol=1e-4, atol=1e-5)


def test_bytes_that_travel(ranks):
    """all_to_all moves 1/world of gather's images, loader none; the keys of all ranks come on top, once."""
    image, key = 3 * 8 * 8 * 4, 8 * 4
    keys = WORLD * PER_RANK * key
    for results in ranks:
        assert results["bytes", "gather"] == WORLD * PER_RANK * image + keys
        assert results["bytes", "all_to_all"] == results["bytes", "gather"] // WORLD + keys // WORLD
        assert results["bytes", "loader"] == results["bytes", "none"] == keys


def test_keys_are_encoded_anywhere():
    """A rank's slots take keys from the whole global batch: by chance 1/world of its own, as in the published code."""
    n, world, draws = 32, 8, 50
    own = torch.arange(world)[:, None]
    stay = [(shared_permutation(world * n, step).view(world, n) // n == own).double().mean() for step in range(draws)]
    sigma = (1 / world * (1 - 1 / world) / (draws * world * n)) ** 0.5
    assert abs(sum(stay) / draws - 1 / world) < 5 * sigma


def test_an_order_that_is_no_permutation(device):
    model = tiny_moco(device, split_bn=2)
    images = torch.randn(4, 3, 8, 8, device=device)
    with pytest.raises(ValueError, match=r"key_order: expected \[4\], .* got \[3\]"):
        model(images, images, key_order=torch.arange(3))
    for order in ([0, 1, 1, 3], [1, 2, 3, 4]):
        with pytest.raises(ValueError, match=r"key_order: expected each of 0 to 3 once, got \[\d, \d, \d, \d\]"):
            model(images, images, key_order=torch.tensor(order))
    model = tiny_moco(device, shuffle_bn="loader")
    with pytest.raises(ValueError, match="key_order: expected the permutation with which the loader shuffled"):
        model(images, images)


def test_permutations_differ_by_step_and_mix_ranks():
    first, second = shared_permutation(64, 0), shared_permutation(64, 1)
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, torch.arange(64))
    assert (first[:32] >= 32).any()


def test_without_shuffling_each_rank_encodes_its_own(ranks):
    torch.manual_seed(0)
    encoder = Tiny()
    expected = torch.cat([encoder(part) for part in global_images().chunk(WORLD)])
    torch.testing.assert_close(ranks[0]["none", 0], expected.detach(), rtol=1e-4, atol=1e-5)


def test_ranks_hold_equal_models_and_queues(ranks):
    for name, value in ranks[0]["state"].items():
        if "running" not in name:  # BatchNorm's statistics are each rank's own until DDP's next forward
            assert torch.equal(value, ranks[1]["state"][name]), name
    assert ranks[0]["state"]["queue_ptr"].item() == 4 * WORLD * PER_RANK % 30


def test_ddp_does_not_broadcast_the_queue(ranks):
    assert all(results["queue_is_its_own"] for results in ranks)


def test_pinned_memory_is_not_traced():
    """A compiled model that shuffles failed on a GPU, as fake tensors cannot be pinned: torch.compile said so, with a
    TorchRuntimeError. Here all tensors are fake, so the untraced call says it."""
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(AssertionError, match=r"NYI: .*_pin_memory"):
        torch.compile(unshuffle, backend="eager")(torch.zeros(4, 2, device="cuda"), torch.arange(4))
