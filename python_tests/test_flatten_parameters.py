"""Parameters in one buffer: what changes, what stays the same, and when a new buffer is made."""

import copy

import pytest
import torch
from torch import nn

import moco_ext
import moco_ext.reference
from moco_ext.momentum import update_key_encoder_


@pytest.fixture(params=["moco_ext", "reference"])
def flatten_(request):
    return (moco_ext if request.param == "moco_ext" else moco_ext.reference).flatten_parameters_


def network(device, dtype=torch.float32) -> nn.Module:
    """Weights of several shapes, a 0-dim one, one frozen, one tied, and buffers."""
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 7), nn.Linear(7, 7))
    net.scale = nn.Parameter(torch.tensor(2.0))
    net[3].bias.requires_grad_(False)
    net[4].tied = net[4].weight
    return net.to(device, dtype)


def assert_views_of(buffer, module):
    """The buffer contains every parameter, without overlap."""
    assert buffer.dim() == 1
    assert buffer.is_contiguous()
    assert not buffer.requires_grad
    params = list(module.parameters())
    assert buffer.numel() >= sum(p.numel() for p in params)
    buffer.fill_(0)
    for number, p in enumerate(params, start=1):
        with torch.no_grad():
            p.fill_(number)
        assert (buffer == number).sum() == p.numel(), "not in the buffer, or overwritten by a neighbor"
    for number, p in enumerate(params, start=1):
        assert (p == number).all()
    buffer.fill_(-1)
    assert all((p == -1).all() for p in params)


def test_nothing_visible_changes(device, flatten_):
    net = network(device)
    x = torch.randn(2, 3, 4, 4, device=device)
    net(x).sum().backward()
    net.eval()
    params = dict(net.named_parameters())
    grads = {name: p.grad for name, p in params.items()}
    requires = {name: p.requires_grad for name, p in params.items()}
    values = {name: v.clone() for name, v in net.state_dict().items()}
    output = net(x)

    flatten_(net)
    assert all(p is params[name] for name, p in net.named_parameters())  # which an optimizer refers to
    assert all(p.grad is grads[name] for name, p in params.items())
    assert {name: p.requires_grad for name, p in params.items()} == requires
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in params.values())
    after = net.state_dict()
    assert after.keys() == values.keys()
    assert all(torch.equal(after[name], values[name]) for name in values)
    assert torch.equal(net(x), output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_parameters_are_in_one_buffer(device, flatten_, dtype):
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is for the CPU")
    net = network(device, dtype)
    buffer = flatten_(net)
    assert buffer.dtype == dtype
    assert buffer.device.type == device.type
    assert net[4].tied is net[4].weight
    assert_views_of(buffer, net)


def test_values_are_in_the_order_of_the_parameters(device, flatten_):
    """Two networks of one architecture line up element by element, so one update moves them all."""
    buffers = [flatten_(network(device)) for _ in range(2)]
    assert buffers[0].shape == buffers[1].shape
    net = network(device)
    want = torch.cat([p.detach().flatten() for p in net.parameters()])
    buffer = flatten_(net)
    assert torch.equal(buffer[buffer != 0], want[want != 0])  # padding is zero


def test_flattening_again_returns_the_same_buffer(device, flatten_):
    net = network(device)
    first = flatten_(net)
    values = first.clone()
    second = flatten_(net)
    assert second.data_ptr() == first.data_ptr()
    assert second.shape == first.shape
    assert torch.equal(second, values)


@pytest.mark.parametrize("how", ["deepcopy", "dtype", "replaced parameter", "replaced data"])
def test_moved_parameters_get_a_new_buffer(device, flatten_, how):
    net = network(device)
    old = flatten_(net)
    if how == "deepcopy":
        net = copy.deepcopy(net)
    elif how == "dtype":
        net.to(torch.bfloat16)
    elif how == "replaced parameter":
        net[3].weight = nn.Parameter(torch.full((7, 20), 3.0, device=device))
    else:
        net[3].weight.data = torch.full((7, 20), 3.0, device=device)
    values = [p.detach().clone() for p in net.parameters()]
    new = flatten_(net)
    assert new.data_ptr() != old.data_ptr()
    assert all(map(torch.equal, [p.detach() for p in net.parameters()], values))
    assert_views_of(new, net)


def test_optimizer_steps_change_the_buffer(device, flatten_):
    net = network(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    buffer = flatten_(net)
    before = buffer.clone()
    net(torch.randn(2, 3, 4, 4, device=device)).sum().backward()
    optimizer.step()
    assert not torch.equal(buffer, before)
    assert_views_of(buffer, net)


def test_load_state_dict_writes_through(device, flatten_):
    source, net = network(device), network(device)
    buffer = flatten_(net)
    net.load_state_dict(source.state_dict())
    assert all(map(torch.equal, net.parameters(), source.parameters()))
    assert flatten_(net).data_ptr() == buffer.data_ptr()
    assert_views_of(buffer, net)


def test_channels_last_values_survive(device, flatten_):
    net = network(device).to(memory_format=torch.channels_last)
    values = [p.detach().clone() for p in net.parameters()]
    flatten_(net)
    assert all(map(torch.equal, [p.detach() for p in net.parameters()], values))


def test_one_update_of_two_buffers_is_the_update_of_all(device):
    query, key = network(device), network(device)
    want = [0.9 * k.detach() + 0.1 * q.detach() for k, q in zip(key.parameters(), query.parameters(), strict=True)]
    moco_ext.momentum_update_([moco_ext.flatten_parameters_(key)], [moco_ext.flatten_parameters_(query)], 0.9)
    torch.testing.assert_close([p.detach() for p in key.parameters()], want, rtol=1e-6, atol=1e-6)


def test_flat_encoders_of_other_shapes_are_refused(device):
    """Both buffers have 32 elements, because each parameter is padded to 16."""
    key, query = nn.Linear(2, 4).to(device), nn.Linear(2, 3).to(device)
    before = moco_ext.flatten_parameters_(key).clone()
    moco_ext.flatten_parameters_(query)
    with pytest.raises(ValueError, match=r"encoders: expected weight of the same shape on both sides, got \[3, 2\]"):
        update_key_encoder_(key, query, 0.5)
    assert torch.equal(moco_ext.flatten_parameters_(key), before)


@pytest.mark.parametrize("flatten", [False, True])
def test_encoders_that_register_their_layers_in_another_order_are_refused(device, flatten):
    """Layers of the same shape would be mixed with each other."""
    key, query = (nn.ModuleDict({name: nn.Linear(3, 3) for name in names}).to(device) for names in ("ab", "ba"))
    before = key["a"].weight.detach().clone()
    with pytest.raises(ValueError, match=r"encoders: .* same order .* got b\.weight in the query encoder .* a\.weight"):
        update_key_encoder_(key, query, 0.0, flatten=flatten)
    assert torch.equal(key["a"].weight, before)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("part", ["encoder", "layer"])
@pytest.mark.parametrize("wrap", [lambda module: torch.compile(module, backend="eager"), nn.DataParallel])
def test_only_the_query_encoder_is_wrapped(device, wrap, part, flatten):
    """Lightly's update_momentum, which goes by position, takes them too."""
    query, key = network(device), network(device)
    want = [0.9 * k.detach() + 0.1 * q.detach() for k, q in zip(key.parameters(), query.parameters(), strict=True)]
    if part == "encoder":
        query = wrap(query)
    else:
        query[3] = wrap(query[3])
    update_key_encoder_(key, query, 0.9, flatten=flatten)
    torch.testing.assert_close([p.detach() for p in key.parameters()], want, rtol=1e-6, atol=1e-6)


def test_mixed_dtypes_and_devices_are_refused(flatten_):
    net = network("cpu")
    net[3].to(torch.bfloat16)
    addresses = [p.data_ptr() for p in net.parameters()]
    with pytest.raises(ValueError, match=r"(?s)(?=.*bfloat16)(?=.*float32)"):
        flatten_(net)
    assert [p.data_ptr() for p in net.parameters()] == addresses

    net = network("cpu")
    net[3].to("meta")
    with pytest.raises(ValueError, match=r"(?s)(?=.*meta)(?=.*cpu)"):
        flatten_(net)


def test_parameters_with_the_same_memory_are_refused(device):
    """Weights that an encoder shares without sharing the parameter would be separated."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 0)).to(device)
    net[1].weight = nn.Parameter(net[0].weight.data)
    with pytest.raises(ValueError, match=r"module: .* memory of their own, got 1.weight in that of 0.weight; .* one"):
        moco_ext.flatten_parameters_(net)
    assert net[1].weight.data_ptr() == net[0].weight.data_ptr()
    net[1].weight = net[0].weight
    moco_ext.flatten_parameters_(net)


def test_no_parameters_is_an_error(flatten_):
    with pytest.raises(ValueError, match="module"):
        flatten_(nn.ReLU())


def test_a_part_of_a_flat_module_is_flat(device):
    net = network(device)
    whole = moco_ext.flatten_parameters_(net)
    part = moco_ext.flatten_parameters_(net[3])
    assert part.data_ptr() == net[3].weight.data_ptr()
    assert moco_ext.flatten_parameters_(net).data_ptr() == whole.data_ptr()
    assert_views_of(part, net[3])


def test_sharded_parameters_are_refused(device):
    """FSDP2 turns parameters into a tensor subclass without memory of its own, as this one."""
    from torch.testing._internal.two_tensor import TwoTensor

    sharded = TwoTensor(torch.ones(3, device=device), torch.ones(3, device=device))
    net = nn.Module()
    net.weight = nn.Parameter(sharded)
    with pytest.raises(TypeError, match=r"module: expected plain tensors, got TwoTensor; .* \(fully_shard\)"):
        moco_ext.flatten_parameters_(net)
    for keys, queries, name in ((sharded, torch.ones(3), "key_params"), (torch.ones(3), sharded, "query_params")):
        with pytest.raises(TypeError, match=f"{name}: expected plain tensors"):
            moco_ext.momentum_update_([keys], [queries], 0.9)
    assert torch.equal(sharded.a, torch.ones(3, device=device))
