"""Tar files: their index, of odd, damaged, changed and read-only ones."""

import gzip
import io
import os
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("tensorboard")

from PIL import Image
from shards_on_disk import ODD_NAME, contents, encoded, names, write_tar

from moco_ext import data as mdata
from moco_ext.data import shards, tar_shards
from moco_ext.data.tar_shards import index_of

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_processes_share_the_work_of_indexing(tmp_path, monkeypatch):
    paths = [str(tmp_path / f"{i}.tar") for i in range(5)]
    for i, path in enumerate(paths):
        write_tar(path, {f"{i}.png": encoded(i)})
    opened = []
    monkeypatch.setattr(shards, "_THREADS", 1)
    monkeypatch.setattr(shards, "index_of", lambda url: opened.append(url) or index_of(url))
    monkeypatch.setattr(shards, "world_size", lambda: 2, raising=False)
    for rank, first in ((0, 0), (1, 2)):
        opened.clear()
        monkeypatch.setattr(shards, "rank", lambda rank=rank: rank, raising=False)
        split = mdata.load(tmp_path).train
        assert opened == paths[first:] + paths[:first]  # whoever comes second finds the index
        assert contents(split) == [encoded(i) for i in range(5)]


def test_shards_share_the_names_of_classes(tmp_path):
    paths = [str(tmp_path / f"{i}.tar") for i in range(2)]
    for path in paths:
        write_tar(path, {"a.png": encoded(0), "a.cls": b"n01440764"})
        index_of(path)
    assert index_of(paths[0])[1].names[0] is index_of(paths[1])[1].names[0]


def test_headers_are_not_kept(tmp_path):
    n, path = 2000, tmp_path / "0.tar"
    with path.open("wb") as file:
        file.writelines(tarfile.TarInfo(f"{i:05}.jpg").tobuf() for i in range(n))
        file.write(bytes(1024))
    tracemalloc.start()
    assert len(index_of(str(path))[1].sizes) == n
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / n < 400  # with the headers: a kilobyte


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
