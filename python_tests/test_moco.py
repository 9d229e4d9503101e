"""The model: its step against the official formulation, its state, and its parameters' layout."""

import copy
import warnings

import official
import pytest
import torch
from torch import nn

import moco_ext
from moco_ext.momentum import _flat_buffer, _parameters


class Tiny(nn.Module):
    """A convolution, BatchNorm and a head: all a step touches."""

    def __init__(self, num_classes: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.fc = nn.Linear(6, num_classes)

    def forward(self, x):
        return self.fc(self.body(x))


class OfficialMoCo(nn.Module):
    """The published model: state changes inside forward, queue [dim, K], logits as output."""

    def __init__(self, encoder_q, encoder_k, queue, m, T):
        super().__init__()
        self.encoder_q, self.encoder_k = copy.deepcopy(encoder_q), copy.deepcopy(encoder_k)
        self.register_buffer("queue", queue.t().clone())
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.m, self.T = m, T

    def momentum_update(self):
        official.momentum_update(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), self.m)

    def forward(self, im_q, im_k):
        q = nn.functional.normalize(self.encoder_q(im_q), dim=1)
        with torch.no_grad():
            self.momentum_update()
            k = nn.functional.normalize(self.encoder_k(im_k), dim=1)
        positive = (q * k).sum(1, keepdim=True)
        logits = torch.cat([positive, q @ self.queue.clone()], dim=1) / self.T
        official.enqueue(self.queue, self.queue_ptr, k)
        return logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device)


def views(device, n=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, 8, 8, generator=generator).to(device) for _ in range(2)]


def tiny_moco(device, **options):
    torch.manual_seed(0)
    return moco_ext.MoCo(Tiny, **{"dim": 8, "K": 24, "m": 0.9} | options).to(device)


def is_flat(model) -> bool:
    return all(_flat_buffer(list(_parameters(e))) is not None for e in (model.encoder_q, model.encoder_k))


def step(model, optimizer, batch):
    out = model(*batch)
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    model.update(out.keys)
    return out


@pytest.mark.usefixtures("exact_convolutions")
@pytest.mark.parametrize("mlp", [False, True])
def test_steps_match_the_official_formulation(device, mlp):
    """Same start, same batches, 20 steps: losses, queue, pointer and both encoders stay within float32 rounding."""
    ours = tiny_moco(device, mlp=mlp)
    theirs = OfficialMoCo(ours.encoder_q, ours.encoder_k, ours.queue, m=0.9, T=0.07)
    optimizers = [torch.optim.SGD(m.encoder_q.parameters(), 0.05, momentum=0.9) for m in (ours, theirs)]
    for i in range(20):
        batch = views(device, seed=i)
        out = step(ours, optimizers[0], batch)
        logits, labels = theirs(*batch)
        loss = nn.functional.cross_entropy(logits, labels)
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        torch.testing.assert_close(out.loss, loss.detach(), rtol=2e-4, atol=1e-5)
        assert [top.item() for top in out.stats.accuracy((1, 5))] == pytest.approx(
            [100 * (logits.topk(k).indices == 0).any(1).float().mean().item() for k in (1, 5)], abs=9
        )
    torch.testing.assert_close(ours.queue, theirs.queue.t(), rtol=1e-3, atol=1e-4)
    assert ours.queue_ptr.item() == theirs.queue_ptr.item()
    # The official update of step t+1 runs at its start: one more brings it level.
    theirs.momentum_update()
    for k, reference in zip(ours.encoder_k.parameters(), theirs.encoder_k.parameters(), strict=True):
        torch.testing.assert_close(k, reference, rtol=1e-3, atol=1e-5)


def test_forward_changes_nothing_but_batchnorm(device):
    model = tiny_moco(device)
    before = copy.deepcopy(model.state_dict())
    model(*views(device)).loss.backward()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {
        f"encoder_{side}.body.1.{name}"
        for side in "qk"
        for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert all(p.grad is None and not p.requires_grad for p in model.encoder_k.parameters())


def test_encoders_start_equal_and_the_queue_holds_unit_keys(device):
    model = tiny_moco(device)
    for q, k in zip(model.encoder_q.parameters(), model.encoder_k.parameters(), strict=True):
        assert torch.equal(q, k)
        assert q.data_ptr() != k.data_ptr()
    torch.testing.assert_close(model.queue.norm(dim=1), torch.ones(24, device=device))
    out = model(*views(device, n=30))
    model.update(out.keys)  # more keys than the queue holds, of any length
    torch.testing.assert_close(model.queue.norm(dim=1), torch.ones(24, device=device))
    assert model.queue_ptr.item() == 30 % 24


@pytest.mark.parametrize("flatten", [False, True])
def test_an_encoder_without_weights_yet_is_refused(flatten):
    """Each encoder would draw its own in the first forward pass."""
    with pytest.raises(ValueError, match="uninitialized parameter"):
        moco_ext.MoCo(lambda num_classes: nn.LazyLinear(num_classes), 8, 24, flatten_parameters=flatten)


def test_a_batch_that_does_not_divide_the_queue(device):
    model = tiny_moco(device)
    keys = [model(*views(device, n=n, seed=n)).keys for n in (10, 10, 7)]
    for k in keys:
        model.update(k)
    assert model.queue_ptr.item() == 27 % 24
    torch.testing.assert_close(model.queue[:3], nn.functional.normalize(keys[2][4:], dim=1))


MOVES = {
    "as built": lambda model: model,
    "to": lambda model: model.to(torch.float64).to(torch.float32),
    "half and back": lambda model: model.half().float(),
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "deepcopy": copy.deepcopy,
    "load_state_dict": lambda model: model.load_state_dict(tiny_moco("cpu").state_dict()) and model,
    "load_state_dict assign": lambda model: (
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True) and model
    ),
    "one encoder channels_last": lambda model: model.encoder_q.to(memory_format=torch.channels_last) and model,
    "one encoder channels_last and flat": lambda model: (
        moco_ext.flatten_parameters_(model.encoder_q.to(memory_format=torch.channels_last)) is not None and model
    ),
    "new layer": lambda model: (
        [setattr(e, "fc", nn.Linear(6, 8).to(next(e.parameters()).device)) for e in (model.encoder_q, model.encoder_k)]
        and model
    ),
    "cuda": lambda model: model.cpu().cuda() if torch.cuda.is_available() else model,
}


@pytest.mark.parametrize("move", MOVES, ids=str)
def test_the_momentum_update_survives(device, move):
    """After whatever ends the views, the update still reaches every parameter, and in one buffer an encoder."""
    model = MOVES[move](tiny_moco(device))
    with torch.no_grad():
        for p in model.encoder_q.parameters():
            p.add_(torch.randn_like(p))
    before = [p.clone() for p in model.encoder_k.parameters()]
    model.update(torch.randn(4, 8, device=model.queue.device))
    for q, k, old in zip(model.encoder_q.parameters(), model.encoder_k.parameters(), before, strict=True):
        torch.testing.assert_close(k, 0.9 * old + 0.1 * q.detach(), rtol=1e-6, atol=1e-6)
    assert is_flat(model)


def test_encoders_of_mixed_dtypes_are_updated_as_lists(device):
    model = tiny_moco(device)
    model.encoder_q.fc.to(torch.bfloat16)
    before = model.encoder_k.fc.weight.clone()
    with torch.no_grad():
        model.encoder_q.fc.weight.add_(1.0)
    model.update(torch.randn(4, 8, device=device))
    expected = 0.9 * before + 0.1 * model.encoder_q.fc.weight.detach().float()
    torch.testing.assert_close(model.encoder_k.fc.weight, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("low_precision", [None, torch.bfloat16])
def test_parameters_in_an_optimizers_buckets_stay_there(device, low_precision):
    """ZeroRedundancyOptimizer(parameters_as_bucket_view=True) sends its buckets to the other ranks."""
    model = tiny_moco(device, low_precision=low_precision)
    queries, keys = list(model.encoder_q.parameters()), list(model.encoder_k.parameters())
    bucket = 2 * nn.utils.parameters_to_vector(queries).detach()
    nn.utils.vector_to_parameters(bucket, queries)
    want = [0.9 * key + 0.1 * query.detach() for key, query in zip(keys, queries, strict=True)]
    model.to(device).update(torch.ones(1, 8, device=device))
    torch.testing.assert_close([key.detach() for key in keys], want)
    if low_precision is not None:
        half = model._low_precision._weights(model.encoder_k)["fc.weight"]
        assert torch.equal(half, model.encoder_k.fc.weight.to(low_precision))
    bucket.zero_()
    assert not any(query.any() for query in queries)


def test_an_optimizer_built_before_a_move_goes_on(device):
    model = tiny_moco("cpu")
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.1)
    model.to(device)
    step(model, optimizer, views(device))
    flat = moco_ext.flatten_parameters_(model.encoder_q)
    assert torch.equal(
        flat[: model.encoder_q.body[0].weight.numel()], model.encoder_q.body[0].weight.detach().flatten()
    )


def test_state_dict_is_the_official_one_both_ways(device, tmp_path):
    ours = tiny_moco(device)
    ours.update(torch.randn(5, 8, device=device))
    theirs = OfficialMoCo(Tiny(), Tiny(), torch.zeros(24, 8), m=0.9, T=0.07).to(device)
    torch.save(ours.state_dict(), tmp_path / "ours.pt")
    theirs.load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True))
    assert theirs.queue.shape == (8, 24)
    assert torch.equal(theirs.queue, ours.queue.t())

    other = tiny_moco(device, queue_dtype=torch.float64 if device.type == "cpu" else torch.float32)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    other.load_state_dict(torch.load(tmp_path / "theirs.pt", weights_only=True))
    assert torch.equal(other.queue.float(), ours.queue)
    assert other.queue.is_contiguous()
    assert other.queue_ptr.item() == 5


def test_a_checkpoint_of_another_size_names_the_queue(device):
    with pytest.raises(RuntimeError, match="queue"):
        tiny_moco(device).load_state_dict(tiny_moco(device, K=30).state_dict())


def test_compiled_encoders_and_bfloat16_queue(device):
    model = tiny_moco(device, queue_dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.05)
    losses = [step(model, optimizer, views(device)).loss.item() for _ in range(3)]
    assert model.queue.dtype == torch.bfloat16
    assert all(torch.isfinite(torch.tensor(losses)))


def test_the_whole_forward_compiles_without_a_break(device):
    model = tiny_moco(device)
    batch = views(device)
    eager = copy.deepcopy(model)(*batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(*batch)
    torch.testing.assert_close(compiled.loss, eager.loss)
    torch.testing.assert_close(compiled.keys, eager.keys)


def test_a_compiled_model_that_shuffles_compiles_once(device):
    """Forward and update depend on the number of updates, on which nothing compiled may depend."""
    torch._dynamo.reset()
    eager = tiny_moco(device, split_bn=2)
    model = copy.deepcopy(eager)

    def train(model, batch):
        keys = model(*batch).keys
        model.update(keys)
        return keys

    compiled = torch.compile(train, backend="eager")
    for seed in range(4):
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            got = compiled(model, views(device, seed=seed))
        torch.testing.assert_close(got, train(eager, views(device, seed=seed)))
    assert model.updates == 4


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"m": 1.5}, "m:"),
        ({"T": 0.0}, "T:"),
        ({"K": 0}, "K"),
        ({"dim": 0}, "dim"),
        ({"shuffle_bn": "perhaps"}, "shuffle_bn"),
        ({"split_bn": 0}, "split_bn"),
        ({"base_encoder": lambda num_classes: nn.Sequential(nn.Linear(3, num_classes)), "mlp": True}, "mlp"),
    ],
)
def test_bad_arguments_are_named(options, names):
    with pytest.raises(ValueError, match=names):
        moco_ext.MoCo(**{"base_encoder": Tiny, "dim": 8, "K": 24} | options)


def test_an_update_that_the_encoders_refuse_does_not_count():
    """It decides the next permutation of shuffling BN."""
    model = tiny_moco("cpu")
    out = model(*views("cpu"))
    queue = model.queue.clone()
    model.encoder_q.more = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="encoders: expected the same parameters on both sides"):
        model.update(out.keys)
    assert model.updates == 0
    assert torch.equal(model.queue, queue)


def test_a_step_on_the_meta_device():
    """Which has shapes and no memory: every update said that queue_ptr was an element of the queue."""
    model = tiny_moco("meta")
    out = model(*views("meta"))
    model.update(out.keys)
    assert model.updates == 1
    with pytest.raises(ValueError, match="module: expected parameters in memory, got the meta device"):
        moco_ext.flatten_parameters_(model.encoder_q)
    model.to_empty(device="cpu")
    assert _flat_buffer(list(_parameters(model.encoder_k))) is not None


def test_views_of_different_batches_are_refused(device):
    im_q, im_k = views(device)
    with pytest.raises(ValueError, match="im_k: expected 12"):
        tiny_moco(device)(im_q, im_k[:5])


# --- keys of 16-bit weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keys_match_autocast(device, dtype):
    """Bit for bit, at every step and after whatever else changes the weights: autocast rounds the same numbers."""
    model = tiny_moco(device, low_precision=dtype)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.1)

    def expect_autocast(im_q, im_k):
        beside = copy.deepcopy(model.encoder_k)
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype):
            want = beside(im_k)
        out = model(im_q, im_k)
        assert out.keys.dtype == dtype
        assert torch.equal(out.keys, want)
        return out

    for step in range(4):
        out = expect_autocast(*views(device, seed=step))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        model.update(out.keys)
        half = model._low_precision._flat
        assert torch.equal(half, _flat_buffer(list(_parameters(model.encoder_k))).to(dtype))  # written by the update
    model.load_state_dict(tiny_moco(device).state_dict())
    expect_autocast(*views(device))
    with torch.no_grad():
        model.encoder_k.fc.weight.mul_(3)
    expect_autocast(*views(device))
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    expect_autocast(*views(device))
    assert all(parameter.dtype == torch.float32 for parameter in model.encoder_k.parameters())
    assert model.state_dict().keys() == tiny_moco(device).state_dict().keys()


@pytest.mark.parametrize(
    ("dtype", "m", "warns"),
    [(torch.bfloat16, 0.99, True), (torch.half, 0.999, True), (torch.float32, 0.999, False), (torch.half, 0.9, False)],
)
def test_a_key_encoder_that_cannot_move(device, dtype, m, warns):
    model = tiny_moco(device, m=m).to(dtype)
    with torch.no_grad():
        for key, query in zip(model.encoder_k.parameters(), model.encoder_q.parameters(), strict=True):
            query.copy_(1.1 * key)
    before = [key.clone() for key in model.encoder_k.parameters()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.update(torch.ones(1, 8, dtype=dtype, device=device))
    moved = [not torch.equal(*pair) for pair in zip(before, model.encoder_k.parameters(), strict=True) if pair[0].any()]
    assert any(moved) == (not warns)
    assert [str(dtype) in str(warning.message) for warning in caught] == [True] * warns


def test_low_precision_weights_follow_steps_below_their_precision(device):
    model = tiny_moco(device, low_precision=torch.bfloat16, m=0.999)
    with torch.no_grad():
        model.encoder_k.fc.weight.fill_(1.0)
        model.encoder_q.fc.weight.fill_(2.0)
    images = views(device)
    for _ in range(300):
        model.update(torch.zeros(1, 8, device=device))
    model(*images)
    half = model._low_precision._flat.float()
    assert (half - (2 - 0.999**300)).abs().min() <= 2**-8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"low_precision": torch.float32},
            "low_precision: expected None, torch.bfloat16 or torch.float16, got torch.float32",
        ),
        (
            {"low_precision": torch.bfloat16, "key_encoder": "identical"},
            "low_precision: expected None with key_encoder",
        ),
    ],
)
def test_invalid_low_precision_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        moco_ext.MoCo(Tiny, dim=8, K=24, **options)


def test_low_precision_needs_float32_parameters(device):
    model = tiny_moco(device, low_precision=torch.bfloat16).double()
    with pytest.raises(
        ValueError, match=r"low_precision: expected an encoder of float32 parameters, got torch.float64"
    ):
        model(*(view.double() for view in views(device)))
