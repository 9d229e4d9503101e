"""End-to-end and memory bank against their definitions; encoders that share layers; sets of patches."""

import copy

import pytest
import torch
from test_moco import Tiny, tiny_moco
from torch import nn
from torch.nn import functional as F

from moco_ext import EndToEnd, MemoryBank, MoCo
from moco_ext.encoders import encode


def images(device, n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=generator).to(device)


# --- end to end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["identical", "partial", "different"])
def test_key_encoders_of_end_to_end(device, kind):
    torch.manual_seed(0)
    model = EndToEnd(lambda num_classes: Tiny(num_classes), dim=8, key_encoder=kind).to(device)
    q, k = dict(model.encoder_q.named_parameters()), dict(model.encoder_k.named_parameters())
    shared = {name for name in q if q[name] is k[name]}
    heads = {name for name in q if name.startswith("fc.")}
    assert shared == {"identical": set(q), "partial": set(q) - heads, "different": set()}[kind]
    out = model(images(device), images(device, seed=1))
    out.loss.backward()
    for name, parameter in [*q.items(), *k.items()]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert out.keys.shape == (6, 8)
    assert not out.keys.requires_grad
    again = EndToEnd(lambda num_classes: Tiny(num_classes), dim=8, key_encoder=kind).to(device)
    again.load_state_dict(model.state_dict())
    for mine, other in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_shuffled_groups_of_end_to_end_come_back_in_order(device):
    """In evaluation an order changes nothing but rounding; in training, the groups change the keys."""
    torch.manual_seed(0)
    model = EndToEnd(lambda num_classes: Tiny(num_classes), dim=8, split_bn=2).to(device)
    plain = copy.deepcopy(model)
    plain.shuffle_bn = "none"
    q, k = images(device), images(device, seed=1)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    torch.testing.assert_close(model.eval()(q, k, key_order=order).keys, plain.eval()(q, k).keys)
    assert (model.train()(q, k, key_order=order).keys - plain.train()(q, k).keys).abs().max() > 1e-3


# --- memory bank ----------------------------------------------------------------------------------------------------


def tiny_bank(device, **options):
    torch.manual_seed(0)
    return MemoryBank(lambda num_classes: Tiny(num_classes), 20, dim=8, K=12, **options).to(device)


def test_memory_bank_step_by_hand(device):
    model = tiny_bank(device, m=0.3, T=0.1)
    index = torch.tensor([4, 17, 0, 9])
    bank = model.bank.double()
    torch.manual_seed(5)
    out = model(images(device, 4), index)
    torch.manual_seed(5)
    drawn = torch.randint(20, (12,), device=device)
    where = index.to(device)
    queries = F.normalize(out.keys.double(), dim=1)
    logits = torch.cat([(queries * bank[where]).sum(1, keepdim=True), queries @ bank[drawn].T], dim=1) / 0.1
    expected = F.cross_entropy(logits, torch.zeros(4, dtype=torch.long, device=device))
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-6)
    model.update(out.keys, out.images)
    moved = bank.clone()
    moved[where] = F.normalize(0.3 * bank[where] + 0.7 * queries, dim=1)
    torch.testing.assert_close(model.bank.double(), moved, rtol=1e-5, atol=1e-6)


def test_a_large_bank_is_drawn_in_parts(monkeypatch):
    drawn = []
    monkeypatch.setattr(torch, "randn", lambda *size, randn=torch.randn, **o: drawn.append(size) or randn(*size, **o))
    with torch.device("meta"):  # an estimate draws nothing
        assert MemoryBank(lambda num_classes: Tiny(num_classes), 150_000, dim=2).bank.shape == (150_000, 2)
    assert drawn == []
    bank = MemoryBank(lambda num_classes: Tiny(num_classes), 150_000, dim=2).bank
    assert drawn == [(65_536, 2), (65_536, 2), (18_928, 2)]
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(150_000))


def test_memory_bank_trains_its_encoder(device):
    model = tiny_bank(device, bank_dtype=torch.bfloat16)
    out = model(images(device, 4), torch.arange(4))
    out.loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.encoder_q.parameters())
    assert "bank" in model.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0}, "images: expected at least 1, got 0"),
        ({"m": 1.5}, r"m: expected a momentum in \[0, 1\], got 1.5"),
        ({"T": 0.0}, "T: expected a positive, finite temperature, got 0.0"),
        ({"split_bn": 0}, "split_bn: expected at least one group, got 0"),
    ],
)
def test_memory_bank_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        MemoryBank(**({"base_encoder": lambda num_classes: Tiny(num_classes), "images": 3} | options))


def test_memory_bank_wants_an_image_number_a_row(device):
    with pytest.raises(ValueError, match=r"index: expected \[4\], an image number a row, got \[3\]"):
        tiny_bank(device)(images(device, 4), torch.arange(3))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([0, -1]), "index: expected images 0 to 19, got -1"),
        (torch.tensor([0, 20]), "index: expected images 0 to 19, got 20"),
        (torch.tensor([0, 1], dtype=torch.uint8), "index: expected int64, got torch.uint8"),
    ],
)
def test_memory_bank_refuses_images_that_it_does_not_have(index, message):
    """-1 would be the last one."""
    model = tiny_bank("cpu")
    before = model.bank.clone()
    with pytest.raises(ValueError, match=message):
        model(images("cpu", 2), index)
    with pytest.raises(ValueError, match=message):
        model.update(torch.randn(2, 8), index)
    assert torch.equal(model.bank, before)
    assert model.updates == 0


@pytest.mark.parametrize(("keys", "index"), [((1, 8), 4), ((4, 1), 4), ((4, 8), 1), ((8,), 8)])
def test_memory_bank_wants_a_key_for_each_image(keys, index):
    """Not one that is broadcast to all of them."""
    model = tiny_bank("cpu")
    before = model.bank.clone()
    with pytest.raises(ValueError, match=r"keys: expected keys \[B, 8\] and index \[B\], got"):
        model.update(torch.randn(keys), torch.arange(index))
    assert torch.equal(model.bank, before)
    assert model.updates == 0


# --- the queue's key encoders, and patches ----------------------------------------------------------------------------


def test_partial_moves_only_the_key_encoders_own_head(device):
    model = tiny_moco(device, key_encoder="partial", m=0.9)
    own = {id(p) for p in model.encoder_k.parameters()} - {id(p) for p in model.encoder_q.parameters()}
    assert own == {id(p) for p in model.encoder_k.fc.parameters()}
    with torch.no_grad():
        for parameter in model.encoder_q.parameters():
            parameter.add_(1.0)
    backbone = {n: p.clone() for n, p in model.encoder_q.named_parameters() if not n.startswith("fc.")}
    heads = [p.clone() for p in model.encoder_k.fc.parameters()]
    model.update(torch.randn(2, model.queue.shape[1], device=device))
    for name, before in backbone.items():
        assert torch.equal(dict(model.encoder_k.named_parameters())[name], before)
    for before, now, query in zip(heads, model.encoder_k.fc.parameters(), model.encoder_q.fc.parameters(), strict=True):
        torch.testing.assert_close(now, 0.9 * before + 0.1 * query)
    assert all(p.requires_grad for p in model.encoder_q.parameters())
    assert not any(p.requires_grad for p in model.encoder_k.fc.parameters())


def test_partial_shares_what_belongs_to_no_layer():
    """Such as the class token and the position embedding of a vision transformer."""

    class Token(Tiny):
        def __init__(self, num_classes):
            super().__init__(num_classes)
            self.token = nn.Parameter(torch.zeros(1))
            self.register_parameter("unused", None)
            self.register_buffer("scale", torch.ones(1))

        def forward(self, x):
            return super().forward(x * self.scale + self.token)

    model = EndToEnd(lambda num_classes: Token(num_classes), dim=8, key_encoder="partial")
    assert model.encoder_k.token is model.encoder_q.token
    assert model.encoder_k.scale is model.encoder_q.scale
    assert model.encoder_k.fc is not model.encoder_q.fc


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (lambda x: (x,), TypeError, r"base_encoder: expected an encoder that returns a tensor \[N, dim\], got tuple"),
        (lambda x: None, TypeError, r"base_encoder: .* a tensor \[N, dim\], got NoneType"),
        (lambda x: x[:, None], ValueError, r"base_encoder: .* features \[N, dim\], got \[6, 1, 8\]"),
    ],
)
@pytest.mark.parametrize("model", [EndToEnd, MoCo])
def test_encoders_return_features(model, output, error, message):
    class Other(Tiny):
        def forward(self, x):
            return output(super().forward(x))

    with pytest.raises(error, match=message):
        model(Other, dim=8)(images("cpu"), images("cpu"))


def test_identical_encodes_keys_with_the_query_encoder(device):
    model = tiny_moco(device, key_encoder="identical")
    assert model.encoder_k is model.encoder_q
    out = model(images(device), images(device, seed=1))
    out.loss.backward()
    model.update(out.keys)
    assert not out.keys.requires_grad
    assert model.queue_ptr.item() == 6


def test_a_set_of_patches_is_the_mean_of_its_patches(device):
    encoder = Tiny().to(device).eval()
    patches = torch.randn(3, 4, 3, 8, 8, device=device)
    expected = torch.stack([encoder(patches[:, p]) for p in range(4)]).mean(0)
    torch.testing.assert_close(encode(encoder, patches), expected)
