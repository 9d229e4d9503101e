"""``--config FILE`` and ``--dry-run``: the same names as the flags, and where each value comes from."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("yaml")

from moco_ext import cli
from moco_ext.cli.config_file import with_file
from moco_ext.cli.plan import configuration, make_plan
from moco_ext.runs.options import RunOptions
from moco_ext.train.config import PretrainConfig


def parse(command, *argv):
    parser = cli.build_parser(command)
    return with_file(parser.of_command, argv, parser.parse_args([command, *argv]))


@pytest.fixture
def written(tmp_path):
    """A function that writes a file and returns its path."""

    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


YAML = """
data: digits
output: runs/a
moco-k: 256        # dashes or underscores
moco_t: 2e-1       # text in YAML 1.1
learning_rate: 1
mlp: true
cos: no
schedule: [3, 6]
workers: null
"""
TOML = """
data = "digits"
output = "runs/a"
moco-k = 256
moco_t = 0.2
lr = 1
mlp = true
cos = false
schedule = [3, 6]
"""
JSON = {
    "data": "digits",
    "output": "runs/a",
    "moco_k": 256,
    "moco-t": 0.2,
    "lr": 1.0,
    "mlp": True,
    "cos": False,
    "schedule": [3, 6],
}


@pytest.mark.parametrize(("name", "text"), [("a.yaml", YAML), ("a.TOML", TOML), ("a.json", json.dumps(JSON))])
def test_all_formats_say_the_same(written, name, text):
    if name == "a.TOML":
        pytest.importorskip("tomllib")  # Python 3.11
    args = parse("pretrain", "--config", written(text, name))
    flags = "--data digits --output runs/a --moco-k 256 --moco-t 0.2 --lr 1 --mlp --no-cos --schedule 3 6"
    assert configuration(args) == configuration(parse("pretrain", *flags.split()))
    assert args.output == "runs/a"
    assert not hasattr(args, "workers")


@pytest.mark.parametrize(
    ("name", "text"), [("a.yaml", "epochs: 3"), ("a.toml", "epochs = 3"), ("a.json", '{"epochs": 3}')]
)
def test_a_byte_order_mark(written, name, text):
    """Editors on Windows write it."""
    assert parse("pretrain", "--config", written("\ufeff" + text, name)).epochs == 3


def test_flags_win(written):
    path = written(YAML)
    args = parse("pretrain", "--moco-k", "512", "--config", path, "--no-mlp", "--schedule", "5")
    config = configuration(args)
    assert (config.moco_k, config.mlp, config.schedule, config.lr) == (512, False, (5,), 1.0)
    assert args.from_file == {"data", "output", "moco_t", "lr", "cos"}
    args = parse("pretrain", "photos", "--config", path)
    assert configuration(args).data == "photos"
    assert parse("pretrain", "--data", "cifar10", "--config", path).data == "cifar10"


def test_an_empty_folder_name_does_not_mean_the_default():
    with pytest.raises(ValueError, match=r"^data: expected folders of images or lists of them, got \['a', ''\]"):
        configuration(parse("pretrain", "a", ""))


def test_a_schedule_turns_off_the_cosine_of_a_file(written):
    path = written("cos: true\nepochs: 9")
    assert configuration(parse("pretrain", "--config", path)).cos
    assert not configuration(parse("pretrain", "--config", path, "--schedule", "3")).cos


@pytest.mark.parametrize(
    ("content", "flags", "name", "value"),
    [
        ("lr: 0.03\nlr_base: 0.3", ["--lr", "0.1"], "lr_base", None),
        ("epochs: 200\nsteps: 1000", ["--epochs", "10"], "steps", 0),
        ("epochs: 200\nsteps: 1000", ["--batch-size", "8"], "steps", 1000),
        ("lr_every: 100", ["--schedule", "3"], "lr_every", 0),
        ("lr_every: 100", ["--cos"], "lr_every", 0),
        ("lr_every: 100", ["--no-cos"], "lr_every", 100),
    ],
)
def test_a_flag_wins_over_what_replaces_it_in_a_file(written, content, flags, name, value):
    assert getattr(configuration(parse("pretrain", "--config", written(content), *flags)), name) == value


def test_several_folders_and_loggers_in_a_list(written):
    args = parse("pretrain", "--config", written("data: [a, b]\nlogger: [csv, wandb]\nschedule: 3"))
    assert (args.data, args.logger, args.schedule) == ("a:b", "csv,wandb", [3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "moco_kk: 3",
            r"config: expected names of flags of moco-ext pretrain in .*, got 'moco_kk'; did you mean moco_k",
        ),
        ("no-mlp: true", r"config: expected names of flags"),
        ("config: b.yaml", r"config: expected names of flags"),
        ("lr: 1\nlearning-rate: 2", r"config: expected lr once in .*, got another name of it, 'learning-rate'"),
        ("moco_k: many", r"moco_k: expected an integer, got 'many'"),
        ("moco_k: 2.5", r"moco_k: expected an integer, got 2.5"),
        ("lr: true", r"lr: expected a number, got True"),
        ("lr: [1, 2]", r"lr: expected a number, got \[1, 2\]"),
        ("mlp: 1", r"mlp: expected true or false, got 1"),
        ("schedule: [3, x]", r"schedule: expected an integer, got 'x'"),
        ("data: {a: b}", r"data: expected text, got \{'a': 'b'\}"),
        ("- 3", r"config: expected names and values in .*, got list"),
        ("a: [", r"config: .*run.yaml cannot be read: while parsing"),
        ("lr: 1\nmlp: true\nlr: 2", r"config: .*run.yaml cannot be read: expected lr once"),
    ],
)
def test_errors_in_files(written, text, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        parse("pretrain", "--config", written(text))


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", "{"), ("b.json", '{"lr": 1, "lr": 2}'), ("a.toml", "a = "), ("a.txt", "lr: 1")]
)
def test_files_that_cannot_be_read(written, name, text):
    with pytest.raises(ValueError, match=r"^config: "):
        parse("pretrain", "--config", written(text, name))


def test_a_missing_file(capsys):
    assert cli.main(["pretrain", "--config", "none.yaml"]) == 1
    assert capsys.readouterr().err == (
        "moco-ext: error: config: expected a file (.yaml, .yml, .toml, .json) or a run directory, got none.yaml\n"
    )


def test_choices_of_other_commands(written):
    path = written("solver: newton")
    with pytest.raises(ValueError, match=r"^solver: expected one of sgd, lbfgs, got 'newton'"):
        parse("linear", "runs/a", "--config", path)
    args = parse("linear", "runs/a", "--config", written("solver: sgd\nepochs: 3\njson: true\nval-fraction: 0.1"))
    assert (args.source, args.solver, args.epochs, args.json, args.val_fraction) == ("runs/a", "sgd", 3, True, 0.1)
    assert parse("knn", "runs/a", "--config", written("knn_k: 7\ntemperature: 0.1")).knn_k == 7
    assert parse("finetune", "runs/a", "--config", written("fraction: 0.1\nhead-bn: false")).head_bn is False
    args = parse("ablate", "--config", written("output: runs/grid\nmoco-m: [0, 0.9]\nseeds: [1, 2]"))
    assert (args.output, args.moco_m, args.seeds) == ("runs/grid", [0.0, 0.9], [1, 2])


# --- a run's own file, and the size guide -------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(40):
        Image.new("RGB", (90, 70), (number, 0, 255 - number)).save(folder / f"{number}.png")
    return folder


def plan_of(*argv, **options):
    args = parse("pretrain", *map(str, argv))
    return make_plan(args, RunOptions(Path(args.output or "runs/none"), **options))


def as_written(config, folder):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    return folder


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--recipe", "moco-v2", "--moco-k", "7"],
        ["--dictionary", "memory-bank", "--schedule", "3", "6", "--precision", "bf16"],
        ["-a", "resnet10", "--lr", "0.1", "--val-fraction", "0.1", "--same-image", "mask"],
    ],
)
def test_the_configuration_of_a_run_gives_the_same_run(photos, tmp_path, flags):
    for data in (str(photos), "digits"):
        plan = plan_of("--data", data, *flags)
        run = as_written(plan.config, tmp_path / "run")
        for path in (run, run / "config.json"):
            again = plan_of("--config", path)
            assert again.config == plan.config
            assert (again.data.size, len(again.data.train)) == (plan.data.size, len(plan.data.train))


def test_the_encoder_of_the_run_whose_weights_are_the_start(photos, tmp_path):
    run = as_written(plan_of(photos, "-a", "resnet18", "--image-size", 48).config, tmp_path / "run")
    for source in (run, run / "checkpoint.pth"):
        plan = plan_of(photos, "--init", source)
        assert (plan.config.arch, plan.config.image_size, plan.data.size) == ("resnet18", 48, 48)
        assert plan.choices["arch"] == ("resnet18", "that of --init")
        assert plan.sources["image_size"] == "guide"
    assert plan_of(photos, "--init", run, "--image-size", 64).config.image_size == 64
    assert plan_of(photos, "--init", run, "-a", "resnet10").config.image_size is None
    assert plan_of(photos, "--init", "torchvision:IMAGENET1K_V2").config.image_size is None


def test_the_images_of_a_run_that_was_started_elsewhere(photos, tmp_path, monkeypatch):
    """A folder of that name in the working directory may hold other images."""
    run = as_written(plan_of("--data", str(photos)).config, tmp_path / "run")
    config = json.loads((run / "config.json").read_text()) | {"data": "photos"}
    (run / "config.json").write_text(json.dumps(config))
    (run / "environment.json").write_text(json.dumps({"directory": str(tmp_path)}))
    monkeypatch.chdir(tmp_path)
    assert parse("pretrain", "--config", str(run)).data == "photos"
    monkeypatch.chdir(run)
    assert parse("pretrain", "--config", str(run)).data == str(photos)


def test_the_guide_chooses_for_a_folder(photos):
    plan = plan_of(photos, "--moco-m", "0.9")
    assert (plan.config.arch, plan.config.image_size, plan.data.size) == ("resnet18", 96, 96)
    assert (plan.config.batch_size, plan.config.moco_k, plan.config.moco_m) == (32, 32, 0.9)
    assert {plan.sources[name] for name in plan.choices} == {"guide"}
    assert plan.sources["moco_m"] == "flag"
    named = plan_of(photos, "--recipe", "moco-v1")
    assert dataclasses.replace(named.config, data="") == PretrainConfig("")
    assert named.choices == {}


@pytest.mark.parametrize("fast", [True, False])
def test_the_precision_fits_the_device(photos, tmp_path, monkeypatch, fast):
    monkeypatch.setattr("moco_ext.cli.plan._multiplies_bf16", lambda device: fast)
    expected = "bf16" if fast else "fp32"
    digits, folder = plan_of("--data", "digits"), plan_of(photos)
    assert digits.config.precision == folder.config.precision == expected
    assert digits.choices.keys() == ({"precision"} if fast else set())
    assert plan_of("--data", "digits", "--recipe", "moco-v1").config.precision == "fp32"
    assert plan_of("--data", "digits", "--precision", "fp16").config.precision == "fp16"
    monkeypatch.setattr("moco_ext.cli.plan._multiplies_bf16", lambda device: not fast)
    as_written(digits.config, tmp_path / "run")
    assert plan_of("--data", "digits", "--output", tmp_path / "run", resume="auto").config.precision == expected


def test_a_resumed_run_keeps_its_settings(photos, tmp_path):
    """More images than before, or another device, would change the choices."""
    first = plan_of(photos)
    as_written(dataclasses.replace(first.config, moco_k=16, lr=0.5, val_fraction=0.25), tmp_path / "run")
    flags = [photos, "--output", tmp_path / "run", "--batch-size", "8"]
    resumed = plan_of(*flags, resume="auto")
    assert (resumed.config.moco_k, resumed.config.lr, resumed.config.batch_size) == (16, 0.5, 8)
    assert resumed.config == dataclasses.replace(first.config, moco_k=16, lr=0.5, val_fraction=0.25, batch_size=8)
    assert len(resumed.data.train) == 30
    assert (resumed.sources["lr"], resumed.sources["batch_size"], resumed.choices) == ("resumed run", "flag", {})
    assert plan_of(*flags, resume=tmp_path / "run" / "checkpoint.pth").config == resumed.config
    assert plan_of(*flags).config.lr == pytest.approx(0.03 * 8 / 256)


def test_dry_run_names_sources_and_writes_nothing(photos, written, capsys, monkeypatch, tmp_path):
    path = written("moco_t: 0.5\nepochs: 30")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["pretrain", str(photos), "--config", path, "--moco-m", "0.9", "--dry-run", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    table = [[cell.strip() for cell in line.split("│")] for line in out.splitlines()]
    rows = {cells[1]: cells[2:4] for cells in table if len(cells) == 5}
    assert rows["moco_t"] == ["0.5", "config file"]
    assert rows["epochs"] == ["30", "config file"]
    assert rows["moco_m"] == ["0.9", "flag"]
    assert rows["data"] == [str(photos), "flag"]
    assert rows["momentum"] == ["0.9", "default"]
    assert rows["moco_k"] == ["32", "guide: one batch"]
    assert "40 training images of 96 pixels, 2 steps per epoch, 60 steps" in out
    assert re.search(r"activations\W+[\d,.]+", out)
    assert sorted(tmp_path.rglob("*")) == before
    assert cli.main(["pretrain", "--recipe", "moco-v2", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"moco_t\W+0\.2\W+recipe moco-v2", out)
    assert re.search(r"arch\W+resnet8-small\W+preset", out)


def test_loggers_are_checked_before_the_run(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("moco_ext.runs.loggers.importlib.util.find_spec", lambda name: None)
    output = tmp_path / "run"
    assert cli.main(["pretrain", str(photos), "--output", str(output), "--logger", "csv,wandb"]) == 1
    assert "logger: wandb needs wandb, which is not installed: pip install wandb" in capsys.readouterr().err
    assert not output.exists()


def test_every_rank_has_the_choices_of_rank_0(photos, monkeypatch):
    """The devices of the ranks may differ."""
    from moco_ext.cli import plan

    chosen_by_0 = plan_of(photos).choices | {"batch_size": plan.Choice(4, "rank 0 has little memory")}
    monkeypatch.setattr(plan.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(plan.distributed, "rank", lambda: 1)
    monkeypatch.setattr(plan.dist, "broadcast_object_list", lambda shared: shared.__setitem__(0, chosen_by_0))
    config = plan_of(photos).config
    assert config.batch_size == 4
    assert config.image_size == 96


def test_a_step_that_does_not_fit_the_memory(photos, tmp_path, monkeypatch, capsys):
    from moco_ext.cli import plan

    monkeypatch.setattr(plan, "device_memory", lambda device: 2 * 2**30)
    flags = [str(photos), "--recipe", "moco-v2", "--device", "cpu", "--output", str(tmp_path / "run")]
    assert cli.main(["pretrain", *flags]) == 1
    message = r"moco-ext: error: out of memory: a step needs about 2\d\.\d GiB, and there are 2\.0 GiB; .* --batch-size"
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
    plan.check_step_memory(plan_of(photos), RunOptions(Path("runs/none")))  # the guide keeps to the memory


def test_ablations_start_from_a_run_or_the_guide(photos, tmp_path, monkeypatch):
    from moco_ext.cli import ablate

    bases = []
    monkeypatch.setattr(ablate, "run_grid", lambda grid, base, data, options: bases.append((base, data)))
    monkeypatch.setattr(ablate, "write_report", lambda *rest: None)
    monkeypatch.setattr(ablate, "markdown", lambda results: "")
    plan = plan_of(photos, "--lr", "0.5")
    run = as_written(dataclasses.replace(plan.config, seed=7), tmp_path / "run")
    command = ["ablate", "--output", str(tmp_path / "grid"), "--moco-m", "0.9", "--device", "cpu"]
    assert cli.main([*command, "--", "--config", str(run), "--moco-t", "0.3"]) == 0
    assert cli.main([*command, "--data", str(photos), "--", "--lr", "0.5", "--moco-t", "0.3"]) == 0
    for base, data in bases:
        expected = dataclasses.replace(plan.config, moco_t=0.3, online_knn=base.online_knn)
        assert (base, data.size, len(data.train)) == (expected, 96, 40)
    assert [base.online_knn for base, _ in bases] == [10, 0]
