"""``moco-ext detect``: Faster R-CNN on an encoder, on a small generated data set."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from training import assert_equal_states, run_in, torchrun, weights_of

from moco_ext import MoCo, cli, encoders
from moco_ext.checkpoints import files
from moco_ext.checkpoints.detectron2 import detector_from_detectron2, detector_to_detectron2
from moco_ext.checkpoints.training import save_checkpoint
from moco_ext.data.detection import load_detection
from moco_ext.data.images import UnreadableImageError
from moco_ext.data.items import items, training_items
from moco_ext.evaluate.detection import average_precision, evaluate_detector
from moco_ext.train import iterations
from moco_ext.train.detector import RECIPES, DetectorConfig, build_detector, to_device, train_detector

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import garments

for package in ("pycocotools", "tensorboard", "timm", "torchmetrics"):
    pytest.importorskip(package)

ARCH = "timm:test_resnet"  # of 0.5 M parameters
SMALL = {
    "min_size": (64,),
    "anchors": (12, 18, 26, 38, 54),
    "rois": 16,
    "proposals": 20,
    "roi_size": 7,
    "bn_batches": 2,
}
CONFIG = DetectorConfig(4, (3,), warmup=2, batch_size=4, **SMALL)
FLAGS = [
    *("--min-size", "64", "--anchors", "12", "18", "26", "38", "54", "--rois", "16", "--proposals", "20", "-j", "0"),
    *("--roi-size", "7", "--bn-batches", "2", "-b", "4", "--threads", "1", "--logger", "none", "--log-seconds", "0"),
]


@pytest.fixture(autouse=True)
def use_one_thread(one_thread):
    pass


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Digits on 64x64 pixels, in both layouts."""
    root = tmp_path_factory.mktemp("detection")
    for layout in ("voc", "coco"):
        garments.write(root / layout, layout, {"train": 24, "val": 5}, side=64, objects="digits")
    return root


@pytest.fixture(scope="session")
def data(folders):
    return load_detection(folders / "voc")


def detector(config: DetectorConfig = CONFIG, classes: int = 10, arch: str = ARCH):
    torch.manual_seed(0)
    return build_detector(encoders.build(arch, 1), classes, config)


# --- data -------------------------------------------------------------------------------------------------------------


def test_both_layouts_hold_the_same_objects(folders, data):
    coco = load_detection(folders / "coco")
    assert (data.layout, coco.layout) == ("voc", "coco")
    assert data.classes == coco.classes == tuple("0123456789")
    for ours, theirs, n in ((data.train, coco.train, 24), (data.test, coco.test, 5)):
        assert len(ours) == len(theirs) == n
        for position in range(n):
            np.testing.assert_array_equal(ours.objects[position], theirs.objects[position])
            assert torch.equal(ours.read(position)[0], theirs.read(position)[0])


def test_boxes_are_those_of_the_annotations(data):
    path = Path(data.train.paths[0])
    text = (path.parents[1] / "Annotations" / f"{path.stem}.xml").read_text()
    x1, y1, x2, y2 = (int(text.split(f"<{tag}>")[1].split("<")[0]) for tag in ("xmin", "ymin", "xmax", "ymax"))
    image, target = data.train.read(0)
    assert target["boxes"][0].tolist() == [x1 - 1, y1 - 1, x2, y2]  # VOC counts pixels from 1, and includes the last
    mirrored, other = data.train.read(0, flip=True)
    assert torch.equal(mirrored, image.flip(-1))
    assert other["boxes"][0].tolist() == [64 - x2, y1 - 1, 64 - x1 + 1, y2]


def test_years_of_voc_are_united(folders, tmp_path):
    for year, names in (("VOC2007", ("trainval", "test")), ("VOC2012", ("trainval", "test"))):
        shutil.copytree(folders / "voc", tmp_path / year)
        sets = tmp_path / year / "ImageSets/Main"
        for old, new in zip(("train", "val"), names, strict=True):
            (sets / f"{old}.txt").rename(sets / f"{new}.txt")
    (tmp_path / "VOC2012/ImageSets/Main/test.txt").write_text("2012_000001\n")  # published without annotations
    data = load_detection(tmp_path)
    assert (len(data.train), len(data.test)) == (48, 5)
    assert len(load_detection(tmp_path / "VOC2007").train) == 24


def test_crowds_and_empty_images(folders, tmp_path):
    shutil.copytree(folders / "coco", tmp_path / "coco")
    for name in ("train", "val"):
        path = tmp_path / "coco/annotations" / f"instances_{name}.json"
        content = json.loads(path.read_text())
        for entry in content["annotations"]:
            if entry["image_id"] == 1:
                entry["iscrowd"] = 1
            if entry["image_id"] == 2:
                entry["bbox"][2] = 0  # without area
        path.write_text(json.dumps(content))
    data = load_detection(tmp_path / "coco")
    assert len(data.train) == 22
    assert data.test.read(0)[1]["iscrowd"].all()
    assert len(data.test.read(1)[1]["boxes"]) == 0


def replace(path: Path, pattern: str, by: str) -> None:
    path.write_text(re.sub(pattern, by, path.read_text()))


def without(path: Path, tag: str) -> None:
    replace(path, rf"<{tag}>.*?</{tag}>", "")


def change_coco(folder: Path, split: str, change: Callable[[dict], object]) -> None:
    path = folder / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("box", [[1, 2, 3], None, [1, 2, math.nan, 4], [1, 2, "wide", 4]])
def test_a_box_has_four_numbers(folders, tmp_path, box):
    shutil.copytree(folders / "coco", tmp_path / "coco")
    change_coco(tmp_path / "coco", "val", lambda content: content["annotations"][0].update(bbox=box))
    message = rf"^data: expected x, y, width and height as each bbox in .*instances_val.json, got {re.escape(str(box))}"
    with pytest.raises(ValueError, match=message):
        load_detection(tmp_path / "coco")


def test_the_name_of_a_class_has_no_spaces_around_it(folders, data, tmp_path):
    """Of an indented file; it would be one more class, and the numbers of the others would change."""
    shutil.copytree(folders / "voc", tmp_path / "voc")
    replace(tmp_path / "voc/Annotations/train00003.xml", r"<name>(\d)</name>", r"<name>\n  \1\n</name>")
    found = load_detection(tmp_path / "voc")
    assert found.classes == data.classes
    np.testing.assert_array_equal(found.train.objects[3], data.train.objects[3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: root / "nowhere", "expected a folder in the layout of VOC or COCO, got .*nowhere"),
        (lambda root: root / "JPEGImages", r"expected annotations \(COCO\) or ImageSets/Main, .* got train00000.jpg"),
        (lambda root: (root / "Annotations/train00003.xml").unlink(), "expected annotations in .*train00003.xml"),
        (
            lambda root: (root / "Annotations/train00003.xml").write_text("<a>"),
            "expected annotations of voc in .*ParseError",
        ),
        (
            lambda root: without(root / "Annotations/train00003.xml", "xmax"),
            "expected annotations of voc in .*bndbox/xmax",
        ),
        (
            lambda root: replace(root / "Annotations/train00003.xml", r"<xmax>\d+", "<xmax>wide"),
            r"expected xmin, ymin, xmax and ymax in .*train00003.xml, got \['\d+', '\d+', 'wide', '\d+'\]",
        ),
        (
            lambda root: replace(root / "Annotations/train00003.xml", r"<xmax>\d+", "<xmax>nan"),
            "expected xmin, ymin, xmax and ymax in .*train00003.xml, got .*nan",
        ),
        (
            lambda root: replace(root / "Annotations/train00003.xml", r"<difficult>\d", "<difficult>"),
            r"expected a number as difficult in .*train00003.xml, got \[''\]",
        ),
        (
            lambda root: (root / "ImageSets/Main/val.txt").write_text(""),
            "expected test images with objects .* got none",
        ),
    ],
)
def test_wrong_folders(folders, tmp_path, change, message):
    shutil.copytree(folders / "voc", tmp_path / "voc")
    changed = change(tmp_path / "voc")
    with pytest.raises(ValueError, match=f"^data: {message}"):
        load_detection(changed if isinstance(changed, Path) else tmp_path / "voc")


def test_wrong_layouts(folders, tmp_path):
    with pytest.raises(ValueError, match=r"^data: expected annotations in .*voc, got Annotations, ImageSets, JPEG"):
        load_detection(folders / "voc", "coco")
    (tmp_path / "annotations").mkdir()
    with pytest.raises(ValueError, match=r"^data: expected one instances_train\*.json in .*annotations, got 0"):
        load_detection(tmp_path)


def test_a_category_has_one_name(folders, tmp_path):
    shutil.copytree(folders / "coco", tmp_path / "coco")
    path = tmp_path / "coco/annotations/instances_val.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "another"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"^data: expected one name for each category's id .*another"):
        load_detection(tmp_path / "coco")


def test_an_image_has_its_own_id(folders, tmp_path):
    """Or the images after it would have the objects of the ones before them, as in files that were joined by hand."""
    shutil.copytree(folders / "coco", tmp_path / "coco")
    path = tmp_path / "coco/annotations/instances_val.json"
    content = json.loads(path.read_text())
    content["images"][1]["id"] = content["images"][0]["id"]
    known = {image["id"] for image in content["images"]}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in known]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"^data: expected an id for each image in .*val.json, got 4 of 5 images"):
        load_detection(tmp_path / "coco")


def test_boxes_are_of_the_size_of_their_image(folders, tmp_path):
    """Of images that were resized after they were annotated, or annotated without their EXIF orientation."""
    shutil.copytree(folders / "coco", tmp_path / "coco")
    change_coco(tmp_path / "coco", "train", lambda content: content["images"][0].update(width=640, height=480))
    change_coco(tmp_path / "coco", "val", lambda content: content["images"][0].update(width=0))  # unknown
    data = load_detection(tmp_path / "coco")
    data.test.read(0)
    with pytest.raises(
        UnreadableImageError, match=r"^data: expected 640 x 480 pixels, as annot.*, got 64 x 64 in .*jpg"
    ):
        data.train.read(0)
    shutil.copytree(folders / "voc", tmp_path / "voc")
    corners = {"xmin": 70, "ymin": 3, "xmax": 90, "ymax": 9}
    for tag, value in corners.items():
        replace(tmp_path / "voc/Annotations/train00000.xml", rf"<{tag}>\d+", f"<{tag}>{value}")
    data = load_detection(tmp_path / "voc")
    data.train.read(1)
    message = r"^data: expected boxes in the 64 x 64 pixels of .*jpg, got \[69.0, 2.0, 90.0, 9.0\]$"
    for workers in (0, 1):
        with pytest.raises(UnreadableImageError, match=message):
            list(items(data.train.read, [1, 0], workers))


def test_batches_depend_on_the_iteration_alone(data):
    def boxes(batches):
        return [torch.cat([target["boxes"] for _, target in batch]) for batch in batches]

    whole = boxes(training_items(data.train.view, len(data.train), 4, stop=7, seed=1))
    later = boxes(training_items(data.train.view, len(data.train), 4, start=4, stop=7, seed=1))
    assert len(whole) == 7
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], later, strict=True))
    halves = [
        boxes(training_items(data.train.view, len(data.train), 2, stop=7, seed=1, rank=rank, world=2))
        for rank in (0, 1)
    ]
    assert all(torch.equal(a, torch.cat(pair)) for a, *pair in zip(whole, *halves, strict=True))


# --- average precision ------------------------------------------------------------------------------------------------


class Oracle(nn.Module):
    """Detects what a split holds, in its order; ``shift`` moves each box by a share of its width."""

    def __init__(self, split, shift=0.0):
        super().__init__()
        self.targets, self.shift = iter([split.read(position)[1] for position in range(len(split))]), shift

    def forward(self, images):
        target = next(self.targets)
        boxes = target["boxes"].clone()
        boxes[:, [0, 2]] += self.shift * (boxes[:, [2]] - boxes[:, [0]])
        return [{"boxes": boxes, "labels": target["labels"], "scores": torch.ones(len(boxes))}]


def test_perfect_detections_score_100(data):
    assert evaluate_detector(Oracle(data.test), data.test) == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100})


def test_shifted_detections_score_by_their_overlap(data):
    # IoU (1 - s) / (1 + s) = 0.667 at s = 0.2: found at the thresholds 0.5 to 0.65, which are 4 of 10.
    found = evaluate_detector(Oracle(data.test, shift=0.2), data.test)
    assert found == pytest.approx({"AP": 40, "AP50": 100, "AP75": 0})


def test_ignored_objects_are_neither_found_nor_missed():
    box, other = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[0.0, 0, 10, 10], [50, 50, 90, 90]])
    found = {"boxes": box, "scores": torch.ones(1), "labels": torch.ones(1, dtype=torch.int64)}
    target = {"boxes": other, "labels": torch.ones(2, dtype=torch.int64), "iscrowd": torch.tensor([0, 1])}
    assert average_precision([found], [target])["AP"] == pytest.approx(100)
    target["iscrowd"][1] = 0
    assert average_precision([found], [target])["AP"] == pytest.approx(100 * 51 / 101)  # recall 0 to 0.5 of 101 points
    target["iscrowd"][:] = 1
    assert all(math.isnan(score) for score in average_precision([found], [target]).values())


def test_test_objects_that_are_all_ignored_are_an_error(folders, tmp_path):
    """AP would be undefined, of which pycocotools makes -1."""
    shutil.copytree(folders / "coco", tmp_path / "coco")
    change_coco(tmp_path / "coco", "val", lambda content: [entry.update(iscrowd=1) for entry in content["annotations"]])
    with pytest.raises(ValueError, match=r"^data: expected test objects that count in .*, got none that is not of a c"):
        load_detection(tmp_path / "coco")


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("neck", ["c4", "fpn"])
@pytest.mark.parametrize("arch", [ARCH, "resnet10-small"])
def test_the_encoder_is_the_backbone_and_all_of_it_is_trained(neck, arch):
    encoder = encoders.build(arch, 1).requires_grad_(False)
    expected = weights_of(encoder)
    model = build_detector(encoder, 3, dataclasses.replace(CONFIG, neck=neck))
    state = model.state_dict()
    prefixes = ("backbone.", "roi_heads.box_head.0.") if neck == "c4" else ("backbone.body.",)
    layers = [name for name in expected if not name.startswith(("fc.", "head."))]
    for name in layers:
        place = prefixes[-1] + name.removeprefix("layer4.") if name.startswith("layer4.") and neck == "c4" else None
        assert torch.equal(state[place or prefixes[0] + name], expected[name]), name
    assert all(parameter.requires_grad for parameter in model.parameters())
    norms = [name for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    new = [name for name in norms if not name.startswith((*prefixes, "backbone.bn1", "backbone.layer"))]
    if neck == "c4":
        assert new == ["roi_heads.box_head.1"]
    else:
        assert len([name for name in new if name.startswith("backbone.fpn.")]) == 8  # 4 levels, 2 convolutions each
        assert len([name for name in new if name.startswith("roi_heads.box_head.")]) == 4
    assert not any("Frozen" in type(layer).__name__ for layer in model.modules())


def test_resnet50_c4_is_the_published_one():
    model = build_detector(encoders.build("resnet50", 1), 20, RECIPES["voc"])
    assert model.backbone.out_channels == 1024
    pool = model.roi_heads.box_roi_pool
    assert (pool.output_size, pool.scale, pool.sampling_ratio) == ((14, 14), 1 / 16, 0)
    assert model.roi_heads.box_head[1].num_features == 2048
    assert model.rpn.head.cls_logits.out_channels == 15
    assert model.roi_heads.box_predictor.cls_score.out_features == 21
    assert model.transform.min_size == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert (model.rpn.pre_nms_top_n(), model.rpn.post_nms_top_n()) == (12000, 2000)
    model.eval()
    assert (model.rpn.pre_nms_top_n(), model.rpn.post_nms_top_n()) == (6000, 1000)


def test_recipes_and_the_learning_rate():
    voc, once, twice = (RECIPES[name] for name in ("voc", "coco-1x", "coco-2x"))
    assert (voc.iterations, voc.schedule, voc.warmup, voc.lr, voc.batch_size) == (24000, (18000, 22000), 100, 0.02, 16)
    assert (once.iterations, once.schedule, once.warmup) == (90000, (60000, 80000), 1000)
    assert (twice.iterations, twice.schedule, twice.min_size) == (
        180000,
        (120000, 160000),
        (640, 672, 704, 736, 768, 800),
    )
    rates = [voc.lr_at(iteration) for iteration in (0, 50, 100, 17999, 18000, 22000)]
    assert rates == pytest.approx([2e-5, 0.02 * 0.5005, 0.02, 0.02, 0.002, 0.0002])


@pytest.mark.parametrize("arch", ["vit_small", "resnet8-small", "convnext_tiny"])
def test_other_encoders_are_an_error(arch):
    with pytest.raises(
        ValueError, match=r"^arch: expected a ResNet with layer1, .* for detection, got \w+ with [03] of"
    ):
        build_detector(encoders.build(arch, 1), 3, CONFIG)


def test_settings_that_make_no_sense():
    with pytest.raises(ValueError, match=r"^anchors: expected 5 sizes, one for each level of fpn, got 1"):
        dataclasses.replace(CONFIG, neck="fpn", anchors=(32,))
    with pytest.raises(ValueError, match=r"^neck: expected one of c4, fpn"):
        dataclasses.replace(CONFIG, neck="c5")


@pytest.mark.parametrize("kind", [pytest.param("basic", id="18"), pytest.param("resnet50", marks=pytest.mark.slow)])
def test_detectron2_names_and_back(kind, tmp_path):
    model = detector(classes=3, arch="resnet10" if kind == "basic" else kind)
    state = weights_of(model)
    for name, value in state.items():
        if value.is_floating_point():
            value.normal_()
        if name.startswith("roi_heads.box_predictor.bbox_pred."):
            value[:4] = 0  # of the background
    files.write(tmp_path / "x.pkl", detector_to_detectron2(state))
    content = files.read(tmp_path / "x.pkl")["model"]
    assert_equal_states(detector_from_detectron2(content), state)
    names = {
        "backbone.stem.conv1.weight": "backbone.conv1.weight",
        "backbone.stem.conv1.norm.running_mean": "backbone.bn1.running_mean",
        "backbone.res2.0.conv1.weight": "backbone.layer1.0.conv1.weight",
        "backbone.res4.0.shortcut.norm.bias": "backbone.layer3.0.downsample.1.bias",
        "roi_heads.res5.0.conv2.norm.weight": "roi_heads.box_head.0.0.bn2.weight",
        "roi_heads.res5.norm.weight": "roi_heads.box_head.1.weight",
        "proposal_generator.rpn_head.conv.bias": "rpn.head.conv.0.0.bias",
    }
    for theirs, ours in names.items():
        assert torch.equal(content[theirs], state[ours]), theirs
    # Anchor (size s, ratio r) is 3 s + r there and 5 r + s here; the background is the last class there.
    logits, deltas = (
        content[f"proposal_generator.rpn_head.{name}.bias"] for name in ("objectness_logits", "anchor_deltas")
    )
    assert torch.equal(logits[3 * 4 + 1], state["rpn.head.cls_logits.bias"][5 * 1 + 4])
    assert torch.equal(deltas[4 * 13 : 4 * 14], state["rpn.head.bbox_pred.bias"][4 * 9 : 4 * 10])
    scores, boxes = (content[f"roi_heads.box_predictor.{name}.bias"] for name in ("cls_score", "bbox_pred"))
    assert torch.equal(scores[3], state["roi_heads.box_predictor.cls_score.bias"][0])
    assert torch.equal(boxes[:4], state["roi_heads.box_predictor.bbox_pred.bias"][4:8])
    with pytest.raises(ValueError, match=r"^state: expected the tensors of a detector with neck c4, got backbone.body"):
        detector_to_detectron2(detector(dataclasses.replace(CONFIG, neck="fpn")).state_dict())


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("neck", "half", "factor"), [("c4", 12, 0.8), ("fpn", 3, 1)])
def test_the_loss_falls_and_everything_moves(data, tmp_path, neck, half, factor):
    config = dataclasses.replace(
        CONFIG, neck=neck, iterations=2 * half, schedule=(2 * half - 2,), eval_every=half, rois=half, proposals=5
    )
    model = detector(config)
    before = weights_of(model)
    records = train_detector(model, data, config, run_in(tmp_path, print_freq=1), name="detect", arch=ARCH)
    assert [record["step"] for record in records] == [half, 2 * half]
    assert records[1]["loss"] < factor * records[0]["loss"]
    assert records[1]["lr"] == pytest.approx(0.002)
    assert all(0 <= record[name] <= 100 for record in records for name in ("AP", "AP50", "AP75"))
    background = {f"roi_heads.box_predictor.bbox_pred.{name}" for name in ("weight", "bias")}
    state = model.state_dict()
    still = [name for name in state if name.startswith("backbone.") and torch.equal(state[name], before[name])]
    assert not [name for name in still if state[name].ndim > 1]  # steps of 2e-5 are too small for a weight near 1
    assert not any(state[name][:4].any() for name in background)
    groups = torch.load(tmp_path / "detect.pth", weights_only=True)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [1e-4, 0]


def test_resuming_changes_nothing(data, tmp_path):
    whole, first, second = detector(), detector(), detector()
    run = {"data": data, "name": "detect", "arch": ARCH}
    config = dataclasses.replace(CONFIG, eval_every=2)
    train_detector(whole, config=config, options=run_in(tmp_path / "whole"), **run)
    train_detector(first, config=dataclasses.replace(config, iterations=2), options=run_in(tmp_path / "parts"), **run)
    checkpoint = tmp_path / "parts" / "detect.pth"
    records = train_detector(second, config=config, options=run_in(tmp_path / "parts", resume=checkpoint), **run)
    assert [record["step"] for record in records] == [2, 4]
    assert_equal_states(weights_of(whole), weights_of(second))
    with pytest.raises(ValueError, match=r"^iterations: expected more than the 4 already done, got 4"):
        train_detector(second, config=config, options=run_in(tmp_path / "parts", resume=checkpoint), **run)
    longer = dataclasses.replace(config, iterations=5)
    for other, expected in (
        ({"config": dataclasses.replace(longer, neck="fpn")}, rf"a checkpoint of {ARCH}-fpn, got one of {ARCH}-c4"),
        ({"arch": "resnet34"}, rf"a checkpoint of resnet34-c4, got one of {ARCH}-c4"),
        (
            {"data": dataclasses.replace(data, classes=[*data.classes, "dog"])},
            rf"a checkpoint of the {len(data.classes) + 1} classes of the data, got one of {len(data.classes)}, with "
            "none instead of dog",
        ),
    ):
        with pytest.raises(ValueError, match=rf"^resume: expected {expected}"):
            train_detector(
                detector(), options=run_in(tmp_path, resume=checkpoint), **(run | {"config": longer} | other)
            )


def test_sigterm_saves_the_iteration(data, tmp_path, monkeypatch):
    whole, model = detector(), detector()
    run = {"data": data, "config": CONFIG, "name": "detect", "arch": ARCH}
    train_detector(whole, options=run_in(tmp_path / "whole"), **run)
    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(iterations, "_finite", lambda loss, *_: os.kill(os.getpid(), signal.SIGTERM) or loss)
        with pytest.raises(SystemExit) as stopped:
            train_detector(model, options=run_in(folder, print_freq=1), **run)
    assert stopped.value.code == 143
    assert torch.load(folder / "detect.pth", weights_only=True)["iteration"] == 1
    train_detector(model, options=run_in(folder, resume=folder / "detect.pth"), **run)
    assert_equal_states(weights_of(whole), weights_of(model))


def test_sigterm_in_the_last_evaluation_leaves_a_finished_run(data, tmp_path, monkeypatch):
    """Started again, it would have no iterations left, and never write its result."""

    def evaluate(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"AP": 1.0}

    monkeypatch.setattr("moco_ext.train.detector.evaluate_detector", evaluate)
    options = run_in(tmp_path, print_freq=1)
    [record] = train_detector(detector(), data, CONFIG, options, name="detect", arch=ARCH)
    assert (record["step"], record["AP"]) == (CONFIG.iterations, 1)
    assert torch.load(tmp_path / "detect.pth", weights_only=True)["iteration"] == CONFIG.iterations


def test_a_record_is_of_all_iterations_before_it(data, tmp_path, monkeypatch):
    """Not only of those after the checkpoint that the run was resumed from, which lies between two records."""
    run = {"data": data, "config": CONFIG, "name": "detect", "arch": ARCH}
    [through] = train_detector(detector(), options=run_in(tmp_path / "through"), **run)
    folder = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(
            iterations,
            "_finite",
            lambda loss, step, _: os.kill(os.getpid(), signal.SIGTERM) or loss if step == 3 else loss,
        )
        with pytest.raises(SystemExit):
            train_detector(detector(), options=run_in(folder, print_freq=1), **run)
    checkpoint = torch.load(folder / "detect.pth", weights_only=True)
    [resumed] = train_detector(detector(), options=run_in(folder, resume=folder / "detect.pth"), **run)
    assert resumed["loss"] == through["loss"]
    assert resumed["seconds"] > checkpoint["progress"]["seconds"] > 0
    del checkpoint["progress"]  # as earlier versions wrote it
    torch.save(checkpoint, folder / "detect.pth")
    [resumed] = train_detector(detector(), options=run_in(folder, resume=folder / "detect.pth"), **run)
    assert resumed["loss"] != through["loss"]


def test_a_run_that_is_all_warm_up_is_told(data, tmp_path):
    """A recipe's schedule is scaled to --iterations, its warm-up is not."""
    config = dataclasses.replace(CONFIG, iterations=1, warmup=100)
    message = r"^warmup: all of the 1 iterations are in the warm-up of 100, so the learning rate stays below 0.02; see"
    with pytest.warns(UserWarning, match=message):
        train_detector(detector(config), data, config, run_in(tmp_path), name="detect", arch=ARCH)


def test_statistics_of_batchnorm_are_averages(data, tmp_path):
    """Of the last model over ``bn_batches``, not of the models that training went through."""
    model = detector()
    train_detector(model, data, CONFIG, run_in(tmp_path), name="detect", arch=ARCH)
    sums = torch.zeros(model.backbone.bn1.num_features)

    def add(layer: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        sums.add_(inputs[0].mean((0, 2, 3)) / 2)

    hook = model.backbone.bn1.register_forward_pre_hook(add)
    for batch in training_items(data.train.view, len(data.train), 4, stop=2, seed=CONFIG.seed):
        with torch.no_grad():
            model(*to_device(batch, torch.device("cpu")))
    hook.remove()
    torch.testing.assert_close(
        torch.load(tmp_path / "detect.pth")["state_dict"]["module.backbone.bn1.running_mean"], sums
    )


def test_an_infinite_loss_stops_and_leaves_nothing(data, tmp_path):
    config = dataclasses.replace(CONFIG, lr=1e30)
    with pytest.raises(FloatingPointError, match=r"^loss: expected a finite number, got nan by iteration \d"):
        train_detector(detector(), data, config, run_in(tmp_path, print_freq=1), name="detect", arch=ARCH)
    assert not (tmp_path / "detect.pth").exists()


# --- the command ------------------------------------------------------------------------------------------------------


def answer(capsys, *arguments) -> dict:
    assert cli.main(["detect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command(folders, tmp_path, capsys):
    torch.save(encoders.build(ARCH, 1).state_dict(), tmp_path / "weights.pth")
    start = ("--pretrained", tmp_path / "weights.pth", "-a", ARCH, "--output", tmp_path / "run")
    found = answer(capsys, folders / "voc", *start, *FLAGS, "--iterations", 2, "--export", tmp_path / "d2.pkl")
    assert found["schedule"] == [2, 2]  # 18,000 and 22,000 of 24,000
    assert (found["warmup"], found["lr"], found["neck"]) == (100, 0.02, "c4")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"detect.json", "detect.pth", "detect"}
    assert json.loads((tmp_path / "run/detect.json").read_text()).items() >= found.items()
    again = answer(capsys, folders / "voc", "--output", tmp_path / "run", "--evaluate")  # with the settings recorded
    assert again == {name: found[name] for name in again} | {"pretrained": None}
    damaged = torch.load(tmp_path / "run/detect.pth", weights_only=True)
    for entry, value in (("iteration", "x"), ("config", None), ("transform", [1]), ("classes", 3)):
        torch.save(damaged | {entry: value}, tmp_path / "damaged.pth")
        assert cli.main(["detect", str(folders / "voc"), "-e", "--resume", str(tmp_path / "damaged.pth")]) == 1
        expected = f"resume: expected a checkpoint of detect or segment, got {value} {entry} in"
        assert expected in capsys.readouterr().err
    assert cli.main(["detect", str(folders / "voc"), "-e", "-a", "resnet34", "--output", str(tmp_path / "run")]) == 1
    assert f"resume: expected a checkpoint of resnet34, got one of {ARCH}" in capsys.readouterr().err
    more = answer(capsys, folders / "voc", *start, *FLAGS, "--iterations", 3, "--resume", "auto")
    assert more["iterations"] == 3
    assert "roi_heads.res5.norm.weight" in files.read(tmp_path / "d2.pkl")["model"]


def test_the_query_encoder_of_a_run_with_its_normalization(folders, tmp_path, capsys):
    model = MoCo(ARCH, dim=8, K=16)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    transform = {"size": 28, "mean": [0.25], "std": [0.5], "crop_pct": 1.0}  # of gray images
    save_checkpoint(
        tmp_path / "checkpoint.pth", epoch=1, arch=ARCH, model=model, optimizer=optimizer, transform=transform
    )
    built = []

    def keep(*arguments):
        built.append(build_detector(*arguments))
        return built[-1]

    before = model.encoder_q.layer1[0].conv1.weight.clone()
    output = ("--output", tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moco_ext.cli.detect.build_detector", keep)
        answer(capsys, folders / "voc", "--pretrained", tmp_path, *FLAGS, *output, "--iterations", 1, "--lr", 1e-9)
        answer(capsys, folders / "voc", *output, "--evaluate")  # of the checkpoint, not of --pretrained
    for detector in built:
        torch.testing.assert_close(detector.backbone.layer1[0].conv1.weight, before)
        assert (detector.transform.image_mean, detector.transform.image_std) == ([0.25] * 3, [0.5] * 3)
    assert len(built) == 2


def test_the_command_from_scratch_on_coco(folders, tmp_path, capsys):
    flags = [*FLAGS, "--iterations", 1, "--neck", "fpn", "--rois", 4, "--proposals", 4, "--output", tmp_path]
    found = answer(capsys, folders / "coco", "--scratch", "-a", ARCH, *flags)
    assert found["warmup"] == 1000
    assert found["pretrained"] is None
    assert (tmp_path / "detect-scratch.pth").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DATA"], "pretrained: expected --pretrained WEIGHTS, or --scratch with --arch ARCH, got neither"),
        (["DATA", "--scratch"], "got --scratch alone"),
        (["DATA", "--scratch", "-a", "resnet10", "--pretrained", "x"], "got both"),
        (["DATA", "--scratch", "--pretrained", "x", "-e"], "got both"),
        (["DATA", "--pretrained", "nowhere.pth"], "checkpoint: no such file: nowhere.pth"),
        (["nowhere", "--scratch", "-a", ARCH], "data: expected a folder in the layout of VOC or COCO, got nowhere"),
        (["DATA", "--scratch", "-a", "vit_small"], "arch: expected a ResNet"),
        (["DATA", "--scratch", "-a", ARCH, "-e", "--output", "nowhere"], "no such file: nowhere/detect-scratch.pth"),
        (
            ["DATA", "--scratch", "-a", ARCH, "--export", "x.pth"],
            "export: expected a name that ends in .pkl, got x.pth",
        ),
        (
            ["DATA", "--scratch", "-a", ARCH, *FLAGS, "--iterations", "1", "--export", "nowhere/x.pkl"],
            "export: no such folder: nowhere",
        ),
        (
            ["DATA", "--scratch", "-a", ARCH, "--neck", "fpn", *FLAGS, "--iterations", "1", "--export", "x.pkl"],
            "export: expected --neck c4, whose layers detectron2 has names for, got fpn",
        ),
        (["DATA", "--scratch", "-a", ARCH, "-b", "200"], "data: expected at least 200 images for one step, got 24"),
    ],
)
def test_errors_are_one_line(folders, capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = [str(folders / "voc") if argument == "DATA" else argument for argument in arguments]
    assert cli.main(["detect", *arguments, "-j", "0"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("package", ["torchmetrics", "pycocotools"])
def test_a_missing_package_is_one_line(folders, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.detection", None)
    assert cli.main(["detect", str(folders / "voc"), "--scratch", "-a", ARCH]) == 1
    expected = f"this needs {package}, which is not installed: pip install {package} (all that detection needs, from a"
    assert expected in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_one_model(folders, tmp_path, capsys):
    """On CPUs each process has its own statistics of BatchNorm, and those of rank 0 are evaluated and saved."""
    data = ("detect", folders / "voc", "--scratch", "-a", ARCH, "--device", "cpu")
    done = torchrun(2, "-m", "moco_ext", *data, *FLAGS, "--iterations", 3, "--output", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["iterations"] == 3
    assert math.isfinite(found["AP"])
    alone = answer(capsys, folders / "voc", "--scratch", "--output", tmp_path, "--evaluate")  # in one process
    assert [alone[name] for name in ("AP", "AP50", "AP75")] == [found[name] for name in ("AP", "AP50", "AP75")]
