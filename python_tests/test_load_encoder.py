"""load_encoder: the features must be those of the evaluation, and the transform its preprocessing."""

import copy
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from encoders_on_disk import ARCH, TRANSFORM, write_photos, write_run
from PIL import Image
from test_pretrained import settled
from training import environment, few_digits, run_in, tiny

import moco_ext
from moco_ext import encoders
from moco_ext.checkpoints.pretrained import load_pretrained
from moco_ext.data import EvalTransform, ImageData, eval_batches, load
from moco_ext.data.images import read_image
from moco_ext.evaluate import encoder_features
from moco_ext.evaluate.embed import embed
from moco_ext.evaluate.feature_files import FeatureFile
from moco_ext.evaluate.neighbors import find_encoder
from moco_ext.train import pretrain
from moco_ext.train.teacher import load_teacher

pytest.importorskip("torchvision")


def data_of(folder: Path, transform: EvalTransform) -> ImageData:
    found = load(str(folder), image_size=transform.size)
    return ImageData(
        found.name, found.classes, found.size, transform.mean, transform.std, True, found.train, found.test
    )


def test_features_are_those_of_the_evaluation(tmp_path):
    model = write_run(tmp_path / "run")
    paths = write_photos(tmp_path / "photos")
    data = data_of(tmp_path / "photos", TRANSFORM)
    expected = encoder_features(model.encoder_q, data, data.train)
    for source in (tmp_path / "run", str(tmp_path / "run"), tmp_path / "run" / "checkpoint.pth"):
        encoder, transform = moco_ext.load_encoder(source)
        assert transform == TRANSFORM
        assert not encoder.training
        assert (encoder.arch, encoder.num_features) == (ARCH, 256)
        with torch.no_grad():
            got = encoder(torch.stack([transform(path) for path in paths]))
        assert got.std() > 1e-3
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)  # other batches, other sums


def test_transform_is_the_preprocessing_of_eval_batches(tmp_path):
    """Bit for bit: of files, of PIL images, of built-in images, at the size of the data and at another."""
    paths = write_photos(tmp_path / "photos")
    data = data_of(tmp_path / "photos", TRANSFORM)
    expected = next(iter(eval_batches(data, data.train)))[0]
    for read in (str, Path, read_image):
        assert torch.equal(torch.stack([TRANSFORM(read(path)) for path in paths]), expected)
    png = [i for i, path in enumerate(paths) if path.suffix == ".png"]  # PIL's JPEG decoder rounds differently
    assert torch.equal(torch.stack([TRANSFORM(Image.open(paths[i])) for i in png]), expected[png])

    digits = few_digits(20)
    images = digits.train.images
    transform = EvalTransform.of(digits)
    assert transform == EvalTransform(8, digits.mean, digits.std, 1.0)
    for batch in (transform(images), torch.stack([transform(image) for image in images])):
        assert torch.equal(batch, next(iter(eval_batches(digits, digits.train)))[0])
    gray = Image.fromarray(images[0, 0].numpy())
    assert torch.equal(transform(gray), transform(images[0]))
    larger = ImageData("digits", digits.classes, 12, digits.mean, digits.std, False, digits.train, None)
    torch.testing.assert_close(
        EvalTransform.of(larger)(images), next(iter(eval_batches(larger, larger.train)))[0], rtol=0, atol=2e-6
    )


def test_a_run_records_its_preprocessing(tmp_path):
    data = few_digits(64)
    pretrain(tiny(epochs=1), data, run_in(tmp_path))
    encoder, transform = moco_ext.load_encoder(tmp_path)
    assert transform == EvalTransform(8, data.mean, data.std, 1.0)
    trained = load_pretrained(tmp_path)[0]
    with torch.no_grad():
        got = encoder(transform(data.train.images))
    torch.testing.assert_close(got, encoder_features(trained, data, data.train), rtol=1e-5, atol=1e-6)


def test_weights_without_a_record_get_imagenets_preprocessing(tmp_path):
    write_run(tmp_path / "run", transform=None, image_size=64)
    assert moco_ext.load_encoder(tmp_path / "run")[1] == EvalTransform(64)
    (tmp_path / "run" / "config.json").write_text('{"image_size": [64, 64]}')  # of another package
    assert moco_ext.load_encoder(tmp_path / "run")[1] == EvalTransform()
    module = settled(encoders.resolve(ARCH)(num_classes=5))
    torch.save(module.state_dict(), tmp_path / "plain.pth")
    encoder, transform = moco_ext.load_encoder(tmp_path / "plain.pth", ARCH)
    assert (transform.size, transform.mean, transform.crop_pct) == (224, (0.485, 0.456, 0.406), 224 / 256)
    images = torch.randn(3, 3, 8, 8)
    assert torch.equal(encoder(images), encoders.backbone(module.eval())(images))


@pytest.mark.parametrize("mlp", [False, True])
def test_head(mlp, tmp_path):
    model = write_run(tmp_path, mlp=mlp)
    encoder, _ = moco_ext.load_encoder(tmp_path, head=True)
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(encoder(images), model.encoder_q(images))
    assert encoder.num_features == 8


def test_heads_that_cannot_be_kept(tmp_path):
    module = encoders.resolve(ARCH)(num_classes=1)
    body = {name: tensor for name, tensor in module.state_dict().items() if not name.startswith("fc.")}
    torch.save(body, tmp_path / "body.pth")
    torch.save(body | {"fc.weight": torch.zeros(3, 7), "fc.bias": torch.zeros(3)}, tmp_path / "narrow.pth")
    layers = {f"fc.{i}.weight": torch.zeros(2, 2) for i in (0, 1)}
    torch.save(body | layers, tmp_path / "deep.pth")
    for name, message in (
        ("body.pth", "head: expected a head of one layer, or of two as in MoCo v2, in .*, got none"),
        ("narrow.pth", f"head: expected layers that fit {ARCH} in .*, got fc.weight"),
        ("deep.pth", "head: expected a head of one layer, .* got 0.weight, 1.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            moco_ext.load_encoder(tmp_path / name, ARCH, head=True)


@pytest.mark.parametrize("values", [{"size": 0}, {"std": (1, 1, 0)}, {"mean": (0, 0)}, {"crop_pct": 0.5}, {"side": 3}])
def test_impossible_transforms(values):
    with pytest.raises(ValueError, match=": expected "):
        EvalTransform.from_dict(values)


def test_images_of_another_shape():
    with pytest.raises(ValueError, match=r"image: expected shape .* got \[4, 8, 8\]"):
        TRANSFORM(torch.zeros(4, 8, 8))


def test_importing_needs_no_torchvision():
    code = (
        "import sys; sys.modules['torchvision'] = sys.modules['rich'] = sys.modules['PIL'] = None\n"
        "import moco_ext; from moco_ext import *; MoCo\n"
        "assert 'moco_ext.data' not in sys.modules\n"
        "try: moco_ext.load_encoders\n"
        "except AttributeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.stdout == "module 'moco_ext' has no attribute 'load_encoders'\n", done.stderr


# --- the layout of the Hugging Face hub -------------------------------------------------------------------------------


def assert_same(one, other, size=16):
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(one(images), other(images))


@pytest.mark.parametrize("head", [False, True])
def test_round_trip_through_a_folder(head, tmp_path):
    write_run(tmp_path / "run")
    encoder, transform = moco_ext.load_encoder(tmp_path / "run", head=head)
    encoder.save_pretrained(tmp_path / "hub")
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    for again in (
        moco_ext.load_encoder(tmp_path / "hub", head=head)[0],
        moco_ext.Encoder.from_pretrained(tmp_path / "hub", head=head),
        moco_ext.load_encoder(tmp_path / "hub" / "model.safetensors", ARCH, head=head)[0],
    ):
        assert_same(again, encoder)
        assert again.transform == transform
        assert (again.arch, again.num_features, again.fingerprint()) == (
            ARCH,
            8 if head else 256,
            encoder.fingerprint(),
        )
    with pytest.raises(ValueError, match=f"arch: expected {ARCH}, which .* holds, got resnet18"):
        moco_ext.load_encoder(tmp_path / "hub", "resnet18")
    encoder.save_pretrained(tmp_path / "hub")  # its own card may be replaced


def test_timm_reads_the_folder(tmp_path):
    timm = pytest.importorskip("timm")
    module = settled(encoders.resolve("resnet18")(num_classes=1))
    torch.save(module.state_dict(), tmp_path / "plain.pth")
    encoder, transform = moco_ext.load_encoder(tmp_path / "plain.pth", "resnet18")
    encoder.save_pretrained(tmp_path / "hub")
    model = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert_same(model, encoder, 64)
    assert tuple(model.pretrained_cfg["mean"]) == transform.mean
    assert tuple(model.pretrained_cfg["input_size"]) == (3, 224, 224)


def test_timm_architectures(tmp_path):
    """Without the head that is not used, and with the norm in it that is."""
    pytest.importorskip("timm")
    module = settled(encoders.resolve("timm:test_convnext")(num_classes=7))
    torch.save(module.state_dict(), tmp_path / "timm.pth")
    encoder, _ = moco_ext.load_encoder(tmp_path / "timm.pth", "timm:test_convnext")
    names = encoder.tensors().keys()
    assert "head.norm.weight" in names
    assert not any(name.startswith(("head.fc.", "encoder.")) for name in names)
    encoder.save_pretrained(tmp_path / "hub")
    assert_same(moco_ext.load_encoder(tmp_path / "hub")[0], encoder, 64)
    kept, _ = moco_ext.load_encoder(tmp_path / "timm.pth", "timm:test_convnext", head=True)
    assert_same(kept, module.eval(), 64)


@pytest.fixture
def timm_weights(monkeypatch):
    """timm's pretrained weights, without a download."""
    timm = pytest.importorskip("timm")
    published = settled(timm.create_model("test_vit"))
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: copy.deepcopy(published))
    return published


def test_timms_weights(timm_weights, tmp_path):
    """With timm's own preprocessing; at another size the position embedding is resampled, for queries too."""
    encoder, transform = moco_ext.load_encoder("timm:test_vit.r160_in1k")
    assert (encoder.arch, transform) == ("timm:test_vit", EvalTransform(160, (0.5,) * 3, (0.5,) * 3))
    images = torch.randn(2, 3, 160, 160)
    features = timm_weights.forward_head(timm_weights.forward_features(images), pre_logits=True)
    torch.testing.assert_close(encoder(images), features)
    smaller, transform = moco_ext.load_encoder("timm:test_vit", image_size=96)
    assert (smaller(images[..., :96, :96]).shape[1], transform.size) == (encoder.num_features, 96)
    write_photos(tmp_path / "photos", 3)
    embed(smaller, tmp_path / "photos", tmp_path / "f.npz")
    again = find_encoder(FeatureFile(tmp_path / "f.npz"))
    assert (again.fingerprint(), again.transform) == (smaller.fingerprint(), transform)
    with pytest.raises(ValueError, match=r"arch: expected timm:test_vit, which .* holds, got resnet18"):
        moco_ext.load_encoder("timm:test_vit", "resnet18")


def test_timms_weights_teach(timm_weights):
    """A student's images may be smaller than the teacher's."""
    data = few_digits()
    teacher, features = load_teacher("timm:test_vit", dataclasses.replace(data, size=96))
    assert teacher(torch.randn(2, 3, 96, 96)).shape == (2, features)
    with pytest.raises(ValueError, match=r"image_size: expected a multiple of 16, the patch size of .*, got 8"):
        load_teacher("timm:test_vit", data)


def test_the_hub(tmp_path, monkeypatch):
    """Upload and download, with a local folder in the place of the network."""
    hub = pytest.importorskip("huggingface_hub")
    calls = []

    def upload_folder(*, repo_id, folder_path, commit_message):
        calls.append(("upload", repo_id, commit_message))
        shutil.copytree(folder_path, tmp_path / "remote")

    def snapshot_download(repo_id, revision, allow_patterns):
        calls.append(("download", repo_id, revision))
        return str(tmp_path / "remote")

    monkeypatch.setattr(hub, "create_repo", lambda repo_id, private, exist_ok: f"https://hub/{repo_id}")
    monkeypatch.setattr(hub, "upload_folder", upload_folder)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    write_run(tmp_path / "run")
    encoder, transform = moco_ext.load_encoder(tmp_path / "run")
    assert encoder.push_to_hub("me/photos") == "https://hub/me/photos"
    card = (tmp_path / "remote" / "README.md").read_text()
    assert 'moco_ext.load_encoder("hf:me/photos")' in card
    for again in (
        moco_ext.load_encoder("hf:me/photos")[0],
        moco_ext.load_encoder("hf:me/photos@v2")[0],
        moco_ext.Encoder.from_pretrained("me/photos", revision="v2"),
    ):
        assert_same(again, encoder)
        assert again.transform == transform
    downloads = [("download", "me/photos", revision) for revision in (None, "v2", "v2")]
    assert calls == [("upload", "me/photos", "Upload encoder"), *downloads]


def test_folders_of_another_kind(tmp_path):
    write_run(tmp_path / "run")
    encoder, _ = moco_ext.load_encoder(tmp_path / "run")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("# My project\n")
    with pytest.raises(FileExistsError, match=r"README.md exists and is no model card"):
        encoder.save_pretrained(tmp_path / "project")
    assert [path.name for path in (tmp_path / "project").iterdir()] == ["README.md"]
    encoder.save_pretrained(tmp_path / "hub")
    (tmp_path / "hub" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match=r"source: expected a config.json with arch .* got model_type"):
        moco_ext.load_encoder(tmp_path / "hub")
