"""Two views of JPEGs on one core: the official pipeline (PIL, torchvision's transforms) against ours.

    pytest bench/bench_loader.py --benchmark-json=bench/results/loader.json

A sample is a batch of 16 images: 16e3 / ms images per second and core. "Loader part" is a worker's share with
augment_on="device"; "device part" is the rest, here on the CPU.
"""

import itertools
import random

import numpy as np
import pytest
import torch
from conftest import Row
from PIL import Image, ImageDraw, ImageFilter
from torch.utils.data import default_collate
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from moco_ext import data as mdata
from moco_ext.data import Augmentation, Normalize, TwoCropsTransform
from moco_ext.data.augment import color_transform
from moco_ext.data.sampler import MicroBatch
from moco_ext.data.seeds import hash_seeds
from moco_ext.data.views import ViewDataset

IMAGES, BATCH = 256, 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """JPEGs of ImageNet's typical size: noise on three scales and shapes, about 70 kB each."""
    root = tmp_path_factory.mktemp("jpegs")
    (root / "any").mkdir()
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        pixels = np.zeros((375, 500, 3), np.float32)
        for cells, strength in ((6, 90), (40, 30), (375, 12)):
            coarse = rng.normal(128, strength, (cells, cells * 4 // 3, 3)).clip(0, 255).astype(np.uint8)
            pixels += np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC), np.float32) - 128
        picture = Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8))
        for _ in range(6):
            x, y, w, h = rng.integers([0, 0, 20, 20], [450, 330, 200, 150])
            draw = ImageDraw.Draw(picture)
            (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(
                (x, y, x + w, y + h), tuple(rng.integers(0, 256, 3))
            )
        picture.save(root / "any" / f"{i}.jpg", quality=90)
    return root


def official_transform(plus: bool):
    """The transforms of main_moco.py, without and with --aug-plus, on PIL images."""

    def pil_blur(image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    if plus:
        colors = [
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([pil_blur], p=0.5),
        ]
    else:
        colors = [transforms.RandomGrayscale(p=0.2), transforms.ColorJitter(0.4, 0.4, 0.4, 0.4)]
    crop = transforms.RandomResizedCrop(224, scale=(0.2, 1.0))
    rest = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return transforms.Compose([crop, *colors, *rest])


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("recipe", ["v1", "v2"])
def bench_loader(compare, device, folder, one_thread, recipe):
    if device.type != "cpu":
        pytest.skip("images are loaded on the CPU")
    data = mdata.load(str(folder))
    augmentation = getattr(Augmentation, recipe)(224)
    files = data.train.paths
    size = sum(len(read_file(path)) for path in files) * BATCH // IMAGES
    official = ImageFolder(folder, TwoCropsTransform(official_transform(recipe == "v2")))
    ours, crops = (ViewDataset(data.train, augmentation, color=color) for color in (True, False))
    normalize = Normalize(data, device)
    random.seed(0)

    def batches():
        """Each sample takes the next 16 images, and ours new seeds."""
        for count in itertools.count():
            index = (count * BATCH + np.arange(BATCH)) % IMAGES
            seeds, key_seeds = np.split(hash_seeds(count, torch.arange(2 * BATCH)), 2)
            yield index, MicroBatch(index, seeds, index, key_seeds, index, 1.0, True)

    def row(name, run):
        mine = batches()
        return Row(name, lambda: run(*next(mine)), bytes=size)

    cropped, seeds = crops[next(batches())[1]].images, torch.from_numpy(hash_seeds(torch.arange(2 * BATCH)))
    rows = [
        row("ours, loader part", lambda _, micro: crops[micro]),
        row("ours, all in the loader", lambda _, micro: normalize(ours[micro].images)),
        row("ours, device part", lambda *_: normalize(color_transform(cropped, augmentation, seeds))),
        row("official", lambda index, _: default_collate([official[i][0] for i in index])),
        row("limit: decode", lambda index, _: [decode_jpeg(read_file(files[i]), ImageReadMode.RGB) for i in index]),
    ]
    kilobytes = size // BATCH // 1000
    group = f"loader {recipe}, two views of {BATCH} JPEGs of 500x375 ({kilobytes} kB), 1 thread"
    compare(group, rows, torch.ones(1))


@pytest.mark.parametrize("recipe", ["v1", "v2"])
def bench_color_transform(compare, device, one_thread, recipe):
    """Everything after the crop, on a batch."""
    views = 16 if device.type == "cpu" else 512
    augmentation = getattr(Augmentation, recipe)(224)
    images = torch.randint(0, 256, (views, 3, 224, 224), dtype=torch.uint8, device=device)
    seeds = torch.from_numpy(hash_seeds(torch.arange(views)))
    jitter = v2.ColorJitter(*augmentation.jitter)
    official = v2.Compose(
        [
            v2.RandomApply([jitter], augmentation.jitter_p),
            v2.RandomGrayscale(augmentation.gray_p),
            v2.RandomApply([v2.GaussianBlur(13, augmentation.blur_sigma)], augmentation.blur_p),
            v2.RandomHorizontalFlip(augmentation.flip_p),
        ]
    )
    copy = torch.empty_like(images)
    least = 2 * images.nbytes
    rows = [
        Row("ours", lambda: color_transform(images, augmentation, seeds), bytes=least),
        Row("torchvision, image by image", lambda: torch.stack([official(image) for image in images]), bytes=least),
        Row("limit: copy", lambda: copy.copy_(images), bytes=least),
    ]
    compare(f"color_transform {recipe}, {views} views of 224x224, 1 thread", rows, torch.ones(1))
