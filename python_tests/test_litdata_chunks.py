"""Chunks of LitData, read without it."""

import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("tensorboard")

from shards_on_disk import assert_killed_runs_resume, assert_same_batches, contents, views_of
from training import environment

from moco_ext import data as mdata

pytestmark = pytest.mark.usefixtures("one_thread")


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
def all_chunks(image_folder, tmp_path_factory):
    """``KIND/train`` of the folder's images, and ``rows/val``, in chunks of seven that LitData has written."""
    pytest.importorskip("litdata")
    pytest.importorskip("pyarrow")
    data, root = mdata.load(image_folder), tmp_path_factory.mktemp("chunks")

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
def test_chunks_that_litdata_writes(image_folder, all_chunks, kind):
    one, root = mdata.load(f"{image_folder}/train"), all_chunks / kind / "train"
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
def test_workers_read_chunks(image_folder, image_shards, chunks, workers, window):
    one, other = mdata.load(image_folder), mdata.load(chunks)
    assert [len(split) for split in other.splits] == [24, 6]
    assert other.classes == ("a", "b")
    assert contents(pickle.loads(pickle.dumps(other.train))) == contents(one.train)
    assert_same_batches(
        views_of(mdata.load(image_shards), shard_window=window), views_of(other, workers, shard_window=window)
    )


def test_chunks_are_in_the_order_of_litdatas_own_reader(chunks):
    code = (
        "import litdata, pickle, sys; "
        "sys.stdout.buffer.write(pickle.dumps([item['image'] for item in litdata.StreamingDataset(sys.argv[1])]))"
    )
    command = [sys.executable, "-c", code, str(chunks / "train")]
    done = subprocess.run(command, env=environment(), capture_output=True, timeout=120, check=True)
    assert pickle.loads(done.stdout) == contents(mdata.load(chunks).train)


def test_chunks_at_a_url(image_folder, chunks):
    files = pytest.importorskip("fsspec").filesystem("memory")
    for path in chunks.glob("*/*"):
        if path.suffix in (".bin", ".json"):
            files.pipe(f"/chunks/{path.relative_to(chunks)}", path.read_bytes())
    other = mdata.load("memory://chunks")
    assert other.train.name(8) == "memory:///chunks/train/chunk-0-1.bin/1"
    assert_same_batches(views_of(mdata.load(image_folder)), views_of(other, workers=2))
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


@pytest.mark.slow
def test_killed_and_resumed_with_other_workers(chunks, tmp_path):
    assert_killed_runs_resume(chunks, tmp_path)
