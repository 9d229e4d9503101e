"""Shards: the index of odd tars, equality with the folder, resuming, URLs, size, and writing them."""

import gzip
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("tensorboard")

from PIL import Image
from training import assert_equal_states, environment, state_of, torchrun

from moco_ext import cli
from moco_ext import data as mdata
from moco_ext.data import Augmentation, TrainLoader, tar_shards
from moco_ext.data.sampler import EpochBatchSampler
from moco_ext.data.shard_writer import write_shards
from moco_ext.data.tar_shards import index_of
from moco_ext.data.urls import expand, split_sources

pytestmark = pytest.mark.usefixtures("one_thread")
ODD_NAME = "émile/" + "x" * 150  # longer than the field of a tar header


def encoded(number: int, kind: str = "PNG") -> bytes:
    """A picture of noise, different for each number, 20 + number pixels wide."""
    pixels = np.random.default_rng(number).integers(0, 256, (24, 20 + number, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_tar(path, members: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> None:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def contents(split) -> list[bytes]:
    found = []
    for position in range(len(split)):
        with split.open(position) as file:
            found.append(file.read())
    return found


def names(split, root) -> list[str]:
    return [split.name(position).removeprefix(f"{root}/") for position in range(len(split))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """30 images of two classes, 6 of them to test on; names with dots."""
    root = tmp_path_factory.mktemp("folder")
    for number in range(30):
        path = root / ("train" if number < 24 else "val") / "ab"[number % 2] / f"{number:02}.v1.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number))
    return root


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    """The same images in shards of seven."""
    root = tmp_path_factory.mktemp("shards")
    write_shards(mdata.load(folder), root, images_per_shard=7)
    return root


# --- the index ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_an_odd_tar(tmp_path, format):
    path = tmp_path / "odd.tar"
    members = {
        "README": b"no image",
        "deep/er/0.jpg": encoded(0, "JPEG"),
        "deep/er/0.txt": b"a caption",
        "deep/er/0.seg.png": encoded(9),  # of the same sample: a mask
        f"{ODD_NAME}.png": encoded(1),
        "._2.png": b"of macOS",
        "ü n.WEBP": encoded(2, "WEBP"),
        "scan.1.png": encoded(3),  # a folder's archive: two images, not two parts of one sample
        "scan.2.png": encoded(4),
    }
    with tarfile.open(path, "w", format=format, pax_headers={"comment": "global"}) as tar:
        for name in ("deep", "deep/er"):
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE
            tar.addfile(member)
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "scan.1.png"
        tar.addfile(link)
    split = mdata.load(path).train
    found = ["deep/er/0.jpg", f"{ODD_NAME}.png", "ü n.WEBP", "scan.1.png", "scan.2.png"]
    assert names(split, path) == found
    assert contents(split) == [members[name] for name in found]
    assert split.labels.tolist() == [-1] * 5
    assert torch.equal(split.read(3), torch.from_numpy(np.array(Image.open(io.BytesIO(encoded(3))))).permute(2, 0, 1))


def test_an_empty_tar_among_others(tmp_path):
    write_tar(tmp_path / "0.tar", {})
    write_tar(tmp_path / "1.tar", {"a.png": encoded(0)})
    write_tar(tmp_path / "2.tar", {})
    write_tar(tmp_path / "3.tar", {"b.png": encoded(1)})
    split = mdata.load(tmp_path).train
    assert names(split, tmp_path) == ["1.tar/a.png", "3.tar/b.png"]
    assert contents(split) == [encoded(0), encoded(1)]
    with pytest.raises(ValueError, match=r"^data: expected images in .*0.tar and others, got none$"):
        mdata.load(tmp_path / "{0,2}.tar")


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda raw: raw[:700], "unexpected end of data"),  # in the first image
        (lambda raw: raw[: len(raw) - 10240 - 300], "unexpected end of data|no end of archive"),
        (lambda raw: raw[: raw.index(b"2.png\0")], "no header and no end of archive"),  # between two images
        (lambda raw: raw[: raw.index(b"2.png\0") + 99], "no header and no end of archive"),  # in a header
        (lambda raw: raw.replace(b"2.png\0", b"3.png\0"), "no header and no end of archive at byte"),  # its checksum
        (lambda raw: b"", "empty file"),
        (lambda raw: b"nothing" * 1000, "invalid header|bad checksum"),
        (gzip.compress, "invalid header|bad checksum"),
    ],
)
def test_a_damaged_tar(tmp_path, cut, message):
    path = tmp_path / "0.tar"
    write_tar(path, {f"{i}.png": encoded(i) for i in range(4)})
    path.write_bytes(cut(path.read_bytes()))
    match = rf"^data: expected a complete, uncompressed tar file, got .*0.tar: .*({message})"
    with pytest.raises(ValueError, match=match):
        mdata.load(path)
    assert not Path(tar_shards.index_path(path)).exists()


def test_the_index_is_saved_and_used(tmp_path, monkeypatch):
    path = str(tmp_path / "0.tar")
    write_tar(path, {"a.png": encoded(0), "a.cls": b"1"})
    first = index_of(path)
    with monkeypatch.context() as patch:
        patch.setattr(tar_shards, "_read_headers", None)
        again = index_of(path)
    assert first[0] == again[0]
    assert first[1].names == again[1].names == ("1",)
    assert all(np.array_equal(one, other) for one, other in zip(first[1][:-1], again[1][:-1], strict=True))


@pytest.mark.parametrize("damage", [lambda raw: raw[:100], lambda raw: b"", lambda raw: raw[:-200] + bytes(200)])
def test_a_damaged_index_is_built_again(tmp_path, damage):
    path = tmp_path / "0.tar"
    write_tar(path, {"a.png": encoded(0)})
    first = index_of(str(path))[1]
    index = Path(tar_shards.index_path(path))
    index.write_bytes(damage(index.read_bytes()))
    assert np.array_equal(index_of(str(path))[1].offsets, first.offsets)


def test_an_index_of_another_shard_is_not_used(tmp_path):
    """Of the same size: only the modification time differs."""
    path = tmp_path / "0.tar"
    write_tar(path, {"a.png": encoded(0), "b.png": encoded(1)})
    index_of(str(path))
    size = path.stat().st_size
    write_tar(path, {"c.png": encoded(1), "d.png": encoded(0)})
    assert path.stat().st_size == size
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))  # whatever the clock's resolution
    assert contents(mdata.load(path).train) == [encoded(1), encoded(0)]


def test_a_shard_that_changes_under_a_run(tmp_path):
    path = tmp_path / "0.tar"
    write_tar(path, {"a.png": encoded(0), "b.png": encoded(1)})
    split = mdata.load(path).train
    write_tar(path, {"b.png": encoded(1)})
    with pytest.raises(mdata.UnreadableImageError, match="the shard has changed since it was indexed"):
        split.read(1)


def test_a_folder_that_is_read_only(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tar_shards, "write_atomically", refuse)
    write_tar(tmp_path / "0.tar", {"a.png": encoded(0)})
    assert contents(mdata.load(tmp_path).train) == [encoded(0)]
    assert os.listdir(tmp_path) == ["0.tar"]


# --- labels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        ({"cls": ["10", "9", "10\n", "2"]}, ("2", "9", "10"), [2, 1, 2, 0]),
        ({"cls": ["dog", "cat", "dog", "émile"]}, ("cat", "dog", "émile"), [1, 0, 1, 2]),
        ({"json": ['{"label": 3}', '{"class": "4"}', '{"target": 3}', '{"cls": 4}']}, ("3", "4"), [0, 1, 0, 1]),
        ({"cls": ["1", "1", "1", "1"]}, (), [-1] * 4),  # one class says nothing
        ({"cls": ["0", "1", "", "1"]}, (), [-1] * 4),  # one image without
        ({"json": ["[]", '{"label": null}', "1", "{}"]}, (), [-1] * 4),
    ],
)
def test_labels(tmp_path, labels, classes, expected):
    ((extension, texts),) = labels.items()
    for number in range(2):  # the second shard meets them in another order
        members = {}
        for i in (0, 1) if number == 0 else (2, 3):
            members |= {f"{i}.png": encoded(i), f"{i}.{extension}": texts[i].encode()}
        write_tar(tmp_path / f"{number}.tar", members)
    for _ in range(2):  # with the index that is built, and with the saved one
        data = mdata.load(tmp_path)
        assert data.classes == classes
        assert data.train.labels.tolist() == expected
        assert data.train.labels.dtype == torch.int64


def test_labels_that_are_no_json_or_not_in_the_manifest(tmp_path):
    write_tar(tmp_path / "0.tar", {"a.png": encoded(0), "a.json": b"{"})
    with pytest.raises(ValueError, match=r"got .*0.tar: a.json is not JSON"):
        mdata.load(tmp_path)
    write_tar(tmp_path / "0.tar", {"a.png": encoded(0), "a.cls": b"2"})
    (tmp_path / "shards.json").write_text('{"classes": ["x", "y"]}')
    with pytest.raises(ValueError, match=r"^data: expected labels 0 to 1 of shards.json in .*0.tar, got \('2',\)$"):
        mdata.load(tmp_path)
    (tmp_path / "shards.json").write_text("[")
    with pytest.raises(ValueError, match=r"^data: expected a JSON object in .*/shards.json"):
        mdata.load(tmp_path)


def test_few_test_images_may_lack_a_class(tmp_path):
    for part, labels in (("train", "012"), ("val", "20")):
        (tmp_path / part).mkdir()
        write_tar(
            tmp_path / part / "0.tar",
            {f"{i}.{suffix}": encoded(i) if suffix == "png" else label.encode()
             for i, label in enumerate(labels) for suffix in ("png", "cls")},
        )  # fmt: skip
    data = mdata.load(tmp_path)
    assert data.classes == ("0", "1", "2")
    assert [split.labels.tolist() for split in data.splits] == [[0, 1, 2], [2, 0]]


# --- patterns and sources -----------------------------------------------------------------------------------


def test_patterns(tmp_path):
    for number in (8, 9, 10, 11):
        (tmp_path / f"s-{number:03}.tar").touch()

    def expanded(pattern):
        return [os.path.basename(path) for path in expand(f"{tmp_path}/{pattern}")]

    assert expanded("s-{008..010}.tar") == ["s-008.tar", "s-009.tar", "s-010.tar"]
    assert expanded("s-{8..11}.tar") == ["s-8.tar", "s-9.tar", "s-10.tar", "s-11.tar"]
    assert expanded("{a,b}-{0..1}.tar") == ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]
    assert expanded("s-*[01].tar") == ["s-010.tar", "s-011.tar"]
    assert expanded("s-{00,01}*.tar") == ["s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar"]
    assert expanded("{a}.tar") == ["{a}.tar"]
    (tmp_path / "s-{1..2}.tar").touch()  # a name like a pattern
    assert expanded("s-{1..2}.tar") == ["s-{1..2}.tar"]
    with pytest.raises(ValueError, match=r"^data: expected a range that counts up, got \{9..8\} in "):
        expanded("{9..8}.tar")
    with pytest.raises(ValueError, match=r"^data: expected files that match .*/t\*.tar, got none$"):
        expanded("t*.tar")


def test_several_sources():
    assert split_sources("a.tar:s3://b/c.tar:d") == ["a.tar", "s3://b/c.tar", "d"]
    assert split_sources("simplecache::s3://b/c.tar:d") == ["simplecache::s3://b/c.tar", "d"]
    for url in ("http://host:80/a.tar", "http://user:word@host:80/a.tar", "http://[::1]:80/a", "s3://b/1:2/c.tar"):
        parts = ["s3://b/1", "2/c.tar"] if url.startswith("s3") else [url]
        assert split_sources(f"x.tar:{url}:12/y.tar") == ["x.tar", *parts, "12/y.tar"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("0.tar:9.tar", r"^data: expected a shard .*9.tar, got no such file$"),
        ("0.tar:photos", r"^data: expected only shards, or only folders and lists, got "),
        ("0.tar:x.parquet", r"or a folder, list or shards of images, got "),
        ("{0,9}.tar", r"^data: expected a shard .*9.tar, got no such file$"),
        ("mixed", r"^data: expected tar files or Parquet files, got both"),
    ],
)
def test_sources_that_do_not_fit(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    write_tar("0.tar", {"a.png": encoded(0)})
    os.mkdir("photos")
    Path("photos/a.png").write_bytes(encoded(0))
    os.mkdir("mixed")
    write_tar("mixed/0.tar", {"a.png": encoded(0)})
    Path("mixed/1.parquet").touch()
    with pytest.raises(ValueError, match=message):
        mdata.load(name)


def test_an_archive_next_to_images_is_no_shard(tmp_path):
    Path(tmp_path, "a.png").write_bytes(encoded(0))
    write_tar(tmp_path / "backup.tar", {"b.png": encoded(1)})
    assert mdata.load(tmp_path).train.paths == [str(tmp_path / "a.png")]


def test_shards_of_train_and_val_in_one_folder(tmp_path):
    for name, numbers in {"train-0": (0, 1), "train-1": (2,), "val-0": (3,), "test-0": (4,)}.items():
        write_tar(tmp_path / f"{name}.tar", {f"{i}.png": encoded(i) for i in numbers})
    data = mdata.load(tmp_path)
    assert contents(data.train) == [encoded(i) for i in range(3)]
    assert contents(data.test) == [encoded(3)]


# --- the same as a folder -----------------------------------------------------------------------------------


def views_of(data, workers=0, **options) -> list:
    loader = TrainLoader(data, Augmentation.v2(16), 5, workers=workers, seed=3, **options)
    return [batch for epoch in range(2) for batch in loader.epoch(epoch)]


def assert_same_batches(one, other):
    assert len(one) == len(other) > 4
    for mine, theirs in zip(one, other, strict=True):
        assert all(torch.equal(mine[part], theirs[part]) for part in range(4))  # im_q, im_k, index, key_order


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_training_views_are_those_of_the_folder(folder, shards, workers):
    one, other = mdata.load(folder), mdata.load(shards)
    assert one.classes == other.classes == ("a", "b")
    assert torch.equal(one.train.labels, other.train.labels)
    assert_same_batches(views_of(one), views_of(other, workers))


def test_held_out_images_and_evaluation_are_those_of_the_folder(folder, shards):
    one, other = mdata.load(folder, image_size=16), mdata.load(shards, image_size=16)
    for mine, theirs in zip(one.splits, other.splits, strict=True):
        assert torch.equal(mine.labels, theirs.labels)
        batches = zip(mdata.eval_batches(one, mine, 7), mdata.eval_batches(other, theirs, 7, workers=1), strict=True)
        for (images, index), (their_images, their_index) in batches:
            assert torch.equal(images, their_images)
            assert torch.equal(index, their_index)
    one, other = (mdata.load(f"{root}/train", val_fraction=0.3) for root in (folder, shards))
    for mine, theirs in zip(one.splits, other.splits, strict=True):
        assert contents(mine) == contents(theirs)
        assert torch.equal(mine.labels, theirs.labels)
    assert_same_batches(views_of(one), views_of(other))


def test_a_split_is_pickled_without_its_files(shards):
    split = mdata.load(shards).train
    before = contents(split)
    assert contents(pickle.loads(pickle.dumps(split))) == before


SPAWNED = """
import multiprocessing, sys
import torch
from moco_ext import data as mdata
from test_shards import views_of
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    torch.save([tuple(batch) for batch in views_of(mdata.load(sys.argv[1]), workers=2)], sys.argv[2])
"""


@pytest.mark.slow
def test_workers_that_are_not_forked(shards, tmp_path):
    (tmp_path / "spawned.py").write_text(SPAWNED)
    command = [sys.executable, tmp_path / "spawned.py", shards, tmp_path / "views.pt"]
    done = subprocess.run(list(map(str, command)), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same_batches(views_of(mdata.load(shards)), torch.load(tmp_path / "views.pt"))


@pytest.mark.parametrize("shuffled_keys", [False, True])
def test_two_ranks_read_each_image_once(shards, shuffled_keys):
    """As queries; with the keys of --shuffle-bn loader, once more as keys, of which some are on the other rank."""
    data, read = mdata.load(shards), {}
    for rank in range(2):
        loader = TrainLoader(data, Augmentation.v1(16), 4, rank=rank, world=2, shuffled_keys=shuffled_keys)
        of_shards, read[rank] = data.train.shards, []

        class Counting:
            def content(self, row, rows=read[rank], of_shards=of_shards):
                rows.append(row)
                return of_shards.content(row)

        object.__setattr__(loader._loader._loader.dataset.split, "shards", Counting())
        queries = torch.cat([batch.index for batch in loader.epoch(0)]).tolist()
        object.__setattr__(data.train, "shards", of_shards)
        assert len(set(queries)) == len(queries) == 12
        assert set(queries) <= set(read[rank])
        read[f"queries {rank}"] = queries
    assert sorted(read["queries 0"] + read["queries 1"]) == list(range(24))
    both = sorted(read[0] + read[1])
    if shuffled_keys:
        assert set(both) == set(range(24))
        assert 24 < len(both) <= 48  # an image whose key is on the rank of its query is decoded once
    else:
        assert both == list(range(24))


@pytest.mark.slow
def test_shuffle_bn_in_the_loader_trains_two_processes_as_on_the_folder(folder, shards, tmp_path):
    flags = "-a resnet8-small --image-size 16 -b 8 --epochs 2 --moco-k 16 --moco-dim 8 --shuffle-bn loader -j 2"
    for name, root in (("folder", folder), ("shards", shards)):
        command = ["pretrain", root, "--output", tmp_path / name, *flags.split(), "--device", "cpu", "--knn-k", 3]
        done = torchrun(2, "-m", "moco_ext", *command)
        assert done.returncode == 0, done.stderr
    assert_equal_states(state_of(tmp_path / "folder"), state_of(tmp_path / "shards"))


# --- damaged images -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:data. expected an image")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_replaced_as_in_a_folder(folder, tmp_path, workers):
    for number in range(24):
        path = tmp_path / "folder" / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(number) if number not in (3, 17) else b"damaged")
    (tmp_path / "folder" / "05.png").write_bytes(b"")
    write_shards(mdata.load(tmp_path / "folder"), tmp_path / "shards", images_per_shard=10)
    one, other = mdata.load(tmp_path / "folder"), mdata.load(tmp_path / "shards")
    assert_same_batches(views_of(one), views_of(other, workers))
    assert {Path(path).name for path in one.unreadable} == {"03.png", "05.png", "17.png"}
    where = {
        "shard-000000.tar/000000003-03.png",
        "shard-000000.tar/000000005-05.png",
        "shard-000001.tar/000000017-17.png",
    }
    assert other.unreadable == {f"{tmp_path}/shards/{name}" for name in where}


def test_bytes_overwritten_in_a_shard(tmp_path):
    path = tmp_path / "0.tar"
    write_tar(path, {"a.png": encoded(0), "b.png": encoded(1)})
    index = index_of(str(path))[1]
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(int(index.offsets[1]))
        file.write(bytes(int(index.sizes[1])))
        file.seek(int(index.headers[0]))
        file.write(b"\xff" * 512)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # a disk's error changes no time
    split = mdata.load(path).train
    assert split.read(0).shape == (3, 24, 20)
    assert split.name(0) == f"{path}@512"
    with pytest.raises(mdata.UnreadableImageError, match=r"got UnidentifiedImageError in .*0.tar/b.png"):
        split.read(1)


# --- resuming -----------------------------------------------------------------------------------------------

PROGRAM = """
import sys
from pathlib import Path
from moco_ext import data as mdata
from training import run_in, tiny
from moco_ext.train import pretrain
data = mdata.load(sys.argv[1], image_size=16)
config = tiny(epochs=12, batch_size=6, accumulate=2, aug_plus=True, moco_k=20, shard_window=int(sys.argv[4]))
pretrain(config, data, run_in(Path(sys.argv[2]), workers=int(sys.argv[3]), save_every=1, keep=3, resume="auto"))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("source", "window"), [("shards", 0), ("shards", 2), ("chunks", 0)])
def test_killed_and_resumed_with_other_workers(source, tmp_path, window, request):
    """SIGKILL at a moment that nobody chose, twice; the resumed run has another number of workers each time."""
    source = request.getfixturevalue(source)

    def start(name, workers):
        command = [sys.executable, "-c", PROGRAM, str(source), str(tmp_path / name), str(workers), str(window)]
        return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)

    for workers in (2, 1):
        process = start("killed", workers)
        while not (tmp_path / "killed" / "checkpoint.pth").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.7))
        process.kill()
        process.communicate()
    for name, workers in (("killed", 0), ("through", 2)):
        process = start(name, workers)
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors
    assert_equal_states(state_of(tmp_path / "through"), state_of(tmp_path / "killed"))


# --- shuffling within windows -------------------------------------------------------------------------------


def order_of(epoch=0, seed=0, window=2, shards=(0, 7, 7, 14, 21, 24)):
    sampler = EpochBatchSampler(24, 6, seed=seed, shards=np.array(shards), window=window)
    sampler.set_epoch(epoch)
    return np.concatenate([micro.index for micro in sampler]).tolist()


def test_a_window_holds_whole_shards():
    order = order_of()
    assert sorted(order) == list(range(24))
    shard = np.searchsorted([0, 7, 14, 21], order, side="right")
    seen = [set(shard[start:end].tolist()) for start, end in ((0, 7), (0, 14))]
    assert len(seen[1]) <= 3
    changes = [position for position in range(24) if shard[position] not in shard[:position]]
    assert changes[-1] > 6  # the last shard is not read before the first window ends
    assert order_of() == order
    assert order_of(epoch=1) != order
    firsts = {tuple(sorted({image // 7 for image in order_of(epoch=epoch)[:3]})) for epoch in range(20)}
    assert len({shard for first in firsts for shard in first}) == 4  # any shard may be in the first window
    assert order_of(seed=1) != order
    assert sorted(order_of(window=99)) == list(range(24))
    assert order_of(window=0) == order_of(window=0, shards=(0, 24))


def test_a_window_is_part_of_a_resumed_run(shards, folder):
    loader = TrainLoader(mdata.load(shards), Augmentation.v1(16), 4, shard_window=2)
    other = TrainLoader(mdata.load(shards), Augmentation.v1(16), 4)
    with pytest.raises(ValueError, match="state: expected shard_window = 0 as in this loader, got 2"):
        other.load_state_dict(loader.state_dict())
    state = other.state_dict()
    del state["shard_window"]  # a checkpoint from before there were windows
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="shard_window: expected 0, or with shards a number of them, got 2"):
        TrainLoader(mdata.load(folder), Augmentation.v1(16), 4, shard_window=2)


def test_images_of_held_out_images(shards):
    split = mdata.load(f"{shards}/train", val_fraction=0.5).train
    all_of_them, rows = contents(split), torch.tensor([1, 4, 5])
    assert contents(split.take(rows)) == [all_of_them[row] for row in rows.tolist()]


def test_windows_of_held_out_shards(shards):
    """val_fraction takes images out of the shards: the windows are of the images that are left."""
    split = mdata.load(f"{shards}/train", val_fraction=0.5).train
    starts = split.starts
    assert starts[0] == 0
    assert starts[-1] == len(split) == 12
    for shard in range(4):
        in_shard = {split.name(position).split("/")[-2] for position in range(starts[shard], starts[shard + 1])}
        assert in_shard <= {f"shard-{shard:06}.tar"}


# --- URLs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def in_memory(shards):
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    for path in shards.glob("*/*"):
        if path.suffix in (".tar", ".json"):
            files.pipe(f"/bucket/{path.relative_to(shards)}", path.read_bytes())
    yield files
    files.rm("/bucket", recursive=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_at_a_url(folder, in_memory, workers):
    one, other = mdata.load(folder), mdata.load("memory://bucket")
    assert one.classes == other.classes
    assert [len(split) for split in other.splits] == [24, 6]
    assert_same_batches(views_of(one), views_of(other, workers))
    assert other.train.name(0) == "memory:///bucket/train/shard-000000.tar/000000000-00_v1.png"
    for pattern in ("memory://bucket/train/shard-{000000..000003}.tar", "memory://bucket/train/*.tar"):
        assert contents(mdata.load(pattern).train) == contents(other.train)


def test_an_index_at_a_url_is_used_if_it_fits(shards, in_memory, tmp_path, monkeypatch):
    index = (shards / "val" / "shard-000000.tar.index.npz").read_bytes()
    want = contents(mdata.load("memory://bucket/val").train)
    in_memory.pipe("/bucket/val/shard-000000.tar.index.npz", index)
    with monkeypatch.context() as patch:
        patch.setattr(tar_shards, "_read_headers", None)
        assert contents(mdata.load("memory://bucket/val").train) == want
    other = tmp_path / "other.tar"
    write_tar(other, {f"{i}.png": encoded(i) for i in range(3)})
    size = in_memory.size("/bucket/val/shard-000000.tar")
    assert other.stat().st_size < size
    in_memory.pipe("/bucket/val/shard-000000.tar", other.read_bytes().ljust(size, b"\0"))  # of the same size
    assert contents(mdata.load("memory://bucket/val").train) == contents(mdata.load(other).train)


def test_urls_that_cannot_be_read(in_memory, monkeypatch):
    with pytest.raises(ValueError, match=r"^data: expected a shard memory://bucket/none.tar, got no such file$"):
        mdata.load("memory://bucket/none.tar")
    with pytest.raises(ValueError, match=r"^data: expected a URL that fsspec can read, got nope://a.tar: Protocol"):
        mdata.load("nope://a.tar")
    with monkeypatch.context() as patch:
        patch.setattr(type(in_memory), "size", lambda *_: 1 / 0)
        with pytest.raises(OSError, match=r"^data: expected to read memory://bucket/a.tar, got ZeroDivisionError: "):
            mdata.load("memory://bucket/a.tar")
    with monkeypatch.context() as patch:  # as http.server of the standard library
        patch.setattr(type(in_memory), "cat_file", lambda files, path, start=None, end=None: files.cat(path))
        patch.setattr(type(in_memory), "cat", lambda files, path: files.store[path].getvalue())
        with pytest.raises(OSError, match=r"^data: expected a server that sends ranges of bytes of memory:///bucket/"):
            mdata.load("memory://bucket/val")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ValueError, match=r"^data: reading memory://bucket/a.tar needs fsspec: pip install fsspec$"):
        mdata.load("memory://bucket/a.tar")


def test_folders_need_no_fsspec(folder, shards):
    code = (
        "import sys; sys.modules['fsspec'] = None; sys.modules['pyarrow'] = None; from moco_ext import data; "
        "print([len(data.load(path).train) for path in sys.argv[1:]])"
    )
    command = [sys.executable, "-c", code, str(folder), str(shards)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.stdout == "[24, 24]\n", done.stderr


# --- Parquet ------------------------------------------------------------------------------------------------


def write_parquet(path, images, *, hugging_face: bool, labels=None, names=()):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = [image and {"bytes": image, "path": "x"} for image in images] if hugging_face else images
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if hugging_face else pa.binary()
    columns = {"image": pa.array(column, kind)} | ({} if labels is None else {"label": pa.array(labels)})
    table = pa.table(columns)
    if names:
        features = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    parquet.write_table(table, path, row_group_size=4)


@pytest.mark.parametrize("hugging_face", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_parquet_shards(folder, tmp_path, hugging_face, workers):
    one = mdata.load(folder)
    for name, split, rows in (
        ("train-0", one.train, range(13)),
        ("train-1", one.train, range(13, 24)),
        ("validation-0", one.test, range(6)),
    ):
        images = [contents(split)[row] for row in rows]
        labels = [split.labels[row].item() for row in rows]
        write_parquet(tmp_path / f"{name}.parquet", images, hugging_face=hugging_face, labels=labels, names=("a", "b"))
    other = mdata.load(tmp_path)
    assert other.classes == ("a", "b")
    assert other.train.starts.tolist() == [0, 4, 8, 12, 13, 17, 21, 24]
    assert other.train.name(13) == f"{tmp_path}/train-1.parquet/0"
    for mine, theirs in zip(one.splits, other.splits, strict=True):
        assert torch.equal(mine.labels, theirs.labels)
        assert contents(mine) == contents(theirs)
    assert_same_batches(views_of(one), views_of(other, workers))
    assert contents(pickle.loads(pickle.dumps(other.train))) == contents(one.train)


def test_parquet_shards_at_a_url(tmp_path):
    files = pytest.importorskip("fsspec").filesystem("memory")
    for number in range(2):
        images = [encoded(i) for i in range(12 * number, 12 * number + 12)]
        write_parquet(tmp_path / f"{number}.parquet", images, hugging_face=True)
        files.pipe(f"/parquet/{number}.parquet", (tmp_path / f"{number}.parquet").read_bytes())
    one, other = mdata.load(tmp_path), mdata.load("memory://parquet")
    other.train.read(3)  # opens a file that the workers must not share
    assert_same_batches(views_of(one), views_of(other, workers=2))
    assert other.train.name(12) == "memory:///parquet/1.parquet/0"
    files.rm("/parquet", recursive=True)


def test_parquet_without_labels_or_bytes(tmp_path):
    write_parquet(tmp_path / "0.parquet", [encoded(0), None, encoded(2)], hugging_face=False, labels=["x", None, "y"])
    data = mdata.load(tmp_path)
    assert data.classes == ()
    assert data.train.read(2).shape == (3, 24, 22)
    with pytest.raises(mdata.UnreadableImageError, match=r"ValueError in .*0.parquet/1: no bytes in this row"):
        data.train.read(1)
    (tmp_path / "0.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"^data: expected a Parquet file, got .*0.parquet"):
        mdata.load(tmp_path)


def test_a_parquet_file_of_masks_too(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"mask": [encoded(0)], "image": [encoded(1)]})
    parquet.write_table(table, tmp_path / "0.parquet")
    assert contents(mdata.load(tmp_path).train) == [encoded(1)]
    parquet.write_table(table.rename_columns(["mask", "other"]), tmp_path / "0.parquet")
    with pytest.raises(ValueError, match=r"^data: expected one column of images in .*, got mask, other$"):
        mdata.load(tmp_path)


def test_each_process_opens_its_own_file(tmp_path, monkeypatch):
    """A forked worker would share the position in the file with its parent and the other workers."""
    from moco_ext.data import parquet_shards

    write_parquet(tmp_path / "0.parquet", [encoded(i) for i in range(20)], hugging_face=True)
    split, opened, open_file = mdata.load(tmp_path).train, [], parquet_shards.open_file
    monkeypatch.setattr(parquet_shards, "open_file", lambda url: opened.append(url) or open_file(url))
    assert contents(split) == [encoded(i) for i in range(20)]
    assert len(opened) == 1
    split.shards._cache.clear()
    monkeypatch.setattr(os, "getpid", lambda: 0)
    assert contents(split) == [encoded(i) for i in range(20)]
    assert len(opened) == 2


def test_few_row_groups_are_kept(tmp_path, monkeypatch):
    from moco_ext.data import parquet_shards

    write_parquet(tmp_path / "0.parquet", [encoded(i) for i in range(20)], hugging_face=True)
    split = mdata.load(tmp_path).train
    monkeypatch.setattr(parquet_shards, "_CACHE_BYTES", 2 * sum(len(encoded(i)) for i in range(16, 20)))
    assert contents(split) == [encoded(i) for i in range(20)]
    assert 1 <= len(split.shards._cache) <= 2


# --- LitData ------------------------------------------------------------------------------------------------

LITDATA = """
import io, pickle, sys
import litdata, torch
from litdata.types import Image as LitImage
from PIL import Image

ITEMS = {
    "rows": lambda content, name: {"image": content, "label": name},
    "struct": lambda content, name: {"image": {"bytes": content, "path": "x"}, "label": name},
    "leaves": lambda content, name: {"class": name, "box": torch.zeros(2, 2), "image": content},
    "image": lambda content, name: {"image": LitImage(bytes=content), "label": name},
    "pixels": lambda content, name: {"image": Image.open(io.BytesIO(content)).copy(), "label": name},
    "pair": lambda content, name: (content, "ab".index(name)),
    "masks": lambda content, name: {"mask": LitImage(bytes=b"x"), "jpg": LitImage(bytes=content), "target": name},
    "alone": lambda content, name: content,
    "text": lambda content, name: {"text": "a caption", "number": 1.5},
    "two": lambda content, name: {"left": LitImage(bytes=content), "right": LitImage(bytes=content)},
}
def item(task): return ITEMS[task[0]](*task[1])
if __name__ == "__main__":
    for kind, name, samples in pickle.load(sys.stdin.buffer):
        tasks, out = [(kind, sample) for sample in samples], f"{sys.argv[1]}/{kind}/{name}"
        litdata.optimize(item, tasks, out, chunk_size=7, num_workers=1, start_method="fork", verbose=False)
"""


@pytest.fixture(scope="module")
def all_chunks(folder, tmp_path_factory):
    """``KIND/train`` of the folder's images, and ``rows/val``, in chunks of seven that LitData has written."""
    pytest.importorskip("litdata")
    pytest.importorskip("pyarrow")
    data, root = mdata.load(folder), tmp_path_factory.mktemp("chunks")

    def samples(split):
        return list(zip(contents(split), ["ab"[label] for label in split.labels.tolist()], strict=True))

    kinds = ["rows", "struct", "leaves", "image", "pixels", "pair", "masks", "alone", "text", "two"]
    tasks = [(kind, "train", samples(data.train)) for kind in kinds] + [("rows", "val", samples(data.test))]
    (root / "write.py").write_text(LITDATA)
    command = [sys.executable, str(root / "write.py"), str(root)]
    subprocess.run(command, input=pickle.dumps(tasks), env=environment(), check=True, capture_output=True, timeout=300)
    return root


@pytest.fixture
def chunks(all_chunks, tmp_path):
    """The images of the folder, as rows; a copy."""
    return shutil.copytree(all_chunks / "rows", tmp_path / "chunks", ignore=shutil.ignore_patterns("*.npz"))


@pytest.mark.parametrize("kind", ["rows", "struct", "leaves", "image", "pixels", "pair", "masks", "alone"])
def test_chunks_that_litdata_writes(folder, all_chunks, kind):
    one, root = mdata.load(f"{folder}/train"), all_chunks / kind / "train"
    other = mdata.load(root)
    assert len(other.train) == 24
    assert other.classes == {"pair": ("0", "1"), "alone": ()}.get(kind, ("a", "b"))
    if kind != "alone":
        assert torch.equal(one.train.labels, other.train.labels)
    if kind != "pixels":
        assert contents(one.train) == contents(other.train)
    assert other.train.starts.tolist() == [0, 7, 14, 21, 24]
    assert other.train.name(8) == f"{root}/chunk-0-1.bin/1"
    assert_same_batches(views_of(one), views_of(other))
    assert len(list(root.glob("chunk-0-*.bin.index.npz"))) == 4
    again = mdata.load(root)  # with the saved indexes
    assert contents(again.train) == contents(other.train)
    assert torch.equal(again.train.labels, other.train.labels)
    assert again.classes == other.classes


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("window", [0, 2])
def test_workers_read_chunks(folder, shards, chunks, workers, window):
    one, other = mdata.load(folder), mdata.load(chunks)
    assert [len(split) for split in other.splits] == [24, 6]
    assert other.classes == ("a", "b")
    assert contents(pickle.loads(pickle.dumps(other.train))) == contents(one.train)
    assert_same_batches(
        views_of(mdata.load(shards), shard_window=window), views_of(other, workers, shard_window=window)
    )


def test_chunks_are_in_the_order_of_litdatas_own_reader(chunks):
    code = (
        "import litdata, pickle, sys; "
        "sys.stdout.buffer.write(pickle.dumps([item['image'] for item in litdata.StreamingDataset(sys.argv[1])]))"
    )
    command = [sys.executable, "-c", code, str(chunks / "train")]
    done = subprocess.run(command, env=environment(), capture_output=True, timeout=120, check=True)
    assert pickle.loads(done.stdout) == contents(mdata.load(chunks).train)


def test_chunks_at_a_url(folder, chunks):
    files = pytest.importorskip("fsspec").filesystem("memory")
    for path in chunks.glob("*/*"):
        if path.suffix in (".bin", ".json"):
            files.pipe(f"/chunks/{path.relative_to(chunks)}", path.read_bytes())
    other = mdata.load("memory://chunks")
    assert other.train.name(8) == "memory:///chunks/train/chunk-0-1.bin/1"
    assert_same_batches(views_of(mdata.load(folder)), views_of(other, workers=2))
    mdata.load(chunks)  # saves the indexes
    for path in chunks.glob("train/*.npz"):
        files.pipe(f"/chunks/{path.relative_to(chunks)}", path.read_bytes())
    assert contents(mdata.load("memory://chunks").train) == contents(other.train)
    files.pipe("/chunks/train/chunk-0-3.bin", (chunks / "train" / "chunk-0-0.bin").read_bytes())  # has another index
    assert contents(mdata.load("memory://chunks").train)[21:] == contents(other.train)[:7]
    files.rm("/chunks", recursive=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compression": "zstd"}, "data: expected chunks without compression in .*train, got 'zstd'$"),
        ({"ipc_compression": "zstd"}, "data: expected chunks without ipc_compression in .*train, got 'zstd'$"),
        (
            {"encryption": {"algorithm": "fernet"}},
            "data: expected chunks without encryption in .*train, got {'algorithm'",
        ),
        (
            {"item_loader": "TokensLoader"},
            "data: expected chunks for LitData's PyTreeLoader in .*, got .*TokensLoader$",
        ),
        ({"data_spec": None}, "data: expected chunks for LitData's PyTreeLoader in .*"),
    ],
)
def test_chunks_that_cannot_be_read(chunks, change, message):
    index = json.loads((chunks / "train" / "index.json").read_text())
    index["config"] |= change
    (chunks / "train" / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        mdata.load(chunks)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "expected a column of images, got text, number$"),
        ("two", "expected one of bytes, file, image, jpeg, pil in an item of .*, got left image, right image$"),
    ],
)
def test_chunks_without_one_image_in_an_item(all_chunks, kind, message, monkeypatch):
    match = rf"^data: expected a complete chunk of LitData with images, got .*chunk-0-0.bin: {message}"
    with pytest.raises(ValueError, match=match):
        mdata.load(all_chunks / kind)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"need pyarrow: pip install pyarrow$|left image, right image$"):
        mdata.load(all_chunks / kind)


def test_a_folder_of_chunks_that_is_not_complete(chunks):
    (chunks / "train" / "chunk-0-2.bin").unlink()
    with pytest.raises(ValueError, match=r"^data: expected a shard .*/train/chunk-0-2.bin, got no such file$"):
        mdata.load(chunks)
    (chunks / "train" / "index.json").unlink()
    with pytest.raises(ValueError, match=r"^data: expected index.json next to .*/train/chunk-0-0.bin, got none"):
        mdata.load(chunks)
    (chunks / "train" / "index.json").write_text('{"images": []}')  # of something else
    with pytest.raises(ValueError, match=r"^data: expected index.json next to .*/train/chunk-0-0.bin, got none"):
        mdata.load(chunks)


@pytest.mark.parametrize("kind", ["rows", "leaves"])
@pytest.mark.parametrize(
    "cut", [lambda n: 0, lambda n: 3, lambda n: 20, lambda n: 60, lambda n: n // 2, lambda n: n - 1]
)
def test_a_damaged_chunk(all_chunks, tmp_path, kind, cut):
    root = shutil.copytree(all_chunks / kind / "train", tmp_path / "chunks", ignore=shutil.ignore_patterns("*.npz"))
    path = root / "chunk-0-0.bin"
    path.write_bytes(path.read_bytes()[: cut(path.stat().st_size)])
    with pytest.raises(
        ValueError, match=r"^data: expected a complete chunk of LitData with images, got .*chunk-0-0.bin: "
    ):
        mdata.load(root)


def test_compressed_rows(chunks):
    """Which LitData notes in the index of the folder; here it has not."""
    import pyarrow as pa

    path = chunks / "train" / "chunk-0-0.bin"
    raw = path.read_bytes()
    end = len(raw) - 12
    start = end - int.from_bytes(raw[end : end + 4], "little")
    sink, table = pa.BufferOutputStream(), pa.ipc.open_file(raw[start:end]).read_all()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(table)
    rows = sink.getvalue().to_pybytes()
    path.write_bytes(raw[:start] + rows + len(rows).to_bytes(4, "little") + raw[-8:])
    with pytest.raises(ValueError, match=r"got .*chunk-0-0.bin: its rows are compressed$"):
        mdata.load(chunks)


# --- WebDataset's own writer and reader ---------------------------------------------------------------------


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


def test_webdataset_reads_what_is_written(folder, shards):
    wds = pytest.importorskip("webdataset")
    pattern = f"{shards}/train/shard-{{000000..000003}}.tar"
    samples = list(wds.WebDataset(pattern, shardshuffle=False))
    split = mdata.load(folder).train
    assert [sample["png"] for sample in samples] == contents(split)
    assert [int(sample["cls"]) for sample in samples] == split.labels.tolist()
    image, label = next(iter(wds.WebDataset(pattern, shardshuffle=False).decode("pil").to_tuple("png", "cls")))
    assert image.size == (20, 24)
    assert label == 0


# --- moco-ext shard -----------------------------------------------------------------------------------------


def files_of(root) -> dict[str, str]:
    """Everything that is written but the indexes, which know the time of their shards."""
    paths = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".npz" and path.name != ".lock"]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_an_interrupted_command_resumes(folder, shards, tmp_path):
    data, written = mdata.load(folder), []

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
    assert files_of(tmp_path) == files_of(shards)
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


def test_a_killed_command_resumes(folder, shards, tmp_path):
    command = ["shard", str(folder), str(tmp_path), "-n", "7"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], env=environment(), timeout=120)
    assert killed.returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.glob("train/*.tar")] + [path.name for path in tmp_path.glob("train/.*.tmp")]
    assert sorted(left)[1:] == ["shard-000000.tar", "shard-000001.tar"]
    assert min(left).startswith(".shard-000002.tar.")
    assert cli.main(command) == 0
    assert files_of(tmp_path) == files_of(shards)


def test_the_command(folder, shards, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["shard", str(folder), str(out), "-n", "7"]) == 0
    assert files_of(out) == files_of(shards)
    assert "30 images, 5 shards" in capsys.readouterr().out
    assert cli.main(["shard", str(folder), str(out), "--images-per-shard", "7"]) == 0  # nothing is left to do
    assert cli.main(["shard", str(folder), str(out)]) == 1
    error = capsys.readouterr().err
    assert "error: output: expected no shards, or those of an interrupted command" in error
    assert "with another images_per_shard" in error
    assert cli.main(["shard", f"{folder}/train", str(out), "-n", "7"]) == 1  # no val: next to train/, it would be lost
    assert f"error: output: expected no other shards in {out}, got {out}/" in capsys.readouterr().err
    assert files_of(out) == files_of(shards)
    again = tmp_path / "again"  # from shards to shards
    assert cli.main(["shard", str(out / "train"), str(again), "-n", "24", "--val-fraction", "0.25"]) == 0
    data = mdata.load(again)
    assert [len(split) for split in data.splits] == [18, 6]
    assert data.classes == ("a", "b")
    read = contents(data.train) + contents(data.test)
    assert sorted(read) == sorted(contents(mdata.load(folder).train))


def test_a_random_order(folder, tmp_path):
    data = mdata.load(folder)
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


def test_what_cannot_be_written(folder, tmp_path):
    with pytest.raises(ValueError, match="data: expected a folder, a list or shards of images, got digits, in memory"):
        write_shards(mdata.load("digits"), tmp_path)
    with pytest.raises(ValueError, match="images_per_shard: expected at least 1, got 0"):
        write_shards(mdata.load(folder), tmp_path, images_per_shard=0)
    assert cli.main(["shard", "digits", str(tmp_path / "out")]) == 1
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "train").mkdir()
    write_tar(tmp_path / "train" / "other.tar", {})
    with pytest.raises(ValueError, match="output: expected no shards, or those of an interrupted command"):
        write_shards(mdata.load(folder), tmp_path)
    assert files_of(tmp_path).keys() == {"train/other.tar"}


# --- the other commands -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_from_training_to_features(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = "-a resnet8-small --image-size 16 -b 8 --epochs 1 --moco-k 16 --moco-dim 8 -j 1 --device cpu --knn-k 3"
    assert cli.main(["pretrain", str(shards), "--output", "run", *flags.split()]) == 0
    assert 0 <= json.loads(Path("run/summary.json").read_text())["knn_top1"]["trained"] <= 100
    pytest.importorskip("pyarrow")
    assert cli.main(["embed", "run", str(shards), "-o", "f.parquet", "--device", "cpu", "-j", "1"]) == 0
    import pyarrow.parquet as parquet

    table = parquet.read_table("f.parquet").to_pydict()
    assert table["path"][0] == f"{shards}/train/shard-000000.tar/000000000-00_v1.png"
    assert table["label"] == [*"a" * 12, *"b" * 12, *"a" * 3, *"b" * 3]
    assert cli.main(["pretrain", f"{shards}/train/shard-{{000000..000003}}.tar", "--dry-run", "--device", "cpu"]) == 0
    assert "24" in capsys.readouterr().out


# --- size ---------------------------------------------------------------------------------------------------

LARGE = """
import json, re, sys, time
from pathlib import Path
import numpy as np, torch
from training import run_in, tiny
from moco_ext import data as mdata
from moco_ext.data import ImageData, ShardSplit
from moco_ext.data.tar_shards import TarIndex, TarShards, index_of
from moco_ext.train import pretrain
from moco_ext.train.trainer import Trainer

torch.set_num_threads(1)
path, output, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
stamp, index = index_of(path)
arrays = [np.resize(array, count) for array in index[:-1]]
shards = TarShards([path], [stamp], [TarIndex(*arrays, ())])
del arrays, index
split = ShardSplit(shards, torch.tensor([-1]).expand(count))
data = ImageData("many", (), 16, (0.5,), (0.2,), True, split, None)
steps, started = [], time.monotonic()
train_step = Trainer._train_step

def resident(pid="self"):
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) / 1024

def measured(self, *args):
    train_step(self, *args)
    workers = self.loader._loader._loader._iterator._workers
    steps.append((time.monotonic() - started, resident(), *(resident(worker.pid) for worker in workers)))

Trainer._train_step = measured
pretrain(tiny(steps=200, epochs=200, log_every=100, batch_size=16), data, run_in(Path(output), workers=2))
print(json.dumps(steps))
"""


@pytest.mark.torture
def test_a_hundred_million_images(shards, tmp_path):
    """A generated index that repeats the images of a shard: a run starts in seconds and its memory stays flat."""
    path = shards / "train" / "shard-000000.tar"
    command = [sys.executable, "-c", LARGE, str(path), str(tmp_path / "run"), str(10**8)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout.splitlines()[-1])
    print(f"first step after {steps[0][0]:.1f} s; MiB: {steps[0][1:]} -> {steps[20][1:]} -> {steps[-1][1:]}")
    assert len(steps) == 200
    assert steps[0][0] < 60  # a permutation of 10^8 takes 4 s on an idle core
    for at_20, at_end in zip(steps[20][1:], steps[-1][1:], strict=True):
        assert at_end - at_20 < 100  # MiB; touching a page of the index at random maps it, but copies nothing
    assert steps[-1][1] < 4096  # 2.4 GB: index 16 bytes and order 8 bytes an image
