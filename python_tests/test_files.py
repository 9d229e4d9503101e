"""Finding images: folders with and without classes, lists, several sources."""

import csv
import os
import pickle
import sys
import tracemalloc

import pytest
import torch

pytest.importorskip("torchvision")

from PIL import Image
from torchvision.datasets import ImageFolder

from moco_ext import data as mdata
from moco_ext.data.files import Paths


def images(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5)).save(path)
    return root


def names_of(split, root):
    return [os.path.relpath(path, root) for path in split.paths]


@pytest.mark.parametrize(
    "names",
    [
        ["a.png", "b.JPG", "c.webp"],  # flat
        ["2021/05/a.png", "2021/06/b.png"],  # nested, one folder at the top
        ["a.png", "cats/b.png", "dogs/c.png"],  # some beside the folders
        ["émile/ü n.png", "émile/b.tif"],
    ],
)
def test_without_classes(tmp_path, names):
    data = mdata.load(str(images(tmp_path, *names)))
    assert sorted(names_of(data.train, tmp_path)) == sorted(names)
    assert data.classes == ()
    assert data.test is None
    assert data.train.labels.tolist() == [-1] * len(names)
    assert len(next(mdata.eval_batches(data, data.train))[0]) == len(names)
    with pytest.raises(ValueError, match=r"data: expected labeled training and test images, but .* has no val/ folder"):
        assert data.splits


def test_class_folders_are_in_the_order_of_imagefolder(tmp_path):
    images(tmp_path, "a/x.png", "a/z/y.png", "a-b/x.png", "b/1.png", "b/0/9.png", "a/b.png")
    data, theirs = mdata.load(str(tmp_path)), ImageFolder(str(tmp_path))
    assert list(zip(data.train.paths, data.train.labels.tolist(), strict=True)) == theirs.samples
    assert list(data.classes) == theirs.classes


def test_empty_folders_and_other_files_are_no_classes(tmp_path):
    images(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").touch()
    (tmp_path / "list.csv").touch()
    assert mdata.load(str(tmp_path)).classes == ("a", "b")


def test_hidden_files_and_folders_are_left_out(tmp_path):
    images(
        tmp_path,
        "a/1.png",
        "b/1.png",
        ".ipynb_checkpoints/1.png",
        "a/.trash/2.png",
        "a/._1.png",
        "a/@eaDir/1.png/T.jpg",
    )
    data = mdata.load(str(tmp_path))
    assert names_of(data.train, tmp_path) == ["a/1.png", "b/1.png"]
    assert data.classes == ("a", "b")
    assert len(mdata.load(str(tmp_path / ".ipynb_checkpoints")).train) == 1


def test_several_sources(tmp_path):
    one, two = images(tmp_path / "one", "1.png", "2.png"), images(tmp_path / "two", "a/3.png", "b/4.png")
    data = mdata.load(f"{one}{os.pathsep}{two}")
    assert names_of(data.train, tmp_path) == ["one/1.png", "one/2.png", "two/a/3.png", "two/b/4.png"]
    assert data.classes == ()
    again = images(tmp_path / "three", "c/5.png", "a/6.png")
    data = mdata.load(f"{two}{os.pathsep}{again}")
    assert data.classes == ("a", "b", "c")
    assert data.train.labels.tolist() == [0, 1, 0, 2]


def test_relative_and_absolute_paths_of_one_image(tmp_path, monkeypatch):
    """As of a folder and of a file of moco-ext embed, whose paths are absolute."""
    images(tmp_path, "photos/a/1.png", "photos/b/2.png")
    (tmp_path / "list.csv").write_text(f"path,label\n{tmp_path}/photos/a/1.png,a\n")
    monkeypatch.chdir(tmp_path)
    assert mdata.load(f"photos{os.pathsep}list.csv").train.paths == ["photos/a/1.png", "photos/b/2.png"]
    (tmp_path / "list.csv").write_text(f"path,label\n{tmp_path}/photos/a/1.png,b\n")
    with pytest.raises(ValueError, match=r"expected one class for .*1.png, got a and b"):
        mdata.load(f"photos{os.pathsep}list.csv")


def test_a_text_list_of_files_and_folders(tmp_path):
    images(tmp_path, "a/1.png", "a/2.png", "3.png")
    listed = tmp_path / "list.txt"
    listed.write_text(f"{tmp_path}/3.png\n\na\n")
    assert names_of(mdata.load(str(listed)).train, tmp_path) == ["3.png", "a/1.png", "a/2.png"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("labeled", [True, False])
def test_a_table(tmp_path, suffix, labeled):
    images(tmp_path, "x/1, one.png", "2.png", "3.png")
    rows = {"id": [7, 8, 9], "Path": ["x/1, one.png", "2.png", "3.png"], "label": ["dog", "cat", "dog"]}
    if not labeled:
        del rows["label"]
    table = tmp_path / f"list{suffix}"
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow.parquet") and pytest.importorskip("pyarrow")
        pyarrow.parquet.write_table(pyarrow.table(rows), table)
    else:
        with table.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",")
            writer.writerows([list(rows), *zip(*rows.values(), strict=True)])
    data = mdata.load(str(table))
    assert names_of(data.train, tmp_path) == rows["Path"]
    assert data.classes == (("cat", "dog") if labeled else ())
    assert data.train.labels.tolist() == ([1, 0, 1] if labeled else [-1] * 3)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("", "expected a column of paths"),
        ("name,label\n1.png,a\n", "named path or file or .*, got label, name"),
        ("path\n", "expected image files in .*list.csv, got none"),
        ("path,label\n1.png,a\n2.png,\n", "expected a path and a class in row 2"),
        ("path,label\n1.png,a\n,b\n", "expected a path and a class in row 2"),
        ("id,path\n1\n", "expected a path in row 1"),
        ("path\n1.png\n".encode("utf-16"), "expected a list in UTF-8, got UTF-16 in .*list.csv"),
        ('path\n"1.png' + 2**18 * "x", "expected a list of image files in .*list.csv, got field larger"),
        ("path,label\n1.png,a\n1.png,b\n", "expected one class for .*1.png, got a and b"),
        ("path,label\n1.png,1\n2.png,01\n", "expected one name for each class, got '01' and '1'"),
        ("path,label\n1.png,1\n2.png,1.0\n", "expected one name for each class, got '1' and '1.0'"),
    ],
)
def test_a_table_that_cannot_be_used(tmp_path, content, error):
    table = tmp_path / "list.csv"
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"data: .*{error}"):
        mdata.load(str(table))


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfPath,label\r\na/1.png,x\r\n\r\n2.png,y\r\n",  # as Excel writes it
        b"id,file,class\n7,a/1.png,x,more\n8,2.png,y",
        b"label, path\nx, a/1.png\ny, 2.png\n",
        b"path,label\na/1.png, x\n2.png,y \n",
        b"path,label\na/1.png,x\n2.png,y\na/1.png,x\n",  # one image twice
        b"path,label\na/1.png,x\n2.png,y\n./a/1.png,x\na/../2.png,y\n",
    ],
)
def test_forms_of_a_table(tmp_path, content):
    images(tmp_path, "a/1.png", "2.png")
    (tmp_path / "list.csv").write_bytes(content)
    data = mdata.load(str(tmp_path / "list.csv"))
    assert names_of(data.train, tmp_path) == ["a/1.png", "2.png"]
    assert data.classes == ("x", "y")
    assert data.train.labels.tolist() == [0, 1]


def test_a_table_is_read_a_row_at_a_time(tmp_path):
    """Only paths and classes are kept: not the other columns, 100 MB here."""
    table = tmp_path / "list.csv"
    with table.open("w") as file:
        file.write("path,text,label\n")
        file.writelines(f"{i}.jpg,{'x' * 50_000},{i % 7}\n" for i in range(2000))
    tracemalloc.start()
    data = mdata.load(str(table))
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
    assert (len(data.train), len(data.classes)) == (2000, 7)


def test_a_parquet_list_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "list.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"^data: reading .*list.parquet needs pyarrow: pip install pyarrow$"):
        mdata.load(str(tmp_path / "list.parquet"))


def test_a_parquet_column_of_other_things_than_paths(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"image": [{"width": 3, "path": "1.png"}]}), tmp_path / "list.parquet")
    with pytest.raises(ValueError, match=r"^data: expected a path in row 1 of .*list.parquet$"):
        mdata.load(str(tmp_path / "list.parquet"))


def write_parquet_list(path, names, labels):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"path": names, "label": labels}), path)


def test_integers_that_pandas_made_floats_are_the_same_classes(tmp_path):
    """As it does when a row of the table, which may have been dropped since, has no label."""
    images(tmp_path, "1.png", "2.png", "3.png")
    write_parquet_list(tmp_path / "a.parquet", ["1.png", "2.png"], [10.0, 2.0])
    (tmp_path / "b.csv").write_text("path,label\n3.png,10\n")
    data = mdata.load(f"{tmp_path}/a.parquet{os.pathsep}{tmp_path}/b.csv")
    assert data.classes == ("10", "2")
    assert data.train.labels.tolist() == [0, 1, 0]
    write_parquet_list(tmp_path / "a.parquet", ["1.png", "2.png"], [1.0, float("nan")])
    with pytest.raises(ValueError, match=r"^data: expected a path and a class in row 2 of .*a.parquet$"):
        mdata.load(f"{tmp_path}/a.parquet")
    write_parquet_list(tmp_path / "a.parquet", ["1.png", "2.png"], [0.5, 1.0])
    assert mdata.load(f"{tmp_path}/a.parquet").classes == ("0.5", "1.0")


ODD = ["two words.png", " spaces .png", "line\nfeed.png", "b\xff\xfe.png", "sep\u2028.png", "ü.png", "e\u0301.png"]


def odd_images(root) -> list[str]:
    """Files whose names are odd, one of them no UTF-8."""
    names = [os.fsdecode(name.encode("latin-1")) if "\xff" in name else name for name in ODD]
    images(root, *names)
    return names


def test_odd_names_in_a_folder(tmp_path):
    names = odd_images(tmp_path)
    data = mdata.load(str(tmp_path))
    assert set(names_of(data.train, tmp_path)) == set(names)
    assert len(next(mdata.eval_batches(data, data.train))[0]) == len(names)


@pytest.mark.parametrize("suffix", [".txt", ".csv"])
def test_odd_names_in_a_list(tmp_path, suffix):
    names = [name for name in odd_images(tmp_path) if suffix == ".csv" or "\n" not in name]
    with (tmp_path / f"list{suffix}").open("w", newline="", errors="surrogateescape") as file:
        if suffix == ".csv":
            csv.writer(file).writerows([["path"], *([name] for name in names)])
        else:
            file.write("".join(f"{name}\r\n" for name in names))
    data = mdata.load(str(tmp_path / f"list{suffix}"))
    assert names_of(data.train, tmp_path) == names
    assert len(next(mdata.eval_batches(data, data.train))[0]) == len(names)


def test_a_list_in_the_current_directory(tmp_path, monkeypatch):
    images(tmp_path, "a/1.png", "2.png")
    (tmp_path / "list.txt").write_text("a\n2.png")
    monkeypatch.chdir(tmp_path)
    assert mdata.load("list.txt").train.paths == ["a/1.png", "2.png"]


def test_overlapping_sources_give_each_image_once(tmp_path):
    images(tmp_path, "a/1.png", "2.png")
    data = mdata.load(f"{tmp_path}{os.pathsep}{tmp_path}/a")
    assert names_of(data.train, tmp_path) == ["2.png", "a/1.png"]


@pytest.mark.parametrize("labeled", [True, False])
def test_val_fraction(tmp_path, labeled):
    names = [f"{'ab'[i % 2] + '/' if labeled else ''}{i}.png" for i in range(20)]
    data = mdata.load(str(images(tmp_path, *names)), val_fraction=0.2)
    assert (len(data.train), len(data.test)) == (16, 4)
    assert set(data.train.paths).isdisjoint(data.test.paths)
    if labeled:
        assert data.test.labels.bincount().tolist() == [2, 2]
    assert mdata.load(str(tmp_path), val_fraction=0.2).test.paths == data.test.paths


def test_labels_need_classes_on_both_sides(tmp_path):
    images(tmp_path, "train/a/1.png", "train/b/2.png", "val/3.png")
    data = mdata.load(str(tmp_path))
    assert data.classes == ()
    assert data.train.labels.tolist() == [-1, -1]
    assert names_of(data.test, tmp_path) == ["val/3.png"]
    assert data.why_not_scored == f"{tmp_path} has no labels"


@pytest.mark.parametrize(
    ("names", "train", "test", "classes"),
    [
        ("train/a/1 train/b/2 val/a/3 val/b/4", 2, 2, ("a", "b")),
        ("train/a/1 train/b/2 valid/a/3 valid/b/4 test/5", 2, 2, ("a", "b")),
        ("train/a/1 train/b/2 val/a/3 val/b/4 other/5", 2, 2, ("a", "b")),
        ("train/a/1 train/b/2 test/a/3", 2, None, ("a", "b")),
        ("train/1 bus/2 bus/3", 3, None, ("bus", "train")),  # a class
        ("train/1 2", 2, None, ()),
        ("val/1 val/2 a/3", 3, None, ("a", "val")),
    ],
)
def test_folders_of_splits(tmp_path, names, train, test, classes):
    data = mdata.load(str(images(tmp_path, *(f"{name}.png" for name in names.split()))))
    assert len(data.train) == train
    assert (data.test and len(data.test)) == test
    assert data.classes == classes


def test_image_size(tmp_path):
    data = mdata.load(str(images(tmp_path, "1.png", "2.png")), image_size=8)
    assert next(mdata.eval_batches(data, data.train))[0].shape == (2, 3, 8, 8)
    digits = mdata.load("digits", image_size=16)
    assert next(mdata.eval_batches(digits, digits.train, 5))[0].shape == (5, 3, 16, 16)


def test_a_class_that_only_training_images_have_is_an_error(tmp_path):
    images(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png")
    with pytest.raises(ValueError, match=r"expected the same class folders in .*got b in only one of them"):
        mdata.load(str(tmp_path))


def test_a_folder_with_the_name_of_a_list(tmp_path):
    images(tmp_path / "photos.csv", "1.png", "2.png")
    assert len(mdata.load(str(tmp_path / "photos.csv")).train) == 2
    with pytest.raises(ValueError, match=r"expected a folder of images or a list \(.txt, .*got .*1.png"):
        mdata.load(str(tmp_path / "photos.csv" / "1.png"))


@pytest.mark.parametrize(("option", "value"), [("val_fraction", 0.01), ("val_fraction", 1.0), ("image_size", 0)])
def test_options_out_of_range(tmp_path, option, value):
    images(tmp_path, "1.png", "2.png")
    with pytest.raises(ValueError, match=f"{option}: expected"):
        mdata.load(str(tmp_path), **{option: value})


def test_the_source_that_does_not_exist_is_named(tmp_path):
    images(tmp_path, "a/1.png", "c/1.png")
    with pytest.raises(ValueError, match=rf"shards of images, got '{tmp_path}/b'$"):
        mdata.load(":".join(str(tmp_path / name) for name in "abc"))


def test_no_images(tmp_path):
    with pytest.raises(ValueError, match=f"data: expected images in {tmp_path}, got none$"):
        mdata.load(str(tmp_path))


def test_label_free_scores_are_those_of_their_definitions(tmp_path):
    import dataclasses

    from moco_ext.evaluate import label_free_scores

    digits = mdata.load("digits")
    some = dataclasses.replace(digits, train=mdata.TensorSplit(digits.train.images[:40], digits.train.labels[:40]))
    some = dataclasses.replace(some, test=None)
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 12))
    encoder.fc = torch.nn.Identity()
    identity = mdata.Augmentation(8, scale=(1, 1), ratio=(1, 1), jitter_p=0, gray_p=0, flip_p=0)
    scores = label_free_scores(encoder, some, identity)
    assert scores["contrast_top1"] == 100  # both views are the image
    assert scores["alignment"] == pytest.approx(0, abs=1e-4)
    rows = encoder(next(mdata.eval_batches(some, some.train))[0]).double().detach()
    unit = torch.nn.functional.normalize(rows, dim=1)
    pairs = [(unit[i] - unit[j]).square().sum() for i in range(40) for j in range(i)]
    assert scores["uniformity"] == pytest.approx(torch.stack(pairs).mul(-2).exp().mean().log().item(), abs=2e-3)
    singular = torch.linalg.svdvals(rows)
    p = singular / singular.sum()
    assert scores["rankme"] == pytest.approx(torch.exp(-(p * p.log()).sum()).item(), rel=1e-3)


def test_label_free_scores_of_more_images_than_float32_can_count():
    from moco_ext.evaluate import label_free_scores

    images = torch.randint(256, (1, 1, 8, 8), dtype=torch.uint8).expand(2**24 + 4, -1, -1, -1)
    many = mdata.TensorSplit(images, torch.zeros(1, dtype=torch.int64).expand(len(images)))
    data = mdata.ImageData("many", (), 8, (0.5,), (0.25,), False, many, None)
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    encoder.fc = torch.nn.Identity()
    assert label_free_scores(encoder, data, mdata.Augmentation.v1(8))["images"] == 2048


def list_of(folder, n):
    path = folder / "list.csv"
    lines = (f"/data/images/train/n{i % 10:08}/n{i % 10:08}_{i:08}.jpeg,n{i % 10:08}" for i in range(n))
    path.write_text("path,label\n" + "\n".join(lines))
    return str(path)


def test_a_path_takes_its_text_and_little_more(tmp_path):
    n, source = 20_000, list_of(tmp_path, 20_000)
    tracemalloc.start()
    data = mdata.load(source, val_fraction=0.5)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    text = sum(len(path) for path in (*data.train.paths, *data.test.paths)) / n
    assert (len(data.train), len(data.test), text) == (n / 2, n / 2, 52)
    assert kept / n < text + 30  # a list of strings: 57 more
    assert peak / n < text + 80  # with a dictionary of them: 240 more


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux")
def test_processes_share_the_paths(tmp_path):
    n = 50_000
    split = mdata.load(list_of(tmp_path, n)).train
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:  # as a loader's worker

        def own():
            with open("/proc/self/smaps_rollup") as file:
                return sum(int(line.split()[1]) for line in file if line.startswith("Private_Dirty"))

        split.name(0)
        before = own()
        for position in range(n):
            split.name(position)
        os.write(writer, str(own() - before).encode())
        os._exit(0)
    os.waitpid(process, 0)
    assert int(os.read(reader, 99)) * 1024 / n < 30  # of a list, each string's memory is written to: 123
    os.close(reader)
    os.close(writer)


def test_paths_are_like_a_list():
    texts = ["a.png", "", "\udcff\u00e9\u4e2d.png", "b/c.png"]
    paths = Paths(texts)
    assert (list(paths), len(paths), paths[-1], paths[1:3]) == (texts, 4, texts[-1], texts[1:3])
    assert paths == texts
    assert paths != texts[1:]
    assert list(pickle.loads(pickle.dumps(paths.take(torch.tensor([3, 0]))))) == ["b/c.png", "a.png"]
    assert list(Paths()) == []
    with pytest.raises(IndexError):
        paths[4]


def test_a_folder_is_listed_once(tmp_path, monkeypatch):
    images(tmp_path, "train/a/1.png", "train/b/2.png", "test/3.png")
    listed = []
    monkeypatch.setattr(os, "scandir", lambda path, scandir=os.scandir: listed.append(str(path)) or scandir(path))
    assert len(mdata.load(str(tmp_path)).train) == 2
    assert sorted(listed) == [str(tmp_path), *(str(tmp_path / name) for name in ("train", "train/a", "train/b"))]
