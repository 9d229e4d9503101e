"""--init: what is loaded from weights of each kind, what is skipped, and that both encoders start equal."""

import dataclasses
import io
import json

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("tensorboard")
pytest.importorskip("timm")
import timm
from rich.console import Console
from test_pretrained import assert_same_features, save, settled
from training import few_digits, run_in, tiny

from moco_ext import MoCo, MoCoV3, encoders
from moco_ext.checkpoints import convert
from moco_ext.runs.directory import claim
from moco_ext.train import build_model, pretrain
from moco_ext.train.initialize import describe, initialize_
from moco_ext.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
ARCH = "resnet8-small"


@pytest.fixture(scope="module")
def digits():
    return few_digits(48)


def fresh(arch=ARCH, **options) -> MoCo:
    torch.manual_seed(9)
    return MoCo(arch, dim=8, K=16, **options)


def assert_encoders_equal(model) -> None:
    for one, other in zip(model.encoder_q.state_dict().values(), model.encoder_k.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_run_gives_backbone_and_head(tmp_path):
    saved = settled(fresh(mlp=True))
    save(tmp_path / "checkpoint.pth", saved)
    for source in (tmp_path, tmp_path / "checkpoint.pth"):
        model = fresh(mlp=True)
        loaded, said = initialize_(model, str(source), ARCH)
        assert (said, loaded.share, loaded.left) == (ARCH, 1.0, [])
        assert_same_features(model.encoder_q, saved.encoder_q)
        assert torch.equal(model.encoder_q.fc[2].weight, saved.encoder_q.fc[2].weight)
        assert_encoders_equal(model)
        assert torch.equal(model.queue, fresh(mlp=True).queue)


def test_a_head_that_does_not_fit_stays_random(tmp_path):
    saved = settled(encoders.resolve(ARCH)(num_classes=1000))
    torch.save(saved.state_dict(), tmp_path / "classifier.pth")
    model = fresh()
    head = model.encoder_q.fc.weight.clone()
    loaded, said = initialize_(model, str(tmp_path / "classifier.pth"), ARCH)
    assert said is None
    assert loaded.skipped == {
        "fc.weight": "shape [1000, 256], expected [8, 256]",
        "fc.bias": "shape [1000], expected [8]",
    }
    assert loaded.left == ["fc.weight", "fc.bias"]
    assert torch.equal(model.encoder_q.fc.weight, head)
    assert_same_features(model.encoder_q, saved)
    assert_encoders_equal(model)
    assert describe(loaded, "classifier.pth", ARCH, None).splitlines() == [
        f"init: 54 tensors of classifier.pth (100.0% of the weights of {ARCH} below its head)",
        "  skipped: fc.weight (shape [1000, 256], expected [8, 256]), fc.bias (shape [1000], expected [8])",
        "  at random: fc.weight, fc.bias",
    ]


@pytest.mark.parametrize("to", ["safetensors", "torchvision", "lightly", "solo-learn", "mmpretrain", "vissl"])
def test_formats_that_convert_reads(tmp_path, to):
    saved = settled(MoCo("resnet18", dim=8, K=16))
    save(tmp_path / "moco.pth", saved, arch="resnet18")
    file = tmp_path / ("other.safetensors" if to == "safetensors" else "other.pth")
    convert(tmp_path / "moco.pth", file, to)
    model = fresh("resnet18")
    loaded, _ = initialize_(model, str(file), "resnet18")
    assert loaded.share == 1.0
    assert_same_features(model.encoder_q, saved.encoder_q, 32)


def test_torchvision_names(monkeypatch):
    from torchvision.models import ResNet18_Weights

    published = settled(encoders.resolve("resnet18")(num_classes=1000))
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda *_, **__: published.state_dict())  # no download
    names = ("torchvision:IMAGENET1K_V1", "IMAGENET1K_V1", "DEFAULT", "torchvision:ResNet18_Weights.DEFAULT")
    for source in names:
        model = fresh("resnet18")
        assert initialize_(model, source, "resnet18")[0].share == 1.0
        assert_same_features(model.encoder_q, published, 32)
    for arguments, message in (
        (("torchvision:IMAGENET22K", "resnet18"), "pretrained: expected one of IMAGENET1K_V1, DEFAULT of resnet18"),
        (("torchvision:DEFAULT", ARCH), "arch: expected a torchvision model"),
        (("IMAGENET22K", "resnet18"), "no such file: IMAGENET22K"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            initialize_(fresh(arguments[1]), *arguments)


@pytest.fixture
def hub(monkeypatch):
    """timm's pretrained weights, without a download: the same for every name."""
    published = settled(timm.create_model("test_vit", num_classes=10))
    nn.init.normal_(published.pos_embed)
    create = timm.create_model

    def created(name, pretrained=False, **options):
        model = create(name.partition(".")[0], **options)
        if pretrained:
            assert name in ("test_vit", "test_vit.r160_in1k")
            return published
        return model

    monkeypatch.setattr(timm, "create_model", created)
    return published


@pytest.mark.parametrize("source", ["timm:", "timm:test_vit.r160_in1k"])
def test_timm_names_at_another_image_size(hub, source):
    """The position embedding is resampled to the grid of the run's images."""
    model = MoCo(encoders.resolve("timm:test_vit", 96), dim=8, K=16)
    loaded, said = initialize_(model, source, "timm:test_vit")
    assert (said, loaded.share) == ("timm:test_vit", 1.0)
    hub.set_input_size(img_size=96)
    torch.testing.assert_close(model.encoder_q.pos_embed, hub.pos_embed)
    assert_same_features(model.encoder_q, hub, 96)
    with pytest.raises(ValueError, match="pretrained: expected the name of a timm model with timm:, got 'vit_gone'"):
        initialize_(model, "timm:vit_gone", "timm:test_vit")


def vit(**options):
    build = lambda num_classes: timm.models.VisionTransformer(  # noqa: E731
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=num_classes, **options
    )
    return fresh(build)


def test_dinov2_with_and_without_registers(tmp_path):
    """Its names are timm's, but for mask_token and register_tokens; layer scale is skipped where there is none."""
    saved = settled(vit(init_values=1.0).encoder_q)
    nn.init.normal_(saved.pos_embed)
    state = {name: value for name, value in saved.state_dict().items() if not name.startswith("head")}
    for registers in (False, True):
        content = state | {"mask_token": torch.zeros(1, 16)}
        if registers:
            content |= {"register_tokens": torch.zeros(1, 4, 16)}
        torch.save(content, tmp_path / "dinov2.pth")
        model = vit(init_values=1.0)
        loaded, _ = initialize_(model, str(tmp_path / "dinov2.pth"), "vit")
        assert loaded.share == 1.0
        assert loaded.skipped == {"mask_token": "not used by timm's encoder"} | (
            {"register_tokens": "not in vit"} if registers else {}
        )
        assert_same_features(model.encoder_q, saved, 32)
        assert_encoders_equal(model)
    plain = vit()
    loaded, _ = initialize_(plain, str(tmp_path / "dinov2.pth"), "vit")
    assert loaded.skipped["blocks.0.ls1.gamma"] == "not in vit"
    with_registers = vit(init_values=1.0, reg_tokens=4, no_embed_class=True)
    loaded, _ = initialize_(with_registers, str(tmp_path / "dinov2.pth"), "vit")
    assert loaded.share == 1.0
    torch.testing.assert_close(with_registers.encoder_q.pos_embed, saved.pos_embed[:, 1:])


def test_dinov3(tmp_path):
    """The published names, of timm's small test model."""
    build = lambda num_classes: timm.models.eva.Eva(  # noqa: E731
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=num_classes, qkv_bias=False,
        init_values=1.0, num_reg_tokens=4, use_abs_pos_emb=False, use_rot_pos_emb=True, rope_type="dinov3",
    )  # fmt: skip
    saved = settled(fresh(build).encoder_q)
    for parameter in saved.parameters():
        nn.init.normal_(parameter, std=0.1)
    state = {}
    for name, value in saved.state_dict().items():
        if not name.startswith(("head", "rope")):
            name = name.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma")
            state[name.replace("gamma_2", "ls2.gamma")] = value
    state |= {"mask_token": torch.zeros(1, 16), "rope_embed.periods": torch.zeros(4)}
    torch.save(state, tmp_path / "dinov3.pth")
    model = fresh(build)
    loaded, _ = initialize_(model, str(tmp_path / "dinov3.pth"), "eva")
    assert loaded.share == 1.0
    assert {"mask_token", "rope_embed.periods"} <= loaded.skipped.keys()
    assert_same_features(model.encoder_q, saved, 32)


def test_the_published_moco_v3_layout(tmp_path):
    """Whole models: with the projector and the predictor."""
    torch.manual_seed(0)
    saved = settled(MoCoV3(ARCH, dim=8, mlp_dim=16))
    save(tmp_path / "ours.pth", saved)
    convert(tmp_path / "ours.pth", tmp_path / "v3.pth", "moco-v3")
    torch.manual_seed(1)
    model = MoCoV3(ARCH, dim=8, mlp_dim=16)
    loaded, said = initialize_(model, str(tmp_path / "v3.pth"), ARCH)
    assert (said, loaded.left, loaded.skipped) == (ARCH, [], {})
    for name, value in saved.state_dict().items():
        if not name.startswith("encoder_k"):
            assert torch.equal(model.state_dict()[name], value), name
    assert_encoders_equal(model)
    loaded, _ = initialize_(fresh(), str(tmp_path / "v3.pth"), ARCH)
    assert loaded.skipped["predictor.0.weight"] == f"not in {ARCH}'s model"


def test_too_little_is_an_error(tmp_path):
    torch.save(encoders.resolve("resnet18")(num_classes=4).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"init: expected weights of resnet50 in .*other.pth, got \d+% of its weights"):
        initialize_(fresh("resnet50"), str(tmp_path / "other.pth"), "resnet50")
    torch.save({"x.weight": torch.zeros(3)}, tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match=r"got 0% of its weights below the head; not loaded: x.weight: not in"):
        initialize_(fresh(), str(tmp_path / "nothing.pth"), ARCH)
    with pytest.raises(FileNotFoundError, match="no such file"):
        initialize_(fresh(), str(tmp_path / "gone.pth"), ARCH)


# --- runs -------------------------------------------------------------------------------------------------------------


def started(config, digits, folder, **changes):
    options = run_in(folder, **changes)
    options.console = Console(file=io.StringIO(), width=200)
    with claim(options):
        trainer = Trainer(config, digits, options, None)
    return trainer, options.console.file.getvalue()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dictionary": "memory-bank"},
        {"dictionary": "end-to-end", "key_encoder": "different"},
        {"dictionary": "end-to-end", "key_encoder": "resnet10-small"},
        {"dictionary": "batch", "moco_mlp_dim": 16},
        {"key_encoder": "partial"},
        {"precision": "bf16"},
    ],
    ids=str,
)
def test_every_mechanism_starts_from_weights(digits, tmp_path, settings):
    saved = settled(fresh())
    save(tmp_path / "weights.pth", saved)
    config = tiny(init=str(tmp_path / "weights.pth"), **settings)
    trainer, said = started(config, digits, tmp_path / "run")
    assert_same_features(trainer.model.encoder_q, saved.encoder_q)
    assert f"init: 54 tensors of {tmp_path}/weights.pth" in said  # all but the head's two
    if config.key_encoder == "resnet10-small":
        assert "the key encoder, of another architecture" in said
    elif config.dictionary != "memory-bank":
        assert_encoders_equal(trainer.model)


def test_a_resumed_run_does_not_start_again(digits, tmp_path):
    save(tmp_path / "weights.pth", settled(fresh()))
    config = tiny(epochs=1, init=str(tmp_path / "weights.pth"))
    pretrain(config, digits, run_in(tmp_path / "run"))
    saved = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    assert saved["trainer"]["config"]["init"] == config.init
    again = dataclasses.replace(config, epochs=2)
    trainer, said = started(again, digits, tmp_path / "run", resume="auto")
    assert "init: not used, as the run continues from its checkpoint" in said
    assert torch.equal(trainer.model.encoder_q.conv1.weight, saved["state_dict"]["module.encoder_q.conv1.weight"])
    trainer, said = started(again, digits, tmp_path / "new", resume="auto")  # nothing to resume yet
    assert "init: 5" in said


def test_weights_that_do_not_fit_leave_the_directory_alone(digits, tmp_path):
    pretrain(tiny(epochs=1), digits, run_in(tmp_path / "run"))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    torch.save({"x.weight": torch.zeros(3)}, tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match="init: expected weights"):
        pretrain(tiny(init=str(tmp_path / "nothing.pth")), digits, run_in(tmp_path / "run", overwrite=True))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert json.loads(before.splitlines()[0])["step"] == 2
    assert build_model(tiny(init="gone.pth")).updates == 0  # a report builds the model without its weights
