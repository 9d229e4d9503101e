"""``moco-ext knn``, ``linear`` and ``finetune``, run in this process."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch
from test_classifier import ARCH, encoder_of
from training import run_in

from moco_ext import MoCo, cli, encoders
from moco_ext import data as mdata
from moco_ext.checkpoints.pretrained import load_pretrained
from moco_ext.checkpoints.training import save_checkpoint
from moco_ext.evaluate.scores import all_features, knn_score
from moco_ext.train.classifier import Classifier

pytest.importorskip("tensorboard")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory like that of pre-training on digits, with an untrained encoder."""
    folder = tmp_path_factory.mktemp("run")
    model = MoCo(ARCH, dim=8, K=16)
    model.encoder_q.load_state_dict(encoder_of(mdata.load("digits")).state_dict() | state_of_head(model))
    save_checkpoint(
        folder / "checkpoint.pth", epoch=1, arch=ARCH, model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1)
    )
    (folder / "config.json").write_text(json.dumps({"data": "digits", "arch": ARCH, "knn_k": 20}))
    return folder


def state_of_head(model) -> dict:
    return {name: value for name, value in model.encoder_q.state_dict().items() if name.startswith("fc.")}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of small PNGs and JPEGs, horizontal and vertical waves, with sixteen training images."""
    from PIL import Image

    root = tmp_path_factory.mktemp("photos")
    wave = (127 + 100 * torch.sin(torch.arange(48) / 3)).to(torch.uint8)
    for part, n in (("train", 8), ("val", 3)):
        for name, image in (("rows", wave[:, None].expand(48, 40)), ("columns", wave[None, :40].expand(48, 40))):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(image.contiguous().numpy()).save(
                    root / part / name / f"{i}.{'png' if i % 2 else 'jpg'}"
                )
    return root


def answer(capsys, *arguments) -> dict:
    assert cli.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("own", [(0.9,), (0.1, 0.5, 0.9)], ids=str)
def test_images_are_normalized_as_in_training(run, tmp_path, own, capsys):
    """An encoder of other images, gray or in color, evaluated on digits."""
    checkpoint = torch.load(run / "checkpoint.pth", weights_only=True)
    checkpoint["transform"] = mdata.EvalTransform(8, own, own, 1.0).as_dict()
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    shutil.copy(run / "config.json", tmp_path)
    cpu = "--threads", 1, "--device", "cpu"
    found = answer(capsys, "knn", tmp_path, "--data", "digits", *cpu)["knn_top1"]
    digits = dataclasses.replace(mdata.load("digits"), mean=own, std=own)
    features = all_features(digits, run_in(tmp_path), trained=load_pretrained(tmp_path)[0])
    assert found["trained"] == round(knn_score(digits, features["trained"], k=20), 2)
    assert found != answer(capsys, "knn", run, *cpu, "--output", tmp_path)["knn_top1"]


@pytest.mark.parametrize(
    "command",
    [("knn",), ("linear",), ("linear", "--solver", "sgd", "--epochs", 1)],
    ids=lambda words: " ".join(map(str, words)),
)
def test_the_precision_of_the_encoder(run, tmp_path, command, capsys, monkeypatch):
    """It does not choose the solver."""
    seen = set()
    autocast = encoders.autocast

    def noted(device, precision):
        seen.add(precision)
        return autocast(device, precision)

    for module in ("moco_ext.evaluate.features", "moco_ext.train.classifier"):
        monkeypatch.setattr(f"{module}.autocast", noted)
    name, *flags = command
    found = answer(capsys, name, run, *flags, "--precision", "bf16", "--threads", 1, "--output", tmp_path)
    assert found["precision"] == "bf16"
    assert found.get("solver") == {"knn": None, "linear": "sgd" if flags else "lbfgs"}[name]
    assert seen == {"bf16"}


def test_the_images_of_a_run_that_was_started_elsewhere(run, photos, tmp_path, monkeypatch, capsys):
    """A folder of that name in the working directory may hold other images."""
    started, here = tmp_path / "started", tmp_path / "here"
    shutil.copytree(run, started / "run")
    here.mkdir()
    (started / "photos").symlink_to(photos)
    (started / "run" / "config.json").write_text(json.dumps({"data": "photos", "arch": ARCH, "image_size": 8}))
    (started / "run" / "environment.json").write_text(json.dumps({"directory": str(started)}))
    monkeypatch.chdir(here)
    assert answer(capsys, "knn", started / "run", "--threads", 1, "-k", 3)["data"] == str(started / "photos")


def test_timms_weights_by_name(tmp_path, monkeypatch, capsys):
    """A config.json in the working directory is not theirs."""
    timm = pytest.importorskip("timm")
    published = timm.create_model("test_resnet").eval()
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: copy.deepcopy(published))  # no download
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"data": "photos", "knn_k": 3}))
    weights = ("digits", "--pretrained", "timm:test_resnet.r160_in1k", "--image-size", 32, "--threads", 1)
    found = answer(capsys, "knn", *weights)
    assert (found["k"], found["knn_top1"]["pixels"] > 90, found["knn_top1"]["trained"] > 50) == (200, True, True)
    sgd = ("--solver", "sgd", "--epochs", 1, "--schedule", "--labels-per-class", 2)
    assert answer(capsys, "linear", *weights, *sgd)["arch"] == "timm:test_resnet"  # its tensors are unchanged
    tuned = ("--epochs", 1, "--schedule", "--labels-per-class", 2)
    assert answer(capsys, "finetune", *weights, *tuned)["arch"] == "timm:test_resnet"


def test_linear_solves_unless_sgd_is_meant(run, tmp_path, capsys):
    solved = answer(capsys, "linear", run)
    assert solved["solver"] == "lbfgs"
    assert solved == json.loads((run / "linear.json").read_text())
    sgd = ("linear", run, "--epochs", 1, "--lr", 1, "--schedule", "--output", tmp_path, "--threads", 1)
    trained = answer(capsys, *sgd)
    assert (trained["solver"], trained["epochs"], trained["schedule"]) == ("sgd", 1, [])
    assert trained["crop_min"] == 0.5  # as in the pre-training of digits
    assert 20 < trained["top1"] <= trained["top5"] <= 100  # a guess is right in 10 % of the cases
    assert trained == json.loads((tmp_path / "linear.json").read_text())
    again = answer(capsys, "linear", run, "--evaluate", "--output", tmp_path)
    assert again == {name: trained[name] for name in again}  # the settings too
    changed = ("--resume", "auto", "--epochs", 2, "--lr", 2, "--schedule", "--output", tmp_path)
    assert cli.main([*map(str, (*sgd[:2], *changed))]) == 0
    assert "resumed with changed settings: epochs 1 -> 2, lr 1.0 -> 2.0\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "linear.json").read_text())["epochs"] == 2
    assert len((tmp_path / "linear" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_resumed_classifier_of_other_features_is_noticed(run, tmp_path, capsys):
    model = Classifier(encoders.resolve(ARCH)(num_classes=1), 10, 8)
    optimizer = torch.optim.SGD(model.fc.parameters(), 0.1)
    save_checkpoint(tmp_path / "x.pth", epoch=1, arch=ARCH, model=model, optimizer=optimizer, best_acc1=1.0)
    assert cli.main(["linear", str(run), "-e", "--resume", str(tmp_path / "x.pth"), "--output", str(tmp_path)]) == 1
    assert "encoder: expected all 54 frozen tensors as in the weights file" in capsys.readouterr().err


def test_finetune_and_the_comparison_from_scratch(run, tmp_path, capsys):
    flags = ("--epochs", 1, "--fraction", 0.1, "-b", 32, "--output", tmp_path, "--threads", 1, "--logger", "csv")
    tuned = answer(capsys, "finetune", run, *flags)
    scratch = answer(capsys, "finetune", run, "--scratch", *flags)
    assert (tuned["fraction"], tuned["lr"], tuned["lr_head"], tuned["weight_decay"]) == (0.1, 0.01, 0.1, 1e-4)
    assert tuned["top1"] != scratch["top1"]
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"finetune.json", "finetune.pth", "finetune_best.pth", "finetune", "scratch.json", "scratch.pth"}
    assert {path.name for path in (tmp_path / "finetune").iterdir()} >= {"metrics.jsonl", "metrics.csv"}
    assert not (tmp_path / "finetune" / "tensorboard").exists()
    assert load_pretrained(tmp_path / "finetune.pth")[1] == ARCH
    assert "fc.0.running_mean" in {
        n.removeprefix("module.") for n in torch.load(tmp_path / "finetune.pth")["state_dict"]
    }


def test_a_classifier_of_another_image_size_is_noticed(run, tmp_path, capsys):
    flags = ("finetune", run, "--fraction", 0.1, "-b", 32, "--output", tmp_path, "--threads", 1, "--logger", "none")
    tuned = answer(capsys, *flags, "--epochs", 1, "--image-size", 12)
    for more in (["--evaluate"], ["--epochs", 2, "--resume", "auto"]):
        assert cli.main([*map(str, (*flags, *more))]) == 1
        assert f"image_size: expected 12, that of the images which {tmp_path}/finetune.pth" in capsys.readouterr().err
    assert answer(capsys, *flags, "--evaluate", "--image-size", 12)["top1"] == tuned["top1"]


def test_images_have_the_size_of_the_training(run, tmp_path, capsys):
    """Also where there is no config.json, or where it leaves the size to the data."""
    saved = torch.load(run / "checkpoint.pth")
    transform = mdata.EvalTransform.of(mdata.load("digits", image_size=12)).as_dict()
    torch.save(saved | {"transform": transform}, tmp_path / "copy.pth")
    (tmp_path / "run").mkdir()
    torch.save(saved | {"transform": transform}, tmp_path / "run" / "checkpoint.pth")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"data": "cifar10", "image_size": None}))
    assert cli.main(["export", str(tmp_path / "copy.pth"), "-o", str(tmp_path / "exported.safetensors")]) == 0
    capsys.readouterr()
    flags = ("-k", 20, "--output", tmp_path, "--threads", 1)
    expected = answer(capsys, "knn", run, *flags, "--image-size", 12)["knn_top1"]
    assert answer(capsys, "knn", run, *flags)["knn_top1"] != expected
    for weights in ("copy.pth", "exported.safetensors"):
        named = ("knn", "digits", "--pretrained", tmp_path / weights, "-a", ARCH)
        assert answer(capsys, *named, *flags)["knn_top1"] == expected
    assert answer(capsys, "knn", tmp_path / "run", "--data", "digits", *flags)["knn_top1"] == expected


def test_few_labels(run, tmp_path, capsys):
    flags = ("--labels-per-class", 3, "--seed", 1, "--output", tmp_path, "--threads", 1)
    solved, voted = (answer(capsys, command, run, *flags) for command in ("linear", "knn"))
    assert solved["solver"] == "lbfgs"
    assert (solved["labels_per_class"], voted["seed"]) == (3, 1)
    for name in ("pixels", "trained"):
        assert solved["linear_top1"][name] < answer(capsys, "linear", run)["linear_top1"][name] - 5
        assert 20 < voted["knn_top1"][name] < 95
    flags = (*flags, "--epochs", 1, "-b", 10)
    assert answer(capsys, "linear", run, *flags)["solver"] == "sgd"
    assert answer(capsys, "finetune", run, *flags)["labels_per_class"] == 3
    assert json.loads((tmp_path / "finetune" / "metrics.jsonl").read_text())["step"] == 3  # of 10 images


def test_an_image_folder_and_torchvision_weights(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # runs/ is made here
    torch.save(encoders.resolve("resnet10")(num_classes=1000).state_dict(), "weights.pth")
    source = (photos, "--pretrained", "weights.pth", "-a", "resnet10", "-j", 0, "--threads", 1)
    assert answer(capsys, "knn", *source, "-k", 3)["knn_top1"]["pixels"] == 100
    trained = answer(capsys, "linear", *source, "--epochs", 1, "-b", 8)
    assert (trained["solver"], trained["lr"], trained["crop_min"], trained["top5"]) == ("sgd", 30, 0.08, 100)
    assert (tmp_path / "runs" / f"linear-{photos.name}" / "linear_best.pth").is_file()
    assert answer(capsys, "linear", *source, "--solver", "lbfgs")["linear_top1"].keys() == {"pixels", "trained"}
    scratch = answer(capsys, "finetune", photos, "--scratch", "-a", "resnet10", "--epochs", 1, "-b", 8, "-j", 0)
    assert scratch["arch"] == "resnet10"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["linear", "RUN", "--solver", "lbfgs", "--lr", "3"], "solver: expected no --lr with lbfgs"),
        (["linear", "RUN", "-C", "2", "--epochs", "3"], "solver: expected no --epochs with lbfgs"),
        (["linear", "RUN", "-C", "2", "--solver", "sgd"], "solver: expected no -C with sgd"),
        (["linear", "digits", "--pretrained", "RUN", "--data", "cifar10"], "data: expected DATA or --data, got both"),
        (["linear", "RUN", "-e", "--output", "nowhere"], "checkpoint: no such file: nowhere/linear.pth"),
        (["linear", "RUN", "-a", "resnet18"], f"arch: expected {ARCH}"),
        (["finetune", "RUN", "--fraction", "0"], "fraction: expected a share"),
        (["finetune", "RUN", "--fraction", "0.1", "--labels-per-class", "3"], "labels_per_class: expected no fraction"),
        (["linear", "RUN", "--labels-per-class", "1000"], "labels_per_class: expected 1 to 122, the images of the sm"),
        (["linear", "RUN", "--solver", "lbfgs", "--seed", "3"], "solver: expected no --seed with lbfgs"),
        (["finetune", "digits", "--pretrained", "torchvision:DEFAULT"], "arch: expected --arch"),
        (["finetune", "RUN", "--epochs", "0"], "epochs: expected at least 1"),
    ],
)
def test_errors_are_one_line(run, arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("MOCO_EXT_DEBUG", raising=False)
    assert cli.main([str(run) if word == "RUN" else word for word in arguments]) == 1
    err = capsys.readouterr().err.strip()
    assert err.startswith(f"moco-ext: error: {message}")
    assert "\n" not in err


def test_main_lincls_flags_keep_their_names():
    flags = (
        "DIR -a resnet50 -j 4 --epochs 100 --start-epoch 3 -b 256 --learning-rate 30 --schedule 60 80 --momentum 0.9 "
        "--weight-decay 0 -p 10 --resume f -e --world-size 1 --rank 0 --dist-url tcp://h:1 --dist-backend nccl "
        "--seed 1 --gpu 0 --multiprocessing-distributed --pretrained w"
    )
    for command in ("linear", "finetune"):
        given = vars(cli.build_parser(command).parse_args([command, *flags.split()]))
        assert (given["source"], given["pretrained"], given["lr"], given["weight_decay"]) == ("DIR", "w", 30.0, 0.0)
        assert given["schedule"] == [60, 80]
        assert given["evaluate"] is given["multiprocessing_distributed"] is True
