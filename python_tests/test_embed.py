"""moco-ext embed and neighbors: rows, order, files of every format, several processes, interruptions."""

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
import torch
from encoders_on_disk import ARCH, TRANSFORM, write_photos, write_run
from PIL import Image
from torch.nn.functional import normalize
from training import environment, few_digits, torchrun

import moco_ext
from moco_ext import cli
from moco_ext import data as mdata
from moco_ext.checkpoints.pretrained import load_pretrained
from moco_ext.evaluate import encoder_features
from moco_ext.evaluate.embed import embed
from moco_ext.evaluate.feature_files import FeatureFile, Table, write_table
from moco_ext.evaluate.neighbors import neighbors, write_faiss_index

pytest.importorskip("torchvision")
parquet = pytest.importorskip("pyarrow.parquet")

FORMATS = ("parquet", "npy", "npz", "safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eleven images; two other files cannot be decoded."""
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder)
    (folder / "004a.png").write_bytes(b"not an image")
    (folder / "zz.jpg").write_bytes((folder / "000.jpg").read_bytes()[:200])
    return folder


def features_of(run, photos):
    """Row by row, and the paths."""
    encoder, transform = moco_ext.load_encoder(run)
    paths = [path for path in sorted(photos.iterdir()) if path.name not in ("004a.png", "zz.jpg")]
    with torch.no_grad():
        return torch.cat([encoder(transform(path)[None]) for path in paths]), [str(path) for path in paths]


def rows_of(path, rows=4):
    return torch.cat(list(FeatureFile(path).blocks(rows)))


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_are_the_features_in_order(suffix, dtype, run, photos, tmp_path):
    expected, paths = features_of(run, photos)
    output = tmp_path / f"features.{suffix}"
    done = embed(run, photos, output, batch_size=3, dtype=dtype)
    unreadable = [str(photos / name) for name in ("004a.png", "zz.jpg")]
    assert (done.images, done.dim, done.unreadable) == (11, 256, unreadable)
    assert (tmp_path / f"features.{suffix}.unreadable.txt").read_text().splitlines() == unreadable
    found = FeatureFile(output)
    assert (found.paths, found.labels, found.dim, len(found)) == (paths, None, 256, 11)
    # The batches differ, so sums may be in another order; float16 rounds to 11 bits.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == "float32" else {"rtol": 2**-11, "atol": 1e-6}
    torch.testing.assert_close(rows_of(output), expected, **tolerance)
    assert [len(block) for block in found.blocks(4)] == [4, 4, 3]
    assert found.metadata["weights"] == str(run)
    assert found.metadata["transform"] == TRANSFORM.as_dict()
    assert {"arch": ARCH, "head": False, "normalized": False, "images": 11}.items() <= found.metadata.items()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("suffix", FORMATS)
def test_writing_and_reading_need_memory_for_a_block(suffix, tmp_path):
    """Of 131 MB of features; what pyarrow allocates counts too."""
    import pyarrow as pa

    shape, output = (64_000, 512), tmp_path / f"f.{suffix}"
    blocks = (np.full((1000, 512), i, np.float32) for i in range(64))
    table = Table(blocks, shape, "float32", [""] * shape[0], None, {"images": shape[0], "dim": 512})
    pool = pa.system_memory_pool()
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        write_table(output, table)
        for i, block in enumerate(FeatureFile(output).blocks(1000)):
            assert bool((block == i).all())
        peak = tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    assert i == 63
    assert peak < 60e6


def test_other_packages_read_the_files(run, photos, tmp_path):
    from safetensors.torch import load_file

    expected, paths = features_of(run, photos)
    for suffix in FORMATS:
        embed(run, photos, tmp_path / f"f.{suffix}", dtype="float16")
    table = parquet.read_table(tmp_path / "f.parquet")
    assert table.column_names == ["path", "features"]
    assert table["path"].to_pylist() == paths
    archive = np.load(tmp_path / "f.npz")
    assert archive["paths"].tolist() == paths
    tensors = load_file(tmp_path / "f.safetensors")
    assert json.loads(bytes(tensors["paths"].tolist())) == paths
    assert json.loads((tmp_path / "f.npy.json").read_text())["paths"] == paths
    for rows in (
        np.array(table["features"].to_pylist()),
        archive["features"],
        tensors["features"].numpy(),
        np.load(tmp_path / "f.npy"),
    ):
        np.testing.assert_allclose(rows.astype(np.float32), expected.numpy(), rtol=2**-11, atol=1e-6)


def test_head_and_unit_rows(run, photos, tmp_path):
    encoder, transform = moco_ext.load_encoder(run, head=True)
    paths = features_of(run, photos)[1]
    with torch.no_grad():
        expected = normalize(encoder(torch.stack([transform(path) for path in paths])).double(), dim=1)
    embed(run, photos, tmp_path / "f.npy", head=True, normalize=True)
    assert rows_of(tmp_path / "f.npy").shape == (11, 8)
    torch.testing.assert_close(rows_of(tmp_path / "f.npy").double(), expected, rtol=1e-5, atol=1e-6)


def test_classes_and_several_sources(run, tmp_path):
    """The file is a list of labeled images too."""
    for name in ("b", "a"):
        write_photos(tmp_path / "data" / "train" / name, 2)
    write_photos(tmp_path / "data" / "val" / "a", 1)
    write_photos(tmp_path / "data" / "val" / "b", 1)
    for suffix in FORMATS:
        embed(run, tmp_path / "data", tmp_path / f"f.{suffix}")
        found = FeatureFile(tmp_path / f"f.{suffix}")
        assert found.labels == ["a", "a", "b", "b", "a", "b"]
        assert [path.split("data/")[1] for path in found.paths[3:]] == [
            "train/b/001.png",
            "val/a/000.jpg",
            "val/b/000.jpg",
        ]
    again = mdata.load(str(tmp_path / "f.parquet"))
    assert again.classes == ("a", "b")
    assert again.train.paths == found.paths
    sources = ["data/train/a", "data/val/b"]
    done = embed(run, os.pathsep.join(str(tmp_path / source) for source in sources), tmp_path / "two.npy")
    assert done.images == 3


def test_built_in_data_has_rows_in_place_of_paths(tmp_path):
    data = few_digits(30)
    write_run(tmp_path / "run", mdata.EvalTransform.of(data))
    embed(tmp_path / "run", data, tmp_path / "f.parquet")
    found = FeatureFile(tmp_path / "f.parquet")
    n = len(data.train)
    assert len(found) == n + len(data.test) == 90
    assert (found.paths[0], found.paths[n - 1], found.paths[n]) == (
        "digits/train/0",
        f"digits/train/{n - 1}",
        "digits/test/0",
    )
    assert found.labels[n] == data.classes[data.test.labels[0]]
    module = load_pretrained(tmp_path / "run")[0]
    expected = torch.cat([encoder_features(module, data, split) for split in data.splits])
    torch.testing.assert_close(rows_of(tmp_path / "f.parquet", 1000), expected, rtol=1e-5, atol=1e-6)


def test_the_encoder_in_16_bits(run, photos, tmp_path):
    exact, rounded = (tmp_path / f"{name}.npy" for name in ("exact", "rounded"))
    embed(run, photos, exact)
    embed(run, photos, rounded, precision="bf16")
    a, b = np.load(exact), np.load(rounded)
    assert b.dtype == np.float32
    assert 0 < np.abs(a - b).max() < 0.02 * np.abs(a).max()
    assert FeatureFile(rounded).metadata["precision"] == "bf16"
    with pytest.raises(ValueError, match=r"^precision: expected one of fp32, bf16, fp16, got 'bfloat16'"):
        embed(run, photos, tmp_path / "f.npy", precision="bfloat16")
    assert not (tmp_path / "f.npy").exists()


def test_a_replaced_file_forgets_the_unreadable_ones(run, photos, tmp_path):
    embed(run, photos, tmp_path / "f.npy")
    write_photos(tmp_path / "fine", 2)
    with pytest.raises(FileExistsError, match=r"output: .*f.npy exists"):
        embed(run, tmp_path / "fine", tmp_path / "f.npy")
    (tmp_path / ".f.npy.rank3.12345.tmp").write_bytes(b"of a killed process")
    assert embed(run, tmp_path / "fine", tmp_path / "f.npy", overwrite=True).images == 2
    assert {path.name for path in tmp_path.iterdir()} == {"fine", "f.npy", "f.npy.json"}


def test_names_that_are_no_text(run, tmp_path):
    """Every format takes them but Parquet, whose error comes before the work."""
    folder = tmp_path / os.fsdecode(b"photo\xe9")
    paths = write_photos(folder, 3)
    (folder / "bad.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"^output: expected paths and classes in UTF-8 for .parquet, got '.*udce9"):
        embed(run, folder, tmp_path / "f.parquet")
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    for suffix in ("npy", "npz", "safetensors"):
        output = tmp_path / f"f.{suffix}"
        embed(run, folder, output)
        assert FeatureFile(output).paths == [str(path) for path in paths]
        assert (tmp_path / f"f.{suffix}.unreadable.txt").read_bytes() == os.fsencode(folder / "bad.png") + b"\n"
    flags = ["--gallery", str(tmp_path / "page.html"), "--threads", "1"]
    assert cli.main(["neighbors", str(output), str(paths[0]), *flags]) == 0
    assert 'title="' in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"output": "f.csv"}, ValueError, r"output: expected a name that ends in one of .parquet, .* got .*f.csv"),
        ({"output": "none/f.npy"}, FileNotFoundError, "output: no such folder: .*none"),
        ({"dtype": "int8"}, ValueError, "dtype: expected one of float32, float16, got 'int8'"),
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
        ({"weights": "none.pth"}, FileNotFoundError, "no such file: none.pth"),
        ({"data": "nowhere"}, ValueError, "data: expected one of digits"),
        ({"data": "BAD"}, ValueError, "data: expected images that can be decoded, got none of 2: .*x.png"),
    ],
)
def test_errors_leave_nothing(changes, error, message, run, photos, tmp_path):
    (tmp_path / "bad").mkdir()
    for name in ("x.png", "y.png"):
        (tmp_path / "bad" / name).write_bytes(b"?")
    arguments = {"weights": run, "data": photos, "output": "f.npy"} | changes
    if arguments["data"] == "BAD":
        arguments["data"] = tmp_path / "bad"
    arguments["output"] = tmp_path / arguments["output"]
    with pytest.raises(error, match=message):
        embed(**arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_features_that_overflow(run, photos, tmp_path):
    encoder, _ = moco_ext.load_encoder(run)
    with torch.no_grad():
        encoder.model.bn1.weight.mul_(1e8)
    with pytest.raises(FloatingPointError, match=r"features \(float16\): expected finite values"):
        embed(encoder, photos, tmp_path / "f.npy", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_parquet_without_pyarrow(run, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MOCO_EXT_DEBUG", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    assert cli.main(["embed", str(run), str(photos), "-o", str(tmp_path / "f.parquet")]) == 1
    assert "this needs pyarrow, which is not installed: pip install pyarrow" in capsys.readouterr().err


@pytest.mark.slow
def test_several_processes_write_the_same_file(run, photos, tmp_path):
    """Three ranks have five images, five and three, with an unreadable one in the first and in the last share."""
    flags = ("-m", "moco_ext", "embed", run, photos, "--device", "cpu", "-b", "2", "-j", "0", "--threads", "1")
    one, three = tmp_path / "one.parquet", tmp_path / "three.parquet"
    embed(run, photos, one, batch_size=2)
    done = torchrun(3, *flags, "-o", three, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 11
    assert FeatureFile(three).paths == FeatureFile(one).paths
    torch.testing.assert_close(rows_of(three), rows_of(one), rtol=1e-5, atol=1e-6)
    listed = [tmp_path / f"{name}.parquet.unreadable.txt" for name in ("one", "three")]
    assert listed[0].read_text() == listed[1].read_text() != ""
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_more_processes_than_images(run, tmp_path):
    write_photos(tmp_path / "few", 1)
    flags = ("-m", "moco_ext", "embed", run, tmp_path / "few", "--device", "cpu", "-j", "0", "--threads", "1")
    done = torchrun(2, *flags, "-o", tmp_path / "f.npy", "--json")
    assert done.returncode == 0, done.stderr
    assert rows_of(tmp_path / "f.npy").shape == (1, 256)


@pytest.mark.slow
def test_a_killed_process_leaves_the_old_file(run, tmp_path):
    write_photos(tmp_path / "photos", 12)
    output = tmp_path / "f.npy"
    embed(run, tmp_path / "photos", output)
    before = output.read_bytes()
    (tmp_path / "slow").mkdir()
    for path in (tmp_path / "photos").iterdir():
        for i in range(40):
            (tmp_path / "slow" / f"{i}-{path.name}").symlink_to(path)
    command = ["-m", "moco_ext", "embed", run, tmp_path / "slow", "-o", output, "-b", "1", "-j", "0", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, *map(str, command), "--overwrite", "--device", "cpu"], env=environment()
    )
    shard = tmp_path / f".f.npy.rank0.{process.pid}.tmp"
    until = time.monotonic() + 300  # a busy machine starts slowly
    while not (shard.exists() and shard.stat().st_size) and time.monotonic() < until:
        time.sleep(0.01)
    assert shard.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert output.read_bytes() == before
    assert len(FeatureFile(output)) == 12
    embed(run, tmp_path / "photos", output, overwrite=True)
    assert not shard.exists()


# --- neighbors --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded(run, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded")
    for suffix in FORMATS:
        embed(run, photos, folder / f"f.{suffix}")
    return folder


@pytest.mark.parametrize("suffix", FORMATS)
def test_neighbors_are_those_of_all_cosines(suffix, run, photos, embedded, tmp_path, monkeypatch):
    monkeypatch.setattr("moco_ext.evaluate.feature_files._ROW_GROUP", 4)  # several blocks
    queries = write_photos(tmp_path / "other", 3, sizes=((33, 21),))
    encoder, transform = moco_ext.load_encoder(run)
    bank, paths = features_of(run, photos)
    with torch.no_grad():
        rows = encoder(torch.stack([transform(path) for path in queries]))
    cosines = normalize(rows.double(), dim=1) @ normalize(bank.double(), dim=1).T
    results, unreadable = neighbors(embedded / f"f.{suffix}", [tmp_path / "other"], 5)
    assert unreadable == []
    assert [result.query for result in results] == list(map(str, queries))
    for result, row in zip(results, cosines, strict=True):
        best, index = row.sort(descending=True)
        assert [found.row for found in result.neighbors] == index[:5].tolist()
        assert [found.path for found in result.neighbors] == [paths[i] for i in index[:5]]
        torch.testing.assert_close(
            torch.tensor([found.similarity for found in result.neighbors]).double(), best[:5], rtol=0, atol=1e-5
        )


def test_a_query_is_not_its_own_neighbor(photos, embedded, monkeypatch):
    monkeypatch.chdir(photos)
    (result,), _ = neighbors(embedded / "f.npy", ["002.png"], 100)
    assert len(result.neighbors) == 10
    assert str(photos / "002.png") not in {found.path for found in result.neighbors}
    copied, _ = neighbors(embedded / "f.npy", [photos], 1)
    assert len(copied) == 11


def test_commands(run, photos, embedded, tmp_path, capsys, monkeypatch):
    """From the folder to the page."""
    monkeypatch.delenv("MOCO_EXT_DEBUG", raising=False)
    flags = ["--normalize", "--image-size", "12", "--threads", "1", "-j", "0", "--device", "cpu"]
    assert cli.main(["embed", str(run), str(photos), "-o", str(tmp_path / "small.npy"), *flags]) == 0
    assert "small.npy: 11 images, 256 features" in capsys.readouterr().out
    small = FeatureFile(tmp_path / "small.npy").metadata
    assert (small["transform"]["size"], small["normalized"]) == (12, True)
    assert neighbors(tmp_path / "small.npy", [photos / "001.png"])[0][0].neighbors[0].similarity < 1
    small = ["embed", str(run), str(photos), "-o", str(tmp_path / "small.npy")]
    assert cli.main([*small, *flags, "--overwrite"]) == 0
    assert cli.main([*small, "--head"]) == 1
    assert "small.npy exists; --overwrite replaces it" in capsys.readouterr().err
    arguments = ["neighbors", embedded / "f.parquet", photos / "003.jpg", photos / "004.png", "-k", "3"]
    assert cli.main([*map(str, arguments), "--gallery", str(tmp_path / "page.html"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    expected = neighbors(embedded / "f.npy", [photos / "003.jpg", photos / "004.png"], 3)[0]
    assert [query["query"] for query in answer["queries"]] == [result.query for result in expected]
    assert [[n["path"] for n in query["neighbors"]] for query in answer["queries"]] == [
        [found.path for found in result.neighbors] for result in expected
    ]
    page = (tmp_path / "page.html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 2 * (1 + 3)
    assert f"{expected[0].neighbors[0].similarity:.3f}" in page
    assert cli.main([*map(str, arguments)]) == 0
    table = capsys.readouterr().out
    assert f"{expected[1].neighbors[2].similarity:.4f}" in table
    assert "003.jpg" in table


def test_a_page_of_built_in_images_and_missing_files(tmp_path, capsys):
    write_run(tmp_path / "run", mdata.EvalTransform.of(few_digits()))
    embed(tmp_path / "run", few_digits(), tmp_path / "f.npz")
    Image.new("L", (8, 8), 200).save(tmp_path / "query.png")
    page = tmp_path / "page.html"
    assert cli.main(["neighbors", str(tmp_path / "f.npz"), str(tmp_path / "query.png"), "--gallery", str(page)]) == 0
    assert page.read_text().count("data:image/png;base64,") == 10  # the digits, in place of files
    assert "digits/t" in capsys.readouterr().out
    write_photos(tmp_path / "photos", 3)
    embed(tmp_path / "run", tmp_path / "photos", tmp_path / "g.npz")
    (tmp_path / "photos" / "001.png").unlink()
    assert cli.main(["neighbors", str(tmp_path / "g.npz"), str(tmp_path / "query.png"), "--gallery", str(page)]) == 0
    assert page.read_text().count('<div class="gone">') == 1


def test_weights_that_have_changed_or_moved(run, photos, tmp_path, capsys):
    write_run(tmp_path / "run")
    embed(tmp_path / "run", photos, tmp_path / "f.npy")
    (tmp_path / "run").rename(tmp_path / "moved")
    query = photos / "001.png"
    with pytest.raises(FileNotFoundError, match=r"weights: expected the encoder of .*f.npy in .*run, got none there"):
        neighbors(tmp_path / "f.npy", [query])
    assert neighbors(tmp_path / "f.npy", [query], weights=tmp_path / "moved")[0]
    encoder, _ = moco_ext.load_encoder(tmp_path / "moved")
    assert neighbors(tmp_path / "f.npy", [query], weights=encoder)[0]
    torch.manual_seed(1)
    write_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"weights: expected those that .*f.npy was computed with"):
        neighbors(tmp_path / "f.npy", [query])


def test_unreadable_queries(photos, embedded):
    results, unreadable = neighbors(embedded / "f.npy", [photos])
    assert len(results) == 11
    assert unreadable == [str(photos / "004a.png"), str(photos / "zz.jpg")]
    with pytest.raises(mdata.UnreadableImageError, match=r"004a\.png"):
        neighbors(embedded / "f.npy", [photos / "004a.png"])


@pytest.mark.parametrize(
    ("queries", "k", "error", "message"),
    [
        (["nowhere.png"], 5, FileNotFoundError, "queries: no such file or folder: nowhere.png"),
        ([], 5, ValueError, "queries: expected images, got none"),
        (["nowhere.png"], 0, ValueError, "k: expected at least 1, got 0"),
    ],
)
def test_impossible_queries(queries, k, error, message, embedded):
    with pytest.raises(error, match=message):
        neighbors(embedded / "f.npy", queries, k)


@pytest.mark.parametrize("suffix", FORMATS)
def test_files_of_another_kind(suffix, embedded, tmp_path):
    with pytest.raises(FileNotFoundError, match="features: no such file"):
        FeatureFile(tmp_path / f"none.{suffix}")
    whole = (embedded / f"f.{suffix}").read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        (tmp_path / f"x.{suffix}").write_bytes(content)
        with pytest.raises(ValueError, match=r"features: expected a file of moco-ext embed, got .*x\."):
            FeatureFile(tmp_path / f"x.{suffix}")
    np.save(tmp_path / "y.npy", np.zeros((11, 256), np.float32))
    (tmp_path / "y.npy.json").write_bytes((embedded / "f.npy.json").read_bytes())  # a kill between the two files
    with pytest.raises(ValueError, match=r"got .*y\.npy: ValueError: other features than .*y\.npy\.json describes"):
        FeatureFile(tmp_path / "y.npy")
    (tmp_path / "y.npy.json").unlink()
    with pytest.raises(ValueError, match=r"features: expected a file of moco-ext embed, got .*y\.npy"):
        FeatureFile(tmp_path / "y.npy")


def test_faiss_index(embedded, tmp_path):
    faiss = pytest.importorskip("faiss")
    features = FeatureFile(embedded / "f.parquet")
    write_faiss_index(features, tmp_path / "x.index")
    index = faiss.read_index(str(tmp_path / "x.index"))
    rows = normalize(rows_of(embedded / "f.parquet"), dim=1)
    scores, found = index.search(rows.numpy(), 3)
    best, expected = (rows.double() @ rows.double().T).topk(3, dim=1)
    assert found.tolist() == expected.tolist()
    np.testing.assert_allclose(scores, best, atol=1e-5)


def test_faiss_that_is_not_installed(embedded, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MOCO_EXT_DEBUG", raising=False)
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert cli.main(["neighbors", str(embedded / "f.npy"), "--faiss", str(tmp_path / "x.index")]) == 1
    assert "this needs faiss, which is not installed: pip install faiss-cpu" in capsys.readouterr().err
