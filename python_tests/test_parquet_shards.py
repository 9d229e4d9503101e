"""Parquet files of images, as Hugging Face writes them and others."""

import json
import os
import pickle

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("tensorboard")


from shards_on_disk import assert_same_batches, contents, encoded, views_of

from moco_ext import data as mdata

pytestmark = pytest.mark.usefixtures("one_thread")


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
def test_parquet_shards(image_folder, tmp_path, hugging_face, workers):
    one = mdata.load(image_folder)
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


def test_minus_1_of_hugging_face_is_no_label(tmp_path):
    """And not the last class; a number without a name is an error."""
    images = [encoded(i) for i in range(3)]
    write_parquet(tmp_path / "0.parquet", images, hugging_face=True, labels=[0, -1, 1], names=("cat", "dog"))
    data = mdata.load(tmp_path)
    assert (data.classes, data.train.labels.tolist()) == ((), [-1, -1, -1])
    write_parquet(tmp_path / "0.parquet", images, hugging_face=True, labels=[0, 2, 1], names=("cat", "dog"))
    with pytest.raises(ValueError, match=r"^data: expected labels 0 to 1 or -1 in label of .*, got 2$"):
        mdata.load(tmp_path)


def test_integers_that_pandas_made_floats_are_the_same_classes(tmp_path):
    images = [encoded(i) for i in range(2)]
    write_parquet(tmp_path / "0.parquet", images, hugging_face=True, labels=[0.0, 1.0])
    write_parquet(tmp_path / "1.parquet", images, hugging_face=True, labels=[1, 0])
    data = mdata.load(tmp_path)
    assert (data.classes, data.train.labels.tolist()) == (("0", "1"), [0, 1, 1, 0])
    write_parquet(tmp_path / "1.parquet", images, hugging_face=True, labels=[1.0, float("nan")])
    assert mdata.load(tmp_path).classes == ()
    write_parquet(tmp_path / "1.parquet", images, hugging_face=True, labels=[1.0, 0.0], names=("cat", "dog"))
    (tmp_path / "0.parquet").unlink()
    assert mdata.load(tmp_path).train.labels.tolist() == [1, 0]


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
