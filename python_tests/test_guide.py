"""The size guide: what it chooses for images and devices."""

import itertools
import math

import pytest
import torch

pytest.importorskip("torchvision")

from moco_ext.data import FolderSplit, TensorSplit
from moco_ext.train import resolve_config
from moco_ext.train.guide import Machine, applies, choose, typical_side

GPU, CPU = Machine("cuda", 80 * 2**30), Machine("cpu", 16 * 2**30)
IMAGENET = 1_281_167
SIZES = [2, 3, 10, 33, 100, 1000, 10**4, 50_000, 10**5, 10**6, IMAGENET, 10**7, 10**8]


def about_resnet50(settings, images):
    """Bytes of a ResNet-50 at 224 pixels, about."""
    return 400 * 2**20 + images * 90 * 2**20


def chosen(images, machine=GPU, side=400, memory=about_resnet50, **explicit):
    choices = choose(images, side, machine, explicit, memory)
    return {name: choice.value for name, choice in choices.items()}


def resolved(images, machine=GPU, side=400, **explicit):
    return resolve_config("/some/folder", explicit, guided=chosen(images, machine, side, **explicit))


def test_imagenet_has_the_published_settings():
    assert resolved(IMAGENET) == resolve_config("/some/folder", {"image_size": 224})
    nodes = resolved(IMAGENET, Machine("cuda", 80 * 2**30, processes=8, nodes=4))
    assert (nodes.batch_size, nodes.lr) == (64, 0.03)  # published for the batch of all GPUs


def test_a_recipe_and_the_built_in_sets_are_left_alone():
    assert applies("photos", None)
    assert not applies("photos", "moco-v1")
    assert not applies("cifar10", None)
    guided = {"moco_k": 7, "lr": 1.0, "epochs": 3}
    assert resolve_config("digits", {}, guided=guided).moco_k == 512  # a preset wins too


@pytest.mark.parametrize("machine", [GPU, CPU], ids=["gpu", "cpu"])
@pytest.mark.parametrize("images", SIZES)
def test_choices_are_valid(images, machine):
    config = resolved(images, machine)
    assert 2 <= config.batch_size <= images
    assert config.batch_size <= config.moco_k <= max(images // 4, config.batch_size)
    for number in (config.batch_size, config.moco_k):
        assert math.log2(number) % 1 == 0
    assert config.lr == pytest.approx(0.03 * config.batch_size / 256)
    assert 1 <= config.knn_k <= images
    assert config.cos or (config.epochs == 200 and images >= 10**6)


@pytest.mark.parametrize("machine", [GPU, CPU], ids=["gpu", "cpu"])
def test_choices_change_one_way_with_the_number_of_images(machine):
    configs = [resolved(images, machine) for images in SIZES]
    for smaller, larger in itertools.pairwise(configs):
        assert larger.batch_size >= smaller.batch_size
        assert larger.moco_k >= smaller.moco_k
        assert larger.epochs <= smaller.epochs
        assert machine is CPU or larger.moco_m >= smaller.moco_m


def test_epochs():
    assert [resolved(n).epochs for n in (100, 50_000, 250_000, 10**6, 10**7, 10**8)] == [800, 800, 400, 200, 26, 3]
    steps = [resolved(n).epochs * n // 256 for n in (10**7, 10**8)]
    assert steps == pytest.approx([200 * IMAGENET // 256] * 2, rel=0.2)
    assert [resolved(n, CPU).epochs for n in (100, 10**4, 10**6)] == [200, 20, 1]
    assert "epochs" not in chosen(1000, steps=500)


def test_a_device_that_multiplies_bfloat16():
    fast = CPU._replace(bf16=True)
    assert resolved(10_000, fast).precision == "bf16"
    assert (resolved(10_000, CPU).precision, resolved(10_000, fast, precision="fp32").precision) == ("fp32", "fp32")


def test_warm_up():
    assert [resolved(n).warmup_epochs for n in (100, 250_000, IMAGENET, 10**7)] == [10, 10, 0, 2.6]
    assert resolved(1_000_000 - 1, CPU).warmup_epochs == 0.1  # of one epoch
    assert chosen(64_000, steps=500)["warmup_epochs"] == 0.2  # two epochs of 250 steps
    assert "warmup_epochs" not in chosen(64_000, schedule=(3,))  # a command of the official trainer


def test_a_short_run_has_a_faster_key_encoder():
    assert resolved(10_000).moco_m == 0.99
    assert resolved(IMAGENET).moco_m == 0.999
    assert resolved(IMAGENET, epochs=1).moco_m == 0.99
    assert resolved(1000, steps=200_000).moco_m == 0.999
    assert "moco_m" not in chosen(1000, dictionary="memory-bank")  # there it is the momentum of features
    assert "moco_k" not in chosen(1000, dictionary="end-to-end")


@pytest.mark.parametrize("gib", [0.1, 4, 8, 24, 80])
@pytest.mark.parametrize("processes", [1, 8])
def test_the_batch_fits_the_memory(gib, processes):
    machine = Machine("cuda", int(gib * 2**30), processes)
    batch = resolved(IMAGENET, machine).batch_size
    per_process = batch // processes
    fits = about_resnet50({}, per_process) <= 0.8 * machine.memory
    assert fits or per_process == 2
    doubled = about_resnet50({}, 2 * per_process)
    assert batch == 256 or doubled > 0.8 * machine.memory  # no smaller than it has to be


def test_every_process_gets_the_same_number_of_images_at_least_two():
    assert resolved(IMAGENET, Machine("cuda", 80 * 2**30, processes=6)).batch_size == 252
    assert resolved(10, Machine("cuda", 80 * 2**30, processes=8)).batch_size == 16  # the loader reports too few images


@pytest.mark.parametrize(
    ("side", "machine", "size", "arch", "crop_min"),
    [
        (8, GPU, 32, "resnet18-small", 0.5),
        (32, GPU, 32, "resnet18-small", 0.2),
        (64, GPU, 64, "resnet18-small", 0.2),
        (100, GPU, 128, "resnet50", 0.2),
        (5000, GPU, 224, "resnet50", 0.2),
        (28, CPU, 32, "resnet10", 0.5),
        (100, CPU, 128, "resnet18", 0.2),
        (500, CPU, 128, "resnet18", 0.2),
    ],
)
def test_image_size_and_architecture(side, machine, size, arch, crop_min):
    config = resolved(10_000, machine, side)
    assert (config.image_size, config.arch, config.crop_min) == (size, arch, crop_min)


def test_a_given_architecture_keeps_its_image_size():
    config = resolved(10_000, CPU, 28, arch="resnet50")
    assert (config.arch, config.image_size) == ("resnet50", None)
    assert resolved(10_000, GPU, 500, image_size=64).arch == "resnet18-small"
    assert not chosen(10_000, init="torchvision:IMAGENET1K_V2").keys() & {"arch", "image_size"}


def test_what_is_given_counts_in_what_is_chosen():
    assert resolved(10_000, batch_size=64).lr == pytest.approx(0.03 / 4)
    assert resolved(10_000, batch_size=64, accumulate=8).lr == pytest.approx(0.06)
    assert resolved(100, batch_size=128).moco_k == 128
    assert "lr" not in chosen(10_000, optimizer="adamw")
    assert "lr" not in chosen(10_000, lr_base=0.3)
    assert "aug_plus" not in chosen(10_000, aug_byol=True)  # they exclude each other
    assert resolved(10_000, mlp=False).moco_t == 0.07
    assert not resolved(10_000, schedule=(3,)).cos
    assert not resolved(IMAGENET, epochs=100).cos  # a command of the official trainer
    explicit = {"moco_k": 3, "lr": 1.0, "moco_m": 0.5, "moco_t": 1.0, "crop_min": 0.9, "knn_k": 1, "aug_plus": False}
    assert not explicit.keys() & chosen(500, side=20, **explicit).keys()


def test_an_architecture_without_a_linear_head_gets_no_other():
    choices = choose(1000, 400, GPU, {"arch": "vgg16"}, about_resnet50, mlp=False)
    assert not {"mlp", "moco_t"} & choices.keys()


def test_every_choice_has_a_reason():
    for machine in (GPU, CPU):
        for images in SIZES:
            choices = choose(images, 100, machine, {}, about_resnet50)
            assert all(choice.reason for choice in choices.values())


def test_the_side_of_images_is_that_of_most(tmp_path):
    from PIL import Image

    paths = []
    for number, size in enumerate([(40, 30), (30, 60), (30, 30), (900, 800)]):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.new("RGB", size).save(paths[-1])
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    split = FolderSplit([*paths, str(broken), str(tmp_path / "missing.png")], torch.zeros(6, dtype=torch.int64))
    assert typical_side(split) == 30
    assert typical_side(FolderSplit([str(broken)], torch.zeros(1, dtype=torch.int64))) == 224
    assert typical_side(TensorSplit(torch.zeros(2, 1, 8, 9), torch.zeros(2))) == 8
