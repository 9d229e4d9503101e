"""Two views of JPEGs on one core: ours, compared with the official pipeline (PIL, torchvision's transforms).

    pytest bench/bench_loader.py -k 'not shards' --benchmark-json=bench/results/loader.json
    pytest bench/bench_loader.py -k shards --rounds 40 --benchmark-json=bench/results/shards.json

A sample is a batch of 16 images: 16e3 / ms images per second and core. "Loader part" is a worker's share with
augment_on="device"; "device part" is the rest, here on the CPU.

bench_shards reads and decodes the same JPEGs from a folder, from our shards and through other loaders, in one process
on one core, from the page cache.
"""

import itertools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

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
from moco_ext.data.shard_writer import write_shards
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


@pytest.fixture
def one_core():
    """For threads of the loaders too; those that run already keep their cores."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    yield
    os.sched_setaffinity(0, cores)


def decoded(content: bytes) -> torch.Tensor:
    return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)


def litdata_item(path: str) -> dict:
    return {"image": Path(path).read_bytes()}


def webdataset_reader(shards: list[str], decode: str | Callable) -> Callable[[], Iterator]:
    """Endless passes over tar files, by WebDataset; ``decode``: one of its names, or a function of the bytes."""
    import webdataset

    def images():
        found = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).repeat()
        found = found.map_dict(jpg=decode) if callable(decode) else found.decode(decode)
        return (sample["jpg"] for sample in found)

    return images


def litdata_reader(files: list[str], folder: Path) -> Callable[[], Iterator]:
    """The same by LitData: passes over chunks of encoded images."""
    import litdata

    chunks = str(folder / "litdata")
    litdata.optimize(litdata_item, files, chunks, chunk_bytes="64MB", num_workers=1, start_method="fork", verbose=False)

    def images():
        dataset = litdata.StreamingDataset(chunks)
        while True:
            yield from (decoded(item["image"]) for item in dataset)

    return images


def bench_shards(compare, device, folder, tmp_path, one_thread, one_core):
    """Reading and decoding; ours at random, the others in order, which is what they do."""
    if device.type != "cpu":
        pytest.skip("images are loaded on the CPU")
    data = mdata.load(folder)
    files = data.train.paths
    write_shards(data, tmp_path / "shards", images_per_shard=IMAGES // 4)
    ours = mdata.load(tmp_path / "shards").train
    tars = sorted(map(str, (tmp_path / "shards").glob("*.tar")))
    in_memory = [Path(path).read_bytes() for path in files]
    size = sum(map(len, in_memory)) * BATCH // IMAGES

    def at_random(read: Callable[[int], torch.Tensor]) -> Callable[[], Iterator]:
        def images():
            for epoch in itertools.count():
                yield from map(read, np.random.default_rng(epoch).permutation(IMAGES).tolist())

        return images

    readers, skipped = {}, {}
    readers["ours, shards"] = at_random(ours.read)
    readers["ours, folder"] = at_random(data.train.read)
    for name, reader in {
        "webdataset, its decoder": lambda: webdataset_reader(tars, "torchrgb8"),
        "webdataset, torchvision's decoder": lambda: webdataset_reader(tars, decoded),
        "litdata, torchvision's decoder": lambda: litdata_reader(files, tmp_path),
    }.items():
        try:
            readers[name] = reader()
        except ImportError as error:
            skipped[name] = str(error)
    if "litdata, torchvision's decoder" in readers:
        readers["ours, LitData chunks"] = at_random(mdata.load(tmp_path / "litdata").train.read)
    readers["limit: decode"] = at_random(lambda position: decoded(in_memory[position]))

    def brightness(images: Iterator) -> torch.Tensor:
        """Of all images, whatever their order."""
        return torch.tensor([image.double().mean() for image in itertools.islice(images, IMAGES)]).sort().values

    def row(name: str, images: Callable[[], Iterator]) -> Row:
        endless = images()
        return Row(
            name,
            lambda: list(itertools.islice(endless, BATCH)),
            bytes=size,
            value=None if name.startswith("limit") else lambda: brightness(images()),
            tolerance=1e-3,  # PIL and torchvision may round a color differently
        )

    rows = [row(*reader) for reader in readers.items()]
    group = f"shards, reading and decoding {BATCH} JPEGs of 500x375 ({size // BATCH // 1000} kB), 1 thread"
    compare(group, rows, brightness(map(decoded, in_memory)), skipped)


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
