"""Shards of all formats: labels, patterns, equality with the folder, damage, resuming, URLs, size."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("tensorboard")

from shards_on_disk import assert_killed_runs_resume, assert_same_batches, contents, encoded, views_of, write_tar
from training import assert_equal_states, environment, state_of, torchrun

from moco_ext import cli
from moco_ext import data as mdata
from moco_ext.data import Augmentation, TrainLoader, tar_shards
from moco_ext.data.sampler import EpochBatchSampler
from moco_ext.data.shard_writer import write_shards
from moco_ext.data.tar_shards import index_of
from moco_ext.data.urls import expand, split_sources

pytestmark = pytest.mark.usefixtures("one_thread")


# --- labels ----------------------------------------------------------------------------------------------------------
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
    (tmp_path / "shards.json").write_text('{"classes": ["x", "y"]}')
    for label in ("2", "-1"):
        write_tar(tmp_path / "0.tar", {"a.png": encoded(0), "a.cls": label.encode()})
        message = rf"^data: expected labels 0 to 1 of shards.json in .*0.tar, got \('{label}',\)$"
        with pytest.raises(ValueError, match=message):
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
    write_tar(tmp_path / "val" / "0.tar", {"0.png": encoded(0), "0.cls": b"cat"})  # the name of a number
    with pytest.raises(ValueError, match=r"^data: expected test images of the classes 0, 1, 2 in .*0.tar, got cat$"):
        mdata.load(tmp_path)


# --- patterns and sources --------------------------------------------------------------------------------------------
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


def test_overlapping_patterns_give_each_shard_once(tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", {"a.png": encoded(i)})
    data = mdata.load(f"{tmp_path}/{{0..1}}.tar{os.pathsep}{tmp_path}/{{1..2}}.tar")
    assert contents(data.train) == [encoded(i) for i in range(3)]


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


# --- the same as a folder --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_training_views_are_those_of_the_folder(image_folder, image_shards, workers):
    one, other = mdata.load(image_folder), mdata.load(image_shards)
    assert one.classes == other.classes == ("a", "b")
    assert torch.equal(one.train.labels, other.train.labels)
    assert_same_batches(views_of(one), views_of(other, workers))


def test_held_out_images_and_evaluation_are_those_of_the_folder(image_folder, image_shards):
    one, other = mdata.load(image_folder, image_size=16), mdata.load(image_shards, image_size=16)
    for mine, theirs in zip(one.splits, other.splits, strict=True):
        assert torch.equal(mine.labels, theirs.labels)
        batches = zip(mdata.eval_batches(one, mine, 7), mdata.eval_batches(other, theirs, 7, workers=1), strict=True)
        for (images, index), (their_images, their_index) in batches:
            assert torch.equal(images, their_images)
            assert torch.equal(index, their_index)
    one, other = (mdata.load(f"{root}/train", val_fraction=0.3) for root in (image_folder, image_shards))
    for mine, theirs in zip(one.splits, other.splits, strict=True):
        assert contents(mine) == contents(theirs)
        assert torch.equal(mine.labels, theirs.labels)
    assert_same_batches(views_of(one), views_of(other))


def test_a_split_is_pickled_without_its_files(image_shards):
    split = mdata.load(image_shards).train
    before = contents(split)
    assert contents(pickle.loads(pickle.dumps(split))) == before


SPAWNED = """
import multiprocessing, sys
import torch
from moco_ext import data as mdata
from shards_on_disk import views_of
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    torch.save([tuple(batch) for batch in views_of(mdata.load(sys.argv[1]), workers=2)], sys.argv[2])
"""


@pytest.mark.slow
def test_workers_that_are_not_forked(image_shards, tmp_path):
    (tmp_path / "spawned.py").write_text(SPAWNED)
    command = [sys.executable, tmp_path / "spawned.py", image_shards, tmp_path / "views.pt"]
    done = subprocess.run(list(map(str, command)), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same_batches(views_of(mdata.load(image_shards)), torch.load(tmp_path / "views.pt"))


@pytest.mark.parametrize("shuffled_keys", [False, True])
def test_two_ranks_read_each_image_once(image_shards, shuffled_keys):
    """As queries; with the keys of --shuffle-bn loader, once more as keys, of which some are on the other rank."""
    data, read = mdata.load(image_shards), {}
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
def test_shuffle_bn_in_the_loader_trains_two_processes_as_on_the_folder(image_folder, image_shards, tmp_path):
    flags = "-a resnet8-small --image-size 16 -b 8 --epochs 2 --moco-k 16 --moco-dim 8 --shuffle-bn loader -j 2"
    for name, root in (("folder", image_folder), ("shards", image_shards)):
        command = ["pretrain", root, "--output", tmp_path / name, *flags.split(), "--device", "cpu", "--knn-k", 3]
        done = torchrun(2, "-m", "moco_ext", *command)
        assert done.returncode == 0, done.stderr
    assert_equal_states(state_of(tmp_path / "folder"), state_of(tmp_path / "shards"))


# --- damaged images --------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:data. expected an image")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_replaced_as_in_a_folder(image_folder, tmp_path, workers):
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


# --- resuming --------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 2])
def test_killed_and_resumed_with_other_workers(image_shards, tmp_path, window):
    assert_killed_runs_resume(image_shards, tmp_path, window)


# --- shuffling within windows ----------------------------------------------------------------------------------------
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


def test_a_window_is_part_of_a_resumed_run(image_shards, image_folder):
    loader = TrainLoader(mdata.load(image_shards), Augmentation.v1(16), 4, shard_window=2)
    other = TrainLoader(mdata.load(image_shards), Augmentation.v1(16), 4)
    with pytest.raises(ValueError, match="state: expected shard_window = 0 as in this loader, got 2"):
        other.load_state_dict(loader.state_dict())
    state = other.state_dict()
    del state["shard_window"]  # a checkpoint from before there were windows
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="shard_window: expected 0, or with shards a number of them, got 2"):
        TrainLoader(mdata.load(image_folder), Augmentation.v1(16), 4, shard_window=2)


def test_images_of_held_out_images(image_shards):
    split = mdata.load(f"{image_shards}/train", val_fraction=0.5).train
    all_of_them, rows = contents(split), torch.tensor([1, 4, 5])
    assert contents(split.take(rows)) == [all_of_them[row] for row in rows.tolist()]


def test_windows_of_held_out_shards(image_shards):
    """val_fraction takes images out of the shards: the windows are of the images that are left."""
    split = mdata.load(f"{image_shards}/train", val_fraction=0.5).train
    starts = split.starts
    assert starts[0] == 0
    assert starts[-1] == len(split) == 12
    for shard in range(4):
        in_shard = {split.name(position).split("/")[-2] for position in range(starts[shard], starts[shard + 1])}
        assert in_shard <= {f"shard-{shard:06}.tar"}


# --- URLs ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def in_memory(image_shards):
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    for path in image_shards.glob("*/*"):
        if path.suffix in (".tar", ".json"):
            files.pipe(f"/bucket/{path.relative_to(image_shards)}", path.read_bytes())
    yield files
    files.rm("/bucket", recursive=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_at_a_url(image_folder, in_memory, workers):
    one, other = mdata.load(image_folder), mdata.load("memory://bucket")
    assert one.classes == other.classes
    assert [len(split) for split in other.splits] == [24, 6]
    assert_same_batches(views_of(one), views_of(other, workers))
    assert other.train.name(0) == "memory:///bucket/train/shard-000000.tar/000000000-00_v1.png"
    for pattern in ("memory://bucket/train/shard-{000000..000003}.tar", "memory://bucket/train/*.tar"):
        assert contents(mdata.load(pattern).train) == contents(other.train)


def test_an_index_at_a_url_is_used_if_it_fits(image_shards, in_memory, tmp_path, monkeypatch):
    index = (image_shards / "val" / "shard-000000.tar.index.npz").read_bytes()
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


def test_folders_need_no_fsspec(image_folder, image_shards):
    code = (
        "import sys; sys.modules['fsspec'] = None; sys.modules['pyarrow'] = None; from moco_ext import data; "
        "print([len(data.load(path).train) for path in sys.argv[1:]])"
    )
    command = [sys.executable, "-c", code, str(image_folder), str(image_shards)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.stdout == "[24, 24]\n", done.stderr


# --- the other commands ----------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_run_from_training_to_features(image_shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = "-a resnet8-small --image-size 16 -b 8 --epochs 1 --moco-k 16 --moco-dim 8 -j 1 --device cpu --knn-k 3"
    assert cli.main(["pretrain", str(image_shards), "--output", "run", *flags.split()]) == 0
    assert 0 <= json.loads(Path("run/summary.json").read_text())["knn_top1"]["trained"] <= 100
    pytest.importorskip("pyarrow")
    assert cli.main(["embed", "run", str(image_shards), "-o", "f.parquet", "--device", "cpu", "-j", "1"]) == 0
    import pyarrow.parquet as parquet

    table = parquet.read_table("f.parquet").to_pydict()
    assert table["path"][0] == f"{image_shards}/train/shard-000000.tar/000000000-00_v1.png"
    assert table["label"] == [*"a" * 12, *"b" * 12, *"a" * 3, *"b" * 3]
    assert (
        cli.main(["pretrain", f"{image_shards}/train/shard-{{000000..000003}}.tar", "--dry-run", "--device", "cpu"])
        == 0
    )
    assert "24" in capsys.readouterr().out


# --- size ------------------------------------------------------------------------------------------------------------
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
def test_a_hundred_million_images(image_shards, tmp_path):
    """A generated index that repeats the images of a shard: a run starts in seconds and its memory stays flat."""
    path = image_shards / "train" / "shard-000000.tar"
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
