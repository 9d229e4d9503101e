"""``moco-ext``: whole commands, their flags, and errors of one line."""

import builtins
import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

import moco_ext
from moco_ext import cli

pytest.importorskip("matplotlib")

TINY = ["--epochs", "2", "--schedule", "--online-knn", "1", "--moco-k", "100", "-b", "256", "--threads", "1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a run of two epochs on digits."""
    output = tmp_path_factory.mktemp("runs") / "demo"
    assert cli.main(["pretrain", "--data", "digits", "--output", str(output), *TINY]) == 0
    return output


def test_pretrain_trains_evaluates_and_reports(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {"checkpoint.pth", "metrics.jsonl", "summary.json", "config.json", "report.html"}
    summary = json.loads((finished / "summary.json").read_text())
    assert summary.keys() == {"data", "seconds", "knn_top1", "linear_top1", "test_images", "few_labels"}
    assert summary["data"] == "digits"
    assert summary["seconds"] > 0
    for protocol in ("knn_top1", "linear_top1"):
        assert summary[protocol].keys() == {"pixels", "untrained", "trained"}
        assert all(80 < score <= 100 for score in summary[protocol].values())
    config = json.loads((finished / "config.json").read_text())
    assert (config["epochs"], config["moco_k"], config["cos"], config["arch"]) == (2, 100, False, "resnet8-small")


@pytest.mark.slow
def test_resume_adds_epochs(finished, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("moco_ext.experiments.pretrain.top1", lambda *features: {})  # tested elsewhere
    monkeypatch.setattr("moco_ext.experiments.pretrain.write_report", lambda *content: None)
    arguments = ["pretrain", "--output", str(tmp_path), *TINY, "--epochs", "3"]
    assert cli.main([*arguments, "--resume", str(finished / "checkpoint.pth")]) == 0
    assert "epoch 3/3" in capsys.readouterr().out
    assert [json.loads(line)["epoch"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [3]


@pytest.mark.parametrize("command", ["knn", "linear"])
def test_knn_and_linear_repeat_the_summary(finished, capsys, command):
    assert cli.main([command, str(finished), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    summary = json.loads((finished / "summary.json").read_text())
    for name in ("pixels", "trained"):
        assert answer[f"{command}_top1"][name] == pytest.approx(summary[f"{command}_top1"][name], abs=0.4)


def test_knn_of_a_bare_checkpoint_needs_data(finished, tmp_path, capsys):
    bare = tmp_path / "bare.pth"
    bare.write_bytes((finished / "checkpoint.pth").read_bytes())
    assert cli.main(["knn", str(bare)]) == 1
    assert "data: expected --data" in capsys.readouterr().err
    assert cli.main(["knn", str(bare), "--data", "digits", "-k", "1"]) == 0
    assert re.search(r"encoder\s+│\s+\d\d\.\d\d", capsys.readouterr().out)


@pytest.mark.parametrize("flags", ["--schedule 1 2 3", "--schedule 1", "--schedule", "--schedule 2 --cos"])
def test_milestones_after_the_last_epoch_are_warned_of(capsys, flags):
    assert cli.main(["pretrain", "--data", "digits", *TINY, *flags.split(), "--dry-run"]) == 0
    late = "schedule: the learning rate would drop after 2, 3 epochs, but the run has only 2; see --schedule"
    assert (late in capsys.readouterr().err) == (flags == "--schedule 1 2 3")


def test_image_folder_without_val(tmp_path, capsys):
    for name, color in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (20, 20), color).save(tmp_path / "images" / name / f"{i}.png")
    output = tmp_path / "run"
    flags = ["-a", "resnet10", "--epochs", "1", "-b", "4", "--moco-k", "8", "-j", "0", "--mlp", "--aug-plus", "--cos"]
    assert cli.main(["pretrain", str(tmp_path / "images"), "--output", str(output), *flags]) == 0
    err = capsys.readouterr().err
    assert "moco-ext: warning: moco_k: 8 keys but only 4 images" in err
    assert "no val/ folder" in err
    summary = json.loads((output / "summary.json").read_text())
    assert summary.keys() == {"data", "seconds", "label_free"}
    page = (output / "report.html").read_text()
    assert "<h2>Without labels" in page
    assert f"<td>{summary['label_free']['trained']['contrast_top1']:.1f}</td>" in page
    assert "Not evaluated" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "--data", "digit"], "data: expected one of digits"),
        (["pretrain", "some", "--data", "digits"], "data: expected DIR or --data, got both: some and digits"),
        (
            ["pretrain", "a", "--lr", "1", "b"],
            "data: expected one of digits, fashion-mnist, cifar10, cifar100, or a folder, list or shards of images, "
            "got 'a:b'",
        ),
        (["pretrain", ""], "data: expected folders of images or lists of them, got ['']"),
        (["pretrain", "-a", "resnet19"], "arch: expected a torchvision model"),
        (["pretrain", "--lr", "-1"], "lr: expected a positive number, got -1.0"),
        (["pretrain", "--resume", "none.pth"], "checkpoint: no such file: none.pth"),
        (["knn", "nowhere"], "data: expected --data"),
        (["linear", "nowhere", "--data", "digits"], "checkpoint: no such file: nowhere"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("MOCO_EXT_DEBUG", raising=False)
    output = ["--output", str(tmp_path / "run")] if arguments[0] == "pretrain" else []
    assert cli.main(arguments + output) == 1
    err = capsys.readouterr().err.strip()
    assert err.startswith(f"moco-ext: error: {message}")
    assert "\n" not in err


def test_an_output_that_is_a_file(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("MOCO_EXT_DEBUG", raising=False)
    (tmp_path / "file").write_text("")
    assert cli.main(["knn", str(tmp_path), "--data", "digits", "--output", str(tmp_path / "file")]) == 1
    error = f"output: expected a directory, got the file {tmp_path / 'file'}"
    assert capsys.readouterr().err == f"moco-ext: error: {error}\n"


def test_paths_from_home(capsys, tmp_path, monkeypatch):
    """No shell expands ``~`` in a file or after ``=``."""
    pytest.importorskip("yaml")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    (tmp_path / "run.yaml").write_text("data: [b, ~/a]\noutput: ~/out")
    assert cli.main(["pretrain", "--config", "run.yaml", "--dry-run"]) == 0
    assert f"b:{tmp_path}/a" in capsys.readouterr().out.replace("\n", "")
    (tmp_path / "out").write_text("")
    for flags in (["--config", "run.yaml"], ["b", "--output=~/out"]):
        assert cli.main(["pretrain", *flags]) == 1
        assert f"got the file {tmp_path}/out" in capsys.readouterr().err


def test_folders_may_be_between_flags(tmp_path, capsys):
    for name in "abc":
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert cli.main(["pretrain", a, "--epochs", "3", b, "--mlp", c, "--dry-run"]) == 0
    assert ":".join([a, b, c]) in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    ("images", "message"), [(0, "expected images in "), (1, "expected at least two training images")]
)
def test_too_few_images_are_one_line_and_leave_nothing(tmp_path, capsys, monkeypatch, images, message):
    monkeypatch.delenv("MOCO_EXT_DEBUG", raising=False)
    (tmp_path / "photos").mkdir()
    for i in range(images):
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / f"{i}.png")
    flags = ["-a", "resnet8-small", "--moco-k", "8", "-b", "4", "-j", "0"]
    assert cli.main(["pretrain", str(tmp_path / "photos"), "--output", str(tmp_path / "run"), *flags]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"moco-ext: error: data: {message}")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--moco-k 99999999999", "moco_k, moco_dim: expected a queue that fits in the"),
        ("--moco-k 9999999999999999999999", "moco_k, moco_dim: expected a queue that fits in the"),
        ("--moco-dim 99999999999", "moco_k, moco_dim: expected a queue that fits in the"),
        ("--moco-dim 100000000 --moco-k 1 --arch resnet50", "out of memory: "),
        ("--moco-k many", "argument --moco-k: invalid int value: 'many'"),
        ("--no-such-flag", "unrecognized arguments: --no-such-flag"),
        ("--batchsize=8", "unrecognized arguments: --batchsize=8; did you mean --batch-size"),
        ("--device tpu9", "device: "),
        ("--device meta", "device: expected cpu or cuda, got meta"),
        ("--device mps", "device: expected cpu or cuda, got mps"),
        ("--threads 0", "threads: expected at least 1, got 0"),
        ("--gpu -1", "gpu: expected 0 or more, got -1"),
        ("--start-epoch 80", "start_epoch: expected less than the 80 epochs, got 80"),
        ("--start-epoch -1", "start_epoch: expected 0 or more, got -1"),
        ("--print-freq -1", "print_freq: expected at least 1, got -1"),
        ("--keep -1", "keep: expected at least 1, got -1"),
        ("--save-every -1", "save_every: expected 0 or more, got -1"),
        ("--schedule 3 -1", "schedule: expected 0 or more, got (3, -1)"),
        ("--momentum 1", "momentum: expected a number from 0 to below 1, got 1.0"),
        ("--momentum nan", "momentum: expected a number from 0 to below 1, got nan"),
        ("--wd -1", "weight_decay: expected 0 or more, got -1.0"),
        ("--precision fp8", "precision: expected one of fp32, bf16, fp16, got 'fp8'"),
        ("-j 1000", "workers: expected at most"),
        ("-j -1", "workers: expected 0 or more, got -1"),
        ("--world-size 0", "world_size: expected at least 1, got 0"),
        ("--world-size 2 --rank 2 --dist-url tcp://h:1", "rank: expected less than --world-size 2, got 2"),
        ("--world-size 2 --rank 0 --dist-url here", "dist_url: expected tcp://HOST:PORT, file:///PATH or env://"),
        ("--world-size 2 --rank 0 --dist-url tcp://localhost:99999", "dist_url: "),
        ("--world-size 2 --rank 0 --dist-url tcp://nowhere.invalid:29500", "dist_url: expected an address that"),
        ("--multiprocessing-distributed --dist-backend smoke", "dist_backend: expected one of nccl, gloo, got 'smoke'"),
        ("--multiprocessing-distributed --dist-timeout 0", "dist_timeout: expected a positive number, got 0.0"),
    ],
)
def test_impossible_flags_are_one_line_and_leave_nothing(flags, message, capfd, tmp_path, monkeypatch):
    monkeypatch.delenv("MOCO_EXT_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    try:
        status = cli.main(["pretrain", "--data", "digits", "--device", "cpu", *flags.split(), "--output", "run"])
    except SystemExit as error:  # argparse
        status = error.code
    finally:
        torch.set_num_threads(threads)
    assert status in (1, 2)
    err = capfd.readouterr().err
    assert err.startswith(f"moco-ext: error: {message}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_finds_no_others_says_so(capfd, tmp_path, monkeypatch):
    monkeypatch.delenv("MOCO_EXT_DEBUG", raising=False)
    group = ["--world-size", "2", "--rank", "1", "--dist-url", "tcp://localhost:9", "--dist-timeout", "0.02"]
    assert cli.main(["pretrain", "--device", "cpu", *group, "--output", str(tmp_path / "run")]) == 1
    *_, last = capfd.readouterr().err.splitlines()  # after torch's own warnings
    assert last.startswith("moco-ext: error: process group: rank 1 could not join 2 processes at tcp://localhost:9")


def test_version_and_help(capsys):
    assert cli.main([]) == 0
    assert re.search(r"pretrain .*momentum contrast", capsys.readouterr().out)
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"moco-ext {moco_ext.__version__}\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: moco-ext {command}" in capsys.readouterr().out


def test_a_command_imports_only_what_it_needs():
    program = "import sys; from moco_ext import cli; cli.build_parser('convert'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "moco_ext.cli.convert" in loaded
    assert not {"moco_ext.cli.pretrain", "moco_ext.train", "torchvision", "sklearn", "matplotlib"} & set(loaded)


def test_a_missing_optional_dependency_is_named(capsys, monkeypatch):
    monkeypatch.delenv("MOCO_EXT_DEBUG", raising=False)
    genuine = builtins.__import__

    def without_sklearn(name, *rest):
        if name.split(".")[0] == "sklearn":
            raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
        return genuine(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    assert cli.main(["pretrain", "--data", "digits"]) == 1
    assert capsys.readouterr().err == (
        "moco-ext: error: this needs sklearn, which is not installed: pip install scikit-learn (all that training "
        "needs, from a checkout: pip install '.[train]')\n"
    )


def test_main_moco_flags_keep_their_names():
    flags = (
        "DIR -a resnet18 --epochs 9 -b 8 --learning-rate 0.1 --schedule 3 6 --momentum 0.8 --weight-decay 0.01 -p 5 "
        "--resume f --seed 4 --moco-dim 64 --moco-k 32 --moco-m 0.9 --moco-t 0.1 --mlp --aug-plus --cos -j 2"
    )
    given = vars(cli.build_parser("pretrain").parse_args(["pretrain", *flags.split()]))
    assert given["schedule"] == [3, 6]
    assert (given["lr"], given["weight_decay"], given["batch_size"], given["workers"]) == (0.1, 0.01, 8, 2)
    assert given["mlp"] is given["aug_plus"] is given["cos"] is True
    assert "knn_every" not in given  # absent flags leave the setting to recipe and preset


def test_dry_run_prints_the_configuration_and_the_memory(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["pretrain", "--data", "digits", "--recipe", "moco-v2", "--moco-k", "1000", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"moco_t\W+0\.2\b", out)
    assert re.search(r"dictionary\W+0\.5\b", out)  # 1000 * 128 * 4 bytes
    assert list(tmp_path.iterdir()) == []


def test_estimated_memory():
    """Parameters and dictionary are exact; activations grow with the batch."""
    from moco_ext.train import PretrainConfig
    from moco_ext.train.memory import estimate

    config = PretrainConfig("digits", arch="resnet18", moco_dim=128, moco_k=1000, queue_dtype="bf16")
    parts = estimate(config, 32, 100, 8)
    parameters = (11_689_512 - 513_000 + 512 * 128 + 128) * 4  # torchvision's count, with a head of 128
    assert parts["encoders"] == 2 * parameters
    assert parts["gradients"] == parts["optimizer"] == parameters
    assert parts["dictionary"] == 1000 * 128 * 2 + 8  # the pointer
    assert (
        estimate(dataclasses.replace(config, queue_dtype=None, precision="fp16"), 32, 100, 8)["dictionary"]
        == (parts["dictionary"])
    )
    assert parts["images"] == 2 * 8 * 3 * 32 * 32 * 4
    twice = estimate(config, 32, 100, 16)
    assert twice["activations"] == pytest.approx(2 * parts["activations"], rel=0.02)  # BatchNorm keeps means too


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "v9"], "recipe: expected one of moco-v1"),
        (["--dictionary", "heap"], "dictionary: expected one of queue"),
        (["--shuffle-bn", "loader", "--symmetric"], "symmetric: expected"),
        (["some/dir", "--data", "digits"], "data: expected DIR or --data, got both"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["pretrain", *flags]) == 1
    assert f"moco-ext: error: {message}" in capsys.readouterr().err
