"""Checkpoints from any format to any: names as the packages' own modules have them, values bit for bit."""

import copy
import json
import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("safetensors")

import safetensors.torch
import torchvision
from packages import DIM, Holder, K, distinct, mlp, native, saved

import moco_ext
from moco_ext.checkpoints import FORMATS, convert, read_checkpoint
from moco_ext.checkpoints.files import Inert, read
from moco_ext.cli import main


def out(folder, name, number=0):
    return folder / f"out{number}{ {'detectron2': '.pkl', 'safetensors': '.safetensors'}.get(name, '.pth') }"


def tensors_in(path, name):
    """Of a file written: its tensors by the names of the package's own state dict."""
    content = read(path)
    if name == "vissl":
        state = content["classy_state_dict"]
        parts = {**state["base_model"]["model"], "loss": state["loss"]}
        return {f"{part}.{n}": t for part, of in parts.items() for n, t in of.items()}
    for holder in ("state_dict", "model"):
        content = content.get(holder, content)
    return content


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


def of_keys(name):
    return any(word in name for word in ("encoder_k", "momentum", "loss."))


WHOLE = [name for name, format in FORMATS.items() if not format.one_encoder]
SINGLE = [name for name, format in FORMATS.items() if format.one_encoder]
# Entries of its own that a package's checkpoint has beside the model.
OWN = {"mmpretrain": {"encoder_k.steps"}}


@pytest.mark.parametrize("layers", [1, 2], ids=["one layer", "two layers"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_through_the_official_names_and_back(name, layers, tmp_path):
    path, state = saved(tmp_path, name, layers)
    assert read_checkpoint(path).format.name == name  # detected
    middle = "moco-v3" if name == "moco-v3" else "moco"
    there = convert(path, out(tmp_path, "moco", 1), middle, arch="resnet18")
    convert(tmp_path / "out1.pth", out(tmp_path, name, 2), name, from_format=middle)
    got = tensors_in(tmp_path / "out2.pth", name)
    lost = OWN.get(name, set())
    if name == "solo-learn":  # its two queues are not the one of the official model
        lost = {"queue"}
        assert there.left["queue"] == "MoCo v1 and v2, official, and this package's queue is [C, K]"
    assert_same(got, {n: t for n, t in state.items() if n not in lost})


RING = [name for name in WHOLE if name != "moco-v3"]


@pytest.mark.parametrize(("name", "other"), list(zip(RING, RING[1:] + RING[:1], strict=True)))
def test_from_each_to_the_next(name, other, tmp_path):
    """All names of a format are those of its own modules, whatever the tensors came from."""
    path, state = saved(tmp_path, name)
    report = convert(path, out(tmp_path, other, 1), other, arch="resnet18")
    assert read_checkpoint(out(tmp_path, other, 1)).format.name == other
    foreign, _ = native(other)
    assert OWN.get(other, set()) <= set(report.missing)
    queues = {n for n in foreign if n.endswith(("queue", "queue_ptr"))} | OWN.get(other, set())
    assert tensors_in(out(tmp_path, other, 1), other).keys() | queues == foreign.keys()
    convert(out(tmp_path, other, 1), out(tmp_path, name, 2), name, arch="resnet18")
    got = tensors_in(out(tmp_path, name, 2), name)
    lost = {n for n in state if n not in got}
    assert all(n.endswith(("queue", "queue_ptr")) or n in OWN.get(name, ()) for n in lost)
    assert_same(got, {n: t for n, t in state.items() if n in got})


@pytest.mark.parametrize("other", SINGLE)
@pytest.mark.parametrize("name", SINGLE)
def test_every_pair_of_encoders(name, other, tmp_path):
    path, state = saved(tmp_path, name)
    report = convert(path, out(tmp_path, other, 1), other, keep_head=True)
    convert(out(tmp_path, other, 1), out(tmp_path, name, 2), name, keep_head=True)
    assert_same(tensors_in(out(tmp_path, name, 2), name), dict(state))
    assert len(report.mapped) == len(state)
    assert not report.missing


@pytest.mark.parametrize("encoder", ["q", "k"])
@pytest.mark.parametrize("name", WHOLE)
def test_the_encoder_in_torchvision(name, encoder, tmp_path):
    path, state = saved(tmp_path, name)
    report = convert(path, tmp_path / "out.pth", "torchvision", encoder=encoder, arch="resnet18")
    resnet = torchvision.models.resnet18()
    missing, unexpected = resnet.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"}
    assert not unexpected
    stems = {n: tensor for n, tensor in state.items() if tensor.shape == resnet.conv1.weight.shape}
    for n, tensor in stems.items():
        assert torch.equal(resnet.conv1.weight, tensor) == (of_keys(n) == (encoder == "k"))
    assert len(stems) >= 2
    assert {old for old, *_ in report.mapped}.isdisjoint(report.left)


def test_every_tensor_is_accounted_for(tmp_path):
    path, state = saved(tmp_path, "moco")
    report = convert(path, tmp_path / "out.pth", "torchvision")
    plain = {name.removeprefix("module.") for name in state}
    assert {old for old, *_ in report.mapped} | set(report.left) == plain | {"optimizer"}
    assert report.left["encoder_q.fc.0.weight"] == "the head is dropped"
    assert report.left["encoder_k.conv1.weight"] == "not of encoder q"
    kept = convert(path, tmp_path / "kept.pth", "torchvision", keep_head=True)
    assert ("encoder_q.fc.0.weight", "fc.0.weight", [16, 512], "float32") in kept.mapped


def test_what_the_target_misses(tmp_path):
    path, state = saved(tmp_path, "torchvision")
    report = convert(path, tmp_path / "out.pth", "moco", keep_head=False)
    body = {name for name in state if not name.startswith("fc.")}
    assert set(report.missing) == {f"encoder_k.{name}" for name in body} | {"queue", "queue_ptr"}
    assert torch.load(tmp_path / "out.pth", weights_only=True)["arch"] == "resnet18"  # by its layers


def test_a_head_that_moco_v3_lacks_is_missing(tmp_path):
    """v2's head has no BatchNorm, and v2 has no predictor: both are what the official v3 code would look for."""
    path, _ = saved(tmp_path, "moco")
    report = convert(path, tmp_path / "out.pth", "moco-v3")
    foreign = {name.removeprefix("module.") for name in native("moco-v3")[0]}
    assert tensors_in(tmp_path / "out.pth", "moco-v3").keys() <= {f"module.{name}" for name in foreign}
    assert set(report.missing) == foreign - {new for _, new, *_ in report.mapped}
    assert {"base_encoder.fc.1.weight", "momentum_encoder.fc.3.weight", "predictor.0.weight"} <= set(report.missing)
    assert report.left["encoder_q.fc.2.bias"] == "MoCo v3, official has no place for it"
    path, _ = saved(tmp_path, "moco-v3")
    assert not convert(path, tmp_path / "again.pth", "moco-v3").missing


@pytest.mark.parametrize("name", FORMATS)
def test_every_entry_of_the_source_and_of_the_target_is_in_the_report(name, tmp_path):
    """An unknown tensor, an unknown object, and what the target's own code has and the source has not."""
    path, _ = saved(tmp_path, name)
    content = read(path)
    holder = content
    for key in ("classy_state_dict", "base_model", "model", "trunk", "state_dict"):
        holder = holder.get(key, holder)
    odd, prefix = "encoder_k.steps", "module." if name in ("moco", "moco-v3") else ""
    if name == "safetensors":
        content[odd] = torch.ones(1)
        safetensors.torch.save_file(content, path)
    else:
        holder[prefix + odd], holder[prefix + "odd"] = torch.ones(1), "an object"
        path = tmp_path / "odd.pth"
        torch.save(content, path)
    entry = f"trunk.{odd}" if name == "vissl" else odd
    for to in ("moco-v3", "mmselfsup", "mmpretrain", "torchvision"):  # a format of each kind
        report = convert(path, out(tmp_path, to, len(to)), to, from_format=name, overwrite=True)
        mapped = {old for old, *_ in report.mapped}
        assert (entry in mapped) != (entry in report.left), to
        assert any(old.endswith("odd") for old in report.left) or name == "safetensors"
        if name == "vissl":
            assert {"phase_idx", "meta"} <= report.left.keys()
        written = {n.removeprefix("module.") for n in tensors_in(out(tmp_path, to, len(to)), to)}
        assert written == {new for _, new, *_ in report.mapped}, to
        if not FORMATS[to].one_encoder and FORMATS[name].one_encoder is False and name != "moco-v3":
            expected = {n.removeprefix("module.") for n in native(to)[0]}
            copies = {n for n in expected if n.startswith(tuple(FORMATS[to].aliases))}
            assert expected <= written | set(report.missing) | copies, to


def test_a_missing_folder_is_named(tmp_path):
    path, _ = saved(tmp_path, "torchvision")
    with pytest.raises(FileNotFoundError, match=rf"^output: no such folder: {tmp_path}/none$"):
        convert(path, tmp_path / "none" / "out.pth", "timm")


def test_into_this_package_and_back(tmp_path):
    torch.manual_seed(0)
    model = distinct(moco_ext.MoCo("resnet18", dim=DIM, K=K, mlp=True))
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"arch": "resnet18", "epoch": 1, "state_dict": state}, tmp_path / "in.pth")
    convert(tmp_path / "in.pth", tmp_path / "vissl.pth", "vissl")
    convert(tmp_path / "vissl.pth", tmp_path / "out.pth", "moco")
    other = moco_ext.MoCo("resnet18", dim=DIM, K=K, mlp=True)
    names = torch.load(tmp_path / "out.pth", weights_only=True)["state_dict"]
    other.load_state_dict({name.removeprefix("module."): tensor for name, tensor in names.items()})
    assert_same(other.state_dict(), model.state_dict())


def test_vision_transformers(tmp_path):
    timm = pytest.importorskip("timm")
    small = {"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    vit = distinct(torchvision.models.VisionTransformer(num_classes=5, **small)).eval()
    torch.save(vit.state_dict(), tmp_path / "in.pth")
    assert read_checkpoint(tmp_path / "in.pth").format.name == "torchvision"
    convert(tmp_path / "in.pth", tmp_path / "timm.pth", "timm", keep_head=True)
    same = timm.models.VisionTransformer(
        img_size=16, patch_size=8, depth=2, num_heads=2, embed_dim=16, mlp_ratio=2, num_classes=5
    ).eval()
    same.load_state_dict(torch.load(tmp_path / "timm.pth", weights_only=True))
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(same(images), vit(images), rtol=1e-4, atol=1e-4)  # rounding, in another order
    convert(tmp_path / "timm.pth", tmp_path / "back.pth", "torchvision", keep_head=True)
    assert_same(torch.load(tmp_path / "back.pth", weights_only=True), vit.state_dict())

    model = distinct(Holder(base_encoder=same, momentum_encoder=copy.deepcopy(same), predictor=mlp(5, 8, 5)))
    torch.save({"state_dict": {f"module.{n}": t for n, t in model.state_dict().items()}}, tmp_path / "v3.pth")
    report = convert(tmp_path / "v3.pth", tmp_path / "v3.timm.pth", "timm")
    assert report.left["base_encoder.head.weight"] == "the head is dropped"
    same.reset_classifier(0)
    same.load_state_dict(torch.load(tmp_path / "v3.timm.pth", weights_only=True))
    convert(tmp_path / "v3.pth", tmp_path / "v3.vision.pth", "torchvision", keep_head=True)
    assert "heads.head.weight" in torch.load(tmp_path / "v3.vision.pth", weights_only=True)


def test_lightlys_own_modules(tmp_path):
    heads = pytest.importorskip("lightly.models.modules")
    path, state = saved(tmp_path, "moco")
    convert(path, tmp_path / "out.ckpt", "lightly")
    backbone = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])
    model = Holder(backbone=backbone, projection_head=heads.MoCoProjectionHead(512, 16, DIM))
    content = torch.load(tmp_path / "out.ckpt", weights_only=True)["state_dict"]
    missing, unexpected = model.load_state_dict(content, strict=False)
    assert not missing
    assert all("_momentum" in name for name in unexpected)
    assert torch.equal(model.projection_head.layers[2].bias, state["module.encoder_q.fc.2.bias"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_stay(dtype, tmp_path):
    resnet = torchvision.models.resnet18().to(dtype)
    torch.save(resnet.state_dict(), tmp_path / "in.pth")
    convert(tmp_path / "in.pth", tmp_path / "out.safetensors", "safetensors")
    assert tensors_in(tmp_path / "out.safetensors", "safetensors")["conv1.weight"].dtype == dtype
    if dtype == torch.bfloat16:
        with pytest.raises(ValueError, match=r"conv1\.weight: expected a dtype that NumPy has"):
            convert(tmp_path / "in.pth", tmp_path / "out.pkl", "detectron2")
        assert not (tmp_path / "out.pkl").exists()
    else:
        convert(tmp_path / "in.pth", tmp_path / "out.pkl", "detectron2")
        assert tensors_in(tmp_path / "out.pkl", "detectron2")["stem.conv1.weight"].dtype == dtype


class Harmful:
    """Unpickling it runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Settings:
    """A trainer's configuration: an object beside the tensors."""

    def __init__(self):
        self.lr = 0.03


def test_nothing_in_a_file_is_executed(tmp_path):
    _, content = native("solo-learn")
    torch.save(content | {"hyper_parameters": Settings()}, tmp_path / "in.ckpt")
    assert isinstance(read(tmp_path / "in.ckpt")["hyper_parameters"], Inert)
    report = convert(tmp_path / "in.ckpt", tmp_path / "out.pth", "torchvision")
    assert report.left["hyper_parameters"] == "not of the model"
    torch.save(content | {"hyper_parameters": Harmful(tmp_path / "made")}, tmp_path / "harmful.ckpt")
    with pytest.raises(ValueError, match="cannot be read"):
        convert(tmp_path / "harmful.ckpt", tmp_path / "no.pth", "torchvision")
    (tmp_path / "harmful.pkl").write_bytes(pickle.dumps({"model": Harmful(tmp_path / "made")}))
    with pytest.raises(ValueError, match=r"expected arrays in plain containers .* it needs posix.mkdir"):
        convert(tmp_path / "harmful.pkl", tmp_path / "no.pth", "torchvision")
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "no.pth").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_every_protocol(protocol, tmp_path):
    arrays = {"stem.conv1.weight": np.ones((2, 3), np.float16), "res2.0.conv1.weight": np.zeros((), np.int64)}
    (tmp_path / "in.pkl").write_bytes(pickle.dumps({"model": arrays}, protocol))
    got = read(tmp_path / "in.pkl")["model"]
    assert_same(got, {name: torch.from_numpy(array) for name, array in arrays.items()})


def test_errors_write_nothing(tmp_path):
    path, _ = saved(tmp_path, "moco")
    cases = [
        ({"to": "caffe"}, ValueError, "to: expected one of moco, .*, got 'caffe'"),
        ({"to": "moco", "from_format": "caffe"}, ValueError, "from_format: expected one of"),
        ({"to": "moco", "from_format": "lightly"}, ValueError, "from_format: expected names of Lightly's"),
        ({"to": "moco", "encoder": "both"}, ValueError, "encoder: expected q or k"),
        ({"to": "torchvision", "arch": "resnet50"}, ValueError, "checkpoint: expected the .* of resnet50 in .*, got"),
        ({"to": "detectron2"}, ValueError, "output: expected a name that ends in .pkl"),
        ({"to": "moco", "output": "out.pkl"}, ValueError, "output: expected another suffix"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            convert(path, tmp_path / options.pop("output", "out.pth"), **options)
    assert not list(tmp_path.glob("out*"))
    convert(path, tmp_path / "out.pth", "timm")
    before = (tmp_path / "out.pth").read_bytes()
    with pytest.raises(FileExistsError, match="--force"):
        convert(path, tmp_path / "out.pth", "lightly")
    assert (tmp_path / "out.pth").read_bytes() == before
    with pytest.raises(ValueError, match="encoder: expected one that torchvision holds"):
        convert(tmp_path / "out.pth", tmp_path / "no.pth", "moco", encoder="k")
    torch.save({"alpha.weight": torch.ones(2)}, tmp_path / "alien.pth")
    with pytest.raises(ValueError, match=r"from_format: expected one of moco, .* got alpha.weight"):
        convert(tmp_path / "alien.pth", tmp_path / "no.pth", "moco")
    twice = {"trunk.x": torch.ones(2), "heads.0.clf.2.bias": torch.ones(2), "heads.1.clf.0.bias": torch.ones(2)}
    torch.save(twice, tmp_path / "twice.pth")
    with pytest.raises(ValueError, match=r"expected one tensor for encoder_q.fc.2.bias, got heads.0.clf.2.bias and"):
        convert(tmp_path / "twice.pth", tmp_path / "no.pth", "moco")
    torch.save({"layer1.0.conv1.weight": torch.ones(2)}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="arch: expected the encoder's architecture"):
        convert(tmp_path / "odd.pth", tmp_path / "no.pth", "moco")
    with pytest.raises(FileNotFoundError, match="no such file"):
        convert(tmp_path / "none.pth", tmp_path / "no.pth", "moco")


def test_the_command(tmp_path, capsys):
    path, state = saved(tmp_path, "moco")
    output, report = tmp_path / "r18.pkl", tmp_path / "report.json"
    assert main(["convert", str(path), str(output), "--to", "detectron2", "--report", str(report)]) == 0
    printed = capsys.readouterr().out
    assert "encoder_q.layer1.0.bn1.weight -> res2.0.conv1.norm.weight [64] float32" in printed
    assert "left encoder_q.fc.0.weight: the head is dropped" in printed
    told = json.loads(report.read_text())
    assert f"moco -> detectron2, {len(told['mapped'])} tensors mapped, {len(told['left'])} left, 0 missing" in printed
    assert len(told["mapped"]) + len(told["left"]) == len(state) + 1  # the optimizer
    assert main(["convert", str(path), str(output), "--to", "detectron2", "-q"]) == 1
    assert "--force" in capsys.readouterr().err
    assert main(["convert", str(path), str(output), "--to", "detectron2", "-q", "--force"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    other = tmp_path / "other.pkl"
    assert main(["convert", str(path), str(other), "--to", "detectron2", "--report", str(tmp_path / "no/r.json")]) == 1
    assert "report: no such folder" in capsys.readouterr().err
    assert not other.exists()


@pytest.mark.slow
def test_any_format_can_be_evaluated(tmp_path):
    from moco_ext.checkpoints.pretrained import load_pretrained

    for name in FORMATS:
        path, state = saved(tmp_path, name)
        encoder, _ = load_pretrained(path, "resnet18")
        first = next(t for n, t in state.items() if t.shape == (64, 3, 7, 7) and not of_keys(n))
        assert torch.equal(encoder.conv1.weight, first), name
