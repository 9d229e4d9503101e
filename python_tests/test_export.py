"""moco-ext export: every file computes the features of the encoder within 1e-5."""

import json
import sys

import pytest
import torch
from encoders_on_disk import ARCH, TRANSFORM, write_run
from test_pretrained import settled

import moco_ext
from moco_ext import cli, encoders
from moco_ext.experiments import export as exporting
from moco_ext.experiments.export import export
from moco_ext.report.model_card import command_of
from moco_ext.train import resolve_config

pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, val_fraction=0.1, moco_k=64, lr=0.06)
    summary = {"data": "photos", "seconds": 12.3, "knn_top1": {"pixels": 30.0, "trained": 81.25}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def assert_same(program, encoder, batches=(1, 2, 7), size=16):
    for batch in batches:
        images = torch.randn(batch, 3, size, size)
        with torch.no_grad():
            expected = encoder(images)
        assert expected.std() > 1e-3
        got = torch.as_tensor(program(images))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_state_dict_of_torchvision(name, run, tmp_path):
    from safetensors.torch import load_file

    export(run, tmp_path / name, "torchvision")
    read = load_file if name.endswith("safetensors") else torch.load
    model = encoders.resolve(ARCH)(num_classes=1)
    model.fc = torch.nn.Identity()
    model.load_state_dict(read(tmp_path / name))
    assert_same(model.eval(), moco_ext.load_encoder(run)[0])


@pytest.mark.parametrize(
    ("arch", "name"),
    [("resnet18", "resnet18"), pytest.param("vit_b_32", "vit_base_patch32_224", marks=pytest.mark.slow)],
)
def test_state_dict_of_timm(arch, name, tmp_path):
    """And back, by torchvision's names."""
    timm = pytest.importorskip("timm")
    module = settled(encoders.resolve(arch)(num_classes=1))
    torch.save(module.state_dict(), tmp_path / "own.pth")
    encoder, _ = moco_ext.load_encoder(tmp_path / "own.pth", arch)
    export(encoder, tmp_path / "timm.pth", "timm")
    model = timm.create_model(name, num_classes=0)
    model.load_state_dict(torch.load(tmp_path / "timm.pth"))
    # timm's vision transformers take another epsilon in their norms: 1e-6 in both today.
    assert_same(model.eval(), encoder, (2,), 224)
    of_timm, _ = moco_ext.load_encoder(tmp_path / "timm.pth", f"timm:{name}")
    export(of_timm, tmp_path / "back.pth", "torchvision")
    back = torch.load(tmp_path / "back.pth")
    assert back.keys() == encoder.tensors().keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in encoder.tensors().items())


@pytest.mark.parametrize("head", [False, True])
def test_torch_export(head, run, tmp_path):
    export(run, tmp_path / "x.pt2", head=head)
    extra = {"transform": "", "arch": "", "num_features": ""}
    program = torch.export.load(tmp_path / "x.pt2", extra_files=extra)
    assert_same(program.module(), moco_ext.load_encoder(run, head=head)[0])
    assert json.loads(extra["transform"]) == TRANSFORM.as_dict()
    assert (json.loads(extra["arch"]), extra["num_features"]) == (ARCH, "8" if head else "256")


def test_onnx(run, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    export(run, tmp_path / "x.onnx")
    session = runtime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    encoder, _ = moco_ext.load_encoder(run)
    assert_same(lambda images: session.run(["features"], {"images": images.numpy()})[0], encoder)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["transform"]) == TRANSFORM.as_dict()
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx"]


def test_safetensors_with_a_model_card(run, tmp_path, capsys):
    from safetensors import safe_open
    from safetensors.torch import save_file

    assert cli.main(["export", str(run), "-o", str(tmp_path / "encoder.safetensors")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "encoder.safetensors")
    encoder, _ = moco_ext.load_encoder(run)
    again, transform = moco_ext.load_encoder(tmp_path / "encoder.safetensors")
    assert (again.arch, transform) == (ARCH, TRANSFORM)
    with pytest.raises(ValueError, match=f"arch: expected {ARCH}, which .* holds, got resnet18"):
        moco_ext.load_encoder(tmp_path / "encoder.safetensors", "resnet18")
    assert again.fingerprint() == encoder.fingerprint()
    with safe_open(tmp_path / "encoder.safetensors", "pt") as file:
        assert json.loads(file.metadata()["transform"]) == TRANSFORM.as_dict()
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", {"moco_ext": "0", "arch": "?"})
    with pytest.raises(ValueError, match="checkpoint: expected arch and transform as JSON in the metadata of"):
        moco_ext.load_encoder(tmp_path / "x.safetensors")
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: moco_ext\n")
    assert "\n# license: " in card
    flags = f"--data photos --recipe moco-v1 --val-fraction 0.1 --arch {ARCH} --learning-rate 0.06 --moco-k 64"
    for part in (
        f"```bash\nmoco-ext pretrain {flags}\n```",
        "| moco_k | 64 |",
        "(trained) | 81.25 |",
        "training | 12 |",
        "0.4, 0.5, 0.6",
    ):
        assert part in card, part
    assert f'load_encoder("{tmp_path / "encoder.safetensors"}"' in card


def test_hub_folder(run, tmp_path):
    assert cli.main(["export", str(run), "--format", "hub", "-o", str(tmp_path / "hub")]) == 0
    encoder, transform = moco_ext.load_encoder(tmp_path / "hub")
    assert transform == TRANSFORM
    assert_same(encoder, moco_ext.load_encoder(run)[0])
    assert "81.25" in (tmp_path / "hub" / "README.md").read_text()
    export(tmp_path / "hub", tmp_path / "again.pt2")
    assert_same(torch.export.load(tmp_path / "again.pt2").module(), encoder)


def test_an_export_into_the_run_directory_leaves_the_run(tmp_path):
    write_run(tmp_path / "run")
    config = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(FileExistsError, match=r"output: .*config.json exists and is not of an exported encoder"):
        export(tmp_path / "run", tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "README.md").exists()
    export(tmp_path / "run", tmp_path / "run" / "model.safetensors")  # a name that folders for the hub have too
    assert (tmp_path / "run" / "config.json").read_text() == config
    encoder, transform = moco_ext.load_encoder(tmp_path / "run")
    assert (encoder.arch, transform) == (ARCH, TRANSFORM)


def test_commands_of_runs_are_their_configurations():
    """The command's settings are those of the run, defaults and presets included."""
    import dataclasses

    from moco_ext.cli.flags import given
    from moco_ext.cli.plan import configuration

    for data, settings in (
        ("photos of me", {"schedule": (3, 4), "mlp": True, "lr": 0.1}),
        ("digits", {"cos": False, "schedule": (), "moco_k": 512}),
        ("cifar10", {"dictionary": "memory-bank", "arch": "resnet18"}),
        ("cifar10", {"dictionary": "memory-bank", "moco_m": 0.99}),  # as in the preset, and not as in a memory bank
        ("digits", {"precision": "bf16", "queue_dtype": "fp32"}),
        ("fashion-mnist", {}),
        ("fashion-mnist", {"arch": "resnet10"}),  # at the size of the data, unlike the preset
        ("fashion-mnist", {"arch": "resnet18", "image_size": 56}),
    ):
        config = resolve_config(data, settings)
        import shlex

        command = shlex.split(command_of(json.loads(json.dumps(dataclasses.asdict(config)))))
        args = cli.build_parser("pretrain").parse_args(command[1:])
        assert configuration(args) == config, command
        assert bool(args.recipe) == (data == "photos of me")  # else the size guide would choose settings
        assert given(args, type(config))


@pytest.mark.parametrize("format", [pytest.param("onnx", marks=pytest.mark.slow), "torch-export"])
def test_a_program_that_computes_something_else_is_not_written(format, run, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(exporting, "_TOLERANCE", -1.0)
    suffix = ".onnx" if format == "onnx" else ".pt2"
    with pytest.raises(RuntimeError, match=r"output: expected x.* to compute the features of .* at batch size 1"):
        export(run, tmp_path / f"x{suffix}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("output", "format", "error", "message"),
    [
        ("x.bin", None, ValueError, r"output: expected a folder, or a name that ends in .pth, .* got .*x.bin"),
        ("x.pth", "onnx", ValueError, r"output: expected a name that ends in .onnx for onnx, got .*x.pth"),
        ("x.pth", "keras", ValueError, "format: expected one of torchvision, .* got 'keras'"),
        ("none/x.pth", None, FileNotFoundError, "output: no such folder: .*none"),
        ("old.pth", None, FileExistsError, r"output: .*old.pth exists; overwrite \(--force\) replaces it"),
        ("old.pth", "hub", ValueError, "output: expected a folder for hub, got .*old.pth"),
        ("project/x.safetensors", None, FileExistsError, "README.md exists and is no model card of moco_ext"),
        ("project", "hub", FileExistsError, "README.md exists and is no model card of moco_ext"),
    ],
)
def test_errors_leave_nothing(output, format, error, message, run, tmp_path):
    (tmp_path / "old.pth").write_bytes(b"old")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("# Mine\n")
    with pytest.raises(error, match=message):
        export(run, tmp_path / output, format)
    assert (tmp_path / "old.pth").read_bytes() == b"old"
    assert {path.name for path in tmp_path.rglob("*")} == {"old.pth", "project", "README.md"}
    if output == "old.pth" and format is None:
        export(run, tmp_path / output, overwrite=True)
        assert torch.load(tmp_path / "old.pth")


def test_onnx_without_its_packages(run, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MOCO_EXT_DEBUG", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert cli.main(["export", str(run), "-o", str(tmp_path / "x.onnx")]) == 1
    assert "this needs onnx, which is not installed: pip install onnx" in capsys.readouterr().err
