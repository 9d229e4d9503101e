"""Encoders from every kind of file: the features must be those of the encoder that was saved."""

import pytest
import torch
from torch import nn

import moco_ext
from moco_ext import encoders
from moco_ext.checkpoints.pretrained import load_pretrained
from moco_ext.checkpoints.training import save_checkpoint
from moco_ext.end_to_end import EndToEnd
from moco_ext.train.classifier import Classifier

pytest.importorskip("torchvision")

ARCH = "resnet8-small"


def settled(module: nn.Module) -> nn.Module:
    """With BatchNorm statistics that a fresh encoder does not have."""
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    return module


def assert_same_features(loaded: nn.Module, saved: nn.Module, size: int = 8) -> None:
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        expected, got = (encoders.backbone(encoder).eval()(images) for encoder in (saved, loaded))
    assert expected.std() > 1e-3  # else anything would be the same
    # Exactly the same numbers go through the same layers; split BatchNorm in evaluation mode is plain too.
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def save(path, model, arch=ARCH):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    save_checkpoint(path, epoch=1, arch=arch, model=model, optimizer=optimizer)
    return path


MODELS = {
    "v1": lambda: moco_ext.MoCo(ARCH, dim=8, K=16),
    "v2": lambda: moco_ext.MoCo(ARCH, dim=8, K=16, mlp=True),
    "split BatchNorm": lambda: moco_ext.MoCo(ARCH, dim=8, K=16, split_bn=2),
    "end to end": lambda: EndToEnd(ARCH, dim=8),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_checkpoints_and_run_directories(model, tmp_path):
    model = settled(model())
    path = save(tmp_path / "checkpoint.pth", model)
    for source in (path, str(path), tmp_path):
        encoder, arch = load_pretrained(source)
        assert arch == ARCH
        assert_same_features(encoder, model.encoder_q)


@pytest.mark.parametrize("head", [("fc",), ("fc.0", "fc.2")], ids=["v1", "v2"])
def test_official_checkpoints(head, tmp_path):
    """Built name by name as they are published: a torchvision ResNet under module., a key encoder and a queue."""
    encoder, key_encoder = (settled(encoders.resolve("resnet18")(num_classes=128)) for _ in range(2))
    state = {}
    for prefix, part in (("module.encoder_q.", encoder), ("module.encoder_k.", key_encoder)):
        state |= {prefix + name: value for name, value in part.state_dict().items() if not name.startswith("fc.")}
        for layer in head:
            state |= {f"{prefix}{layer}.weight": torch.randn(4, 4), f"{prefix}{layer}.bias": torch.randn(4)}
    state |= {"module.queue": torch.randn(128, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {}}, tmp_path / "official.pth.tar")
    loaded, arch = load_pretrained(tmp_path / "official.pth.tar")
    assert arch == "resnet18"
    assert_same_features(loaded, encoder, 32)


def test_plain_state_dictionaries(tmp_path):
    from safetensors.torch import save_file

    encoder = settled(encoders.resolve(ARCH)(num_classes=1000))
    old = {name: value for name, value in encoder.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(encoder.state_dict(), tmp_path / "plain.pth")
    torch.save(old, tmp_path / "old.pth")
    torch.save({"state_dict": encoder.state_dict()}, tmp_path / "nested.pth")
    save_file(encoder.state_dict(), tmp_path / "plain.safetensors")
    for name in ("plain.pth", "old.pth", "nested.pth", "plain.safetensors"):
        loaded, arch = load_pretrained(tmp_path / name, ARCH)
        assert arch == ARCH
        assert_same_features(loaded, encoder)
        with pytest.raises(ValueError, match=rf"arch: expected --arch, as .*{name} holds a state dictionary"):
            load_pretrained(tmp_path / name)


def test_classifiers_of_ours(tmp_path):
    encoder = settled(encoders.resolve(ARCH)(num_classes=1))
    for head_bn in (False, True):
        path = save(tmp_path / "finetune.pth", Classifier(encoder, 10, 8, head_bn=head_bn))
        assert_same_features(load_pretrained(path)[0], encoder)


def test_timm(tmp_path):
    """Its ConvNeXt has a norm inside ``head`` which belongs to the features."""
    pytest.importorskip("timm")
    encoder = settled(encoders.resolve("timm:test_convnext")(num_classes=7))
    nn.init.normal_(encoder.head.norm.weight)
    torch.save(encoder.state_dict(), tmp_path / "timm.pth")
    loaded, _ = load_pretrained(tmp_path / "timm.pth", "timm:test_convnext")
    assert_same_features(loaded, encoder, 64)


def test_torchvision_by_name(monkeypatch):
    from torchvision.models import ResNet18_Weights

    published = settled(encoders.resolve("resnet18")(num_classes=1000))
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda *_, **__: published.state_dict())  # no download
    loaded, arch = load_pretrained("torchvision:IMAGENET1K_V1", "resnet18")
    assert arch == "resnet18"
    assert_same_features(loaded, published, 32)
    loaded, arch = load_pretrained("torchvision:ResNet18_Weights.IMAGENET1K_V1")
    assert arch == "resnet18"
    assert_same_features(loaded, published, 32)
    for arguments, message in (
        (("torchvision:ResNet18_Weights.DEFAULT", "resnet50"), "arch: expected resnet18, which .* got resnet50"),
        (("torchvision:ResNet18_Weights.V9",), "pretrained: expected one of .* of resnet18, got 'V9'"),
        (("torchvision:ResNot_Weights.DEFAULT",), "pretrained: expected a class .* got 'ResNot_Weights'"),
        (("torchvision:IMAGENET1K_V1",), "arch: expected --arch with torchvision:IMAGENET1K_V1"),
        (
            ("torchvision:IMAGENET22K", "resnet18"),
            "expected one of IMAGENET1K_V1, DEFAULT of resnet18, got 'IMAGENET22K'",
        ),
        (("torchvision:DEFAULT", "resnet8-small"), "arch: expected a torchvision model .* got 'resnet8-small'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_pretrained(*arguments)


def test_files_that_do_not_fit(tmp_path):
    whole = save(tmp_path / "whole.pth", moco_ext.MoCo(ARCH, dim=8, K=16))
    (tmp_path / "short.pth").write_bytes(whole.read_bytes()[:-1000])
    (tmp_path / "short.safetensors").write_bytes(b"\x80\x00\x00\x00\x00\x00\x00\x00{")
    (tmp_path / "text.pth").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"weights": 3}, tmp_path / "other.pth")
    save(tmp_path / "mislabelled.pth", moco_ext.MoCo(ARCH, dim=8, K=16), arch="resnet18-small")
    torch.save(encoders.resolve("resnet10-small")(num_classes=4).state_dict(), tmp_path / "deeper.pth")
    wider = encoders.resolve(ARCH)(num_classes=4).state_dict()
    wider["conv1.weight"] = torch.zeros(64, 3, 7, 7)
    torch.save(wider, tmp_path / "wider.pth")
    for name, arch, message in (
        ("none.pth", None, "no such file"),
        ("none.safetensors", None, "no such file"),
        ("short.pth", None, "cannot be read"),
        ("short.safetensors", ARCH, "cannot be read"),
        ("text.pth", None, "cannot be read"),
        ("list.pth", ARCH, "expected a state dictionary.*got list"),
        ("other.pth", ARCH, "expected a state dictionary.*got a dictionary of weights"),
        ("whole.pth", "resnet18", f"arch: expected {ARCH}, which .* holds, got resnet18"),
        ("mislabelled.pth", None, r"expected the 100 tensors of resnet18-small in .*, got 45 that fit, 55 missing"),
        (
            "deeper.pth",
            ARCH,
            r"expected the 45 tensors of resnet8-small.* 18 foreign: layer4\S*, expected none, got \[",
        ),
        (
            "wider.pth",
            ARCH,
            r"got 44 that fit, 1 missing .* conv1.weight, expected \[64, 3, 3, 3\], got \[64, 3, 7, 7\]",
        ),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_pretrained(tmp_path / name, arch)
