"""Encoders by name, and the features under their heads."""

import copy
import sys

import pytest
import torch
from torch import nn

from moco_ext import encoders

models = pytest.importorskip("torchvision.models")


def test_a_torchvision_name_is_torchvisions_constructor():
    torch.manual_seed(0)
    ours = encoders.resolve("resnet18")(num_classes=128)
    torch.manual_seed(0)
    theirs = models.resnet18(num_classes=128)
    for (name, a), (other, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)


def test_a_callable_is_itself():
    assert encoders.resolve(models.resnet18) is models.resnet18


@pytest.mark.parametrize(
    ("arch", "parameters", "side", "width"),
    [
        ("resnet8-small", 1_227_594, 8, 256),
        ("resnet18-small", 11_173_962, 4, 512),
        ("resnet10-small", 4_903_242, 4, 512),
    ],
)
def test_small_resnets(arch, parameters, side, width):
    """ResNet-18 for CIFAR is known by its 11,173,962 parameters with ten classes."""
    encoder = encoders.resolve(arch)(num_classes=10)
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    images = torch.randn(2, 3, 32, 32)
    maps = []
    encoder.layer3.register_forward_hook(lambda module, inputs, output: maps.append(output.shape[-1]))
    assert encoder(images).shape == (2, 10)
    assert maps == [8]  # two halvings from 32: the stem made none
    assert encoders.backbone(encoder)(images).shape == (2, width)


def test_resnet10_keeps_the_imagenet_stem():
    encoder = encoders.resolve("resnet10")(num_classes=10)
    assert encoder.conv1.kernel_size == (7, 7)
    assert isinstance(encoder.maxpool, nn.MaxPool2d)


@pytest.mark.parametrize("mlp", [False, True], ids=["v1", "v2"])
def test_backbone_is_what_the_head_sees(mlp):
    encoder = encoders.resolve("resnet10-small")(num_classes=128).eval()
    if mlp:
        encoder.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), encoder.fc)
    images = torch.randn(2, 3, 16, 16)
    before = copy.deepcopy(encoder.state_dict())
    features = encoders.backbone(encoder)(images)
    torch.testing.assert_close(encoder.fc(features), encoder(images))
    assert encoder.state_dict().keys() == before.keys()


def test_backbone_shares_parameters():
    encoder = encoders.resolve("resnet8-small")(num_classes=4)
    under = encoders.backbone(encoder)
    assert under.conv1.weight is encoder.conv1.weight
    assert isinstance(encoder.fc, nn.Linear)


@pytest.mark.parametrize(("arch", "width"), [("mobilenet_v3_small", 576), ("shufflenet_v2_x0_5", 1024)])
def test_backbone_of_other_families(arch, width):
    encoder = encoders.resolve(arch)(num_classes=8).eval()
    assert encoders.backbone(encoder)(torch.randn(1, 3, 224, 224)).flatten(1).shape == (1, width)


def test_backbone_needs_a_head():
    with pytest.raises(ValueError, match=r"encoder: expected a module with a head named one of fc.*got Conv2d"):
        encoders.backbone(nn.Conv2d(3, 3, 1))


def test_unknown_names_are_errors_with_a_hint():
    with pytest.raises(ValueError, match=r"arch: expected.*got 'resnet51'; did you mean .*resnet50"):
        encoders.resolve("resnet51")
    with pytest.raises(TypeError, match=r"arch: expected a name or a callable, got int"):
        encoders.resolve(50)


def test_timm_names_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # import timm raises
    with pytest.raises(ModuleNotFoundError, match=r"timm:resnet50d needs timm.*pip install timm"):
        encoders.resolve("timm:resnet50d")
    with pytest.raises(ValueError, match="got 'resnet50d'"):
        encoders.resolve("resnet50d")


def test_timm_names():
    timm = pytest.importorskip("timm")
    encoder = encoders.resolve("timm:resnet10t")(num_classes=16).eval()
    assert type(encoder) is timm.models.resnet.ResNet
    images = torch.randn(2, 3, 32, 32)
    features = encoders.backbone(encoder)(images)
    torch.testing.assert_close(encoder.fc(features), encoder(images))
    with pytest.raises(ValueError, match=r"arch: expected a timm model name, got 'resnet10x'"):
        encoders.resolve("timm:resnet10x")


def test_vision_transformers_are_built_for_the_size_of_the_images():
    pytest.importorskip("timm")
    for arch, patches in (("timm:test_vit", 16), ("vit_b_16", 4)):
        side = 64 if "timm" in arch else 32
        encoder = encoders.resolve(arch, side)(num_classes=8).eval()
        positions = getattr(encoder, "pos_embed", None)
        positions = encoder.encoder.pos_embedding if positions is None else positions
        assert positions.shape[1] == patches + 1
        assert encoder(torch.randn(1, 3, side, side)).shape == (1, 8)
        if "timm" in arch:
            encoders.set_image_size(encoder, 96)
            assert encoders.backbone(encoder)(torch.randn(1, 3, 96, 96)).shape == (1, 64)


@pytest.mark.parametrize("arch", ["resnet18", "timm:resnet10t", "resnet50-small"])
def test_residual_blocks_that_start_as_the_identity(arch):
    pytest.importorskip("timm")
    encoder = encoders.zero_init_residual(encoders.resolve(arch)(num_classes=4))
    block = encoder.layer2[0]
    assert not (block.bn3 if "50" in arch else block.bn2).weight.any()
    assert block.bn1.weight.all()
    with pytest.raises(ValueError, match=r"zero_init_residual: expected an encoder of residual blocks .* got VGG"):
        encoders.zero_init_residual(models.vgg11(num_classes=4, init_weights=False))


def test_convolutional_encoders_take_any_size():
    pytest.importorskip("timm")
    for arch in ("resnet18", "timm:resnet10t"):
        assert encoders.resolve(arch, 40)(num_classes=8)(torch.randn(2, 3, 40, 40)).shape == (2, 8)


@pytest.mark.parametrize(
    ("arch", "size", "message"),
    [
        ("timm:test_vit", 100, r"image_size: expected a multiple of 16, the patch size of timm:test_vit, got 100"),
        ("vit_b_16", 100, r"image_size: expected one that vit_b_16 can take, got 100: .*"),
        ("timm:vit_tiny_patch16_224", 8, r"image_size: expected .* got 8"),
    ],
)
def test_sizes_that_an_encoder_cannot_take(arch, size, message):
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=message):
        encoders.resolve(arch, size)(num_classes=8)


@pytest.mark.parametrize("arch", ["timm:test_convnext", "timm:test_vit", "vit_b_16", "mobilenet_v3_small"])
def test_the_head_of_v2_replaces_the_last_layer(arch):
    pytest.importorskip("timm")
    encoder = encoders.resolve(arch, 32)(num_classes=8).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = encoders.backbone(encoder)(images)
        encoders.add_mlp_head(encoder)
        assert encoder(images).shape == (2, 8)
        torch.testing.assert_close(encoders.backbone(encoder)(images), features)
