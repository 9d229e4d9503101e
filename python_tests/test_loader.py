"""Training batches: the same images and views whatever the workers, ranks and interruptions."""

import collections
import dataclasses
import io
import itertools
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moco_ext import data as mdata
from moco_ext.data import Augmentation, SupervisedLoader, TensorSplit, TrainLoader, augment, datasets
from moco_ext.data import images as image_files
from moco_ext.data.datasets import labeled_subset
from moco_ext.data.sampler import EpochBatchSampler

pytest.importorskip("torchvision")

STILL = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "jitter": (0, 0, 0, 0), "gray_p": 0.0, "flip_p": 0.0}


def numbered(n, classes=1):
    """n images of 4x4, image i all of gray value i, so that a view identifies its image."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 4, 4).contiguous()
    split = TensorSplit(images, torch.arange(n) % classes)
    names = tuple(map(str, range(classes)))
    return datasets.ImageData("numbered", names, 4, (0.0,), (1 / 255,), False, split, None)


def shown(view):
    """Which ``numbered`` images the views show, [n]."""
    return view[:, 0, 0, 0].round().long()


def loader(n=50, batch_size=16, **options):
    return TrainLoader(numbered(n), Augmentation(4, **STILL), batch_size, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """train/ with two classes of 7 images: JPEGs of noise, in different sizes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (root / "train" / name).mkdir(parents=True)
        for i in range(7):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
            coarse.resize((80 + 3 * i, 60)).save(root / "train" / name / f"{i}.jpg")
    return root


def load(root, size=64):
    return dataclasses.replace(mdata.load(str(root)), size=size)


def views(batches):
    return torch.cat([torch.stack([batch.im_q, batch.im_k]).flatten(0, 1) for batch in batches])


# --- one process --------------------------------------------------------------------------------------------


def test_an_epoch_shows_every_image_once_with_its_own_key():
    train = loader()
    batches = list(train.epoch(0))
    assert [len(batch.im_q) for batch in batches] == [16, 16, 16, 2]
    assert train.steps_per_epoch == 4
    order = torch.cat([batch.index for batch in batches])
    assert sorted(order.tolist()) == list(range(50))
    assert order.tolist() != list(range(50))
    assert torch.equal(torch.cat([shown(batch.im_q) for batch in batches]), order)
    assert torch.equal(torch.cat([shown(batch.im_k) for batch in batches]), order)
    assert all((batch.share, batch.last) == (1.0, True) for batch in batches)
    assert batches[0].im_q.shape == (16, 3, 4, 4)
    assert batches[0].im_q.dtype == torch.float32


def test_a_last_batch_of_one_is_dropped_and_drop_last_drops_any():
    assert [len(batch.im_q) for batch in loader(33).epoch(0)] == [16, 16]
    assert [len(batch.im_q) for batch in loader(50, drop_last=True).epoch(0)] == [16, 16, 16]


@pytest.mark.parametrize(
    ("images", "drop_last", "sizes"),
    [
        (48, False, [[8, 8, 8], [8, 8, 8]]),
        (30, False, [[8, 8, 8], [6]]),
        (43, False, [[8, 8, 8], [8, 8, 3]]),
        (33, False, [[8, 8, 8], [8]]),
        (43, True, [[8, 8, 8]]),
        (20, False, [[8, 8, 4]]),
    ],
)
def test_accumulated_steps(images, drop_last, sizes):
    train = loader(images, 8, accumulate=3, drop_last=drop_last)
    assert train.steps_per_epoch == len(sizes)
    batches = iter(train.epoch(0))
    for step in sizes:
        got = list(itertools.islice(batches, len(step)))
        assert [len(batch.im_q) for batch in got] == step
        assert [batch.share for batch in got] == [n / sum(step) for n in step]
        assert [batch.last for batch in got] == [False] * (len(step) - 1) + [True]
    assert next(batches, None) is None


def test_batches_depend_on_seed_and_epoch_alone():
    def first(seed, epoch):
        data = mdata.load("digits")
        return next(TrainLoader(data, Augmentation.v1(8), 32, seed=seed).epoch(epoch))

    one, again, later, other = first(1, 2), first(1, 2), first(1, 3), first(2, 2)
    assert torch.equal(one.im_q, again.im_q)
    assert not torch.equal(one.im_q, one.im_k)
    for different in (later, other):
        assert not torch.equal(one.index, different.index)
        assert not torch.equal(one.key_order, different.key_order)


def test_the_global_generator_is_neither_used_nor_advanced(folder):
    def run(seed):
        torch.manual_seed(seed)
        got = views(TrainLoader(load(folder), Augmentation.v2(64), 4).epoch(0))
        return got, torch.equal(torch.get_rng_state(), torch.manual_seed(seed).get_state())

    (one, same), (other, _) = run(1), run(2)
    assert torch.equal(one, other)
    assert same


def test_key_order_is_a_permutation_that_moves_the_keys():
    plain, shuffled = (list(loader(shuffled_keys=mode).epoch(0)) for mode in (False, True))
    for a, b in zip(plain, shuffled, strict=True):
        assert sorted(a.key_order.tolist()) == list(range(len(a.index)))
        assert torch.equal(a.key_order, b.key_order)
        assert torch.equal(a.im_q, b.im_q)
        assert torch.equal(a.im_k[a.key_order], b.im_k)
    assert not torch.equal(plain[0].key_order, plain[1].key_order)


def test_patches_are_the_cells_of_a_grid(folder):
    whole, cut = (next(TrainLoader(load(folder), Augmentation.v1(64), 4, patches=p).epoch(0)) for p in (0, 9))
    assert cut.im_q.shape == (4, 9, 3, 21, 21)
    for place in range(9):
        y, x = place // 3 * 21, place % 3 * 21
        assert torch.equal(cut.im_k[:, place], whole.im_k[:, :, y : y + 21, x : x + 21])


def test_channels_last():
    for patches, flat in ((0, lambda view: view), (4, lambda view: view.flatten(0, 1))):
        batch = next(loader(channels_last=True, patches=patches).epoch(0))
        assert flat(batch.im_q).is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(batch.im_q, next(loader(patches=patches).epoch(0)).im_q)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1}, "batch_size: expected at least 2"),
        ({"accumulate": 0}, "accumulate: expected at least 1"),
        ({"rank": 2, "world": 2}, "rank: expected one of world = 2"),
        ({"patches": 5}, "patches: expected 0 or a square number.*got 5"),
        ({"patches": 25}, "patches: expected 0 or a square number, of at most 4"),
        ({"augment_on": "gpu"}, "augment_on: expected loader or device, got 'gpu'"),
        ({"workers": -1}, "workers: expected 0 or more"),
        ({"n": 3, "world": 2}, "data: expected at least 4 images for one step, got 3"),
        ({"n": 1}, "data: expected at least 2 images for one step, got 1"),
        ({"n": 0}, "data: expected at least 2 images for one step, got 0"),
        ({"n": 50, "accumulate": 4, "drop_last": True}, "data: expected at least 64 images for one step, got 50"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        loader(**options)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_the_device_is_a_name_or_a_torch_device(device):
    assert next(loader(device=device).epoch(0)).im_q.device.type == "cpu"
    assert next(SupervisedLoader(numbered(50), 16, device=device).epoch(0))[1].device.type == "cpu"


@pytest.mark.parametrize("augment_on", ["loader", "device"])
def test_everything_random_is_computed_once(folder, monkeypatch, augment_on):
    """A micro-batch once, and of each view's random numbers each one once."""
    micro_batches, numbers = [], collections.Counter()
    micro_batch, uniforms = EpochBatchSampler._micro_batch, augment.uniforms

    def counted(seeds, count, *, start=0):
        numbers.update((seed, start + i) for seed in seeds.tolist() for i in range(count))
        return uniforms(seeds, count, start=start)

    monkeypatch.setattr(EpochBatchSampler, "_micro_batch", lambda *a: micro_batches.append(a[-1]) or micro_batch(*a))
    monkeypatch.setattr(augment, "uniforms", counted)
    for _ in TrainLoader(load(folder), Augmentation.v2(64), 4, augment_on=augment_on).epoch(0):
        pass
    assert micro_batches == [0, 1, 2, 3]
    assert set(numbers.values()) == {1}
    assert len(numbers) == 2 * 14 * 33


# --- many processes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_see_together_what_one_process_sees(folder, accumulate):
    data, recipe = load(folder), Augmentation.v2(64)
    one = list(TrainLoader(data, recipe, 6, accumulate=accumulate).epoch(1))
    ranks = [
        list(TrainLoader(data, recipe, 2, accumulate=accumulate, rank=r, world=3, shuffled_keys=True).epoch(1))
        for r in range(3)
    ]
    # 14 images: 6, 6 and 2. Three ranks would get fewer than two each, and leave those out.
    assert [len(batch.im_q) for batch in one] == [6, 6, 2]
    for global_batch, *parts in zip(one[:2], *ranks, strict=True):
        assert torch.equal(torch.cat([part.im_q for part in parts]), global_batch.im_q)
        assert torch.equal(torch.cat([part.index for part in parts]), global_batch.index)
        assert all(torch.equal(part.key_order, global_batch.key_order) for part in parts)
        keys = torch.cat([part.im_k for part in parts])
        assert torch.equal(keys, global_batch.im_k[global_batch.key_order])


def test_ranks_see_in_memory_what_one_process_sees():
    data, recipe = mdata.load("digits"), Augmentation.v2(8)
    one = next(TrainLoader(data, recipe, 64).epoch(0))
    ranks = [next(TrainLoader(data, recipe, 32, rank=r, world=2).epoch(0)) for r in range(2)]
    assert torch.equal(torch.cat([batch.im_q for batch in ranks]), one.im_q)
    assert torch.equal(torch.cat([batch.im_k for batch in ranks]), one.im_k)


@pytest.mark.parametrize(("images", "world", "batch_size"), [(50, 3, 4), (47, 4, 5), (100, 7, 3), (11, 2, 4)])
def test_every_rank_gets_the_same_number_and_no_image_twice(images, world, batch_size):
    ranks = [list(loader(images, batch_size, rank=r, world=world).epoch(0)) for r in range(world)]
    for parts in zip(*ranks, strict=True):
        assert len({len(part.im_q) for part in parts}) == 1
        assert len(parts[0].im_q) >= 2
    seen = torch.cat([batch.index for rank in ranks for batch in rank]).tolist()
    assert len(set(seen)) == len(seen)
    assert images - len(seen) < 2 * world


# --- workers and interruptions ------------------------------------------------------------------------------


@pytest.mark.parametrize("augment_on", ["loader", "device"])
def test_views_depend_neither_on_workers_nor_on_augment_on(folder, augment_on):
    data, recipe = load(folder), Augmentation.v2(64, rotate=10.0, elastic=50.0, erase_p=0.5)
    want = views(TrainLoader(data, recipe, 4).epoch(0))
    for workers in (0, 2):
        got = views(TrainLoader(data, recipe, 4, workers=workers, augment_on=augment_on).epoch(0))
        assert torch.equal(got, want)


@pytest.mark.parametrize("augment_on", ["loader", "device"])
def test_the_second_view_may_have_its_own_augmentation(folder, augment_on):
    """Here the queries stay as they are, and all keys are solarized."""
    still = {"scale": (1.0, 1.0), "jitter": (0, 0, 0, 0), "gray_p": 0.0, "flip_p": 0.0}
    second = Augmentation(16, **still, solarize_p=1.0)
    augmentation = Augmentation(16, **still, second=second)
    one, other, plain = (
        next(TrainLoader(mdata.load(folder, image_size=16), recipe, 4, augment_on=augment_on).epoch(0))
        for recipe in (augmentation, second, Augmentation(16, **still))
    )
    assert torch.equal(one.im_q, plain.im_q)
    assert torch.equal(one.im_k, other.im_k)
    assert not torch.equal(one.im_k, plain.im_k)


def test_augment_on_device_of_images_in_memory():
    data, recipe = mdata.load("digits"), Augmentation.v1(8)
    a, b = (next(TrainLoader(data, recipe, 8, augment_on=place).epoch(0)) for place in ("loader", "device"))
    assert torch.equal(a.im_q, b.im_q)


def through_a_checkpoint(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_runs_see_what_uninterrupted_ones_see(folder, workers):
    data, recipe = load(folder), Augmentation.v2(64)

    def fresh(workers):
        return TrainLoader(data, recipe, 4, seed=3, workers=workers)

    whole, states = [], []
    train = fresh(0)
    for epoch in range(2):
        for batch in train.epoch(epoch):
            whole.append(batch)
            states.append(through_a_checkpoint(train.state_dict()))
    assert train.steps_per_epoch == 4
    for at in (0, 2, 3, 5):  # 3: an epoch's end
        resumed = fresh(workers)
        resumed.load_state_dict(states[at])
        assert resumed.state_dict() == states[at]
        rest = [batch for epoch in range(states[at]["epoch"], 2) for batch in resumed.epoch(epoch)]
        assert len(rest) == len(whole) - at - 1
        assert torch.equal(views(rest), views(whole[at + 1 :]))
        assert resumed.state_dict() == states[-1]


def test_an_epoch_left_in_the_middle_starts_anew(folder):
    train = TrainLoader(load(folder), Augmentation.v2(64), 4, workers=2)
    whole = views(train.epoch(0))
    abandoned = train.epoch(0)
    next(abandoned)
    assert torch.equal(views(train.epoch(0)), whole)


def test_micro_batches_of_an_unfinished_step_are_repeated():
    train = loader(48, 8, accumulate=3)
    batches = iter(train.epoch(0))
    seen = [next(batches) for _ in range(5)]
    resumed = loader(48, 8, accumulate=3)
    resumed.load_state_dict(train.state_dict())
    assert torch.equal(next(resumed.epoch(0)).index, seen[3].index)


@pytest.mark.parametrize(
    ("options", "name"), [({"seed": 1}, "seed"), ({"n": 51}, "images"), ({"batch_size": 8}, "batch")]
)
def test_a_state_of_another_run_is_refused(options, name):
    with pytest.raises(ValueError, match=f"state: expected .*{name}"):
        loader(**options).load_state_dict(loader().state_dict())


@pytest.mark.parametrize(("name", "value"), [("epoch", -1), ("step", 5), ("step", "1"), ("step", None)])
def test_a_state_without_a_valid_position_is_refused(name, value):
    state = loader().state_dict() | {name: value}
    with pytest.raises(ValueError, match=f"state: expected {name} .*got {value}"):
        loader().load_state_dict(state)


def test_a_state_with_the_same_global_batch_size_fits_another_number_of_ranks():
    train = loader(64, 16)
    batches = train.epoch(0)
    next(batches)
    want = next(batches)
    ranks = [loader(64, 8, rank=r, world=2) for r in range(2)]
    state = loader(64, 16).state_dict() | {"step": 1}
    for rank in ranks:
        rank.load_state_dict(state)
    assert torch.equal(torch.cat([next(rank.epoch(0)).index for rank in ranks]), want.index)


# --- unreadable images --------------------------------------------------------------------------------------


@pytest.fixture
def damaged(folder, tmp_path):
    """The folder's images, two of the 14 unreadable."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    broken = [tmp_path / "train" / "a" / "2.jpg", tmp_path / "train" / "b" / "5.jpg"]
    broken[0].write_bytes(broken[0].read_bytes()[:300])
    broken[1].write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_counted_and_warned_of_once(damaged, workers):
    data = load(damaged)
    train = TrainLoader(data, Augmentation.v2(64), 7, workers=workers)
    with pytest.warns(UserWarning, match=r"data: expected an image, got .*\.jpg.*; it is skipped"):
        batches = list(train.epoch(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(train.epoch(1))
    assert data.unreadable == {str(damaged / "train" / name) for name in ("a/2.jpg", "b/5.jpg")}
    assert sorted(torch.cat([batch.index for batch in batches]).tolist()) == list(range(14))
    assert views(batches).isfinite().all()


def test_query_and_key_of_an_unreadable_image_show_the_same_other_one(damaged):
    """On different ranks too: without augmentation the rows are equal once the keys are back in order."""
    data, recipe = load(damaged), Augmentation(64, **STILL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ranks = [list(TrainLoader(data, recipe, 7, rank=r, world=2, shuffled_keys=True).epoch(0)) for r in range(2)]
    for parts in zip(*ranks, strict=True):
        queries, keys = (torch.cat([getattr(part, name) for part in parts]) for name in ("im_q", "im_k"))
        assert torch.equal(keys[parts[0].key_order.argsort()], queries)
    assert len(ranks[0]) == 1
    assert len(queries.flatten(1).unique(dim=0)) == 12


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bomb_a_fifo_and_a_folder_are_replaced_and_counted(folder, tmp_path, monkeypatch, workers):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    data = load(tmp_path)
    bomb, fifo, a_folder = (tmp_path / "train" / "a" / f"{i}.jpg" for i in range(3))
    fifo.unlink()
    os.mkfifo(fifo)
    a_folder.unlink()
    a_folder.mkdir()
    Image.new("1", (400, 300)).save(bomb, "PNG")
    monkeypatch.setattr(image_files, "MAX_PIXELS", 400 * 300 - 1)
    train = TrainLoader(data, Augmentation.v2(64), 7, workers=workers)
    with pytest.warns(UserWarning, match=r"^data: expected an image, got ValueError in .*train/a/[012]\.jpg"):
        batches = list(train.epoch(0))
    assert data.unreadable == {str(bomb), str(fifo), str(a_folder)}
    assert views(batches).isfinite().all()


@pytest.mark.filterwarnings("ignore:data. expected an image")
@pytest.mark.parametrize("loader_of", [lambda *a: TrainLoader(a[0], Augmentation.v1(64), *a[1:]), SupervisedLoader])
@pytest.mark.parametrize(("enough", "batches"), [(64, 4), (6, 1)])
def test_a_mostly_unreadable_data_set_is_an_error(damaged, monkeypatch, loader_of, enough, batches):
    """At the end of an epoch of few images, else as soon as there are enough to judge by."""
    monkeypatch.setattr(mdata.loader, "_ENOUGH", enough)
    data = load(damaged)
    for path in data.train.paths[:11]:
        Path(path).write_bytes(b"nothing")
    epoch = loader_of(data, 4).epoch(0)
    for _ in range(batches):
        next(epoch)
    with pytest.raises(ValueError, match=r"^data: expected images, got (14|8) files of which \d+ are unreadable$"):
        next(epoch)


@pytest.mark.filterwarnings("ignore:data. expected an image")
@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_files_only_are_an_error(damaged, workers):
    data = load(damaged)
    for path in data.train.paths:
        Path(path).unlink()
    with pytest.raises(
        ValueError, match=r"^data: expected images, got 100 unreadable files in a row; .*No such"
    ) as caught:
        next(TrainLoader(data, Augmentation.v1(64), 4, workers=workers).epoch(0))
    assert "\n" not in str(caught.value)  # not the worker's traceback


# --- supervised batches -------------------------------------------------------------------------------------


def test_supervised_batches_show_every_image_once_with_its_label():
    data = numbered(50, classes=3)
    train = SupervisedLoader(data, 16, crop_min=1.0)
    batches = list(train.epoch(0))
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 2]
    assert train.steps_per_epoch == 4
    images = torch.cat([shown(images) for images, _ in batches])
    assert sorted(images.tolist()) == list(range(50))
    assert torch.equal(torch.cat([labels for _, labels in batches]), images % 3)


def test_a_fraction_of_the_labels_is_stratified_and_the_same_every_epoch():
    data = numbered(200, classes=4)
    train = SupervisedLoader(data, 4, fraction=0.1, seed=5, crop_min=1.0)
    epochs = [torch.cat([shown(images) for images, _ in train.epoch(epoch)]) for epoch in range(2)]
    assert torch.bincount(epochs[0] % 4).tolist() == [5, 5, 5, 5]
    assert sorted(epochs[0].tolist()) == sorted(epochs[1].tolist())
    assert epochs[0].tolist() != epochs[1].tolist()
    other = SupervisedLoader(data, 4, fraction=0.1, seed=6, crop_min=1.0)
    assert set(epochs[0].tolist()) != set(torch.cat([shown(images) for images, _ in other.epoch(0)]).tolist())
    one_each = SupervisedLoader(data, 4, fraction=1e-6)
    assert sorted(next(one_each.epoch(0))[1].tolist()) == [0, 1, 2, 3]


def test_labels_per_class_are_balanced_nested_and_seeded():
    data = numbered(200, classes=4)

    def used(n: int, seed: int) -> set[int]:
        batches = SupervisedLoader(data, 4, labels_per_class=n, seed=seed, crop_min=1.0).epoch(0)
        return set(torch.cat([shown(images) for images, _ in batches]).tolist())

    few, more = used(5, 0), used(15, 0)
    assert [sum(image % 4 == c for image in few) for c in range(4)] == [5, 5, 5, 5]
    assert few < more
    assert few != used(5, 1)
    assert few == set(labeled_subset(data.train.labels, fraction=0.1).tolist())  # the images of the fraction


def test_supervised_ranks_see_together_what_one_process_sees(folder):
    one = next(SupervisedLoader(load(folder), 6).epoch(0))
    ranks = [next(SupervisedLoader(load(folder), 3, rank=r, world=2, workers=r).epoch(0)) for r in range(2)]
    for got, want in zip(zip(*ranks, strict=True), one, strict=True):
        assert torch.equal(torch.cat(got), want)


def test_an_unreadable_supervised_image_is_replaced_with_its_label(damaged):
    data = load(damaged)
    for position, (path, label) in enumerate(zip(data.train.paths, data.train.labels.tolist(), strict=True)):
        if position not in (2, 12):  # not the damaged ones; the others get a color per class
            Image.new("RGB", (64, 64), (255 * label, 0, 0)).save(path)
    with pytest.warns(UserWarning, match="it is skipped"):
        batches = list(SupervisedLoader(data, 14).epoch(0))
    (images, labels), mean, std = batches[0], torch.tensor(data.mean), torch.tensor(data.std)
    red = images.mean((2, 3))[:, 0] * std[0] + mean[0]
    assert red.round().long().tolist() == labels.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "fraction: expected"),
        ({"crop_min": 1.5}, "crop_min: expected"),
        ({"labels_per_class": 17}, "labels_per_class: expected 1 to 16, the images of the smallest class, got 17"),
        (
            {"labels_per_class": 2, "fraction": 0.5},
            "labels_per_class: expected no fraction with it, got 2 and fraction 0.5",
        ),
    ],
)
def test_supervised_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        SupervisedLoader(numbered(50, classes=3), 4, **options)


def test_sampling_from_large_data_costs_one_permutation():
    """Ten million images: a step in the middle of an epoch is available at once."""
    sampler = EpochBatchSampler(10_000_000, 4)
    sampler.set_epoch(0, 2_000_000)
    micro = next(iter(sampler))
    assert micro.index.shape == (4,)
    assert micro.index.max() < 10_000_000
