"""Data sets, image files, and evaluation's batches."""

import gzip
import shutil
import struct

import numpy as np
import pytest
import torch

from moco_ext import data as mdata
from moco_ext.data import datasets
from moco_ext.data.idx import read_idx
from moco_ext.data.images import UnreadableImageError, read_image

pytest.importorskip("torchvision")


@pytest.fixture(scope="module")
def digits():
    return mdata.load("digits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """train/ and val/ with two classes of 3 and 1 images, blue ones and red ones."""
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 3), ("val", 1)):
        for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40 + i, 30), colour).save(root / split / name / f"{i}.png")
    return root


# --- IDX ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "dtype"), [(0x08, ">u1"), (0x0B, ">i2"), (0x0C, ">i4"), (0x0D, ">f4")])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_read_idx_gives_back_what_was_written(tmp_path, code, dtype, suffix):
    values = np.arange(24).reshape(2, 3, 4) * 5
    raw = struct.pack(">BBBB3I", 0, 0, code, 3, 2, 3, 4) + values.astype(dtype).tobytes()
    path = tmp_path / f"values{suffix}"
    path.write_bytes(gzip.compress(raw) if suffix else raw)
    read = read_idx(path)
    assert read.tolist() == values.tolist()
    assert read.dtype == torch.from_numpy(np.zeros(0, np.dtype(dtype).newbyteorder("="))).dtype


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "IDX header"),
        (b"\x89PNG", "IDX header"),
        (struct.pack(">BBBB", 0, 0, 8, 3), "3 dimensions"),
        (struct.pack(">BBBBI", 0, 0, 8, 1, 9) + bytes(8), "expected 9 bytes.*got 8"),
    ],
)
def test_read_idx_rejects_other_files(tmp_path, raw, message):
    (tmp_path / "file").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "file")


# --- data sets ----------------------------------------------------------------------------------------------


def test_digits_split_is_stratified_disjoint_and_the_same_every_time(digits):
    again = mdata.load("digits")
    assert torch.equal(digits.train.images, again.train.images)
    assert len(digits.train) + len(digits.test) == 1797
    counts = torch.bincount(digits.train.labels) + torch.bincount(digits.test.labels)
    assert torch.bincount(digits.test.labels).tolist() == [round(0.3 * int(n)) for n in counts]
    assert digits.train.images.shape[1:] == (1, 8, 8)
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.images.max() == 255
    assert not digits.flip


def test_split_indices_are_a_partition():
    labels = torch.tensor([0] * 10 + [1] * 7 + [2])
    train, test = datasets.stratified_split(labels, 0.5)
    assert sorted(train.tolist() + test.tolist()) == list(range(18))
    assert torch.bincount(labels[test], minlength=3).tolist() == [5, 4, 0]  # round(3.5) = 4, round(0.5) = 0


def test_plain_batches_are_standardised_and_in_order(digits):
    images, labels = map(torch.cat, zip(*mdata.plain_batches(digits, digits.train, 100), strict=True))
    assert torch.equal(labels, digits.train.labels)
    assert images.shape == (len(digits.train), 3, 8, 8)
    assert torch.equal(images[:, 0], images[:, 2])
    assert abs(images.mean()) < 1e-5
    assert abs(images.std() - 1) < 1e-3


def test_fashion_mnist_from_debians_files(tmp_path, monkeypatch):
    for part, n in (("train", 5), ("t10k", 2)):
        images = struct.pack(">BBBB3I", 0, 0, 8, 3, n, 28, 28) + bytes(range(n)) * 784
        labels = struct.pack(">BBBBI", 0, 0, 8, 1, n) + bytes(range(n))
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path)
    fashion = mdata.load("fashion-mnist")
    assert fashion.train.images.shape == (5, 1, 28, 28)
    assert fashion.train.images[0, 0, 0, :7].tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert fashion.test.labels.tolist() == [0, 1]
    assert (fashion.size, len(fashion.classes), fashion.flip) == (28, 10, True)


def test_image_folder(folder):
    images = mdata.load(str(folder))
    assert images.classes == ("blue", "red")
    assert (len(images.train), len(images.test), images.size) == (6, 2, 224)
    batch, labels = next(mdata.plain_batches(images, images.test))
    blue = (torch.tensor([0.0, 0.0, 1.0]) - torch.tensor(images.mean)) / torch.tensor(images.std)
    torch.testing.assert_close(batch[0, :, 112, 112], blue)
    assert labels.tolist() == [0, 1]
    assert mdata.load(str(folder / "train")).test is None


def test_plain_batches_of_images_of_any_size_are_centre_crops(tmp_path):
    """Against PIL, whose filters torchvision's have to match to rounding: a red centre on green, far from square."""
    from PIL import Image
    from torchvision.transforms import v2

    for name in ("train", "val"):
        (tmp_path / name / "any").mkdir(parents=True)
    pictures = []
    for i, (width, height) in enumerate([(30, 400), (300, 40), (500, 375), (20, 20)]):
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 1] = np.linspace(0, 255, height).astype(np.uint8)[:, None]
        pixels[height // 3 : -height // 3, width // 3 : -width // 3, 0] = 255
        pictures.append(Image.fromarray(pixels))
        for name in ("train", "val"):
            pictures[-1].save(tmp_path / name / "any" / f"{i}.png")
    data = mdata.load(str(tmp_path))
    published = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])
    want = torch.stack([published(picture) for picture in pictures])
    for workers in (0, 1):
        got = torch.cat([images for images, _ in mdata.plain_batches(data, data.test, 3, workers)])
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
        difference = ((got * std + mean) * 255 - want).abs()
        assert difference.max() < 3  # both filters work in integers, and round between their two passes
        assert difference.mean() < 0.5


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_test_image_is_an_error_that_names_it(tmp_path, folder, workers):
    shutil.copytree(folder, tmp_path / "copy")
    broken = tmp_path / "copy" / "val" / "red" / "0.png"
    broken.write_bytes(broken.read_bytes()[:40])
    data = mdata.load(str(tmp_path / "copy"))
    with pytest.raises(ValueError, match=f"^data: expected an image, got .* in {broken}"):
        list(mdata.plain_batches(data, data.test, workers=workers))


@pytest.mark.parametrize("form", ["rgb.jpg", "gray.jpg", "cmyk.jpg", "rgba.png", "palette.png", "rgb.webp", "rgb.bmp"])
def test_read_image_is_pils(tmp_path, form):
    from PIL import Image

    mode = {"rgb": "RGB", "gray": "L", "cmyk": "CMYK", "rgba": "RGBA", "palette": "P"}[form.split(".")[0]]
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    Image.fromarray(pixels).resize((70, 90)).convert(mode).save(tmp_path / form)
    want = torch.from_numpy(np.array(Image.open(tmp_path / form).convert("RGB"))).permute(2, 0, 1)
    got = read_image(tmp_path / form)
    assert got.dtype == torch.uint8
    # JPEG's and WebP's standards leave the last bits to the decoder
    torch.testing.assert_close(got.int(), want.int(), atol=0 if form.endswith(("png", "bmp")) else 3, rtol=0)


def test_read_image_of_16_bits_keeps_the_upper_eight(tmp_path):
    from PIL import Image

    pixels = np.arange(0, 65536, 257 * 4, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[0].tolist() == (pixels >> 8).tolist()


@pytest.mark.parametrize("content", [b"", b"no image", "truncated", None])
def test_read_image_names_what_it_cannot_read(tmp_path, content):
    from PIL import Image

    path = tmp_path / "broken.jpg"
    if content == "truncated":
        Image.effect_noise((90, 90), 50).save(path)
        content = path.read_bytes()[:2000]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=f"expected an image, got .* in {path}"):
        read_image(path)


def test_stratified_split_keeps_at_least_what_is_asked_of_each_class():
    labels = torch.tensor([0] * 100 + [1] * 3)
    chosen = datasets.stratified_split(labels, 0.1, at_least=1)[1]
    assert torch.bincount(labels[chosen]).tolist() == [10, 1]


@pytest.mark.parametrize("name", ["digit", "/no/such/folder"])
def test_unknown_data(name):
    with pytest.raises(ValueError, match=f"data: expected one of digits.*got '{name}'"):
        mdata.load(name)


def test_a_folder_without_classes(tmp_path):
    with pytest.raises(ValueError, match="data: expected images in class folders"):
        mdata.load(str(tmp_path))
