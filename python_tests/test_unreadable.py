"""Files that cannot be decoded: skipped, counted and listed, by every command and on every rank."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import leave_group

pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

from PIL import Image
from training import assert_equal_states, run_in, state_of, tiny

from moco_ext import cli, distributed
from moco_ext import data as mdata
from moco_ext.data import UnreadableImageError
from moco_ext.evaluate import encoder_features, label_free_scores, pixel_features
from moco_ext.evaluate.features import is_missing
from moco_ext.evaluate.scores import all_features, top1
from moco_ext.report.read import Gallery
from moco_ext.runs.directory import list_unreadable
from moco_ext.runs.metrics import read_metrics
from moco_ext.train import build_model, pretrain
from moco_ext.train.trainer import Trainer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:data. expected an image")]
BROKEN = ["train/0/8.png", "train/1/13.png", "val/1/31.png"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Digits as PNGs, 24 of them to train and 8 to test on; without the broken ones, and with them."""
    digits = mdata.load("digits").train
    whole, damaged = (tmp_path_factory.mktemp(name) for name in ("whole", "damaged"))
    for i in range(32):
        name = f"{'train' if i < 24 else 'val'}/{i % 2}/{i}.png"
        for root in (whole, damaged):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(digits.images[i, 0].numpy()).save(root / name)
    for name in BROKEN:
        (whole / name).unlink()
    (damaged / BROKEN[0]).write_bytes(b"")
    (damaged / BROKEN[1]).unlink()
    (damaged / BROKEN[1]).symlink_to("nowhere")
    (damaged / BROKEN[2]).write_bytes((damaged / BROKEN[2]).read_bytes()[:60])
    return whole, damaged


@pytest.fixture
def whole(photos):
    return mdata.load(str(photos[0]), image_size=8)


@pytest.fixture
def damaged(photos):
    return mdata.load(str(photos[1]), image_size=8)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return build_model(tiny()).encoder_q


def broken_in(root) -> set[str]:
    return {str(root / name) for name in BROKEN}


def test_scores_are_those_of_the_readable_images(photos, whole, damaged, encoder, tmp_path):
    options = run_in(tmp_path)
    expected, features = (all_features(data, options, trained=encoder) for data in (whole, damaged))
    assert damaged.unreadable == broken_in(photos[1])
    assert [len(rows) for rows in features["trained"]] == [24, 8]
    for name, parts in features.items():
        for rows, want in zip(parts, expected[name], strict=True):
            torch.testing.assert_close(rows[~is_missing(rows)], want, msg=name)
    assert top1(damaged, features, knn_k=3) == top1(whole, expected, knn_k=3)


def test_a_gallery_shows_images_that_all_representations_could_read(damaged, encoder, tmp_path):
    features = all_features(damaged, run_in(tmp_path), trained=encoder)
    features["trained"][0][0] = torch.nan  # this file was readable a moment ago
    gallery = Gallery.of(damaged, features)
    assert (len(gallery.data.train), len(gallery.data.test)) == (21, 7)
    assert not damaged.unreadable & {*gallery.data.train.paths, *gallery.data.test.paths}
    for train, test in gallery.features.values():
        assert (len(train), len(test)) == (21, 7)
        assert bool(train.isfinite().all() and test.isfinite().all())
    assert torch.equal(gallery.features["pixels"][0], features["pixels"][0][~is_missing(features["trained"][0])])
    alone = Gallery.of(dataclasses.replace(damaged, test=None), {"a": (features["pixels"][0],) * 2})
    assert alone.data.test is None


def test_label_free_scores_leave_them_out(whole, damaged, encoder):
    still = mdata.Augmentation(8, scale=(1, 1), ratio=(1, 1), jitter_p=0, gray_p=0, flip_p=0)
    for data in (whole, damaged):
        scores = label_free_scores(encoder, data, still)
        assert scores["images"] == 7
        assert scores["contrast_top1"] == 100  # a second copy of an image would be as near
    train_only = dataclasses.replace(damaged, test=None)
    assert label_free_scores(encoder, train_only, still)["images"] == 22


def test_mostly_unreadable_images_are_one_error(photos, damaged, encoder):
    paths = [*broken_in(photos[1]), "x", "y"]
    five = dataclasses.replace(damaged, train=mdata.FolderSplit(paths, torch.zeros(5)))
    message = r"^data: expected images, got 5 files of which 5 are unreadable$"
    for features in (lambda: encoder_features(encoder, five, five.train), lambda: pixel_features(five, five.train)):
        with pytest.raises(UnreadableImageError, match=message):
            features()


# --- several processes ------------------------------------------------------------------------------------------------


def in_rank(rank: int, folder: str, root: str) -> None:
    """The second rank's share of the test images, the last two of four, is unreadable."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    data = mdata.load(root, image_size=8)
    paths = [path for path in data.test.paths if path not in broken_in(Path(root))][:2]
    paths += [path for path in data.train.paths if path in broken_in(Path(root))]
    data = dataclasses.replace(data, test=mdata.FolderSplit(paths, torch.tensor([0, 1, 0, 1])))
    options = run_in(Path(folder) / "run", local_world=2)
    pretrain(tiny(epochs=1, batch_size=8, online_knn=1), data, options)
    error = None
    try:
        most = mdata.FolderSplit(paths[1:], torch.tensor([0, 1, 0]))
        pixel_features(data, most)
    except UnreadableImageError as failure:
        error = str(failure)
    torch.save({"unreadable": data.unreadable, "error": error}, f"{folder}/{rank}.pt")
    leave_group()


@pytest.mark.slow
def test_ranks_agree(photos, tmp_path):
    mp.start_processes(in_rank, args=(str(tmp_path), str(photos[1])), nprocs=2, start_method="spawn")
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert got["unreadable"] == {path for path in broken_in(photos[1]) if "train" in path}
        assert got["error"] == "data: expected images, got 3 files of which 2 are unreadable"
    (record,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert record["skipped_images"] == 2
    assert record["knn_top1"] in (0, 50, 100)
    assert (tmp_path / "run" / "unreadable.txt").read_text().splitlines() == sorted(got["unreadable"])


def test_a_rank_sends_each_path_once(damaged, monkeypatch):
    sent = []

    def gather(parts, values):
        sent.append(set(values))
        parts[:] = [set(values), {"elsewhere"}]

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    damaged.skip({"a": "damaged", "b": "damaged"})
    assert damaged.unite_unreadable() == {"a", "b", "elsewhere"}
    damaged.skip({"elsewhere": "damaged", "c": "damaged"})
    assert damaged.unite_unreadable() == dataclasses.replace(damaged).unite_unreadable() == {"a", "b", "c", "elsewhere"}
    assert sent == [{"a", "b"}, {"c"}, set()]


# --- runs -------------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_keeps_its_list(photos, damaged, tmp_path, monkeypatch):
    config = tiny(batch_size=8, steps=6, log_every=3, online_knn=3)
    no_text = os.fsdecode(b"\xff.png")
    expected = broken_in(photos[1]) | {no_text}
    damaged.unreadable.add(no_text)
    through = pretrain(config, damaged, run_in(tmp_path / "through"))
    assert [record["skipped_images"] for record in through] == [4, 4]
    train_step = Trainer._train_step

    def until(self, *args):
        assert self.step < 4
        train_step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", until)
        with pytest.raises(AssertionError):
            pretrain(config, dataclasses.replace(damaged), run_in(tmp_path / "killed"))
    listed = tmp_path / "killed" / "unreadable.txt"
    assert set(listed.read_text(errors="surrogateescape").splitlines()) == expected
    again = mdata.load(str(photos[1]), image_size=8)
    resumed = pretrain(config, again, run_in(tmp_path / "killed", resume="auto"))
    assert again.unreadable == expected
    times = ("seconds", "wait", "images_per_second", "key_drift", "key_age")
    for got, want in zip(resumed, through, strict=True):
        assert {name: got[name] for name in got if name not in times} == {
            name: want[name] for name in want if name not in times
        }
    assert_equal_states(state_of(tmp_path / "through"), state_of(tmp_path / "killed"))


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    flags = (
        f"-a resnet8-small --image-size 8 --moco-dim 16 --moco-k 16 -b 8 --epochs 1 -j 0 --threads 1 --output {folder}"
    )
    assert cli.main(["pretrain", str(photos[1]), *flags.split()]) == 0
    return folder


def test_a_run_lists_them(photos, run):
    assert set((run / "unreadable.txt").read_text().splitlines()) == broken_in(photos[1])
    assert (run / "report.html").is_file()
    assert json.loads((run / "summary.json").read_text())["knn_top1"].keys() == {"pixels", "untrained", "trained"}


@pytest.mark.parametrize(
    "command",
    [
        ["knn"],
        ["linear", "--solver", "lbfgs"],
        ["linear", "--epochs", "1", "--schedule", "-b", "8"],
        ["finetune", "--epochs", "1", "-b", "8"],
    ],
    ids=" ".join,
)
def test_evaluations_list_them(photos, run, tmp_path, capsys, command):
    out = tmp_path / "out"
    flags = ["--output", str(out), "-j", "0", "--threads", "1"]
    assert cli.main([command[0], str(run), *command[1:], *flags]) == 0
    assert "3 files could not be read: " in capsys.readouterr().out
    assert set((out / "unreadable.txt").read_text().splitlines()) == broken_in(photos[1])
    records = out / command[0] / "metrics.jsonl"
    if records.is_file():
        assert read_metrics(records)[0]["skipped_images"] == 3


def test_a_report_leaves_them_out(run, tmp_path):
    page = tmp_path / "page.html"
    assert cli.main(["report", str(run), "--output", str(page), "-j", "0", "--threads", "1"]) == 0
    text = page.read_text()
    assert "22 training images, 7 test images" in text


def test_the_list_has_a_line_a_path(tmp_path):
    list_unreadable(tmp_path, {"b", "a\nc", os.fsdecode(b"\xff.png")})
    list_unreadable(tmp_path, {"b", "d"})
    assert (tmp_path / "unreadable.txt").read_bytes() == b"a\\nc\nb\nd\n\xff.png\n"
