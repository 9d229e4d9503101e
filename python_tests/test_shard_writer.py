"""moco-ext shard: WebDataset reads what it writes, and an interrupted command resumes."""

import hashlib
import os
import signal
import subprocess
import sys

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("tensorboard")

from shards_on_disk import contents, encoded, names, write_tar
from training import environment

from moco_ext import cli
from moco_ext import data as mdata
from moco_ext.data.shard_writer import write_shards

pytestmark = pytest.mark.usefixtures("one_thread")


# --- moco-ext shard --------------------------------------------------------------------------------------------------
def files_of(root) -> dict[str, str]:
    """Everything that is written but the indexes, which know the time of their shards."""
    paths = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".npz" and path.name != ".lock"]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_an_interrupted_command_resumes(image_folder, image_shards, tmp_path):
    data, written = mdata.load(image_folder), []

    def interrupt(images):
        written.append(images)
        if len(written) == 17:  # in the third shard
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(data, tmp_path, images_per_shard=7, advance=interrupt)
    assert sorted(path.name for path in tmp_path.glob("train/*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
    with pytest.raises(
        ValueError, match=r"^data: expected 4 shards in .*train, got 2; moco-ext shard has not finished"
    ):
        mdata.load(tmp_path)
    (tmp_path / "train" / ".shard-000002.tar.123.tmp").write_bytes(b"of a killed process")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("train/*.tar")}
    progress = []
    assert write_shards(data, tmp_path, images_per_shard=7, advance=progress.append) == (30, 5, [])
    assert sum(progress) == 30
    assert files_of(tmp_path) == files_of(image_shards)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # they are not written again


KILLED = """
import os, signal, sys
from moco_ext import cli
from moco_ext.runs.console import ImageProgress
images = []

def advance(self, done):
    images.append(done)
    if len(images) == 17:  # in the third shard
        os.kill(os.getpid(), signal.SIGKILL)

ImageProgress.advance = advance
cli.main(sys.argv[1:])
"""


def test_a_killed_command_resumes(image_folder, image_shards, tmp_path):
    command = ["shard", str(image_folder), str(tmp_path), "-n", "7"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], env=environment(), timeout=120)
    assert killed.returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.glob("train/*.tar")] + [path.name for path in tmp_path.glob("train/.*.tmp")]
    assert sorted(left)[1:] == ["shard-000000.tar", "shard-000001.tar"]
    assert min(left).startswith(".shard-000002.tar.")
    assert cli.main(command) == 0
    assert files_of(tmp_path) == files_of(image_shards)


def test_the_command(image_folder, image_shards, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["shard", str(image_folder), str(out), "-n", "7"]) == 0
    assert files_of(out) == files_of(image_shards)
    assert "30 images, 5 shards" in capsys.readouterr().out
    assert cli.main(["shard", str(image_folder), str(out), "--images-per-shard", "7"]) == 0  # nothing is left to do
    assert cli.main(["shard", str(image_folder), str(out)]) == 1
    error = capsys.readouterr().err
    assert "error: output: expected no shards, or those of an interrupted command" in error
    assert "with another images_per_shard" in error
    assert (
        cli.main(["shard", f"{image_folder}/train", str(out), "-n", "7"]) == 1
    )  # no val: next to train/, it would be lost
    assert f"error: output: expected no other shards in {out}, got {out}/" in capsys.readouterr().err
    assert files_of(out) == files_of(image_shards)
    again = tmp_path / "again"  # from shards to shards
    assert cli.main(["shard", str(out / "train"), str(again), "-n", "24", "--val-fraction", "0.25"]) == 0
    data = mdata.load(again)
    assert [len(split) for split in data.splits] == [18, 6]
    assert data.classes == ("a", "b")
    read = contents(data.train) + contents(data.test)
    assert sorted(read) == sorted(contents(mdata.load(image_folder).train))


def test_a_random_order(image_folder, tmp_path):
    data = mdata.load(image_folder)
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        write_shards(data, tmp_path / name, images_per_shard=7, shuffle=seed)
    one, other = mdata.load(tmp_path / "one"), mdata.load(tmp_path / "other")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "same")
    assert contents(one.train) != contents(other.train) != contents(data.train)
    label_of = dict(zip(contents(data.train), data.train.labels.tolist(), strict=True))
    assert {
        image: label for image, label in zip(contents(one.train), one.train.labels.tolist(), strict=True)
    } == label_of


def test_a_missing_file_keeps_its_place(tmp_path):
    os.mkdir(tmp_path / "photos")
    for i in range(3):
        (tmp_path / "photos" / f"{i}.png").write_bytes(encoded(i))
    os.symlink("nowhere", tmp_path / "photos" / "1.5.png")
    done = write_shards(mdata.load(tmp_path / "photos"), tmp_path / "out")
    assert done == (4, 1, [f"{tmp_path}/photos/1.5.png"])
    split = mdata.load(tmp_path / "out").train
    assert contents(split) == [encoded(0), b"", encoded(1), encoded(2)]


def test_files_without_a_suffix(tmp_path):
    for i, kind in enumerate(("JPEG", "PNG")):
        (tmp_path / f"image{i}").write_bytes(encoded(i, kind))
    (tmp_path / "list.txt").write_text("image0\nimage1\n")
    write_shards(mdata.load(tmp_path / "list.txt"), tmp_path / "out")
    split = mdata.load(tmp_path / "out").train
    where = tmp_path / "out" / "shard-000000.tar"
    assert names(split, where) == ["000000000-image0.jpeg", "000000001-image1.png"]
    assert contents(split) == [encoded(0, "JPEG"), encoded(1)]


def test_what_cannot_be_written(image_folder, tmp_path):
    with pytest.raises(ValueError, match="data: expected a folder, a list or shards of images, got digits, in memory"):
        write_shards(mdata.load("digits"), tmp_path)
    with pytest.raises(ValueError, match="images_per_shard: expected at least 1, got 0"):
        write_shards(mdata.load(image_folder), tmp_path, images_per_shard=0)
    assert cli.main(["shard", "digits", str(tmp_path / "out")]) == 1
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "train").mkdir()
    write_tar(tmp_path / "train" / "other.tar", {})
    with pytest.raises(ValueError, match="output: expected no shards, or those of an interrupted command"):
        write_shards(mdata.load(image_folder), tmp_path)
    assert files_of(tmp_path).keys() == {"train/other.tar"}


# --- WebDataset's own writer and reader ------------------------------------------------------------------------------
def test_shards_that_webdataset_writes(tmp_path):
    wds = pytest.importorskip("webdataset")
    with wds.ShardWriter(f"{tmp_path}/s-%03d.tar", maxcount=4, verbose=0) as writer:
        for i in range(10):
            writer.write({"__key__": f"{i % 2}/{i:05}", "png": encoded(i), "cls": i % 3, "json": {"label": 7}})
    with wds.TarWriter(f"{tmp_path}/one.tar") as writer:
        writer.write({"__key__": "x", "jpg": encoded(11, "JPEG"), "cls": 0})
    data = mdata.load(tmp_path / "s-{000..002}.tar")
    assert contents(data.train) == [encoded(i) for i in range(10)]
    assert data.train.labels.tolist() == [i % 3 for i in range(10)]
    assert data.classes == ("0", "1", "2")
    assert contents(mdata.load(tmp_path / "one.tar").train) == [encoded(11, "JPEG")]


def test_webdataset_reads_what_is_written(image_folder, image_shards):
    wds = pytest.importorskip("webdataset")
    pattern = f"{image_shards}/train/shard-{{000000..000003}}.tar"
    samples = list(wds.WebDataset(pattern, shardshuffle=False))
    split = mdata.load(image_folder).train
    assert [sample["png"] for sample in samples] == contents(split)
    assert [int(sample["cls"]) for sample in samples] == split.labels.tolist()
    image, label = next(iter(wds.WebDataset(pattern, shardshuffle=False).decode("pil").to_tuple("png", "cls")))
    assert image.size == (20, 24)
    assert label == 0
