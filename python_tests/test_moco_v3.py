"""MoCo v3 against a plain reimplementation of the published formulation, in one process and in two; its recipes."""

import argparse
import copy
import dataclasses
import functools
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("tensorboard")
pytest.importorskip("timm")
import timm
from official import gather
from test_distributed import in_two_processes
from test_moco import Tiny
from test_resume import Interrupted, interrupt_at, same_records
from training import assert_equal_states, few_digits, run_in, state_of, tiny

from moco_ext import MoCoV3, encoders
from moco_ext.checkpoints import convert, read_checkpoint
from moco_ext.runs.options import RunOptions
from moco_ext.train import build_model, pretrain, resolve_config
from moco_ext.train.step import OptimizerStep
from moco_ext.vit import moco_v3_vit, sin_cos_embedding

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, N, M = 50, 6, 0.9


def small_vit(num_classes: int) -> nn.Module:
    return moco_v3_vit("vit_small", num_classes, 8, patch_size=4, embed_dim=16, depth=2, num_heads=2)


ENCODERS = {"resnet": Tiny, "vit": small_vit}  # a head named fc, and one named head


class Published(nn.Module):
    """The published model: momentum update first, then two cross-entropies of all ranks' keys, times 2T."""

    def __init__(self, model: MoCoV3) -> None:
        super().__init__()
        self.T = model.T
        self.base_encoder = copy.deepcopy(model.encoder_q)
        self.momentum_encoder = copy.deepcopy(model.encoder_k)
        self.predictor = copy.deepcopy(model.predictor)

    def forward(self, x1, x2, m):
        q1, q2 = (self.predictor(self.base_encoder(x)) for x in (x1, x2))
        with torch.no_grad():
            for k, q in zip(self.momentum_encoder.parameters(), self.base_encoder.parameters(), strict=True):
                k.data = m * k.data + (1 - m) * q.data
            k1, k2 = (self.momentum_encoder(x) for x in (x1, x2))
        return self.contrast(q1, k2) + self.contrast(q2, k1)

    def contrast(self, q, k):
        k = F.normalize(k, dim=1)
        rank = 0
        if dist.is_initialized():
            rank, k = dist.get_rank(), gather(k)
        logits = F.normalize(q, dim=1) @ k.T / self.T
        return F.cross_entropy(logits, torch.arange(len(q)) + rank * len(q)) * (2 * self.T)


def momentum_at(step: int) -> float:
    return 1 - 0.5 * (1 + math.cos(math.pi * step / STEPS)) * (1 - M)


def views(step: int, n: int = N) -> torch.Tensor:
    """Two views of n images, [2, n, 3, 8, 8]: noise on noise."""
    generator = torch.Generator().manual_seed(step)
    noise = torch.randn(3, n, 3, 8, 8, generator=generator, dtype=torch.float64)
    return noise[0] + 0.3 * noise[1:]


def both_models(kind: str, T: float) -> tuple[MoCoV3, Published]:
    torch.manual_seed(0)
    ours = MoCoV3(ENCODERS[kind], dim=8, mlp_dim=24, m=M, T=T).double()
    with torch.no_grad():  # where norms and biases start, their order does not show
        for parameter in ours.encoder_q.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    ours.encoder_k.load_state_dict(ours.encoder_q.state_dict())
    return ours, Published(ours)


def optimizer_of(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    if kind == "vit":
        return torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def train_both(ours, published, kind, rows=slice(None), wrap=lambda module: module):
    """Losses of both models over 50 steps."""
    both = [optimizer_of(model, kind) for model in (ours, published)]
    wrapped, losses = [wrap(ours), wrap(published)], []
    for step in range(STEPS):
        im_1, im_2 = (images[rows] for images in views(step, 2 * N))
        out = wrapped[0](im_1, im_2)
        expected = wrapped[1](im_1, im_2, momentum_at(step))
        for optimizer, loss in zip(both, (out.loss, expected), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ours.m = momentum_at(step + 1)  # the published model updates at the start of the next step
        ours.update(out.keys)
        losses.append((out.loss.item(), expected.item()))
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize(("kind", "T"), [("resnet", 1.0), ("vit", 0.2)])
def test_fifty_steps_are_the_published_ones(kind, T):
    """In float64, so that differences do not grow over the steps."""
    ours, published = both_models(kind, T)
    losses = train_both(ours, published, kind)
    torch.testing.assert_close(losses[:, 0], losses[:, 1], rtol=1e-9, atol=1e-9)
    assert losses[-5:, 0].mean() < losses[:5, 0].mean()  # it trains
    for mine, theirs in ((ours.encoder_q, published.base_encoder), (ours.predictor, published.predictor)):
        for one, other in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def ranks_work(args: argparse.Namespace, options: RunOptions) -> int:
    rank, (folder,) = dist.get_rank(), args.arguments
    ours, published = both_models("resnet", 1.0)
    ddp = functools.partial(nn.parallel.DistributedDataParallel, broadcast_buffers=False)
    losses = train_both(ours, published, "resnet", slice(rank * N, (rank + 1) * N), ddp)
    torch.save({"losses": losses, "keys": ours.encoder_k.state_dict()}, f"{folder}/{rank}.pt")
    return 0


@pytest.mark.slow
def test_keys_of_all_processes_are_the_dictionary(tmp_path):
    in_two_processes(ranks_work, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for of_rank in ranks:
        torch.testing.assert_close(of_rank["losses"][:, 0], of_rank["losses"][:, 1], rtol=1e-9, atol=1e-9)
    assert not torch.equal(ranks[0]["losses"], ranks[1]["losses"])  # each of its own images
    for (name, one), other in zip(ranks[0]["keys"].items(), ranks[1]["keys"].values(), strict=True):
        assert "running" in name or torch.equal(one, other), name


def test_each_view_is_encoded_once_by_each_encoder():
    torch.manual_seed(0)
    model = MoCoV3(ENCODERS["resnet"], dim=8, mlp_dim=24)
    passes: list[str] = []
    for name in ("encoder_q", "encoder_k", "predictor"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: passes.append(name))
    out = model(*views(0).float())
    assert sorted(passes) == ["encoder_k"] * 2 + ["encoder_q"] * 2 + ["predictor"] * 2
    assert (out.keys.shape, out.stats.rank.shape) == ((2 * N, 8), (2 * N,))
    assert not out.keys.requires_grad
    out.loss.backward()
    assert all(p.grad is not None for p in [*model.encoder_q.parameters(), *model.predictor.parameters()])
    assert all(p.grad is None for p in model.encoder_k.parameters())


@pytest.mark.parametrize("kind", ENCODERS)
def test_heads_are_the_published_ones(kind):
    model = MoCoV3(ENCODERS[kind], dim=8, mlp_dim=24)
    head = model.encoder_q.fc if kind == "resnet" else model.encoder_q.head
    linear = [layer for layer in head if isinstance(layer, nn.Linear)]
    assert len(linear) == (2 if kind == "resnet" else 3)
    assert all(layer.bias is None for layer in linear)
    assert not head[-1].affine
    assert isinstance(model.predictor[-1], nn.Linear if kind == "resnet" else nn.BatchNorm1d)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp_dim": 0}, "mlp_dim: expected at least 1, got 0"),
        ({"projector_layers": -1}, "projector_layers: expected at least 1, got -1"),
        ({"projector_layers": 0}, "projector_layers: expected at least 1, got 0"),
        ({"low_precision": torch.float32}, "low_precision: expected None, torch.bfloat16 or torch.float16, got torch"),
        ({"T": 0.0}, "T: expected a positive, finite temperature, got 0.0"),
        ({"base_encoder": lambda num_classes: nn.Conv2d(3, num_classes, 1)}, "mlp_dim: expected an encoder whose head"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        MoCoV3(**({"base_encoder": ENCODERS["resnet"], "dim": 8, "mlp_dim": 8} | options))


# --- the vision transformer -------------------------------------------------------------------------------------------


def test_position_embedding():
    """Of a grid of 2 x 3 patches; the published code numbers it column by column."""
    table = sin_cos_embedding(2, 3, 8)
    for row in range(6):
        x, y = divmod(row, 2)
        expected = [
            wave(at * frequency) for at in (x, y) for wave in (math.sin, math.cos) for frequency in (1.0, 10000**-0.5)
        ]
        assert table[row].tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="dim: expected a multiple of 4 for two coordinates, got 6"):
        sin_cos_embedding(2, 2, 6)


def test_vit_small_is_the_published_one():
    with torch.device("meta"):
        vit = timm.create_model("vit_small_patch16_224", num_classes=8)
    ours = encoders.resolve("vit_small", 32)(num_classes=8)
    assert ours.blocks[0].attn.num_heads == 12
    assert {name: p.shape for name, p in ours.named_parameters() if name != "pos_embed"} == {
        name: p.shape for name, p in vit.named_parameters() if name != "pos_embed"
    }
    assert ours.pos_embed.shape == (1, 5, 384)
    assert not ours.pos_embed.requires_grad
    assert torch.equal(ours.pos_embed[0, 0], torch.zeros(384))
    bound = math.sqrt(6 / (3 * 256 + 384))
    assert 0.99 * bound < ours.patch_embed.proj.weight.abs().max() <= bound


def test_a_frozen_patch_projection_never_moves():
    with pytest.raises(ValueError, match=r"stop_grad_conv1: expected a vision transformer, .* got ResNet"):
        build_model(tiny(stop_grad_conv1=True))
    model = MoCoV3(lambda num_classes: encoders.freeze_patch_projection(small_vit(num_classes)), dim=8, mlp_dim=8)
    before = {name: p.detach().clone() for name, p in model.encoder_q.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    out = model(*views(0).float())
    out.loss.backward()
    optimizer.step()
    model.update(out.keys)
    still = {name for name, p in model.encoder_q.named_parameters() if torch.equal(p, before[name])}
    assert still == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    frozen = encoders.freeze_patch_projection(encoders.resolve("vit_b_16", 16)(num_classes=8))
    assert not frozen.conv_proj.weight.requires_grad


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return few_digits(48)


def v3(**changes):
    base = {"dictionary": "batch", "moco_mlp_dim": 16, "batch_size": 16, "aug_byol": True, "moco_m_cos": True}
    return tiny(**(base | changes))


def test_recipes_are_the_published_commands():
    r50 = resolve_config("/some/folder", {"batch_size": 512}, "moco-v3")
    assert (r50.arch, r50.optimizer, r50.weight_decay, r50.warmup_epochs, r50.epochs) == (
        "resnet50",
        "lars",
        1e-6,
        10,
        100,
    )
    assert (r50.moco_dim, r50.moco_mlp_dim, r50.moco_m, r50.moco_m_cos, r50.moco_t) == (256, 4096, 0.99, True, 1.0)
    assert r50.learning_rate(100, 10) == pytest.approx(0.6 * 512 / 256)
    assert r50.crop_min == 0.2
    vit = resolve_config("/some/folder", {}, "moco-v3-vit")
    assert (vit.arch, vit.optimizer, vit.weight_decay, vit.warmup_epochs) == ("vit_small", "adamw", 0.1, 40)
    assert (vit.moco_t, vit.crop_min, vit.stop_grad_conv1, vit.batch_size) == (0.2, 0.08, True, 4096)
    assert vit.learning_rate(400, 10) == pytest.approx(1.5e-4 * 16)
    assert resolve_config("/some/folder", {"lr": 0.1}, "moco-v3").learning_rate(100, 10) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"symmetric": True}, "symmetric: expected False with dictionary batch, which always is, got True"),
        ({"split_bn": 2}, "split_bn: expected 1 with dictionary batch, got 2"),
        ({"shuffle_bn": "loader"}, "shuffle_bn: expected 'auto' with dictionary batch, got 'loader'"),
        ({"in_batch": True}, "in_batch: expected False with dictionary batch, got True"),
        ({"aug_plus": True}, "aug_byol: expected False with aug_plus, got both"),
        ({"dictionary": "queue"}, "moco_mlp_dim: expected 4096 with dictionary queue, got 16"),
    ],
)
def test_settings_that_contradict_each_other(changes, message):
    with pytest.raises(ValueError, match=message):
        v3(**changes)


def test_resumed_equals_unbroken(digits, tmp_path, monkeypatch):
    extra = {"optimizer": "lars", "cos": True, "warmup_epochs": 1}
    through = pretrain(v3(**extra), digits, run_in(tmp_path / "through"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(Interrupted):
            pretrain(v3(**extra), digits, run_in(tmp_path / "cut", save_every=2))
    resumed = pretrain(v3(**extra), digits, run_in(tmp_path / "cut", resume="auto"))
    same_records(through, resumed)
    assert_equal_states(state_of(tmp_path / "through"), state_of(tmp_path / "cut"))


def test_checkpoints_in_the_published_layout_and_back(digits, tmp_path):
    pretrain(v3(epochs=1), digits, run_in(tmp_path))
    report = convert(tmp_path / "checkpoint.pth", tmp_path / "v3.pth", "moco-v3")
    assert not report.missing
    content = torch.load(tmp_path / "v3.pth", weights_only=True)
    state = {name.removeprefix("module."): value for name, value in content["state_dict"].items()}
    assert {name.split(".")[0] for name in state} == {"base_encoder", "momentum_encoder", "predictor"}
    model = build_model(v3())
    Published(model).load_state_dict(state)
    convert(tmp_path / "v3.pth", tmp_path / "back.pth", "moco")
    saved = state_of(tmp_path)
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert_equal_states({name: saved[name] for name in back}, back)
    assert back.keys() == saved.keys()
    assert read_checkpoint(tmp_path / "checkpoint.pth").format.name == "moco"


def test_a_vision_transformer_from_training_to_features(digits, tmp_path):
    from moco_ext.checkpoints.pretrained import load_pretrained

    config = v3(arch="timm:test_vit", image_size=32, epochs=1, optimizer="adamw", stop_grad_conv1=True, moco_t=0.2)
    data = dataclasses.replace(digits, size=32)
    model = build_model(config)
    assert model.encoder_q.pos_embed.shape[1] == 5
    (record,) = pretrain(config, data, run_in(tmp_path), model)
    assert math.isfinite(record["loss"])
    encoder, arch = load_pretrained(tmp_path)
    assert arch == "timm:test_vit"
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = [encoders.backbone(module.eval())(images) for module in (encoder, model.encoder_q)]
        torch.testing.assert_close(*features, rtol=0, atol=0)
        larger, _ = load_pretrained(tmp_path, image_size=64)
        assert encoders.backbone(larger)(torch.randn(2, 3, 64, 64)).shape == features[0].shape


def test_16_bit_keys_and_accumulation(digits):
    from test_trainer import steps_of

    config = v3(precision="bf16", accumulate=2)
    model = build_model(config)
    step = OptimizerStep(model, torch.optim.SGD(model.parameters(), 0.1), "bf16", False)
    result = step(steps_of(config, digits)[0])
    assert not result.skipped
    assert math.isfinite(result.metrics["loss"])
    assert model.updates == 1


def test_synchronized_batchnorm_is_asked_for():
    """It runs on CUDA only; the conversion keeps parameters and names."""
    model = MoCoV3(ENCODERS["resnet"], dim=8, mlp_dim=8)
    names, parameters = list(model.state_dict()), list(model.parameters())
    assert model.sync_batchnorm
    encoders.convert_sync_batchnorm(model)
    kinds = {type(module) for module in model.modules()}
    assert nn.SyncBatchNorm in kinds
    assert kinds.isdisjoint({nn.BatchNorm1d, nn.BatchNorm2d})
    assert list(model.state_dict()) == names
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
