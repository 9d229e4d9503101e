"""``moco-ext segment``: an FCN on an encoder, on small generated data sets."""

import dataclasses
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from training import assert_equal_states, environment, run_in, torchrun, weights_of

from moco_ext import cli, encoders
from moco_ext.data.items import training_items
from moco_ext.data.segmentation import IGNORED, load_segmentation, random_view
from moco_ext.evaluate.segmentation import confusion_matrix, evaluate_segmenter, intersection_over_union
from moco_ext.train.segmenter import RECIPES, SegmenterConfig, build_segmenter, cross_entropy, train_segmenter

for package in ("tensorboard", "timm"):
    pytest.importorskip(package)

ARCH = "timm:test_resnet"  # of 0.5 M parameters
CONFIG = SegmenterConfig(4, (3,), 0.02, batch_size=4, crop=48, bn_batches=2)
FLAGS = [
    *("--crop", "48", "--bn-batches", "2", "-b", "4", "--lr", "0.02", "-j", "0", "--threads", "1"),
    *("--logger", "none", "--log-seconds", "0"),
]


@pytest.fixture(autouse=True)
def use_one_thread(one_thread):
    pass


def shapes(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A red square (1) and a green disk (2) on gray noise (0): pixels [48, 56, 3] and mask [48, 56]."""
    rows, columns = np.mgrid[:48, :56]
    image, mask = generator.uniform(90, 160, (48, 56, 1)).repeat(3, 2), np.zeros((48, 56), np.uint8)
    for label in generator.permutation([1, 2]):
        y, x, radius = generator.integers(8, 40), generator.integers(8, 48), generator.integers(6, 12)
        dy, dx = np.abs(rows - y), np.abs(columns - x)
        inside = np.maximum(dy, dx) <= radius if label == 1 else np.hypot(dy, dx) <= radius
        mask[inside] = label
        image[inside] = [220, 60, 60] if label == 1 else [60, 200, 60]
    return (image + generator.normal(0, 12, image.shape)).clip(0, 255).astype(np.uint8), mask


def save(path: Path, pixels: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette:
        image.putpalette(list(range(256)) * 3)
    image.save(path, quality=95)


def write(root: Path, layout: str) -> Path:
    """24 training and 6 test images."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 6)):
        for number in range(count):
            (image, mask), name = shapes(generator), f"{split}{number:02}"
            if layout == "folders":
                save(root / "images" / split / f"{name}.jpg", image)
                save(root / "masks" / split / f"{name}.png", mask)
            elif layout == "voc":
                mask[:, 0] = IGNORED
                save(root / "JPEGImages" / f"{name}.jpg", image)
                save(root / "SegmentationClass" / f"{name}.png", mask, palette=True)
            else:
                city = f"{split}ville"
                save(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", image)
                ids = np.array([7, 26, 4], np.uint8)[mask]  # road, car, static (not evaluated)
                save(root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", ids)
        if layout == "voc":
            lists = root / "ImageSets/Segmentation"
            lists.mkdir(parents=True, exist_ok=True)
            (lists / f"{split}.txt").write_text("".join(f"{split}{number:02}\n" for number in range(count)))
    if layout == "folders":
        (root / "classes.txt").write_text("background\nsquare\ndisk\n")
    return root


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("segmentation")
    for layout in ("folders", "voc", "cityscapes"):
        write(root / layout, layout)
    return root


@pytest.fixture(scope="session")
def data(folders):
    return load_segmentation(folders / "folders")


def segmenter(arch: str = ARCH, classes: int = 3):
    torch.manual_seed(0)
    return build_segmenter(encoders.build(arch, 1), classes, CONFIG)


# --- data -------------------------------------------------------------------------------------------------------------


def test_layouts(folders, data):
    voc, cityscapes = (load_segmentation(folders / layout) for layout in ("voc", "cityscapes"))
    assert [found.layout for found in (data, voc, cityscapes)] == ["folders", "voc", "cityscapes"]
    assert data.classes == ("background", "square", "disk")
    assert (len(voc.classes), voc.classes[0], voc.classes[15]) == (21, "background", "person")
    assert (len(cityscapes.classes), cityscapes.classes[0], cityscapes.classes[13]) == (19, "road", "car")
    expected = data.train.read(3)[1]
    assert set(expected.unique().tolist()) == {0, 1, 2}
    for found in (voc, cityscapes):
        assert (len(found.train), len(found.test)) == (24, 6)
        image, mask = found.train.read(3)
        assert (image.shape, mask.shape, mask.dtype) == ((3, 48, 56), (48, 56), torch.uint8)
    mask = voc.train.read(3)[1]
    assert (mask[:, 0] == IGNORED).all()
    assert torch.equal(mask[:, 1:], expected[:, 1:])
    assert torch.equal(cityscapes.train.read(3)[1], torch.tensor([0, 13, IGNORED], dtype=torch.uint8)[expected.int()])


def test_the_last_year_of_voc_and_its_augmented_masks(folders, tmp_path):
    for year in ("VOC2007", "VOC2012"):
        shutil.copytree(folders / "voc", tmp_path / year)
    root = tmp_path / "VOC2012"
    shutil.copytree(root / "SegmentationClass", root / "SegmentationClassAug")
    lines = ["/JPEGImages/train00.jpg /SegmentationClassAug/train00.png", "train07"]  # both are in use
    (root / "ImageSets/Segmentation/trainaug.txt").write_text("\n".join(lines) + "\n")
    data = load_segmentation(tmp_path)
    assert [Path(mask).relative_to(tmp_path) for _, mask in data.train.files] == [
        Path("VOC2012/SegmentationClassAug/train00.png"),
        Path("VOC2012/SegmentationClassAug/train07.png"),
    ]
    assert len(data.test) == 6
    assert Path(data.test.files[0][1]).parent.name == "SegmentationClass"


def test_names_with_dots_in_a_list_of_voc(folders, tmp_path):
    """The files of val00 would take the place of val00.a."""
    shutil.copytree(folders / "voc", tmp_path / "voc")
    for path in ("JPEGImages/val00.jpg", "SegmentationClass/val00.png"):
        shutil.copy(tmp_path / "voc" / path, (tmp_path / "voc" / path).with_suffix(f".a{path[-4:]}"))
    (tmp_path / "voc/ImageSets/Segmentation/val.txt").write_text("val00.a\n/JPEGImages/val01.jpg\n")
    files = load_segmentation(tmp_path / "voc").test.files
    assert [tuple(Path(path).name for path in pair) for pair in files] == [
        ("val00.a.jpg", "val00.a.png"),
        ("val01.jpg", "val01.png"),
    ]


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_mask_is_turned_like_its_image(folders, tmp_path, data, orientation):
    shutil.copytree(folders / "folders", tmp_path / "set")
    exif = Image.Exif()
    exif[0x0112] = orientation
    for path in ("images/train/train03.jpg", "masks/train/train03.png"):
        with Image.open(tmp_path / "set" / path) as stored:
            stored.save(tmp_path / "set" / path, exif=exif)
    image, mask = load_segmentation(tmp_path / "set").train.read(3)
    turns = {3: 2, 6: -1}[orientation]
    assert image.shape[1:] == mask.shape
    assert torch.equal(mask, data.train.read(3)[1].rot90(turns))


def test_classes_without_names(folders, tmp_path):
    shutil.copytree(folders / "folders", tmp_path / "set")
    (tmp_path / "set/classes.txt").unlink()
    assert load_segmentation(tmp_path / "set").classes == ("0", "1", "2")
    for path in (tmp_path / "set/masks").rglob("*.png"):
        save(path, np.where(np.array(Image.open(path)) > 0, 255, 0).astype(np.uint8))
    with pytest.raises(
        ValueError, match=r"^data: expected 2 to 255 different classes in .*masks, got 0; pixels of 255"
    ):
        load_segmentation(tmp_path / "set")


def test_masks_of_0_and_255_are_an_error(folders, tmp_path):
    """Their objects would be ignored, and an mIoU of 100 be that of the background alone."""
    shutil.copytree(folders / "folders", tmp_path / "set")
    for path in (tmp_path / "set/masks").rglob("*.png"):
        save(path, np.where(np.array(Image.open(path)) > 0, 255, 0).astype(np.uint8))
    message = r"^data: expected test masks with pixels of two classes, got background in .*masks/val; pixels of 255 are"
    with pytest.raises(ValueError, match=message):
        load_segmentation(tmp_path / "set")


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("folders", lambda root: root / "nowhere", "expected a folder in the layout of VOC or .*got .*nowhere"),
        ("folders", lambda root: root / "images", "expected images and masks, .* got train, val"),
        ("folders", lambda root: (root / "masks/train/train03.png").unlink(), "expected an image and .*/train03.png"),
        ("folders", lambda root: shutil.rmtree(root / "images/val"), "expected a folder of images .*images/val"),
        ("folders", lambda root: (root / "classes.txt").write_text("a\na\n"), "expected 2 to 255 .*classes.txt, got a"),
        ("voc", lambda root: (root / "JPEGImages/val00.jpg").unlink(), "expected an image and a mask .*val00.jpg"),
        ("voc", lambda root: (root / "ImageSets/Segmentation/val.txt").unlink(), "expected test images in .* got none"),
        ("voc", lambda root: (root / "ImageSets/Segmentation/trainaug.txt").write_text("train00\n"), "expected .*Aug/"),
        ("cityscapes", lambda root: shutil.rmtree(root / "gtFine/val"), "expected an image and .*val00_gtFine_label"),
    ],
)
def test_wrong_folders(folders, tmp_path, layout, change, message):
    shutil.copytree(folders / layout, tmp_path / layout)
    changed = change(tmp_path / layout)
    with pytest.raises(ValueError, match=f"^data: {message}"):
        load_segmentation(changed if isinstance(changed, Path) else tmp_path / layout)


@pytest.mark.parametrize(
    ("workers", "pixels", "message"),
    [
        (
            1,
            np.zeros((56, 48), np.uint8),
            r"a mask of 56 x 48 pixels, as .*train00.jpg, got 48 x 56 in .*/train00.png$",
        ),
        (0, np.full((48, 56), 3, np.uint8), r"numbers of 3 classes, or 255 for ignored .*, got 3 in .*/train00.png$"),
        (
            0,
            np.zeros((48, 56, 3), np.uint8),
            r"a mask with one 8-bit number per pixel, got mode RGB in .*/train00.png$",
        ),
        (0, None, r"a mask with one 8-bit number per pixel, got cannot identify .*/train00.png$"),
    ],
)
def test_wrong_masks_name_the_file(folders, tmp_path, workers, pixels, message):
    shutil.copytree(folders / "folders", tmp_path / "set")
    path = tmp_path / "set/masks/train/train00.png"
    if pixels is None:
        path.write_bytes(b"no image")
    else:
        save(path, pixels)
    split = load_segmentation(tmp_path / "set").train
    with pytest.raises(ValueError, match=f"^data: expected {message}"):
        evaluate_segmenter(segmenter(), split, workers=workers)


# --- views ------------------------------------------------------------------------------------------------------------


def test_the_mask_moves_with_the_image():
    """Where a view shows a plain color, undisturbed by the interpolation at edges, the mask has the color's class."""
    generator = np.random.default_rng(0)
    mask = torch.from_numpy(generator.integers(0, 3, (8, 10), np.uint8).repeat(9, 0).repeat(9, 1))
    image = torch.stack([(mask == label) * 255 for label in range(3)]).to(torch.uint8)
    mirrored = 0
    for seed in range(40):
        view, target = random_view(image, mask, seed, crop=64, scales=(0.5, 2.0), fill=(50, 50, 50))
        assert (view.shape, target.shape) == ((3, 64, 64), (64, 64))
        (brightest, label) = view.max(0)
        plain = brightest == 255
        assert plain.float().mean() > 0.15
        assert torch.equal(label[plain], target[plain].long()), seed
        assert (view[:, target == IGNORED] == 50).all()
        assert torch.equal(random_view(image, mask, seed, crop=64, scales=(0.5, 2.0), fill=(50,) * 3)[0], view)
        mirrored += bool((target[:, 0] == IGNORED).all())
    assert mirrored > 0  # padding is at the right, except in mirrored views


def test_views_cover_scales_and_positions():
    image, mask = torch.zeros(3, 40, 40, dtype=torch.uint8), torch.arange(40, dtype=torch.uint8).repeat(40, 1)
    same = [random_view(image, mask, seed, crop=40, scales=(1, 1), fill=(0,) * 3)[1] for seed in range(100)]
    assert 30 < sum(torch.equal(target, mask) for target in same) < 70  # else mirrored
    assert all(torch.equal(target, mask) or torch.equal(target, mask.flip(-1)) for target in same)
    views = [random_view(image, mask, seed, crop=40, scales=(0.5, 2.0), fill=(0,) * 3)[1] for seed in range(400)]
    sides = [int((target != IGNORED).sum(1).max()) for target in views]
    assert (min(sides), max(sides)) == (20, 40)
    assert 0.27 < np.mean([side < 40 for side in sides]) < 0.4  # a third of the scales are below 1
    lefts = [int(target[0].min()) for target, side in zip(views, sides, strict=True) if side == 40]
    assert (min(lefts), max(lefts) >= 17) == (0, True)  # of at most 20 at scale 2


def test_batches_depend_on_the_iteration_alone(data):
    def view(position, seed):
        return data.train.view(position, seed, crop=48, scales=(0.5, 2.0), fill=(0, 0, 0))

    def joined(batches):
        return [torch.cat([torch.cat([image, mask[None]]) for image, mask in batch]) for batch in batches]

    whole = joined(training_items(view, 24, 4, stop=8, seed=1))
    later = joined(training_items(view, 24, 4, start=5, stop=8, seed=1, workers=2))
    assert all(torch.equal(a, b) for a, b in zip(whole[5:], later, strict=True))
    halves = [joined(training_items(view, 24, 2, stop=8, seed=1, rank=rank, world=2)) for rank in (0, 1)]
    assert all(torch.equal(a, torch.cat(pair)) for a, *pair in zip(whole, *halves, strict=True))
    assert not torch.equal(whole[0], whole[6])


# --- mean intersection over union -------------------------------------------------------------------------------------


def test_a_confusion_matrix_by_hand():
    labels = torch.tensor([[0, 0, 1, 1], [2, 2, 255, 255]], dtype=torch.uint8)
    predictions = torch.tensor([[0, 1, 1, 1], [2, 0, 2, 3]])
    confusion = confusion_matrix(predictions, labels, 5)
    expected = torch.zeros(5, 5, dtype=torch.int64)
    expected[0, 0] = expected[0, 1] = expected[2, 0] = expected[2, 2] = 1
    expected[1, 1] = 2
    assert torch.equal(confusion, expected)
    # Of 0: 1 correct of 3 in either; of 1: 2 of 3; of 2: 1 of 2; 3 and 4 are nowhere.
    found = intersection_over_union(confusion, "abcde")
    assert found == pytest.approx(
        {"mIoU": 50, "pixel_accuracy": 100 * 4 / 6, "IoU/a": 100 / 3, "IoU/b": 200 / 3, "IoU/c": 50}
    )


def test_a_class_that_is_only_predicted_counts():
    confusion = confusion_matrix(torch.tensor([0, 1]), torch.tensor([0, 0]), 3)
    found = {"mIoU": 25, "pixel_accuracy": 50, "IoU/a": 50, "IoU/b": 0}
    assert intersection_over_union(confusion, "abc") == pytest.approx(found)
    with pytest.raises(ValueError, match=r"^data: expected labeled pixels in the test masks, got none"):
        intersection_over_union(torch.zeros(3, 3), "abc")


def test_perfect_predictions_score_100(data):
    class Oracle(nn.Module):
        def forward(self, images):
            red, green = images[:, 0].int() - images[:, 1].int(), images[:, 1].int() - images[:, 0].int()
            return torch.stack([torch.full_like(red, 60), red, green], 1)

    found = evaluate_segmenter(Oracle(), data.test)
    assert found["mIoU"] > 95  # JPEG blurs the edges
    assert list(found) == ["mIoU", "pixel_accuracy", "IoU/background", "IoU/square", "IoU/disk"]


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "stride"), [(ARCH, 16), ("resnet10", 16), ("timm:resnet18d", 16), ("resnet10-small", 4)]
)
def test_the_encoder_is_the_backbone_and_all_of_it_is_trained(arch, stride):
    encoder = encoders.build(arch, 1).requires_grad_(False)
    expected = weights_of(encoder)
    model = build_segmenter(encoder, 5, CONFIG)
    state = model.state_dict()
    layers = [name for name in expected if not name.startswith(("fc.", "head."))]
    assert all(torch.equal(state[f"backbone.{name}"], expected[name]) for name in layers)
    assert all(name.startswith("classifier.") for name in state if name.removeprefix("backbone.") not in layers)
    assert_equal_states(weights_of(encoder), expected)  # the same names, for other tools
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(layer.training for layer in model.modules())
    norms = [name for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    assert [name for name in norms if name.startswith("classifier.")] == ["classifier.0.1", "classifier.1.1"]
    images = torch.zeros(2, 3, 96, 64, dtype=torch.uint8)
    assert model.backbone(images.float())["out"].shape[2:] == (96 // stride, 64 // stride)
    assert model(images).shape == (2, 5, 96, 64)


def test_resnet50_is_the_published_one():
    model = build_segmenter(encoders.build("resnet50", 1), 21, RECIPES["voc"])
    convolutions = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)
    }
    dilated = {name: layer.dilation for name, layer in convolutions.items() if layer.dilation != (1, 1)}
    layer4 = [f"backbone.layer4.{block}.conv2" for block in range(3)]
    assert dilated == dict.fromkeys(layer4, (2, 2)) | dict.fromkeys(["classifier.0.0", "classifier.1.0"], (6, 6))
    assert all(convolutions[name].stride == (1, 1) for name in dilated)
    head = [(layer.in_channels, layer.out_channels) for layer in model.classifier.modules() if hasattr(layer, "groups")]
    assert head == [(2048, 256), (256, 256), (256, 21)]


def test_the_dilated_stage_computes_what_the_strided_one_does():
    """With 3x3 weights that see only the center, the outputs at even positions are those of the strided stage."""
    torch.manual_seed(0)
    encoder = encoders.build("resnet10", 1).eval()
    block = encoder.layer4[0]
    block.conv2 = nn.Identity()
    with torch.no_grad():
        block.conv1.weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0  # only the center is left
    image = torch.randn(1, 3, 64, 64)
    features = nn.Sequential(encoder.conv1, encoder.bn1, encoder.relu, encoder.maxpool)(image)
    features = encoder.layer3(encoder.layer2(encoder.layer1(features)))
    with torch.no_grad():
        strided = encoder.layer4(features)
        model = build_segmenter(encoder, 2, CONFIG).eval()
        dense = model.backbone.layer4(features)
    torch.testing.assert_close(dense[:, :, ::2, ::2], strided)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("vit_small", r"a ResNet with layer1, .* for segmentation, got \w+ with 0 of"),
        ("resnet8-small", "a ResNet with layer1, .* for segmentation, got ResNet with 3 of"),
        ("timm:resnetblur18", "strides of layer4 in convolutions and average pooling, got BlurPool2d"),
    ],
)
def test_other_encoders_are_an_error(arch, message):
    with pytest.raises(ValueError, match=f"^arch: expected {message}"):
        segmenter(arch)


def test_recipes():
    voc, cityscapes = RECIPES["voc"], RECIPES["cityscapes"]
    assert (voc.iterations, voc.schedule, voc.lr, voc.crop) == (30_000, (21_000, 27_000), 0.003, 513)
    assert (cityscapes.iterations, cityscapes.schedule) == (90_000, (63_000, 81_000))
    assert (cityscapes.lr, cityscapes.crop) == (0.01, 769)
    for recipe in (voc, cityscapes):
        assert (recipe.batch_size, recipe.momentum, recipe.weight_decay) == (16, 0.9, 1e-4)
        assert (recipe.scales, recipe.warmup) == ((0.5, 2.0), 0)
    with pytest.raises(ValueError, match=r"^scales: expected the smallest and the largest ratio, got \(2.0, 0.5\)"):
        dataclasses.replace(voc, scales=(2.0, 0.5))


def test_the_loss_is_a_mean_over_labeled_pixels():
    logits = torch.randn(2, 3, 4, 4)
    masks = torch.randint(3, (2, 4, 4), dtype=torch.uint8)
    masks[0] = IGNORED
    batch = [(torch.zeros(3, 4, 4, dtype=torch.uint8), mask) for mask in masks]
    found = cross_entropy(lambda images: logits, batch, torch.device("cpu"))
    expected = -logits[1].double().log_softmax(0).gather(0, masks[1:].long()).mean()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert cross_entropy(lambda images: logits[:1], batch[:1], torch.device("cpu")) == 0


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_segments(data, tmp_path):
    """All background would be a mIoU of 28. It was 83 after 15 iterations."""
    arch = "resnet10-small"
    config = dataclasses.replace(CONFIG, iterations=16, schedule=(14,), batch_size=8, lr=0.05, eval_every=8)
    model = segmenter(arch)
    untrained, before = evaluate_segmenter(model, data.test)["mIoU"], weights_of(model)
    records = train_segmenter(model, data, config, run_in(tmp_path), name="segment", arch=arch)
    assert untrained < 30
    assert [record["step"] for record in records] == [8, 16]
    assert records[1]["mIoU"] > 60
    assert records[1]["loss"] < 0.5 * records[0]["loss"]
    assert records[1] == pytest.approx(records[1] | evaluate_segmenter(model, data.test))
    same = [name for name, value in model.state_dict().items() if value.ndim > 1 and torch.equal(value, before[name])]
    assert not same
    groups = torch.load(tmp_path / "segment.pth", weights_only=True)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [1e-4, 0]


def test_resuming_changes_nothing(data, tmp_path):
    whole, first, second = segmenter(), segmenter(), segmenter()
    run = {"data": data, "name": "segment", "arch": ARCH}
    config = dataclasses.replace(CONFIG, eval_every=2)
    short = dataclasses.replace(config, iterations=2)
    train_segmenter(whole, config=config, options=run_in(tmp_path / "whole"), **run)
    train_segmenter(first, config=short, options=run_in(tmp_path / "parts"), **run)
    checkpoint = tmp_path / "parts" / "segment.pth"
    options = run_in(tmp_path / "parts", resume=checkpoint, workers=1)
    records = train_segmenter(second, config=config, options=options, **run)
    assert [record["step"] for record in records] == [2, 4]
    assert_equal_states(weights_of(whole), weights_of(second))
    one, other = (torch.load(tmp_path / f / "segment.pth", weights_only=True) for f in ("whole", "parts"))
    assert one["optimizer"]["state"].keys() == other["optimizer"]["state"].keys()
    for slot, same in zip(one["optimizer"]["state"].values(), other["optimizer"]["state"].values(), strict=True):
        assert torch.equal(slot["momentum_buffer"], same["momentum_buffer"])


# --- the command ------------------------------------------------------------------------------------------------------


def answer(capsys, *arguments) -> dict:
    assert cli.main(["segment", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command(folders, tmp_path, capsys):
    torch.save(encoders.build(ARCH, 1).state_dict(), tmp_path / "weights.pth")
    start = ("--pretrained", tmp_path / "weights.pth", "-a", ARCH, "--output", tmp_path / "run")
    found = answer(capsys, folders / "folders", *start, *FLAGS, "--iterations", 10)
    assert (found["schedule"], found["crop"], found["batch_size"], found["scales"]) == ([7, 9], 48, 4, [0.5, 2.0])
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"segment.json", "segment.pth", "segment"}
    assert json.loads((tmp_path / "run/segment.json").read_text()).items() >= found.items()
    again = answer(capsys, folders / "folders", "--output", tmp_path / "run", "--evaluate")
    assert again == {name: found[name] for name in again} | {"pretrained": None}
    more = answer(capsys, folders / "folders", *start, *FLAGS, "--iterations", 12, "--resume", "auto")
    assert more["iterations"] == 12
    assert len((tmp_path / "run/segment/metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(("layout", "crop", "lr"), [("voc", 513, 0.003), ("cityscapes", 769, 0.01)])
def test_the_layout_selects_the_recipe(folders, tmp_path, capsys, monkeypatch, layout, crop, lr):
    monkeypatch.setattr(
        "moco_ext.cli.segment.train_segmenter", lambda *_, **__: [{"mIoU": 1, "pixel_accuracy": 1, "seconds": 1}]
    )
    found = answer(capsys, folders / layout, "--scratch", "-a", ARCH, "--output", tmp_path)
    assert (found["crop"], found["lr"], found["pretrained"]) == (crop, lr, None)
    assert (tmp_path / "segment-scratch.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DATA"], "pretrained: expected --pretrained WEIGHTS, or --scratch with --arch ARCH, got neither"),
        (["nowhere", "--scratch", "-a", ARCH], "data: expected a folder in the layout of VOC or Cityscapes, or of"),
        (["DATA", "--scratch", "-a", "vit_small"], "arch: expected a ResNet"),
        (["DATA", "--scratch", "-a", ARCH, "-e", "--output", "nowhere"], "no such file: nowhere/segment-scratch.pth"),
        (["DATA", "--scratch", "-a", ARCH, "-b", "200"], "data: expected at least 200 images for one step, got 24"),
        (["DATA", "--scratch", "-a", ARCH, "--crop", "8"], "crop: expected at least 32, got 8"),
    ],
)
def test_errors_are_one_line(folders, capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = [str(folders / "folders") if argument == "DATA" else argument for argument in arguments]
    assert cli.main(["segment", *arguments, "-j", "0"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_result(folders, tmp_path):
    command = [sys.executable, "-m", "moco_ext", "segment", folders / "folders", "--scratch", "-a", ARCH, *FLAGS]
    command = [*map(str, command), "--iterations", "40", "--save-every", "5", "--device", "cpu"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, "--output", str(whole)], env=environment(), check=True, capture_output=True, timeout=200)
    process = subprocess.Popen([*command, "--output", str(killed)], env=environment(), stderr=subprocess.DEVNULL)
    end = time.monotonic() + 100
    while not (killed / "segment-scratch.pth").is_file() and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert torch.load(killed / "segment-scratch.pth", weights_only=True)["iteration"] < 40
    resumed = [*command, "--output", str(killed), "--resume", "auto"]
    subprocess.run(resumed, env=environment(), check=True, capture_output=True, timeout=200)
    one, other = (
        torch.load(folder / "segment-scratch.pth", weights_only=True)["state_dict"] for folder in (whole, killed)
    )
    assert_equal_states(one, other)


@pytest.mark.slow
def test_two_processes_train_one_model(folders, tmp_path, capsys):
    """On CPUs each process has its own statistics of BatchNorm, and those of rank 0 are evaluated and saved."""
    command = ("segment", folders / "folders", "--scratch", "-a", ARCH, "--device", "cpu")
    done = torchrun(2, "-m", "moco_ext", *command, *FLAGS, "--iterations", 10, "--output", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["iterations"] == 10
    assert math.isfinite(found["mIoU"])
    alone = answer(capsys, folders / "folders", "--scratch", "--output", tmp_path, "--evaluate")  # in one process
    assert [alone[name] for name in ("mIoU", "pixel_accuracy")] == [found[name] for name in ("mIoU", "pixel_accuracy")]
