"""Data sets, two-crop augmentations and the batches made of both."""

import gzip
import math
import struct

import numpy as np
import pytest
import torch

from moco_ext import data as mdata
from moco_ext.data import Augmentation, TensorSplit, TwoCropsTransform, augment_batch, datasets
from moco_ext.data.augment import crop_boxes, shift_hue
from moco_ext.data.idx import read_idx
from moco_ext.data.loader import epoch_seed, two_crop_batches

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


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


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


@pytest.mark.parametrize("name", ["digit", "/no/such/folder"])
def test_unknown_data(name):
    with pytest.raises(ValueError, match=f"data: expected one of digits.*got '{name}'"):
        mdata.load(name)


def test_a_folder_without_classes(tmp_path):
    with pytest.raises(ValueError, match="data: expected images in class folders"):
        mdata.load(str(tmp_path))


# --- augmentations ------------------------------------------------------------------------------------------


def test_crop_boxes_have_the_published_distribution():
    boxes = crop_boxes(40_000, 100, 100, (0.2, 1.0), (3 / 4, 4 / 3), generator())
    area, aspect = boxes[:, 2] * boxes[:, 3], boxes[:, 3] / boxes[:, 2]
    assert 0.2 <= area.min() < 0.205
    assert 0.99 < area.max() <= 1
    assert 3 / 4 - 1e-5 <= aspect.min() < 0.76
    assert 1.32 < aspect.max() <= 4 / 3 + 1e-5
    assert abs(aspect.log().mean()) < 0.005
    # Every box lies in the image, and its place is uniform in what room it has.
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    assert low.min() > -1e-6
    assert high.max() < 1 + 1e-6
    place = low[:, 0] / (1 - boxes[:, 2]).clamp_min(1e-6)
    assert abs(place[area < 0.5].mean() - 0.5) < 0.01
    assert abs(place[area < 0.5].var() - 1 / 12) < 0.003


def test_crop_boxes_agree_with_torchvision():
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(8, (0.2, 1.0))
    image = torch.zeros(1, 100, 100)
    torch.manual_seed(0)
    theirs = torch.tensor([[p["height"], p["width"]] for p in (crop.make_params([image]) for _ in range(4000))]) / 100
    ours = crop_boxes(4000, 100, 100, (0.2, 1.0), (3 / 4, 4 / 3), generator())[:, 2:]
    area, their_area = ours.prod(1), theirs.prod(1)
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    # standard error of a quantile of 4,000 draws: about 0.007; torchvision rounds to whole pixels
    torch.testing.assert_close(area.quantile(quantiles), their_area.quantile(quantiles), atol=0.025, rtol=0)


def test_crop_boxes_fall_back_to_the_centre():
    boxes = crop_boxes(5, 10, 100, (1.0, 1.0), (1.0, 1.0), generator())
    torch.testing.assert_close(boxes, torch.tensor([0.5, 0.5, 1.0, 0.1]).expand(5, 4))


def still(size, **changes):
    """An augmentation that does nothing but what is asked for."""
    nothing = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "jitter": (0, 0, 0, 0), "gray_p": 0.0, "flip_p": 0.0}
    return Augmentation(size, **(nothing | changes))


def test_a_full_crop_is_the_image_and_a_flip_its_mirror():
    images = torch.rand(4, 3, 9, 9, generator=generator())
    torch.testing.assert_close(augment_batch(images, still(9), generator()), images, atol=1e-5, rtol=0)
    mirrored = augment_batch(images, still(9, flip_p=1.0), generator())
    torch.testing.assert_close(mirrored, images.flip(3), atol=1e-5, rtol=0)


def test_each_image_has_draws_of_its_own():
    one = torch.rand(1, 3, 12, 12, generator=generator())
    views = augment_batch(one.expand(64, -1, -1, -1), Augmentation.v1(12), generator(1))
    distances = torch.cdist(views.flatten(1), views.flatten(1)) + torch.eye(64)
    assert distances.min() > 0.1
    assert views.min() >= 0
    assert views.max() <= 1


def test_augmentations_follow_the_generator_alone():
    images = torch.rand(8, 3, 8, 8)
    first, again, other = (augment_batch(images, Augmentation.v2(8), generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_probabilities_of_flip_grayscale_and_jitter():
    images = torch.rand(1, 3, 4, 4, generator=generator()).expand(4000, -1, -1, -1)

    def share(changed):
        return changed.double().mean().item()

    flat = augment_batch(images, still(4, flip_p=0.5), generator())
    assert abs(share((flat - images).abs().amax((1, 2, 3)) > 1e-3) - 0.5) < 0.03  # 4 standard errors
    grey = augment_batch(images, still(4, gray_p=0.2), generator())
    assert abs(share((grey - grey[:, :1]).abs().amax((1, 2, 3)) < 1e-6) - 0.2) < 0.03
    jittered = augment_batch(images, still(4, jitter=(0.4, 0, 0, 0), jitter_p=0.8), generator())
    assert abs(share((jittered - images).abs().amax((1, 2, 3)) > 1e-4) - 0.8) < 0.03


def test_brightness_and_contrast_are_uniform_in_their_range():
    images = torch.full((4000, 1, 2, 2), 0.5)
    factors = augment_batch(images, still(2, jitter=(0.4, 0, 0, 0)), generator())[:, 0, 0, 0] / 0.5
    assert 0.6 <= factors.min() < 0.61
    assert 1.39 < factors.max() <= 1.4
    assert abs(factors.mean() - 1) < 0.015
    halves = torch.tensor([0.4, 0.6]).view(1, 1, 1, 2).expand(4000, 1, 2, 2)
    views = augment_batch(halves, still(2, jitter=(0, 0.4, 0, 0)), generator())
    torch.testing.assert_close(views.mean((1, 2, 3)), torch.full((4000,), 0.5))  # contrast keeps the mean
    spread = (views[:, 0, 0, 1] - views[:, 0, 0, 0]) / 0.2
    assert 0.6 - 1e-5 <= spread.min() < 0.61
    assert 1.39 < spread.max() <= 1.4 + 1e-5


@pytest.mark.parametrize("shift", [-0.4, -0.1, 0.0, 0.25, 0.5])
def test_shift_hue_is_torchvisions_adjust_hue(shift):
    from torchvision.transforms.v2 import functional

    images = torch.rand(3, 3, 6, 6, generator=generator())
    images[0] = images[0, :1]  # grey has no hue to shift
    expected = functional.adjust_hue(images, shift)
    torch.testing.assert_close(shift_hue(images, torch.tensor(shift).view(1, 1, 1, 1)), expected, atol=1e-5, rtol=0)


def test_v2_differs_from_v1_as_published_and_leaves_out_blur_on_small_images():
    v1, v2 = Augmentation.v1(224), Augmentation.v2(224)
    assert (v1.jitter, v1.jitter_p, v1.blur_p) == ((0.4, 0.4, 0.4, 0.4), 1.0, 0.0)
    assert (v2.jitter, v2.jitter_p, v2.blur_p, v2.blur_sigma) == ((0.4, 0.4, 0.4, 0.1), 0.8, 0.5, (0.1, 2.0))
    assert v1.scale == v2.scale == (0.2, 1.0)
    assert v1.gray_p == v2.gray_p == 0.2
    assert Augmentation.v2(32).blur_p == 0
    with pytest.raises(ValueError, match="blur_p = 0"):
        augment_batch(torch.rand(1, 3, 8, 8), v2)
    with pytest.raises(ValueError, match=r"images: expected shape \[N, 1 or 3"):
        augment_batch(torch.rand(1, 2, 8, 8), v1)


def test_two_crops_transform_draws_twice():
    draws = iter(range(10))
    assert TwoCropsTransform(lambda image: (image, next(draws)))("cat") == [("cat", 0), ("cat", 1)]


# --- batches ------------------------------------------------------------------------------------------------


def numbered(n):
    """n images, each all of its own grey, so that a view tells which image it is of."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 4, 4).contiguous()
    split = TensorSplit(images, torch.zeros(n, dtype=torch.int64))
    return datasets.ImageData("numbered", ("any",), 4, (0.0,), (1 / 255,), False, split, None)


def test_an_epoch_shows_every_image_once_with_its_own_key():
    batches = list(two_crop_batches(numbered(50), still(4), 16))
    assert [len(q) for q, _ in batches] == [16, 16, 16, 2]
    seen = torch.cat([q[:, 0, 0, 0] for q, _ in batches])
    assert sorted(seen.round().int().tolist()) == list(range(50))
    torch.testing.assert_close(seen, torch.cat([k[:, 0, 0, 0] for _, k in batches]))
    assert seen.round().int().tolist() != list(range(50))


def test_a_last_batch_of_one_is_dropped():
    assert [len(q) for q, _ in two_crop_batches(numbered(33), still(4), 16)] == [16, 16]


def test_batches_depend_on_seed_and_epoch_alone(digits):
    def first(seed, epoch):
        return next(two_crop_batches(digits, Augmentation.v1(8), 32, seed=seed, epoch=epoch))[0]

    assert torch.equal(first(1, 2), first(1, 2))
    assert not torch.equal(first(1, 2), first(1, 3))
    assert epoch_seed(0, 1) != epoch_seed(1, 0)


def test_image_folder_views(folder):
    images = mdata.load(str(folder))
    batches = list(two_crop_batches(images, Augmentation.v2(224, jitter=(0, 0, 0, 0), gray_p=0.0), 4))
    assert [tuple(q.shape) for q, _ in batches] == [(4, 3, 224, 224), (2, 3, 224, 224)]
    for q, k in batches:  # a crop of an image of one colour is of that colour: q and k are of the same image
        torch.testing.assert_close(q, k)
    mean, std = torch.tensor(images.mean), torch.tensor(images.std)
    colours = torch.cat([q for q, _ in batches]).mean((2, 3)) * std + mean
    assert sorted(colours.round().int().tolist()) == [[0, 0, 1]] * 3 + [[1, 0, 0]] * 3


def test_batched_and_per_image_jitter_have_equal_moments():
    from moco_ext.data import image_transform

    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=generator())
    recipe = still(8, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_p=0.2)
    torch.manual_seed(0)
    one_by_one = image_transform(recipe, (0.0,) * 3, (1.0,) * 3)
    theirs = torch.stack([one_by_one(image) for _ in range(300)])
    ours = torch.cat([augment_batch(image.expand(20, -1, -1, -1), recipe, generator(s)) for s in range(15)])
    # A pixel's mean and deviation over 300 views: standard errors below 0.2 / sqrt(300) = 0.012, uint8 rounding.
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(ours.std(0), theirs.std(0), atol=0.05, rtol=0)
    assert math.isclose(ours.mean(), theirs.mean(), abs_tol=0.015)
