"""Datasets, image files and evaluation batches."""

import dataclasses
import gzip
import io
import os
import shutil
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

from moco_ext import data as mdata
from moco_ext.data import Augmentation, TrainLoader, datasets
from moco_ext.data import images as image_files
from moco_ext.data.images import UnreadableImageError, read_image


@pytest.fixture(scope="module")
def digits():
    return mdata.load("digits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """train/ and val/ with two classes of 3 and 1 images: blue and red."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 3), ("val", 1)):
        for name, color in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40 + i, 30), color).save(root / split / name / f"{i}.png")
    return root


# --- datasets ------------------------------------------------------------------------------------------------


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


def test_eval_batches_are_normalized_and_in_order(digits):
    images, index = map(torch.cat, zip(*mdata.eval_batches(digits, digits.train, 100), strict=True))
    assert torch.equal(index, torch.arange(len(digits.train)))
    assert images.shape == (len(digits.train), 3, 8, 8)
    assert torch.equal(images[:, 0], images[:, 2])
    assert abs(images.mean()) < 1e-5
    assert abs(images.std() - 1) < 1e-3


def test_fashion_mnist_from_the_debian_package(tmp_path, monkeypatch):
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
    batch, index = next(mdata.eval_batches(images, images.test))
    blue = (torch.tensor([0.0, 0.0, 1.0]) - torch.tensor(images.mean)) / torch.tensor(images.std)
    torch.testing.assert_close(batch[0, :, 112, 112], blue)
    assert images.test.labels[index].tolist() == [0, 1]
    assert mdata.load(str(folder / "train")).test is None


def test_eval_batches_are_center_crops_of_images_of_any_size(tmp_path):
    """As by PIL, up to rounding: a red center on green, in images far from square."""
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
        got = torch.cat([images for images, _ in mdata.eval_batches(data, data.test, 3, workers)])
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
        difference = ((got * std + mean) * 255 - want).abs()
        assert difference.max() < 3  # both filters use integers and round between their two passes
        assert difference.mean() < 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header of no bytes"),
        (b"\x89PNG", "header of 89 50 4e"),
        (b"\0\0\x0d\1", "header of 00 00 0d"),
        (b"\0\0\x08", "out of range"),
        (struct.pack(">BBBB", 0, 0, 8, 3), "buffer"),
        (struct.pack(">BBBBI", 0, 0, 8, 1, 9) + bytes(8), r"size 8 into shape \(9,\)"),
        (None, "Not a gzipped file"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, monkeypatch, content, message):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"text" if content is None else gzip.compress(content))
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path)
    with pytest.raises(ValueError, match=f"^data: expected a gzip-compressed IDX file .*train-images.*{message}"):
        mdata.load("fashion-mnist")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_left_out_and_noted(tmp_path, folder, workers):
    shutil.copytree(folder, tmp_path / "copy")
    data = mdata.load(str(tmp_path / "copy"))
    broken = [path for path in data.train.paths if path.endswith("1.png")]
    Path(broken[0]).write_bytes(Path(broken[0]).read_bytes()[:40])
    Path(broken[1]).unlink()
    with pytest.warns(UserWarning, match=f"^data: expected an image, got .* in {broken[0]}: .*; it is skipped"):
        batches = list(mdata.eval_batches(data, data.train, 1, workers))
    assert [index.tolist() for _, index in batches] == [[0], [2], [3], [5]]  # no empty batches
    assert data.unreadable == set(broken)
    assert dataclasses.replace(data, test=None).unreadable is data.unreadable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = torch.cat([images for images, _ in mdata.eval_batches(data, data.train, 6, workers)])
    assert torch.equal(again, torch.cat([images for images, _ in batches]))


def test_eval_batches_of_an_extremely_long_image_stay_small(tmp_path):
    """Resized as it is, to 256 rows, this image would take 3 GB."""
    (tmp_path / "any").mkdir()
    pixels = np.zeros((2, 33_000, 3), np.uint8)
    pixels[:, 16_498:16_502] = 255
    Image.fromarray(pixels).save(tmp_path / "any" / "0.png")
    data = mdata.load(str(tmp_path))
    images, _ = next(mdata.eval_batches(data, data.train))
    white = (1 - torch.tensor(data.mean)) / torch.tensor(data.std)
    torch.testing.assert_close(images[0, :, 112, 112], white)


# --- image files --------------------------------------------------------------------------------------------


# Mode and format; +: a transparent color.
FORMS = """RGB.jpg L.jpg CMYK.jpg RGB.png RGBA.png P.png P+.png L.png L+.png LA.png 1.png RGB.webp RGBA.webp RGB.bmp
P.gif P+.gif 1.tif L.tif LA.tif RGB.tif RGBA.tif CMYK.tif P.tif L.pgm RGB.ppm RGB.avif RGB.jp2 RGB.jfif"""


def save_picture(path) -> None:
    """90 x 70 pixels, smooth, so that lossy formats keep them."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    image = Image.fromarray(pixels).resize((70, 90))
    mode = path.name.split(".")[0]
    image = image.convert(mode.rstrip("+"))
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize((70, 90)))
    image.save(path, **({"transparency": 3} if mode.endswith("+") else {}))


@pytest.mark.parametrize("form", FORMS.split())
def test_read_image_agrees_with_pil(tmp_path, form):
    save_picture(tmp_path / form)
    want = torch.from_numpy(np.array(Image.open(tmp_path / form).convert("RGB"))).permute(2, 0, 1)
    got = read_image(tmp_path / form)
    assert got.dtype == torch.uint8
    # JPEG and WebP leave the last bits to the decoder
    torch.testing.assert_close(got.int(), want.int(), atol=3 if form.endswith(("jpg", "jfif", "webp")) else 0, rtol=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_of_all_formats_trains_and_evaluates(tmp_path, workers):
    for form in FORMS.split():
        save_picture(tmp_path / form)
    Image.fromarray(np.arange(6300, dtype=np.uint16).reshape(90, 70) * 10).save(tmp_path / "deep.png")
    data = mdata.load(str(tmp_path), image_size=32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = TrainLoader(data, Augmentation.v2(32), 8, workers=workers)
        index = torch.cat([batch.index for batch in loader.epoch(0) if batch.im_q.isfinite().all()])
        evaluated = torch.cat([images for images, _ in mdata.eval_batches(data, data.train, 8, workers)])
    assert sorted(index.tolist()) == list(range(len(FORMS.split()) + 1))
    assert len(evaluated) == len(data.train)
    assert not data.unreadable


@pytest.mark.parametrize("form", ["png", "tif", "pgm"])
def test_read_image_of_16_bits_keeps_the_upper_eight(tmp_path, form):
    pixels = np.arange(0, 65536, 257 * 4, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(pixels).save(tmp_path / f"deep.{form}")
    read = read_image(tmp_path / f"deep.{form}")
    assert read.shape == (3, 8, 8)
    assert read[0].tolist() == read[2].tolist() == (pixels >> 8).tolist()


def test_read_image_of_12_bits_keeps_the_upper_eight(tmp_path):
    """In 16 bits they would be black. PIL does not write them."""
    pixels = np.array([[0, 0x123], [0x7FF, 0xFFF]])
    packed = bytes.fromhex("".join(f"{value:03x}" for value in pixels.flatten()))
    tags = {256: 2, 257: 2, 258: 12, 259: 1, 262: 1, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: 2, 279: len(packed)}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    (tmp_path / "deep.tif").write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + packed)
    assert read_image(tmp_path / "deep.tif")[0].tolist() == (pixels >> 4).tolist()


@pytest.mark.parametrize(("dtype", "value"), [(np.float32, 1), (np.int32, 2**16), (np.int32, 200)])
def test_read_image_refuses_pixels_of_unknown_range(tmp_path, dtype, value):
    """200 would be white in 8 bits and black in 16."""
    Image.fromarray(np.full((4, 4), value, dtype)).save(tmp_path / "deep.tif")
    with pytest.raises(UnreadableImageError, match=r"expected an image, got ValueError in .*pixels of unknown range"):
        read_image(tmp_path / "deep.tif")


@pytest.mark.parametrize("form", ["gif", "webp", "png", "mpo"])
def test_read_image_of_an_animation_is_its_first_frame(tmp_path, form):
    frames = [Image.new("RGB", (20, 10), color) for color in ("red", "lime", "blue")]
    frames[0].save(tmp_path / f"moving.{form}", save_all=True, append_images=frames[1:])
    want = torch.tensor([255, 0, 0]).view(3, 1, 1).expand(3, 10, 20)
    torch.testing.assert_close(read_image(tmp_path / f"moving.{form}").long(), want, atol=3, rtol=0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["jpg", "png", "webp", "tif", "deep.png", "deep.tif"])
def test_read_image_applies_the_exif_orientation(tmp_path, form, orientation):
    """The four corners, as stored and as shown: EXIF 2.3, table 6."""
    stored = np.zeros((16, 32), np.uint8 if form.count(".") == 0 else np.uint16)
    scale = 1 if stored.dtype == np.uint8 else 257
    for corner, value in zip(np.ndindex(2, 2), (0, 80, 160, 240), strict=True):
        stored[corner[0] * 8 :, corner[1] * 16 :] = value * scale
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / f"turned.{form}", exif=exif)
    shown = {1: "ABCD", 2: "BADC", 3: "DCBA", 4: "CDAB", 5: "ACBD", 6: "CADB", 7: "DBCA", 8: "BDAC"}[orientation]
    height, width = (16, 32) if orientation < 5 else (32, 16)
    pixels = read_image(tmp_path / f"turned.{form}")
    assert pixels.shape == (3, height, width)
    corners = pixels[0, [1, 1, -2, -2], [1, -2, 1, -2]]
    want = torch.tensor([80 * "ABCD".index(letter) for letter in shown], dtype=torch.uint8)
    torch.testing.assert_close(corners.int(), want.int(), atol=2, rtol=0)


def test_read_image_of_an_iphone(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    stored = Image.new("RGB", (64, 32), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    heif.from_pillow(stored).save(tmp_path / "x.HEIC", exif=exif.tobytes())
    assert read_image(tmp_path / "x.HEIC").shape == (3, 64, 32)


def test_read_image_of_an_iphone_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "x.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(sys.modules, "pillow_heif")
    with pytest.raises(UnreadableImageError, match=r"in .*x.HEIC: needs pillow-heif: pip install pillow-heif$"):
        read_image(tmp_path / "x.HEIC")


@pytest.mark.parametrize("form", ["jpg", "png", "webp"])
def test_read_image_survives_damaged_exif_data(tmp_path, form):
    Image.new("RGB", (20, 10), "red").save(tmp_path / f"x.{form}", exif=b"Exif\0\0nonsense")
    assert read_image(tmp_path / f"x.{form}").shape == (3, 10, 20)


def write_black_png(path, width, height):
    """One bit a pixel: a small file, whatever it decodes to."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 + -(-width // 8)) * height, 9)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


@pytest.mark.parametrize("limit_of_pil", [True, False])
def test_read_image_refuses_too_many_pixels_before_it_decodes_them(tmp_path, monkeypatch, limit_of_pil):
    """20,000 x 20,000 pixels are 1.2 GB."""
    if not limit_of_pil:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    write_black_png(tmp_path / "bomb.png", 20_000, 20_000)
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    monkeypatch.setattr("torchvision.io.decode_image", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UnreadableImageError, match=f"expected an image, got .* in {tmp_path}/bomb.png: .*pixels"):
        read_image(tmp_path / "bomb.png")


def test_read_image_at_the_limit_of_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "MAX_PIXELS", 200)
    write_black_png(tmp_path / "at.png", 20, 10)
    write_black_png(tmp_path / "beyond.png", 67, 3)
    assert read_image(tmp_path / "at.png").shape == (3, 10, 20)
    with pytest.raises(UnreadableImageError, match="67 x 3 pixels, more than 200"):
        read_image(tmp_path / "beyond.png")


def jpeg(width=30, height=20, **options):
    file = io.BytesIO()
    Image.effect_noise((width, height), 50).convert(options.pop("mode", "RGB")).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"mode": "L"},
        {"mode": "CMYK"},
        {"exif": b"Exif\0\0" + bytes(60_000)},
        {"comment": b"\xff\xc0"},
    ],
)
def test_jpegs_are_decoded_without_pil(options, monkeypatch):
    content = jpeg(**options)
    want = image_files.from_pil(Image.open(io.BytesIO(content)))
    monkeypatch.setattr(image_files, "_pil", lambda: pytest.fail("PIL"))
    torch.testing.assert_close(
        image_files.decode(lambda: io.BytesIO(content), str).int(),
        want.int(),
        atol=3 if "mode" in options else 0,
        rtol=0,
    )


@pytest.mark.parametrize("filler", [b"", b"\xff", b"\xff\xfe\0\4\xff\xd8", b"\xff\xd0"])
def test_a_jpeg_of_too_many_pixels_is_not_decoded(filler, monkeypatch):
    """Whatever comes before its frame, such as fill bytes, which have no length."""
    content = jpeg()
    frame = content.index(b"\xff\xc0")
    content = (
        content[:frame]
        + filler
        + content[frame : frame + 5]
        + struct.pack(">HH", 20_000, 20_000)
        + content[frame + 9 :]
    )
    monkeypatch.setattr("torchvision.io.decode_image", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(UnreadableImageError, match=r"expected an image, got .*pixels"):
        image_files.decode(lambda: io.BytesIO(content), str)


@pytest.mark.parametrize("kind", ["fifo", "folder", "dangling", "itself", "device"])
def test_read_image_refuses_what_is_not_a_regular_file(tmp_path, kind):
    path = tmp_path / "x.jpg"
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case _:
            path.symlink_to({"dangling": "nowhere", "itself": path, "device": "/dev/zero"}[kind])
    with pytest.raises(UnreadableImageError, match=f"expected an image, got .* in {path}"):
        read_image(path)


@pytest.mark.parametrize("form", ["jpg", "png", "gif", "bmp", "tif", "webp", "ppm"])
def test_read_image_of_a_damaged_file_is_an_image_or_one_kind_of_error(tmp_path, form):
    path, rng = tmp_path / f"x.{form}", np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).save(path)
    whole, errors = path.read_bytes(), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(150):
            damaged = bytearray(whole[: rng.integers(len(whole)) if rng.random() < 0.3 else None])
            for place in rng.integers(0, min(len(damaged), 200), rng.integers(1, 6)) if damaged else ():
                damaged[place] = rng.integers(256)
            path.write_bytes(damaged)
            try:
                image = read_image(path)
            except UnreadableImageError:
                errors += 1
            else:
                assert image.dtype == torch.uint8
                assert image.shape[0] == 3
    assert errors > 10


@pytest.mark.parametrize("content", [b"", b"no image", "truncated", None])
def test_read_image_names_what_it_cannot_read(tmp_path, content):
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


def test_a_stratified_split_does_not_read_all_labels_for_each_class():
    class Counting(TorchFunctionMode):
        computed = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.computed += out.numel() if isinstance(out, torch.Tensor) else 0
            return out

    with Counting() as counting:
        chosen = datasets.stratified_split(torch.arange(3000) % 1000, 0.0, at_least=1)[1]
    assert len(chosen) == 1000
    assert counting.computed < 10 * 3000  # a pass for each class: 3,000,000


@pytest.mark.parametrize("name", ["digit", "/no/such/folder"])
def test_unknown_data(name):
    with pytest.raises(ValueError, match=f"data: expected one of digits.*got '{name}'"):
        mdata.load(name)


# --- image folders ------------------------------------------------------------------------------------------


def test_other_classes_in_val(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "val" / "red").rename(tmp_path / "val" / "green")
    with pytest.raises(ValueError, match=r"expected the same class folders in .*got green, red in only one of them$"):
        mdata.load(str(tmp_path))


def test_one_image_is_too_few(tmp_path, folder):
    shutil.copytree(folder / "val" / "red", tmp_path / "red")
    data = mdata.load(str(tmp_path))
    with pytest.raises(ValueError, match="data: expected at least 2 images for one step, got 1"):
        TrainLoader(data, Augmentation.v2(32), 4)


def plant(root):
    """Class folders that have all that ImageFolder and we list alike, links included."""
    for name in ("b/1.png", "b/sub/0.JPG", "b/sub-a/0.png", "b/sub/deep/9.webp", "ä 日本/x.png", "a/z.png", "a/y.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(root / name, "PNG")
    outside = root.parent / "outside"
    shutil.copytree(root / "b", outside)
    (root / "a" / "notes.txt").touch()
    (root / "a" / "folder.jpg").mkdir()
    shutil.copy(root / "a" / "z.png", root / "a" / "folder.jpg" / "0.png")
    (root / "a" / "file.png").symlink_to(outside / "1.png")
    (root / "a" / "folder").symlink_to(outside)
    (root / "a" / "dangling.png").symlink_to("nowhere")
    (root / "linked class").symlink_to(outside)
    (root / "b" / "other class").symlink_to(root / "a")


def test_a_folder_is_listed_as_image_folder_does(tmp_path):
    from torchvision.datasets import ImageFolder

    plant(tmp_path / "root")
    data, want = mdata.load(str(tmp_path / "root")), ImageFolder(tmp_path / "root")
    assert list(data.classes) == want.classes
    assert list(zip(data.train.paths, data.train.labels.tolist(), strict=True)) == want.samples
    assert len(want.samples) > 15


def test_links_in_circles_and_special_files_are_not_listed(tmp_path):
    plant(tmp_path / "root")
    before = mdata.load(str(tmp_path / "root"))
    (tmp_path / "root" / "b" / "loop").symlink_to("..")
    (tmp_path / "root" / "b" / "sub" / "loop").symlink_to("..")
    (tmp_path / "root" / "b" / "sub" / "here").symlink_to(".")
    (tmp_path / "root" / "b" / "above").symlink_to(tmp_path)
    (tmp_path / "root" / "a" / "again").symlink_to(tmp_path / "outside")
    (tmp_path / "root" / "itself").symlink_to("itself")
    (tmp_path / "outside" / "loop").symlink_to(tmp_path / "outside" / "sub")
    os.mkfifo(tmp_path / "root" / "a" / "pipe.jpg")
    after = mdata.load(str(tmp_path / "root"))
    assert after.classes == before.classes
    # A folder with two names in one class is listed under one of them.
    assert sorted(map(os.path.realpath, after.train.paths)) == sorted(map(os.path.realpath, before.train.paths))
    assert torch.equal(after.train.labels, before.train.labels)
